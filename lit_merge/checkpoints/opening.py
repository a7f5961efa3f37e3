"""Opening the checkpoints that people have: one mapping of tensors, whatever file, folder or layout they came in.

What a file is, is decided by its content, never by its name. Nothing in it is executed, and no tensor is read before it
is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.towers import Recognised, image_tower, recognise, whole_clip
from lit_merge.checkpoints.pickles.torch_files import TorchFile, is_torch_file, open_torch_file
from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError, first_few
from lit_merge.files.content_digest import CONTENT_KEY
from lit_merge.files.hub import parse_address
from lit_merge.files.lazy import LazyMapping, Selected, Slicer
from lit_merge.files.remote import files_in, is_folder, is_remote, located
from lit_merge.files.shards import INDEX_ENDING, ShardedTensors, open_tensors
from lit_merge.files.store import LazyTensors

if TYPE_CHECKING:
    from lit_merge.checkpoints.adapters.reading import Adapter

__all__ = ["OpenedCheckpoint", "named_after", "open_checkpoint", "open_model"]

_ADAPTER = "adapter_config.json"
_TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_PREFERRED = "pytorch_model.bin"  # the name that the Hugging Face Hub uses
# Names of files that say what they are, not of what task.
_NAMELESS = frozenset(
    {
        *("adapter_model", "checkpoint", "checkpoints", "encoder", "finetuned", "last", "linear_finetuned"),
        *("linear_zeroshot", "model", "open_clip_model", "open_clip_pytorch_model", "pytorch_model", "task_vector"),
        *("weights", "zeroshot"),
    }
)
_OWN_WEIGHTS = ("lit-merge/weights/", "lit-merge/clip/")  # formats of our own files that hold a model
# Length and direction of a weight, which a network with weight normalisation has as its parameters.
_WEIGHT_NORM = re.compile(r".*\.parametrizations\.\w+\.original[01]")
_CONTAINERS = {
    "state dict": "PyTorch state dict",
    "whole module": "PyTorch whole module",
    "TorchScript archive": "TorchScript archive",
}


class OpenedCheckpoint(LazyMapping):
    """The tensors of a checkpoint under the names that it uses itself, and what these names were recognised as.

    Args:
        path: what was opened.
        tensors: of the file or files.
        adapter: of a PEFT adapter's folder.

    Attributes:
        path: as it was given.
        tensors: the mapping behind this one.
        adapter: of a PEFT adapter's folder, else None.
        files: all files that belong to it.
        container: ``safetensors``, ``sharded safetensors``, ``PyTorch state dict``, ``PyTorch whole module``,
            ``TorchScript archive`` or ``PEFT adapter``.
    """

    def __init__(self, path: Path, tensors: LazyMapping, adapter: Adapter | None = None) -> None:
        self.path, self.tensors, self.adapter = path, tensors, adapter
        self.files: tuple[Path, ...] = tensors.files if isinstance(tensors, ShardedTensors) else (tensors.path,)  # type: ignore[attr-defined]
        self.container = "sharded safetensors" if isinstance(tensors, ShardedTensors) else "safetensors"
        if isinstance(tensors, TorchFile):
            self.container = _CONTAINERS.get(tensors.kind, tensors.kind)
        if adapter is not None:
            self.files, self.container = adapter.files, "PEFT adapter"

    @cached_property
    def recognised(self) -> Recognised:
        """Layout and prefix of the names, and which of them are no part of an image tower."""
        return recognise(self.tensors)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header entries of safetensors files; empty for others."""
        return self.tensors.metadata if isinstance(self.tensors, (LazyTensors, ShardedTensors)) else {}

    @property
    def content_key(self) -> str:
        """The header entry in which the content digest is."""
        return self.tensors.content_key if isinstance(self.tensors, (LazyTensors, ShardedTensors)) else CONTENT_KEY

    @property
    def content_digest(self) -> str | None:
        """The content digest in the header of files that lit-merge wrote; None for others."""
        return self.tensors.content_digest if isinstance(self.tensors, (LazyTensors, ShardedTensors)) else None

    @property
    def other(self) -> Mapping[str, object]:
        """Plain values besides the tensors of a PyTorch file, such as those of a Lightning checkpoint."""
        return self.tensors.other if isinstance(self.tensors, TorchFile) else {}

    @property
    def holds_difference(self) -> bool:
        """Whether it is the checkpoint of a linearised run of our own, whose parameters are τ instead of θ."""
        return self.other.get("linearized") is True and "base_fingerprint" in self.other

    @property
    def is_clip(self) -> bool:
        """Whether its names are those of a CLIP, or of its image tower."""
        return self.recognised.layout not in ("own", "linearised") and self.adapter is None

    def image_tower(self) -> LazyMapping:
        """The image tower under open_clip's own names, without ``visual.``.

        Raises:
            StructureMismatchError: it has none, or names or shapes do not make up one.
        """
        return self._converted(image_tower)

    def whole_clip(self) -> LazyMapping:
        """The whole CLIP under open_clip's names.

        Raises:
            StructureMismatchError: a part is missing, or names or shapes do not make up one.
        """
        return self._converted(whole_clip)

    def _converted(self, function: Callable[[LazyMapping, Recognised], LazyMapping]) -> LazyMapping:
        try:
            return function(self.tensors, self.recognised)
        except StructureMismatchError as error:
            raise StructureMismatchError(f"{self.path}: {error}") from error

    def without_prefix(self) -> LazyMapping:
        """Its tensors without what all of their names begin with, such as ``module.``."""
        prefix = self.recognised.prefix
        return Selected(self.tensors, {name[len(prefix) :]: name for name in self if name.startswith(prefix)})

    def require_weights(self, difference: bool = False) -> None:
        """Refuse what holds something else than the weights of a model.

        Args:
            difference: also accept what a task vector can be made of: an adapter, a linearised encoder, or the
                checkpoint of a linearised run.

        Raises:
            FileFormatError: it is one of these, one of our own files of something else, or has parametrised weights.
        """
        kind = self.metadata.get("format", "")
        if kind.startswith("lit-merge/") and not kind.startswith(_OWN_WEIGHTS):
            got, advice = (
                ("a task vector", "Give it as task_vector, or to merge, as it is")
                if kind.startswith("lit-merge/task-vector/")
                else (f"a file of format {kind}", "Give the model itself")
            )
            raise FileFormatError(f"{self.path}: expected whole weights, got {got}. {advice}.")
        if any(".parametrizations." in name and not _WEIGHT_NORM.fullmatch(name) for name in self):
            raise FileFormatError(
                f"{self.path}: expected whole weights, got parametrised ones, such as a LoRA run's. Use the task "
                "vector that the run wrote, or save the weights without parametrisations."
            )
        special = self.adapter is not None or self.holds_difference or self.recognised.layout == "linearised"
        if special and not difference:
            raise FileFormatError(
                f"{self.path}: expected whole weights, got {self.describe()}. Give the model that it was made from; "
                "lit-merge import makes a task vector of it."
            )

    def verify(self) -> None:
        """Compare everything with the content digests of the headers, if there are any.

        Raises:
            FileFormatError: the content differs from what was written.
        """
        if isinstance(self.tensors, (LazyTensors, ShardedTensors)) and self.tensors.content_digest is not None:
            self.tensors.verify()

    def describe(self) -> str:
        """What was recognised: container, layout, the prefix, and the names left out by rule."""
        if self.adapter is not None:
            return f"{self.container}, {len(self)} tensors"
        if self.holds_difference:
            return f"{self.container} of a linearised run, {len(self)} tensors"
        found = self.recognised
        parts = [f"{self.container}, {'names of its own' if found.layout == 'own' else f'{found.layout} names'}"]
        if isinstance(self.tensors, TorchFile) and self.tensors.section:
            parts.append(f"section {self.tensors.section!r}")
        if found.prefix:
            parts.append(f"prefix {found.prefix!r} removed")
        left = [f"{rule} ({first_few(names, 2)})" for rule, names in found.left_out.items() if names]
        if left:
            parts.append(f"not in the image tower: {', '.join(left)}")
        return "; ".join(parts)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"OpenedCheckpoint({str(self.path)!r})"

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self.tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor as it is stored, without reading it."""
        return self.tensors.dtype(name)

    def slicer(self, name: str) -> Slicer:
        """A function that reads parts of one flattened tensor."""
        return self.tensors.slicer(name)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened tensors one after the other, in chunks."""
        return self.tensors.stream(names)


def open_checkpoint(path: str | os.PathLike[str], section: str | None = None) -> OpenedCheckpoint:
    """Open a checkpoint: safetensors, sharded or not, a PyTorch file of any kind, or the folder of a model or adapter.

    In a folder an adapter comes first, also the only one in a folder of its name, then
    ``model.safetensors.index.json``, ``model.safetensors``, the only other safetensors model, ``pytorch_model.bin``,
    and the only other PyTorch file.

    Args:
        path: the file, folder or index of shards; or ``hf://owner/name/file``.
        section: of a PyTorch file that holds several state dicts, the key of the one to take.

    Returns:
        The checkpoint; no tensor has been read.

    Raises:
        FileFormatError: there is no such file, or not just one in the folder, or it is damaged or something else.
        ConfigurationError: ``section`` is given for a file that has no sections.
    """
    found = located(path)
    if not (found.exists() or is_remote(found) or is_folder(found)):
        raise FileFormatError(f"{found}: expected a checkpoint, got nothing (No such file or folder). Check the path.")
    if not is_folder(found):
        return OpenedCheckpoint(found, _tensors(found, section))
    names = files_in(found)
    weights = any(name.endswith((".safetensors", INDEX_ENDING, *_TORCH_SUFFIXES)) for name in names)
    if _ADAPTER in names or not weights:
        from lit_merge.checkpoints.adapters.reading import adapter_folder, open_adapter

        if (folder := adapter_folder(found)) is not None:
            _no_section(found, section)
            adapter = open_adapter(folder)
            return OpenedCheckpoint(folder, adapter.tensors, adapter)
    if any(name.endswith((".safetensors", INDEX_ENDING)) for name in names):
        _no_section(found, section)
        return OpenedCheckpoint(found, open_tensors(found))
    return OpenedCheckpoint(found, _tensors(_only_torch_file(found, names), section))


def open_model(path: str | os.PathLike[str], section: str | None = None) -> OpenedCheckpoint:
    """As :func:`open_checkpoint`, but refuses what holds no weights of a model.

    Raises:
        FileFormatError: as there, and as for :meth:`OpenedCheckpoint.require_weights`.
    """
    opened = open_checkpoint(path, section)
    opened.require_weights()
    return opened


def named_after(path: str | os.PathLike[str]) -> str:
    """The task that a checkpoint's path names: the file's or folder's name, or of a folder above if that tells nothing.

    Examples:
        >>> named_after("checkpoints/ViT-B-32/Cars/finetuned.pt")
        'Cars'
        >>> named_after("runs/digits/checkpoints/last.ckpt")
        'digits'
        >>> named_after("models/maths.safetensors")
        'maths'
    """
    address = parse_address(path)
    found = Path(path if address is None else f"/{address.repository}/{address.path}").absolute()
    name = found.name.removesuffix(INDEX_ENDING)
    ends = name.endswith((".safetensors", *_TORCH_SUFFIXES)) and not found.is_dir()
    stems = [name[: -len(found.suffix)] if ends else name, *(parent.name for parent in found.parents if parent.name)]
    return next((stem for stem in stems if stem.lower() not in _NAMELESS and "=" not in stem), stems[0])


def _tensors(path: Path, section: str | None) -> LazyMapping:
    if path.suffix == ".json":
        _no_section(path, section)
        return ShardedTensors(path)
    remote = is_remote(path)  # which is safetensors
    if not remote and (is_torch_file(path) or (path.suffix in _TORCH_SUFFIXES and not _has_safetensors_header(path))):
        return open_torch_file(path, section)
    _no_section(path, section)
    return LazyTensors(path)


def _no_section(path: Path, section: str | None) -> None:
    if section is not None:
        raise ConfigurationError(
            f"section: expected one only for a PyTorch file, got {section!r} for {path}, which has none. Remove it."
        )


def _has_safetensors_header(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _only_torch_file(folder: Path, names: Iterable[str]) -> Path:
    found = sorted(name for name in names if name.endswith(_TORCH_SUFFIXES))
    if f"{_PREFERRED}.index.json" in names:
        raise FileFormatError(
            f"{folder}: expected shards in safetensors, got {_PREFERRED}.index.json. Save the model again, as "
            "safetensors, with the library that wrote it."
        )
    if _PREFERRED in found:
        return folder / _PREFERRED
    if len(found) != 1:
        raise FileFormatError(
            f"{folder}: expected one model in this folder, got {first_few(found) or 'none'}. Name the file itself."
        )
    return folder / found[0]
