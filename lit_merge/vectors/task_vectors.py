"""Several task vectors of one base model as a lazy mapping from a name to one tensor's stack ``(T, *shape)``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.params import working_dtype
from lit_merge.vectors.lazy import Computed, LazyMapping, Structure
from lit_merge.vectors.task_vector import TaskVector, joined_task, same_base

__all__ = ["RowFunction", "StackFunction", "TaskVectors"]

StackFunction = Callable[[str, Tensor], Tensor]
"""``function(name, stack)``: from a parameter's stack ``(T, *shape)`` to its new stack ``(T', *shape)``."""

RowFunction = Callable[[str, Iterator[Tensor]], Tensor]
"""``function(name, rows)``: from a parameter's T rows, each ``shape``, to one tensor of that shape."""


class TaskVectors(LazyMapping):
    """The task vectors τ_1 … τ_T: ``vectors[name]`` is the stack ``(T, *shape)`` of one parameter.

    A stack is read (and transformed) when it is asked for and not kept: going through the names holds one stack in
    memory at a time. It is in float32, or in float64 if a vector has that tensor in float64; bfloat16 and float16 are
    brought to float32. Every access gives a new stack, so writing into one changes nothing else.

    Args:
        vectors: at least one :class:`TaskVector`, all of one architecture and one base model.

    Raises:
        ConfigurationError: ``vectors`` is empty or holds something else than task vectors.
        StructureMismatchError: names, shapes or known base fingerprints differ.
    """

    def __init__(self, vectors: Sequence[TaskVector]) -> None:
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
        for index, row in enumerate(rows[1:], start=1):
            _check_same_structure(rows[0], row, index)
        self._rows: tuple[TaskVector, ...] | None = rows
        self._structure: Structure = {
            name: (rows[0].shape(name), working_dtype(*(row.dtype(name) for row in rows))) for name in rows[0]
        }
        self._read: Callable[[str], Tensor] = partial(_stacked, rows, self._structure)
        self._tasks = tuple(row.task for row in rows)
        self._metadata = same_base(rows)
        self._provenance = tuple(_identity(row) for row in rows)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task of each row, in order."""
        return self._tasks

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter names, in the order of the first vector."""
        return tuple(self._structure)

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

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._structure:
            raise KeyError(name)
        return self._read(name)

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
        return torch.Size((len(self._tasks), *self._structure[name][0]))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one stack, float32 or float64, without reading it."""
        return self._structure[name][1]

    def map(self, function: StackFunction, tasks: Sequence[str] | None = None, note: object = "") -> TaskVectors:
        """A new lazy view whose stacks are ``function(name, stack)``.

        Args:
            function: called whenever a stack is asked for, with a stack ``(T, *shape)`` that is its own to write
                into; it returns ``(T', *shape)`` of the same dtype, and does not keep what it returns.
            tasks: the T' tasks of the result; by default the present ones.
            note: added to the provenance as a string; a transform passes itself.

        Returns:
            The view. ``StructureMismatchError`` is raised on access if the function returns another shape or dtype.
        """
        names = self._tasks if tasks is None else tuple(tasks)
        read = partial(_mapped, self, function, len(names), str(note) or "function")
        return self._view(read, names, str(note))

    def reduce(self, function: RowFunction, note: object = "") -> TaskVectors:
        """A new lazy view with T = 1, whose only row is ``function(name, rows)``.

        For reducers that need one row after the other: unlike :meth:`map`, no stack is built.

        Args:
            function: called whenever a parameter is asked for, with an iterator over its T rows of shape ``shape``,
                which it must not write into; it returns a new tensor of the same shape and dtype.
            note: added to the provenance as a string; a transform passes itself.

        Returns:
            The view; its task is named after all tasks. ``StructureMismatchError`` is raised on access if the function
            returns another shape or dtype.
        """
        read = partial(_reduced, self, function, str(note) or "function")
        return self._view(read, (joined_task(self._tasks),), str(note))

    def rows(self, name: str) -> Iterator[Tensor]:
        """The rows of one stack, one at a time, each of shape ``shape``; they must not be written into."""
        if self._rows is None:
            yield from self[name].unbind()
            return
        first = self._rows[0][name]
        for index, row in enumerate(self._rows):
            yield (row[name] if index else first).to(first.device, self.dtype(name))

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
            return TaskVectors([self._rows[index] for index in indices])
        return self.map(
            partial(_selected, indices),
            tasks=[self._tasks[index] for index in indices],
            note=f"select({[self._tasks[index] or index for index in indices]})",
        )

    def vector(self, task: str | int) -> TaskVector:
        """One row as a task vector: the original if nothing was applied, otherwise a lazy view of this mapping.

        Raises:
            ConfigurationError: the task is unknown or its name is not unique.
        """
        index = self._index(task)
        if self._rows is not None:
            return self._rows[index]
        metadata = {**self._metadata, "provenance": json.dumps(self._provenance)}
        return TaskVector(Computed(self._structure, partial(_row, self, index)), self._tasks[index], metadata=metadata)

    def single(self) -> TaskVector:
        """The only vector, when T = 1.

        Raises:
            ConfigurationError: there are several vectors.
        """
        if len(self._tasks) != 1:
            raise ConfigurationError(
                f"task vectors: expected one vector, got {len(self._tasks)} ({first_few(self._tasks)}). "
                "Reduce them first, e.g. with Sum() or Mean(), or pick one with vector(task)."
            )
        return self.vector(0)

    def _view(self, read: Callable[[str], Tensor], tasks: tuple[str, ...], note: str) -> TaskVectors:
        view = object.__new__(TaskVectors)
        view._rows = None
        view._read = read
        view._structure = self._structure
        view._tasks = tasks
        view._metadata = self._metadata
        view._provenance = (*self._provenance, note) if note else self._provenance
        return view

    def _index(self, task: str | int) -> int:
        if isinstance(task, int):
            if not 0 <= task < len(self._tasks):
                raise ConfigurationError(
                    f"task: expected a position from 0 to {len(self._tasks) - 1}, got {task}. Use one of these."
                )
            return task
        found = [index for index, name in enumerate(self._tasks) if name == task]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigurationError(f"task: expected a unique name, got {task!r} at {found}. Use a position instead.")
        close = difflib.get_close_matches(str(task), self._tasks, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Use one of these."
        raise ConfigurationError(f"task: expected one of {', '.join(self._tasks)}, got {task!r}. {hint}")


def _check_same_structure(first: TaskVector, other: TaskVector, index: int) -> None:
    missing = [name for name in first if name not in other]
    unexpected = [name for name in other if name not in first]
    shapes = [
        f"{name} {tuple(other.shape(name))} instead of {tuple(first.shape(name))}"
        for name in first
        if name in other and other.shape(name) != first.shape(name)
    ]
    parts = [
        f"{len(offenders)} {kind} ({first_few(offenders)})"
        for kind, offenders in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if offenders
    ]
    if parts:
        raise StructureMismatchError(
            f"task vectors: expected {other.task or f'number {index}'} to have the {len(first)} tensors of "
            f"{first.task or 'number 0'}, got {' and '.join(parts)}. "
            "Merge only vectors of one architecture and one set of parameters."
        )


def _identity(vector: TaskVector) -> str:
    content = f", content={vector.content_digest[:16]!r}" if vector.content_digest else ""
    return f"TaskVector(task={vector.task!r}{content})"


def _stacked(rows: tuple[TaskVector, ...], structure: Structure, name: str) -> Tensor:
    shape, dtype = structure[name]
    first = rows[0][name]
    stack = torch.empty((len(rows), *shape), dtype=dtype, device=first.device)
    stack[0].copy_(first)
    for index, row in enumerate(rows[1:], start=1):
        stack[index].copy_(row[name])
    return stack


def _mapped(source: TaskVectors, function: StackFunction, count: int, note: str, name: str) -> Tensor:
    return _checked(function(name, source[name]), source, count, note, name)


def _reduced(source: TaskVectors, function: RowFunction, note: str, name: str) -> Tensor:
    return _checked(function(name, source.rows(name)).unsqueeze(0), source, 1, note, name)


def _checked(stack: Tensor, source: TaskVectors, count: int, note: str, name: str) -> Tensor:
    expected = (count, *source.shape(name)[1:])
    if tuple(stack.shape) != expected or stack.dtype != source.dtype(name):
        raise StructureMismatchError(
            f"{note}: expected {source.dtype(name)} {expected} for {name}, got {stack.dtype} {tuple(stack.shape)}. "
            "Let the function return (T', *shape) in the dtype of its input, and pass the T' tasks to map."
        )
    return stack


def _selected(indices: list[int], name: str, stack: Tensor) -> Tensor:
    return stack[indices]


def _row(vectors: TaskVectors, index: int, name: str) -> Tensor:
    stack = vectors[name]
    return stack[index] if len(stack) == 1 else stack[index].clone()  # a view would keep the whole stack in memory
