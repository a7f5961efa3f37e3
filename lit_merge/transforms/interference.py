"""Merging by least interference: what a merged weight does on the directions that each task's vector is made of.

``Σ_t w_t ‖(τ − τ_t) τ_tᵀ‖²`` has the gradient ``2 (τ C − D)`` with ``C = Σ_t w_t τ_tᵀ τ_t`` and ``D = Σ_t w_t τ_t τ_tᵀ
τ_t``. Its minimum, ``D C⁺``, merges worse than what lies on the way to it from the sum: directions in which C has small
eigenvalues are noise of single tasks, which the minimum fits and a stopped descent does not. :class:`WUDI` stops after
some steps of Adam, :class:`SpectralWUDI` says of each direction how far it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.params import is_finite
from lit_merge.transforms.base import Transform, whole_number
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.matrices import check_pattern, decomposition, reduce_matrices, triplets
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["WUDI", "OptMerge", "SpectralWUDI"]


@dataclass(frozen=True)
class WUDI(Transform):
    """Changes the sum of the task vectors so that it disturbs no task where that task's own vector acts.

    WUDI-Merging (Cheng et al. 2025): of every weight matrix ``Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖²`` is lowered by some steps
    of Adam, from ``τ = Σ_t τ_t``. Its gradient is ``2 (τ C − D)`` with ``C = Σ_t τ_tᵀ τ_t / ‖τ_t‖²`` and
    ``D = Σ_t τ_t τ_tᵀ τ_t / ‖τ_t‖²``: a step takes one product with C, however many tasks there are, or two with the
    vectors where that is less (n > 2 T m), so that memory stays near a few times the vectors'. Parameters that are no
    matrices (vectors, convolutions, patch embeddings) are averaged, as in FusionBench; a task whose vector
    is zero in a matrix has no say in it.

    The steps are few and short and end far from the minimum: their number and length are the stopping rule, and belong
    to the method; there is no other, and with many more the merge gets worse again. They are of the same length for all
    elements, whatever these are. Of a matrix in which even the largest vector's root mean square is below one step, all
    vectors are first multiplied by a power of two that brings it there: otherwise the steps would be noise.

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
        merge = partial(_descended, self.steps, self.learning_rate, _gradient)
        return reduce_matrices(self, self.exclude, vectors, merge, partial(_work, self.steps))


@dataclass(frozen=True)
class OptMerge(Transform):
    """:class:`WUDI` with vectors of low rank: what is kept of a task, and where it must not be disturbed.

    OptMerge (Wei et al. 2025; ``wudi2`` of its program): ``Σ_t ‖(τ − τ̂_t) P_tᵀ‖² / ‖τ_t‖²`` is lowered by steps of
    Adam, from ``τ = Σ_t τ_t``. The target ``τ̂_t = τ̄ + SVD_K(τ_t − τ̄)`` keeps the mean of the tasks and the K first
    directions in which the task departs from it, and ``P_t = S_K V_Kᵀ`` are the K first right singular vectors of
    ``τ_t``, times their values. Elements near the length of a step and parameters that are no matrices are treated as
    by :class:`WUDI`.

    Args:
        steps: of Adam, 0 or more; 0 is the sum.
        learning_rate: Adam's, at least 0.
        rank_fraction: K as a fraction of the rank, in (0, 1], at least one direction; by default 1/T.
        exclude: a regular expression; matrices in whose names it is found are averaged.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression; on access, a singular
            value decomposition fails.
    """

    steps: int = 300
    learning_rate: float = 1e-5
    rank_fraction: float | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        whole_number("OptMerge.steps", self.steps, minimum=0)
        self._number("learning_rate", minimum=0.0)
        if self.rank_fraction is not None:
            self._fraction("rank_fraction")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        gradient = partial(_low_rank_gradient, self.rank_fraction)
        merge = partial(_descended, self.steps, self.learning_rate, gradient)
        return reduce_matrices(self, self.exclude, vectors, merge, partial(_low_rank_work, self.steps))


@dataclass(frozen=True)
class SpectralWUDI(Transform):
    r"""Goes from the sum towards WUDI's minimum, in each direction of the inputs as far as a filter says.

    With ``C = V Λ Vᵀ`` of the module's C and D, ``w_t = 1 / ‖τ_t‖²`` and θ the sum of the vectors (Wei et al. 2026):

    .. math:: \tau = \theta + (D V f(\Lambda) \Lambda^{-1} - \theta V f(\Lambda)) V^\top

    A filter of f = 0 leaves a direction as the sum has it, f = 1 takes the minimum. IWUDI has ``f(λ) = 1 − exp(−t λ)``,
    a gradient descent stopped at time t (t = 300), SWUDI besides f = 0 outside the ⌈0.65 n⌉ largest eigenvalues
    (t = 1300 for ViT-B/32, 1800 for ViT-B/16), and ASWUDI, which nothing is chosen for, f = 1 for the
    ⌈(Σ√λ)² / Σλ⌉ largest. One decomposition, no steps, and the length of the vectors has no say.

    Where n > T m, C is decomposed through ``T m × T m`` products, so that no ``n × n`` matrix is built. Computed in
    float64. A task whose vector is zero in a matrix has no say in it; parameters that are no matrices are averaged.

    Args:
        time: t of the filter, above 0; None for f = 1.
        rank: fraction of the n directions that are changed, in (0, 1], or ``participation`` for ASWUDI's number. With
            ``time=None`` and ``rank=1.0`` it is the minimum itself.
        normalise: whether ``w_t = 1 / ‖τ_t‖²``; without, all tasks weigh the same, and the minimum is ActMerge:
            RegMean with ``τ_tᵀ τ_t`` in place of Gram matrices.
        floor: directions whose eigenvalue is at most this fraction of the largest stay as the sum has them, at least 0.
            Vectors of low rank that were rounded to bfloat16 have noise up to about 1e-5.
        exclude: a regular expression; matrices in whose names it is found are averaged.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression; on access, a
            decomposition fails.
    """

    time: float | None = 300.0
    rank: float | Literal["participation"] = 1.0
    normalise: bool = True
    floor: float = 1e-8
    exclude: str | None = None

    def __post_init__(self) -> None:
        if self.time is not None:
            self._number("time", minimum=0.0)
            if self.time == 0:
                raise ConfigurationError(
                    "SpectralWUDI.time: expected a number above 0 or null, got 0. Use Sum instead."
                )
        if self.rank != "participation":
            if isinstance(self.rank, str):
                raise ConfigurationError(
                    f"SpectralWUDI.rank: expected a fraction above 0 and at most 1 or participation, got {self.rank!r}."
                )
            self._fraction("rank")
        if not isinstance(self.normalise, bool):
            raise ConfigurationError(f"SpectralWUDI.normalise: expected true or false, got {self.normalise!r}.")
        self._number("floor", minimum=0.0, below=1.0)
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        merge = partial(_filtered, self.time, self.rank, self.normalise, self.floor)
        return reduce_matrices(self, self.exclude, vectors, merge, _filtered_work)


_Gradient = Callable[[Tensor], Tensor]


def _descended(steps: int, rate: float, gradient_of: Callable[[Tensor], _Gradient], stack: Tensor) -> Tensor:
    norms = [float(torch.linalg.vector_norm(vector, dtype=torch.float64)) for vector in stack]
    if sum(norm > 0 for norm in norms) < 2:  # nobody is disturbed: the gradient would be rounding alone
        return stack.sum(0)
    typical = max(norms) / math.sqrt(stack[0].numel())
    scale = 2.0 ** math.ceil(math.log2(rate / typical)) if typical < rate else 1.0
    if scale != 1:
        stack.mul_(scale)
    merged = stack.sum(0)
    gradient = gradient_of(stack)
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


def _gradient(stack: Tensor) -> _Gradient:
    """``τ`` -> ``2 (τ C − D)``; the stack may be written into."""
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
    # The merged matrix, D, the gradient, and Adam's two moments and two temporaries.
    return Work((memory + 7 * matrix) * itemsize, once + steps * each)


def _low_rank_gradient(rank_fraction: float | None, stack: Tensor) -> _Gradient:
    """``τ`` -> ``2 (τ Σ P_tᵀ P_t − Σ τ̂_t P_tᵀ P_t)``, every P_t divided by ‖τ_t‖."""
    count = _rank_of(rank_fraction, *stack.shape)
    mean, wanted, factors = stack.mean(0), torch.zeros_like(stack[0]), []
    for vector in stack:
        norm = torch.linalg.vector_norm(vector)
        if norm == 0:
            continue
        _, values, right = triplets(vector, count)
        factor = (values / norm).unsqueeze(1) * right
        left, values, right = triplets(vector - mean, count)
        wanted += (((left * values) @ right + mean) @ factor.mT) @ factor
        factors.append(factor)
    rows = torch.cat(factors)
    if 2 * len(rows) < stack.shape[2]:
        return lambda merged: ((merged @ rows.mT) @ rows).sub_(wanted).mul_(2)
    products = rows.mT @ rows
    return lambda merged: (merged @ products).sub_(wanted).mul_(2)


def _rank_of(rank_fraction: float | None, tasks: int, rows: int, columns: int) -> int:
    rank = min(rows, columns)
    return max(rank // tasks if rank_fraction is None else count_of(rank_fraction, rank), 1)


def _low_rank_work(steps: int, tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    matrix, rank = rows * columns, min(rows, columns)
    each = 2.0 * matrix * min(columns, 2 * rank)
    parts = [decomposition(rows, columns, itemsize)] * (2 * tasks) + [Work(0, steps * each)]
    work = Work.together(parts)
    # As WUDI, and the factors of all tasks, the mean and one target.
    return Work(work.memory + (9 * matrix + rank * columns + columns**2) * itemsize, work.operations)


def _filtered(
    time: float | None, rank: float | Literal["participation"], normalise: bool, floor: float, stack: Tensor
) -> Tensor:
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64)
    total = stack.sum(0)
    if int((norms > 0).sum()) < 2:  # nobody is disturbed
        return total
    tasks = (norms > 0).nonzero().flatten().tolist()
    lengths = norms[tasks] if normalise else norms.max().expand(len(tasks))
    values, basis = _eigenvectors(stack, tasks, lengths)
    count = len(values)
    if rank == "participation":
        kept = math.ceil(float(values.sqrt().sum() ** 2 / values.sum()))
    else:
        assert not isinstance(rank, str)
        kept = math.ceil(Fraction(repr(rank)) * stack.shape[2])
    kept = min(kept, count, int((values > floor * values[0]).sum()))
    values, basis = values[:kept], basis[:, :kept]
    reached = torch.ones_like(values) if time is None else -torch.expm1(-time * values)
    start = torch.zeros(stack.shape[1:], dtype=torch.float64, device=stack.device)
    wanted = start.new_zeros(stack.shape[1], kept)  # D V
    for task, length in zip(tasks, lengths, strict=True):  # one at a time in float64
        matrix = stack[task].double()
        start += matrix
        projected, row = matrix @ basis, matrix / length
        wanted += (row @ row.mT) @ projected if row.shape[0] <= kept else row @ (row.mT @ projected)
    change = wanted * (reached / values) - (start @ basis) * reached
    return start.addmm_(change, basis.mT).to(stack.dtype)


def _eigenvectors(stack: Tensor, tasks: Sequence[int], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``Σ_t τ_tᵀ τ_t / l_t²`` above rounding, largest first, and the eigenvectors ``(n, k)``."""
    columns = stack.shape[2]
    wide = len(tasks) * stack.shape[1] < columns
    rows = torch.empty(0)
    if wide:
        rows = (stack[list(tasks)].double() / lengths.view(-1, 1, 1)).flatten(0, 1)
        product = rows @ rows.mT
    else:
        product = torch.zeros(columns, columns, dtype=torch.float64, device=stack.device)
        for task, length in zip(tasks, lengths, strict=True):
            row = stack[task].double() / length
            product.addmm_(row.mT, row)
    values, vectors = torch.linalg.eigh(product)
    del product
    if not is_finite(values):
        raise torch.linalg.LinAlgError
    kept = int((values > torch.finfo(values.dtype).eps * len(values) * values[-1]).sum())
    values, vectors = values.flip(0)[:kept], vectors[:, len(values) - kept :].flip(1)
    return values, rows.mT @ (vectors / values.sqrt()) if wide else vectors


def _filtered_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    small, matrix = min(tasks * rows, columns), rows * columns
    # The product and its eigenvectors with what LAPACK's syevd asks for; V and its factors, D V; one task's matrix, the
    # sum and the change. Of wide matrices the rows of all tasks.
    wide = tasks * matrix if tasks * rows < columns else 0
    memory = 8 * (wide + 4 * small**2 + 2 * columns * small + 5 * rows * small + 5 * matrix)
    products = 2.0 * tasks * matrix * small + 9.0 * small**3
    return Work(memory, products + tasks * 4.0 * matrix * small + 4.0 * matrix * small)
