"""Own images in folders: one folder per class, divided into splits beforehand or here."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from lit_merge.data.fractions import checked_fractions, counts_of
from lit_merge.data.images.datasets import FileImages, ImageDataset, ImagePreprocessing
from lit_merge.data.images.reading import IMAGE_SUFFIXES, image_problem, is_image_name
from lit_merge.data.sources import Task, chosen_templates
from lit_merge.data.templates import GENERIC
from lit_merge.errors import ConfigurationError, DataError, first_few

__all__ = ["FolderSource", "find_images", "images_below"]

_SPLITS = ("train", "val", "test")
_LOOK_ALIKE = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:ing)?))"
    r"(?:[ _-]?(?:set|images?|data))?",
    re.IGNORECASE,
)
_AT_A_TIME = 4096
_SUFFIXES = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)


class FolderSource(Task):
    """A classification task in a folder.

    The folder holds either ``train``, ``val`` and ``test`` with one folder per class each, or one folder per class
    right away. Below a class's folder images are found at any depth; hidden files and folders are not looked at, links
    are followed. Labels follow the folders' names in alphabetical order.

    What is not divided beforehand is divided here, class by class: a class's files, in the order of the SHA-256 of
    ``"seed/relative path"``, go to train, val and test by the fractions, at least one to each whose fraction is not 0.
    Where ``val`` alone is missing, it is taken from ``train`` in this way; where ``test`` is, there are no test images.

    Args:
        path: the folder.
        class_names: folder name -> class name; a folder that is not in it is called after itself, ``_`` as a space.
        templates: prompt templates, see :func:`~lit_merge.data.sources.chosen_templates`; None for
            ``"a photo of a {}."``.
        fractions: of train, val and test, summing to 1; that of train is not 0.
        seed: of the division.
        skip_corrupt: whether to decode all images first and leave out, with a warning, those that cannot be.

    Attributes:
        name: the folder's name.

    Raises:
        ConfigurationError: the templates or fractions are unusable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        class_names: Mapping[str, str] | None = None,
        templates: Sequence[str] | str | None = None,
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        skip_corrupt: bool = False,
    ) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.resolve().name
        self.templates = chosen_templates(templates, GENERIC)
        self._class_names = dict(class_names or {})
        self._fractions, self._seed, self._skip_corrupt = checked_fractions(fractions), seed, skip_corrupt
        self._checked: set[Path] = set()

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names, in label order.

        Raises:
            DataError: the folder is missing, or not laid out as described above; two classes have the same name.
            ConfigurationError: ``class_names`` names a folder that does not exist.
        """
        return tuple(self._folders.values())

    def prepare(self) -> None:
        """Nothing: the images are there."""

    def split(
        self, split: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None = None
    ) -> ImageDataset:
        """The images of ``"train"``, ``"val"`` (perhaps none) or ``"test"``; augmented unless the seed is None.

        Raises:
            DataError: the folder is missing or not laid out as described above, a class has too few images, an image
                is damaged, or there are no test images.
            ConfigurationError: ``class_names`` names a folder that does not exist.
        """
        files = self._divided[split]
        if split == "test" and not files:
            reason = f"no folder {self.path / 'test'}" if self._has_splits else "0 as the third of fractions"
            raise DataError(f"{self.name}: expected test images, got {reason}. Add some, or do not ask for a test.")
        if not self._skip_corrupt:
            unchecked = [path for path, _ in files if path not in self._checked]
            _refuse_corrupt(unchecked)
            self._checked.update(unchecked)
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        return FileImages([path for path, _ in files], labels, preprocessing, augmentation_seed)

    @cached_property
    def _has_splits(self) -> bool:
        """Whether the folder is divided beforehand; a class may well be called train."""
        folders = _folders_in(self.path, "the folder of a task")
        meant = {name: str(match.lastgroup) for name in folders if (match := _LOOK_ALIKE.fullmatch(name))}
        divided = "train" in folders and bool(_folders_in(self.path / "train"))
        others = {name: split for name, split in meant.items() if split not in folders}
        if others and (divided or self._are_splits(meant)):
            renamed = ", ".join(f"{name} to {split}" for name, split in others.items())
            raise DataError(
                f"{self.path}: expected folders named train, val and test, got {first_few(others)}. Rename {renamed}."
            )
        return divided

    def _are_splits(self, meant: Mapping[str, str]) -> bool:
        """Whether these folders, by their names of training and others, have folders of the same classes."""
        classes: dict[bool, set[str]] = {True: set(), False: set()}
        for name, split in meant.items():
            classes[split == "train"].update(_folders_in(self.path / name))
        return bool(classes[True] & classes[False])

    @cached_property
    def _folders(self) -> dict[str, str]:
        """Name of the folder -> name of the class, in label order."""
        root = self.path / "train" if self._has_splits else self.path
        folders = _folders_in(root)
        if len(folders) < 2 or (not self._has_splits and set(folders) <= set(_SPLITS)):
            got = first_few(folders) or "none"
            raise DataError(f"{root}: expected a folder for each of two or more classes, got {got}. Check the path.")
        unknown = sorted(set(self._class_names) - set(folders))
        if unknown:
            raise ConfigurationError(
                f"class_names: expected folders of {root}, got {first_few(unknown)}. "
                f"Use some of {first_few(folders, 8)}."
            )
        named: dict[str, str] = {}
        for folder in folders:
            name = self._class_names.get(folder, folder.replace("_", " "))
            if name in named.values():
                raise DataError(
                    f"{root}: expected classes with different names, got {name!r} for "
                    f"{next(other for other in named if named[other] == name)} and {folder}. Set class_names."
                )
            named[folder] = name
        return named

    @cached_property
    def _divided(self) -> dict[str, list[tuple[Path, int]]]:
        """Split -> files with labels."""
        fractions = self._fractions
        if not self._has_splits:
            return self._divide(self._listed(self.path), fractions)
        given = {split: self.path / split for split in _SPLITS if (self.path / split).is_dir()}
        for root in given.values():
            surplus = sorted(set(_folders_in(root)) - set(self._folders))
            if surplus:
                raise DataError(
                    f"{root}: expected only classes that {given['train']} has, got {first_few(surplus)}. "
                    "Add them there, or remove them here."
                )
        divided: dict[str, list[tuple[Path, int]]] = {split: [] for split in _SPLITS}
        for split, root in given.items():
            listed = self._listed(root)
            if split == "train" and "val" not in given and fractions[1] > 0:
                both = fractions[0] + fractions[1]
                carved = self._divide(listed, (fractions[0] / both, fractions[1] / both, 0.0))
                divided.update(train=carved["train"], val=carved["val"])
            else:
                divided[split] = [(path, label) for label, paths in listed.items() for path in paths]
        return divided

    def _listed(self, root: Path) -> dict[int, list[Path]]:
        """Label -> files, of the classes that have a folder in ``root``."""
        present = set(_folders_in(root))
        listed = {
            label: sorted(images_below(root / folder))
            for label, folder in enumerate(self._folders)
            if folder in present
        }
        if self._skip_corrupt:
            listed = _without_corrupt(listed, root)
        for label, paths in listed.items():
            if not paths:
                raise DataError(
                    f"{root / list(self._folders)[label]}: expected images ({_SUFFIXES}), got none"
                    f"{' that can be read' if self._skip_corrupt else ''}. Add some, or remove the folder."
                )
        return listed

    def _divide(self, listed: dict[int, list[Path]], fractions: Sequence[float]) -> dict[str, list[tuple[Path, int]]]:
        divided: dict[str, list[tuple[Path, int]]] = {split: [] for split in _SPLITS}
        needed = [split for split, fraction in zip(_SPLITS, fractions, strict=True) if fraction > 0]
        for label, paths in listed.items():
            if len(paths) < len(needed):
                raise DataError(
                    f"{self.path}: expected at least {len(needed)} images of each class, one for each of "
                    f"{', '.join(needed)}, got {len(paths)} of {list(self._folders)[label]}. Add some, or remove the "
                    "class."
                )
            ordered = sorted(paths, key=self._order)
            start = 0
            for split, count in zip(_SPLITS, counts_of(len(paths), fractions), strict=True):
                divided[split] += [(path, label) for path in ordered[start : start + count]]
                start += count
        return divided

    def _order(self, path: Path) -> str:
        relative = path.relative_to(self.path).as_posix()
        return hashlib.sha256(f"{self._seed}/{relative}".encode("utf-8", "surrogateescape")).hexdigest()


def find_images(path: str | os.PathLike[str], skip_corrupt: bool = False) -> list[Path]:
    """An image, or all images below a folder, in alphabetical order; hidden ones are not looked at.

    Args:
        path: an image file or a folder.
        skip_corrupt: whether to decode all of them and leave out, with a warning, those that cannot be.

    Raises:
        DataError: the path is missing, there are no images, or one has a damaged header.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(
            f"predict_path: expected an image or a folder of images, got nothing at {root}. Check the path."
        )
    files = sorted(images_below(root)) if root.is_dir() else [root]
    if skip_corrupt:
        files = _without_corrupt({0: files}, root)[0]
    else:
        _refuse_corrupt(files)
    if not files:
        raise DataError(f"{root}: expected images ({_SUFFIXES}), got none. Set predict_path to an image or a folder.")
    return files


def _folders_in(root: Path, what: str = "a folder") -> list[str]:
    if not root.is_dir():
        got = "a file" if root.exists() else "no such path"
        raise DataError(f"{root}: expected {what}, got {got}. Check the path.")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def images_below(root: Path) -> Iterator[Path]:
    """The images below a folder at any depth, in no order: links are followed, hidden files and folders are not."""
    visited = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in visited else [name for name in below if not name.startswith(".")]
        if real not in visited:
            yield from (Path(folder, name) for name in files if is_image_name(name))
        visited.add(real)  # a link may lead back up


def _problems(paths: Sequence[Path], decode: bool) -> Iterator[DataError | None]:
    """For each image what is wrong with it; several are read at a time."""
    Image.init()  # all formats now: PIL registers most of them late, and not thread by thread
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _AT_A_TIME):
            yield from pool.map(image_problem, paths[start : start + _AT_A_TIME], itertools.repeat(decode))


def _refuse_corrupt(paths: Sequence[Path]) -> None:
    """Raise if an image's header is damaged."""
    problems = [problem for problem in _problems(sorted(paths), decode=False) if problem is not None]
    if problems:
        raise DataError(f"{problems[0]} There are {len(problems) - 1} more.") if problems[1:] else problems[0]


def _without_corrupt(listed: dict[int, list[Path]], root: Path) -> dict[int, list[Path]]:
    corrupt: list[Path] = []
    readable = {}
    for label, paths in listed.items():
        problems = list(_problems(paths, decode=True))
        readable[label] = [path for path, problem in zip(paths, problems, strict=True) if problem is None]
        corrupt += [path for path, problem in zip(paths, problems, strict=True) if problem is not None]
    if corrupt:
        from lightning.pytorch.utilities import rank_zero_warn

        images = f"{len(corrupt)} image{'s' if corrupt[1:] else ''}"
        rank_zero_warn(f"{root}: left out {images} that cannot be read: {first_few(corrupt)}.")
    return readable
