"""Data sets whose images are files: class folders, lists of file names, and the authors' own tables beside them.

The functions named after classes of ``torchvision.datasets`` read what those classes read, from where they expect it
below their ``root``, and take their arguments. The order of the images is theirs, too, because the validation images
of the literature are drawn by position.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from lit_merge.data.images.folders import images_below
from lit_merge.data.published.class_names import checked_labels, labels_by_name
from lit_merge.data.published.original_arrays import ArrayReader, read_mat, reading
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.data.published.stored import CroppedPictures, Listed
from lit_merge.errors import DataError, first_few

__all__ = ["FILE_READERS", "class_folders", "join", "split_list", "sun397_list"]


_WITH_OTHERS = {"objectnet"}
"""Data sets of which only the classes in the registry are read."""
_BORDERS = {"objectnet": 2}
"""Pixels at every edge that are no part of the image."""


def class_folders(folder: Path, entry: DataSetEntry) -> Listed:
    """The images of a folder of class folders, in the order of torchvision's ``ImageFolder``.

    Raises:
        DataError: the folder is missing, lacks classes or has surplus ones, or a class has no images.
    """
    files: list[Path] = []
    labels: list[int] = []
    for name, label in _folders(folder, entry).items():
        found = sorted(images_below(folder / name), key=lambda path: (str(path.parent), path.name))
        if not found:
            raise DataError(f"{folder / name}: expected images, got none. Complete the data set.")
        files += found
        labels += [label] * len(found)
    if entry.name in _BORDERS:
        return Listed(CroppedPictures(tuple(files), _BORDERS[entry.name]), np.array(labels, np.int64))
    return _listed(files, labels)


def split_list(path: Path, folder: Path, entry: DataSetEntry) -> Listed:
    """The images of class folders whose file names are in a list, in the order of torchvision's ``ImageFolder``.

    Args:
        path: the list, one file name per line.
        folder: holds the class folders.
        entry: the data set.

    Raises:
        DataError: the list or the folder is missing, a listed file is, or the classes are not the data set's.
    """
    with reading(path, "a list of file names, one per line"):
        wanted = set(path.read_text(encoding="utf-8").split())
    whole = class_folders(folder, entry)
    files = cast("Sequence[Path]", whole.pictures)
    chosen = np.array([place for place, file in enumerate(files) if file.name in wanted], np.int64)
    missing = wanted - {files[place].name for place in chosen}
    if missing or not len(chosen):
        raise DataError(
            f"{path}: expected the {len(wanted)} files it lists below {folder}, got {len(chosen)}, without "
            f"{first_few(sorted(missing)) or 'any'}. Complete the data set."
        )
    return _listed([files[place] for place in chosen], whole.labels[chosen].tolist())


def _folders(folder: Path, entry: DataSetEntry) -> dict[str, int]:
    """Name of the class folder -> label, in the order of the names."""
    with reading(folder, "a folder with a folder per class"):
        names = sorted(one.name for one in os.scandir(folder) if one.is_dir() and not one.name.startswith("."))
    if entry.name in _WITH_OTHERS:
        names = [name for name in names if name in entry.folder_classes]
    labels = labels_by_name(names, entry, folder)
    return dict(zip(names, labels.tolist(), strict=True))


def _listed(files: Sequence[Path], labels: Iterable[int]) -> Listed:
    return Listed(list(files), np.fromiter(labels, np.int64, len(files)))


def join(parts: Sequence[Listed]) -> Listed:
    """The images of several lists, those of files in the order that they would have in one folder per class."""
    if len(parts) == 1:
        return parts[0]
    every = [
        (file, label)
        for part in parts
        for file, label in zip(cast("Sequence[Path]", part.pictures), part.labels.tolist(), strict=True)
    ]
    every.sort(key=lambda one: (one[0].parent.name, one[0].name))
    return _listed([file for file, _ in every], [label for _, label in every])


def _gtsrb(root: Path, entry: DataSetEntry, split: str) -> Listed:
    base = root / "gtsrb"
    if split == "train":
        return class_folders(base / "GTSRB" / "Training", entry)
    path = base / "GT-final_test.csv"
    with reading(path, "columns Filename and ClassId"), path.open(newline="", encoding="utf-8") as file:
        rows = [
            (row["Filename"], int(row["ClassId"])) for row in csv.DictReader(file, delimiter=";", skipinitialspace=True)
        ]
    labels = checked_labels(np.array([label for _, label in rows], np.int64), entry, path)
    # The numbers are the names of the training images' folders.
    by_folder = labels_by_name([f"{number:05d}" for number in range(len(entry.classes))], entry, path)
    return _listed([base / "GTSRB" / "Final_Test" / "Images" / name for name, _ in rows], by_folder[labels])


def _cars(root: Path, entry: DataSetEntry, split: str) -> Listed:
    base = root / "stanford_cars"
    devkit = base / "devkit"
    path = devkit / "cars_train_annos.mat" if split == "train" else base / "cars_test_annos_withlabels.mat"
    annotations, meta = read_mat(path), devkit / "cars_meta.mat"
    with reading(path, "annotations with fname and class"):
        rows = np.atleast_1d(annotations["annotations"])
        names, numbers = [str(row["fname"]) for row in rows], np.array([int(row["class"]) - 1 for row in rows])
    with reading(meta, "class_names"):
        classes = [str(name) for name in np.atleast_1d(read_mat(meta)["class_names"])]
    labels = labels_by_name(classes, entry, meta)[checked_labels(numbers, entry, path)]
    return _listed([base / f"cars_{split}" / name for name in names], labels)


def _dtd(root: Path, entry: DataSetEntry, split: str, partition: int = 1) -> Listed:
    base = root / "dtd" / "dtd"
    path = base / "labels" / f"{split}{partition}.txt"
    with reading(path, "lines of class/file"):
        names = path.read_text(encoding="utf-8").split()
        classes = [name.split("/")[-2] for name in names]
    return _by_class(base / "images", names, classes, entry, path)


def _flowers(root: Path, entry: DataSetEntry, split: str) -> Listed:
    base = root / "flowers-102"
    sets, table = base / "setid.mat", base / "imagelabels.mat"
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    with reading(sets, f"image numbers under {key}"):
        numbers = np.atleast_1d(read_mat(sets)[key]).astype(np.int64)
    with reading(table, "labels of all image numbers from 1 on"):
        labels = np.atleast_1d(read_mat(table)["labels"]).astype(np.int64)[numbers - 1] - 1
    return _listed(
        [base / "jpg" / f"image_{number:05d}.jpg" for number in numbers], checked_labels(labels, entry, table)
    )


def _pets(root: Path, entry: DataSetEntry, split: str) -> Listed:
    base = root / "oxford-iiit-pet"
    path = base / "annotations" / f"{split}.txt"
    with reading(path, "lines of image, class number, species and breed number"):
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
        names, classes = [row[0] for row in rows], [row[0].rpartition("_")[0] for row in rows]
        numbers = {row[0].rpartition("_")[0]: int(row[1]) for row in rows}
        if any(numbers[name] != int(row[1]) for name, row in zip(classes, rows, strict=True)):
            raise ValueError("a class with several numbers")
    return _by_class(base / "images", [f"{name}.jpg" for name in names], classes, entry, path)


def _food(root: Path, entry: DataSetEntry, split: str) -> Listed:
    base = root / "food-101"
    path = base / "meta" / f"{split}.json"
    with reading(path, "a list of images for every class"):
        listed: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
        names = [f"{name}.jpg" for several in listed.values() for name in several]
        classes = [name for name, several in listed.items() for _ in several]
    return _by_class(base / "images", names, classes, entry, path)


def _by_class(folder: Path, names: Sequence[str], classes: Sequence[str], entry: DataSetEntry, path: Path) -> Listed:
    known = sorted(set(classes))
    labels = dict(zip(known, labels_by_name(known, entry, path).tolist(), strict=True))
    return _listed([folder / name for name in names], [labels[name] for name in classes])


def _sst2(root: Path, entry: DataSetEntry, split: str) -> Listed:
    return class_folders(root / "rendered-sst2" / ("valid" if split == "val" else split), entry)


def sun397_list(path: Path, folder: Path, entry: DataSetEntry) -> Listed:
    """The images of SUN397 as its authors lay it out that are in one of the authors' lists, ``Training_01.txt`` ….

    They are in the order that they would have in one folder per class, as the papers' programs have them.

    Raises:
        DataError: the list is missing or malformed, or the classes are not the data set's.
    """
    with reading(path, "lines such as /a/abbey/sun_aakbdcgfpksytcwj.jpg"):
        lines = path.read_text(encoding="utf-8").split()
        parts = sorted((line.split("/")[1:] for line in lines), key=lambda part: ("_".join(part[:-1]), part[-1]))
        classes = ["_".join(part[:-1]) for part in parts]
        if min(map(len, parts)) < 3:
            raise ValueError("others")
    return _by_class(folder, ["/".join(part) for part in parts], classes, entry, path)


FILE_READERS: Mapping[str, ArrayReader] = {
    "GTSRB": _gtsrb,
    "StanfordCars": _cars,
    "DTD": _dtd,
    "Flowers102": _flowers,
    "OxfordIIITPet": _pets,
    "Food101": _food,
    "RenderedSST2": _sst2,
}
"""Name of torchvision's class -> what reads its files."""
