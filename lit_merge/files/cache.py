"""What can be computed again, on disk: one file per result, found by all that the result depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.errors import FileFormatError
from lit_merge.files.cache_directory import cache_directory
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.files.text import read_json, write_text
from lit_merge.params import Params

__all__ = ["Cache", "cache_directory"]


class Cache:
    """Results of one kind, as tensors or as JSON.

    A file appears whole or not at all, several processes may write the same one at once, and one that is damaged or
    belongs to another key counts as missing. Everything may be deleted at any time.

    Args:
        kind: the folder below :func:`cache_directory`.
        folder: another one, created if it is missing.

    Raises:
        ConfigurationError: the folder cannot be created.

    Examples:
        >>> cache = Cache("squares")
        >>> key = cache.key([1, "version of the computation", 12])
        >>> cache.write_value(key, 144)
        >>> cache.value(key)
        144
    """

    def __init__(self, kind: str, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = cache_directory(kind) if folder is None else Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(content: Any) -> str:
        """SHA-256 of the JSON of everything that a result depends on, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def has_tensors(self, key: str) -> bool:
        """Whether there is a file under this key, which may be damaged."""
        return self._path(key, "safetensors").exists()

    def tensors(self, key: str) -> Params | None:
        """The tensors under this key, all bytes verified, mapped rather than in memory; None if there are none."""
        try:
            stored = LazyTensors(self._path(key, "safetensors"), verify=True)
            return dict(stored) if stored.metadata.get("key") == key else None
        except FileFormatError:  # also if another process has replaced it by now
            return None

    def write_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors.

        Raises:
            WriteError: the disk is full or not writable.
        """
        write_tensors(self._path(key, "safetensors"), tensors, {"key": key})

    def value(self, key: str) -> Any:
        """The plain value under this key; None if there is none."""
        try:
            found = read_json(self._path(key, "json"))
        except (OSError, ValueError):
            return None
        return found.get("value") if isinstance(found, dict) and found.get("key") == key else None

    def write_value(self, key: str, value: Any) -> None:
        """Store a plain value.

        Raises:
            WriteError: the disk is full or not writable.
        """
        write_text(self._path(key, "json"), json.dumps({"key": key, "value": value}) + "\n")

    def _path(self, key: str, ending: str) -> Path:
        return self.folder / f"{key}.{ending}"
