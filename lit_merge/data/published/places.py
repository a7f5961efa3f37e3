"""Where a published data set may be on the disk, and how it is read there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_merge.data.published import hub_tables
from lit_merge.data.published.original_arrays import ARRAY_READERS
from lit_merge.data.published.original_files import FILE_READERS, class_folders, join, split_list, sun397_list
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.data.published.stored import Listed

__all__ = ["Place", "places"]

_MADE_WITH = {  # class of torchvision -> what of its files says that they are there, below its root
    "MNIST": ("MNIST/raw",),
    "FashionMNIST": ("FashionMNIST/raw",),
    "KMNIST": ("KMNIST/raw",),
    "EMNIST": ("EMNIST/raw",),
    "SVHN": ("train_32x32.mat", "test_32x32.mat"),
    "CIFAR10": ("cifar-10-batches-py",),
    "CIFAR100": ("cifar-100-python",),
    "STL10": ("stl10_binary",),
    "FER2013": ("fer2013/fer2013.csv", "fer2013/icml_face_data.csv", "fer2013/train.csv"),
    "PCAM": ("pcam/camelyonpatch_level_2_split_train_x.h5", "pcam/camelyonpatch_level_2_split_test_x.h5"),
    "GTSRB": ("gtsrb/GTSRB",),
    "StanfordCars": ("stanford_cars/devkit",),
    "DTD": ("dtd/dtd",),
    "Flowers102": ("flowers-102/jpg",),
    "OxfordIIITPet": ("oxford-iiit-pet/annotations",),
    "Food101": ("food-101/meta",),
    "RenderedSST2": ("rendered-sst2/train/negative", "rendered-sst2/test/negative"),
}


@dataclass(frozen=True)
class Place:
    """A place where a data set may be.

    Attributes:
        layout: how its files lie there.
        paths: any of them says that it is there.
        read: split -> its images as they lie there, before validation images are held out; None for no such split.
        found: whether it is there.
    """

    layout: str
    paths: tuple[Path, ...]
    read: Callable[[str], Listed | None]
    found: Callable[[], bool]


def places(entry: DataSetEntry, root: Path) -> list[Place]:
    """Where a data set may be, in the order in which it is looked for.

    Args:
        entry: the data set.
        root: the folder of the published data sets.
    """
    folders = list(dict.fromkeys(root / folder for folder in entry.folders))
    listed = [place for folder in folders for place in _folder_places(entry, folder)]
    if entry.name == "sun397":
        listed += [_sun397_place(entry, root / below / "SUN397") for below in entry.torchvision_roots]
    if entry.torchvision_arguments and entry.torchvision in _MADE_WITH:
        roots = [root / below for below in entry.torchvision_roots]
        listed += [_torchvision_place(entry, below, entry.torchvision) for below in roots]
    if entry.hub is not None:
        name = entry.hub.partition("/")[2]
        for folder in dict.fromkeys((root / entry.name, root / name, root / entry.hub, *folders)):
            listed.append(_table_place(entry, folder))
        listed += _cache_places(entry)
    return listed


def _folder_places(entry: DataSetEntry, folder: Path) -> list[Place]:
    """As the task-vectors repositories lay it out."""
    splits = entry.folder_splits
    if not splits or not entry.folder_classes:
        return []
    if entry.folder_layout == "split lists":
        return [_list_place(entry, folder), _class_place(entry, folder, {"train": "train", "test": "test"})]
    return [_class_place(entry, folder, splits)]


def _list_place(entry: DataSetEntry, folder: Path) -> Place:
    lists = {split: folder / name for split, name in entry.folder_splits.items()}

    def read(split: str) -> Listed | None:
        return split_list(lists[split], folder / entry.image_folder, entry) if split in lists else None

    return Place("split lists beside class folders", tuple(lists.values()), read, lambda: lists["train"].exists())


def _class_place(entry: DataSetEntry, folder: Path, splits: Mapping[str, str]) -> Place:
    def read(split: str) -> Listed | None:
        names = [splits[split]] if split in splits else []
        if splits["test"] == "val" and _has_some(folder / "test", entry):  # the authors' own three splits, in folders
            names = {"train": ["train", "val"], "test": ["test"]}.get(split, [])
        present = [name for name in names if name != "val" or (folder / name).is_dir()]
        return join([class_folders(folder / name, entry) for name in present]) if present else None

    def found() -> bool:
        return any(map(Path.is_dir, _within(first))) if "train" in splits else _has_some(first, entry)

    first = folder / splits.get("train", splits["test"])
    return Place("a folder per class", (first,), read, found)


def _within(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _has_some(folder: Path, entry: DataSetEntry) -> bool:
    return any((folder / name).is_dir() for name in entry.folder_classes)


def _sun397_place(entry: DataSetEntry, folder: Path) -> Place:
    """As the authors lay it out, with the lists of their first partition in the folder, below it or beside it."""
    names = {"train": "Training_01.txt", "test": "Testing_01.txt"}
    candidates = [base / names["train"] for base in (folder, folder / "Partitions", folder.parent)]

    def lists() -> Path | None:
        return next((path for path in candidates if path.exists() and (folder / "a").is_dir()), None)

    def read(split: str) -> Listed | None:
        found = lists()
        if found is None or split not in names:
            return None
        return sun397_list(found.with_name(names[split]), folder, entry)

    return Place("the authors' folders with Training_01.txt and Testing_01.txt", (folder,), read, lambda: bool(lists()))


def _torchvision_place(entry: DataSetEntry, root: Path, kind: str) -> Place:
    reader = {**ARRAY_READERS, **FILE_READERS}[kind]
    paths = tuple(root / below for below in _MADE_WITH[kind])

    def read(split: str) -> Listed | None:
        several = entry.torchvision_arguments.get(split)
        return join([reader(root, entry, **arguments) for arguments in several]) if several else None

    return Place("as torchvision lays it out", paths, read, lambda: any(path.exists() for path in paths))


def _table_place(entry: DataSetEntry, folder: Path) -> Place:
    """As ``save_to_disk`` and ``hf download`` leave it."""

    def read(split: str) -> Listed | None:
        if hub_tables.has_saved_tables(folder):
            return hub_tables.saved_table(folder, entry, split)
        return hub_tables.hub_files(folder, entry, split)

    return Place(
        f"{entry.hub} of the Hugging Face Hub",
        (folder,),
        read,
        lambda: hub_tables.has_saved_tables(folder) or hub_tables.has_hub_files(folder),
    )


def _cache_places(entry: DataSetEntry) -> list[Place]:
    def snapshot(split: str) -> Listed | None:
        folder = hub_tables.cached_snapshot(entry)
        return None if folder is None else hub_tables.hub_files(folder, entry, split)

    tables = hub_tables.tables_folder(entry)
    return [
        Place(
            "its cache",
            (hub_tables.snapshots_folder(entry),),
            snapshot,
            lambda: hub_tables.cached_snapshot(entry) is not None,
        ),
        Place(
            "its cache",
            (tables,),
            lambda split: hub_tables.cached_tables(entry, split),
            lambda: next(iter(tables.glob("*/*/*/*.arrow")), None) is not None,
        ),
    ]
