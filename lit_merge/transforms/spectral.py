"""Merging by singular vectors: every weight is a matrix, not a list of elements.

What a float cannot tell from zero has no direction: singular values below ``eps · max(m, n)`` times the largest are
left out, with their vectors, which would be arbitrary. So a task vector of low rank, such as one from LoRA, brings only
directions of its own. Matrices of full rank are merged to the letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.matrices import (
    Triplets,
    check_pattern,
    decomposition,
    nearest_orthogonal,
    reduce_matrices,
    triplets,
)
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["IsoC", "IsoCTS", "TSVMerge"]


@dataclass(frozen=True)
class TSVMerge(Transform):
    """Gives every task a fraction of the rank, and makes the tasks' singular vectors orthogonal to each other.

    TSV-M (Gargiulo et al. 2025, section 4.2 and algorithm 1): of every ``τ_t = U_t S_t V_tᵀ`` the ⌊r/T⌋ largest
    singular values stay, r = min(m, n); ``U = [U_1 … U_T]`` and ``V`` are replaced by the nearest orthogonal matrices
    (Procrustes, equation 8: P Qᵀ of their singular value decompositions), and the merged weight is ``U S Vᵀ``.
    Parameters that are no matrices (vectors, convolutions, patch embeddings) are averaged, as in the authors' program.

    A matrix with fewer rows or columns than there are tasks keeps one singular value per task, where the program keeps
    none; the nearest "orthogonal" matrix then has orthogonal rows instead of columns.

    Args:
        rank_fraction: fraction of the rank that every task keeps, in (0, 1], at least one singular value; by
            default 1/T.
        exclude: a regular expression; matrices in whose names it is found are averaged too. The authors' program
            excludes ``text_projection``, which an image tower does not have.

    Raises:
        ConfigurationError: ``rank_fraction`` is not in (0, 1], or ``exclude`` is no regular expression; on access, a
            singular value decomposition fails.
    """

    rank_fraction: float | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        if self.rank_fraction is not None:
            self._fraction("rank_fraction")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return reduce_matrices(self, self.exclude, vectors, partial(_tsv_merged, self.rank_fraction), _joining_work)


@dataclass(frozen=True)
class IsoC(Transform):
    """Sums the task vectors and makes the spectrum of every weight flat.

    Iso-C (Marczak et al. 2025, section 4.1 and algorithm 1): with ``Σ_t τ_t = U S Vᵀ``, the merged weight is
    ``s̄ U Vᵀ`` (equation 8), s̄ the mean singular value (equation 7; of those that are not zero). Parameters that are no
    matrices are averaged, as in the authors' program.

    Args:
        exclude: a regular expression; matrices in whose names it is found are averaged too.

    Raises:
        ConfigurationError: ``exclude`` is no regular expression; on access, a singular value decomposition fails.
    """

    exclude: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return reduce_matrices(self, self.exclude, vectors, _iso_c, _iso_c_work)


@dataclass(frozen=True)
class IsoCTS(Transform):
    """Keeps the strongest directions of the sum, adds directions of every task, and makes the spectrum flat.

    Iso-CTS (Marczak et al. 2025, section 4.2 and algorithm 2): the common space is spanned by the first k singular
    vectors of ``Σ_t τ_t``; every task adds the first (r − k)/T of ``τ_t − U_k U_kᵀ τ_t`` (equation 10); left and right
    vectors of all are made orthogonal as in :class:`TSVMerge` (equation 11), and every singular value is replaced by
    the mean of all that were taken (equations 12 and 13). As in the authors' program, (r − k)/T is rounded (but never
    to more than r/T) and k takes what is left. Parameters that are no matrices are averaged.

    Args:
        common_fraction: k / r, in [0, 1], r = min(m, n); 1 is Iso-C.
        exclude: a regular expression; matrices in whose names it is found are averaged too.

    Raises:
        ConfigurationError: ``common_fraction`` is not in [0, 1], or ``exclude`` is no regular expression; on access, a
            singular value decomposition fails.
    """

    common_fraction: float = 0.8
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._number("common_fraction", minimum=0.0, maximum=1.0)
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return reduce_matrices(self, self.exclude, vectors, partial(_iso_cts, self.common_fraction), _joining_work)


def _joined(parts: list[Triplets]) -> Triplets:
    """The triplets of all parts, concatenated, their vectors made orthogonal."""
    left, values, right = zip(*parts, strict=True)
    return nearest_orthogonal(torch.cat(left, 1)), torch.cat(values), nearest_orthogonal(torch.cat(right, 0))


def _tsv_merged(rank_fraction: float | None, stack: Tensor) -> Tensor:
    rank = min(stack.shape[1:])
    count = rank // len(stack) if rank_fraction is None else count_of(rank_fraction, rank)
    left, values, right = _joined([triplets(matrix, max(count, 1)) for matrix in stack])
    return (left * values) @ right


def _iso_c(stack: Tensor) -> Tensor:
    left, values, right = triplets(stack.sum(0), min(stack.shape[1:]))
    return (left * values.mean()) @ right


def _iso_cts(common_fraction: float, stack: Tensor) -> Tensor:
    rank, tasks = min(stack.shape[1:]), len(stack)
    count = min(round((rank - count_of(common_fraction, rank)) / tasks), rank // tasks)
    common = triplets(stack.sum(0), rank - tasks * count)
    parts = [common]
    for matrix in stack if count else ():
        rest = matrix - common[0] @ (common[0].T @ matrix)
        parts.append(triplets(rest, count, torch.linalg.matrix_norm(matrix, 2)))  # rounding leaves a rest of nothing
    left, values, right = _joined(parts)
    return (left * values.mean()) @ right


def _iso_c_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    return decomposition(rows, columns, itemsize)


def _joining_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    """Of every task's triplets, of their vectors side by side, r together, and of the products of these."""
    rank = min(rows, columns)
    parts = [decomposition(rows, columns, itemsize)] * (tasks + 1)
    parts += [decomposition(rows, rank, itemsize), decomposition(rank, columns, itemsize)]
    work = Work.together([*parts, Work(0, 4.0 * rows * columns * rank)])
    return Work(work.memory + 2 * (rows + columns) * rank * itemsize, work.operations)
