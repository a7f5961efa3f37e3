"""Correcting the sizes of what a merge made: of its singular directions, of tasks, input dimensions and layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.naming import block_of
from lit_merge.transforms.base import Transform
from lit_merge.transforms.matrices import (
    check_pattern,
    decomposed,
    decomposition,
    is_matrix,
    left_vectors,
    work_of_matrices,
)
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import Work

__all__ = ["Calibrate", "Polarise", "relative_sizes"]


@dataclass(frozen=True)
class Calibrate(Transform):
    r"""Scales each left singular direction of a merged matrix by what the tasks themselves do along it.

    Singular value calibration (SVC, Li et al. 2026, equations 4 and 8, algorithm 1). Where tasks share a direction,
    a sum counts it several times. With ``Δ = Σ_r σ_r u_r v_rᵀ`` the merged matrix, ``a_r = u_rᵀ Δ`` and
    ``a_r^t = u_rᵀ τ_t``,

    .. math:: s_r^t = \frac{\langle a_r, a_r^t \rangle}{\|a_r^t\|^2}, \qquad
        \gamma_r = \frac{T}{\sum_t \max(\alpha, s_r^t)}, \qquad \Delta' = \sum_r \gamma_r \sigma_r u_r v_r^\top .

    It follows any merge and looks at the vectors as they were before any transform, so that a coefficient belongs
    before it: ``chain(Sum(), Scale(0.3), Calibrate())``. No γ is above 1/α. A task that has nothing along a direction,
    as far as a float can tell, counts as α there; the authors' program compares its square with 1e-12. After Iso-C and
    Iso-CTS all singular values are equal: there the directions, and with them the result, are a matter of rounding.
    What is no matrix stays as it is. Decomposed in float64.

    Args:
        alpha: smallest projection that counts, in (0, 1]; lower lets directions that were merged away grow more. The
            authors take 0.1 after averages, task arithmetic, TIES, DARE and Iso-C, 0.2 after Iso-CTS, and 1 after
            TSV-M and WUDI, with which directions only shrink.
        exclude: a regular expression; matrices in whose names it is found stay as they are.

    Raises:
        ConfigurationError: ``alpha`` is out of range, or ``exclude`` is no regular expression; on application, if
            there are several vectors; on access, a singular value decomposition fails.
    """

    alpha: float = 0.1
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._fraction("alpha")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Calibrate the one stack ``(1, *shape)``."""
        if len(vectors.tasks) != 1:
            raise ConfigurationError(
                f"Calibrate: expected one merged vector, got {len(vectors.tasks)}. Put it after what merges them, e.g. "
                "Sum()."
            )
        inputs = vectors.inputs
        work = partial(work_of_matrices, self.exclude, partial(_calibration_work, len(inputs.tasks)))
        return vectors.map(partial(_calibrated, self.alpha, self.exclude), note=self, others=[inputs], work=work)


@dataclass(frozen=True)
class Polarise(Transform):
    r"""Scales every matrix by a power of its relative norm: what is long grows, what is short shrinks.

    Polarised scaling (Li et al. 2026, "Model merging in the essential subspace"), by the square of a norm over the
    mean of those that it is compared with:

    - ``tasks``: ‖τ_t‖ of a matrix with that of the other tasks; before a merge;
    - ``dimensions``: the norm of each input dimension, over the rows of all tasks, with the other dimensions'; before
      a merge;
    - ``layers``: ‖Δ_ℓ‖ with that of the same matrix in the other blocks; after a merge.

    All three go with any merge: ``chain(Polarise("tasks"), Polarise("dimensions"), TSVMerge(), Polarise("layers"))``.
    In :class:`ESM` the former two act on coordinates in the essential subspace instead, and are fields of it. For
    ``layers`` the norms of all matrices are known first, so that what precedes it is computed twice. What is no matrix,
    and for ``layers`` what is outside the blocks, stays as it is.

    Args:
        level: what is compared.
        power: exponent of the relative norm, at least 0; 0 changes nothing.
        exclude: a regular expression; matrices in whose names it is found stay as they are.

    Raises:
        ConfigurationError: there is no such level, ``power`` is out of range, or ``exclude`` is no regular expression.
    """

    level: Literal["tasks", "dimensions", "layers"] = "layers"
    power: float = 2.0
    exclude: str | None = None

    def __post_init__(self) -> None:
        self._choice("level", ("tasks", "dimensions", "layers"))
        self._number("power", minimum=0.0)
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every stack ``(T, *shape)``."""
        if self.level == "layers":
            compute = partial(_layer_factors, self.power, self.exclude, vectors)
            factors = Statistic("Polarise: norms of all layers", vectors.walk, compute)
            return vectors.map_elements(partial(_scaled_layer, factors), note=self, statistics=[factors])
        scale = _scaled_tasks if self.level == "tasks" else _scaled_dimensions
        return vectors.map(partial(_polarised, self.power, self.exclude, scale), note=self)


def relative_sizes(norms: Tensor, power: float) -> Tensor:
    """``(norm / mean norm)^power`` of some norms, in their shape; ones where all are zero."""
    mean = norms.mean()
    return (norms / mean) ** power if bool(mean > 0) else torch.ones_like(norms)


def _calibrated(alpha: float, exclude: str | None, name: str, stack: Tensor, inputs: Tensor) -> Tensor:
    if not is_matrix(exclude, name, stack.shape):
        return stack
    return decomposed("Calibrate", name, partial(_calibrated_matrix, alpha), stack[0], inputs).unsqueeze(0)


def _calibrated_matrix(alpha: float, merged: Tensor, inputs: Tensor) -> Tensor:
    matrix = merged.double()
    left = left_vectors(matrix, merged.dtype == torch.float32)
    responses = left.mT @ matrix
    total = torch.zeros(left.shape[1], dtype=torch.float64, device=merged.device)
    for vector in inputs:
        own = left.mT @ vector.double()
        squares = own.square().sum(1)
        rounding = torch.finfo(inputs.dtype).eps * torch.linalg.vector_norm(vector, dtype=torch.float64)
        projections = torch.where(squares > rounding**2, (responses * own).sum(1) / squares, alpha)
        total += projections.clamp_(min=alpha)
    # Where γ is 1 the matrix is not touched: no rounding is added by going through its decomposition.
    change = left @ (responses * (len(inputs) / total - 1).unsqueeze(1))
    return (matrix + change).to(merged.dtype)


def _calibration_work(tasks: int, one: int, rows: int, columns: int, itemsize: int) -> Work:
    rank, matrix = min(rows, columns), rows * columns
    parts = [decomposition(rows, columns, itemsize), Work(0, 4.0 * matrix * rank)]
    parts += [Work(0, 2.0 * matrix * rank)] * tasks
    work = Work.together(parts)  # beside the matrix itself, its responses, those of one task, its factor and change
    return Work(work.memory + 8 * (4 * matrix + rows * rank), work.operations)


_Scale = Callable[[float, Tensor], Tensor]


def _polarised(power: float, exclude: str | None, scale: _Scale, name: str, stack: Tensor) -> Tensor:
    return scale(power, stack) if is_matrix(exclude, name, stack.shape) else stack


def _scaled_tasks(power: float, stack: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.float64)
    return stack.mul_(relative_sizes(norms, power).to(stack.dtype))


def _scaled_dimensions(power: float, stack: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(stack, dim=(0, 1), keepdim=True, dtype=torch.float64)
    return stack.mul_(relative_sizes(norms, power).to(stack.dtype))


def _layer_factors(power: float, exclude: str | None, vectors: TaskVectors) -> dict[str, Tensor]:
    """Name -> factor of every row, ``(T,)`` in float64, of matrices in blocks."""
    kinds: dict[object, dict[str, Tensor]] = {}
    for name in sorted(vectors):
        if block_of(name) is None or not is_matrix(exclude, name, vectors.shape(name)):
            continue
        squares = torch.zeros(len(vectors.tasks), dtype=torch.float64)
        for _, chunk in vectors.chunks(name):
            squares += chunk.double().square_().sum(1).cpu()
        kind = _without_block(name), vectors.shape(name)
        kinds.setdefault(kind, {})[name] = squares.sqrt()
    found: dict[str, Tensor] = {}
    for norms in kinds.values():
        rows = torch.stack(list(norms.values()), 1)  # (T, layers)
        factors = torch.stack([relative_sizes(row, power) for row in rows])
        found.update(zip(norms, factors.T, strict=True))
    return found


def _without_block(name: str) -> str:
    """What a matrix is called in every block: its name without the number that says which block it is in."""
    for number in re.finditer(r"\d+", name):
        before, after = name[: number.start()], name[number.end() :]
        if block_of(f"{before}{int(number[0]) + 1}{after}") != block_of(name):
            return f"{before}*{after}"
    return name


def _scaled_layer(factors: Statistic[dict[str, Tensor]], name: str, start: int, chunk: Tensor) -> Tensor:
    found = factors().get(name) if chunk.numel() else None
    return chunk if found is None else chunk.mul_(found.to(chunk.device, chunk.dtype).unsqueeze(1))
