"""Any task of images, with corrupted ones in place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_merge.data.examples import Examples
from lit_merge.data.images.corruptions import check_corruption, corrupt
from lit_merge.data.images.datasets import PictureImages, TensorImages
from lit_merge.data.published.task import named_source
from lit_merge.data.sources import Task
from lit_merge.errors import ConfigurationError, first_few

__all__ = ["CorruptedTask"]

_LARGEST = 224  # pixels of the shorter side, for which the severities are made
_SPLITS = ("train", "val", "test")


class CorruptedTask(Task):
    """A task whose images are corrupted, by default its test images alone, as Yang et al. (2024, table 4) have them.

    Learning coefficients on ``test`` images of such tasks adapts to the corruption, as the paper does; vectors come
    from the tasks as they are. Pictures in files are brought to 224 pixels at the shorter side first, if they are
    larger. An image is always corrupted in the same way, whatever batch it is in.

    Args:
        task: an embedded task or a published data set by name, or any task of images.
        corruption: one of :data:`~lit_merge.data.CORRUPTIONS`.
        severity: from 1, mild, to 5.
        splits: whose images are corrupted.
        seed: of the noise.
        root: the folder of the published data sets.

    Raises:
        ConfigurationError: a setting is unknown or out of its range.
    """

    def __init__(
        self,
        task: str | Task,
        corruption: str,
        severity: int = 3,
        splits: Sequence[str] = ("test",),
        seed: int = 0,
        root: str | None = None,
    ) -> None:
        check_corruption(corruption, severity)
        wrong = [split for split in splits if split not in _SPLITS]
        if wrong or isinstance(splits, str):
            raise ConfigurationError(
                f"splits: expected a list of {', '.join(_SPLITS)}, got {first_few(wrong) or splits}. Correct it."
            )
        self.source = named_source(task, root) if isinstance(task, str) else task
        self.corruption, self.severity, self.splits, self.seed = corruption, severity, tuple(splits), seed
        self.name, self.classes, self.templates = self.source.name, self.source.classes, self.source.templates

    def prepare(self) -> None:
        """Bring the images as they are to the disk."""
        self.source.prepare()

    def split(self, split: str, preprocessing: Any, augmentation_seed: int | None = None) -> Examples:
        """See :meth:`Task.split`.

        Raises:
            ConfigurationError: the task is not one of images.
        """
        found = self.source.split(split, preprocessing, augmentation_seed)
        if split not in self.splits:
            return found
        settings = self.corruption, self.severity
        if isinstance(found, TensorImages):
            images = [corrupt(image, *settings, self.seed + place) for place, image in enumerate(found.images)]
            pixels = torch.stack(images) if images else found.images
            return TensorImages(pixels, found.labels, found.names, preprocessing, augmentation_seed)
        if isinstance(found, PictureImages):
            return _CorruptedPictures(found, np.arange(len(found)), *settings, self.seed)
        raise ConfigurationError(
            f"{self.name}: expected a task of images to corrupt, got {type(found).__name__}. Choose another task."
        )


class _CorruptedPictures(PictureImages):
    """Pictures that are corrupted when they are read."""

    def __init__(self, whole: PictureImages, places: np.ndarray, corruption: str, severity: int, seed: int) -> None:
        names = [whole.names[place] for place in places]
        super().__init__(whole.labels[torch.from_numpy(places)], names, whole.preprocessing, whole.augmentation_seed)
        self.whole, self.places = whole, places
        self.corruption, self.severity, self.seed = corruption, severity, seed

    def picture(self, index: int) -> Image.Image:
        """See :meth:`PictureImages.picture`."""
        place = int(self.places[index])
        picture = self.whole.picture(place)
        scale = _LARGEST / min(picture.size)
        if scale < 1:
            size = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return Image.fromarray(
            corrupt(pixels, self.corruption, self.severity, self.seed + place).permute(1, 2, 0).numpy()
        )

    def subset(self, indices: Sequence[int]) -> _CorruptedPictures:
        """See :meth:`ImageDataset.subset`."""
        chosen = np.asarray(indices, np.int64)
        found = _CorruptedPictures(self.whole, self.places[chosen], self.corruption, self.severity, self.seed)
        found.labels = self.labels[torch.from_numpy(chosen)]  # which may be hidden
        return found

    def content(self) -> Iterator[bytes | memoryview]:
        """The pictures', and how they are corrupted."""
        yield f"{self.corruption} {self.severity} {self.seed} {self.places.tolist()}".encode()
        yield from self.whole.content()
