"""The images of a split with their labels: files of one image each, or images that are stored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_merge.data.images.datasets import FileImages, ImagePreprocessing, PictureImages, file_content
from lit_merge.data.images.reading import read_image, undecoded, upright_rgb
from lit_merge.errors import DataError

__all__ = ["ImageList", "StoredImages"]


@dataclass(frozen=True)
class ImageList:
    """The images of a split with their labels, for no particular model.

    Attributes:
        pictures: paths of files of one image each; or images that are stored together: an array, or what reads them one
            at a time, each a PIL image or uint8 ``[H, W]`` or ``[H, W, 3]``.
        labels: int64, ``[N]``, in [0, C).
        files: where images that are stored together were read from; empty for files of one image each.
        positions: int64, ``[N]``: which of ``pictures``; None for all.
        border: pixels at every edge of an image file that are no part of the image.
    """

    pictures: Any
    labels: np.ndarray
    files: tuple[Path, ...] = ()
    positions: np.ndarray | None = None
    border: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """One of the images as RGB; ``index`` is in [0, N).

        Raises:
            DataError: it cannot be decoded, or is not larger than its border.
        """
        position = index if self.positions is None else int(self.positions[index])
        if not self.files:
            return self._without_border(self.pictures[position])
        try:
            picture = self.pictures[position]
            if isinstance(picture, np.ndarray):
                picture = Image.fromarray(np.ascontiguousarray(picture))
            return upright_rgb(picture)
        except Exception as error:  # PIL and h5py raise whatever the damage leads to
            raise DataError(
                f"{self.files[0]}: expected a readable image {position}, got {undecoded(error)}. Fetch the data set "
                "again."
            ) from error

    def _without_border(self, path: Path) -> Image.Image:
        image = read_image(path)
        if not self.border:
            return image
        width, height = (side - self.border for side in image.size)
        if min(width, height) <= self.border:
            raise DataError(
                f"{path}: expected more than a border of {self.border} pixels, got {image.size[0]} x "
                f"{image.size[1]}. Fetch the data set again."
            )
        return image.crop((self.border, self.border, width, height))

    def take(self, indices: np.ndarray) -> ImageList:
        """Some of the images, in the order given."""
        positions = np.arange(len(self)) if self.positions is None else self.positions
        return ImageList(self.pictures, self.labels[indices], self.files, positions[indices], self.border)

    def images(self, name: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None) -> PictureImages:
        """The data set for a model; ``name`` is what images without a file are called after."""
        if self.files or self.border:
            names = [f"{name}/{index}" for index in range(len(self))]
            return StoredImages(self, names, preprocessing, augmentation_seed)
        positions = range(len(self)) if self.positions is None else self.positions.tolist()
        paths = [self.pictures[position] for position in positions]
        return FileImages(paths, torch.from_numpy(self.labels), preprocessing, augmentation_seed)


class StoredImages(PictureImages):
    """Images that are stored together, or have a border, for a model.

    Args:
        listed: N of them, with their labels.
        names: of the images, N of them.
        preprocessing: what the model expects of images.
        augmentation_seed: seed of the augmentation, None for none.
    """

    def __init__(
        self,
        listed: ImageList,
        names: Sequence[str],
        preprocessing: ImagePreprocessing,
        augmentation_seed: int | None = None,
    ) -> None:
        super().__init__(torch.from_numpy(listed.labels), names, preprocessing, augmentation_seed)
        self._listed = listed

    def picture(self, index: int) -> Image.Image:
        """See :meth:`PictureImages.picture`."""
        return self._listed.picture(index)

    def subset(self, indices: Sequence[int]) -> StoredImages:
        """See :meth:`ImageDataset.subset`."""
        chosen = list(indices)
        names = [self.names[index] for index in chosen]
        listed = self._listed.take(np.array(chosen, np.int64))
        found = StoredImages(listed, names, self.preprocessing, self.augmentation_seed)
        found.labels = self.labels[chosen]  # which may be hidden
        return found

    def content(self) -> Iterator[bytes | memoryview]:
        """Path, size and time of change of the files, which are not read, and which images of them."""
        listed = self._listed
        yield from map(file_content, listed.files or listed.pictures)
        yield (np.arange(len(listed)) if listed.positions is None else listed.positions).tobytes()
