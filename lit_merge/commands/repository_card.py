"""The ``README.md`` of a repository on the Hub: one block per file, between markers; the rest belongs to the user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lit_merge.errors import HubError

__all__ = ["RepositoryCard", "split_card", "updated_card"]

_FRONT = re.compile(r"\A---[ \t]*\r?\n(?P<front>.*?)(?<=\n)---[ \t]*(\r?\n|\Z)", re.DOTALL)
_MARKER = "<!-- lit-merge: "


@dataclass(frozen=True)
class RepositoryCard:
    """A repository's card.

    Attributes:
        text: of the whole file.
        note: what was done to the one that was there.
    """

    text: str
    note: str


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata at the top of a card, empty if there are none or they are malformed, and the text below them."""
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        front = yaml.safe_load(found["front"])
    except (yaml.YAMLError, RecursionError):
        front = None
    return front if isinstance(front, dict) else {}, text[found.end() :]


def updated_card(
    existing: str | None, front: Mapping[str, Any], title: str, blocks: Mapping[str, str], licence: str | None
) -> RepositoryCard:
    """Put the blocks of files into a repository's card, and leave everything that a user wrote as it is.

    A card without text gets it all. In one that has blocks, those of the same files are replaced and new ones are put
    behind the last; metadata and other text stay. A text without any block is somebody's own and stays as a whole.

    Args:
        existing: the card that is there, or None.
        front: the metadata of a new card; what a card without text has already counts more.
        title: of a new card.
        blocks: path of a file in the repository -> what is said of it, Markdown.
        licence: an identifier of the Hub such as ``apache-2.0``; put in where the card has none.

    Raises:
        HubError: the card names another licence, or has one of two markers.
    """
    known, body = split_card(existing or "")
    if licence is not None and known.get("license", licence) != licence:
        raise HubError(
            f"README.md: expected the license {licence}, got {known['license']} in the card that is there. "
            "Change it there first, or leave license out."
        )
    wrapped = {path: f"{_begin(path)}\n{_harmless(text).strip()}\n{_end(path)}" for path, text in blocks.items()}
    if not body.strip():
        chosen = {"license": licence} if licence else {}
        top = {**chosen, **front, **known, **chosen}
        heading = [] if next(iter(blocks.values()), "").startswith("# ") else [f"# {title}"]
        sections = [f"---\n{yaml.safe_dump(top, sort_keys=False, allow_unicode=True)}---", *heading, *wrapped.values()]
        return RepositoryCard("\n\n".join(sections) + "\n", "written")
    text = existing or ""
    if licence is not None and "license" not in known:
        text = _with_licence(text, licence)
    if _MARKER not in body:
        return RepositoryCard(text, "left as it is, as it has a text of its own")
    for path, block in wrapped.items():
        text = _with_block(text, path, block)
    return RepositoryCard(text, f"{', '.join(blocks)} replaced in it, the rest left as it is")


def _begin(path: str) -> str:
    return f"{_MARKER}{path} -->"


def _end(path: str) -> str:
    return f"<!-- lit-merge end: {path} -->"


def _harmless(text: str) -> str:
    """A text that cannot be taken for a marker."""
    return text.replace("<!-- lit-merge", "<!-- lit merge")


def _with_block(text: str, path: str, block: str) -> str:
    begin, end = text.find(_begin(path)), text.find(_end(path))
    if begin < 0 and end < 0:  # behind the last one
        last = list(re.finditer(r"<!-- lit-merge end: .*? -->", text))
        place = last[-1].end() if last else len(text)
        return f"{text[:place]}\n\n{block}{text[place:]}"
    if not 0 <= begin < end:
        raise HubError(
            f"README.md: expected {_begin(path)} and behind it {_end(path)}, got one of them or another order. "
            "Put both around what may be replaced, or remove both."
        )
    return text[:begin] + block + text[end + len(_end(path)) :]


def _with_licence(text: str, licence: str) -> str:
    """The license as the last line of the metadata; nothing else changes."""
    found = _FRONT.match(text)
    if found is None:
        return f"---\nlicense: {licence}\n---\n{text}"
    place = found.end("front")
    return f"{text[:place]}license: {licence}\n{text[place:]}"
