"""How much the elements that matter of several task vectors overlap, and how often they disagree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.metrics.depth import DepthMetric, with_whole
from lit_merge.vectors import TaskVectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SignConflict", "sign_counts"]

_EXACT = 1 << 22  # columns in one product: a float32 sum of that many ±1 is exact


def sign_counts(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count in how many elements of a stack of T vectors which of them are not zero, and which differ in sign.

    Args:
        stack: ``(T, *shape)``, usually trimmed: what is zero does not count.

    Returns:
        Three int64 tensors: ``(T, T)`` elements that are not zero in both; ``(T, T)`` those of them with two signs; and
        ``(3,)`` elements that at least one, that at least two vectors have, and that have both signs among them. Counts
        of two parts of a parameter add up to those of the whole.

    Examples:
        >>> import torch
        >>> both, differing, elements = sign_counts(torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 5.0]]))
        >>> both.tolist(), differing.tolist(), elements.tolist()
        ([[2, 2], [2, 3]], [[0, 1], [1, 0]], [3, 2, 1])
    """
    rows = stack.reshape(len(stack), -1)
    both = torch.zeros(len(rows), len(rows), dtype=torch.long, device=rows.device)
    differing, elements = torch.zeros_like(both), torch.zeros(3, dtype=torch.long, device=rows.device)
    for part in rows.split(_EXACT, dim=1):
        signs = part.sign().to(torch.float64 if part.dtype == torch.float64 else torch.float32)
        present = signs.abs()
        shared = (present @ present.T).long()
        both += shared
        differing += (shared - (signs @ signs.T).long()) // 2
        holders = present.sum(0)
        mixed = (signs.sum(0).abs() < holders).sum()
        elements += torch.stack([(holders > 0).sum(), (holders > 1).sum(), mixed])
    return both, differing, elements


class SignConflict(DepthMetric):
    """Overlap and sign conflict of trimmed task vectors, of the whole network and of every block.

    With ``A_t`` the elements of τ_t that are not zero:

    - ``overlap``: of the elements that are in some ``A_t``, the fraction that is in two or more;
    - ``conflict``: of the elements in two or more ``A_t``, the fraction whose values have both signs, for which TIES
      elects one (Yadav et al. 2023, section 3);
    - ``pair_overlap``: ``|A_s ∩ A_t| / |A_s ∪ A_t|``;
    - ``pair_conflict``: of ``A_s ∩ A_t``, the fraction with two signs.

    Args:
        tasks: the T tasks.
        blocks: number of the network's blocks.
        **settings: of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lit_merge.transforms import Trim
        >>> from lit_merge.vectors import TaskVector, TaskVectors
        >>> one, other = (TaskVector({"w": torch.tensor(v)}) for v in ([4.0, 3.0, 0.1, 0.2], [-4.0, 0.1, 3.0, 0.2]))
        >>> metric = SignConflict(["one", "other"])
        >>> metric.update(Trim(0.5)(TaskVectors([one, other])))
        >>> {name: round(float(value[0]), 4) for name, value in metric.compute().items() if value.ndim == 1}
        {'overlap': 0.3333, 'conflict': 1.0}
    """

    both: Tensor
    differing: Tensor
    elements: Tensor

    def __init__(self, tasks: Sequence[str], blocks: int = 0, **settings: Any) -> None:
        super().__init__(tasks, blocks, **settings)
        self._add_sum("both", len(self.tasks), len(self.tasks))
        self._add_sum("differing", len(self.tasks), len(self.tasks))
        self._add_sum("elements", 3)

    def update(self, vectors: TaskVectors, names: Sequence[str] | None = None) -> None:
        """See :meth:`lit_merge.metrics.CosineMatrix.update`; of trimmed vectors, e.g. ``Trim(0.2)(vectors)``."""
        row = self._rows(vectors)
        for name, counts in vectors.over_chunks(_counts, names):
            index = row(name)
            for state, found in zip((self.both, self.differing, self.elements), counts, strict=True):
                state[index] += found.to(state)

    def compute(self) -> dict[str, Tensor]:
        """The rates in float64, of the whole network and of every place; NaN where there is nothing to divide by.

        Returns:
            ``overlap`` and ``conflict`` ``[1 + P]``, ``pair_overlap`` and ``pair_conflict`` ``[1 + P, T, T]``.
        """
        both, differing, elements = (with_whole(one).double() for one in (self.both, self.differing, self.elements))
        own = both.diagonal(dim1=-2, dim2=-1)
        return {
            "overlap": elements[:, 1] / elements[:, 0],
            "conflict": elements[:, 2] / elements[:, 1],
            "pair_overlap": both / (own.unsqueeze(-1) + own.unsqueeze(-2) - both),
            "pair_conflict": differing / both,
        }

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw overlap and conflict in every place, as bars."""
        from lit_merge.report.bars import draw_bars
        from lit_merge.report.curves import name_places

        draw_bars(axes, self.places, {name: found[name].tolist() for name in ("overlap", "conflict")})
        name_places(axes, self.places)
        axes.set_ylabel("fraction of elements (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _counts(name: str, start: int, chunk: Tensor) -> tuple[str, tuple[Tensor, Tensor, Tensor]]:
    return name, sign_counts(chunk)
