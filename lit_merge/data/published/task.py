"""The data sets of the literature as tasks: found on the disk in any of the layouts in use, never downloaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import random_split

from lit_merge.data.embedded.tasks import DRAWN_TASKS, EMBEDDED_TASKS
from lit_merge.data.images.datasets import ImageDataset, ImagePreprocessing
from lit_merge.data.packaged.registry import PACKAGED_TASKS
from lit_merge.data.packaged.task import RealTextTask
from lit_merge.data.published.image_list import ImageList
from lit_merge.data.published.locations import Location, locations
from lit_merge.data.published.registry import REGISTRY, DataSetEntry, data_root
from lit_merge.data.published.text_registry import TEXT_TASKS
from lit_merge.data.published.texts import PublishedText
from lit_merge.data.sources import EmbeddedSource, Task, chosen_templates
from lit_merge.errors import ConfigurationError, DataError, did_you_mean, first_few

__all__ = ["PublishedSource", "held_out", "is_published", "named_source"]

_VALIDATION_FRACTION = 0.1
_MOST_VALIDATION = 5000


def is_published(name: str) -> bool:
    """Whether a name is one of a published data set, of a task of a published suite of texts, or of packaged texts."""
    return name in REGISTRY or name in TEXT_TASKS or name in PACKAGED_TASKS


def named_source(
    name: str, root: str | os.PathLike[str] | None = None, templates: Sequence[str] | str | None = None
) -> Task:
    """The task of a name: of the embedded suite, a published data set, published texts, or texts of packages.

    Args:
        name: a key of :data:`~lit_merge.data.embedded.tasks.DRAWN_TASKS`,
            :data:`~lit_merge.data.published.registry.REGISTRY`,
            :data:`~lit_merge.data.published.text_registry.TEXT_TASKS` or
            :data:`~lit_merge.data.packaged.registry.PACKAGED_TASKS`.
        root: the folder of the published data sets, see :class:`PublishedSource`.
        templates: prompt templates, see :func:`~lit_merge.data.sources.chosen_templates`; None for the task's own.

    Raises:
        ConfigurationError: there is no such task, or the templates are unusable.
    """
    if name in DRAWN_TASKS:
        return EmbeddedSource(name, templates)
    if name in REGISTRY:
        return PublishedSource(REGISTRY[name], root, templates)
    given = templates if templates is None or isinstance(templates, str) else list(templates)
    if name in TEXT_TASKS:
        return PublishedText(TEXT_TASKS[name], root, given)
    if name in PACKAGED_TASKS:
        return RealTextTask(name, root, given)
    hint = "For a folder of your own images set path instead."
    if not any(sign in name for sign in "/\\~."):
        hint = did_you_mean(name, [*DRAWN_TASKS, *REGISTRY, *TEXT_TASKS, *PACKAGED_TASKS], hint)
    raise ConfigurationError(
        f"task: expected one of {', '.join(EMBEDDED_TASKS)}, or a published data set ({first_few(REGISTRY, 8)}), "
        f"got {name!r}. {hint}"
    )


class PublishedSource(Task):
    """A data set of the registry that is on the disk.

    Nothing is downloaded: ``lit-merge data prepare`` does that. Where the literature holds validation images out of the
    training images, a tenth of them, at most 5,000, are drawn as its programs draw them.

    Args:
        entry: the data set.
        root: the folder of the published data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        templates: prompt templates, see :func:`~lit_merge.data.sources.chosen_templates`; None for the data set's own.

    Attributes:
        name: the data set's name.
        entry: the data set.
        root: the folder of the published data sets.

    Raises:
        ConfigurationError: the templates are unusable.
    """

    def __init__(
        self,
        entry: DataSetEntry,
        root: str | os.PathLike[str] | None = None,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        self.name, self.entry, self.root = entry.name, entry, data_root(root)
        self.classes = entry.classes
        self.templates = chosen_templates(templates, entry.templates)
        self._read: dict[str, ImageList | None] = {}

    @cached_property
    def location(self) -> Location:
        """Where the data set is.

        Raises:
            DataError: it is nowhere; the error names where it may be, what to run, and the size of the download.
        """
        candidates = locations(self.entry, self.root)
        found = next((one for one in candidates if one.found()), None)
        if found is not None:
            return found
        by_layout: dict[str, dict[str, None]] = {}
        for one in candidates:
            by_layout.setdefault(one.layout, {}).update(dict.fromkeys(map(str, one.paths)))
        where = "; ".join(f"{layout}: {', '.join(paths)}" for layout, paths in by_layout.items())
        raise DataError(
            f"{self.name}: expected {self.entry.title} in one of these places ({where}), got none of them. Run: "
            f"lit-merge data prepare {self.name} --root {self.root} (downloads {self.entry.gigabytes:g} GB), or set "
            "root or LIT_MERGE_DATA to the folder that holds it."
        )

    def prepare(self) -> None:
        """Look whether the images are there.

        Raises:
            DataError: they are not.
        """
        _ = self.location

    def split(
        self, split: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None = None
    ) -> ImageDataset:
        """The images of ``"train"``, ``"val"`` (perhaps none) or ``"test"``; augmented unless the seed is None.

        Raises:
            DataError: the data set is missing, incomplete or damaged, has other classes, or has no such images.
        """
        return self.listed(split).images(f"{self.name}/{split}", preprocessing, augmentation_seed)

    def listed(self, split: str) -> ImageList:
        """The images of a split with their labels, for no particular model.

        Raises:
            DataError: as :meth:`split`.
        """
        if self.entry.validation == "none" and split != "test":
            if split == "val":
                return ImageList([], np.zeros(0, np.int64))
            raise DataError(
                f"{self.name}: expected the split test, got {split!r}: {self.entry.title} has test images only. "
                "Evaluate on it, or choose another task."
            )
        if split == "test" or self.has_validation:
            return self._present(split)
        whole = self._present("train")
        training, validation = _divided(len(whole))
        return whole.take(training if split == "train" else validation)

    @property
    def has_validation(self) -> bool:
        """Whether there are validation images of its own, which nothing is held out for.

        Raises:
            DataError: as :meth:`split`.
        """
        return self.entry.validation == "own" and self._stored("val") is not None

    def _present(self, split: str) -> ImageList:
        found = self._stored(split)
        if found is None:
            raise DataError(
                f"{self.name}: expected its split {split} in {self.location.paths[0]} ({self.location.layout}), got "
                "none. Complete the data set, or move it away to look for it elsewhere."
            )
        return found

    def _stored(self, split: str) -> ImageList | None:
        if split not in self._read:
            self._read[split] = self.location.read(split)
        return self._read[split]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found and read: another process finds and reads it itself."""
        return {**{key: value for key, value in self.__dict__.items() if key != "location"}, "_read": {}}


def held_out(count: int) -> int:
    """How many of so many training images are held out for validation: a tenth, rounded down, at most 5,000."""
    return min(int(count * _VALIDATION_FRACTION), _MOST_VALIDATION)


def _divided(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the images to train on are trained on, and which are held out, as in the papers' programs."""
    positions: Any = range(count)  # random_split only asks for its length
    lengths = [count - held_out(count), held_out(count)]
    first, second = random_split(positions, lengths, generator=torch.Generator().manual_seed(0))
    return np.array(first.indices, np.int64), np.array(second.indices, np.int64)
