"""Merging by least interference: what a merged weight does on the directions that each task's vector is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform, whole_number
from lit_merge.transforms.matrices import check_pattern, reduce_matrices
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["WUDI"]


@dataclass(frozen=True)
class WUDI(Transform):
    """Changes the sum of the task vectors so that it disturbs no task where that task's own vector acts.

    WUDI-Merging (Cheng et al. 2025): of every weight matrix ``Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖²`` is lowered by some steps
    of Adam, from ``τ = Σ_t τ_t``. Its gradient is ``2 (τ A − B)`` with ``A = Σ_t τ_tᵀ τ_t / ‖τ_t‖²`` and
    ``B = Σ_t τ_t τ_tᵀ τ_t / ‖τ_t‖²``: a step takes one product with A, however many tasks there are, or two with the
    vectors where that is less (n > 2 T m), so that memory stays near a few times the vectors'. Parameters that are no
    matrices (vectors, convolutions, patch embeddings) are averaged, as in FusionBench; a task whose vector
    is zero in a matrix has no say in it.

    The steps are few and short and end far from the minimum: their number and length belong to the method. They are of
    the same length for all elements, whatever these are. Of a matrix in which even the largest vector's root mean
    square is below one step, all vectors are first multiplied by a power of two that brings it there: otherwise the
    steps would be noise.

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
        merge = partial(_least_interference, self.steps, self.learning_rate)
        return reduce_matrices(self, self.exclude, vectors, merge, partial(_work, self.steps))


def _least_interference(steps: int, rate: float, stack: Tensor) -> Tensor:
    norms = [float(torch.linalg.vector_norm(vector, dtype=torch.float64)) for vector in stack]
    if sum(norm > 0 for norm in norms) < 2:  # nobody is disturbed: the gradient would be rounding alone
        return stack.sum(0)
    typical = max(norms) / math.sqrt(stack[0].numel())
    scale = 2.0 ** math.ceil(math.log2(rate / typical)) if typical < rate else 1.0
    if scale != 1:
        stack.mul_(scale)
    merged = stack.sum(0)
    gradient = _gradient(stack)
    with torch.enable_grad():
        merged = merged.requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = gradient(merged.detach())
        optimiser.step()
    return merged.detach().div_(scale)


def _is_wide(tasks: int, rows: int, columns: int) -> bool:
    """Whether two products with the vectors take less than one with an ``n × n`` matrix."""
    return columns > 2 * tasks * rows


def _gradient(stack: Tensor) -> Callable[[Tensor], Tensor]:
    """``τ`` -> ``2 (τ A − B)``; the stack may be written into."""
    wanted = torch.zeros_like(stack[0])
    if _is_wide(*stack.shape):
        for vector in stack:
            norm = torch.linalg.vector_norm(vector)
            if norm != 0:
                vector /= norm
                wanted += ((vector @ vector.T) @ vector).mul_(norm)
        rows = stack.flatten(0, 1)
        return lambda merged: ((merged @ rows.T) @ rows).sub_(wanted).mul_(2)
    products = torch.zeros(stack.shape[2], stack.shape[2], dtype=stack.dtype, device=stack.device)
    for vector in stack:
        squared = torch.linalg.vector_norm(vector) ** 2
        if squared != 0:
            product = (vector.T @ vector).div_(squared)
            products += product
            wanted += vector @ product
    return lambda merged: (merged @ products).sub_(wanted).mul_(2)


def _work(steps: int, tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    matrix = rows * columns
    if _is_wide(tasks, rows, columns):
        memory, once, each = 2 * tasks * rows**2, 4.0 * tasks * rows * matrix, 4.0 * tasks * rows * matrix
    else:
        memory, once, each = 2 * columns**2, 4.0 * tasks * columns * matrix, 2.0 * columns * matrix
    # The merged matrix, B, the gradient, and Adam's two moments and two temporaries.
    return Work((memory + 7 * matrix) * itemsize, once + steps * each)
