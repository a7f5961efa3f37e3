"""DOGE: a common change of all task vectors that lowers the loss they cost each other, outside the space they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform, whole_number
from lit_merge.transforms.magnitudes import Cut, count_of, cuts_over_all, keep_largest, size_of
from lit_merge.transforms.matrices import (
    check_pattern,
    decomposed,
    decomposition,
    is_matrix,
    triplets,
    work_of_matrices,
)
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import Work

__all__ = ["DOGE"]

Cuts = Statistic[tuple[Cut, ...]]


@dataclass(frozen=True)
class DOGE(Transform):
    r"""Moves all task vectors by a common Δ, found by gradient descent outside their shared space, and adds them up.

    .. math::
        \tau = \sum_t \lambda_t\, m_t \odot (\tau_t + \Delta), \qquad \lambda_t = \frac{\eta}{\lVert \tau_t \rVert_F}

    Adaptive projective gradient descent (Wei et al. 2025), as its authors' contribution to FusionBench computes it. Of
    every weight matrix Δ lowers ``Σ_t Σ_i ⟨τ_t[i], τ_t[i] − Σ_s λ_s (τ_s[i] + Δ[i])⟩²`` over the rows i, by steps of
    Adam from 0. Every gradient has its part in the shared space taken out first: the one spanned by the first r/d left
    singular vectors of all tasks' first r/T left singular vectors side by side, r = min(m, n). The mask m_t has the
    elements of largest magnitude of τ_t, over all matrices together, ⌊density · n⌋ of them, at least one.

    As in the program, parameters that are no matrices are not merged: they stay at θ0. A task whose vector is zero in
    a matrix has no say in it. Directions whose singular value is zero are left out, where the program takes whatever
    the decomposition returns.

    Args:
        steps: of Adam, 0 or more.
        learning_rate: Adam's, at least 0.
        strength: η, at least 0.
        density: fraction of the elements that every mask keeps, in (0, 1].
        divisor: d, at least 1.
        exclude: a regular expression; matrices in whose names it is found stay at θ0 too.

    Raises:
        ConfigurationError: a number is out of range, or ``exclude`` is no regular expression; on access, a singular
            value decomposition fails.
    """

    steps: int = 400
    learning_rate: float = 1e-4
    strength: float = 0.07
    density: float = 0.3
    divisor: int = 6
    exclude: str | None = None

    def __post_init__(self) -> None:
        whole_number("DOGE.steps", self.steps, minimum=0)
        whole_number("DOGE.divisor", self.divisor, minimum=1)
        self._number("learning_rate", minimum=0.0)
        self._number("strength", minimum=0.0)
        self._fraction("density")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        names = [name for name in vectors if is_matrix(self.exclude, name, vectors.shape(name))]
        statistics: list[Cuts] = []
        if names and self.density < 1:
            matrices = vectors.restrict(names)
            kept = max(count_of(self.density, size_of(matrices)), 1)
            statistics = [cuts_over_all("DOGE: threshold of the masks", matrices, kept)]
        work = partial(work_of_matrices, self.exclude, partial(_work, self.steps))
        function = partial(_merged, self, *statistics)
        return vectors.map(function, [vectors.merged_tasks], note=self, statistics=statistics, work=work)


def _merged(transform: DOGE, *given: Cuts | str | Tensor) -> Tensor:
    *statistics, name, stack = given
    assert isinstance(name, str)
    assert isinstance(stack, Tensor)
    if not is_matrix(transform.exclude, name, stack.shape):
        return torch.zeros_like(stack[:1])
    norms = torch.linalg.matrix_norm(stack).view(-1, 1, 1)
    scales = (transform.strength / norms).masked_fill_(norms == 0, 0)
    shared = decomposed("DOGE", name, partial(_shared_space, transform.divisor), stack)
    change = _common_change(transform, stack, scales, shared)
    masks = None
    for cuts in statistics:
        assert isinstance(cuts, Statistic)
        masks = keep_largest(cuts(), name, 0, stack.clone().view(len(stack), -1)).view_as(stack) != 0
    moved = (stack + change).mul_(scales)
    return (moved if masks is None else moved.mul_(masks)).sum(0, keepdim=True)


def _shared_space(divisor: int, stack: Tensor) -> Tensor:
    """An orthonormal basis of the space that the tasks share, ``(m, k)``."""
    rank = min(stack.shape[1:])
    each = max(rank // len(stack), 1)
    leading = torch.cat([triplets(matrix, each)[0] for matrix in stack], 1)
    return triplets(leading, rank // divisor)[0] if leading.shape[1] else leading


def _common_change(transform: DOGE, stack: Tensor, scales: Tensor, shared: Tensor) -> Tensor:
    change = torch.zeros_like(stack[0])
    if transform.steps == 0:
        return change
    total = float(scales.sum())
    # What is left of ⟨τ_t[i], τ_t[i] − Σ_s λ_s τ_s[i]⟩ before any change, (T, m, 1).
    rest = (stack * (stack - (stack * scales).sum(0))).sum(2, keepdim=True)
    with torch.enable_grad():
        change = change.requires_grad_()
    optimiser = torch.optim.Adam([change], lr=transform.learning_rate)
    for _ in range(transform.steps):
        present = change.detach()
        gradient = torch.zeros_like(present)
        for vector, own in zip(stack, rest, strict=True):
            residual = own - total * (vector * present).sum(1, keepdim=True)
            gradient.addcmul_(residual, vector, value=-2 * total)
        change.grad = gradient.sub_(shared @ (shared.mT @ gradient))
        optimiser.step()
    return change.detach()


def _work(steps: int, tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    matrix, rank = rows * columns, min(rows, columns)
    parts = [decomposition(rows, columns, itemsize)] * tasks + [decomposition(rows, rank, itemsize)]
    once = Work.together(parts)
    # Copies and masks of the stack; the change, its gradient, Adam's two moments and three temporaries.
    memory = (2 * tasks + 7) * matrix * itemsize
    each = 4.0 * tasks * matrix + 4.0 * matrix * rank / 6
    return Work(max(once.memory, memory), once.operations + steps * each)
