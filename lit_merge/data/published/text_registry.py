"""The published suites of language tasks: where their texts are, how they are divided, worded and evaluated.

One JSON file per suite in ``text_suites/`` holds the facts. They follow the programs that the literature's numbers come
from, prompts included; what could not be confirmed is named under ``unverified``. Nothing here reads a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["TEXT_SUITES", "TEXT_TASKS", "TextEntry", "TextSuite"]

_FILES = Path(__file__).parent / "text_suites"


@dataclass(frozen=True)
class TextEntry:
    """What is known of one task of a suite.

    Attributes:
        name: how lit-merge calls it: suite and task, with a hyphen between them.
        suite: the suite.
        title: how its authors call the data set.
        citation: who made it.
        hub: data set on the Hugging Face Hub, ``owner/name``.
        columns: of the stored tables, those that are read.
        counts: stored split -> rows, before any is left out.
        megabytes: about the size of the download, 10⁶ bytes; a guide to the disk that is needed, not measured.
        metric: what the literature reports.
        task: arguments of :class:`~lit_merge.data.TextTask`: division, prompt, answers, classes.
        hub_config: its configuration, if it has several.
        manual: how to come by the files, where they cannot be downloaded.
        files: stored split -> the authors' own file, where that is what people have.
        renamed: column of such a file -> column.
        notes: what differs from elsewhere.
        unverified: what could not be confirmed.
    """

    name: str
    suite: str
    title: str
    citation: str
    hub: str
    columns: tuple[str, ...]
    counts: Mapping[str, int]
    megabytes: float
    metric: str
    task: Mapping[str, Any]
    hub_config: str | None = None
    manual: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    unverified: tuple[str, ...] = ()

    @property
    def gigabytes(self) -> float:
        """About the size of the download, 10⁹ bytes."""
        return self.megabytes / 1000

    @property
    def hub_splits(self) -> dict[str, str]:
        """Every stored split by its own name."""
        return {split: split for split in self.counts}

    @property
    def folder(self) -> str:
        """The folder below the data root that holds the data set, perhaps with others of the same repository."""
        return self.hub.partition("/")[2]


@dataclass(frozen=True)
class TextSuite:
    """What is known of a suite.

    Attributes:
        title: what it is.
        citation: whose protocol it is.
        network: the kind that it is made for: ``encoder_decoder``, ``causal`` or ``classifier``.
        evaluation: how its numbers are computed.
        source: the programs that it follows.
        tasks: names of its tasks in :data:`TEXT_TASKS`.
        notes: what differs here, and from elsewhere.
        unverified: what could not be confirmed.
    """

    title: str
    citation: str
    network: str
    evaluation: str
    source: str
    tasks: tuple[str, ...]
    notes: str
    unverified: tuple[str, ...]


def _read_all() -> tuple[dict[str, TextSuite], dict[str, TextEntry]]:
    suites, entries = {}, {}
    for path in sorted(_FILES.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        own = {}
        for task, given in facts.pop("tasks").items():
            name = f"{path.stem}-{task}"
            parts: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in given.items()}
            own[name] = TextEntry(name=name, suite=path.stem, **parts)
        facts["unverified"] = tuple(facts["unverified"])
        suites[path.stem] = TextSuite(tasks=tuple(own), **facts)
        entries.update(own)
    return suites, entries


_SUITES, _ENTRIES = _read_all()
TEXT_SUITES: Mapping[str, TextSuite] = MappingProxyType(_SUITES)
"""Name -> suite of language tasks."""
TEXT_TASKS: Mapping[str, TextEntry] = MappingProxyType(_ENTRIES)
"""Name -> entry of all their tasks."""
