"""The digest of a file's content, which its header states.

BLAKE3: as strong as SHA-256, with which earlier versions wrote, and several times as fast where the processor has no
instructions for that one; adding up task vectors takes less time than SHA-256 there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from blake3 import blake3

__all__ = ["CONTENT_KEY", "CONTENT_KEYS", "Digest", "content_entry", "new_digest"]


class Digest(Protocol):
    """A hash that takes bytes in parts."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far, 64 hexadecimal digits."""


CONTENT_KEY = "content_blake3"
"""The metadata entry that holds the content digest: of names, dtypes, shapes, bytes and other metadata."""

_NEW: dict[str, Callable[[], Digest]] = {CONTENT_KEY: blake3, "content_sha256": hashlib.sha256}

CONTENT_KEYS = tuple(_NEW)
"""The entries that are read: that of this version, then of earlier ones."""


def content_entry(entries: Mapping[str, Any]) -> tuple[str, str]:
    """The entry with a content digest and the digest, ``("", "")`` if there is none."""
    return next(((key, str(entries[key])) for key in CONTENT_KEYS if key in entries), ("", ""))


def new_digest(key: str = CONTENT_KEY) -> Digest:
    """The hash of an entry, of no bytes yet."""
    return _NEW[key]()
