"""What each task contributes to a merge: T vectors whose sum is the merge, for coefficients to act on.

Learned coefficients scale the rows that a chain leaves, and most merges leave one. These leave one per task, so that
``chain(TSVDirections(), Sum())`` is :class:`~lit_merge.transforms.TSVMerge`, and coefficients that are learned after
``TSVDirections()`` start from that merge at λ = 1. :class:`Departures` does the same for any merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform, check_transform
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.masks import merged_by
from lit_merge.transforms.matrices import (
    check_pattern,
    decomposed,
    decomposition,
    is_matrix,
    nearest_orthogonal,
    triplets,
    work_of_matrices,
)
from lit_merge.transforms.reduce import Sum
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work, sum_rows

__all__ = ["CARTDirections", "CalibratedDirections", "Departures", "TSVDirections"]


@dataclass(frozen=True)
class TSVDirections(Transform):
    """Each task's part of TSV-M: ``U'_t S_t V'_tᵀ``, its singular values between the vectors made orthogonal.

    With ``U'`` the nearest orthogonal matrix to ``[U_1 … U_T]``, ``V'`` likewise, and ``U'_t``, ``V'_t`` the columns of
    task t (Gargiulo et al. 2025, algorithm 1). What is no matrix is divided by T. The sum is
    :class:`~lit_merge.transforms.TSVMerge` with the same fields.

    Args:
        rank_fraction: fraction of the rank that every task keeps, in (0, 1], at least one singular value; by
            default 1/T.
        exclude: a regular expression; matrices in whose names it is found are divided by T too.

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
        """Map stacks ``(T, *shape)`` to stacks of the same shape."""
        return _by_task(self, self.exclude, vectors, partial(_orthogonal, self.rank_fraction), _averaged)


@dataclass(frozen=True)
class CalibratedDirections(Transform):
    """Each task's part of calibrated task arithmetic: ``c U diag(γ) Uᵀ τ_t``, U and γ those of the sum.

    SVC (Li et al. 2026, equations 4 and 8) multiplies the merged matrix by ``U diag(γ) Uᵀ`` from the left, which
    distributes over the tasks. The sum is ``chain(Sum(), Scale(c), Calibrate(alpha))``; what is no matrix is scaled by
    c. Decomposed in float64.

    Args:
        alpha: smallest projection that counts, in (0, 1], as of :class:`~lit_merge.transforms.Calibrate`.
        coefficient: c, of which γ depends.
        exclude: a regular expression; matrices in whose names it is found are scaled by c alone.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression; on access, a singular
            value decomposition fails.
    """

    alpha: float = 0.1
    coefficient: float = 0.3
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._fraction("alpha")
        self._number("coefficient")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Map stacks ``(T, *shape)`` to stacks of the same shape."""
        calibrate = partial(_calibrated, self.alpha, self.coefficient)
        return _by_task(self, self.exclude, vectors, calibrate, partial(_scaled, self.coefficient))


@dataclass(frozen=True)
class CARTDirections(Transform):
    """Each task's part of CART: ``τ̄ / T + c SVD_k(τ_t − τ̄)``, with the mean τ̄.

    The sum is :class:`~lit_merge.transforms.CART` with the same fields. Coefficients that are learned after it scale
    the mean by their mean as well. To leave it alone, as the published program of AdaRank does, make the average the
    base model, see docs/adamerging.md.

    Args:
        rank_fraction: k as a fraction of min(m, n), in (0, 1], at least one singular value.
        coefficient: c.
        exclude: a regular expression; matrices in whose names it is found are divided by T.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression; on access, a singular
            value decomposition fails.
    """

    rank_fraction: float = 0.16
    coefficient: float = 1.0
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._fraction("rank_fraction")
        self._number("coefficient")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Map stacks ``(T, *shape)`` to stacks of the same shape."""
        centre = partial(_centred, self.rank_fraction, self.coefficient)
        return _by_task(self, self.exclude, vectors, centre, _averaged)


@dataclass(frozen=True)
class Departures(Transform):
    """Each task's part of any merge M: ``M / T + c (τ_t − τ̄)``, its departure from the mean τ̄ beside a T-th of M.

    The sum is M, whichever it is and whatever data or files it reads: coefficients that are learned on the parts start
    from it at λ = 1, scale it by their mean, and move it towards tasks by their differences. For merges that divide
    into parts themselves there are :class:`TSVDirections`, :class:`CalibratedDirections` and :class:`CARTDirections`.

    Args:
        merge: M, any transform that leaves one vector.
        coefficient: c, how far a difference of one between coefficients moves the merge.

    Raises:
        ConfigurationError: ``merge`` is no transform, or c no finite number; on application, if ``merge`` leaves
            several vectors.
    """

    merge: Transform = Sum()  # noqa: RUF009 - frozen, so it can be shared
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_transform("Departures.merge", self.merge)
        self._number("coefficient")

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Map stacks ``(T, *shape)`` to stacks of the same shape."""
        merged = merged_by(self, self.merge, vectors)
        return vectors.map_elements(partial(_departed, self.coefficient), note=self, others=[merged])


_Stacks = Callable[[Tensor], Tensor]


def _by_task(
    transform: Transform, exclude: str | None, vectors: TaskVectors, part: _Stacks, rest: _Stacks
) -> TaskVectors:
    """``part`` of every stack of matrices, ``rest`` of the others."""
    function = partial(_either, type(transform).__name__, exclude, part, rest)
    return vectors.map(function, note=transform, work=partial(work_of_matrices, exclude, _work))


def _either(who: str, exclude: str | None, part: _Stacks, rest: _Stacks, name: str, stack: Tensor) -> Tensor:
    return decomposed(who, name, part, stack) if is_matrix(exclude, name, stack.shape) else rest(stack)


def _work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    """Of every task's triplets, and of two decompositions of what they make together, in float64 at most."""
    work = Work.together([decomposition(rows, columns, 8)] * (tasks + 2))
    return Work(work.memory + (tasks + 3) * rows * columns * 8, work.operations)


def _departed(coefficient: float, name: str, start: int, chunk: Tensor, merged: Tensor) -> Tensor:
    return chunk.sub_(sum_rows(chunk.clone()).div_(len(chunk))).mul_(coefficient).add_(merged / len(chunk))


def _averaged(stack: Tensor) -> Tensor:
    return stack / len(stack)


def _scaled(coefficient: float, stack: Tensor) -> Tensor:
    return stack * coefficient


def _kept(rank_fraction: float | None, stack: Tensor) -> int:
    rank = min(stack.shape[1:])
    return max(rank // len(stack) if rank_fraction is None else count_of(rank_fraction, rank), 1)


def _orthogonal(rank_fraction: float | None, stack: Tensor) -> Tensor:
    lefts, values, rights = zip(*(triplets(matrix, _kept(rank_fraction, stack)) for matrix in stack), strict=True)
    counts = list(map(len, values))
    left = nearest_orthogonal(torch.cat(lefts, 1)).split(counts, 1)
    right = nearest_orthogonal(torch.cat(rights, 0)).split(counts, 0)
    return torch.stack([(u * s) @ v for u, s, v in zip(left, values, right, strict=True)])


def _centred(rank_fraction: float, coefficient: float, stack: Tensor) -> Tensor:
    mean = stack.mean(0)
    rows = []
    for matrix in stack:
        # A departure that is all rounding, as of a single task, is none.
        largest = torch.linalg.vector_norm(matrix)
        left, values, right = triplets(matrix - mean, _kept(rank_fraction, stack), largest)
        rows.append(torch.addmm(mean, left * values, right, beta=1 / len(stack), alpha=coefficient))
    return torch.stack(rows)


def _calibrated(alpha: float, coefficient: float, stack: Tensor) -> Tensor:
    vectors = stack.double()
    total = vectors.sum(0)
    left, _, _ = triplets(total, min(total.shape))
    own = left.mT @ vectors  # (T, r, n)
    squares = own.square().sum(2)
    rounding = torch.finfo(stack.dtype).eps * torch.linalg.matrix_norm(vectors).unsqueeze(1)
    products = coefficient * (own.sum(0) * own).sum(2)
    projections = torch.where(squares > rounding**2, products / squares, alpha).clamp(min=alpha)
    factors = len(stack) / projections.sum(0)
    return (coefficient * (vectors + left @ ((factors - 1).unsqueeze(1) * own))).to(stack.dtype)
