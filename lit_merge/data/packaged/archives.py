"""Files of packages, read as data: wheels, npm's tarballs, Debian packages, and what is packed inside of them.

Nothing is unpacked to the disk here and nothing of a package is imported or run. Names that leave the archive, links
in place of what is read, and members that are larger than they may be are refused.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from lit_merge.errors import FileFormatError, one_line

__all__ = ["expanded", "members"]

_LARGEST = 256 << 20
_MOST = 100_000
_CHUNK = 1 << 20
_AR, _AR_HEADER = b"!<arch>\n", 60


def members(
    path: Path, wanted: Callable[[str], bool], largest: int = _LARGEST, file: BinaryIO | None = None
) -> Iterator[tuple[str, bytes]]:
    """The members of an archive that are wanted, in its order: name and content.

    Args:
        path: a ``.whl`` or ``.zip``, a ``.tgz``, or a ``.deb`` (its data member).
        wanted: says of a name, without ``./`` in front, whether that member is.
        largest: bytes of a wanted member at most, uncompressed.
        file: the archive's bytes, where it is itself a member of another one; the path is for its kind and messages.

    Raises:
        FileFormatError: it is damaged or of another kind, a name is absolute or has ``..``, a wanted member is a link
            or larger than ``largest``, or there are more than 100,000 members.
    """
    with _reading(path), file or path.open("rb") as opened:
        read = {".whl": _zip, ".zip": _zip, ".tgz": _tar, ".deb": _deb}.get(path.suffix)
        if read is None:
            raise FileFormatError(f"{path}: expected a .whl, .zip, .tgz or .deb file. Name it as its registry does.")
        yield from read(path, opened, wanted, largest)


def expanded(content: bytes, name: str, largest: int = _LARGEST) -> bytes:
    """What a member ending in ``.gz``, ``.dz`` or ``.bz2`` holds; any other is returned as it is.

    Raises:
        FileFormatError: it is damaged, or holds more than ``largest`` bytes.
    """
    if not name.endswith((".gz", ".dz", ".bz2")):
        return content
    with _reading(Path(name)):
        opened = bz2.open if name.endswith(".bz2") else gzip.open
        with cast(IO[bytes], opened(io.BytesIO(content), "rb")) as file:
            found = file.read(largest + 1)
    if len(found) > largest:
        raise FileFormatError(f"{name}: expected at most {largest:,} bytes in it, got more. Fetch the package again.")
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever the readers of archives raise, in one line."""
    try:
        yield
    except (
        *(zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error),
        *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
    ) as error:
        raise FileFormatError(
            f"{path}: expected a readable archive, got {one_line(error, 200)}. Fetch it again."
        ) from error


def _checked(path: Path, count: int, name: str) -> str:
    """A member's name without ``./``; refused if it leads out of the archive."""
    plain = name.removeprefix("./")
    if plain.startswith("/") or "\\" in plain or ".." in plain.split("/"):
        raise FileFormatError(f"{path}: expected names inside the archive, got {name[:200]!r}. Do not use this file.")
    if count > _MOST:
        raise FileFormatError(f"{path}: expected at most {_MOST:,} members, got more. Do not use this file.")
    return plain


def _too_large(path: Path, name: str, size: int, largest: int) -> FileFormatError:
    return FileFormatError(f"{path}: expected at most {largest:,} bytes in {name}, got {size:,}. Do not use this file.")


def _zip(path: Path, file: BinaryIO, wanted: Callable[[str], bool], largest: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        named = [(_checked(path, len(infos), info.filename), info) for info in infos]
        for name, info in named:
            if info.is_dir() or not wanted(name):
                continue
            if info.file_size > largest:  # zipfile reads no more than this, whatever the member holds
                raise _too_large(path, name, info.file_size, largest)
            with archive.open(info) as member:
                yield name, member.read()


def _tar(
    path: Path, file: BinaryIO, wanted: Callable[[str], bool], largest: int, mode: str = "r|gz"
) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for count, info in enumerate(archive):
            name = _checked(path, count, info.name)
            if info.isdir() or not wanted(name):
                continue
            if not info.isreg():
                raise FileFormatError(f"{path}: expected a file as {name}, got a link or device. Do not use this file.")
            if info.size > largest:
                raise _too_large(path, name, info.size, largest)
            member = archive.extractfile(info)
            assert member is not None  # it is a regular file
            yield name, member.read()


def _deb(path: Path, file: BinaryIO, wanted: Callable[[str], bool], largest: int) -> Iterator[tuple[str, bytes]]:
    """An ar archive of ``debian-binary``, ``control.tar.*`` and ``data.tar.*``; deb(5) and ar(5)."""
    if file.read(len(_AR)) != _AR:
        raise FileFormatError(f"{path}: expected a Debian package, got no ar archive. Fetch it again.")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER and header.endswith(b"`\n"):
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        if size < 0:
            break
        start = file.tell()
        if name.startswith("data.tar"):
            mode = {"data.tar.xz": "r|xz", "data.tar.gz": "r|gz", "data.tar": "r|"}.get(name)
            if mode is None:
                raise FileFormatError(f"{path}: expected data.tar.xz or data.tar.gz in it, got {name}. Fetch another.")
            yield from _tar(path, cast(BinaryIO, _Slice(file, size)), wanted, largest, mode)
            return
        file.seek(start + size + size % 2)
    raise FileFormatError(f"{path}: expected data.tar.xz in a Debian package, got none. Fetch it again.")


class _Slice:
    """The next bytes of a file, as many as an ar header says."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(self._left, size if size >= 0 else _CHUNK))
        self._left -= len(content)
        return content
