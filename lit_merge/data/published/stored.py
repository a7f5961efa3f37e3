"""Images that do not lie in files of their own: arrays, tables and HDF5 files, decoded one at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from lit_merge.data.images.datasets import FileImages, ImagePreprocessing, PictureImages, file_content
from lit_merge.data.images.reading import first_line, read_image
from lit_merge.errors import DataError

__all__ = [
    "ArchivePictures",
    "ArrayPictures",
    "CroppedPictures",
    "Listed",
    "Pictures",
    "StoredImages",
    "TablePictures",
    "VolumePictures",
    "open_volumes",
]


class Pictures(Protocol):
    """N images that are kept together."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Where they are kept."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Image.Image:
        """One of them as RGB; ``index`` is in [0, N)."""


@dataclass(frozen=True)
class ArrayPictures:
    """Images in an array in memory, or mapped from a file.

    Attributes:
        array: uint8, ``[N, H, W]`` for grey images or ``[N, H, W, 3]``.
        files: where it was read from.
    """

    array: np.ndarray
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.array)

    def picture(self, index: int) -> Image.Image:
        """See :meth:`Pictures.picture`."""
        return Image.fromarray(np.ascontiguousarray(self.array[index])).convert("RGB")


@dataclass(frozen=True)
class TablePictures:
    """Encoded images in a column of a table of the ``datasets`` library, which maps it into memory.

    Attributes:
        table: the table; its column is cast so that it gives bytes and paths instead of decoded images.
        column: the column's name.
        files: where it was read from.
    """

    table: Any
    column: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.table)

    def picture(self, index: int) -> Image.Image:
        """See :meth:`Pictures.picture`.

        Raises:
            DataError: the image is damaged or missing.
        """
        cell = self.table[index][self.column]
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        return _decoded(source, f"{self.files[0].parent}", f"in row {index} of {self.column}")


@dataclass(frozen=True)
class CroppedPictures:
    """Images in files of their own, without what lies at their edges.

    Attributes:
        files: one per image.
        border: pixels to cut off at every edge.
    """

    files: tuple[Path, ...]
    border: int

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, index: int) -> Image.Image:
        """See :meth:`Pictures.picture`.

        Raises:
            DataError: the image is damaged, missing, or not larger than its border.
        """
        image = read_image(self.files[index])
        width, height = (side - self.border for side in image.size)
        if min(width, height) <= self.border:
            raise DataError(
                f"{self.files[index]}: expected more than a border of {self.border} pixels, got {image.size[0]} x "
                f"{image.size[1]}. Fetch the data set again."
            )
        return image.crop((self.border, self.border, width, height))


@dataclass(frozen=True)
class ArchivePictures:
    """Encoded images in archives that are not compressed, read from their places.

    Attributes:
        files: the archives.
        places: int64, ``[N, 3]``: which archive, first byte, and length of each image.
    """

    files: tuple[Path, ...]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def picture(self, index: int) -> Image.Image:
        """See :meth:`Pictures.picture`.

        Raises:
            DataError: the image is damaged.
        """
        archive, start, length = map(int, self.places[index])
        with self.files[archive].open("rb") as file:
            file.seek(start)
            return _decoded(io.BytesIO(file.read(length)), f"{self.files[archive]}", f"at byte {start}")


def _decoded(source: Any, where: str, which: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL's plugins raise whatever their format's damage leads to
        known = type(error).__name__ != "UnidentifiedImageError"
        reason = first_line(error) if known else "an unknown or damaged header"
        raise DataError(
            f"{where}: expected a readable image {which}, got {reason}. Fetch the data set again."
        ) from error


class VolumePictures:
    """Images in a data set of an HDF5 file, uint8 ``[N, H, W, 3]``, read one at a time.

    Args:
        path: the file.
        key: the data set's name in it.

    Raises:
        DataError: h5py is not installed.
        Exception: whatever h5py raises for a damaged file.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.files: tuple[Path, ...] = (path,)
        self._key = key
        self._opened: tuple[int, Any] | None = None
        shape, dtype = self._volume().shape, self._volume().dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"{dtype} {list(shape)}")
        self._length = int(shape[0])

    def __len__(self) -> int:
        return self._length

    def picture(self, index: int) -> Image.Image:
        """See :meth:`Pictures.picture`.

        Raises:
            DataError: the image is damaged.
        """
        try:
            return Image.fromarray(self._volume()[index])
        except Exception as error:  # h5py raises whatever the damage leads to
            raise DataError(
                f"{self.files[0]}: expected a readable image {index}, got {first_line(error)}. Fetch the file again."
            ) from error

    def _volume(self) -> Any:
        """Opened once per process: a handle must not be shared with a worker process."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_volumes(self.files[0])
        return self._opened[1][self._key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def open_volumes(path: Path) -> Any:
    """Open an HDF5 file for reading.

    Raises:
        DataError: h5py is not installed.
        Exception: whatever h5py raises for a damaged file.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: expected h5py to read it, got none. Run: pip install 'lit-merge[data]'.") from error
    return h5py.File(path, "r")


class StoredImages(PictureImages):
    """Some of the images that are kept together.

    Args:
        pictures: all of them.
        positions: int64, ``[N]``: which ones.
        labels: int64, ``[N]``.
        names: of the images, N of them.
        preprocessing: what the model expects of images.
        augmentation_seed: seed of the augmentation, None for none.
    """

    def __init__(
        self,
        pictures: Pictures,
        positions: np.ndarray,
        labels: torch.Tensor,
        names: Sequence[str],
        preprocessing: ImagePreprocessing,
        augmentation_seed: int | None = None,
    ) -> None:
        super().__init__(labels, names, preprocessing, augmentation_seed)
        self.pictures, self.positions = pictures, positions

    def picture(self, index: int) -> Image.Image:
        """See :meth:`PictureImages.picture`."""
        return self.pictures.picture(int(self.positions[index]))

    def subset(self, indices: Sequence[int]) -> StoredImages:
        """See :meth:`ImageDataset.subset`."""
        chosen = list(indices)
        names = [self.names[index] for index in chosen]
        kept = self.positions[chosen], self.labels[chosen], names
        return StoredImages(self.pictures, *kept, self.preprocessing, self.augmentation_seed)

    def content(self) -> Iterator[bytes | memoryview]:
        """Path, size and time of change of the files, which are not read, and which images of them."""
        yield from map(file_content, self.pictures.files)
        yield self.positions.tobytes()


@dataclass(frozen=True)
class Listed:
    """The images of a split with their labels, before any model has its say.

    Attributes:
        pictures: files of one image each, or images that are kept together.
        labels: int64, ``[N]``, in [0, C).
        positions: int64, ``[N]``: which of ``pictures``; None for all.
    """

    pictures: Sequence[Path] | Pictures
    labels: np.ndarray
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """One of the images as RGB; ``index`` is in [0, N).

        Raises:
            DataError: it cannot be decoded.
        """
        position = index if self.positions is None else int(self.positions[index])
        return (
            read_image(self.pictures[position])
            if isinstance(self.pictures, Sequence)
            else self.pictures.picture(position)
        )

    def take(self, indices: np.ndarray) -> Listed:
        """Some of the images, in the order given."""
        positions = np.arange(len(self)) if self.positions is None else self.positions
        return Listed(self.pictures, self.labels[indices], positions[indices])

    def images(self, name: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None) -> PictureImages:
        """The data set for a model; ``name`` is what images without a file are called after."""
        positions = np.arange(len(self)) if self.positions is None else self.positions
        labels = torch.from_numpy(self.labels.astype(np.int64))
        pictures = self.pictures
        if isinstance(pictures, Sequence):
            return FileImages(
                [pictures[position] for position in positions.tolist()], labels, preprocessing, augmentation_seed
            )
        names = [f"{name}/{index}" for index in range(len(self))]
        return StoredImages(pictures, positions, labels, names, preprocessing, augmentation_seed)
