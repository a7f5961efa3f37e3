"""Merging by singular vectors: every weight is a matrix, not a list of elements.

What a float cannot tell from zero has no direction: singular values below ``eps · max(m, n)`` times the largest are
left out, with their vectors, which would be arbitrary. So a task vector of low rank, such as one from LoRA, brings only
directions of its own. Matrices of full rank are merged to the letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.matrices import (
    Triplets,
    check_pattern,
    decomposition,
    largest_value,
    nearest_orthogonal,
    polar,
    reduce_matrices,
    triplets,
)
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["CART", "DCMerge", "IsoC", "IsoCTS", "TSVMerge"]


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
        return reduce_matrices(self, self.exclude, vectors, partial(_iso_cts, self.common_fraction), _iso_cts_work)


@dataclass(frozen=True)
class CART(Transform):
    """The mean of the task vectors plus what each task has beside it, cut to a low rank.

    CART (Choi et al. 2024, centred arithmetic with rank-reduced task vectors): ``τ̄ + λ Σ_t SVD_k(τ_t − τ̄)`` with the
    mean τ̄. Without a cut the sum is zero: what is common stands in the mean, and the k first singular directions of a
    departure from it belong to a task alone. Parameters that are no matrices are averaged, as in the authors' program,
    where their departures add up to zero.

    Args:
        rank_fraction: k as a fraction of min(m, n), in (0, 1], at least one singular value.
        coefficient: λ, usually chosen on validation data.
        exclude: a regular expression; matrices in whose names it is found are averaged too.

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
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        merge = partial(_centred, self.rank_fraction, self.coefficient)
        return reduce_matrices(self, self.exclude, vectors, merge, _centred_work)


@dataclass(frozen=True)
class DCMerge(Transform):
    """Merges what is left of the tasks in a space that covers the first singular vectors of all of them.

    DC-Merge (2026, 2603.06242; as in the authors' program). Of every ``τ_t`` the ⌊r/T⌋ largest singular values stay,
    r = min(m, n), smoothed if wanted. The cover bases are the nearest orthogonal matrices to ``[U_1 … U_T]`` and ``[V_1
    … V_T]``, as in :class:`TSVMerge`. In them every task is a small matrix ``M_t``, of which only the largest elements
    stay; those that agree with the sign of their sum are averaged; of the result only the blocks of a task's own left
    and right vectors go back. Parameters that are no matrices are averaged.

    Args:
        keep: fraction of the elements of every M_t that stay, in (0, 1], at least one.
        smoothing: ``mean`` gives all singular values that a task keeps their mean, ``linear`` values that fall linearly
            and have the same sum, the first at most ``ratio`` times the last. The authors use the former for LoRA, and
            none for vectors of full rank.
        ratio: of ``linear``, at least 1.
        rank_fraction: fraction of the rank that every task keeps, in (0, 1], at least one singular value; by default
            1/T.
        exclude: a regular expression; matrices in whose names it is found are averaged too.

    Raises:
        ConfigurationError: a field is out of range, or ``exclude`` is no regular expression; on access, a singular
            value decomposition fails.
    """

    keep: float = 1e-3
    smoothing: Literal["mean", "linear"] | None = None
    ratio: float = 5.0
    rank_fraction: float | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._fraction("keep")
        if self.smoothing is not None:
            self._choice("smoothing", ("mean", "linear"))
        self._number("ratio", minimum=1.0)
        if self.rank_fraction is not None:
            self._fraction("rank_fraction")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        ratio = {None: None, "mean": 1.0, "linear": self.ratio}[self.smoothing]
        merge = partial(_covered, self.keep, ratio, self.rank_fraction)
        return reduce_matrices(self, self.exclude, vectors, merge, _covered_work)


def _share(rank_fraction: float | None, stack: Tensor) -> int:
    """How many singular values a task keeps: its part of the rank, at least one."""
    rank = min(stack.shape[1:])
    return max(rank // len(stack) if rank_fraction is None else count_of(rank_fraction, rank), 1)


def _joined(parts: list[Triplets]) -> Triplets:
    """The triplets of all parts, concatenated, their vectors made orthogonal."""
    left, values, right = zip(*parts, strict=True)
    return nearest_orthogonal(torch.cat(left, 1)), torch.cat(values), nearest_orthogonal(torch.cat(right, 0))


def _tsv_merged(rank_fraction: float | None, stack: Tensor) -> Tensor:
    count = _share(rank_fraction, stack)
    left, values, right = _joined([triplets(matrix, count) for matrix in stack])
    return (left * values) @ right


def _iso_c(stack: Tensor) -> Tensor:
    factor, values = polar(stack.sum(0))
    return factor.mul_(values.mean()) if len(values) else factor


def _iso_cts(common_fraction: float, stack: Tensor) -> Tensor:
    rank, tasks = min(stack.shape[1:]), len(stack)
    count = min(round((rank - count_of(common_fraction, rank)) / tasks), rank // tasks)
    common = triplets(stack.sum(0), rank - tasks * count)
    parts = [common]
    for matrix in stack if count else ():
        rest = matrix - common[0] @ (common[0].T @ matrix)
        parts.append(triplets(rest, count, largest_value(matrix)))  # rounding leaves a rest of nothing
    left, values, right = _joined(parts)
    return (left * values.mean()) @ right


def _iso_c_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    return decomposition(rows, columns, itemsize)


def _iso_cts_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    return _joining_work(tasks + 1, rows, columns, itemsize)  # the sum is one more


def _joining_work(matrices: int, rows: int, columns: int, itemsize: int) -> Work:
    """Of every matrix' triplets, of their vectors side by side, r together, and of the products of these."""
    rank = min(rows, columns)
    parts = [decomposition(rows, columns, itemsize)] * matrices
    parts += [decomposition(rows, rank, itemsize), decomposition(rank, columns, itemsize)]
    work = Work.together([*parts, Work(0, 4.0 * rows * columns * rank)])
    return Work(work.memory + 2 * (rows + columns) * rank * itemsize, work.operations)


def _centred(rank_fraction: float, coefficient: float, stack: Tensor) -> Tensor:
    mean = stack.mean(0)
    count = _share(rank_fraction, stack)
    merged = mean.clone()
    for matrix in stack:
        # A departure that is all rounding, as of a single task, is none.
        left, values, right = triplets(matrix - mean, count, torch.linalg.vector_norm(matrix))
        merged.addmm_(left * values, right, alpha=coefficient)
    return merged


def _centred_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    work = Work.together([decomposition(rows, columns, itemsize)] * tasks)
    return Work(work.memory + 2 * rows * columns * itemsize, work.operations)


def _covered(keep: float, ratio: float | None, rank_fraction: float | None, stack: Tensor) -> Tensor:
    count = _share(rank_fraction, stack)
    parts = [triplets(matrix, count) for matrix in stack]
    left = nearest_orthogonal(torch.cat([part[0] for part in parts], 1))
    right = nearest_orthogonal(torch.cat([part[2] for part in parts], 0))
    owner = torch.cat([torch.full_like(part[1], task) for task, part in enumerate(parts)])  # of each direction
    kept = torch.zeros(len(parts), len(owner), len(owner), dtype=stack.dtype, device=stack.device)
    for small, (u, values, v) in zip(kept, parts, strict=True):
        values = values if ratio is None else _smoothed(values, ratio)
        small += ((left.mT @ u) * values) @ (v @ right.mT)
    if not kept.numel():
        return torch.zeros_like(stack[0])
    number = max(count_of(keep, kept[0].numel()), 1)
    thresholds = kept.abs().flatten(1).topk(number, dim=1).values[:, -1]
    kept.masked_fill_(kept.abs() < thresholds.view(-1, 1, 1), 0)
    agreeing = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    merged = (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    merged.masked_fill_(owner.unsqueeze(0) != owner.unsqueeze(1), 0)
    return left @ merged @ right


def _smoothed(values: Tensor, ratio: float) -> Tensor:
    """Values with the same sum that fall linearly, the first at most ``ratio`` times the last."""
    if not len(values):
        return values
    first = min(ratio, float(values[0] / values[-1]))
    falling = torch.linspace(first, 1.0, len(values), dtype=values.dtype, device=values.device)
    return falling * (values.sum() / falling.sum())


def _covered_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    """As TSV-M's, and the tasks' small matrices."""
    rank = min(rows, columns)
    work = _joining_work(tasks, rows, columns, itemsize)
    small = tasks * rank**2
    return Work(work.memory + 4 * small * itemsize, work.operations + 4.0 * small * rank)
