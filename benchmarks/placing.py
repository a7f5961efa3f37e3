"""Putting a written table where a page of docs has room for it."""

from __future__ import annotations

from pathlib import Path

from lit_merge.files.text import write_text

__all__ = ["place_between"]


def place_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page, each on a line of its own.

    Raises:
        ValueError: the page lacks one of them.
    """
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{page}: expected the marks {begin} and {end}, got a page without. Add them.")
    write_text(page, f"{head}{begin}\n\n{text}\n\n{end}{tail}")
