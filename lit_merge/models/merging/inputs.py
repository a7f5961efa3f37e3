"""What ``lit-merge merge`` reads: the base model, and task vectors or fine-tuned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_merge.checkpoints.adapters.additions import Additions, Extended, model_settings
from lit_merge.checkpoints.difference import difference_of
from lit_merge.checkpoints.opening import OpenedCheckpoint, named_after, open_checkpoint
from lit_merge.checkpoints.pairing.alignment import Alignment, align
from lit_merge.checkpoints.pairing.differences import Rules
from lit_merge.checkpoints.pairs import pair_of
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Selected
from lit_merge.files.remote import size_of
from lit_merge.models.merging.extensions import extended_base
from lit_merge.models.merging.vocabularies import SameRows, same_rows
from lit_merge.models.network import Base, FileBase, Network, network_of
from lit_merge.naming import is_running_statistic
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector, file_digest
from lit_merge.vectors.task_vector import FORMAT

if TYPE_CHECKING:
    from lit_merge.checkpoints.adapters.reading import Adapter

__all__ = ["Input", "known_digests", "open_base", "open_inputs"]


@dataclass(frozen=True)
class Input:
    """One of the models that are merged.

    Attributes:
        path: as it was given.
        vector: its task vector, lazy.
        source: what is read of its files whenever the vector is.
        weights: whether it was differenced against the base.
        files: what it is read from.
        digests: what is known of the files' content, for the provenance.
        notes: what was done about differences from the base that are normal, in words.
        statistics: its running means and variances, under the base's names; None if it says nothing of any.
        heads: what only it has of a head, under its own names, if that is to be written.
        used: the patterns of names to leave out that fitted one of its names.
        adapter: what it is the difference of, if that is an adapter of peft.
        by_token: whether the rows of its vocabulary were merged with those of the same tokens of the base.
    """

    path: str
    vector: TaskVector
    source: LazyMapping
    weights: bool
    files: tuple[Path, ...]
    digests: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    statistics: LazyMapping | None = None
    heads: LazyMapping | None = None
    used: frozenset[str] = frozenset()
    adapter: Adapter | None = None
    by_token: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size_of(path) for path in self.files)


def open_base(
    model: str, pretrained: str | None, path: str | None, verify: bool = False, network: Network | None = None
) -> Base:
    """The base model: the weights at ``path`` if it is given, otherwise a network, by default the tower of a CLIP.

    Raises:
        ConfigurationError: several of them are given.
        LitMergeError: as for :func:`lit_merge.models.load_clip`, or the weights cannot be opened.
    """
    if path is None:
        return network_of(network, model, pretrained)
    if pretrained is not None or network is not None:
        other = f"pretrained ({pretrained})" if pretrained is not None else f"network ({network})"
        raise ConfigurationError(
            f"base and {other.partition(' ')[0]}: expected at most one of them, got both ({path} and "
            f"{other.partition('(')[2][:-1]}). Remove one."
        )
    base = FileBase(path)
    base.digests = known_digests(base.opened, verify)
    return base


def open_inputs(
    paths: Sequence[str], base: Base, tasks: Sequence[str] | None, verify: bool, rules: Rules | None = None
) -> tuple[list[Input], SameRows]:
    """Open task vectors, and fine-tuned weights as their difference from the base; no parameter is read.

    Args:
        paths: task vector files, or whatever else :func:`~lit_merge.checkpoints.opening.open_checkpoint` opens.
        base: what weights are differenced against.
        tasks: names of the tasks in the same order; by default a task vector's own, and of weights the name of the
            file, or of its folder if the file's tells nothing.
        verify: read everything once, compare it with the content digests, and hash files that have none.
        rules: what to leave out, and what to do about heads and vocabularies.

    Returns:
        The inputs, and the base that they are the difference from: with other rows if the rules say so.

    Raises:
        ConfigurationError: there is no path, not one task for each, or a pattern fits no name of any of them.
        LitMergeError: something is missing or damaged, or does not fit the base.
    """
    if not paths:
        raise ConfigurationError("vectors: expected at least one task vector file, got none. List them.")
    if tasks is not None and len(tasks) != len(paths):
        raise ConfigurationError(
            f"tasks: expected a name for each of the {len(paths)} vectors, got {len(tasks)}. Name all, or none."
        )
    named: Sequence[str | None] = tasks or [None] * len(paths)
    rules = rules or Rules()
    opened = [open_checkpoint(path) for path in paths]
    rows = SameRows(base) if rules.rows is None else same_rows(base, opened, rules.rows, paths)
    rows, additions = extended_base(rows, opened)
    inputs = [
        _extended(_open_input(path, one, rows.tensors.get(position), rows, named[position], verify, rules), additions)
        for position, (path, one) in enumerate(zip(paths, opened, strict=True))
    ]
    inputs = [replace(one, by_token=position in rows.by_token) for position, one in enumerate(inputs)]
    used = frozenset[str]().union(*(one.used for one in inputs))
    if unused := sorted(set(rules.leave_out) - used):
        raise ConfigurationError(
            f"leave_out: expected patterns that fit a name of one of the vectors, got {first_few(unused)}. Use names "
            "as they are in the file, e.g. 'classifier.*'."
        )
    return inputs, rows


def _open_input(
    path: str,
    opened: OpenedCheckpoint,
    tensors: LazyMapping | None,
    rows: SameRows,
    task: str | None,
    verify: bool,
    rules: Rules,
) -> Input:
    base = rows.base
    digests = known_digests(opened, verify)
    if opened.metadata.get("format", "").rpartition("/")[0] == FORMAT.rpartition("/")[0]:
        return _vector_input(path, opened, base, task, digests, rules)
    try:
        weights = base.of_weights(opened)
        weights = weights if tensors is None else tensors
        config = {**model_settings(base.files), **rows.entries}
        pair = pair_of(base.parameters, weights, base.names, rules, config)
    except StructureMismatchError as error:
        raise StructureMismatchError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error
    # The fingerprint is left open: this vector starts from the base because it is made with it.
    vector = TaskVector(difference_of(pair), task or named_after(path))
    source = weights if all(name in weights for name in vector) else vector
    return Input(
        *(path, vector, source, True, opened.files, digests, pair.notes, pair.statistics),
        heads=pair.heads if rules.keep_heads and pair.heads else None,
        used=pair.used,
        adapter=pair.adapter,
    )


def _extended(one: Input, additions: Additions) -> Input:
    """The input on a base that has more tensors than it knows of: a head that was its embedding moves as that does."""
    if not additions or one.adapter is not None:
        return one
    tensors = TaskVector(Extended(one.vector, additions), one.vector.tasks, metadata=one.vector.metadata)
    return replace(one, vector=tensors, source=tensors)


def _vector_input(
    path: str, opened: OpenedCheckpoint, base: Base, task: str | None, digests: Mapping[str, Any], rules: Rules
) -> Input:
    """A task vector under the base's names; what it says of running statistics is a difference, too."""
    vector = TaskVector.load(path)
    parameters, notes = base.parameters, list[str]()
    names = {name: name for name in vector}
    if not all(name in parameters for name in vector):
        found = align(parameters, vector)
        if len(found.names) == len(vector):
            names = dict(found.names)
            notes.append(found.describe())
            vector = _of_this_base(vector, parameters, found)
    fitting = {name: {one for one in rules.leave_out if fnmatchcase(name, one)} for name in names}
    left, used = [name for name, patterns in fitting.items() if patterns], frozenset[str]().union(*fitting.values())
    measured = {name: own for name, own in names.items() if is_running_statistic(name)}
    names = {name: own for name, own in names.items() if name not in measured and name not in left}
    if not names:
        raise ConfigurationError(f"{path}: expected a task vector with parameters to merge, got none that is left.")
    if left:
        notes.append(f"left out as asked: {len(left)} tensors ({first_few(left, 3)})")
    whole = all(name == own for name, own in names.items()) and len(names) == len(vector)
    tensors = vector if whole else TaskVector(Selected(vector, names), vector.tasks, metadata=vector.metadata)
    tensors.task = task or vector.task
    statistics = None
    if measured:
        structure = {name: (parameters.shape(name), parameters.dtype(name)) for name in measured}
        statistics = Computed(structure, partial(_shifted, parameters, vector, measured))
    return Input(path, tensors, tensors, False, opened.files, digests, tuple(notes), statistics, used=used)


def _of_this_base(vector: TaskVector, base: LazyMapping, found: Alignment) -> TaskVector:
    """The vector without its fingerprint, if that is the base's under the names that the vector has."""
    if not vector.base_fingerprint:
        return vector
    names = {
        found.removed + name[len(found.added) :]: name
        for name in base
        if name.startswith(found.added) and base.dtype(name).is_floating_point
    }
    if fingerprint(Selected(base, names)) != vector.base_fingerprint:
        return vector
    metadata = {key: value for key, value in vector.metadata.items() if key != "base_fingerprint"}
    return TaskVector(vector, vector.tasks, metadata=metadata)


def _shifted(base: LazyMapping, vector: TaskVector, names: Mapping[str, str], name: str) -> Tensor:
    return base[name] + vector[names[name]].to(base.dtype(name))


def known_digests(opened: OpenedCheckpoint, verify: bool) -> dict[str, Any]:
    """The content digest of the header, without reading anything else; of files without one SHA-256, if asked for."""
    if opened.content_digest:
        if verify:
            opened.verify()
        return {opened.content_key: opened.content_digest}
    return {"sha256": {path.name: file_digest(path) for path in opened.files}} if verify else {}
