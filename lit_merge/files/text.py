"""Text on disk: written atomically, read up to a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_merge.files.writing import new_file, writing

__all__ = ["read_json", "unique_items", "write_text"]

_LONGEST_JSON = 16 << 20
_MOST_BRACKETS = 1_000_000


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all, in a folder that is created if it is missing.

    Raises:
        WriteError: the disk is full or not writable.
    """
    content = text.encode()
    with writing(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, len(content)) as file:
        file.write(content)


def read_json(path: Path) -> Any:
    """Read a JSON file that need not be trusted.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, names a key twice, is nested too deeply, or is longer than 16 MiB.
    """
    with path.open("rb") as file:
        raw = file.read(_LONGEST_JSON + 1)
    if len(raw) > _LONGEST_JSON or raw.count(b"[") + raw.count(b"{") > _MOST_BRACKETS:
        raise ValueError("too long")
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique_items)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def unique_items(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object as a dict.

    Raises:
        ValueError: a key is there twice.
    """
    items = dict(pairs)
    if len(items) != len(pairs):
        raise ValueError("a key that is there twice")
    return items
