"""Parts of an analysis that are done, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lit_merge.evaluation.analysis.processes import Processes
from lit_merge.files.text import write_text

__all__ = ["Record", "file_name"]

# Part of every key: raise it when a computation changes.
_VERSION = 1


class Record:
    """One JSON file with the parts that are done, rewritten whole whenever one more is.

    A file that belongs to something else, or is damaged, counts as empty. With several processes the first one reads
    and writes, and all know the same parts.

    Args:
        path: of the file.
        content: all that the parts depend on, as JSON has it.
        processes: who shares the work.
    """

    def __init__(self, path: Path, content: Any, processes: Processes) -> None:
        text = json.dumps([_VERSION, content], sort_keys=True)
        self._path, self._key = path, hashlib.sha256(text.encode()).hexdigest()
        self._processes = processes
        self._parts: dict[str, Any] = processes.from_first(self._read() if processes.is_first else {})

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __setitem__(self, name: str, part: Any) -> None:
        self._parts[name] = part
        if self._processes.is_first:
            write_text(self._path, json.dumps({"key": self._key, "parts": self._parts}) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["key"] == self._key and isinstance(found["parts"], dict):
                return dict(found["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {}


def file_name(text: str) -> str:
    """The text, e.g. a task's name, as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)
