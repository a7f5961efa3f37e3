"""New files appear whole or not at all; where the system refuses one, the message has the path and what is missing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lit_merge.errors import WriteError

__all__ = ["new_file", "writing"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Say in one line what was to be written when the system refuses it.

    Args:
        path: the file or folder that is written inside.
        size: the bytes that it takes, if they are known.

    Raises:
        WriteError: instead of the system's error, which has no path when the disk is full.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        got = os.strerror(error.errno)
        if error.errno in _NO_ROOM:
            room = "room to write" if size is None else f"room for {size:,} bytes"
            line = f"{path}: expected {room}, got {got}{_free(path, size)}. Free space there, or choose another disk."
        else:
            line = f"{path}: expected a path that can be written, got {got}. Choose another one, or its permissions."
        refused = WriteError(line)
        refused.errno = error.errno
        raise refused from error


def _free(path: Path, size: int | None) -> str:
    folder = next((one for one in path.absolute().parents if one.is_dir()), None)
    try:
        free = shutil.disk_usage(folder or "/").free
    except OSError:
        return ""
    missing = "" if size is None or size <= free else f", {size - free:,} too few"
    return f" ({free:,} bytes free{missing})"


@contextlib.contextmanager
def new_file(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name when the block ends; what was there before stays until then.

    The bytes go to a temporary file in the same folder, which is synchronised to disk and renamed, or removed if
    anything fails, an interrupt included.

    Args:
        path: the file, in an existing folder.
        size: the bytes that will be written, if they are known, for the message on a full disk.

    Raises:
        WriteError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.temporary")
    with writing(path, size):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # an interrupt included
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    _synchronise_folder(path.parent)


def _synchronise_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
