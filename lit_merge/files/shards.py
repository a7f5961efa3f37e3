"""Models that are spread over several safetensors files: the layout of the Hugging Face Hub, read and written.

A folder holds ``model-00001-of-00003.safetensors`` … and ``model.safetensors.index.json``, whose ``weight_map`` says in
which of the files each tensor is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError, first_few
from lit_merge.files.content_digest import CONTENT_KEYS, new_digest
from lit_merge.files.lazy import Computed, LazyMapping, Selected, Slicer
from lit_merge.files.remote import files_in, is_folder, is_remote, located
from lit_merge.files.staging import staged
from lit_merge.files.store import Draft, LazyTensors
from lit_merge.files.text import read_json, write_text
from lit_merge.params import dtype_of, shape_of

__all__ = [
    "HEAD_ENDING",
    "INDEX_ENDING",
    "ShardedTensors",
    "model_file",
    "open_tensors",
    "parse_size",
    "plan_shards",
    "write_shards",
]

INDEX_ENDING = ".safetensors.index.json"
HEAD_ENDING = ".head.safetensors"
"""Of a trained head beside a task vector: it is no model, and a folder with both has one."""
_ADVICE = "Copy the model again, all of its files."
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


class ShardedTensors(LazyMapping):
    """The tensors of a sharded model, read one at a time.

    Args:
        index: the ``….safetensors.index.json`` file; its shards are in the same folder.
        verify: also compare all bytes with the content digests in the shards' headers (reads everything once).

    Attributes:
        files: the index and the shards.
        metadata: the header entries on which all shards agree.
        content_key: the header entry of the shards' content digests, that of earlier versions if any has it.
        content_digest: of the shards' names and content digests, by the same hash; None if a shard has none.

    Raises:
        FileFormatError: the index is missing, is none, or leads out of its folder; shards are missing, truncated or no
            safetensors files; index and shards do not name the same tensors; with ``verify``, a shard's content is not
            what was written.
    """

    def __init__(self, index: str | os.PathLike[str], verify: bool = False) -> None:
        self.path = Path(index)
        file_of = _read_index(self.path)
        names = sorted(set(file_of.values()))
        places = {name: self.path.parent / name for name in names}
        missing = [name for name, place in places.items() if not (place.is_file() or is_remote(place))]
        if missing:
            raise FileFormatError(
                f"{self.path}: expected {len(names)} shards in its folder, got none of {len(missing)} "
                f"({first_few(missing)}). {_ADVICE}"
            )
        shards = {name: LazyTensors(self.path.parent / name) for name in names}
        lacking = [f"{name} in {shard}" for name, shard in file_of.items() if name not in shards[shard]]
        unlisted = [
            f"{name} in {shard}" for shard, tensors in shards.items() for name in tensors if file_of.get(name) != shard
        ]
        parts = [f"no {first_few(lacking)}"] if lacking else []
        parts += [f"{len(unlisted)} that it does not list ({first_few(unlisted)})"] if unlisted else []
        if parts:
            raise FileFormatError(
                f"{self.path}: expected its {len(file_of)} tensors in the shards, got {' and '.join(parts)}. {_ADVICE}"
            )
        self._shard_of = {name: shards[shard] for name, shard in file_of.items()}
        self.files = (self.path, *(shard.path for shard in shards.values()))
        first, *others = (shard.metadata for shard in shards.values())
        self.metadata = {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}
        lines = [f"{name} {shard.content_digest}\n" for name, shard in shards.items() if shard.content_digest]
        whole = len(lines) == len(shards)
        self.content_key = max((shard.content_key for shard in shards.values()), key=CONTENT_KEYS.index)
        combined = new_digest(self.content_key)
        combined.update("".join(lines).encode())
        self.content_digest = combined.hexdigest() if whole else None
        self._shards = tuple(shards.values())
        if verify:
            self.verify()

    def __getitem__(self, name: str) -> Tensor:
        return self._shard_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def __repr__(self) -> str:
        return f"ShardedTensors({str(self.path)!r})"

    def __reduce__(self) -> tuple[type[ShardedTensors], tuple[Path]]:
        return (type(self), (self.path,))

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, from its shard's header."""
        return self._shard_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, from its shard's header."""
        return self._shard_of[name].dtype(name)

    def slicer(self, name: str) -> Slicer:
        """A function that reads parts of one flattened tensor from its shard."""
        return self._shard_of[name].slicer(name)

    def verify(self) -> None:
        """Read everything and compare it with the content digests of the headers.

        Raises:
            FileFormatError: a shard has no digest, or its content differs from what was written.
        """
        for shard in self._shards:
            shard.verify()


def open_tensors(path: str | os.PathLike[str], verify: bool = False) -> LazyTensors | ShardedTensors:
    """Open a safetensors file, the index of a sharded model, or a folder with one or the other.

    In a folder ``model.safetensors.index.json`` and ``model.safetensors`` come first, in this order; otherwise there
    must be exactly one index, or without an index exactly one safetensors file, trained heads aside.

    Args:
        path: the file or folder, or its address on the Hub (``hf://owner/name/…``).
        verify: also compare all bytes with the content digests in the headers.

    Raises:
        FileFormatError: there is no such file or not just one, or it is damaged or something else.
    """
    file = located(path)
    if is_folder(file):
        file = model_file(file)
    return ShardedTensors(file, verify) if file.suffix == ".json" else LazyTensors(file, verify)


def parse_size(text: str) -> int:
    """The number of bytes that e.g. ``"2GB"``, ``"500 MB"`` or ``"1.5GiB"`` stands for.

    Raises:
        ConfigurationError: it is no positive size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = (match[2] or "").lower() if match else ""
    size = int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** _POWERS.get(unit[:1], 0)) if match else 0
    if size < 1:
        raise ConfigurationError(f"shard_size: expected a size such as 2GB or 500MB, got {text!r}. Write it like that.")
    return size


def plan_shards(tensors: Mapping[str, Tensor], size: int, stem: str) -> dict[str, list[str]]:
    """Which tensors go into which file, without reading any.

    Args:
        tensors: name -> tensor; in this order.
        size: bytes of tensors per file, at most; a larger tensor gets a file of its own.
        stem: what the files' names begin with.

    Returns:
        File name -> names of tensors; a single file is ``<stem>.safetensors``.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        needed = bytes_of(tensors, name)
        if shards[-1] and filled + needed > size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += needed
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)
    }


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shards: Mapping[str, list[str]],
    stem: str,
    late_metadata: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write what :func:`plan_shards` planned: all files appear together, the index last, or none does.

    Args:
        folder: is created if it is missing.
        tensors: name -> tensor; a lazy mapping is read one tensor at a time.
        metadata: string header entries of every file.
        shards: file name -> names of tensors.
        stem: what the index's name begins with.
        late_metadata: called after the last tensor was read; its entries replace those of the same names in every
            file's header, see :func:`lit_merge.files.store.write_tensors`.

    Raises:
        WriteError: the disk is full or not writable; nothing of it is left.
    """
    if not isinstance(tensors, LazyMapping):
        structure = {name: (shape_of(tensors, name), dtype_of(tensors, name)) for name in tensors}
        tensors = Computed(structure, tensors.__getitem__)
    drafts = {
        file: Draft(Selected(tensors, {name: name for name in names}), metadata) for file, names in shards.items()
    }
    index = folder / f"{stem}{INDEX_ENDING}"
    needed = sum(draft.size for draft in drafts.values())
    with staged(folder, lambda: [index] if index.exists() else [], size=needed) as staging:
        for file, draft in drafts.items():
            with (staging / file).open("xb") as written:
                draft.write(written)
        late = late_metadata() if late_metadata else {}
        for file, draft in drafts.items():
            with (staging / file).open("r+b") as written:
                draft.finish(written, late)
                written.flush()
                os.fsync(written.fileno())
        if len(shards) > 1:
            total = sum(bytes_of(tensors, name) for names in shards.values() for name in names)
            files = {name: file for file, names in shards.items() for name in names}
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            write_text(staging / index.name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def bytes_of(tensors: Mapping[str, Tensor], name: str) -> int:
    """The size of one tensor, without reading it."""
    return shape_of(tensors, name).numel() * dtype_of(tensors, name).itemsize


def model_file(folder: Path) -> Path:
    """The one model in a folder: its index of shards or its safetensors file; see :func:`open_tensors`.

    Raises:
        FileFormatError: there is none, or more than one.
    """
    files = [folder / name for name in files_in(folder)]
    for name in (f"model{INDEX_ENDING}", "model.safetensors"):
        if folder / name in files:
            return folder / name
    indices = [path for path in files if path.name.endswith(INDEX_ENDING)]
    found = indices or [path for path in files if path.suffix == ".safetensors" and not path.name.endswith(HEAD_ENDING)]
    if len(found) != 1:
        names = first_few(path.name for path in found) or "none"
        raise FileFormatError(f"{folder}: expected one model in this folder, got {names}. Name the file itself.")
    return found[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = read_json(path)
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected the index of a sharded model, got {error.strerror or 'no file'}. Check the path."
        ) from error
    except ValueError:
        content = None
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    readable = isinstance(file_of, dict) and all(
        isinstance(file, str) and name.isprintable() for name, file in file_of.items()
    )
    if not readable or not file_of:
        raise FileFormatError(
            f"{path}: expected an index with a weight_map from tensors to files, got something else. {_ADVICE}"
        )
    outside = sorted({file for file in file_of.values() if not _is_plain(file)})
    if outside:
        raise FileFormatError(
            f"{path}: expected names of safetensors files in its folder, got {first_few(map(repr, outside))}. "
            "Do not trust this index; get the model from its author."
        )
    return file_of


def _is_plain(file: str) -> bool:
    """Whether a name is that of a safetensors file in the same folder, on any system."""
    return re.fullmatch(r"[^/\\:\x00]+\.safetensors", file) is not None and file.isprintable()
