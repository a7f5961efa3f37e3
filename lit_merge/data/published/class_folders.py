"""Data sets as the papers' programs have them: a folder per class, and lists of file names.

The order of the images is that of torchvision's ``ImageFolder``, because the validation images of the literature are
drawn by position.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_merge.data.images.folders import images_below
from lit_merge.data.images.reading import reading
from lit_merge.data.published.class_names import labels_by_name
from lit_merge.data.published.image_list import ImageList
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.errors import DataError, first_few

__all__ = ["class_folders", "join", "split_list", "sun397_list"]

_WITH_OTHERS = {"objectnet"}
"""Data sets of which only the classes in the registry are read."""
_BORDERS = {"objectnet": 2}
"""Pixels at every edge that are no part of the image."""


def class_folders(folder: Path, entry: DataSetEntry) -> ImageList:
    """The images of a folder of class folders, in the order of torchvision's ``ImageFolder``.

    Raises:
        DataError: the folder is missing, lacks classes or has surplus ones, or a class has no images.
    """
    with reading(folder, "a folder with a folder per class"):
        names = sorted(one.name for one in os.scandir(folder) if one.is_dir() and not one.name.startswith("."))
    if entry.name in _WITH_OTHERS:
        names = [name for name in names if name in entry.folder_classes]
    files: list[Path] = []
    labels: list[int] = []
    for name, label in zip(names, labels_by_name(names, entry, folder).tolist(), strict=True):
        found = sorted(images_below(folder / name), key=lambda path: (str(path.parent), path.name))
        if not found:
            raise DataError(f"{folder / name}: expected images, got none. Complete the data set.")
        files += found
        labels += [label] * len(found)
    return ImageList(files, np.array(labels, np.int64), border=_BORDERS.get(entry.name, 0))


def split_list(path: Path, folder: Path, entry: DataSetEntry) -> ImageList:
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
    files: list[Path] = whole.pictures
    chosen = np.array([index for index, file in enumerate(files) if file.name in wanted], np.int64)
    missing = wanted - {files[index].name for index in chosen}
    if missing or not len(chosen):
        raise DataError(
            f"{path}: expected the {len(wanted)} files it lists below {folder}, got {len(chosen)}, without "
            f"{first_few(sorted(missing)) or 'any'}. Complete the data set."
        )
    return ImageList([files[index] for index in chosen], whole.labels[chosen])


def sun397_list(path: Path, folder: Path, entry: DataSetEntry) -> ImageList:
    """The images of SUN397 as its authors lay it out that are in one of the authors' lists, ``Training_01.txt`` ….

    They are in the order that they would have in one folder per class, as the papers' programs have them.

    Raises:
        DataError: the list is missing or malformed, or the classes are not the data set's.
    """
    with reading(path, "lines such as /a/abbey/sun_aakbdcgfpksytcwj.jpg"):
        lines = path.read_text(encoding="utf-8").split()
        parts = sorted((line.split("/")[1:] for line in lines), key=lambda part: ("_".join(part[:-1]), part[-1]))
        if min(map(len, parts)) < 3:
            raise ValueError("others")
    names, positions = np.unique(["_".join(part[:-1]) for part in parts], return_inverse=True)
    labels = labels_by_name(names.tolist(), entry, path)[positions]
    return ImageList([folder.joinpath(*part) for part in parts], labels)


def join(parts: Sequence[ImageList]) -> ImageList:
    """The images of several lists, those of files in the order that they would have in one folder per class."""
    if len(parts) == 1:
        return parts[0]
    files: list[Path] = [file for part in parts for file in part.pictures]
    order = sorted(range(len(files)), key=lambda index: (files[index].parent.name, files[index].name))
    return ImageList([files[index] for index in order], np.concatenate([part.labels for part in parts])[order])
