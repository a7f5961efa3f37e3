"""Several task vectors of one base model as a lazy mapping from a name to one tensor's stack ``(T, *shape)``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, did_you_mean, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Structure
from lit_merge.params import check_same_structure, working_dtype
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import (
    ByRow,
    Elements,
    Reader,
    RowReader,
    Rows,
    Source,
    Stacks,
    Subset,
    Sums,
    Union,
    Work,
    WorkOf,
)
from lit_merge.vectors.task_vector import TaskVector, joined_task, same_base
from lit_merge.vectors.threads import ordered_map

_Result = TypeVar("_Result")

__all__ = ["ElementFunction", "RowFunction", "StackFunction", "TaskVectors"]

StackFunction = Callable[..., Tensor]
"""``function(name, stack, *others)``: from a parameter's stack ``(T, *shape)``, and those of other views, to its new
stack ``(T', *shape)``."""

ElementFunction = Callable[..., Tensor]
"""``function(name, start, chunk, *others)``: from the elements ``start … start + n`` of a parameter's flattened stack,
``(T, n)``, and of those of other views, to ``(T', n)``."""

RowFunction = Callable[[int, str, int, Tensor], object]
"""``function(row, name, start, values)``: writes into the elements ``start … start + n`` of one row, ``(n,)``."""


class TaskVectors(LazyMapping):
    """The task vectors τ_1 … τ_T: ``vectors[name]`` is the stack ``(T, *shape)`` of one parameter.

    A stack is read (and transformed) when it is asked for and not kept: going through the names holds one stack in
    memory at a time. It is in float32, or in float64 if a vector has that tensor in float64; bfloat16 and float16 are
    brought to float32. Every access gives a new stack, so writing into one changes nothing else.

    Args:
        vectors: at least one :class:`TaskVector`, all of one architecture and one base model. A vector may lack
            parameters that others have, as that of a partial fine-tune does: it is zero there, see :attr:`notes`.
        base: θ0, name -> tensor, for the few transforms that need it; it has at least the vectors' names.
        device: where stacks are computed; by default where the vectors are. Inputs are moved one stack at a time.
        model_names: all names of the network, which tell how many blocks it has; by default those of the vectors.

    Raises:
        ConfigurationError: ``vectors`` is empty or holds something else than task vectors.
        StructureMismatchError: shapes or known base fingerprints differ, two vectors each have names that the other
            lacks without being known to start from one base, or the base lacks a parameter or has it in another shape.
        NonFiniteError: on reading, a vector holds NaN or infinity; the vector and the parameter are named.

    Attributes:
        notes: which vectors lack which parameters, in words.
    """

    def __init__(
        self,
        vectors: Sequence[TaskVector],
        base: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        model_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(vectors, TaskVector):
            raise ConfigurationError(
                "task vectors: expected a sequence, got one TaskVector. Use TaskVectors([vector])."
            )
        rows = tuple(vectors)
        others = [type(row).__name__ for row in rows if not isinstance(row, TaskVector)]
        if not rows or others:
            raise ConfigurationError(
                f"task vectors: expected at least one TaskVector, got {first_few(others) or 'an empty sequence'}. "
                "Wrap parameters as TaskVector(tensors, task)."
            )
        self.notes: tuple[str, ...] = ()
        if any(set(row) != set(rows[0]) for row in rows):
            self.notes, rows = _completed(rows)
        for index, row in enumerate(rows[1:], start=1):
            _check_same_structure(rows[0], row, index)
        if base is not None:
            _check_base(rows[0], base)
        self._rows: tuple[TaskVector, ...] | None = rows
        self._structure: Structure = {
            name: (rows[0].shape(name), working_dtype(*(row.dtype(name) for row in rows))) for name in rows[0]
        }
        self._source: Source = Rows(rows, self._structure, None if device is None else torch.device(device))
        self._row_tasks = tuple(row.tasks for row in rows)
        self._metadata = same_base(rows)
        self._provenance = tuple(_identity(row) for row in rows)
        self._inputs: TaskVectors = self
        self._model_names = tuple(self._structure if model_names is None else model_names)
        self._base = base
        self._without_base = ""
        self._statistics: tuple[Statistic[Any], ...] = ()
        self._from_files = all(row.content_digest for row in rows)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The name of each row, in order: its task, or the common name of the tasks that it was merged from."""
        return tuple(map(joined_task, self._row_tasks))

    @property
    def merged_tasks(self) -> tuple[str, ...]:
        """The tasks of all rows, in order: one by one also those that a row was merged from."""
        return tuple(task for row in self._row_tasks for task in row)

    @property
    def row_tasks(self) -> tuple[tuple[str, ...], ...]:
        """The tasks of each row: one, or those that it was merged from."""
        return self._row_tasks

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter names, in the order of the first vector."""
        return tuple(self._structure)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The network's names, before :meth:`restrict`, which tell how many blocks it has."""
        return self._model_names

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model that the vectors start from; empty if none of them knows it."""
        return self._metadata.get("base_fingerprint", "")

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the header entries on which all vectors agree."""
        return dict(self._metadata)

    @property
    def provenance(self) -> tuple[str, ...]:
        """What the vectors were, one entry each, then every transform that was applied."""
        return self._provenance

    @property
    def inputs(self) -> TaskVectors:
        """The vectors before any transform, restricted to the same names."""
        return self._inputs

    @property
    def base(self) -> Mapping[str, Tensor]:
        """θ0, name -> tensor.

        Raises:
            ConfigurationError: the vectors were built without it, or see :meth:`without_base`.
        """
        if self._base is None:
            raise ConfigurationError(
                self._without_base
                or "base: expected the pre-trained parameters, got none. Use TaskVectors(vectors, base=parameters)."
            )
        return self._base

    @property
    def statistics(self) -> tuple[Statistic[Any], ...]:
        """What has to be known about all parameters before a stack can be computed, in the order it is needed."""
        return self._statistics

    @property
    def reads(self) -> int:
        """How often going through all stacks once reads every input, the statistics included; at most."""
        return self._source.reads + sum(statistic.reads for statistic in self._statistics)

    @property
    def walk(self) -> int:
        """How often going through all stacks once reads every input, when the statistics are known."""
        return self._source.reads

    @property
    def from_files(self) -> bool:
        """Whether these are task vectors as they are stored in files, and no transform was applied."""
        return self._from_files

    @property
    def sums_inputs(self) -> bool:
        """Whether this is a function of the plain sum of the vectors before any transform."""
        return isinstance(self._source, Sums) and self._source.source is self._inputs

    @property
    def by_chunks(self) -> bool:
        """Whether a stack can be computed chunk by chunk, so that it need not be in memory as a whole."""
        return self._source.by_chunks

    @property
    def by_rows(self) -> bool:
        """Whether rows are computed one by one, so that a sum of them needs no chunk of all."""
        return self._source.by_rows

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._structure:
            raise KeyError(name)
        return self._source.stack(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._structure)

    def __len__(self) -> int:
        return len(self._structure)

    def __contains__(self, name: object) -> bool:
        return name in self._structure

    def __repr__(self) -> str:
        base = f", base={self.base_fingerprint!r}" if self.base_fingerprint else ""
        return f"TaskVectors(tasks={self.tasks!r}, tensors={len(self)}{base})"

    def shape(self, name: str) -> torch.Size:
        """Shape ``(T, *shape)`` of one stack, without reading it."""
        return torch.Size((len(self.tasks), *self._structure[name][0]))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one stack, float32 or float64, without reading it."""
        return self._structure[name][1]

    def chunks(self, name: str, length: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The stack of one parameter in chunks that stay in the processor's cache, in order.

        Args:
            name: a parameter.
            length: elements per chunk; by default about eight MiB per chunk, and the whole stack on an accelerator.

        Yields:
            The position of the chunk in the flattened parameter, and the chunk ``(T, n)``, which is the caller's own to
            write into. A parameter without elements gives one empty chunk.
        """
        read, size = self.reader(name), self.shape(name)[1:].numel()
        length = length or self.chunk_length(name)
        for start in range(0, max(size, 1), length):
            yield start, read(start, min(start + length, size))

    def reader(self, name: str) -> Reader:
        """Reads any chunk of one parameter: ``(start, stop)`` -> a new ``(T, stop - start)`` of the flattened stack."""
        if name not in self._structure:
            raise KeyError(name)
        return self._source.reader(name)

    def rows(self, name: str, which: Sequence[int] | None = None) -> RowReader:
        """Reads any chunk of one parameter row by row: each is the caller's own until the next one is asked for.

        Args:
            name: a parameter.
            which: positions of the rows that are wanted; all by default.
        """
        if name not in self._structure:
            raise KeyError(name)
        return self._source.rows(name, which)

    def summed(self, name: str) -> Reader:
        """Reads Σ_t τ_t of any chunk of one parameter: ``(start, stop)`` -> a new ``(1, stop - start)``."""
        if name not in self._structure:
            raise KeyError(name)
        return self._source.summed(name)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened stacks one after the other; those of one vector chunk by chunk, computed on several threads."""
        if len(self.tasks) > 1:
            yield from super().stream(names)
        else:
            yield from self.over_chunks(_flattened, list(names))

    def over_chunks(
        self, function: Callable[[str, int, Tensor], _Result], names: Sequence[str] | None = None, length: int = 0
    ) -> Iterator[_Result]:
        """``function(name, start, chunk)`` of all chunks of all or some parameters, in order, on several threads.

        Args:
            function: it may write into the chunk, and may be called from several threads at once.
            names: the parameters; all by default.
            length: fewest elements per chunk.
        """

        def jobs() -> Iterator[tuple[str, int, int, Reader]]:
            for name in self.names if names is None else names:
                read, size = self.reader(name), self.shape(name)[1:].numel()
                step = max(self.chunk_length(name), length)
                for start in range(0, max(size, 1), step):
                    yield name, start, min(start + step, size), read

        def apply(name: str, start: int, stop: int, read: Reader) -> _Result:
            return function(name, start, read(start, stop))

        return ordered_map(apply, jobs())

    def work(self, name: str) -> Work:
        """What computing one stack takes beyond reading it: memory of temporaries, operations on matrices."""
        return self._source.work(name)

    def chunk_length(self, name: str) -> int:
        """Elements per chunk: eight MiB for all inputs together, or two for one of those that are summed up.

        On an accelerator it is the whole parameter.
        """
        return self._source.chunk_length(name)

    def map(
        self,
        function: StackFunction,
        tasks: Sequence[str | tuple[str, ...]] | None = None,
        note: object = "",
        others: Sequence[TaskVectors] = (),
        statistics: Sequence[Statistic[Any]] = (),
        work: WorkOf | None = None,
    ) -> TaskVectors:
        """A new lazy view whose stacks are ``function(name, stack)``, for what needs whole parameters.

        Args:
            function: called whenever a stack is asked for, with the parameter's name, a stack ``(T, *shape)`` that is
                its own to write into, and the stack of each of ``others``; it returns ``(T', *shape)`` of the same
                dtype, and does not keep what it returns.
            tasks: the T' tasks of the result, a tuple for a row of several; by default the present ones.
            note: added to the provenance as a string; a transform passes itself.
            others: more views of the same parameters, read side by side.
            statistics: what the function calls to know about all parameters.
            work: from the name, shape and itemsize of a stack to what the function takes, for plans.

        Returns:
            The view. ``StructureMismatchError`` is raised on access if the function returns another shape or dtype.
        """
        names = _row_tasks(self, tasks)
        source = Stacks(self, tuple(others), function, len(names), str(note) or "function", work)
        return self._view(source, names, str(note), _needed(others, statistics))

    def map_elements(
        self,
        function: ElementFunction,
        tasks: Sequence[str | tuple[str, ...]] | None = None,
        note: object = "",
        others: Sequence[TaskVectors] = (),
        statistics: Sequence[Statistic[Any]] = (),
        before: Callable[[str], object] | None = None,
    ) -> TaskVectors:
        """A new lazy view for what treats every element by itself: computed chunk by chunk, fast and in little memory.

        Args:
            function: called with the parameter's name, the position of the chunk in the flattened parameter, the chunk
                ``(T, n)``, which is its own to write into, and the same chunk of each of ``others``; it returns
                ``(T', n)`` of the same dtype, and does not keep what it returns.
            tasks: the T' tasks of the result, a tuple for a row of several; by default the present ones.
            note: added to the provenance as a string; a transform passes itself.
            others: more views of the same parameters, read side by side.
            statistics: what the function calls to know about all parameters.
            before: called with a parameter's name before its chunks are computed, while those of the one before still
                are; what the function needs to know about a parameter is found there without holding threads up.

        Returns:
            The view. ``StructureMismatchError`` is raised on access if the function returns another shape or dtype.
        """
        names = _row_tasks(self, tasks)
        source = Elements(self, tuple(others), function, len(names), str(note) or "function", before=before)
        return self._view(source, names, str(note), _needed(others, statistics))

    def map_rows(
        self,
        function: RowFunction,
        note: object = "",
        statistics: Sequence[Statistic[Any]] = (),
        before: Callable[[str], object] | None = None,
    ) -> TaskVectors:
        """As :meth:`map_elements`, for what treats every row by itself too: the sum of rows takes one at a time.

        Args:
            function: called with the row's position, the parameter's name, the position of the chunk in the flattened
                parameter, and the row's elements ``(n,)``, which it changes in place.
            note: added to the provenance as a string; a transform passes itself.
            statistics: what the function calls to know about all parameters.
            before: as of :meth:`map_elements`.
        """
        source = ByRow(self, function, str(note) or "function", before)
        return self._view(source, self._row_tasks, str(note), statistics)

    def reduce_elements(
        self,
        function: ElementFunction,
        note: object = "",
        others: Sequence[TaskVectors] = (),
        statistics: Sequence[Statistic[Any]] = (),
    ) -> TaskVectors:
        """As :meth:`map_elements`, from T vectors to one that is named after all tasks."""
        return self.map_elements(function, [self.merged_tasks], note, others, statistics)

    def reduce_sum(self, function: ElementFunction, note: object = "") -> TaskVectors:
        """As :meth:`reduce_elements`, of a function of the sum ``(1, n)`` of all vectors alone.

        Files are read vector by vector: no chunk of all T is made.
        """
        names = _row_tasks(self, [self.merged_tasks])
        return self._view(Sums(self, (), function, 1, str(note) or "function"), names, str(note), ())

    # Names of 0.1.0.
    pieces, map_entries, reduce_entries = chunks, map_elements, reduce_elements

    def without_base(self, reason: str) -> TaskVectors:
        """The same vectors for what must not ask for θ0; ``reason`` is what it is told if it does."""
        view = self._view(Subset(self), self._row_tasks, "", ())
        view._base, view._without_base = None, reason
        view._inputs = view if self._inputs is self else self._inputs
        view._from_files = self._from_files
        return view

    def restrict(self, names: Sequence[str]) -> TaskVectors:
        """The same vectors with some of the parameters only; statistics of what is applied next are over these.

        Raises:
            ConfigurationError: no name is given, or one is unknown.
        """
        unknown = [name for name in names if name not in self._structure]
        if unknown or not names:
            raise ConfigurationError(
                f"names: expected parameters of the task vectors, got {first_few(unknown) or 'none'}. Use their names."
            )
        view = self._view(Subset(self), self._row_tasks, "", ())
        view._structure = {name: self._structure[name] for name in names}
        view._rows, view._from_files = None, self._from_files
        view._inputs = view if self._inputs is self else self._inputs.restrict(names)
        return view

    def united(self, views: Sequence[TaskVectors], note: object = "") -> TaskVectors:
        """A view made of views that each have some of the parameters, all together every one of them once.

        Raises:
            ConfigurationError: the views differ in the number of vectors.
        """
        counts = sorted({len(view.tasks) for view in views})
        if len(counts) > 1:
            raise ConfigurationError(
                f"{note or 'united'}: expected parts with the same number of vectors, got "
                f"{' and '.join(map(str, counts))}. Let all of them reduce, or none."
            )
        owners = {name: view for view in views for name in view}
        source = Union({name: owners[name] for name in self})
        return self._view(source, views[0]._row_tasks, str(note), _needed(views, ()))

    def select(self, tasks: Sequence[str | int]) -> TaskVectors:
        """The rows of the given tasks (names or positions), in the given order.

        Raises:
            ConfigurationError: a task is unknown, its name is not unique, or none is given.
        """
        if isinstance(tasks, str) or not tasks:
            raise ConfigurationError(
                f"tasks: expected a list of at least one task, got {tasks!r}. Use a list of names."
            )
        indices = [self._index(task) for task in tasks]
        if self._rows is not None:
            assert isinstance(self._source, Rows)
            rows = [self._rows[index] for index in indices]
            return TaskVectors(rows, self._base, self._source.device, self._model_names)
        view = self.map_elements(
            partial(_selected, indices),
            tasks=[self._row_tasks[index] for index in indices],
            note=f"select({[self.tasks[index] or index for index in indices]})",
        )
        if self._inputs is self:
            view._inputs = view
        elif self._inputs._row_tasks == self._row_tasks:  # row by row what became of the inputs
            view._inputs = self._inputs.select(indices)
        return view

    def vector(self, task: str | int) -> TaskVector:
        """One row as a task vector: the original if nothing was applied, otherwise a lazy view of this mapping.

        Raises:
            ConfigurationError: the task is unknown or its name is not unique.
        """
        index = self._index(task)
        if self._rows is not None:
            return self._rows[index]
        metadata = {**self._metadata, "provenance": json.dumps(self._provenance)}
        return TaskVector(_Row(self._structure, self, index), self._row_tasks[index], metadata=metadata)

    def single(self) -> TaskVector:
        """The only vector, when T = 1.

        Raises:
            ConfigurationError: there are several vectors.
        """
        if len(self.tasks) != 1:
            raise ConfigurationError(
                f"task vectors: expected one vector, got {len(self.tasks)} ({first_few(self.tasks)}). "
                "Reduce them first, e.g. with Sum() or Mean(), or pick one with vector(task)."
            )
        return self.vector(0)

    def _view(
        self, source: Source, row_tasks: tuple[tuple[str, ...], ...], note: str, statistics: Sequence[Statistic[Any]]
    ) -> TaskVectors:
        view = object.__new__(TaskVectors)
        view.notes = self.notes
        view._rows = None
        view._source = source
        view._structure = self._structure
        view._row_tasks = row_tasks
        view._metadata = self._metadata
        view._provenance = (*self._provenance, note) if note else self._provenance
        view._inputs = self._inputs
        view._model_names = self._model_names
        view._base, view._without_base = self._base, self._without_base
        view._from_files = False
        view._statistics = tuple(dict.fromkeys((*self._statistics, *statistics)))
        return view

    def _index(self, task: str | int) -> int:
        if isinstance(task, int):
            if not 0 <= task < len(self.tasks):
                raise ConfigurationError(f"task: expected a position from 0 to {len(self.tasks) - 1}, got {task}.")
            return task
        found = [index for index, name in enumerate(self.tasks) if name == task]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigurationError(f"task: expected a unique name, got {task!r} at {found}. Use a position instead.")
        hint = did_you_mean(str(task), self.tasks)
        raise ConfigurationError(f"task: expected one of {', '.join(self.tasks)}, got {task!r}. {hint}".rstrip())


def _completed(rows: tuple[TaskVector, ...]) -> tuple[tuple[str, ...], tuple[TaskVector, ...]]:
    """The same vectors with all names that one of them has, zero where a vector lacks one; and what that was."""
    structure: Structure = {}
    for row in rows:
        structure.update({name: (row.shape(name), row.dtype(name)) for name in row if name not in structure})
    widest = max(rows, key=len)
    for index, row in enumerate(rows):
        known = row.base_fingerprint and row.base_fingerprint == widest.base_fingerprint
        if not known and not set(row) <= set(widest):
            _check_same_structure(widest, row, index)
    notes, completed = [], []
    for index, row in enumerate(rows):
        missing = [name for name in structure if name not in row]
        if missing:
            notes.append(
                f"{row.task or f'number {index}'}: no {len(missing)} of {len(structure)} parameters "
                f"({first_few(missing, 3)}): zero there"
            )
        completed.append(row if not missing else row.completed({name: structure[name] for name in missing}))
    return tuple(notes), tuple(completed)


def _check_same_structure(first: TaskVector, other: TaskVector, index: int) -> None:
    like = f"{other.task or f'number {index}'} to have the {len(first)} tensors of {first.task or 'number 0'}"
    advice = "Merge only vectors of one architecture and one set of parameters."
    check_same_structure(first, other, "task vectors", like, advice)


def _check_base(vector: TaskVector, base: Mapping[str, Tensor]) -> None:
    like, advice = "every parameter of the task vectors", "Use the pre-trained parameters that the vectors start from."
    check_same_structure(vector, base, "base", like, advice, unexpected=False)


def _identity(vector: TaskVector) -> str:
    content = f", content={vector.content_digest[:16]!r}" if vector.content_digest else ""
    return f"TaskVector(task={vector.task!r}{content})"


def _row_tasks(vectors: TaskVectors, tasks: Sequence[str | tuple[str, ...]] | None) -> tuple[tuple[str, ...], ...]:
    given = vectors._row_tasks if tasks is None else tasks
    return tuple(((one,) if one else ()) if isinstance(one, str) else one for one in given)


def _needed(views: Sequence[TaskVectors], statistics: Sequence[Statistic[Any]]) -> list[Statistic[Any]]:
    return [*(statistic for view in views for statistic in view.statistics), *statistics]


def _selected(indices: list[int], name: str, start: int, chunk: Tensor) -> Tensor:
    return chunk[indices]


class _Row(Computed):
    """One row of the stacks."""

    def __init__(self, structure: Structure, vectors: TaskVectors, index: int) -> None:
        super().__init__(structure, partial(_row, vectors, index))
        self._vectors = vectors

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        only = len(self._vectors.tasks) == 1
        yield from self._vectors.stream(names) if only else super().stream(names)


def _flattened(name: str, start: int, chunk: Tensor) -> tuple[str, Tensor]:
    return name, chunk.reshape(-1)


def _row(vectors: TaskVectors, index: int, name: str) -> Tensor:
    stack = vectors[name]
    return stack[index] if len(stack) == 1 else stack[index].clone()  # a view would keep the whole stack in memory
