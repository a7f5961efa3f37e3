"""Where a published data set may be on the disk, and how it is read there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_merge.data.published import hub_tables
from lit_merge.data.published.class_folders import class_folders, join, split_list, sun397_list
from lit_merge.data.published.image_list import ImageList
from lit_merge.data.published.originals import ORIGINALS, read_original
from lit_merge.data.published.registry import DataSetEntry

__all__ = ["Location", "locations"]


@dataclass(frozen=True)
class Location:
    """Where a data set may be.

    Attributes:
        layout: how its files are arranged there.
        paths: any of them says that it is there.
        read: split -> its images, before validation images are held out; None for no such split.
        found: whether it is there.
    """

    layout: str
    paths: tuple[Path, ...]
    read: Callable[[str], ImageList | None]
    found: Callable[[], bool]


def locations(entry: DataSetEntry, root: Path) -> list[Location]:
    """Where a data set may be, in the order in which it is looked for.

    Args:
        entry: the data set.
        root: the folder of the published data sets.
    """
    folders = list(dict.fromkeys(root / folder for folder in entry.folders))
    roots = [root / below for below in entry.torchvision_roots]
    found: list[Location] = []
    for folder in folders if entry.folder_splits and entry.folder_classes else ():
        if entry.folder_layout == "split lists":
            found += [_split_lists(entry, folder), _class_folders(entry, folder, {"train": "train", "test": "test"})]
        else:
            found.append(_class_folders(entry, folder, entry.folder_splits))
    if entry.name == "sun397":
        found += [_authors_sun397(entry, below / "SUN397") for below in roots]
    if entry.torchvision_arguments and entry.torchvision in ORIGINALS:
        found += [_original(entry, below) for below in roots]
    if entry.hub is not None:
        name = entry.hub.partition("/")[2]
        for folder in dict.fromkeys((root / entry.name, root / name, root / entry.hub, *folders)):
            found.append(_tables(entry, folder))
        found += _caches(entry)
    return found


def _split_lists(entry: DataSetEntry, folder: Path) -> Location:
    lists = {split: folder / name for split, name in entry.folder_splits.items()}

    def read(split: str) -> ImageList | None:
        return split_list(lists[split], folder / entry.image_folder, entry) if split in lists else None

    return Location("split lists next to class folders", tuple(lists.values()), read, lambda: lists["train"].exists())


def _class_folders(entry: DataSetEntry, folder: Path, splits: Mapping[str, str]) -> Location:
    first = folder / splits.get("train", splits["test"])

    def read(split: str) -> ImageList | None:
        names = [splits[split]] if split in splits else []
        if splits["test"] == "val" and _has_some(folder / "test", entry):  # the authors' own three splits, in folders
            names = {"train": ["train", "val"], "test": ["test"]}.get(split, [])
        present = [name for name in names if name != "val" or (folder / name).is_dir()]
        return join([class_folders(folder / name, entry) for name in present]) if present else None

    def found() -> bool:
        if "train" not in splits:
            return _has_some(first, entry)
        return first.is_dir() and any(map(Path.is_dir, first.iterdir()))

    return Location("a folder per class", (first,), read, found)


def _has_some(folder: Path, entry: DataSetEntry) -> bool:
    return any((folder / name).is_dir() for name in entry.folder_classes)


def _authors_sun397(entry: DataSetEntry, folder: Path) -> Location:
    """With the lists of the authors' first partition in the folder, below it or above it."""
    names = {"train": "Training_01.txt", "test": "Testing_01.txt"}

    def lists() -> Path | None:
        candidates = [base / names["train"] for base in (folder, folder / "Partitions", folder.parent)]
        return next((path for path in candidates if path.exists() and (folder / "a").is_dir()), None)

    def read(split: str) -> ImageList | None:
        found = lists()
        return sun397_list(found.with_name(names[split]), folder, entry) if found and split in names else None

    return Location(
        "the authors' folders with Training_01.txt and Testing_01.txt", (folder,), read, lambda: bool(lists())
    )


def _original(entry: DataSetEntry, root: Path) -> Location:
    paths = tuple(root / below for below in ORIGINALS[str(entry.torchvision)].signs)

    def read(split: str) -> ImageList | None:
        several = entry.torchvision_arguments.get(split)
        return join([read_original(root, entry, arguments) for arguments in several]) if several else None

    return Location("as torchvision lays it out", paths, read, lambda: any(path.exists() for path in paths))


def _tables(entry: DataSetEntry, folder: Path) -> Location:
    return Location(
        f"{entry.hub} of the Hugging Face Hub",
        (folder,),
        lambda split: hub_tables.read_tables(folder, entry, split),
        lambda: hub_tables.has_tables(folder),
    )


def _caches(entry: DataSetEntry) -> list[Location]:
    def snapshot(split: str) -> ImageList | None:
        folder = hub_tables.cached_snapshot(entry)
        return None if folder is None else hub_tables.read_tables(folder, entry, split)

    snapshots, tables = hub_tables.snapshots_folder(entry), hub_tables.tables_folder(entry)
    return [
        Location("its cache", (snapshots,), snapshot, lambda: hub_tables.cached_snapshot(entry) is not None),
        Location(
            "its cache",
            (tables,),
            lambda split: hub_tables.cached_tables(entry, split),
            lambda: next(iter(tables.glob("*/*/*/*.arrow")), None) is not None,
        ),
    ]
