"""The ``README.md`` of a repository on the Hub: one block per file, between markers; the rest belongs to the user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lit_merge.errors import HubError

__all__ = ["merged_card", "split_card"]


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata at the top of a card, and the text below them."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

    if not REGEX_YAML_BLOCK.search(text):
        return {}, text
    card = ModelCard(text, ignore_metadata_errors=True)
    return card.data.to_dict(), card.text


def merged_card(
    existing: str | None, front: Mapping[str, Any], title: str, blocks: Mapping[str, str], licence: str | None
) -> tuple[str, str]:
    """Put the blocks of files into a repository's card, and leave everything that a user wrote as it is.

    A card without text gets it all. In one that has blocks, those of the same files are replaced and new ones are put
    after the last; metadata and other text stay. A text without any block is somebody's own and stays as a whole.

    Args:
        existing: the card that is there, or None.
        front: the metadata of a new card; what a card without text has already counts more.
        title: of a new card.
        blocks: path of a file in the repository -> what is said of it, Markdown.
        licence: an identifier of the Hub such as ``apache-2.0``; put in where the card has none.

    Returns:
        The card's text, and what was done to the one that was there.

    Raises:
        HubError: the card names another licence, or has one of two markers.
    """
    known, body = split_card(existing or "")
    if licence is not None and known.get("license", licence) != licence:
        raise HubError(
            f"README.md: expected the license {licence}, got {known['license']} in the card that is there. "
            "Change it there first, or leave license out."
        )
    chosen = {"license": licence} if licence else {}
    if not body.strip():
        heading = "" if next(iter(blocks.values()), "").startswith("# ") else f"# {title}\n\n"
        text = "\n\n".join(_wrapped(path, block) for path, block in blocks.items())
        return _with_metadata({**chosen, **front, **known}, f"\n{heading}{text}\n"), "written"
    text = existing or ""
    if licence is not None and "license" not in known:
        text = _with_metadata({**known, **chosen}, body)
    if "<!-- lit-merge: " not in body:
        return text, "left as it is, as it has a text of its own"
    for path, block in blocks.items():
        text = _with_block(text, path, _wrapped(path, block))
    return text, f"{', '.join(blocks)} replaced in it, the rest left as it is"


def _with_metadata(metadata: Mapping[str, Any], text: str) -> str:
    from huggingface_hub import CardData

    return f"---\n{CardData(**metadata).to_yaml()}\n---\n{text}"


def _wrapped(path: str, block: str) -> str:
    """A block between its markers, with no text that could be taken for a marker."""
    harmless = block.replace("<!-- lit-merge", "<!-- lit merge").strip()
    return f"<!-- lit-merge: {path} -->\n{harmless}\n<!-- lit-merge end: {path} -->"


def _with_block(text: str, path: str, block: str) -> str:
    begin, end = (f"<!-- lit-merge{what}: {path} -->" for what in ("", " end"))
    if begin not in text and end not in text:  # after the last one
        last = [found.end() for found in re.finditer(r"<!-- lit-merge end: .*? -->", text)]
        position = last[-1] if last else len(text)
        return f"{text[:position]}\n\n{block}{text[position:]}"
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed:
        raise HubError(
            f"README.md: expected {begin} and after it {end}, got one of them or another order. "
            "Put both around what may be replaced, or remove both."
        )
    return before + block + after
