"""Tensors on disk: safetensors with a string header, written atomically, read lazily, verified on request.

The format is safetensors as its own documentation defines it: eight bytes with the length of the header, the header as
JSON, the data. It is written here rather than by the safetensors package so that the same input gives the same bytes,
one tensor is held in memory at a time, and a content digest can be added; any safetensors reader opens the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.params import dtype_of, shape_of
from lit_merge.vectors.lazy import LazyMapping, Slicer, stream

__all__ = ["CONTENT_KEY", "LazyTensors", "file_digest", "verify", "write_tensors"]

CONTENT_KEY = "content_sha256"
"""The metadata entry that holds the content digest: SHA-256 of names, dtypes, shapes, bytes and other metadata."""

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WAITING = 16 << 20  # bytes that are computed ahead of the disk
_LONGEST_HEADER = 100_000_000  # the limit that the safetensors package sets


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
        The content digest, 64 hexadecimal digits, also stored in the header as ``content_sha256``.

    Raises:
        ConfigurationError: the folder is missing, a name or metadata entry is not a string, or a dtype cannot be
            stored.
        OSError: the disk is full or not writable; ``path`` is as it was before.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: expected an existing folder to write into, got none. Create it first.")
    header = {key: value for key, value in metadata.items() if key != CONTENT_KEY}
    _check_strings(header, tensors)
    layout = _layout(tensors)
    reserved = _header_bytes(layout, {**header, CONTENT_KEY: "0" * 64})
    temporary = target.with_name(f".{secrets.token_hex(8)}.temporary")
    try:
        with temporary.open("xb") as file:
            file.write(reserved)
            digest = hashlib.sha256()
            with _Behind(file, digest) as behind:
                _write_stream(behind, layout, stream(tensors, layout))
            header.update(late_metadata() if late_metadata else {})
            _digest_metadata(digest, header)
            final = _header_bytes(layout, {**header, CONTENT_KEY: digest.hexdigest()}, length=len(reserved))
            file.seek(0)
            file.write(final)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:  # an interrupt included
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _synchronise_folder(target.parent)
    return digest.hexdigest()


class LazyTensors(LazyMapping):
    """The tensors of a safetensors file, read one at a time: ``tensors[name]`` maps that tensor and nothing else.

    Every read gives a tensor of its own: changing one in place changes neither the file nor a later read. Pickling
    keeps the path only, so that a worker process opens the file by itself.

    Args:
        path: a safetensors file.
        verify: also compare all bytes with the content digest in the header (reads the whole file once).

    Raises:
        FileFormatError: the file is missing, truncated, or not a safetensors file; with ``verify``, also if its
            content is not what was written.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = False) -> None:
        self.path = Path(path)
        self._identity = _identity(self.path)
        self._file: weakref.ref[_OpenFile] | None = None
        header, begin = _read_header(self.path, size=self._identity[0])
        self.content_digest: str | None = header.pop("__metadata__", {}).pop(CONTENT_KEY, None)
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, tuple[torch.dtype, torch.Size]] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                self.metadata = {key: value for key, value in (file.metadata() or {}).items() if key != CONTENT_KEY}
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{self.path}: expected a safetensors file, got {_line(error)}. {_ADVICE}") from error
        self._places: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise FileFormatError(
                    f"{self.path}: expected one of the dtypes {', '.join(_DTYPES)}, got {entry['dtype']} for {name}. "
                    "Convert that tensor first."
                )
            self._entries[name] = (_DTYPES[entry["dtype"]], torch.Size(entry["shape"]))
            first, last = entry["data_offsets"]
            self._places[name] = (begin + first, begin + last)
        if verify:
            self.verify()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(name)
        dtype, shape = self._entries[name]
        start, stop = self._places[name]
        try:
            with self.path.open("rb") as file:
                self._check_unchanged(file.fileno())
                if start == stop:
                    return torch.empty(shape, dtype=dtype)
                # A private map of this tensor alone: what is not touched is not read, and what is written stays here.
                offset = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                memory = mmap.mmap(file.fileno(), stop - offset, access=mmap.ACCESS_COPY, offset=offset)
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{self.path}: could not read {name}: {_line(error)}. {_ADVICE}") from error
        if (start - offset) % dtype.itemsize:  # other writers need not align tensors
            aligned = bytearray(memory[start - offset :])
            return torch.frombuffer(aligned, dtype=dtype).view(shape)
        return torch.frombuffer(memory, dtype=dtype, offset=start - offset).view(shape)

    def slicer(self, name: str) -> Slicer:
        """A function that reads parts of one flattened tensor from the file, without mapping it.

        Nothing but ``out`` is filled: parts that have been read do not add up in memory, as those of a map would.
        """
        if name not in self._entries:
            raise KeyError(name)
        if not hasattr(os, "preadv"):  # Windows
            return super().slicer(name)
        try:
            file = self._file() if self._file is not None else None
            if file is None:
                file = _OpenFile(self.path)
                self._file = weakref.ref(file)
            self._check_unchanged(file.descriptor)
        except OSError as error:
            raise FileFormatError(f"{self.path}: could not read {name}: {_line(error)}. {_ADVICE}") from error
        return _FileSlices(file, name, self._entries[name][0], self._places[name][0])

    def _check_unchanged(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns, status.st_ino) != self._identity:
            raise FileFormatError(
                f"{self.path}: expected the file as it was opened, but it has changed. Load it again."
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"LazyTensors({str(self.path)!r})"

    def __reduce__(self) -> tuple[type[LazyTensors], tuple[Path]]:
        return (type(self), (self.path,))

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
        if self.content_digest is None:
            raise FileFormatError(
                f"{self.path}: expected a content digest in the header, got none. "
                "Load without verify, or write the file with lit-merge."
            )
        digest = hashlib.sha256()
        for name in _file_order(self):
            digest.update(_entry_line(name, self.dtype(name), self.shape(name)))
            digest.update(_raw(self[name]))
        _digest_metadata(digest, self.metadata)
        if digest.hexdigest() != self.content_digest:
            raise FileFormatError(
                f"{self.path}: expected content {self.content_digest[:16]}…, got {digest.hexdigest()[:16]}…: "
                "the file has changed since it was written. Copy or write it again."
            )


class _OpenFile:
    """A file that is open as long as anyone reads parts of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)
        # Not by __del__, during which another thread could still get hold of this object by a weak reference.
        weakref.finalize(self, os.close, self.descriptor).atexit = False


class _FileSlices:
    """Reads parts of one tensor; several threads may do so at once."""

    def __init__(self, file: _OpenFile, name: str, dtype: torch.dtype, start: int) -> None:
        self._file, self._name, self._dtype, self._start = file, name, dtype, start

    def __call__(self, start: int, stop: int, out: Tensor) -> None:
        if start == stop:
            return
        direct = out.dtype == self._dtype and out.device.type == "cpu" and out.is_contiguous()
        part = out if direct else torch.empty(stop - start, dtype=self._dtype)
        self._fill(_bytes_of(part), self._start + start * self._dtype.itemsize)
        if not direct:
            out.copy_(part)

    def _fill(self, memory: memoryview, offset: int) -> None:
        while memory:
            try:
                count = os.preadv(self._file.descriptor, [memory], offset)
            except OSError as error:
                raise FileFormatError(
                    f"{self._file.path}: could not read {self._name}: {_line(error)}. {_ADVICE}"
                ) from error
            if not count:
                raise FileFormatError(
                    f"{self._file.path}: expected the file as it was opened, got its end inside {self._name}. {_ADVICE}"
                )
            memory, offset = memory[count:], offset + count


def verify(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose bytes are not those that :func:`write_tensors` wrote.

    Raises:
        FileFormatError: the file is missing, malformed, without a content digest, or damaged.
    """
    LazyTensors(path, verify=True)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, 64 hexadecimal digits, read in pieces of one MiB.

    Raises:
        FileFormatError: there is no such file.
    """
    digest = hashlib.sha256()
    _identity(Path(path))
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


_ADVICE = "Copy or write it again."


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected a safetensors file, got {error.strerror or 'no file'}. Check the path."
        ) from error
    if not path.is_file():
        raise FileFormatError(f"{path}: expected a safetensors file, got a folder or device. Name the file in it.")
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins; its length, entries and that the file ends with the data are checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise FileFormatError(
                f"{path}: expected a safetensors file with its header inside, got a header of {length:,} bytes "
                f"in a file of {size:,} bytes (truncated, or another format). {_ADVICE}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        well_formed = all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in entries)
        well_formed = well_formed and isinstance(header.get("__metadata__", {}), dict)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        well_formed = False
    if not well_formed:
        raise FileFormatError(f"{path}: expected a safetensors header, got something else. {_ADVICE}")
    if 8 + length + end != size:
        raise FileFormatError(
            f"{path}: expected {8 + length + end:,} bytes according to the header, got {size:,}. {_ADVICE}"
        )
    return header, 8 + length


def _check_strings(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigurationError(
                f"metadata {key!r}: expected strings, got {type(value).__name__}. Use json.dumps for other values."
            )
    for name in tensors:
        if not isinstance(name, str) or name == "__metadata__":
            raise ConfigurationError(f"tensor name {name!r}: expected a string other than '__metadata__'. Rename it.")


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
    if len(text) > padded:
        raise ConfigurationError(f"late metadata: expected at most {padded} header bytes, got {len(text)}. Shorten it.")
    return padded.to_bytes(8, "little") + text.ljust(padded)


class _Behind:
    """Writes and digests pieces in order while the next ones are computed; few MiB wait, or one larger piece.

    Leaving the context waits for the last one; what failed on the way is raised by the next call.
    """

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._threads.shutdown(cancel_futures=True)

    def add(self, entry: bytes, data: memoryview) -> None:
        """Write the data; the digest takes the entry first."""
        self._wait(max(0, _WAITING - data.nbytes))
        self._pending.append((data.nbytes, self._threads.submit(self._write, entry, data)))
        self._bytes += data.nbytes

    def _wait(self, most: int) -> None:
        """Until at most so many bytes are left to write."""
        while self._pending and (self._bytes > most or self._pending[0][1].done()):
            size, written = self._pending.popleft()
            self._bytes -= size
            written.result()

    def _write(self, entry: bytes, data: memoryview) -> None:
        self._digest.update(entry)
        self._digest.update(data)
        self._file.write(data)


def _write_stream(
    behind: _Behind,
    layout: Mapping[str, tuple[torch.dtype, torch.Size, int, int]],
    pieces: Iterator[tuple[str, Tensor]],
) -> None:
    """Write all tensors of the layout; their pieces come in its order."""
    got, piece = next(pieces, (None, None))
    for name, (dtype, shape, _, _) in layout.items():
        line, count = _entry_line(name, dtype, shape), 0
        while piece is not None and got == name:
            if piece.dtype != dtype:
                raise _not_announced(name, dtype, shape, f"{piece.dtype}")
            behind.add(line, _raw(piece))
            line, count = b"", count + piece.numel()
            got, piece = next(pieces, (None, None))
        if count != shape.numel() or line:
            raise _not_announced(name, dtype, shape, f"{count} entries")


def _not_announced(name: str, dtype: torch.dtype, shape: torch.Size, got: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name}: expected {dtype} {tuple(shape)} as announced, got {got}. "
        "Make shape(name) and dtype(name) of the lazy mapping agree with its tensors."
    )


def _raw(tensor: Tensor) -> memoryview:
    return _bytes_of(tensor.detach().cpu().contiguous()) if tensor.numel() else memoryview(b"")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor with entries; NumPy does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _entry_line(name: str, dtype: torch.dtype, shape: torch.Size) -> bytes:
    return json.dumps([name, _NAMES[dtype], list(shape)]).encode()


def _digest_metadata(digest: Any, metadata: Mapping[str, str]) -> None:
    digest.update(json.dumps(dict(sorted(metadata.items()))).encode())


def _synchronise_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
