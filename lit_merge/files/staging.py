"""Several files that appear together or not at all, and what an earlier, killed command left of such an attempt."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lit_merge.errors import ConfigurationError, WriteError
from lit_merge.files.writing import writing

__all__ = ["remove_abandoned", "staged"]

_STAGING = re.compile(r"\.[0-9a-f]{16}\.temporary")
_OWNER = ".owner"  # locked for as long as the process that stages is alive
_INDEX = ".safetensors.index.json"
_TURNS = 200  # of 50 ms, that moving files may take
_LONG = 24 * 3600.0  # seconds after which what nobody can be asked about is abandoned


@contextlib.contextmanager
def staged(
    folder: Path,
    stale: Callable[[], Sequence[Path]] = tuple,
    last: Callable[[Path], object] = lambda path: path.name,
    size: int | None = None,
) -> Iterator[Path]:
    """A temporary folder whose files are moved into ``folder`` at the end, or of which nothing is left.

    Files in folders inside it are moved into folders of the same names.

    Folders that killed commands have left in the same place are removed first. Of several commands one moves its files
    after the other.

    Args:
        folder: is created if it is missing.
        stale: called when nobody else moves files into it; the files that it returns are removed before the new ones
            are moved, in this order. What it raises ends it all.
        last: sorts the files; those that sort last are moved last.
        size: the bytes that will be written, if they are known, for the message on a full disk.

    Raises:
        ConfigurationError: the folder cannot be created.
        WriteError: the disk is full or not writable.
    """
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    temporary = folder / f".{secrets.token_hex(8)}.temporary"
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ConfigurationError(
                f"output: expected a folder that can be created, got {folder} ({error.strerror}). Choose another one."
            ) from error
        # Locked before it has its name: without a lock it would be taken for abandoned.
        with writing(folder), (temporary / f"{_OWNER}.new").open("xb") as owner:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(owner, fcntl.LOCK_EX)
            (temporary / f"{_OWNER}.new").rename(temporary / _OWNER)
            remove_abandoned(folder)
            with writing(folder, size):
                yield temporary
            # File systems list in orders of their own.
            by_name = sorted(path for path in temporary.rglob("*") if _is_staged(path))
            files = sorted(by_name, key=last)  # type: ignore[arg-type]
            with writing(folder), _alone(folder):
                outdated = stale()
                targets = {path: folder / path.relative_to(temporary) for path in files}
                replaced = set(targets.values())
                for target in replaced:
                    created[:0] = [place for place in target.parents if not place.exists()]
                    target.parent.mkdir(parents=True, exist_ok=True)
                for path in outdated:
                    if path not in replaced or path.name.endswith(_INDEX):  # which names the others
                        path.unlink()
                        _remove_empty(path.parent, folder)
                for path, target in targets.items():
                    path.replace(target)
        shutil.rmtree(temporary, ignore_errors=True)  # somebody else may, as it is empty and not locked
    except BaseException as error:  # an interrupt included
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, WriteError):  # named by where it would have been
            error.args = (str(error).replace(str(temporary), str(folder)),)
        for place in created:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else moves files into a folder; but for a few seconds, whatever else may have locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(_TURNS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _is_staged(path: Path) -> bool:
    return path.is_file() and path.name != _OWNER


def _remove_empty(place: Path, folder: Path) -> None:
    """Remove a folder inside ``folder`` from which the last file has gone."""
    with contextlib.suppress(OSError):
        if place != folder:
            place.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Remove staging folders in ``folder`` whose process has ended, and temporary files of a day ago."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _STAGING.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # somebody else removes it, or its files are not ours
            if path.is_dir() and _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and _is_old(path):
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    try:
        owner = (path / _OWNER).open("rb")
    except FileNotFoundError:
        return _is_old(path)
    with owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _LONG
