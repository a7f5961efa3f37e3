"""Who may write to a suite's output: one suite at a time, also on a disk that several machines share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_merge.errors import ConfigurationError, LitMergeError

__all__ = ["LOCK", "locked"]

LOCK = "suite.lock"
"""The file in the output that says who holds it since when; it is gone when the suite has ended."""

_BEAT = 5.0  # seconds between signs of life
_PATIENCE = 4 * _BEAT  # without any for so long, a suite on another machine counts as ended
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a suite's output; the folder is created, and removed again if nothing has been written to it.

    On one machine a record lock of the operating system decides, which ends with the process that holds it, however
    that ends. Where another machine had the output last, its signs of life decide: the file's time, renewed every few
    seconds, is watched. Where the file system has no such locks, that and the process's number do.

    Raises:
        LitMergeError: another suite holds it; the message says which and since when.
        ConfigurationError: the folder cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"output: expected a folder that can be created, got {directory} ({error.strerror}). Choose another."
        ) from error
    path = directory / LOCK
    descriptor = _take(path)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            directory.rmdir()  # if it is empty


def _take(path: Path) -> int:
    """The open lock file, with us as its holder."""
    watched: dict[str, Any] = {}  # a holder elsewhere that has shown no sign of life
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            supported = _lock(descriptor, path)
            if not _is_at(path, descriptor):  # its holder has just ended
                os.close(descriptor)
                continue
            holder = _holder(descriptor)
            here = holder.get("host") == socket.gethostname()
            if not holder or holder == watched or (here and (supported or not _runs(holder["process"]))):
                mine = _write(descriptor)
                if not supported:
                    time.sleep(_BEAT / 5)  # for another that writes its own at the same moment
                if _holder(descriptor) != mine:
                    raise _held(path, _holder(descriptor))
                return descriptor
            if here:
                raise _held(path, holder)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if _lives(path):
            raise _held(path, holder)
        watched = holder


def _lock(descriptor: int, path: Path) -> bool:
    """Whether the system's lock was taken; False if there are none on this file system."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process it starts does not inherit it
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _held(path, _holder(descriptor)) from error
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, Any]:
    """What the file says; empty if it says nothing, as while its holder begins to write it."""
    with contextlib.suppress(ValueError):
        found = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(found, dict) and isinstance(found.get("process"), int):
            return found
    return {}


def _write(descriptor: int) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    mine = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "token": secrets.token_hex(8)}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    os.fsync(descriptor)
    return mine


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lives(path: Path) -> bool:
    """Whether the holder on another machine shows a sign of life while it is watched."""
    until = time.monotonic() + _PATIENCE
    before = _seen(path)
    while time.monotonic() < until:
        time.sleep(_BEAT / 5)
        if (now := _seen(path)) != before:
            return now is not None  # None: it has just ended
    return False


def _seen(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opened anew, network file systems look at the server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _held(path: Path, holder: dict[str, Any]) -> LitMergeError:
    who = f" on {holder.get('host')} (process {holder['process']}) since {holder.get('since')}" if holder else ""
    return LitMergeError(
        f"output: expected {path.parent} to be free, got it held by another suite{who}. Wait until that one has ended, "
        "or choose another output."
    )
