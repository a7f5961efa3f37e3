"""Setting elements to zero: the smallest, the largest, or some at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform, whole_number
from lit_merge.transforms.magnitudes import (
    Cut,
    CutsByParameter,
    count_of,
    cuts_by_parameter,
    cuts_over_all,
    find_cuts_of_stack,
    keep_largest_of_row,
    size_of,
)
from lit_merge.transforms.random import Uniform, labels_of
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic

__all__ = ["Drop", "DropByRank", "MagnitudeWindow", "Trim"]

Scope = Literal["global", "tensor"]
_STREAMED = 1 << 22  # elements of a stack, from which on it is not held in memory


@dataclass(frozen=True)
class Trim(Transform):
    """Keeps the elements of largest magnitude of every task vector, and sets the others to zero.

    The first step of TIES (Yadav et al. 2023, section 4: "keep only the influential values"). Exactly
    ⌊density · n⌋ elements are kept, at least one; among elements of equal magnitude those that come first in the sorted
    order of the parameter names.

    Args:
        density: fraction of the elements that is kept, in (0, 1].
        scope: ``global`` ranks the elements of the whole flattened vector, as the paper does, in two more passes over
            the inputs (three if equal magnitudes must be told apart; two more for float64); ``tensor`` ranks those of
            every parameter by itself, as some libraries do. A large parameter's stack is then never in memory as a
            whole; it is read again instead.

    Raises:
        ConfigurationError: ``density`` is not in (0, 1], or there is no such scope.
    """

    density: float = 0.2
    scope: Scope = "global"

    def __post_init__(self) -> None:
        self._fraction("density")
        self._choice("scope", ("global", "tensor"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Trim every row of the stacks ``(T, *shape)``."""
        return _window(self, vectors, self.density, 0.0, self.scope)


@dataclass(frozen=True)
class MagnitudeWindow(Transform):
    """Leaves out the largest elements of every task vector and keeps the next largest ones.

    Model breadcrumbs (Davari and Belilovsky 2024, equation 2): outliers and small perturbations are masked, per layer.

    Args:
        density: fraction of the elements that is kept, in (0, 1].
        outliers: fraction of the elements, the largest ones, that is left out, in [0, 1).
        scope: ``tensor`` ranks within every parameter, as the paper does; ``global`` within the whole vector.

    Raises:
        ConfigurationError: a fraction is out of range, their sum is above 1, or there is no such scope.
    """

    density: float = 0.85
    outliers: float = 0.01
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        self._fraction("density")
        self._number("outliers", minimum=0.0, below=1.0)
        self._choice("scope", ("global", "tensor"))
        if self.density + self.outliers > 1 + 1e-12:
            raise ConfigurationError(
                f"MagnitudeWindow: expected density + outliers of at most 1, got {self.density:g} + {self.outliers:g}. "
                "Lower one of them."
            )

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Window every row of the stacks ``(T, *shape)``."""
        return _window(self, vectors, self.density, self.outliers, self.scope)


@dataclass(frozen=True)
class Drop(Transform):
    """Sets elements to zero at random, and scales the others so that the expectation stays.

    DARE (Yu et al. 2024, equation 1).

    Which elements depends on the seed, the task's name, the parameter's name and the position alone: not on the order
    of tasks or parameters, on the number of processes, the device or the version of torch.

    Args:
        p: probability of being dropped, in [0, 1).
        rescale: whether what is kept is divided by 1 − p.
        seed: a whole number. Two in one chain need two seeds, otherwise they drop the same elements.

    Raises:
        ConfigurationError: ``p`` is not in [0, 1), or the seed is no whole number.
    """

    p: float = 0.9
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._number("p", minimum=0.0, below=1.0)
        whole_number("Drop.seed", self.seed)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Drop elements of every row of the stacks ``(T, *shape)``."""
        uniform = Uniform(self.seed, labels_of(vectors))
        return vectors.map_rows(partial(_dropped, self.p, self.rescale, uniform), note=self)


@dataclass(frozen=True)
class DropByRank(Transform):
    """Drops elements at random, small ones more often than large ones.

    MAGPRUNE of DELLA (Deep et al. 2024, section 3.1).

    Within every row of a matrix (all weights of one output channel of a convolution, all elements of a vector), the
    element of rank r = 0 (smallest) … n − 1 is kept with probability ``density − epsilon + 2 · epsilon · r / (n − 1)``,
    and divided by that probability. A row of one element has probability ``density``.

    Args:
        density: mean probability of being kept, in (0, 1].
        epsilon: half the spread of the probabilities; both ends stay within (0, 1].
        rescale: whether what is kept is divided by its probability.
        seed: a whole number, as for :class:`Drop`.

    Raises:
        ConfigurationError: a probability leaves (0, 1], or the seed is no whole number.
    """

    density: float = 0.7
    epsilon: float = 0.1
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._fraction("density")
        self._number("epsilon", minimum=0.0)
        whole_number("DropByRank.seed", self.seed)
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ConfigurationError(
                f"DropByRank: expected 0 < density − epsilon and density + epsilon ≤ 1, got {self.density:g} and "
                f"{self.epsilon:g}. Lower epsilon."
            )

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Drop elements of every row of the stacks ``(T, *shape)``."""
        return vectors.map(partial(_dropped_by_rank, self, Uniform(self.seed, labels_of(vectors))), note=self)


def _window(transform: Transform, vectors: TaskVectors, density: float, outliers: float, scope: Scope) -> TaskVectors:
    if density == 1.0:
        return vectors.map_rows(_unchanged, note=transform)
    wanted = _counts(density, outliers)
    if scope == "tensor":
        return _by_tensor(transform, vectors, wanted)
    size, name = size_of(vectors), type(transform).__name__
    whats = [f"{name}: threshold", f"{name}: threshold of outliers"]
    found = [cuts_over_all(what, vectors, kept(size)) for what, kept in zip(whats, wanted, strict=False) if kept(size)]
    return vectors.map_rows(partial(_windowed, tuple(found)), note=transform, statistics=found)


def _by_tensor(transform: Transform, vectors: TaskVectors, wanted: Sequence[partial[int]]) -> TaskVectors:
    """Every parameter by itself: small stacks in memory, large ones read again instead."""
    large = [name for name in vectors if _is_streamed(vectors, name, wanted)]
    whole = [name for name in vectors if name not in set(large)]
    note = transform if not (large and whole) else ""
    views = []
    if whole:
        views.append(vectors.restrict(whole).map(partial(_window_of_tensor, wanted), note=note))
    if large:
        view, name = vectors.restrict(large), type(transform).__name__
        found = [cuts_by_parameter(f"{name}: thresholds of large tensors", view, kept) for kept in wanted]
        function = partial(_windowed_by_tensor, tuple(found))
        views.append(view.map_rows(function, note=note, statistics=found, before=partial(_find, tuple(found))))
    return views[0] if len(views) == 1 else vectors.united(views, note=transform)


def _is_streamed(vectors: TaskVectors, name: str, wanted: Sequence[partial[int]]) -> bool:
    """Whether a stack is large, comes in chunks, as on a processor it does, and all cuts keep something."""
    count, size = vectors.shape(name)[0], vectors.shape(name)[1:].numel()
    return count * size >= _STREAMED and vectors.chunk_length(name) < size and all(kept(size) for kept in wanted)


def _counts(density: float, outliers: float) -> list[partial[int]]:
    """How many of so many elements the first cut keeps, and the second one, if there is any."""
    return [partial(_up_to, density, outliers), *([partial(count_of, outliers)] if outliers else [])]


def _up_to(density: float, outliers: float, size: int) -> int:
    return min(count_of(outliers, size) + _kept(density, size), size)


def _kept(density: float, size: int) -> int:
    return max(count_of(density, size), 1)


def _windowed(found: tuple[Statistic[tuple[Cut, ...]], ...], row: int, name: str, start: int, values: Tensor) -> None:
    if len(values):
        _between([statistic()[row] for statistic in found], name, start, values)


def _between(cuts: Sequence[Cut], name: str, start: int, values: Tensor) -> None:
    """Leave what the first cut keeps and the second one, if there is any, does not."""
    largest = keep_largest_of_row(cuts[1], name, start, values.clone()) if len(cuts) > 1 else None
    keep_largest_of_row(cuts[0], name, start, values)
    if largest is not None:
        values.sub_(largest)


def _window_of_tensor(wanted: Sequence[partial[int]], name: str, stack: Tensor) -> Tensor:
    size = stack[0].numel()
    if size == 0:
        return stack
    flat = stack.view(len(stack), -1)
    cuts = [find_cuts_of_stack(name, flat, kept(size)) for kept in wanted if kept(size)]
    for values, of_row in zip(flat, zip(*cuts, strict=True), strict=True):
        _between(of_row, name, 0, values)
    return stack


def _windowed_by_tensor(
    found: tuple[Statistic[CutsByParameter], ...], row: int, name: str, start: int, values: Tensor
) -> None:
    _between([statistic()(name)[row] for statistic in found], name, start, values)


def _find(found: tuple[Statistic[CutsByParameter], ...], name: str) -> None:
    """Find a parameter's cuts before its chunks ask for them, each of which would be computed twice."""
    for statistic in found:
        statistic().prepare(name)


def _unchanged(row: int, name: str, start: int, values: Tensor) -> None:
    pass


def _dropped(p: float, rescale: bool, uniform: Uniform, row: int, name: str, start: int, values: Tensor) -> None:
    uniform.drop(p, row, name, start, values)
    if rescale and p:
        values.div_(1 - p)


def _dropped_by_rank(transform: DropByRank, uniform: Uniform, name: str, stack: Tensor) -> Tensor:
    if stack.numel() == 0:
        return stack
    width = stack[0, 0].numel() if stack.ndim >= 3 else stack[0].numel()
    spread = transform.epsilon if width > 1 else 0.0
    ranks = torch.arange(width, dtype=torch.float64, device=stack.device).div_(max(width - 1, 1))
    levels = ranks.mul_(2 * spread).add_(transform.density - spread).to(stack.dtype)
    for index, vector in enumerate(stack.view(len(stack), -1)):  # one after the other: sorting needs memory
        rows = vector.view(-1, width)
        order = rows.abs().argsort(dim=1, stable=True)
        kept = torch.empty_like(rows).scatter_(1, order, levels.expand_as(rows)).view(-1)
        vector.masked_fill_(uniform.values(index, name, vector) >= kept, 0)
        if transform.rescale:
            vector.div_(kept)
    return stack
