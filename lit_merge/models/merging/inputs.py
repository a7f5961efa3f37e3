"""What ``lit-merge merge`` reads: the base model, and task vectors or fine-tuned weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_merge.checkpoints.opening import OpenedCheckpoint, named_after, open_checkpoint, open_model
from lit_merge.checkpoints.pairs import Names
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Selected
from lit_merge.files.shards import bytes_of
from lit_merge.models import ClipModel, load_clip
from lit_merge.params import dtype_of, fingerprint, shape_of
from lit_merge.vectors import TaskVector, file_digest
from lit_merge.vectors.task_vector import FORMAT

__all__ = ["Base", "ClipBase", "FileBase", "Input", "ModuleBase", "open_base", "open_inputs"]


class Base(ABC):
    """θ0, and the whole model that it is a part of.

    Attributes:
        name: of the model.
        files: what the model is read from while merging; empty if it is in memory.
        prefix: what a parameter's name begins with in the whole model.
        digests: what is known of the files' content, for the provenance.
        memory: bytes that it holds in memory.
        names: under which weights are differenced from it.
    """

    name: str
    files: tuple[Path, ...] = ()
    prefix = ""
    digests: Mapping[str, Any] = {}
    memory = 0
    names: Names = "own"

    @property
    @abstractmethod
    def parameters(self) -> LazyMapping:
        """θ0 under the task vectors' names; a file's other tensors too."""

    @abstractmethod
    def fingerprint(self) -> str:
        """The fingerprint of θ0, which task vectors carry."""

    @abstractmethod
    def whole(self) -> Mapping[str, Tensor]:
        """Every tensor of the model, read when it is asked for."""

    def of_weights(self, opened: OpenedCheckpoint) -> LazyMapping:
        """What corresponds to θ0 in the weights of a fine-tuned model; whole, where the difference has to find it."""
        return opened


class ClipBase(Base):
    """The image tower of a CLIP, in memory; its text side stays on the disk."""

    prefix = "visual."
    names: Names = "auto"

    def __init__(self, clip: ClipModel) -> None:
        self.clip, self.name = clip, clip.name
        tensors = {name: parameter.detach() for name, parameter in clip.visual.named_parameters()}
        self._parameters = _lazily(tensors)
        self.memory = sum(bytes_of(tensors, name) for name in tensors)

    @property
    def parameters(self) -> LazyMapping:
        """The image tower's parameters under its own names."""
        return self._parameters

    def fingerprint(self) -> str:
        """As the CLIP was loaded."""
        return self.clip.fingerprint

    def whole(self) -> Mapping[str, Tensor]:
        """The text side as it is stored, and the image tower."""
        visual = {f"{self.prefix}{name}": value.detach() for name, value in self.clip.visual.state_dict().items()}
        text = self.clip.text.tensors()
        return Computed(
            {name: (shape_of(one, name), dtype_of(one, name)) for one in (text, visual) for name in one},
            partial(_from_either, visual, text),
        )

    def of_weights(self, opened: OpenedCheckpoint) -> LazyMapping:
        """The image tower's parameters, which begin with ``visual.`` in the weights of a whole CLIP.

        Raises:
            StructureMismatchError: some are missing, and these are not the weights of a CLIP in another layout.
        """
        stored = opened.without_prefix()
        missing = [name for name in self._parameters if self.prefix + name not in stored]
        if not missing:
            return Selected(stored, {name: self.prefix + name for name in self._parameters})
        if opened.recognised.layout == "own" and opened.adapter is None:
            raise StructureMismatchError(
                f"expected a task vector, or the weights of a whole CLIP with the image tower of "
                f"{self.name}, got no {self.prefix} names for {len(missing)} of {len(self._parameters)} parameters "
                f"({first_few(missing)}). For another model set base to its weights."
            )
        return opened


class ModuleBase(Base):
    """Any network, in memory.

    Args:
        module: θ0 is its parameters.
        name: of the model.
        fingerprint: of θ0.
    """

    def __init__(self, module: nn.Module, name: str, fingerprint: str) -> None:
        self.name, self._fingerprint = name, fingerprint
        self._parameters = _lazily({name: value.detach() for name, value in module.named_parameters()})
        self._whole = {name: value.detach() for name, value in module.state_dict().items()}

    @property
    def parameters(self) -> LazyMapping:
        """The network's parameters."""
        return self._parameters

    def fingerprint(self) -> str:
        """As it was given."""
        return self._fingerprint

    def whole(self) -> Mapping[str, Tensor]:
        """Its parameters and buffers."""
        return self._whole


class FileBase(Base):
    """Any model, by its weights: a checkpoint under names of its own."""

    def __init__(self, path: str, verify: bool) -> None:
        self.name = named_after(path)
        self._tensors = open_model(path)
        self.files = self._tensors.files
        self.digests = _digests(self._tensors, verify)
        self._fingerprint = ""

    @property
    def parameters(self) -> LazyMapping:
        """All tensors of the file."""
        return self._tensors

    def fingerprint(self) -> str:
        """Over the floating-point entries; reads them once, when it is first asked for."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(_floating(self._tensors))
        return self._fingerprint

    def whole(self) -> Mapping[str, Tensor]:
        """The same tensors."""
        return self._tensors


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


def open_base(model: str, pretrained: str | None, path: str | None, verify: bool = False) -> Base:
    """The base model: the weights at ``path`` if it is given, otherwise the image tower of a CLIP.

    Raises:
        ConfigurationError: ``pretrained`` and ``path`` are both given.
        LitMergeError: as for :func:`lit_merge.models.load_clip`, or the weights cannot be opened.
    """
    if path is None:
        return ClipBase(load_clip(model, pretrained))
    if pretrained is not None:
        raise ConfigurationError(
            f"base and pretrained: expected at most one of them, got both ({path} and {pretrained}). Remove one."
        )
    return FileBase(path, verify)


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
    digests = _digests(opened, verify)
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


def _digests(opened: OpenedCheckpoint, verify: bool) -> dict[str, Any]:
    """The content digest of the header, without reading anything else; of files without one SHA-256, if asked for."""
    if opened.content_digest:
        if verify:
            opened.verify()
        return {"content_sha256": opened.content_digest}
    return {"sha256": {path.name: file_digest(path) for path in opened.files}} if verify else {}


def _lazily(tensors: Mapping[str, Tensor]) -> Computed:
    return Computed({name: (value.shape, value.dtype) for name, value in tensors.items()}, tensors.__getitem__)


def _floating(tensors: LazyMapping) -> Computed:
    structure = {
        name: (tensors.shape(name), tensors.dtype(name)) for name in tensors if tensors.dtype(name).is_floating_point
    }
    return Computed(structure, tensors.__getitem__)


def _from_either(first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str) -> Tensor:
    return first[name] if name in first else second[name]
