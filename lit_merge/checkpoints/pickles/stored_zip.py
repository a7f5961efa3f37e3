"""Zip archives whose entries are read in place: a directory that is checked before anything is believed.

The format is PKWARE's APPNOTE 6.3 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT). Nothing is ever
decompressed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from lit_merge.errors import FileFormatError
from lit_merge.files.file_parts import COPY_AGAIN, FileParts, printable

__all__ = ["StoredEntry", "stored_entries"]

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MOST_ENTRIES = 200_000
_LONGEST_DIRECTORY = 64 << 20
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """Where an entry's bytes are.

    Attributes:
        start: the first byte in the file.
        length: how many there are.
        checksum: their CRC-32 as the directory has it; 0 if the writer left it out.
        stored: False if they are compressed or encrypted.
    """

    start: int
    length: int
    checksum: int
    stored: bool


def stored_entries(parts: FileParts) -> dict[str, StoredEntry]:
    """Name -> position of all entries of a zip archive.

    Raises:
        FileFormatError: the archive is truncated or damaged, entries overlap, are outside the file or have the same
            name, the directory and the entries disagree, or there are more than 200,000 entries.
    """
    held = parts.opened("its directory")  # one open file for all the reads
    try:
        return _entries(parts)
    except (struct.error, UnicodeDecodeError) as error:
        raise _damaged(parts, "a directory of something else") from error
    except ValueError as error:
        raise _damaged(parts, str(error)) from error
    finally:
        del held


def _entries(parts: FileParts) -> dict[str, StoredEntry]:
    count, length, begin = _directory_place(parts)
    directory = parts.bytes(begin, length)
    entries: dict[str, StoredEntry] = {}
    spans = []
    position = 0
    for _ in range(count):
        fields = _CENTRAL.unpack_from(directory, position)
        flags, method, checksum, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, comment_length, disk, local = *fields[10:14], fields[16]
        position += _CENTRAL.size
        raw = directory[position : position + name_length]
        extra = directory[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        if fields[0] != b"PK\1\2" or position > length:
            raise ValueError("a directory of something else")
        size, packed, local = _wide(size, packed, local, extra)
        name = raw.decode()
        if name in entries:
            raise ValueError(f"two entries {printable(name)}")
        if disk or local + _LOCAL.size > begin:
            raise ValueError(f"entry {printable(name)} outside the file")
        start = _data_start(parts, raw, method, local)
        if start + packed > begin:
            raise ValueError(f"entry {printable(name)} outside the file")
        stored = method == 0 and not flags & _ENCRYPTED
        if stored and size != packed:
            raise ValueError(f"entry {printable(name)} of two sizes")
        entries[name] = StoredEntry(start, packed, checksum, stored)
        spans.append((local, start + packed, name))
    if position != length:
        raise ValueError("a directory of another length")
    spans.sort()
    for (_, stop, name), (first, _, following) in pairwise(spans):
        if stop > first:
            raise ValueError(f"entries {printable(name)} and {printable(following)}, which overlap")
    return entries


def _directory_place(parts: FileParts) -> tuple[int, int, int]:
    """Number of entries, length and first byte of the central directory."""
    most = min(parts.size, _END.size + 0xFFFF)
    tail = parts.bytes(parts.size - most, most)
    found = tail.rfind(b"PK\5\6")
    while found >= 0 and (len(tail) - found < _END.size or _END.unpack_from(tail, found)[7] != len(tail) - found - 22):
        found = tail.rfind(b"PK\5\6", 0, found)
    if found < 0:
        raise ValueError("no directory at the end of it (truncated?)")
    end = parts.size - len(tail) + found
    _, disk, first_disk, here, count, length, begin, _ = _END.unpack_from(tail, found)
    locator = parts.bytes(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator[:4] == b"PK\6\7":
        _, disk, wide, _ = _LOCATOR.unpack(locator)
        magic, _, _, _, first_disk, other_disk, here, count, length, begin = _END_64.unpack(
            parts.bytes(wide, _END_64.size)
        )
        if magic != b"PK\6\6" or other_disk or wide + _END_64.size > end:
            raise ValueError("a directory of something else")
        end = wide
    if disk or first_disk or here != count or begin + length > end:
        raise ValueError("a directory outside the file")
    if count > _MOST_ENTRIES or length > _LONGEST_DIRECTORY:
        raise ValueError(f"{count:,} entries, more than the {_MOST_ENTRIES:,} that are read")
    return count, length, begin


def _wide(size: int, packed: int, local: int, extra: bytes) -> tuple[int, int, int]:
    """The three numbers, from the zip64 part of the extra field where they did not fit."""
    values = [size, packed, local]
    if 0xFFFFFFFF not in values:
        return size, packed, local
    position = 0
    while position < len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    (values[index],) = struct.unpack_from("<Q", extra, position + 4)
                    position += 8
            break
        position += 4 + length
    return values[0], values[1], values[2]


def _data_start(parts: FileParts, raw_name: bytes, method: int, local: int) -> int:
    """Where an entry's bytes begin, from the header in front of them."""
    header = parts.bytes(local, _LOCAL.size + len(raw_name))
    fields = _LOCAL.unpack_from(header)
    if fields[0] != b"PK\3\4" or fields[3] != method or header[_LOCAL.size :] != raw_name:
        raise ValueError(f"another entry than {printable(raw_name.decode())} in its place")
    return local + _LOCAL.size + fields[9] + fields[10]


def _damaged(parts: FileParts, got: str) -> FileFormatError:
    return FileFormatError(f"{parts.path}: expected a whole zip archive, got {got}. {COPY_AGAIN}")
