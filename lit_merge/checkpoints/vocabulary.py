"""The vocabulary that lies beside the weights of a language model: token -> row of the embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_merge.errors import FileFormatError

__all__ = ["Vocabulary", "differing_tokens", "vocabulary_of"]

Vocabulary = Mapping[str, int]
"""Token -> number."""

_LARGEST = 512 << 20  # bytes of a tokenizer's file


def vocabulary_of(folder: Path) -> Vocabulary | None:
    """What the files of a tokenizer in a folder say; None if there are none that can be read as data.

    ``tokenizer.json`` first, then ``vocab.json`` and ``vocab.txt``; ``added_tokens.json`` adds to the last two.

    Raises:
        FileFormatError: a file is there, and is not what its name says.
    """
    whole, names, lines = (folder / name for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    if whole.is_file():
        return _of_tokenizer(whole, _read(whole))
    if names.is_file():
        found = _tokens(names, _read(names))
    elif lines.is_file():
        text = lines.read_text(encoding="utf-8", errors="replace")
        found = {token: number for number, token in enumerate(text.removesuffix("\n").split("\n"))}
    else:
        return None
    added = folder / "added_tokens.json"
    return {**found, **(_tokens(added, _read(added)) if added.is_file() else {})}


def differing_tokens(first: Vocabulary, second: Vocabulary) -> list[str]:
    """Tokens that only one of them has, or that have another number in it, in the order of the first's numbers."""
    found = [token for token, number in first.items() if second.get(token) != number]
    return sorted(found, key=first.__getitem__) + [token for token in second if token not in first]


def _of_tokenizer(path: Path, content: Any) -> dict[str, int]:
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    found = _tokens(path, vocabulary)
    for one in content.get("added_tokens") or []:
        if isinstance(one, dict) and isinstance(one.get("content"), str) and isinstance(one.get("id"), int):
            found[one["content"]] = one["id"]
    return found


def _read(path: Path) -> Any:
    if path.stat().st_size > _LARGEST:
        raise FileFormatError(f"{path}: expected at most {_LARGEST >> 20} MiB, got more. Remove it.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: expected JSON, got something else. Save the tokenizer again.") from error


def _tokens(path: Path, content: Any) -> dict[str, int]:
    if not isinstance(content, dict) or not all(isinstance(number, int) for number in content.values()):
        raise FileFormatError(f"{path}: expected tokens with numbers, got something else. Save the tokenizer again.")
    return dict(content)
