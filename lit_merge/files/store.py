"""Tensors on disk: safetensors with a string header, written atomically, read lazily, verified on request.

The format is safetensors as its own documentation defines it: eight bytes with the length of the header, the header as
JSON, the data. It is written here rather than by the safetensors package so that the same input gives the same bytes,
one tensor is held in memory at a time, and a content digest can be added; any safetensors reader opens the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.files.content_digest import CONTENT_KEY, CONTENT_KEYS, Digest, new_digest
from lit_merge.files.file_parts import bytes_of, printable
from lit_merge.files.lazy import LazyMapping, Slicer, stream
from lit_merge.files.remote import RemoteParts, parts_of
from lit_merge.files.tensor_header import DTYPES, LONGEST_HEADER, read_header
from lit_merge.files.writing import new_file
from lit_merge.params import dtype_of, shape_of

__all__ = ["Draft", "LazyTensors", "file_digest", "verify", "write_tensors"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WHAT = "a safetensors file"
_WAITING = 16 << 20  # bytes that are computed ahead of the disk
_TO_DISK = 32 << 20  # bytes that are synchronised to disk at once, while the next ones are computed


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    late_metadata: Callable[[], Mapping[str, str]] | None = None,
) -> str:
    """Write tensors and a string header to a safetensors file, atomically.

    The bytes go to a temporary file in the same folder, which is synchronised to disk and renamed; whatever happens,
    the file at ``path`` is the old one or the complete new one. The same input gives the same bytes. Tensors are read
    one at a time, so a lazy mapping is never in memory as a whole.

    Args:
        path: the file to write, in an existing folder.
        tensors: name -> tensor of any shape. A lazy mapping tells shapes and dtypes by ``shape(name)`` and
            ``dtype(name)``.
        metadata: string header entries.
        late_metadata: called after the last tensor was read; its entries replace those of the same names in
            ``metadata``, whose values must be at least as long (they reserve the space).

    Returns:
        The content digest, 64 hexadecimal digits, also stored in the header as ``content_blake3``.

    Raises:
        ConfigurationError: the folder is missing, a name or metadata entry is not a string, or a dtype cannot be
            stored.
        WriteError: the disk is full or not writable; ``path`` is as it was before.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: expected an existing folder to write into, got none. Create it first.")
    draft = Draft(tensors, metadata)
    with new_file(target, draft.size) as file:
        draft.write(file)
        return draft.finish(file, late_metadata() if late_metadata else {})


class Draft:
    """A safetensors file that is written in two steps: the data, and then the header, whose space is reserved.

    Args:
        tensors: as for :func:`write_tensors`.
        metadata: as for :func:`write_tensors`.

    Attributes:
        size: of the file, in bytes.

    Raises:
        ConfigurationError: a name or metadata entry is not a string, or a dtype cannot be stored.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._header = {key: value for key, value in metadata.items() if key not in CONTENT_KEYS}
        _check_strings(self._header, tensors)
        self._layout = _layout(tensors)
        self._reserved = _header_bytes(self._layout, {**self._header, CONTENT_KEY: "0" * 64})
        self.size = len(self._reserved) + max((end for _, _, _, end in self._layout.values()), default=0)
        self._digest = new_digest()

    def write(self, file: BinaryIO) -> None:
        """Write the data, one tensor or chunk after the other, after a header that says nothing yet."""
        file.write(self._reserved)
        with _Background(file, self._digest) as background:
            _write_stream(background, self._layout, stream(self._tensors, self._layout))

    def finish(self, file: BinaryIO, metadata: Mapping[str, str]) -> str:
        """Write the header, in which this metadata replaces entries that are at least as long; the content digest."""
        header = {**self._header, **metadata}
        _digest_metadata(self._digest, header)
        content = {**header, CONTENT_KEY: self._digest.hexdigest()}
        file.seek(0)
        file.write(_header_bytes(self._layout, content, length=len(self._reserved)))
        return self._digest.hexdigest()


class LazyTensors(LazyMapping):
    """The tensors of a safetensors file, read one at a time: ``tensors[name]`` maps that tensor and nothing else.

    Every read gives a tensor of its own: changing one in place changes neither the file nor a later read. Pickling
    keeps the path only, so that a worker process opens the file by itself.

    Args:
        path: a safetensors file, or its address on the Hub (``hf://owner/name/file``).
        verify: also compare all bytes with the content digest in the header (reads the whole file once).

    Attributes:
        content_key: the header entry of the content digest; that of this version for a file without.
        content_digest: 64 hexadecimal digits; None if the header states none.

    Raises:
        FileFormatError: the file is missing, truncated, or not a safetensors file; with ``verify``, also if its
            content is not what was written.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = False) -> None:
        self._parts = parts_of(path, _WHAT)
        self.path = self._parts.path
        header = read_header(self._parts)
        self.metadata: dict[str, str] = header.metadata
        stated = {key: self.metadata.pop(key) for key in CONTENT_KEYS if key in self.metadata}
        self.content_key = next(iter(stated), CONTENT_KEY)
        self.content_digest: str | None = stated.get(self.content_key)
        self._entries, self._starts = header.entries, header.starts
        if isinstance(self._parts, RemoteParts):
            self._parts.divide(self._starts.values())
        if verify:
            self.verify()

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._entries[name]
        return self._parts.tensor(name, dtype, shape, self._starts[name])

    def slicer(self, name: str) -> Slicer:
        """A function that reads parts of one flattened tensor from the file, without mapping it.

        Nothing but ``out`` is filled: parts that have been read do not add up in memory, as those of a map would.
        """
        return self._parts.slicer(name, self._entries[name][0], self._starts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"LazyTensors({str(self.path)!r})"

    def __reduce__(self) -> tuple[type[LazyTensors], tuple[Path | str]]:
        remote = isinstance(self._parts, RemoteParts)  # another process has to download it
        return (type(self), (str(self._parts.address) if remote else self.path,))  # type: ignore[attr-defined]

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, from the header."""
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, from the header."""
        return self._entries[name][0]

    def verify(self) -> None:
        """Read everything and compare it with the content digest of the header.

        Raises:
            FileFormatError: there is no digest, or the content differs from what was written.
        """
        if isinstance(self._parts, RemoteParts) and self._parts.deferred:
            return  # until it is fetched, and opened again
        if self.content_digest is None:
            raise FileFormatError(
                f"{self.path}: expected a content digest in the header, got none. "
                "Load without verify, or write the file with lit-merge."
            )
        digest = new_digest(self.content_key)
        for name in _file_order(self):
            digest.update(_entry_line(name, self.dtype(name), self.shape(name)))
            digest.update(_raw(self[name]))
        _digest_metadata(digest, self.metadata)
        if digest.hexdigest() != self.content_digest:
            raise FileFormatError(
                f"{self.path}: expected content {printable(self.content_digest, 16)}, got {digest.hexdigest()[:16]}…: "
                "the file has changed since it was written. Copy or write it again."
            )


def verify(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose bytes are not those that :func:`write_tensors` wrote.

    Raises:
        FileFormatError: the file is missing, malformed, without a content digest, or damaged.
    """
    LazyTensors(path, verify=True)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, 64 hexadecimal digits, read in chunks of one MiB.

    Raises:
        FileFormatError: there is no such file.
    """
    digest, parts = hashlib.sha256(), parts_of(path, _WHAT)
    memory = bytearray(min(1 << 20, parts.size))
    file = parts.filling("its content")
    for start in range(0, parts.size, len(memory) or 1):
        chunk = memoryview(memory)[: parts.size - start]
        file.fill(chunk, start, "its content")
        digest.update(chunk)
    return digest.hexdigest()


def _check_strings(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigurationError(
                f"metadata {key!r}: expected strings, got {type(value).__name__}. Use json.dumps for other values."
            )
    for name in tensors:
        if not isinstance(name, str) or name == "__metadata__" or not name.isprintable():
            raise ConfigurationError(
                f"tensor name {name!r}: expected a string other than '__metadata__', without control characters. "
                "Rename it."
            )


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names with wider dtypes first (every tensor stays aligned), then sorted."""
    return sorted(tensors, key=lambda name: (-dtype_of(tensors, name).itemsize, name))


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, int, int]]:
    layout, end = {}, 0
    for name in _file_order(tensors):
        dtype, shape = dtype_of(tensors, name), shape_of(tensors, name)
        if dtype not in _NAMES:
            raise ConfigurationError(f"{name}: expected a dtype that can be stored, got {dtype}. Convert it first.")
        start, end = end, end + shape.numel() * dtype.itemsize
        layout[name] = (dtype, shape, start, end)
    return layout


def _header_bytes(
    layout: Mapping[str, tuple[torch.dtype, torch.Size, int, int]], metadata: Mapping[str, str], length: int = 0
) -> bytes:
    """The length and the JSON, padded with spaces to a multiple of eight, or to ``length`` in all."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, (dtype, shape, start, end) in layout.items():
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    padded = length - 8 if length else (len(text) + 7) // 8 * 8
    if padded > LONGEST_HEADER:
        raise ConfigurationError(
            f"header: expected at most {LONGEST_HEADER:,} bytes of names and metadata, got {padded:,}. "
            "Write several files, or less metadata."
        )
    if len(text) > padded:
        raise ConfigurationError(f"late metadata: expected at most {padded} header bytes, got {len(text)}. Shorten it.")
    return padded.to_bytes(8, "little") + text.ljust(padded)


class _Background:
    """Writes and digests chunks in order while the next ones are computed; few MiB wait, or one larger chunk.

    What is written is also synchronised to disk on the way, so that the file's owner need not wait for all of it at the
    end. Leaving the context waits for the last one; what failed on the way is raised by the next call.
    """

    def __init__(self, file: BinaryIO, digest: Digest) -> None:
        self._file, self._digest = file, digest
        self._threads, self._disk = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        self._synchronised: Future[None] | None = None
        self._written = 0  # since the last synchronisation began
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._wait(-1)  # a chunk without bytes has its line in the digest, too
                if self._synchronised is not None:
                    self._synchronised.result()  # the system tells of a failure once
        finally:
            self._threads.shutdown(cancel_futures=True)
            self._disk.shutdown()

    def add(self, entry: bytes, data: memoryview) -> None:
        """Write the data; the digest takes the entry first."""
        self._wait(max(0, _WAITING - data.nbytes))
        self._pending.append((data.nbytes, self._threads.submit(self._write, entry, data)))
        self._bytes += data.nbytes

    def _wait(self, most: int) -> None:
        """Until at most so many bytes are left to write; -1 waits for every chunk."""
        while self._pending and (self._bytes > most or self._pending[0][1].done()):
            size, written = self._pending.popleft()
            self._bytes -= size
            written.result()

    def _write(self, entry: bytes, data: memoryview) -> None:
        self._digest.update(entry)
        self._digest.update(data)
        self._file.write(data)
        self._written += data.nbytes
        if self._written >= _TO_DISK and (self._synchronised is None or self._synchronised.done()):
            if self._synchronised is not None:
                self._synchronised.result()
            self._synchronised, self._written = self._disk.submit(_synchronise, self._file), 0


def _synchronise(file: BinaryIO) -> None:
    if hasattr(os, "fdatasync"):  # elsewhere the owner's fsync does it
        os.fdatasync(file.fileno())


def _write_stream(
    background: _Background,
    layout: Mapping[str, tuple[torch.dtype, torch.Size, int, int]],
    chunks: Iterator[tuple[str, Tensor]],
) -> None:
    """Write all tensors of the layout; their chunks come in its order."""
    got, chunk = next(chunks, (None, None))
    for name, (dtype, shape, _, _) in layout.items():
        line, count = _entry_line(name, dtype, shape), 0
        while chunk is not None and got == name:
            if chunk.dtype != dtype:
                raise _not_announced(name, dtype, shape, f"{chunk.dtype}")
            background.add(line, _raw(chunk))
            line, count = b"", count + chunk.numel()
            got, chunk = next(chunks, (None, None))
        if count != shape.numel() or line:
            raise _not_announced(name, dtype, shape, f"{count} elements")


def _not_announced(name: str, dtype: torch.dtype, shape: torch.Size, got: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name}: expected {dtype} {tuple(shape)} as announced, got {got}. "
        "Make shape(name) and dtype(name) of the lazy mapping agree with its tensors."
    )


def _raw(tensor: Tensor) -> memoryview:
    return bytes_of(tensor.detach().cpu().contiguous()) if tensor.numel() else memoryview(b"")


def _entry_line(name: str, dtype: torch.dtype, shape: torch.Size) -> bytes:
    return json.dumps([name, _NAMES[dtype], list(shape)]).encode()


def _digest_metadata(digest: Digest, metadata: Mapping[str, str]) -> None:
    digest.update(json.dumps(dict(sorted(metadata.items()))).encode())
