"""Parts of a file on disk: read when asked for, as long as the file is the one that was opened."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lit_merge.errors import FileFormatError
from lit_merge.files.lazy import Slicer

__all__ = [
    "COPY_AGAIN",
    "FileParts",
    "OpenFile",
    "Parts",
    "Slices",
    "bytes_of",
    "check_no_pointer",
    "one_line",
    "printable",
]

COPY_AGAIN = "Copy or write it again."


class Parts(Protocol):
    """A file of which tensors and bytes are read by their position, wherever it is."""

    path: Path
    size: int

    def bytes(self, start: int, length: int) -> bytes:
        """A few bytes of the file."""

    def tensor(self, name: str, dtype: torch.dtype, shape: torch.Size, start: int) -> Tensor:
        """A tensor of its own, whose elements are contiguous from byte ``start`` on."""

    def slicer(self, name: str, dtype: torch.dtype, start: int) -> Slicer:
        """A function that reads parts of one flattened tensor, whose elements start at byte ``start`` on."""

    def filling(self, what: str) -> Filling:
        """What reads into memory, while it lives."""


class Filling(Protocol):
    """What fills memory from a position on."""

    def fill(self, memory: memoryview, offset: int, what: str) -> None:
        """Read into memory from that byte on."""


def check_no_pointer(parts: Parts, what: str) -> None:
    """Refuse the text that Git LFS leaves in a large file's place.

    Raises:
        FileFormatError: the file begins as such a text does.
    """
    if parts.bytes(0, min(parts.size, 8)) == b"version ":
        raise FileFormatError(f"{parts.path}: expected {what}, got a pointer of Git LFS. Run git lfs pull.")


class FileParts:
    """A file of which tensors and bytes are read by their position.

    It is open while something is read or a slicer lives, not between.

    Args:
        path: the file.
        what: what it is expected to be, with its article, for messages: ``"a safetensors file"``.

    Attributes:
        path: the file.
        size: its length in bytes.

    Raises:
        FileFormatError: there is no such file, or it is a folder or device.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path = Path(path)
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            reason = getattr(error, "strerror", None) or "no file"
            raise FileFormatError(f"{self.path}: expected {what}, got {reason}. Check the path.") from error
        if not self.path.is_file():
            raise FileFormatError(f"{self.path}: expected {what}, got a folder or device. Name the file in it.")
        self.size = status.st_size
        self._identity = (status.st_size, status.st_mtime_ns, status.st_ino)
        self._shared: weakref.ref[OpenFile] | None = None

    def bytes(self, start: int, length: int) -> bytes:
        """A few bytes of the file; what they are is for the caller to check.

        Raises:
            FileFormatError: they are outside the file, the file has changed, or it cannot be read.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise FileFormatError(
                f"{self.path}: expected bytes {start:,} to {start + length:,}, got a file of {self.size:,} bytes "
                f"(truncated?). {COPY_AGAIN}"
            )
        memory = bytearray(length)
        self.opened("its structure").fill(memoryview(memory), start, "its structure")
        return bytes(memory)

    def tensor(self, name: str, dtype: torch.dtype, shape: torch.Size, start: int) -> Tensor:
        """A tensor of its own, whose elements are contiguous from byte ``start`` on.

        Where that byte is aligned to the elements, the part of the file is mapped privately: what is not touched is not
        read, and what is written stays in memory.

        Raises:
            FileFormatError: the file has changed, is shorter than that, or cannot be read.
        """
        stop = start + shape.numel() * dtype.itemsize
        file = self.opened(name)
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:  # not every writer aligns tensors
            copy = torch.empty(shape, dtype=dtype)
            file.fill(bytes_of(copy), start, name)
            return copy
        offset = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            memory = mmap.mmap(file.descriptor, stop - offset, access=mmap.ACCESS_COPY, offset=offset)
        except (OSError, ValueError, OverflowError) as error:
            raise FileFormatError(f"{self.path}: could not read {name}: {one_line(error)}. {COPY_AGAIN}") from error
        count = shape.numel()
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=start - offset).view(shape)

    def slicer(self, name: str, dtype: torch.dtype, start: int) -> Slicer:
        """A function that reads parts of one flattened tensor, whose elements start at byte ``start`` on.

        Nothing but ``out`` is filled: parts that have been read do not add up in memory, as those of a map would.
        """
        return Slices(self.opened(name), name, dtype, start)

    def filling(self, what: str) -> Filling:
        """As :meth:`opened`."""
        return self.opened(what)

    def opened(self, what: str) -> OpenFile:
        """The open file, which all reads share and which is closed when nobody holds it.

        Raises:
            FileFormatError: it cannot be opened, or has changed.
        """
        file = self._shared() if self._shared is not None else None
        try:
            if file is None:
                file = OpenFile(self.path)
                self._shared = weakref.ref(file)
            status = os.fstat(file.descriptor)
        except OSError as error:
            raise FileFormatError(f"{self.path}: could not read {what}: {one_line(error)}. {COPY_AGAIN}") from error
        if (status.st_size, status.st_mtime_ns, status.st_ino) != self._identity:
            raise FileFormatError(
                f"{self.path}: expected the file as it was opened, but it has changed. Load it again."
            )
        return file


class OpenFile:
    """A file that is open as long as anyone reads parts of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        # Not by __del__, during which another thread could still get hold of this object by a weak reference.
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    def fill(self, memory: memoryview, offset: int, what: str) -> None:
        """Read into memory from that byte on; several threads may do so at once."""
        while memory:
            try:
                count = self._read(memory, offset)
            except OSError as error:
                raise FileFormatError(f"{self.path}: could not read {what}: {one_line(error)}. {COPY_AGAIN}") from error
            if not count:
                raise FileFormatError(
                    f"{self.path}: expected the file as it was opened, got its end inside {what}. {COPY_AGAIN}"
                )
            memory, offset = memory[count:], offset + count

    def _read(self, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [memory], offset)
        with self.path.open("rb") as file:  # Windows
            file.seek(offset)
            return file.readinto(memory)


class Slices:
    """Reads parts of one flattened tensor.

    Args:
        file: what they are read from.
        name: of the tensor, for messages.
        dtype: its own.
        start: the file's byte that it starts at.
    """

    def __init__(self, file: Filling, name: str, dtype: torch.dtype, start: int) -> None:
        self._file, self._name, self._dtype, self._start = file, name, dtype, start

    def __call__(self, start: int, stop: int, out: Tensor) -> None:
        """Write elements ``start`` to ``stop`` into ``out``, 1-D, of any dtype and device."""
        if start == stop:
            return
        direct = out.dtype == self._dtype and out.device.type == "cpu" and out.is_contiguous()
        part = out if direct else _scratch(stop - start, self._dtype)
        self._file.fill(bytes_of(part), self._start + start * self._dtype.itemsize, self._name)
        if not direct:
            out.copy_(part)


_KEPT = 1 << 20
"""The most elements that memory is kept for, once a thread and dtype: chunks of merges are read again and again."""

_of_thread = threading.local()


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory that the next call in this thread takes again."""
    if count > _KEPT:
        return torch.empty(count, dtype=dtype)
    kept: dict[torch.dtype, Tensor] = _of_thread.__dict__.setdefault("kept", {})
    if dtype not in kept or len(kept[dtype]) < count:
        with torch.inference_mode(False):  # or it could not be written into outside of it
            kept[dtype] = torch.empty(count, dtype=dtype)
    return kept[dtype][:count]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor with elements."""
    if tensor.dtype == torch.float32 and tensor.ndim == 1:  # of every chunk of a merge
        return tensor.numpy().data.cast("B")
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # NumPy does not know every dtype


def printable(text: object, limit: int = 120) -> str:
    """Text out of a file as part of a message: one line, of bounded length, nothing that steers a terminal."""
    shown = str(text)
    cut = f"{shown[:limit]}…" if len(shown) > limit else shown
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in cut)


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
