"""Merging task vectors one after another: what is merged stays as it is, and a new vector is added beside it.

Both parts go through vectors in an order and keep nothing of those that they have seen but what is merged. A row that
was merged of several tasks itself goes on where it ended, if it was stored before any rescaling. A mean norm that is
taken of such a row is not that of its tasks: what goes on in parts gets its length from a ``Scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.transforms.base import Transform
from lit_merge.transforms.matrices import check_pattern, decomposition, reduce_matrices, triplets
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work, sum_rows

__all__ = ["ProjectedSum", "RunningMean"]


@dataclass(frozen=True)
class ProjectedSum(Transform):
    """``S_k = S_{k−1} + P(τ_k)``, where P takes away what moves along the strongest directions of ``S_{k−1}``.

    OPCM (Tang et al. 2025, as in the authors' program). With ``U S Vᵀ = S_{k−1}`` and ``M = Uᵀ τ_k V``, P sets to zero
    the first r rows and columns' block of M, and its diagonal; r is the largest number of singular values whose sum is
    at most ``alpha`` of all. Their program rescales the sum to the mean norm of the vectors after every step, which
    changes neither U, V nor r, so that once at the end is the same: ``chain(ProjectedSum(), Rescale())``. What is no
    matrix is summed up. The first vector stays as it is.

    Where ``S_{k−1}`` has no direction, because its rank is low, τ_k is taken as it is; the program's diagonal reaches
    into arbitrary vectors there.

    Args:
        alpha: fraction of the sum of singular values that is protected, in [0, 1); 0 for the diagonal alone.
        order: names of all tasks, the first one first; by default as the vectors come.
        exclude: a regular expression; matrices in whose names it is found are summed up.

    Raises:
        ConfigurationError: ``alpha`` is not in [0, 1), or ``exclude`` is no regular expression; on application, if
            ``order`` does not name every task once; on access, if a singular value decomposition fails.
    """

    alpha: float = 0.5
    order: Sequence[str] | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._number("alpha", minimum=0.0, below=1.0)
        check_pattern(self, self.exclude)
        if self.order is not None:
            if isinstance(self.order, str) or not all(isinstance(one, str) for one in self.order):
                raise ConfigurationError(
                    f"ProjectedSum.order: expected a list of tasks, got {self.order!r}. Name all of them."
                )
            object.__setattr__(self, "order", tuple(self.order))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        places = list(range(len(vectors.tasks)))
        if self.order is not None:
            if sorted(self.order) != sorted(vectors.tasks) or len(set(self.order)) < len(self.order):
                raise ConfigurationError(
                    f"ProjectedSum.order: expected every task once, {first_few(vectors.tasks, 12)}, got "
                    f"{first_few(self.order, 12)}. Change it."
                )
            places = [vectors.tasks.index(task) for task in self.order]
        merge = partial(_projected, self.alpha, places)
        return reduce_matrices(self, self.exclude, vectors, merge, _work, _summed)


@dataclass(frozen=True)
class RunningMean(Transform):
    """``(n M + τ) / (n + 1)``, one vector after another: the mean over tasks, each of which counts once.

    A row that was merged of n tasks counts n times, so that the average of some tasks and one more vector give the
    average of all; of rows of one task each it is :class:`~lit_merge.transforms.Mean`. A row without a task's name
    counts once. The order does not matter.
    """

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce_elements(
            partial(_mean, tuple(max(len(tasks), 1) for tasks in vectors.row_tasks)), note=self
        )


def _projected(alpha: float, places: Sequence[int], stack: Tensor) -> Tensor:
    merged = stack[places[0]].clone()
    for place in places[1:]:
        vector = stack[place]
        left, values, right = triplets(merged, min(merged.shape))
        inner = left.mT @ vector @ right.mT
        kept = torch.zeros_like(inner)
        protected = int((values.cumsum(0) <= alpha * values.sum()).sum())
        kept[:protected, :protected] = inner[:protected, :protected]
        kept.diagonal().copy_(inner.diagonal())
        merged = merged + vector - left @ kept @ right
    return merged


def _summed(stack: Tensor) -> Tensor:
    return stack.sum(0)


def _work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    """One decomposition for every vector but the first."""
    one = decomposition(rows, columns, itemsize)
    return Work(one.memory + 3 * rows * columns * itemsize, one.operations * (tasks - 1))


def _mean(counts: tuple[int, ...], name: str, start: int, chunk: Tensor) -> Tensor:
    weights = torch.tensor(counts, dtype=chunk.dtype, device=chunk.device).unsqueeze(1)
    return sum_rows(chunk.mul_(weights)).div_(sum(counts))
