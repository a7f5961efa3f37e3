"""The published data sets that model merging is measured on: names, divisions, origins and layouts.

One JSON file per data set in ``data_sets/`` holds its facts. Its prompt templates are those that CLIP was published
with (Radford et al. 2021); where it has none, those of the programs of Ilharco et al. (2023) and Wang et al. (2024):
for SVHN MNIST's, for Fashion-MNIST STL-10's. Nothing here reads or downloads an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lit_merge.errors import ConfigurationError, did_you_mean

__all__ = ["REGISTRY", "SUITES", "DataSetEntry", "data_root", "entry", "registry_table"]

_FILES = Path(__file__).parent / "data_sets"
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataSetEntry:
    """What is known of one published data set.

    Where the programs of the merging papers and the data set's authors disagree (class names, divisions), the entry
    follows the programs, so that numbers can be compared, and ``notes`` says what differs.

    Attributes:
        name: how lit-merge calls it.
        title: how its authors call it.
        classes: class names for the prompts, in label order.
        templates: prompt templates, each with one ``{}``.
        counts: images in ``train``, ``val`` and ``test``; a missing key is a split that there is not.
        gigabytes: about the size of the download, 10⁹ bytes; a guide to the disk that is needed, not measured.
        torchvision: class in ``torchvision.datasets``, if it has one.
        torchvision_arguments: split -> arguments of that class; several mean that their images make up the split
            together, in this order. Empty if the class does not divide the data.
        torchvision_roots: folders below the data root that are that class's ``root``, the expected one first; ``""`` is
            the data root itself.
        hub: data set on the Hugging Face Hub, ``owner/name``; None if none divides the data as the papers do.
        hub_config: its configuration, if it has several.
        hub_splits: split -> the Hub's split.
        hub_columns: columns of the image and of the label.
        hub_classes: class of every label of the Hub, where its order is another one; otherwise empty.
        folders: folders below the data root that may hold it in the task-vectors repositories' layout, the expected one
            first.
        folder_layout: how such a folder looks: ``"class folders"`` (a folder per split with a folder per class),
            ``"split lists"`` (a folder per class, and text files with the file names of each split), or
            ``"torchvision"`` (as torchvision lays it out).
        folder_splits: split -> folder, or list, within; ``""`` is the folder itself. With ``"torchvision"`` the split
            folders that some have instead, if any.
        image_folder: with ``"split lists"`` the folder within that holds the class folders.
        folder_classes: names of the class folders, in label order; empty if it has none.
        validation: where ``val`` comes from: ``"own"``; ``"from train"`` (a tenth of the images to train on, rounded
            down, at most 5,000, by ``torch.utils.data.random_split`` with seed 0); or ``"none"``.
        label_order: what the order of the classes is.
        imagenet_labels: for every class, the labels of ImageNet that it stands for; only of ImageNet's shifts.
        notes: what differs from elsewhere, and what could not be verified.
        citation: who made it.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    counts: Mapping[str, int]
    gigabytes: float
    torchvision: str | None
    hub: str | None
    folders: tuple[str, ...]
    folder_layout: str
    validation: str
    label_order: str
    citation: str
    torchvision_arguments: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    torchvision_roots: tuple[str, ...] = ()
    hub_config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    hub_columns: tuple[str, str] = ("image", "label")
    hub_classes: tuple[str, ...] = ()
    folder_splits: Mapping[str, str] = field(default_factory=dict)
    image_folder: str = ""
    folder_classes: tuple[str, ...] = ()
    imagenet_labels: tuple[tuple[int, ...], ...] = ()
    notes: str = ""


SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "clip8": (eight := ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")),
        "clip14": (fourteen := (*eight, "cifar100", "stl10", "flowers102", "oxford_pets", "pcam", "fer2013")),
        "clip20": (*fourteen, "emnist", "cifar10", "food101", "fashion_mnist", "rendered_sst2", "kmnist"),
        "wise_ft": ("imagenet", "imagenet_v2", "imagenet_r", "imagenet_sketch", "imagenet_a", "objectnet"),
    }
)
"""The 8 tasks of Ilharco et al. (2023), the 14 and 20 of Wang et al. (2024), ImageNet and the five shifts of Wortsman
et al. (2022)."""


def _read(name: str, imagenet: DataSetEntry | None = None) -> DataSetEntry:
    """Read a data set's file; a shift of ImageNet's takes what it does not give of names and prompts from ImageNet."""
    facts = json.loads((_FILES / f"{name}.json").read_text(encoding="utf-8"))
    if imagenet is not None:
        labels = facts.get("imagenet_labels") or [[label] for label in range(len(imagenet.classes))]
        facts["imagenet_labels"] = [tuple(group) for group in labels]
        facts.setdefault("classes", [imagenet.classes[group[0]] for group in labels])
        facts.setdefault("templates", imagenet.templates)
    arguments = facts.pop("torchvision_arguments", {})
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return DataSetEntry(
        name=name,
        torchvision_arguments={split: tuple(several) for split, several in arguments.items()},
        **rest,
    )


def _read_all() -> dict[str, DataSetEntry]:
    first, *shifts = SUITES["wise_ft"]
    imagenet = _read(first)
    tasks = {name: _read(name) for name in SUITES["clip20"]}
    return {**tasks, first: imagenet, **{name: _read(name, imagenet) for name in shifts}}


REGISTRY: Mapping[str, DataSetEntry] = MappingProxyType(_read_all())
"""Name -> entry of all published data sets."""


def entry(name: str) -> DataSetEntry:
    """Return a data set's entry.

    Args:
        name: a key of :data:`REGISTRY`, in any case.

    Raises:
        ConfigurationError: the name is unknown; the nearest ones are named.
    """
    if name.lower() in REGISTRY:
        return REGISTRY[name.lower()]
    hint = did_you_mean(name, REGISTRY, "`lit-merge data list` shows what each of them is.")
    raise ConfigurationError(f"data set: expected one of {', '.join(REGISTRY)}, got {name!r}. {hint}")


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the published data sets: the one given, else ``$LIT_MERGE_DATA``, else ``data``."""
    return Path(root or os.environ.get("LIT_MERGE_DATA") or "data").expanduser()


def registry_table() -> str:
    """Return the registry as Markdown: a table of all data sets, then their notes."""
    rows = [
        "| name | data set | classes | train / val / test | GB | val | torchvision | Hugging Face Hub | folder |",
        "|---|---|---:|---:|---:|---|---|---|---|",
    ]
    for item in REGISTRY.values():
        counts = " / ".join(f"{item.counts[split]:,}" if split in item.counts else "–" for split in _SPLITS)
        hub = "–" if item.hub is None else f"`{item.hub}`" + (f" ({item.hub_config})" if item.hub_config else "")
        rows.append(
            f"| `{item.name}` | {item.title} ({item.citation}) | {len(item.classes):,} | {counts} | "
            f"{item.gigabytes:g} | {item.validation} | {item.torchvision or '–'} | {hub} | `{item.folders[0]}` |"
        )
    notes = [f"- **{item.name}**: {item.notes}" for item in REGISTRY.values() if item.notes]
    return "\n".join([*rows, "", *notes, ""])
