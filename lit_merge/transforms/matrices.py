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

__all__ = ["check_pattern", "reduce_matrices"]


def check_pattern(transform: Transform, pattern: str | None) -> None:
    """Refuse an ``exclude`` that is no regular expression."""
    try:
        re.compile(pattern or "")
    except (re.error, TypeError) as error:
        raise ConfigurationError(
            f"{type(transform).__name__}.exclude: expected a regular expression, got {pattern!r} ({error}). Correct it."
        ) from error


def reduce_matrices(
    transform: Transform, exclude: str | None, vectors: TaskVectors, merge: Callable[[Tensor], Tensor]
) -> TaskVectors:
    """Apply ``merge``, ``(T, m, n)`` -> ``(m, n)``, to every matrix; all other parameters are averaged.

    Args:
        transform: on whose behalf.
        exclude: a regular expression; matrices in whose names it is found are averaged too.
        vectors: stacks ``(T, *shape)``.
        merge: may raise ``torch.linalg.LinAlgError``.

    Returns:
        Stacks ``(1, *shape)``.
    """
    function = partial(_matrices_merged, type(transform).__name__, exclude, merge)
    return vectors.map(function, tasks=[vectors.merged_tasks], note=transform)


def _matrices_merged(
    who: str, exclude: str | None, merge: Callable[[Tensor], Tensor], name: str, stack: Tensor
) -> Tensor:
    excluded = exclude is not None and re.search(exclude, name) is not None
    if stack.ndim != 3 or stack.numel() == 0 or excluded:
        return stack.mean(0, keepdim=True)
    try:
        return merge(stack).unsqueeze(0)
    except torch.linalg.LinAlgError as error:
        raise ConfigurationError(
            f"{who}: expected a singular value decomposition of {name}, got none (it fails). "
            "Look for huge values in it, use float64 vectors, or name it in exclude."
        ) from error
