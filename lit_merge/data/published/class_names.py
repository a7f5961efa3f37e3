"""Which class a folder, a list or a column means: by its name, never by its position."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lit_merge.data.published.registry import DataSetEntry
from lit_merge.errors import DataError, first_few

__all__ = ["checked_labels", "labels_by_name", "labels_in_order"]


def labels_by_name(names: Sequence[str], entry: DataSetEntry, where: object) -> np.ndarray:
    """The labels that the classes of a data set's files have in the registry.

    A name is that of a class if it is spelt as the class, or as the class's folder, but for case, punctuation and,
    where no two classes then fall together, the order of its words.

    Args:
        names: of the files' classes, every class once.
        entry: the data set.
        where: what has these names, for messages.

    Returns:
        int64, ``[C]``: the label of each name.

    Raises:
        DataError: classes are missing, surplus or there twice; they are named.
    """
    found = _found(names, _known(entry))
    surplus = [name for name, label in zip(names, found, strict=True) if label < 0]
    twice = [name for index, name in enumerate(names) if found[index] >= 0 and found[index] in found[:index]]
    spelling = entry.folder_classes or entry.classes
    missing = [spelling[label] for label in sorted(set(range(len(entry.classes))) - set(found))]
    if surplus or twice or missing:
        got = [
            f"{what} {first_few(listed)}"
            for what, listed in (("without", missing), ("with", surplus), ("twice", twice))
            if listed
        ]
        raise DataError(
            f"{where}: expected the {len(entry.classes)} classes of {entry.title}, got {len(names)}, "
            f"{' and '.join(got)}. Complete or rename them, or prepare the data set anew."
        )
    return np.asarray(found, np.int64)


def labels_in_order(names: Sequence[str], entry: DataSetEntry, where: object) -> np.ndarray:
    """The labels of numbered classes: by name if all names are known, otherwise as they are numbered.

    The registry says that the numbers are its own labels; the names, often spelt in another way, only have to bear
    this out: none may be that of another class, and at least half must be known, unless they are numbers themselves.

    Args:
        names: of the numbered classes, in their order; several spellings may be joined with commas.
        entry: the data set.
        where: what has these names, for messages.

    Returns:
        int64, ``[C]``: the label of each number.

    Raises:
        DataError: there are more or fewer names than classes, or they are those of other classes.
    """
    numbers = list(map(str, range(len(entry.classes))))
    known = _known(entry)
    found = _found(names, known)
    if len(set(found)) == len(entry.classes) == len(names) and -1 not in found:
        return np.asarray(found, np.int64)
    moved = [name for number, name in enumerate(names) if found[number] not in (-1, number)]
    agreed = sum(
        any(known.get(key) == number for spelling in (name, *name.split(",")) for key in _keys(spelling))
        for number, name in enumerate(names)
    )
    if len(names) == len(numbers) and (list(names) == numbers or (not moved and 2 * agreed >= len(names))):
        return np.arange(len(names))
    wrong = moved or [name for name, label in zip(names, found, strict=True) if label < 0] or names
    raise DataError(
        f"{where}: expected the {len(entry.classes)} classes of {entry.title} in their order, got {len(names)}, with "
        f"{first_few(wrong)} where they do not belong. It may be another data set's: fetch it again."
    )


def checked_labels(labels: np.ndarray, entry: DataSetEntry, where: object) -> np.ndarray:
    """Labels that have no names, if they are labels of the data set.

    Args:
        labels: integers ``[N]``.
        entry: the data set.
        where: what they were read from, for messages.

    Returns:
        int64, ``[N]``.

    Raises:
        DataError: a label is out of range.
    """
    labels = np.asarray(labels)
    if labels.size and (labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(entry.classes)):
        wrong = labels.dtype if labels.dtype.kind not in "iu" else f"{labels.min()} to {labels.max()}"
        raise DataError(
            f"{where}: expected labels in [0, {len(entry.classes)}) of {entry.title}, got {wrong}. "
            "It may be another data set's: fetch it again."
        )
    return labels.astype(np.int64)


def _found(names: Sequence[str], known: dict[str, int]) -> list[int]:
    """The label of each name; -1 of those that are not known."""
    return [next((known[key] for key in _keys(name) if known.get(key, -1) >= 0), -1) for name in names]


def _known(entry: DataSetEntry) -> dict[str, int]:
    """Key -> label; -1 where several classes share it."""
    known: dict[str, int] = {}
    for spellings in filter(None, (entry.folder_classes, entry.classes)):
        own: dict[str, int] = {}
        for label, name in enumerate(spellings):
            for key in _keys(name):
                own[key] = label if own.get(key, label) == label else -1
        known = {**own, **known}
    return known


def _keys(name: str) -> tuple[str, str]:
    words = re.findall(r"\w+", name.casefold().replace("_", " "))
    return " ".join(words), "|".join(sorted(words))
