"""Weight disentanglement: how far two task vectors disturb each other on each other's images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.metrics.plotting import DrawnMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DisentanglementError", "Form", "disagreement", "representation_divergence"]

Form = Literal["prediction", "representation"]
"""What is compared: the predicted classes, or the softmax of the features."""


def disagreement(single: Tensor, joint: Tensor) -> Tensor:
    """1 where two models predict different classes, else 0.

    Args:
        single: logits ``[…, C]``.
        joint: logits ``[…, C]``, of the same images; leading dimensions are broadcast.

    Returns:
        float64 ``[…]``.
    """
    return (single.argmax(-1) != joint.argmax(-1)).double()


def representation_divergence(single: Tensor, joint: Tensor) -> Tensor:
    """``KL(softmax f_single ‖ softmax f_joint)`` of the features, in nats; no head is needed.

    Args:
        single: features ``[…, d]``.
        joint: features ``[…, d]``, of the same images; leading dimensions are broadcast.

    Returns:
        float64 ``[…]``, at least 0, computed in the features' precision, float32 at least.
    """
    target, found = (
        (features if features.dtype.itemsize >= 4 else features.float()).log_softmax(-1) for features in (single, joint)
    )
    divergence = F.kl_div(found, target.expand_as(found), reduction="none", log_target=True).sum(-1)
    return divergence.double().clamp(min=0)


_DISTANCES = {"prediction": disagreement, "representation": representation_divergence}


class DisentanglementError(DrawnMetric):
    """``ξ(α1, α2) = Σ_{t=1,2} E_{x∼t} dist(f(x; θ0 + α_t τ_t), f(x; θ0 + α1 τ1 + α2 τ2))`` on a grid.

    Ortiz-Jimenez et al. 2023, section 3. The distance is :func:`disagreement` of predictions or
    :func:`representation_divergence`. What ``f(x; θ0 + α_t τ_t)`` gives is the same along a line of the grid: compute
    it once per line.

    Args:
        first: A values of α1, the rows.
        second: B values of α2, the columns.
        form: which distance.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: there is no value, or no such form.

    Examples:
        >>> import torch
        >>> metric = DisentanglementError([1.0], [0.0, 1.0])
        >>> single, joint = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])
        >>> metric.update(0, 0, slice(None), single, torch.stack([single, joint]))
        >>> metric.update(1, 0, slice(None), single, torch.stack([single, single]))
        >>> metric.compute()
        tensor([[0.0000, 0.5000]], dtype=torch.float64)
    """

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(
        self, first: Sequence[float], second: Sequence[float], form: Form = "prediction", **settings: Any
    ) -> None:
        super().__init__(**settings)
        if not len(first) or not len(second):
            raise ConfigurationError(
                f"DisentanglementError: expected at least one coefficient of each vector, got {len(first)} and "
                f"{len(second)}. Use e.g. 20 from -3 to 3."
            )
        if form not in get_args(Form):
            raise ConfigurationError(f"form: expected {' or '.join(get_args(Form))}, got {form!r}. Use one of them.")
        self.first, self.second, self.form = tuple(first), tuple(second), form
        shape = (2, len(self.first), len(self.second))
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, task: int, row: int, columns: int | slice, single: Tensor, joint: Tensor) -> None:
        """Take in some images of one task at some points of one row of the grid.

        Args:
            task: 0 or 1, whose images they are.
            row: position of α1.
            columns: positions of α2, as an index or a slice.
            single: logits of the task's head, or features, of the model with its vector alone: ``[N, k]``, or
                ``[B', N, k]`` where they differ from column to column.
            joint: those of the model with both vectors, ``[N, k]`` for one column, or ``[B', N, k]``.

        Raises:
            ConfigurationError: the task is another one.
        """
        if task not in (0, 1):
            raise ConfigurationError(f"task: expected 0 or 1, got {task!r}. Two tasks make a grid.")
        distances = _DISTANCES[self.form](single, joint)
        self.total[task, row, columns] += distances.sum(-1).to(self.total)
        self.count[task, row, columns] += distances.shape[-1]

    def compute(self) -> Tensor:
        """``ξ``, ``[A, B]`` in float64; NaN where a task has no images."""
        return (self.total / self.count).sum(0)

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw ξ over the plane of α1 and α2."""
        from lit_merge.report.matrices import draw_plane

        values = found.reshape(len(self.first), len(self.second))
        mesh = draw_plane(axes, values.tolist(), self.first, self.second)
        axes.set_xlabel("α1")
        axes.set_ylabel("α2")
        axes.figure.colorbar(mesh, ax=axes, label="ξ")
