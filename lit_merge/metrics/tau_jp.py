"""How much a task vector disturbs the features of other tasks' images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import LitMergeError
from lit_merge.metrics.plotting import DrawnMetric

__all__ = ["TauJp", "tau_jp_norms"]


def tau_jp_norms(tangents: Tensor, squared: bool = False) -> Tensor:
    """The L2 norm of ``τJp(x) = J_θ f(x; θ0) · τ`` for every image (Yoshida et al. 2025, section 4).

    Args:
        tangents: ``[B, d]``, the tangents of B images, as :meth:`lit_merge.LinearizedModel.tangent` gives them.
        squared: whether to square the norms.

    Returns:
        ``[B]``, at least float32; the gradient of a norm at zero is zero.

    Raises:
        LitMergeError: the tangents are no matrix.
    """
    if tangents.ndim != 2:
        raise LitMergeError(f"tangents: expected shape [B, d], got {list(tangents.shape)}. Flatten what is not batch.")
    tangents = tangents.float() if tangents.dtype in (torch.float16, torch.bfloat16) else tangents
    return tangents.square().sum(-1) if squared else torch.linalg.vector_norm(tangents, dim=-1)


class TauJp(DrawnMetric):
    """Mean over images of ``‖τJp(x)‖``; the smaller on other tasks' images, the less τ disturbs these tasks.

    Args:
        squared: whether to average squared norms.
        **settings: of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> metric = TauJp()
        >>> metric.update(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> metric.compute()
        tensor(2.5000)
    """

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, squared: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.squared = squared
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, tangents: Tensor, counted: Tensor | None = None) -> None:
        """Take in the tangents of some images.

        Args:
            tangents: ``[B, d]``.
            counted: bool ``[B]``, which images count: padding does not; None for all.

        Raises:
            LitMergeError: the tangents are no matrix.
        """
        norms = tau_jp_norms(tangents.detach(), self.squared).double()
        self.total += (norms if counted is None else norms[counted]).sum()
        self.count += len(norms) if counted is None else counted.sum()

    def compute(self) -> Tensor:
        """The mean, a float32 scalar; NaN without any image."""
        return (self.total / self.count).float()
