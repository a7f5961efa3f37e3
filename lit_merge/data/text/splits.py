"""Which rows are train, val and test: by a rule of the literature's programs, or by the hash of their texts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lit_merge.data.fractions import counts_of
from lit_merge.errors import ConfigurationError, DataError

__all__ = ["SPLITS", "Part", "divided", "part_of"]

SPLITS = ("train", "val", "test")
_Order = Literal["stored", "python", "numpy"]


@dataclass(frozen=True)
class Part:
    """Rows of a stored split.

    Attributes:
        of: the stored split.
        order: the rows' order before some are taken: ``stored``, or shuffled as programs do with a seed, by
            ``random.shuffle`` (``python``) or ``numpy.random.RandomState.permutation`` (``numpy``).
        seed: of that order.
        start: the first row taken; below 1 and with a decimal point, a fraction of the rows, rounded down.
        stop: the row after the last one; None for all.
    """

    of: str
    order: _Order = "stored"
    seed: int = 0
    start: int | float = 0
    stop: int | float | None = None

    def rows(self, count: int) -> list[int]:
        """Which of ``count`` rows, in their order."""
        places = list(range(count))
        if self.order == "python":
            random.Random(self.seed).shuffle(places)
        elif self.order == "numpy":
            places = np.random.RandomState(self.seed).permutation(count).tolist()
        first, last = (
            int(edge * count) if isinstance(edge, float) else edge
            for edge in (self.start, count if self.stop is None else self.stop)
        )
        return places[first:last]


def part_of(setting: str | Mapping[str, Any], split: str) -> Part:
    """What a setting of ``splits`` says: the name of a stored split, or the arguments of a :class:`Part`.

    Raises:
        ConfigurationError: it says something else.
    """
    if isinstance(setting, str):
        return Part(setting)
    try:
        part = Part(**setting)
    except TypeError as error:
        raise ConfigurationError(
            f"splits.{split}: expected a name, or of, order, seed, start and stop, got {dict(setting)!r}. Correct it."
        ) from error
    if part.order not in get_args(_Order):
        raise ConfigurationError(
            f"splits.{split}.order: expected one of {', '.join(get_args(_Order))}, got {part.order!r}. Change it."
        )
    return part


def divided(
    texts: Sequence[Hashable], labels: Sequence[Any], fractions: Sequence[float], seed: int, where: str
) -> dict[str, list[int]]:
    """Rows divided class by class, in the order of the SHA-256 of ``"seed/text"``; equal texts stay together.

    Args:
        texts: of N rows: what must not be in two splits.
        labels: of N rows; a text with several has the first one's class.
        fractions: of train, val and test.
        seed: of the order.
        where: the table's place, for the message.

    Returns:
        Split -> rows in ascending order. At least one text of every class goes to each split whose fraction is not 0.

    Raises:
        DataError: a class has fewer different texts than there are splits.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for index, text in enumerate(texts):
        rows_of.setdefault(text, []).append(index)
    by_class: dict[Any, list[Hashable]] = {}
    for text, rows in rows_of.items():
        by_class.setdefault(labels[rows[0]], []).append(text)
    needed = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label, own in by_class.items():
        if len(own) < len(needed):
            raise DataError(
                f"{where}: expected at least {len(needed)} different texts of each class, one for each of "
                f"{', '.join(needed)}, got {len(own)} of {label!r}. Add some, or remove the class."
            )
        own.sort(key=lambda text: hashlib.sha256(f"{seed}/{text}".encode("utf-8", "surrogatepass")).hexdigest())
        start = 0
        for split, count in zip(SPLITS, counts_of(len(own), fractions), strict=True):
            found[split] += [row for text in own[start : start + count] for row in rows_of[text]]
            start += count
    return {split: sorted(rows) for split, rows in found.items()}
