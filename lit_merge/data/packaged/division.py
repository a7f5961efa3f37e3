"""From the texts of a source to three splits that share no text: a pure function of the texts alone.

Two texts are the same if their first 30 words are, but for case, digits, punctuation and addresses. What is the same
under two labels is left out, otherwise one of them stays; so does one of several that are nearly the same: that share
five words in a row and 70 % of all their words. The SHA-256 of the 30 words says which split a text belongs to (four
sevenths train, one validates, two test) and in which order texts are taken when there are more than fit.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["CAPS", "SPLITS", "Example", "divided", "same_text"]

SPLITS = ("train", "val", "test")
CAPS: Mapping[str, int] = MappingProxyType({"train": 4000, "val": 1000, "test": 2000})
"""Examples of a split at most."""
_SHARES = ("train",) * 4 + ("val",) + ("test",) * 2
_WORDS = 30
_RUN, _NEAR, _COMMON = 5, 0.7, 50
_FEWEST_WORDS = 3
_LONGEST = 1000


@dataclass(frozen=True)
class Example:
    """One text and its label; the label is empty where there are none."""

    text: str
    label: str = ""


def same_text(text: str) -> str:
    """The words that make a text the same as another one: the first 30, lower case, letters alone."""
    plain = re.sub(r"https?://\S+|www\.\S+|[@#]\w+", " ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(re.findall(r"[^\W\d_]+", plain)[:_WORDS])


def divided(
    pairs: Iterable[tuple[str, str]],
    labels: Sequence[str],
    per_class: int | None = None,
    longest: int | None = _LONGEST,
) -> dict[str, list[Example]]:
    """Divide the texts of a source.

    Args:
        pairs: texts and labels; texts of another label, or of fewer than three words, are left out.
        labels: that are kept.
        per_class: texts of a class at most, over all splits.
        longest: characters that are kept of a text, cut between words; None for all.

    Returns:
        Split -> examples, mixed by their hashes. Where a split has more than :data:`CAPS`, texts of the largest classes
        are left out.
    """
    wanted = frozenset(labels)
    found: dict[str, Example | None] = {}
    for text, label in pairs:
        plain = " ".join(text.split())
        words = same_text(plain)
        if label not in wanted or words.count(" ") < _FEWEST_WORDS - 1:
            continue
        known = found.setdefault(words, Example(_cut(plain, longest), label))
        if known is None or known.label != label:
            found[words] = None
    hashed = sorted((_hash(words), example) for words, example in found.items() if example is not None)
    splits: dict[str, dict[str, list[tuple[str, Example]]]] = {split: {one: [] for one in labels} for split in SPLITS}
    counts = dict.fromkeys(labels, 0)
    kept = _Kept()
    for digest, example in hashed:
        if (per_class is None or counts[example.label] < per_class) and kept.add(example.text):
            counts[example.label] += 1
            splits[_SHARES[int(digest[:15], 16) % len(_SHARES)]][example.label].append((digest, example))
    return {split: _levelled(list(by_label.values()), CAPS[split]) for split, by_label in splits.items()}


class _Kept:
    """The texts that were kept so far, found by any five words in a row."""

    def __init__(self) -> None:
        self._words: list[frozenset[str]] = []
        self._with: dict[tuple[str, ...], list[int]] = {}

    def add(self, text: str) -> bool:
        """Keep a text unless one that is nearly the same was kept."""
        words = re.findall(r"[^\W\d_]+", text.casefold())
        own = frozenset(words)
        runs = {tuple(words[start : start + _RUN]) for start in range(max(1, len(words) - _RUN + 1))}
        near = {number for run in runs for number in self._with.get(run, ())}
        for number in near:
            other = self._words[number]
            if len(own & other) >= _NEAR * len(own | other):
                return False
        for run in runs:
            holders = self._with.setdefault(run, [])
            if len(holders) < _COMMON:
                holders.append(len(self._words))
        self._words.append(own)
        return True


def _levelled(classes: Sequence[list[tuple[str, Example]]], most: int) -> list[Example]:
    """The first of every class, as many of each as leave ``most`` in all, mixed by their hashes read backwards."""
    low, high = 0, max(map(len, classes), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(len(one), middle) for one in classes) <= most:
            low = middle
        else:
            high = middle - 1
    taken = [(digest[::-1], example) for one in classes for digest, example in one[:low]]
    return [example for _, example in sorted(taken, key=lambda pair: pair[0])]


def _hash(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


def _cut(text: str, longest: int | None) -> str:
    if longest is None or len(text) <= longest:
        return text
    return text[: longest + 1].rpartition(" ")[0] or text[:longest]
