"""Merging by least interference: what a merged weight does on the directions that each task's vector is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform, whole_number
from lit_merge.transforms.matrices import check_pattern, reduce_matrices
from lit_merge.vectors import TaskVectors

__all__ = ["WUDI"]


@dataclass(frozen=True)
class WUDI(Transform):
    """Changes the sum of the task vectors so that it disturbs no task where that task's own vector acts.

    WUDI-Merging (Cheng et al. 2025): of every weight matrix ``Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖²`` is lowered by some steps
    of Adam, from ``τ = Σ_t τ_t``. Its gradient is ``2 (τ A − B)`` with ``A = Σ_t τ_tᵀ τ_t / ‖τ_t‖²`` and
    ``B = Σ_t τ_t τ_tᵀ τ_t / ‖τ_t‖²``: a step takes one product of matrices, however many tasks there are. Parameters
    that are no matrices (vectors, convolutions, patch embeddings) are averaged, as in FusionBench; a task whose vector
    is zero in a matrix has no say in it.

    The steps are few and short and end far from the minimum: their number and length belong to the method.

    Args:
        steps: of Adam, 0 or more; 0 is the sum.
        learning_rate: Adam's, at least 0.
        exclude: a regular expression; matrices in whose names it is found are averaged too.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression.
    """

    steps: int = 300
    learning_rate: float = 1e-5
    exclude: str | None = None

    def __post_init__(self) -> None:
        whole_number("WUDI.steps", self.steps, minimum=0)
        self._number("learning_rate", minimum=0.0)
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return reduce_matrices(
            self, self.exclude, vectors, partial(_least_interference, self.steps, self.learning_rate)
        )


def _least_interference(steps: int, rate: float, stack: Tensor) -> Tensor:
    merged = stack.sum(0)
    products = torch.zeros(merged.shape[1], merged.shape[1], dtype=stack.dtype, device=stack.device)
    wanted = torch.zeros_like(merged)
    for vector in stack:
        squared = torch.linalg.vector_norm(vector) ** 2
        if squared == 0:
            continue
        product = vector.T @ vector / squared
        products += product
        wanted += vector @ product
    with torch.enable_grad():
        merged = merged.requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = (merged.detach() @ products).sub_(wanted).mul_(2)
        optimiser.step()
    return merged.detach()
