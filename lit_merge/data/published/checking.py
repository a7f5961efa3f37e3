"""What `lit-merge data list` and `lit-merge data check` do: the data sets there are, and which are on the disk."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from lit_merge.data.packaged.preparation import found_files
from lit_merge.data.packaged.registry import PACKAGED, PACKAGED_BASES, PACKAGED_SUITES, PackagedModel, PackagedTexts
from lit_merge.data.published.registry import REGISTRY, SUITES, DataSetEntry, data_root
from lit_merge.data.published.text_registry import TEXT_SUITES, TEXT_TASKS, TextEntry
from lit_merge.errors import ConfigurationError, DataError, did_you_mean, first_few

__all__ = ["CheckReport", "CheckedDataSet", "check", "check_data_set", "chosen_entries", "list_data"]

_SPLITS = ("train", "val", "test")
_SHOWN = {"validation": "val", "validation_matched": "val", "challenge": "test"}
"""Stored split of texts -> the column that it is shown in."""

Entry = DataSetEntry | TextEntry | PackagedTexts | PackagedModel
"""What has a name that can be prepared."""


@dataclass(frozen=True)
class CheckedDataSet:
    """What was found of a data set.

    Attributes:
        name: of the data set.
        state: ``complete``, ``other counts``, ``damaged`` or ``missing``.
        problem: what is wrong, in one line; empty if it is complete.
        layout: how its files are arranged; empty if it is missing.
        path: where they are; empty if it is missing.
        classes: how many it has.
        counts: split -> images or texts found.
        expected: split -> images in the literature, or texts in this version.
    """

    name: str
    state: str
    problem: str = ""
    layout: str = ""
    path: str = ""
    classes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found.

    Attributes:
        data_sets: one per data set.
        json: whether it is shown as JSON.
        named: whether the data sets were asked for by name, so that a missing one is a failure.
    """

    data_sets: tuple[CheckedDataSet, ...]
    json: bool = False
    named: bool = True

    def describe(self) -> str:
        """A table, or JSON."""
        if self.json:
            return json_format.dumps([asdict(one) for one in self.data_sets], indent=2)
        rows: list[tuple[str, ...]] = [("data set", "state", "train", "val", "test", "classes", "where")]
        for one in self.data_sets:
            counts = [_counted(one, split) for split in _SPLITS]
            where = f"{one.path} ({one.layout})" if one.path else "lit-merge data prepare " + one.name
            rows.append((one.name, one.state, *counts, f"{one.classes:,}" if one.classes else "", where))
        problems = [one.problem for one in self.data_sets if one.problem and one.state != "missing"]
        return "\n".join([aligned(rows, right=(2, 3, 4, 5)), *problems])

    def refuse(self) -> None:
        """Raise if something is not as it should be.

        Raises:
            DataError: a data set that was asked for is missing, or one that was found is not complete.
        """
        wrong = [one for one in self.data_sets if one.state != "complete" and (self.named or one.state != "missing")]
        if len(wrong) == 1:
            raise DataError(wrong[0].problem)
        if wrong:
            states = first_few((f"{one.name} ({one.state})" for one in wrong), 30)
            raise DataError(f"data: expected {len(self.data_sets)} complete data sets, got {states}. Prepare them.")


def chosen_entries(names: Sequence[str]) -> list[Entry]:
    """The data sets of some names, each once; a suite such as ``clip8`` stands for its data sets.

    A suite of texts stands for the network that they are made for as well.

    Raises:
        ConfigurationError: a name is unknown; the nearest ones are named.
    """
    found: dict[str, Entry] = {}
    suites = {**SUITES, **{suite: one.tasks for suite, one in TEXT_SUITES.items()}}
    suites |= {suite: (*tasks, PACKAGED_BASES[suite]) for suite, tasks in PACKAGED_SUITES.items()}
    entries: dict[str, Entry] = {**REGISTRY, **TEXT_TASKS, **PACKAGED}
    for name in names:
        known = suites.get(name.lower(), (name.lower(),))
        if known[0] not in entries:
            hint = did_you_mean(name, [*suites, *entries], "`lit-merge data list` shows them.")
            raise ConfigurationError(f"names: expected data sets or suites ({', '.join(suites)}), got {name!r}. {hint}")
        found.update((one, entries[one]) for one in known)
    return list(found.values())


def list_data(names: list[str] | None = None) -> str:
    """Describe the data sets that can be tasks, and the texts and networks of packages.

    Args:
        names: of data sets or suites; None for all.

    Returns:
        A table: name, classes, images or texts in train, val and test, size of the download, suites, where it comes
        from.

    Raises:
        ConfigurationError: a name is unknown.
    """
    rows: list[tuple[str, ...]] = [("data set", "classes", "train", "val", "test", "GB", "suites", "from", "title")]
    for one in chosen_entries(names or [*REGISTRY, *TEXT_TASKS, *PACKAGED]):
        if isinstance(one, TextEntry):
            rows.append(_text_row(one))
            continue
        if not isinstance(one, DataSetEntry):
            rows.append(_packaged_row(one))
            continue
        suites = [suite for suite, members in SUITES.items() if one.name in members]
        sources = [f"torchvision ({one.torchvision})" if one.torchvision else "", one.hub or ""]
        counts = [f"{one.counts[split]:,}" if split in one.counts else "–" for split in _SPLITS]
        named = (", ".join(suites), ", ".join(filter(None, sources)), one.title)
        rows.append((one.name, f"{len(one.classes):,}", *counts, f"{one.gigabytes:g}", *named))
    return aligned(rows, right=(1, 2, 3, 4, 5))


def _text_row(one: TextEntry) -> tuple[str, ...]:
    by_split = {_SHOWN.get(split, split): f"{count:,}" for split, count in one.counts.items()}
    counts = [by_split.get(split, "–") for split in _SPLITS]
    classes = len(one.task.get("classes") or ())
    where = one.hub + (f" ({one.hub_config})" if one.hub_config else "")
    return (one.name, str(classes or "–"), *counts, f"{one.gigabytes:g}", one.suite, where, one.title)


def _packaged_row(one: PackagedTexts | PackagedModel) -> tuple[str, ...]:
    suites = ", ".join(suite for suite, members in PACKAGED_SUITES.items() if one.name in members)
    texts = one if isinstance(one, PackagedTexts) else None
    counts = [f"{texts.counts[split]:,}" if texts else "–" for split in _SPLITS]
    classes = f"{len(texts.classes)}" if texts and texts.classes else "–"
    return (one.name, classes, *counts, f"{one.package.bytes / 1e9:.2g}", suites, str(one.package), one.title)


def check(names: list[str] | None = None, root: str | None = None, json: bool = False) -> CheckReport:
    """Look which data sets are on the disk, and whether they are those of the literature.

    Every image is counted, and the first one of every split decoded; texts and networks are known by their hashes.

    Args:
        names: of data sets or suites, e.g. ``mnist`` or ``clip8``; None for all, of which some may be missing.
        root: the folder of the published data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        json: whether to show JSON instead of a table.

    Raises:
        ConfigurationError: a name is unknown.
    """
    entries = chosen_entries(names or [*REGISTRY, *TEXT_TASKS, *PACKAGED])
    return CheckReport(tuple(check_data_set(one, root) for one in entries), json, bool(names))


def check_data_set(one: Entry, root: str | os.PathLike[str] | None = None) -> CheckedDataSet:
    """Look whether a data set is on the disk, and whether it is that of the literature."""
    if isinstance(one, TextEntry):
        return _check_texts(one, root)
    if not isinstance(one, DataSetEntry):
        texts = one if isinstance(one, PackagedTexts) else None
        looked, place = found_files(one, data_root(root)), str(one.folder(data_root(root)))
        classes, every = (len(texts.classes), dict(texts.counts)) if texts else (0, {})
        if looked.state == "missing":
            return CheckedDataSet(one.name, "missing", looked.problem, expected=every)
        layout = "JSON lines" if texts else "a network's folder"
        return CheckedDataSet(one.name, looked.state, looked.problem, layout, place, classes, looked.counts, every)
    from lit_merge.data.published.task import PublishedSource, held_out  # imports torch

    source, expected = PublishedSource(one, root), dict(one.counts)
    try:
        found = source.location
    except DataError as error:
        return CheckedDataSet(one.name, "missing", str(error), expected=expected)
    path = str(next((path for path in found.paths if path.exists()), found.paths[0]))
    counts: dict[str, int] = {}
    try:
        for split in one.counts:
            listed = source.listed(split)
            counts[split] = len(listed)
            if len(listed):
                listed.picture(0)
    except DataError as error:
        return CheckedDataSet(one.name, "damaged", str(error), found.layout, path, 0, counts, expected)
    if one.validation == "own" and not source.has_validation:
        expected["val"] = held_out(expected["train"])
        expected["train"] -= expected["val"]
    other = [
        f"{counts[split]:,} of {expected[split]:,} in {split}" for split in expected if counts[split] != expected[split]
    ]
    problem = _other_counts(one.name, "images", path, other, root)
    state = "other counts" if other else "complete"
    return CheckedDataSet(one.name, state, problem, found.layout, path, len(one.classes), counts, expected)


def _check_texts(one: TextEntry, root: str | os.PathLike[str] | None) -> CheckedDataSet:
    from lit_merge.data.published.texts import PublishedText  # imports torch

    task, classes = PublishedText(one, root), len(one.task.get("classes") or ())
    expected = {_SHOWN.get(split, split): count for split, count in one.counts.items()}
    try:
        task.prepare()
    except DataError as error:
        return CheckedDataSet(one.name, "missing", str(error), expected=expected)
    counts: dict[str, int] = {}
    path = ""
    try:
        for split in one.counts:
            table = task.stored(split)
            counts[_SHOWN.get(split, split)] = len(table)
            path = path or os.path.dirname(table.where)  # noqa: PTH120 - a text
            if lacking := [name for name in one.columns if name not in table.columns]:
                raise DataError(
                    f"{one.name}: expected the columns {', '.join(one.columns)} in {table.where}, got none of "
                    f"{first_few(lacking)}. It may be another data set than {one.hub}."
                )
    except DataError as error:
        return CheckedDataSet(one.name, "damaged", str(error), one.hub, path, classes, counts, expected)
    other = [
        f"{counts[split]:,} of {expected[split]:,} in {split}" for split in expected if counts[split] != expected[split]
    ]
    problem = _other_counts(one.name, "rows", path, other, root)
    state = "other counts" if other else "complete"
    return CheckedDataSet(
        one.name, state, problem, f"{one.hub} of the Hugging Face Hub", path, classes, counts, expected
    )


def _other_counts(name: str, what: str, path: str, other: Sequence[str], root: str | os.PathLike[str] | None) -> str:
    if not other:
        return ""
    return (
        f"{name}: expected the {what} of the literature in {path}, got {', '.join(other)}. Complete it, or "
        f"move it away and run: lit-merge data prepare {name} --root {data_root(root)}."
    )


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table with columns of equal width; those in ``right`` are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    signs = [">" if column in right else "<" for column in range(len(widths))]
    line = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
    return "\n".join(line.format(*row).rstrip() for row in rows)


def _counted(one: CheckedDataSet, split: str) -> str:
    if split not in one.expected:
        return "–"
    expected = f"{one.expected[split]:,}"
    if split not in one.counts:
        return expected if one.state == "missing" else f"?/{expected}"
    return expected if one.counts[split] == one.expected[split] else f"{one.counts[split]:,}/{expected}"
