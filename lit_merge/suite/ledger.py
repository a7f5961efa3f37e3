"""The hashes of files, each computed once: a file is known by its path, size, times and inode, also to a later run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_merge.files.store import file_digest
from lit_merge.files.text import write_text

__all__ = ["FileLedger"]

_NANOSECONDS = 10**9
_TICK = 20_000_000  # kernels stamp files with the time of their last tick, at most 10 ms ago
_COARSE = 2 * _NANOSECONDS  # FAT has every second second, some others whole ones


class FileLedger:
    """SHA-256 of files by their identity: path, size, time of modification, time of change, inode.

    A file that is written twice within the granularity of its file system's times may look the same although it is
    not. Therefore a hash is only recorded when the file had been left alone for longer than that before it was read;
    of a fresh file this is waited for.

    Args:
        path: of the ledger, which :meth:`save` writes; one that is missing or damaged is empty.
        root: files below it are known by their path in it, so that the folder may be moved.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self._root = Path(root).absolute()
        self._known = _read(path)
        self._changed = False

    def digest(self, path: str | os.PathLike[str]) -> str:
        """SHA-256 of a file, 64 hexadecimal digits; read only if it is not known.

        Raises:
            FileFormatError: there is no such file.
        """
        try:
            identity = _identity(path)
        except OSError:
            return file_digest(path)  # which says what is wrong with it
        name = self._name(path)
        known = self._known.get(name)
        if known is not None and known[:-1] == identity:
            return str(known[-1])
        settled = _settled(max(identity[1:3]))
        digest = file_digest(path)
        if settled and _identity(path) == identity:
            self._known[name] = [*identity, digest]
            self._changed = True
        return digest

    def tree_digest(self, *roots: str | os.PathLike[str]) -> str:
        """A hash of the names and contents of files, and of all files below folders.

        Names are relative to a folder, whose own path does not matter; of a file its name counts. Times do not
        count: a copy has the same hash.
        """
        found = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            for root in map(Path, roots):
                files = {root.name: root} if root.is_file() else dict(_below(root))
                found.update(f"{len(files)}\0".encode())
                for name, digest in zip(files, pool.map(self.digest, files.values()), strict=True):
                    found.update(f"{name}\0{digest}\0".encode("utf-8", "surrogateescape"))
        return found.hexdigest()

    def save(self) -> None:
        """Write the ledger if there is something new, whole or not at all.

        Raises:
            WriteError: the disk is full or not writable.
        """
        if self._changed:
            write_text(self.path, json.dumps(self._known, separators=(",", ":")) + "\n")
            self._changed = False

    def _name(self, path: str | os.PathLike[str]) -> str:
        absolute = Path(path).absolute()
        return str(absolute.relative_to(self._root) if absolute.is_relative_to(self._root) else absolute)


def _identity(path: str | os.PathLike[str]) -> list[int]:
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _settled(stamp: int) -> bool:
    """Wait until a time stamp is older than the granularity of such stamps; False if it is further in the future."""
    granularity = _COARSE if stamp % _NANOSECONDS == 0 else _TICK
    wait = stamp + granularity - time.time_ns()
    if wait > granularity:
        return False
    if wait >= 0:
        time.sleep((wait + 1) / _NANOSECONDS)
    return True


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 5}


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file():  # no dangling link, and nothing that could be read without end
                yield path.relative_to(root).as_posix(), path
