"""A weighted mean over examples that never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ExampleMean"]


class ExampleMean(Metric):
    """``Σ w v / Σ w`` over all examples of all processes; NaN without any, and where a value is NaN.

    torchmetrics' own mean looks for NaN in every update, for which an accelerator has to be waited for; told not to
    look, it forgets the weights (1.8).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add examples.

        Args:
            values: ``[B]``.
            weights: ``[B]``, 0 for examples that do not count.
        """
        self.total += (values.to(self.total.dtype) * weights.to(self.total.dtype)).sum()
        self.weight += weights.to(self.weight.dtype).sum()

    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.total / self.weight
