"""Regression on a layer's inputs where there are none: their covariance is estimated from the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.matrices import check_pattern, decomposition, reduce_matrices, triplets
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["ACE"]


@dataclass(frozen=True)
class ACE(Transform):
    r"""RegMean with covariances that are estimated from the task vectors, adapted to how much their lengths differ.

    ACE-Merging (Xu et al. 2026, 2603.02945, equations 7 to 15; details as in the authors' program). A gradient step
    is a sum of inputs, so that the rows of a task vector are samples of them: with ``τ̃_t`` the vector minus the mean of
    its rows, ``Σ_t = τ̃_tᵀ τ̃_t``. Where the lengths of the tasks differ, ``γ = Var(log ‖τ_t‖²) / (mean log ‖τ_t‖²)²`` is
    above ``heterogeneity``, and Σ_t as well as ε are divided by the trace of Σ_t. Then

    .. math:: W = \Big(\sum_t \tilde\tau_t (\Sigma_t + \varepsilon I)\Big) \Big(\sum_t (\Sigma_t + \varepsilon I) +
        \mathbf{1} c^\top\Big)^{-1}, \qquad c = \tfrac1n \sum_t \Sigma_t \mathbf{1}

    where c is divided by the mean ‖τ_t‖² if γ is large. In that case the first k singular directions of
    ``Σ_t τ_t (Σ_t − Σ̄) + W`` are added, all with the mean of their values, Σ̄ the mean of the ``Σ_t + ε I``.

    γ and ε depend on the unit of the vectors: near ‖τ_t‖ = 1 the logarithms vanish, and short vectors are shrunk by ε.
    Parameters that are no matrices are averaged, and so are matrices of one row, which has no covariance. Computed in
    float64.

    Args:
        ridge: ε, above 0 and at most 1.
        heterogeneity: γ above which tasks are normalised, at least 0.
        rank_fraction: k as a fraction of min(m, n), in (0, 1], at least one direction.
        exclude: a regular expression; matrices in whose names it is found are averaged too.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression; on access, a
            decomposition fails.
    """

    ridge: float = 1e-2
    heterogeneity: float = 0.3
    rank_fraction: float = 0.3
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._fraction("ridge")
        self._number("heterogeneity", minimum=0.0)
        self._fraction("rank_fraction")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return reduce_matrices(self, self.exclude, vectors, partial(_regressed, self), _regression_work)


def _regressed(transform: ACE, stack: Tensor) -> Tensor:
    squares = torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64) ** 2
    if stack.shape[1] == 1 or not bool(squares.any()):
        return stack.mean(0)
    present = squares > 0  # a vector of zeros has no covariance, and no length to compare
    vectors, squares = stack[present].double(), squares[present]
    differ = _heterogeneity(squares) > transform.heterogeneity
    width = stack.shape[2]
    estimates = torch.zeros(width, width, dtype=torch.float64, device=stack.device)
    wanted, residual = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    ridges = 0.0
    for vector in vectors:
        centred = vector - vector.mean(0)
        estimate, ridge = centred.mT @ centred, transform.ridge
        if differ:
            trace = float(estimate.trace()) + _TINY
            estimate, ridge = estimate / trace, ridge / trace
        wanted += centred @ estimate + ridge * centred
        residual += vector @ estimate
        estimates += estimate
        ridges += ridge
    prior = estimates.mean(0)
    if differ:
        prior = prior / (squares.mean() + _TINY)
    estimates.diagonal().add_(ridges)
    merged = torch.linalg.solve(estimates + prior, wanted, left=False)
    if differ:
        residual -= vectors.sum(0) @ estimates / len(vectors)
        count = max(count_of(transform.rank_fraction, min(merged.shape)), 1)
        left, values, right = triplets(residual + merged, count)
        merged = merged + (left @ right) * values.mean() if len(values) else merged
    return merged.to(stack.dtype)


_TINY = 1e-12
"""What the authors' program adds to a divisor."""


def _heterogeneity(squares: Tensor) -> float:
    """γ of the squared lengths of the tasks; 0 for a single one."""
    logarithms = (squares + _TINY).log()
    return float(logarithms.var() / (logarithms.mean() ** 2 + _TINY)) if len(squares) > 1 else 0.0


def _regression_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    matrix = rows * columns
    products = Work(8 * (4 * columns**2 + (tasks + 6) * matrix), tasks * 6.0 * matrix * columns)
    solved = Work(0, 0.7 * columns**3 + 4.0 * matrix * columns)
    work = Work.together([products, solved, decomposition(rows, columns, 8)])
    return Work(work.memory + 8 * tasks * matrix, work.operations)
