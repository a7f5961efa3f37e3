"""Spearman's rank correlation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_merge.errors import LitMergeError

__all__ = ["Spearman", "spearman"]


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of two measurements of the same N things; equal values share their mean rank.

    It is the Pearson correlation of the ranks. torchmetrics adds up the ranks of equal values in 32 bits, which is not
    enough for more than 65,535 of them, and gives 0 where the correlation is not defined.

    Args:
        first: ``[N]``.
        second: ``[N]``.

    Returns:
        A float64 scalar in [-1, 1]; NaN where it is not defined: a value is NaN, or one measurement is constant.

    Raises:
        LitMergeError: the shapes are not ``[N]`` twice.

    Examples:
        >>> import torch
        >>> spearman(torch.tensor([0.1, 0.2, 0.2, 0.9]), torch.tensor([1.0, 3.0, 2.0, 7.0]))
        tensor(0.9487, dtype=torch.float64)
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise LitMergeError(
            f"spearman: expected two tensors of shape [N], got {list(first.shape)} and {list(second.shape)}. "
            "Flatten them, and measure the same things twice."
        )
    if first.isnan().any() or second.isnan().any():
        return torch.tensor(torch.nan, dtype=torch.float64)
    one, two = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    return ((one * two).sum() / (one.square().sum() * two.square().sum()).sqrt()).clamp(-1, 1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks 1 … N, float64."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1).double() / 2)[places]


class Spearman(Metric):
    """:func:`spearman` of all examples of all processes.

    Examples:
        >>> import torch
        >>> metric = Spearman()
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([1.0, 3.0]))
        >>> metric.update(torch.tensor([0.2, 0.9]), torch.tensor([2.0, 7.0]))
        >>> metric.compute()
        tensor(0.9487, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("first", [], dist_reduce_fx="cat")
        self.add_state("second", [], dist_reduce_fx="cat")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add two measurements of some things, each ``[N]``."""
        self.first.append(first.detach())
        self.second.append(second.detach())

    def compute(self) -> Tensor:
        """The correlation, a float64 scalar."""
        return spearman(dim_zero_cat(self.first), dim_zero_cat(self.second))
