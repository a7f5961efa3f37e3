"""The texts and networks that packages of registries contain: names, classes, templates, licences, counts, hashes.

One JSON file per data set in ``data_sets/`` holds its facts, ``packages.json`` and ``models.json`` those of packages
and networks. Class names and templates were chosen on validation texts, so that the zero-shot head of all-MiniLM-L6-v2
says something of every task (``benchmarks/text_zero_shot.py`` measures it). Nothing here reads or fetches a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lit_merge.data.packaged.packages import PACKAGES, Package

__all__ = [
    "PACKAGED",
    "PACKAGED_BASES",
    "PACKAGED_SUITES",
    "PACKAGED_TASKS",
    "PackagedModel",
    "PackagedTexts",
    "packaged_table",
]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PackagedTexts:
    """Texts of a package: a classification task, or texts alone.

    Attributes:
        name: how lit-merge calls them.
        title: what they are.
        package: that contains them.
        licence: of the texts, which may differ from the package's.
        citation: who made them.
        labels: label in the files -> class name for the prompts, in the order of the targets; empty for texts alone.
        templates: prompt templates with one ``{}``.
        per_class: texts of a class at most, over all splits; None for all.
        counts: split -> texts.
        sha256: split -> SHA-256 of its file.
    """

    name: str
    title: str
    package: Package
    licence: str
    citation: str
    labels: Mapping[str, str]
    templates: tuple[str, ...]
    per_class: int | None
    counts: Mapping[str, int]
    sha256: Mapping[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the targets."""
        return tuple(self.labels.values())

    def folder(self, root: Path) -> Path:
        """Where they are below the folder of the data sets."""
        return root / "text" / self.name


@dataclass(frozen=True)
class PackagedModel:
    """A network's folder inside a package.

    Attributes:
        name: how lit-merge calls it.
        title: what it is.
        package: that contains it.
        archive: member of the package that is itself an archive with the files; empty if the package has them.
        prefix: of the files' names there.
        hub: a repository on the Hugging Face Hub with the same files, or None.
        files: name in the folder -> SHA-256.
        licence: of the weights.
        notes: what it is good for.
    """

    name: str
    title: str
    package: Package
    archive: str
    prefix: str
    hub: str | None
    files: Mapping[str, str]
    licence: str
    notes: str

    def folder(self, root: Path) -> Path:
        """Where it is below the folder of the data sets."""
        return root / "models" / self.name


def _texts(path: Path) -> PackagedTexts:
    facts = json.loads(path.read_text(encoding="utf-8"))
    package, templates = PACKAGES[facts.pop("package")], tuple(facts.pop("templates"))
    return PackagedTexts(path.stem, package=package, templates=templates, **facts)


def _models() -> dict[str, PackagedModel]:
    facts = json.loads((_HERE / "models.json").read_text(encoding="utf-8"))
    return {name: PackagedModel(name, package=PACKAGES[one.pop("package")], **one) for name, one in facts.items()}


_TEXT8 = ("bbc_news", "newsgroups", "reuters", "mail", "plot_or_review", "sentences", "wordnet_nouns", "glossary")
_TEXT12 = (*_TEXT8, "wordnet_verbs", "dictionary", "quotations", "crowd_tweets")

PACKAGED_TASKS: Mapping[str, PackagedTexts] = MappingProxyType(
    {name: _texts(_HERE / "data_sets" / f"{name}.json") for name in _TEXT12}
)
"""Name -> classification task."""

PACKAGED: Mapping[str, PackagedTexts | PackagedModel] = MappingProxyType(
    {
        **PACKAGED_TASKS,
        **{name: _texts(_HERE / "data_sets" / f"{name}.json") for name in ("news_texts", "glossary_texts")},
        **_models(),
    }
)
"""Name -> all that can be prepared: tasks, texts alone, networks."""

PACKAGED_SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType({"text8": _TEXT8, "text12": _TEXT12})
"""The eight tasks of ``configs/suite/text.yaml``, and all twelve."""

PACKAGED_BASES: Mapping[str, str] = MappingProxyType({"text8": "minilm", "text12": "minilm"})
"""Suite -> the network that is prepared with it."""


def packaged_table() -> str:
    """The tasks and texts as Markdown, with their packages and licences."""
    rows = ["| name | texts | classes | train / val / test | package | licence |", "|---|---|---:|---:|---|---|"]
    for one in PACKAGED.values():
        if isinstance(one, PackagedTexts):
            counts = " / ".join(f"{count:,}" for count in one.counts.values())
            rows.append(
                f"| `{one.name}` | {one.title} ({one.citation}) | {len(one.classes) or '–'} | {counts} | "
                f"{one.package} | {one.licence} |"
            )
        else:
            rows.append(f"| `{one.name}` | {one.title} | – | – | {one.package} | {one.licence} |")
    return "\n".join([*rows, ""])
