"""Reducers that treat every weight as a matrix, and average what is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["check_pattern", "decomposition", "reduce_matrices"]


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
) -> TaskVectors:
    """Apply ``merge``, ``(T, m, n)`` -> ``(m, n)``, to every matrix; all other parameters are averaged.

    Args:
        transform: on whose behalf.
        exclude: a regular expression; matrices in whose names it is found are averaged too.
        vectors: stacks ``(T, *shape)``.
        merge: may raise ``torch.linalg.LinAlgError``.
        work: from T, m, n and the itemsize to what ``merge`` takes.

    Returns:
        Stacks ``(1, *shape)``.
    """
    function = partial(_matrices_merged, type(transform).__name__, exclude, merge)
    return vectors.map(function, tasks=[vectors.merged_tasks], note=transform, work=partial(_work_of, exclude, work))


def decomposition(rows: int, columns: int, itemsize: int) -> Work:
    """A thin singular value decomposition by divide and conquer (Golub and Van Loan 2013, figure 8.6.1)."""
    small, large = sorted((rows, columns))
    # The matrix and its copy, both sides, and what LAPACK's gesdd asks for.
    memory = 2 * rows * columns + (rows + columns) * small + 4 * small**2
    return Work(memory * itemsize, 6.0 * large * small**2 + 20.0 * small**3)


def _work_of(
    exclude: str | None, work: Callable[[int, int, int, int], Work], name: str, shape: torch.Size, itemsize: int
) -> Work:
    return work(shape[0], shape[1], shape[2], itemsize) if _is_matrix(exclude, name, shape) else Work()


def _is_matrix(exclude: str | None, name: str, shape: torch.Size) -> bool:
    return len(shape) == 3 and shape.numel() > 0 and (exclude is None or re.search(exclude, name) is None)


def _matrices_merged(
    who: str, exclude: str | None, merge: Callable[[Tensor], Tensor], name: str, stack: Tensor
) -> Tensor:
    if not _is_matrix(exclude, name, stack.shape):
        return stack.mean(0, keepdim=True)
    try:
        return merge(stack).unsqueeze(0)
    except torch.linalg.LinAlgError as error:
        raise ConfigurationError(
            f"{who}: expected a singular value decomposition of {name}, got none (it fails). "
            "Look for huge values in it, use float64 vectors, or name it in exclude."
        ) from error
