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
    "nearest_orthogonal",
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
    """A thin singular value decomposition by divide and conquer (Golub and Van Loan 2013, figure 8.6.1)."""
    small, large = sorted((rows, columns))
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


def triplets(matrix: Tensor, most: int, largest: Tensor | None = None) -> Triplets:
    """The first singular triplets of a matrix ``(m, n)``.

    Args:
        matrix: in float32 or float64.
        most: at most so many.
        largest: to what zero is compared, by default the largest singular value.

    Returns:
        The triplets whose singular values are not zero.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if not is_finite(values):  # of a sum that overflowed; some libraries do not refuse it
        raise torch.linalg.LinAlgError
    floor = torch.finfo(values.dtype).eps * max(matrix.shape) * (values[:1] if largest is None else largest)
    kept = min(most, int((values > floor).sum()))
    return left[:, :kept], values[:kept], right[:kept]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """P Qᵀ of ``matrix = P S Qᵀ``, over the singular values that are not zero (Procrustes)."""
    left, _, right = triplets(matrix, min(matrix.shape))
    return left @ right


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
