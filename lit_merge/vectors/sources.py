"""Where the stacks of task vectors come from: files and memory, or a function of other stacks."""

# ruff: noqa: D102 - Source documents what its subclasses define

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_merge.errors import NonFiniteError, StructureMismatchError
from lit_merge.params import is_finite
from lit_merge.vectors.lazy import Structure

if TYPE_CHECKING:
    from lit_merge.vectors.task_vector import TaskVector
    from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["Entries", "Rows", "Source", "Stacks", "Subset", "Union"]

_ENTRIES_IN_CACHE = 1 << 19  # two MiB of float32: a piece, and what is computed from it, stays near the processor
_FEWEST_ENTRIES = 1 << 12  # below, the cost of calling an operator is no longer small beside its work


class Source(ABC):
    """Gives the stack of a parameter, as a whole or in pieces."""

    reads = 1
    """How often going through all parameters reads every input."""
    by_pieces = True
    """Whether pieces are computed one by one."""

    @abstractmethod
    def stack(self, name: str) -> Tensor:
        """A new stack ``(T, *shape)``."""

    @abstractmethod
    def pieces(self, name: str, length: int) -> Iterator[tuple[int, Tensor]]:
        """Positions and new pieces ``(T, n)`` of the flattened stack, ``n`` at most ``length``."""

    def piece_length(self, name: str) -> int:
        """How many entries a piece should have."""
        raise NotImplementedError


class Rows(Source):
    """The stacks of task vectors: one row each, brought to a common dtype, and to a device if one is given."""

    def __init__(self, rows: tuple[TaskVector, ...], structure: Structure, device: torch.device | None) -> None:
        self.rows, self.structure, self.device = rows, structure, device

    def stack(self, name: str) -> Tensor:
        shape, dtype = self.structure[name]
        first = self.rows[0][name]
        stack = torch.empty((len(self.rows), *shape), dtype=dtype, device=self.device or first.device)
        for index, row in enumerate(self.rows):
            stack[index].copy_(row[name] if index else first)
        return self._finite(stack, name)

    def pieces(self, name: str, length: int) -> Iterator[tuple[int, Tensor]]:
        shape, dtype = self.structure[name]
        slicers = [row.slicer(name) for row in self.rows]
        size = shape.numel()
        for start in range(0, max(size, 1), length):
            stop = min(start + length, size)
            first = slicers[0](start, stop)
            piece = torch.empty((len(slicers), stop - start), dtype=dtype, device=self.device or first.device)
            for index, read in enumerate(slicers):
                piece[index].copy_(read(start, stop) if index else first)
            yield start, self._finite(piece, name)

    def piece_length(self, name: str) -> int:
        on_accelerator = self.device is not None and self.device.type != "cpu"
        if on_accelerator:  # nothing is gained by small pieces there
            return max(self.structure[name][0].numel(), 1)
        return max(_ENTRIES_IN_CACHE // len(self.rows), _FEWEST_ENTRIES)

    def _finite(self, piece: Tensor, name: str) -> Tensor:
        if math.isfinite(float(piece.sum())):  # a sum may overflow by itself, but it never hides what is not finite
            return piece
        for row, values in zip(self.rows, piece, strict=True):
            if not is_finite(values):
                raise NonFiniteError(
                    f"task vector {row.task!r}: expected finite values, got NaN or infinity in {name}. "
                    "Train again with a lower learning rate, or remove this input."
                )
        return piece


class Stacks(Source):
    """A function of whole stacks."""

    by_pieces = False

    def __init__(self, source: TaskVectors, function: Callable[[str, Tensor], Tensor], count: int, note: str) -> None:
        self.source, self.function, self.count, self.note = source, function, count, note
        self.reads = source.walk

    def stack(self, name: str) -> Tensor:
        stack = self.function(name, self.source[name])
        return _checked(stack, (self.count, *self.source.shape(name)[1:]), self.source.dtype(name), self.note, name)

    def pieces(self, name: str, length: int) -> Iterator[tuple[int, Tensor]]:
        flat = self.stack(name).reshape(self.count, -1)
        for start in range(0, max(flat.shape[1], 1), length):
            yield start, flat[:, start : start + length]


class Entries(Source):
    """A function of single entries, applied to one piece after the other."""

    def __init__(
        self,
        source: TaskVectors,
        others: tuple[TaskVectors, ...],
        function: Callable[..., Tensor],
        count: int,
        note: str,
    ) -> None:
        self.source, self.others, self.function, self.count, self.note = source, others, function, count, note
        self.reads = source.walk + sum(view.walk for view in others)
        self.by_pieces = all(view.by_pieces for view in (source, *others))

    def stack(self, name: str) -> Tensor:
        shape = (self.count, *self.source.shape(name)[1:])
        stack: Tensor | None = None
        for start, piece in self.pieces(name, self.source.piece_length(name)):
            if piece.shape[1] * self.count == math.prod(shape):
                return piece.reshape(shape)
            if stack is None:
                stack = torch.empty(shape, dtype=piece.dtype, device=piece.device)
                flat = stack.view(self.count, -1)
            flat[:, start : start + piece.shape[1]] = piece
        assert stack is not None
        return stack

    def pieces(self, name: str, length: int) -> Iterator[tuple[int, Tensor]]:
        views = (self.source, *self.others)
        for parts in zip(*(view.pieces(name, length) for view in views), strict=True):
            start, piece = parts[0]
            size = piece.shape[1]
            result = self.function(name, start, *(part for _, part in parts))
            yield start, _checked(result, (self.count, size), self.source.dtype(name), self.note, name)


class Subset(Source):
    """The same stacks, of some of the parameters."""

    def __init__(self, source: TaskVectors) -> None:
        self.source = source
        self.reads, self.by_pieces = source.walk, source.by_pieces

    def stack(self, name: str) -> Tensor:
        return self.source[name]

    def pieces(self, name: str, length: int) -> Iterator[tuple[int, Tensor]]:
        return self.source.pieces(name, length)

    def piece_length(self, name: str) -> int:
        return self.source.inputs.piece_length(name)


class Union(Source):
    """Stacks of several views that have different parameters."""

    def __init__(self, views: Mapping[str, TaskVectors]) -> None:
        self.views = dict(views)
        self.reads = max(view.walk for view in self.views.values())
        self.by_pieces = all(view.by_pieces for view in self.views.values())

    def stack(self, name: str) -> Tensor:
        return self.views[name][name]

    def pieces(self, name: str, length: int) -> Iterator[tuple[int, Tensor]]:
        return self.views[name].pieces(name, length)


def _checked(stack: Tensor, shape: tuple[int, ...], dtype: torch.dtype, note: str, name: str) -> Tensor:
    if tuple(stack.shape) != shape or stack.dtype != dtype:
        raise StructureMismatchError(
            f"{note}: expected {dtype} {shape} for {name}, got {stack.dtype} {tuple(stack.shape)}. "
            "Let the function return (T', …) in the dtype of its input, and pass the T' tasks to map."
        )
    return stack
