"""Files of PyTorch, read as data: state dicts, whole modules, TorchScript archives, Lightning checkpoints.

``torch.load`` runs what a pickle says. Here only tensors, names and plain values are taken, by the unpickler of
:mod:`lit_merge.checkpoints.pickles.machine`; tensors stay in the file until they are asked for. Both containers are
read: the zip archive of PyTorch 1.6 and later, and the stream of pickles and storages of earlier ones.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_merge.checkpoints.pickles.machine import Call, Malformed, Unpickled, read_pickle
from lit_merge.checkpoints.pickles.module_names import (
    has_tensors,
    is_module,
    items_of,
    module_tensors,
    name_of,
    plain,
    script_tensors,
)
from lit_merge.checkpoints.pickles.stored_zip import StoredEntry, stored_entries
from lit_merge.checkpoints.pickles.tensors import Storage, StoredTensor, Unsupported, rebuild_tensor, storage_of
from lit_merge.errors import FileFormatError, first_few
from lit_merge.files.file_parts import COPY_AGAIN, FileParts, check_no_pointer, printable
from lit_merge.files.lazy import LazyMapping, Slicer

__all__ = ["TorchFile", "is_torch_file", "open_torch_file"]

SECTIONS = ("state_dict", "model_state_dict", "model")
"""Sections of checkpoints that hold the model, in the order in which they are looked for."""

_LONGEST_PICKLE = 64 << 20
_WHAT = "a file of torch.save or torch.jit.save"
_MAGIC = 0x1950A86A20F9469CFC6C  # of the older container, and its version
_TEXT_MAGIC = b"L%dL\n." % _MAGIC  # as protocols 0 and 1 write it
_VERSION = 1001
_SAVE_STATE_DICT = "Save the tensors as a state dict, with torch.save(model.state_dict(), …)."


class TorchFile(LazyMapping):
    """The tensors of a PyTorch file, read one at a time; nothing that the file names is imported or called.

    Every read gives a contiguous tensor of its own; :meth:`storage` tells which names are one tensor. Pickling takes
    path and section only.

    Args:
        path: a file of ``torch.save`` or ``torch.jit.save``.
        section: the key whose value is taken, for a file that holds a dict of several things; ``""`` is the dict
            itself. None takes ``state_dict``, ``model_state_dict`` or ``model``, the first that is there, otherwise the
            dict itself.

    Attributes:
        path: the file.
        kind: ``"state dict"``, ``"whole module"`` or ``"TorchScript archive"``.
        section: the key whose value was taken, ``""`` if none.
        other: what the file holds besides the tensors, as plain values; an object is a string that names its class.
        classes: dotted names of the classes and functions that the file mentions.

    Raises:
        FileFormatError: the file is missing, truncated, damaged or no PyTorch file, holds no tensors where they were
            looked for, or asks for what tensors do not need.
    """

    def __init__(self, path: str | os.PathLike[str], section: str | None = None) -> None:
        self._parts = FileParts(path, _WHAT)
        self.path = self._parts.path
        check_no_pointer(self._parts, _WHAT)
        archive = self._parts.bytes(0, min(self._parts.size, 4))[:2] == b"PK"
        content, spans, script = _read_zip(self._parts) if archive else _read_stream(self._parts)
        self.classes = content.names
        try:
            self.section, taken = ("", content.value) if script else _section(content.value, section)
            found, self.kind = _tensors(taken, script)
            self.other: Mapping[str, Any] = _other(content.value, taken, self.section)
            self._tensors = {name: _placed(name, tensor, spans) for name, tensor in found.items()}
        except Malformed as error:
            raise FileFormatError(f"{self.path}: expected tensors, got {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        tensor, start = self._tensors[name]
        if tensor.contiguous:
            return self._parts.tensor(name, tensor.dtype, tensor.shape, start)
        span = self._parts.tensor(name, tensor.dtype, torch.Size([tensor.span]), start)
        return span.as_strided(tensor.shape, tensor.stride).contiguous()

    def storage(self, name: str) -> tuple[object, ...]:
        """What the names of one tensor have in common: its elements in the file, and how they are laid out."""
        tensor, start = self._tensors[name]
        return start, tensor.dtype, tensor.shape, tensor.stride

    def slicer(self, name: str) -> Slicer:
        """A function that reads parts of one flattened tensor from the file.

        A tensor that is not contiguous in the file is read as a whole, once.
        """
        tensor, start = self._tensors[name]
        return self._parts.slicer(name, tensor.dtype, start) if tensor.contiguous else super().slicer(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"TorchFile({str(self.path)!r}, section={self.section!r})"

    def __reduce__(self) -> tuple[type[TorchFile], tuple[Path, str]]:
        return (type(self), (self.path, self.section))

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self._tensors[name][0].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""
        return self._tensors[name][0].dtype


def open_torch_file(path: str | os.PathLike[str], section: str | None = None) -> TorchFile:
    """Open a PyTorch file as a lazy mapping of its tensors; see :class:`TorchFile`."""
    return TorchFile(path, section)


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a zip archive or begins with a pickle, whatever its name ends in.

    Raises:
        FileFormatError: there is no such file.
    """
    parts = FileParts(path, _WHAT)
    begin = parts.bytes(0, min(parts.size, 9))
    # A safetensors file whose header has a certain length begins with the same two bytes as a pickle.
    safetensors = begin[4:] == b"\0\0\0\0{"
    return begin[:2] == b"PK" or (
        begin[:1] == b"\x80" and begin[1:2] in (b"\2", b"\3", b"\4", b"\5") and not safetensors
    )


_Spans = dict[str, tuple[int, int]]
"""Key of a storage -> its first byte in the file and its length in bytes."""


def _read_zip(parts: FileParts) -> tuple[Unpickled, _Spans, bool]:
    entries = stored_entries(parts)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FileFormatError(f"{parts.path}: expected {_WHAT}, got a zip archive of other things. Name another file.")
    prefix = pickles[0].removesuffix("data.pkl")
    entry = entries[pickles[0]]
    if not entry.stored or entry.length > _LONGEST_PICKLE:
        got = f"{entry.length:,} bytes" if entry.stored else "a compressed entry"
        raise FileFormatError(
            f"{parts.path}: expected an uncompressed data.pkl of at most {_LONGEST_PICKLE:,} bytes, got {got}. "
            f"{_SAVE_STATE_DICT}"
        )
    order = entries.get(f"{prefix}byteorder")
    if order is not None and parts.bytes(order.start, min(order.length, 6)) != b"little":
        raise FileFormatError(f"{parts.path}: expected little-endian tensors, got big-endian ones. {_SAVE_STATE_DICT}")
    _check_sum(parts, entry)
    with parts.path.open("rb") as file:
        file.seek(entry.start)
        content = read_pickle(file, entry.length, parts.path, storage_of, rebuild_tensor)
    data = f"{prefix}data/"
    spans = {
        name.removeprefix(data): (entry.start, entry.length if entry.stored else -1)
        for name, entry in entries.items()
        if name.startswith(data)
    }
    return content, spans, f"{prefix}constants.pkl" in entries


def _check_sum(parts: FileParts, entry: StoredEntry) -> None:
    if entry.checksum and zlib.crc32(parts.bytes(entry.start, entry.length)) != entry.checksum:
        raise FileFormatError(f"{parts.path}: expected data.pkl as it was written, got other bytes. {COPY_AGAIN}")


def _read_stream(parts: FileParts) -> tuple[Unpickled, _Spans, bool]:
    storages: dict[str, Storage] = {}

    def load(identifier: Any) -> Any:
        value = storage_of(identifier)
        if type(value) is Storage:
            known = storages.setdefault(value.key, value)
            if (known.dtype, known.count) != (value.dtype, value.count):
                raise Malformed(f"two storages {printable(value.key)}. {COPY_AGAIN}")
        return value

    with parts.path.open("rb") as file:
        if parts.bytes(0, min(parts.size, len(_TEXT_MAGIC))) == _TEXT_MAGIC:
            raise FileFormatError(
                f"{parts.path}: expected {_WHAT} with pickle protocol 2 or later, got protocol 0 or 1. "
                f"{_SAVE_STATE_DICT}"
            )
        if parts.bytes(0, min(parts.size, 1)) != b"\x80":
            raise FileFormatError(f"{parts.path}: expected {_WHAT}, got something else. Name another file.")
        if _next_value(file, parts) != _MAGIC or _next_value(file, parts) != _VERSION:
            raise FileFormatError(f"{parts.path}: expected {_WHAT}, got a pickle of something else. {_SAVE_STATE_DICT}")
        system = _next_value(file, parts)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise FileFormatError(f"{parts.path}: expected little-endian tensors, got others. {_SAVE_STATE_DICT}")
        length = min(_LONGEST_PICKLE, parts.size - file.tell())
        content = read_pickle(file, length, parts.path, load, rebuild_tensor)
        keys = _next_value(file, parts)
        begin = file.tell()
    spans: _Spans = {}
    for key in keys if type(keys) is list else ():
        storage = storages.get(key) if type(key) is str else None
        if storage is None or key in spans or int.from_bytes(parts.bytes(begin, 8), "little") != storage.count:
            raise FileFormatError(f"{parts.path}: expected its storages after the pickle, got others. {COPY_AGAIN}")
        length = storage.count * storage.dtype.itemsize
        spans[key] = (begin + 8, length)
        begin += 8 + length
    if begin > parts.size or len(spans) != len(storages):
        raise FileFormatError(
            f"{parts.path}: expected {len(storages)} storages in {begin:,} bytes, got {len(spans)} in {parts.size:,} "
            f"(truncated?). {COPY_AGAIN}"
        )
    return content, spans, False


def _next_value(file: BinaryIO, parts: FileParts) -> Any:
    """The next of the pickles without objects."""

    def refuse(*_: Any) -> Any:
        raise ValueError("an object")

    length = min(_LONGEST_PICKLE, parts.size - file.tell())
    return read_pickle(file, length, parts.path, refuse, refuse).value


def _section(value: Any, section: str | None) -> tuple[str, Any]:
    items = items_of(value)
    if section or (section is None and items is not None):
        sections = {name: one for name, one in (items or {}).items() if type(name) is str and has_tensors(one)}
        name = section or next((name for name in SECTIONS if name in sections), "")
        if name in sections:
            return name, sections[name]
        if section or not has_tensors(value):
            wanted = f"under {printable(section)!r}" if section else "at the top or under " + ", ".join(SECTIONS)
            listed = first_few(map(printable, sections), limit=10)
            raise Malformed(
                f"none {wanted}; sections with tensors: {listed}. Name one of them as the section."
                if sections
                else f"none {wanted}, and no section with tensors. {_SAVE_STATE_DICT}"
            )
    return "", value


def _tensors(taken: Any, script: bool) -> tuple[dict[str, StoredTensor | Unsupported], str]:
    if script and type(taken) is Call:
        tensors, kind = script_tensors(taken), "TorchScript archive"
    elif is_module(taken):
        tensors, kind = module_tensors(taken), "whole module"
    else:
        tensors, kind = {}, "state dict"
        for name, value in (items_of(taken) or {}).items():
            if type(value) in (StoredTensor, Unsupported):
                tensors[name_of(name)] = value
    if not tensors:
        what = taken.function.dotted if type(taken) is Call else type(taken).__name__
        raise Malformed(f"none in the {printable(what)} that the file holds. {_SAVE_STATE_DICT}")
    return tensors, kind


def _other(value: Any, taken: Any, section: str) -> dict[str, Any]:
    """Plain values besides the tensors that were taken, and besides the section."""
    items = items_of(value) or {}
    others: dict[Any, Any] = {
        name: one for name, one in items.items() if name != section and type(one) is not StoredTensor
    }
    if section:
        inside = {name: one for name, one in (items_of(taken) or {}).items() if type(one) is not StoredTensor}
        others.update({section: inside} if inside else {})
    return plain(others)


def _placed(name: str, tensor: StoredTensor | Unsupported, spans: _Spans) -> tuple[StoredTensor, int]:
    """The tensor, and its first byte in the file."""
    if type(tensor) is Unsupported:
        raise Malformed(f"a {tensor.kind} as {printable(name)}. Convert it to an ordinary dense tensor first.")
    assert type(tensor) is StoredTensor
    storage = tensor.storage
    start, length = spans.get(storage.key, (0, -1))
    if length < storage.count * storage.dtype.itemsize:
        got = "no uncompressed storage" if length < 0 else f"a storage of {length:,} bytes"
        raise Malformed(f"{got} for {printable(name)}. {COPY_AGAIN}")
    return tensor, start + tensor.offset
