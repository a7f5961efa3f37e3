"""Reducers that treat every weight as a matrix, and average what is none; singular vectors and values.

What a float cannot tell from zero has no direction: singular values below ``eps · max(m, n)`` times the largest are
left out, with their vectors, which would be arbitrary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.params import is_finite
from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = [
    "Triplets",
    "check_pattern",
    "decomposed",
    "decomposition",
    "is_matrix",
    "largest_value",
    "left_vectors",
    "nearest_orthogonal",
    "polar",
    "reduce_matrices",
    "triplets",
    "work_of_matrices",
]

_Result = TypeVar("_Result")

Triplets = tuple[Tensor, Tensor, Tensor]
"""Left singular vectors ``(m, k)``, singular values ``(k,)``, right singular vectors ``(k, n)``."""


def check_pattern(transform: Transform, pattern: str | None) -> None:
    """Refuse an ``exclude`` that is no regular expression."""
    try:
        re.compile(pattern or "")
    except (re.error, TypeError) as error:
        raise ConfigurationError(
            f"{type(transform).__name__}.exclude: expected a regular expression, got {pattern!r} ({error})."
        ) from error


def reduce_matrices(
    transform: Transform,
    exclude: str | None,
    vectors: TaskVectors,
    merge: Callable[[Tensor], Tensor],
    work: Callable[[int, int, int, int], Work],
    rest: Callable[[Tensor], Tensor] | None = None,
) -> TaskVectors:
    """Apply ``merge``, ``(T, m, n)`` -> ``(m, n)``, to every matrix; all other parameters are averaged.

    Args:
        transform: on whose behalf.
        exclude: a regular expression; matrices in whose names it is found are averaged too.
        vectors: stacks ``(T, *shape)``.
        merge: may raise ``torch.linalg.LinAlgError``.
        work: from T, m, n and the itemsize to what ``merge`` takes.
        rest: instead of the average, ``(T, *shape)`` -> ``(*shape)``, of all other parameters.

    Returns:
        Stacks ``(1, *shape)``.
    """
    function = partial(_matrices_merged, type(transform).__name__, exclude, merge, rest or partial(torch.mean, dim=0))
    works = partial(work_of_matrices, exclude, work)
    return vectors.map(function, tasks=[vectors.merged_tasks], note=transform, work=works)


def decomposition(rows: int, columns: int, itemsize: int) -> Work:
    """A thin singular value decomposition by divide and conquer (Golub and Van Loan 2013, figure 8.6.1).

    Of float32 it is that of :func:`triplets`: a product in float64, and what LAPACK's syevd takes.
    """
    small, large = sorted((rows, columns))
    if itemsize == 4:  # the matrix and one side in float64, the product with its vectors and workspace, both sides
        memory = 8 * (2 * large * small + 5 * small**2) + 4 * (rows + columns) * small
        return Work(memory, 4.0 * large * small**2 + 9.0 * small**3)
    # The matrix and its copy, both sides, and what LAPACK's gesdd asks for.
    memory = 2 * rows * columns + (rows + columns) * small + 4 * small**2
    return Work(memory * itemsize, 6.0 * large * small**2 + 20.0 * small**3)


def work_of_matrices(
    exclude: str | None, work: Callable[[int, int, int, int], Work], name: str, shape: torch.Size, itemsize: int
) -> Work:
    """``work`` of T, m, n and the itemsize for a matrix; none for other parameters."""
    return work(shape[0], shape[1], shape[2], itemsize) if is_matrix(exclude, name, shape) else Work()


def is_matrix(exclude: str | None, name: str, shape: torch.Size) -> bool:
    """Whether a stack ``(T, *shape)`` is one of matrices that are not excluded by name."""
    return len(shape) == 3 and shape.numel() > 0 and (exclude is None or re.search(exclude, name) is None)


def decomposed(who: str, name: str, function: Callable[..., _Result], *given: Any) -> _Result:
    """``function(*given)``, whose decomposition may fail.

    Raises:
        ConfigurationError: it fails.
    """
    try:
        return function(*given)
    except torch.linalg.LinAlgError as error:
        raise ConfigurationError(
            f"{who}: expected a singular value decomposition of {name}, got none (it fails). "
            "Look for huge values in it, use float64 vectors, or name it in exclude."
        ) from error


def triplets(matrix: Tensor, most: int, largest: Tensor | None = None, single: bool = False) -> Triplets:
    """The first singular triplets of a matrix ``(m, n)``.

    Those of a float32 matrix A come from the eigenvectors of ``A Aᵀ`` or ``Aᵀ A``, of the smaller one, in float64. What
    squares lose there, ``eps`` of float64 times the square of the largest value over the smallest that counts, is
    below 1e-7; float32 decompositions lose more, and take up to three times as long.

    Args:
        matrix: in float32 or float64.
        most: at most so many.
        largest: to what zero is compared, by default the largest singular value.
        single: of a matrix in float64, whether its elements are no more exact than float32: then as of float32.

    Returns:
        The triplets whose singular values are not zero.
    """
    if single or matrix.dtype == torch.float32:
        return _from_squares(matrix, most, largest)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if not is_finite(values):  # of a sum that overflowed; some libraries do not refuse it
        raise torch.linalg.LinAlgError
    kept = _not_zero(values, matrix, most, largest)
    return left[:, :kept], values[:kept], right[:kept]


def largest_value(matrix: Tensor) -> Tensor:
    """The largest singular value of a matrix, a scalar of its dtype; as exact as :func:`triplets`."""
    if matrix.dtype != torch.float32:
        return torch.linalg.matrix_norm(matrix, 2)
    rows = (matrix if matrix.shape[1] >= matrix.shape[0] else matrix.mT).double()
    return torch.linalg.eigvalsh(rows @ rows.mT)[-1].clamp(min=0).sqrt().to(matrix.dtype)


def left_vectors(matrix: Tensor, single: bool) -> Tensor:
    """All left singular vectors of a matrix ``(m, n)`` in float64, ``(m, k)``, of values that are not zero.

    Args:
        matrix: in float64.
        single: whether its elements are no more exact than float32: then from its squares, as in :func:`triplets`.
    """
    rows, columns = matrix.shape
    if single:
        wide, _, values, near = _shorter_side(matrix, rows)
        return near if wide else matrix @ (near / values)
    small = torch.linalg.qr(matrix.mT, mode="r").R.mT if columns > rows else matrix  # the right ones are not needed
    left, values, _ = torch.linalg.svd(small, full_matrices=False)
    if not is_finite(values):
        raise torch.linalg.LinAlgError
    return left[:, : _not_zero(values, matrix, rows)]


def _not_zero(values: Tensor, matrix: Tensor, most: int, largest: Tensor | None = None, squared: bool = False) -> int:
    eps = torch.finfo(matrix.dtype).eps * max(matrix.shape)
    floor = (eps**0.5 if squared else eps) * (values[:1] if largest is None else largest)
    return min(most, int((values > floor).sum()))


def _from_squares(matrix: Tensor, most: int, largest: Tensor | None) -> Triplets:
    wide, rows, values, near = _shorter_side(matrix, most, largest)
    far = (rows.mT @ near).div_(values)
    left, right = (near, far) if wide else (far, near)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.mT.to(matrix.dtype)


def _shorter_side(matrix: Tensor, most: int, largest: Tensor | None = None) -> tuple[bool, Tensor, Tensor, Tensor]:
    """Whether a matrix is wide; in float64 it or its transpose, wide; its values that are not zero and left vectors."""
    wide = matrix.shape[1] >= matrix.shape[0]
    rows = (matrix if wide else matrix.mT).double()
    values, near = _squares(rows)
    kept = _not_zero(values, matrix, most, largest, squared=matrix.dtype == torch.float64)
    return wide, rows, values[:kept], near[:, :kept]


def _squares(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The singular values of ``(m, n)``, m ≤ n, in float64, the largest first, and the left vectors ``(m, m)``."""
    squares, vectors = torch.linalg.eigh(rows @ rows.mT)
    if not is_finite(squares):  # of a sum that overflowed; some libraries do not refuse it
        raise torch.linalg.LinAlgError
    return squares.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """P Qᵀ of ``matrix = P S Qᵀ``, over the singular values that are not zero (Procrustes)."""
    return polar(matrix)[0]


def polar(matrix: Tensor, single: bool = False) -> tuple[Tensor, Tensor]:
    """P Qᵀ of ``matrix = P S Qᵀ``, and S, over the singular values that are not zero; as exact as :func:`triplets`.

    Args:
        matrix: in float32 or float64.
        single: as of :func:`triplets`.
    """
    if not single and matrix.dtype != torch.float32:
        left, values, right = triplets(matrix, min(matrix.shape))
        return left @ right, values
    wide, rows, values, near = _shorter_side(matrix, min(matrix.shape))
    factor = ((near / values) @ near.mT @ rows).to(matrix.dtype)  # P S⁻¹ Pᵀ · P S Qᵀ
    return (factor if wide else factor.mT), values.to(matrix.dtype)


def _matrices_merged(
    who: str,
    exclude: str | None,
    merge: Callable[[Tensor], Tensor],
    rest: Callable[[Tensor], Tensor],
    name: str,
    stack: Tensor,
) -> Tensor:
    if not is_matrix(exclude, name, stack.shape):
        return rest(stack).unsqueeze(0)
    return decomposed(who, name, merge, stack).unsqueeze(0)
