"""Data sets that give a whole batch at a time, from memory or from image files."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_merge.data.batch import ImageBatch
from lit_merge.data.examples import Examples
from lit_merge.data.images.augmentation import augment_lightly, image_seeds
from lit_merge.data.images.reading import read_image

__all__ = ["FileImages", "ImageDataset", "ImagePreprocessing", "PictureImages", "TensorImages", "file_content"]


class ImagePreprocessing(Protocol):
    """What the data need to know of a model; :class:`lit_merge.models.Preprocessing` has it."""

    @property
    def image_size(self) -> int:
        """Side S of the model's input, in pixels."""

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[N, 3, S, S]`` -> float32 of the same shape."""

    def transform(self, training: bool = False) -> Callable[[Any], Tensor]:
        """PIL image -> float32 ``[3, S, S]``, with or without augmentation."""


class ImageDataset(Examples):
    """N images of a split; a subclass reads them.

    Args:
        labels: int64, ``[N]``.
        names: of the images, N of them.
        preprocessing: what the model expects of images.
        augmentation_seed: seed of the augmentation, None for none.
    """

    preprocessing: ImagePreprocessing

    @abstractmethod
    def read(self, indices: np.ndarray, seeds: np.ndarray | None) -> Tensor:
        """Read the model's input for some images.

        Args:
            indices: int64 ``[B]``, in [0, N).
            seeds: uint64 ``[B]``, of each image's augmentation; None for none.

        Returns:
            float32, ``[B, 3, S, S]``.
        """

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """Some of the images, in the order given."""

    def inputs(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, ...]:
        """See :meth:`Examples.inputs`."""
        seeds = None if self.augmentation_seed is None else image_seeds(self.augmentation_seed, epochs, indices)
        return (self.read(indices, seeds),)

    def batch(self, inputs: tuple[Tensor, ...], targets: Tensor, indices: Tensor) -> ImageBatch:
        """The images as a batch."""
        return ImageBatch(inputs[0], targets, indices)

    def blank(self, count: int) -> tuple[Tensor, ...]:
        """See :meth:`Examples.blank`."""
        return (torch.zeros(count, 3, self.preprocessing.image_size, self.preprocessing.image_size),)


class TensorImages(ImageDataset):
    """Images held in memory, all of one size; augmented lightly, then resized where the model wants another size.

    Args:
        images: uint8, ``[N, 3, H, W]``.
        labels: int64, ``[N]``.
        names: of the images, N of them.
        preprocessing: what the model expects of images.
        augmentation_seed: seed of the augmentation, None for none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        names: Sequence[str],
        preprocessing: ImagePreprocessing,
        augmentation_seed: int | None = None,
    ) -> None:
        super().__init__(labels, names, preprocessing, augmentation_seed)
        self.images = images

    def read(self, indices: np.ndarray, seeds: np.ndarray | None) -> Tensor:
        """See :meth:`ImageDataset.read`."""
        images = self.images[torch.from_numpy(indices)]
        if seeds is not None:
            images = augment_lightly(images, seeds)
        size = [self.preprocessing.image_size] * 2
        if list(images.shape[2:]) != size:
            from torchvision.transforms import InterpolationMode, functional

            images = functional.resize(images, size, InterpolationMode.BICUBIC, antialias=True)
        return self.preprocessing.normalise(images)

    def subset(self, indices: Sequence[int]) -> TensorImages:
        """See :meth:`ImageDataset.subset`."""
        chosen = list(indices)
        names = [self.names[index] for index in chosen]
        kept = self.images[chosen], self.labels[chosen], names
        return TensorImages(*kept, self.preprocessing, self.augmentation_seed)

    def content(self) -> Iterator[bytes | memoryview]:
        """The sizes and the pixels."""
        yield str(list(self.images.shape)).encode()
        yield self.images.reshape(-1).numpy().data


class PictureImages(ImageDataset):
    """Images of any size, decoded when asked for and transformed as the model's own training and evaluation do.

    Args:
        labels: int64, ``[N]``.
        names: of the images, N of them.
        preprocessing: what the model expects of images.
        augmentation_seed: seed of the augmentation, None for none.
    """

    def __init__(
        self,
        labels: Tensor,
        names: Sequence[str],
        preprocessing: ImagePreprocessing,
        augmentation_seed: int | None = None,
    ) -> None:
        super().__init__(labels, names, preprocessing, augmentation_seed)
        self._transform = preprocessing.transform(training=augmentation_seed is not None)

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """One image as RGB; ``index`` is in [0, N)."""

    def read(self, indices: np.ndarray, seeds: np.ndarray | None) -> Tensor:
        """See :meth:`ImageDataset.read`.

        Raises:
            DataError: an image cannot be decoded; it is named.
        """
        images = [self.picture(int(index)) for index in indices]
        if seeds is None:
            return torch.stack([self._transform(image) for image in images])
        # The transform draws from the global random states: give it one per image, and leave them as they were.
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]):
                return torch.stack(
                    [self._transformed(image, int(seed)) for image, seed in zip(images, seeds, strict=True)]
                )
        finally:
            random.setstate(state)

    def _transformed(self, image: Image.Image, seed: int) -> Tensor:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the accelerators, too
        return self._transform(image)


class FileImages(PictureImages):
    """Images in files, one each.

    Args:
        paths: of the files, N of them; they are the names, too.
        labels: int64, ``[N]``.
        preprocessing: what the model expects of images.
        augmentation_seed: seed of the augmentation, None for none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        preprocessing: ImagePreprocessing,
        augmentation_seed: int | None = None,
    ) -> None:
        super().__init__(labels, [str(path) for path in paths], preprocessing, augmentation_seed)

    def picture(self, index: int) -> Image.Image:
        """See :meth:`PictureImages.picture`."""
        return read_image(self.names[index])

    def subset(self, indices: Sequence[int]) -> FileImages:
        """See :meth:`ImageDataset.subset`."""
        chosen = list(indices)
        paths = [Path(self.names[index]) for index in chosen]
        return FileImages(paths, self.labels[chosen], self.preprocessing, self.augmentation_seed)

    def content(self) -> Iterator[bytes | memoryview]:
        """Path, size and time of change of every file; they are not read."""
        return map(file_content, self.names)


def file_content(path: str | Path) -> bytes:
    """What tells a file from others without reading it: path, size and time of change."""
    whole = Path(path).absolute()
    status = whole.stat()
    return json.dumps([str(whole), status.st_size, status.st_mtime_ns]).encode()
