"""A merge in one call: modules, state dicts, files or task vectors in, and the same kind of thing out."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.difference import difference_of
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pairing.differences import RowRule, Rules
from lit_merge.checkpoints.pairing.ties import tied_names
from lit_merge.checkpoints.pairs import Checkpoint, pair_of
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.files.hub import parse_address, pinned
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.remote import RemoteSources
from lit_merge.models.merging.cautions import cautions_of
from lit_merge.models.merging.inputs import Input, open_inputs
from lit_merge.models.merging.output import MergedWeights
from lit_merge.models.merging.running_statistics import RunningStatistics
from lit_merge.models.merging.vocabularies import SameRows
from lit_merge.models.network import Base, FileBase
from lit_merge.params import fingerprint
from lit_merge.transforms import Transform
from lit_merge.transforms.parts import resolve_transform
from lit_merge.vectors import TaskVector, TaskVectors, check_base

__all__ = ["merge"]

_Path = str | os.PathLike[str]


def merge(
    base: Checkpoint | None,
    vectors: Sequence[Checkpoint | TaskVector],
    recipe: str | None = None,
    *,
    transform: Transform | None = None,
    parts: list[str | dict[str, Any]] | None = None,
    overrides: list[dict[str, Any]] | None = None,
    tasks: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    leave_out: Sequence[str] = (),
    rows: RowRule | None = None,
    running_statistics: str = "average",
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Any:
    """Merge models or task vectors by a recipe or any chain of transforms, by the rules of ``lit-merge merge``.

    What is done about differences that are normal, and what is dangerous, is said in a :class:`UserWarning` per line.

    Args:
        base: θ0: a module, a state dict, or the path of a file or folder, as for :meth:`TaskVector.from_checkpoints`;
            None if task vectors are to be merged to a task vector.
        vectors: what is merged, each a task vector (or the path of one), a module, a state dict, or a path.
        recipe: name of a method, e.g. ``"ties"``.
        transform: instead of a recipe, any transform.
        parts: instead of a recipe, a list of names of transforms with their fields.
        overrides: other parts for some of the parameters.
        tasks: names of the vectors, in order.
        dtype: of the floating-point tensors of the outcome; None keeps those of the base.
        leave_out: patterns of names whose change is left out.
        rows: what to do about vocabularies of different sizes, for paths.
        running_statistics: of batch normalisation: ``"average"`` or ``"base"``.
        device: where stacks are computed.
        **settings: of the recipe, e.g. ``density=0.2``.

    Returns:
        A copy of a module with the merged parameters; a new state dict for a state dict or a path; a task vector
        without a base. Of a chain that leaves several vectors, task -> outcome.

    Raises:
        LitMergeError: something does not fit, or a setting is refused; nothing is changed.

    Examples:
        >>> base = {"w": torch.zeros(2)}
        >>> tuned = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}]
        >>> merge(base, tuned, recipe="task_arithmetic", coefficient=0.5)
        {'w': tensor([0.5000, 1.5000])}
    """
    chosen = resolve_transform(recipe, settings or None, transform, parts, overrides)
    if isinstance(vectors, (str, os.PathLike, Mapping, nn.Module)) or not vectors:
        got = type(vectors).__name__ if vectors else "none"
        raise ConfigurationError(f"vectors: expected a list of at least one, got {got}. Use [a, b].")
    if running_statistics not in ("average", "base"):
        raise ConfigurationError(
            f"running_statistics: expected average or base, got {running_statistics!r}. Use one of them."
        )
    named = [None] * len(vectors) if tasks is None else list(tasks)
    if len(named) != len(vectors):
        raise ConfigurationError(f"tasks: expected a name for each of the {len(vectors)} vectors, got {len(named)}.")
    if base is None:
        merged = chosen(
            TaskVectors([_vector(one, task) for one, task in zip(vectors, named, strict=True)], device=device)
        )
        return _one_or_several(merged, map(merged.vector, range(_counted(merged))))
    rules = Rules(tuple(leave_out), False, rows, offered=("leave_out", "rows"))
    base, vectors = (_pinned(one) for one in (base, list(vectors)))
    with RemoteSources() as sources:
        inputs, same = _opened(base, vectors, named, rules)
        if sources.pending:  # what fits by the headers is downloaded, and opened as files are
            chosen(TaskVectors([one.vector for one in inputs], base=same.base.parameters))
            sources.check_room()
            sources.fetch()
            inputs, same = _opened(base, vectors, named, rules)
    start = same.base
    stacks = TaskVectors([one.vector for one in inputs], base=start.parameters, device=device)
    check_base(stacks, start.fingerprint if stacks.base_fingerprint else "", start.name, start.activation)
    statistics = RunningStatistics(start, inputs, running_statistics == "average")
    merged = chosen(stacks)
    count = _counted(merged)
    singles = [merged] if count == 1 else [merged.select([index]) for index in range(count)]
    weights = [MergedWeights(start, one, dtype, statistics.values()) for one in singles]
    said = [f"{one.vector.task or 'vector'}: {note}" for one in inputs for note in one.notes]
    cautions = cautions_of(inputs, start, weights[0].dtype if weights else None)
    for line in (*same.notes, *same.added, *said, *stacks.notes, *statistics.notes, *cautions.lines):
        warnings.warn(line, UserWarning, stacklevel=2)
    return _one_or_several(merged, (_like(base, one) for one in weights))


def _pinned(one: Any) -> Any:
    """Addresses on the Hub with the commits that they stand for now."""
    if isinstance(one, list):
        return [_pinned(inner) for inner in one]
    return pinned(one) if isinstance(one, (str, os.PathLike)) and parse_address(one) else one


def _opened(
    base: Checkpoint, vectors: Sequence[Any], tasks: Sequence[str | None], rules: Rules
) -> tuple[list[Input], SameRows]:
    start: Base = FileBase(os.fspath(base)) if isinstance(base, (str, os.PathLike)) else _MemoryBase(base)
    return _inputs(start, vectors, tasks, rules)


class _MemoryBase(Base):
    """A module or a state dict."""

    def __init__(self, base: Mapping[str, Tensor] | nn.Module) -> None:
        self.name = type(base).__name__
        state = base.state_dict() if isinstance(base, nn.Module) else base
        wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if wrong:
            raise ConfigurationError(
                f"base: expected a mapping name -> tensor, got {wrong[0]} ({type(state[wrong[0]]).__name__}). Pass the "
                "state dict inside it."
            )
        self._state = {name: value.detach() for name, value in state.items()}

    @cached_property
    def parameters(self) -> LazyMapping:
        return as_lazy(self._state)

    @cached_property
    def ties(self) -> Mapping[str, str]:
        return tied_names(self._state)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({name: value for name, value in self._state.items() if value.is_floating_point()})

    def whole(self) -> Mapping[str, Tensor]:
        return self._state


def _inputs(
    base: Base, vectors: Sequence[Any], tasks: Sequence[str | None], rules: Rules
) -> tuple[list[Input], SameRows]:
    """Paths are opened together, as their vocabularies may have to be; everything else is at hand."""
    positions = [index for index, one in enumerate(vectors) if isinstance(one, (str, os.PathLike))]
    same, opened = SameRows(base), list[Input]()
    if positions:
        opened, same = open_inputs([os.fspath(vectors[index]) for index in positions], base, None, False, rules)
    found: list[Input] = []
    for index, (one, task) in enumerate(zip(vectors, tasks, strict=True)):
        if index in positions:
            entry = opened[positions.index(index)]
            entry.vector.task = task or entry.vector.task
            found.append(entry)
        else:
            found.append(_from_memory(one, same.base, task, f"vector {index}", rules))
    return found, same


def _from_memory(one: Any, base: Base, task: str | None, default: str, rules: Rules) -> Input:
    if isinstance(one, TaskVector):
        one = _vector(one, task)
        return Input("", one, one, False, (), {})
    task = task or default
    try:
        pair = pair_of(base.parameters, one, "own", rules)
    except StructureMismatchError as error:
        raise StructureMismatchError(f"{task}: {error}") from error
    vector = TaskVector(difference_of(pair), task)
    return Input("", vector, vector, True, (), {}, pair.notes, pair.statistics, used=pair.used)


def _vector(one: Any, task: str | None) -> TaskVector:
    if isinstance(one, (str, os.PathLike)):
        one = TaskVector.load(one)
    if not isinstance(one, TaskVector):
        raise ConfigurationError(
            f"vectors: expected task vectors, as there is no base, got {type(one).__name__}. Pass base, or "
            "TaskVector.from_checkpoints(base, tuned)."
        )
    return one if task is None else TaskVector(one, task, metadata=one.metadata)


def _like(base: Checkpoint, merged: MergedWeights) -> Any:
    if not isinstance(base, nn.Module):
        return {name: merged[name] for name in merged}
    module = copy.deepcopy(base)
    targets = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, target in targets.items():
            value = merged[name]
            target.data = value.to(target.device) if target.dtype != value.dtype else target.data.copy_(value)
    return module


def _counted(merged: TaskVectors) -> int:
    """How many vectors a chain has left; several have names of their own, under which they are given back."""
    tasks = merged.tasks
    if len(set(tasks)) < len(tasks):
        repeated = next(task for task in tasks if tasks.count(task) > 1)
        raise ConfigurationError(
            f"tasks: expected names of their own for the {len(tasks)} vectors that are left, got {repeated!r} more "
            "than once. Name them with tasks=[…], or reduce them, e.g. with Sum."
        )
    return len(tasks)


def _one_or_several(merged: TaskVectors, outcomes: Iterable[Any]) -> Any:
    found = list(outcomes)
    return found[0] if len(found) == 1 else dict(zip(merged.tasks, found, strict=True))
