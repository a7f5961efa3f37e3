"""Where the stacks of task vectors come from: files and memory, or a function of other stacks."""

# ruff: noqa: D102 - Source documents what its subclasses define

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lit_merge.checkpoints.difference import DifferenceSlicer, check_base_part
from lit_merge.errors import NonFiniteError, StructureMismatchError
from lit_merge.files.lazy import LazyMapping, Slicer, Structure
from lit_merge.params import is_finite
from lit_merge.vectors.threads import in_worker, ordered_map

if TYPE_CHECKING:
    from lit_merge.vectors.task_vector import TaskVector
    from lit_merge.vectors.task_vectors import TaskVectors

__all__ = [
    "ByRow",
    "Elements",
    "Reader",
    "RowReader",
    "Rows",
    "Source",
    "Stacks",
    "Subset",
    "Sums",
    "Union",
    "Work",
    "sum_rows",
]

_ELEMENTS_IN_CACHE = 1 << 21  # eight MiB of float32: larger ones leave the processor's cache, smaller ones cost calls
_ELEMENTS_OF_A_SUM = 1 << 19  # of one vector at a time; fewer calls, that several threads wait for each other in
_FEWEST_ELEMENTS = 1 << 12  # below, the cost of calling an operator is no longer small beside its work


Reader = Callable[[int, int], Tensor]
"""``(start, stop)`` -> those elements of a flattened stack, a new chunk ``(T, stop - start)``."""

RowReader = Callable[[int, int], Iterator[Tensor]]
"""``(start, stop)`` -> those elements of every row in turn, ``(stop - start,)``: the caller's to write into until the
next row is asked for."""


@dataclass(frozen=True)
class Work:
    """What computing the stack of one parameter takes beyond reading it.

    Attributes:
        memory: bytes of temporaries at most, without the stacks themselves.
        operations: floating-point operations of matrix products and decompositions.
    """

    memory: int = 0
    operations: float = 0.0

    @staticmethod
    def together(parts: Iterable[Work]) -> Work:
        """Of what is computed one after the other."""
        listed = list(parts)
        return Work(max((one.memory for one in listed), default=0), sum(one.operations for one in listed))


WorkOf = Callable[[str, torch.Size, int], Work]
"""``(name, shape, itemsize)`` of a stack ``(T, *shape)`` -> the work of a function of it."""


class Source(ABC):
    """Gives the stack of a parameter, as a whole or in chunks."""

    reads = 1
    """How often going through all parameters reads every input."""
    by_chunks = True
    """Whether chunks are computed one by one."""
    by_rows = False
    """Whether rows are computed one by one, so that a sum of them needs no chunk of all."""

    @abstractmethod
    def stack(self, name: str) -> Tensor:
        """A new stack ``(T, *shape)``."""

    @abstractmethod
    def reader(self, name: str) -> Reader:
        """Reads any chunk of the flattened stack; what several chunks need is done once."""

    def rows(self, name: str, which: Sequence[int] | None = None) -> RowReader:
        """Reads any chunk row by row, of all rows or those at some positions."""
        read = self.reader(name)
        if which is None:
            return lambda start, stop: iter(read(start, stop))
        return lambda start, stop: iter(read(start, stop)[list(which)])

    def summed(self, name: str) -> Reader:
        """Reads Σ_t τ_t of any chunk, ``(1, stop - start)``."""
        rows = self.rows(name)
        return lambda start, stop: _sum_of(rows(start, stop))

    def chunk_length(self, name: str) -> int:
        """How many elements a chunk should have."""
        raise NotImplementedError

    def work(self, name: str) -> Work:
        """What computing the stack takes."""
        return Work()


class Rows(Source):
    """The stacks of task vectors: one row each, brought to a common dtype, and to a device if one is given."""

    by_rows = True

    def __init__(self, vectors: tuple[TaskVector, ...], structure: Structure, device: torch.device | None) -> None:
        self.vectors, self.structure, self.device = vectors, structure, device

    def stack(self, name: str) -> Tensor:
        shape = self.structure[name][0]
        return self.reader(name)(0, shape.numel()).view(len(self.vectors), *shape)

    def reader(self, name: str) -> Reader:
        dtype = self.structure[name][1]
        device = self.device or self.vectors[0].device(name)
        slicers = [row.slicer(name) for row in self.vectors]

        def read(start: int, stop: int) -> Tensor:
            chunk = torch.empty((len(slicers), stop - start), dtype=dtype, device=device)
            shared: _Shared = None
            for row, fill in zip(chunk, slicers, strict=True):
                shared = _fill(row, fill, start, stop, shared)
            if not is_finite(chunk):
                for index, values in enumerate(chunk):
                    self._check_finite(index, name, start, values, slicers[index])
            return chunk

        return read

    def rows(self, name: str, which: Sequence[int] | None = None) -> RowReader:
        dtype = self.structure[name][1]
        device = self.device or self.vectors[0].device(name)
        slicers = {index: self.vectors[index].slicer(name) for index in _positions(self.vectors, which)}

        def read(start: int, stop: int) -> Iterator[Tensor]:
            values = torch.empty(stop - start, dtype=dtype, device=device)
            shared: _Shared = None
            for index, fill in slicers.items():
                shared = _fill(values, fill, start, stop, shared)
                self._check_finite(index, name, start, values, fill)
                yield values

        return read

    def summed(self, name: str) -> Reader:
        """As of any rows, but whether all is finite is told from the sum."""
        dtype = self.structure[name][1]
        device = self.device or self.vectors[0].device(name)
        slicers = [row.slicer(name) for row in self.vectors]

        def summed(start: int, stop: int) -> Tensor:
            total = torch.empty((1, stop - start), dtype=dtype, device=device)
            row = torch.empty_like(total[0]) if len(slicers) > 1 else total[0]
            shared = _fill(total[0], slicers[0], start, stop, None)
            for fill in slicers[1:]:
                shared = _fill(row, fill, start, stop, shared)
                total[0].add_(row)
            return total if is_finite(total) else sum_rows(self.reader(name)(start, stop))  # says whose fault it is

        return summed

    def chunk_length(self, name: str) -> int:
        on_accelerator = self.device is not None and self.device.type != "cpu"
        if on_accelerator:  # nothing is gained by small chunks there
            return max(self.structure[name][0].numel(), 1)
        return max(_ELEMENTS_IN_CACHE // len(self.vectors), _FEWEST_ELEMENTS)

    def _check_finite(self, index: int, name: str, start: int, values: Tensor, fill: Slicer) -> None:
        if is_finite(values):
            return
        task = self.vectors[index].task
        if isinstance(fill, DifferenceSlicer):
            check_base_part(fill.base_part(start, start + len(values), values), name)
        raise NonFiniteError(
            f"task vector {repr(task) if task else f'number {index}'}: expected finite values, got NaN or "
            f"infinity in {name}. Train again with a lower learning rate, or remove this input."
        )


_Shared: TypeAlias = "tuple[LazyMapping, Tensor] | None"


def _fill(row: Tensor, fill: Slicer, start: int, stop: int, shared: _Shared) -> _Shared:
    """Read one vector's chunk; returns the part of θ0 that others may share with it."""
    if not isinstance(fill, DifferenceSlicer):
        fill(start, stop, row)
        return shared
    fill.tuned(start, stop, row)
    if shared is None or shared[0] is not fill.origin:  # one base for all: it is read once
        shared = fill.origin, fill.base_part(start, stop, row)
    row.sub_(shared[1])
    return shared


def _sum_of(rows: Iterator[Tensor]) -> Tensor:
    """Of at least one row, ``(1, n)``, one after the other."""
    total = next(rows).clone()
    for row in rows:
        total.add_(row)
    return total.unsqueeze(0)


def sum_rows(chunk: Tensor) -> Tensor:
    """``(T, n)`` to ``(1, n)``, one row after the other; the first row is written into."""
    total = chunk[:1]
    for row in range(1, len(chunk)):
        total.add_(chunk[row : row + 1])
    return total


class _Computed(Source):
    """A function of one view's stacks, and of others' read side by side."""

    def __init__(
        self,
        source: TaskVectors,
        others: tuple[TaskVectors, ...],
        function: Callable[..., Tensor],
        count: int,
        note: str,
        work: WorkOf | None = None,
        before: Callable[[str], object] | None = None,
    ) -> None:
        self.source, self.others, self.function, self.count, self.note = source, others, function, count, note
        self._work, self._before = work, before
        self.reads = source.walk + sum(view.walk for view in others)

    def chunk_length(self, name: str) -> int:
        return self.source.chunk_length(name)

    def work(self, name: str) -> Work:
        views = [view.work(name) for view in (self.source, *self.others)]
        own = (
            [] if self._work is None else [self._work(name, self.source.shape(name), self.source.dtype(name).itemsize)]
        )
        return Work.together([*views, *own])


class Stacks(_Computed):
    """A function of whole stacks."""

    by_chunks = False

    def stack(self, name: str) -> Tensor:
        stacks = [view[name] for view in (self.source, *self.others)]
        with torch.autocast(stacks[0].device.type, enabled=False):  # exact inside mixed-precision training too
            stack = self.function(name, *stacks)
        shape = (self.count, *self.source.shape(name)[1:])
        return _own(_checked(stack, shape, self.source.dtype(name), self.note, name))

    def reader(self, name: str) -> Reader:
        flat = self.stack(name).reshape(self.count, -1)
        return lambda start, stop: flat[:, start:stop].clone()


class Elements(_Computed):
    """A function of single elements, applied to one chunk after the other."""

    @property
    def by_chunks(self) -> bool:  # type: ignore[override]
        return all(view.by_chunks for view in (self.source, *self.others))

    def stack(self, name: str) -> Tensor:
        shape = (self.count, *self.source.shape(name)[1:])
        size, length, read = math.prod(shape[1:]), self.source.chunk_length(name), self.reader(name)
        if size <= length:
            return _own(read(0, size).reshape(shape))
        starts = range(0, size, length)
        chunks = ordered_map(read, ((start, min(start + length, size)) for start in starts))
        flat: Tensor | None = None
        for start, chunk in zip(starts, chunks, strict=True):
            if flat is None:
                flat = torch.empty((self.count, size), dtype=chunk.dtype, device=chunk.device)
            flat[:, start : start + length] = chunk
        assert flat is not None
        return flat.view(shape)

    def reader(self, name: str) -> Reader:
        readers = [view.reader(name) for view in (self.source, *self.others)]
        dtype = self.source.dtype(name)
        self._prepare(name)

        def read(start: int, stop: int) -> Tensor:
            result = self.function(name, start, *(part(start, stop) for part in readers))
            return _checked(result, (self.count, stop - start), dtype, self.note, name)

        return read

    def _prepare(self, name: str) -> None:
        if self._before is not None and not in_worker():
            self._before(name)


class ByRow(Elements):
    """A function of single elements that treats every row by itself: ``function(row, name, start, values)``."""

    def __init__(
        self,
        source: TaskVectors,
        function: Callable[[int, str, int, Tensor], object],
        note: str,
        before: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__(source, (), partial(_row_by_row, function), len(source.tasks), note, before=before)
        self._of_row = function

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.source.by_rows

    def rows(self, name: str, which: Sequence[int] | None = None) -> RowReader:
        rows, positions = self.source.rows(name, which), _positions(self.source.tasks, which)
        self._prepare(name)

        def read(start: int, stop: int) -> Iterator[Tensor]:
            for index, values in zip(positions, rows(start, stop), strict=True):
                self._of_row(index, name, start, values)
                yield values

        return read


class Sums(Elements):
    """A function of the sums over all vectors, chunk by chunk."""

    def chunk_length(self, name: str) -> int:
        length = self.source.chunk_length(name)
        return max(length, _ELEMENTS_OF_A_SUM) if self.source.by_rows else length

    def reader(self, name: str) -> Reader:
        read, dtype = self.source.summed(name), self.source.dtype(name)

        def apply(start: int, stop: int) -> Tensor:
            result = self.function(name, start, read(start, stop))
            return _checked(result, (self.count, stop - start), dtype, self.note, name)

        return apply


class Subset(Source):
    """The same stacks, of some of the parameters."""

    def __init__(self, source: TaskVectors) -> None:
        self.source = source
        self.reads, self.by_chunks, self.by_rows = source.walk, source.by_chunks, source.by_rows

    def stack(self, name: str) -> Tensor:
        return self.source[name]

    def reader(self, name: str) -> Reader:
        return self.source.reader(name)

    def rows(self, name: str, which: Sequence[int] | None = None) -> RowReader:
        return self.source.rows(name, which)

    def summed(self, name: str) -> Reader:
        return self.source.summed(name)

    def chunk_length(self, name: str) -> int:
        return self.source.chunk_length(name)

    def work(self, name: str) -> Work:
        return self.source.work(name)


class Union(Source):
    """Stacks of several views that have different parameters."""

    def __init__(self, views: Mapping[str, TaskVectors]) -> None:
        self.views = dict(views)
        self.reads = max(view.walk for view in self.views.values())
        self.by_chunks = all(view.by_chunks for view in self.views.values())
        self.by_rows = all(view.by_rows for view in self.views.values())

    def stack(self, name: str) -> Tensor:
        return self.views[name][name]

    def chunk_length(self, name: str) -> int:
        return self.views[name].chunk_length(name)

    def reader(self, name: str) -> Reader:
        return self.views[name].reader(name)

    def rows(self, name: str, which: Sequence[int] | None = None) -> RowReader:
        return self.views[name].rows(name, which)

    def summed(self, name: str) -> Reader:
        return self.views[name].summed(name)

    def work(self, name: str) -> Work:
        return self.views[name].work(name)


def _positions(rows: Sequence[object], which: Sequence[int] | None) -> Sequence[int]:
    return range(len(rows)) if which is None else which


def _row_by_row(function: Callable[[int, str, int, Tensor], object], name: str, start: int, chunk: Tensor) -> Tensor:
    for index, values in enumerate(chunk):
        function(index, name, start, values)
    return chunk


def _checked(stack: Tensor, shape: tuple[int, ...], dtype: torch.dtype, note: str, name: str) -> Tensor:
    if tuple(stack.shape) != shape or stack.dtype != dtype:
        raise StructureMismatchError(
            f"{note}: expected {dtype} {shape} for {name}, got {stack.dtype} {tuple(stack.shape)}. "
            "Let the function return (T', …) in the dtype of its input, and pass the T' tasks to map."
        )
    return stack


def _own(stack: Tensor) -> Tensor:
    """A stack to write into, which does not keep in memory what it was cut out of."""
    if stack.is_contiguous() and stack.untyped_storage().nbytes() == stack.nbytes:
        return stack
    return stack.clone(memory_format=torch.contiguous_format)
