"""What ``lit-merge merge`` reads: the base model, and task vectors or fine-tuned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_merge.checkpoints.opening import OpenedCheckpoint, named_after, open_checkpoint
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.files.lazy import LazyMapping
from lit_merge.models.network import Base, FileBase, Network, network_of
from lit_merge.vectors import TaskVector, file_digest
from lit_merge.vectors.task_vector import FORMAT

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
    """

    path: str
    vector: TaskVector
    source: LazyMapping
    weights: bool
    files: tuple[Path, ...]
    digests: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


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


def open_inputs(paths: Sequence[str], base: Base, tasks: Sequence[str] | None, verify: bool) -> list[Input]:
    """Open task vectors, and fine-tuned weights as their difference from the base; no tensor is read.

    Args:
        paths: task vector files, or whatever else :func:`~lit_merge.checkpoints.opening.open_checkpoint` opens.
        base: what weights are differenced against.
        tasks: names of the tasks in the same order; by default a task vector's own, and of weights the name of the
            file, or of its folder if the file's tells nothing.
        verify: read everything once, compare it with the content digests, and hash files that have none.

    Raises:
        ConfigurationError: there is no path, or not one task for each.
        LitMergeError: something is missing or damaged, or does not fit the base.
    """
    if not paths:
        raise ConfigurationError("vectors: expected at least one task vector file, got none. List them.")
    if tasks is not None and len(tasks) != len(paths):
        raise ConfigurationError(
            f"tasks: expected a name for each of the {len(paths)} vectors, got {len(tasks)}. Name all, or none."
        )
    named: Sequence[str | None] = tasks or [None] * len(paths)
    return [_open_input(path, base, task, verify) for path, task in zip(paths, named, strict=True)]


def _open_input(path: str, base: Base, task: str | None, verify: bool) -> Input:
    opened = open_checkpoint(path)
    digests = known_digests(opened, verify)
    if opened.metadata.get("format", "").rpartition("/")[0] == FORMAT.rpartition("/")[0]:
        vector = TaskVector.load(path)
        vector.task = task or vector.task
        return Input(path, vector, vector, False, opened.files, digests)
    try:
        weights = base.of_weights(opened)
        # The fingerprint is left open: this vector starts from the base because it is made with it.
        vector = TaskVector.from_checkpoints(
            base.parameters, weights, task or named_after(path), base_fingerprint="", names=base.names
        )
    except StructureMismatchError as error:
        raise StructureMismatchError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error
    source = weights if all(name in weights for name in vector) else vector
    return Input(path, vector, source, True, opened.files, digests)


def known_digests(opened: OpenedCheckpoint, verify: bool) -> dict[str, Any]:
    """The content digest of the header, without reading anything else; of files without one SHA-256, if asked for."""
    if opened.content_digest:
        if verify:
            opened.verify()
        return {"content_sha256": opened.content_digest}
    return {"sha256": {path.name: file_digest(path) for path in opened.files}} if verify else {}
