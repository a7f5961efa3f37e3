"""The files that the data sets' authors publish, from where the classes of ``torchvision.datasets`` expect them.

Those classes read them, so that images and order are theirs: the validation images of the literature are drawn by
position. Four formats have readers here: CIFAR's pickles, which torchvision would execute; IDX files, which it reads
only uncompressed; HDF5 files, of which it cannot give all labels at once; and FER2013's text, for which it takes seven
times as long.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from lit_merge.checkpoints.pickles.machine import Call, read_pickle
from lit_merge.data.images.reading import reading
from lit_merge.data.published.class_folders import class_folders
from lit_merge.data.published.class_names import checked_labels, labels_by_name
from lit_merge.data.published.image_list import ImageList
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.errors import DataError, FileFormatError

__all__ = ["ORIGINALS", "read_original"]


@dataclass(frozen=True)
class _Original:
    """What a class of torchvision reads.

    Attributes:
        signs: any of them, below the class's ``root``, says that the data set is there.
        files: that are read, those of ``{split}``; several may be alternatives.
        holds: what the first of them that is there holds, for messages.
        content: the class's attributes with images (or their paths) and labels, or one with pairs of them.
    """

    signs: tuple[str, ...]
    files: tuple[str, ...] = ()
    holds: str = ""
    content: tuple[str, ...] = ()


ORIGINALS: Mapping[str, _Original] = {
    **{name: _Original((f"{name}/raw",)) for name in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST")},
    "CIFAR10": _Original(("cifar-10-batches-py",)),
    "CIFAR100": _Original(("cifar-100-python",)),
    "FER2013": _Original(("fer2013/fer2013.csv", "fer2013/icml_face_data.csv", "fer2013/train.csv")),
    "PCAM": _Original(tuple(f"pcam/camelyonpatch_level_2_split_{split}_x.h5" for split in ("train", "test"))),
    "RenderedSST2": _Original(("rendered-sst2/train/negative", "rendered-sst2/test/negative")),
    "SVHN": _Original(
        ("train_32x32.mat", "test_32x32.mat"), ("{split}_32x32.mat",), "a MATLAB file", ("data", "labels")
    ),
    "STL10": _Original(
        ("stl10_binary",),
        ("stl10_binary/{split}_X.bin", "stl10_binary/{split}_y.bin"),
        "images of 3 x 96 x 96 bytes each, column after column, with a label each",
        ("data", "labels"),
    ),
    "GTSRB": _Original(("gtsrb/GTSRB",), ("gtsrb/GT-final_test.csv",), "columns Filename and ClassId", ("_samples",)),
    "StanfordCars": _Original(
        ("stanford_cars/devkit",),
        ("stanford_cars/cars_{split}_annos_withlabels.mat", "stanford_cars/devkit/cars_{split}_annos.mat"),
        "a MATLAB file of annotations with fname and class, and class_names in devkit/cars_meta.mat",
        ("_samples",),
    ),
    "DTD": _Original(
        ("dtd/dtd",), ("dtd/dtd/labels/{split}1.txt",), "lines of class/file", ("_image_files", "_labels")
    ),
    "Flowers102": _Original(
        ("flowers-102/jpg",),
        ("flowers-102/setid.mat",),
        "a MATLAB file of image numbers, and their labels in imagelabels.mat",
        ("_image_files", "_labels"),
    ),
    "OxfordIIITPet": _Original(
        ("oxford-iiit-pet/annotations",),
        ("oxford-iiit-pet/annotations/{split}.txt",),
        "lines of image, class number, species and breed number",
        ("_images", "_labels"),
    ),
    "Food101": _Original(
        ("food-101/meta",),
        ("food-101/meta/{split}.json",),
        "a list of images for every class",
        ("_image_files", "_labels"),
    ),
}
"""Name of torchvision's class -> what it reads."""


def read_original(root: Path, entry: DataSetEntry, arguments: Mapping[str, Any]) -> ImageList:
    """The images that torchvision's class of a data set has, in its order.

    Args:
        root: the class's ``root``.
        entry: the data set.
        arguments: of the class.

    Raises:
        DataError: a file is missing or damaged, the classes are not the data set's, or a library is not installed.
    """
    kind = str(entry.torchvision)
    if kind.endswith("MNIST"):
        return _idx(root / kind / "raw", entry, **arguments)
    if kind in _CIFAR:
        return _cifar(root, entry, **arguments)
    if kind == "FER2013":
        return _fer2013(root, entry, arguments["split"])
    if kind == "PCAM":
        return _pcam(root / "pcam", entry, **arguments)
    # torchvision numbers the class folders of these two by position, whatever their names.
    if kind == "RenderedSST2":
        return class_folders(root / "rendered-sst2" / arguments["split"], entry)
    if kind == "GTSRB" and arguments["split"] == "train":
        return class_folders(root / "gtsrb" / "GTSRB" / "Training", entry)
    return _through_torchvision(root, entry, arguments)


def _through_torchvision(root: Path, entry: DataSetEntry, arguments: Mapping[str, Any]) -> ImageList:
    from torchvision import datasets

    original = ORIGINALS[str(entry.torchvision)]
    files = [root / name.format(**arguments) for name in original.files]
    present = tuple(filter(Path.exists, files)) or (files[0],)
    with reading(present[0], original.holds):
        dataset = _without_digests(getattr(datasets, str(entry.torchvision)))(root=str(root), **arguments)
        parts = [getattr(dataset, name) for name in original.content]
        images, labels = parts if parts[1:] else (list(part) for part in zip(*parts[0], strict=True))
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images with {len(labels)} labels")
        if isinstance(images, np.ndarray):
            images = images.transpose(0, 2, 3, 1)
            if images.dtype != np.uint8:
                raise ValueError(f"images of {images.dtype}")
    checked = checked_labels(np.atleast_1d(labels), entry, present[0])
    if hasattr(dataset, "classes"):
        checked = labels_by_name(dataset.classes, entry, present[0])[checked]
    return (
        ImageList(images, checked, present)
        if isinstance(images, np.ndarray)
        else ImageList(list(map(Path, images)), checked)
    )


def _without_digests(kind: Any) -> Any:
    """The class without its own search for files, which names none of them, and hashes gigabytes every time."""
    own = dict.fromkeys(("_check_exists", "_check_integrity"), lambda self: True)
    return type(kind.__name__, (kind,), own)  # torchvision names folders after the class


def _fer2013(root: Path, entry: DataSetEntry, split: str) -> ImageList:
    """Without a competition's ``test.csv``, which has no labels."""
    paths = [root / sign for sign in ORIGINALS["FER2013"].signs]
    path = next(filter(Path.exists, paths), paths[0])
    if path.name == "train.csv" and split != "train":
        raise DataError(f"{path.parent}: expected fer2013.csv, got train.csv, without test labels. Add fer2013.csv.")
    usages = ("Training",) if split == "train" else ("PublicTest", "PrivateTest")
    images = [np.zeros((0, 48, 48), np.uint8)]
    labels: list[int] = []
    with reading(path, "columns emotion, pixels and Usage, of 48 x 48 pixels"), path.open(newline="") as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            if path.name != "train.csv" and row["Usage"] not in usages:
                continue
            pixels = np.fromstring(row["pixels"], np.int64, sep=" ")
            if len(pixels) != 48 * 48 or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError(f"other pixels in image {len(labels)} of {split}")
            images.append(pixels.astype(np.uint8).reshape(1, 48, 48))
            labels.append(int(row["emotion"]))
    return ImageList(np.concatenate(images), checked_labels(np.array(labels, np.int64), entry, path), (path,))


def _idx(folder: Path, entry: DataSetEntry, train: bool, split: str | None = None) -> ImageList:
    """Images and labels of the IDX format (http://yann.lecun.com/exdb/mnist), compressed or not.

    EMNIST's are on their side, as the papers' programs leave them.
    """
    prefix = f"emnist-{split}-{'train' if train else 'test'}" if split else "train" if train else "t10k"
    images, images_path = _idx_array(folder / f"{prefix}-images-idx3-ubyte", 3)
    labels, labels_path = _idx_array(folder / f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: expected the labels of the {len(images)} images next to it, got {len(labels)}. "
            "Fetch both files again."
        )
    return ImageList(images, checked_labels(labels, entry, labels_path), (images_path, labels_path))


def _idx_array(path: Path, dimensions: int) -> tuple[np.ndarray, Path]:
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    opened = gzip.open if path.suffix == ".gz" else Path.open
    what = f"an IDX file of unsigned bytes in {dimensions} dimensions"
    with reading(path, what), cast(BinaryIO, opened(path, "rb")) as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"a header that begins with {header[:4].hex() or 'nothing'}")
        shape = [int(size) for size in np.frombuffer(header, ">u4", offset=4)]
        return np.frombuffer(_exactly(file, shape), np.uint8).reshape(shape), path


def _exactly(file: BinaryIO, shape: Sequence[int]) -> bytes:
    """As many bytes as the shape says, and not one more; read in chunks, because the header may say anything."""
    count, chunks = int(np.prod([1, *shape], dtype=object)), []
    while count > 0 and (chunk := file.read(min(count, 1 << 24))):
        chunks.append(chunk)
        count -= len(chunk)
    if count or file.read(1):
        raise ValueError(f"{'fewer' if count else 'more'} bytes than the {'x'.join(map(str, shape))} of its header")
    return b"".join(chunks)


_CIFAR = {  # folder, names of the labels and of their names, file with the latter, files of train
    "CIFAR10": (
        *("cifar-10-batches-py", "labels", "label_names", "batches.meta"),
        [f"data_batch_{number}" for number in range(1, 6)],
        "test_batch",
    ),
    "CIFAR100": ("cifar-100-python", "fine_labels", "fine_label_names", "meta", ["train"], "test"),
}


def _cifar(root: Path, entry: DataSetEntry, train: bool) -> ImageList:
    folder, labels, names, meta, training, test = _CIFAR[str(entry.torchvision)]
    paths = tuple(root / folder / name for name in (training if train else [test]))
    batches = [_cifar_batch(path, labels) for path in paths]
    path = root / folder / meta
    with reading(path, f"class names under {names}"):
        listed = [str(name) for name in _plain_pickle(path)[names]]
    own = checked_labels(np.concatenate([batch[1] for batch in batches]), entry, paths[0])
    images = np.concatenate([batch[0] for batch in batches]).transpose(0, 2, 3, 1)
    return ImageList(images, labels_by_name(listed, entry, path)[own], paths)


def _cifar_batch(path: Path, labels: str) -> tuple[np.ndarray, np.ndarray]:
    with reading(path, f"a batch of CIFAR images with {labels}"):
        batch = _plain_pickle(path)
        images = _pickled_array(batch["data"]).reshape(-1, 3, 32, 32)
        if len(images) != len(batch[labels]):
            raise ValueError(f"{len(images)} images with {len(batch[labels])} labels")
        return images, np.asarray(batch[labels])


def _plain_pickle(path: Path) -> dict[Any, Any]:
    """A dict of plain values; nothing that the file names is imported or called."""
    with path.open("rb") as file:
        try:
            none = lambda *_: NotImplemented  # noqa: E731 - no value from elsewhere, no call made
            value = read_pickle(file, path.stat().st_size, path, none, none).value
        except FileFormatError as error:
            reason = str(error).partition(", got ")[2].partition(". ")[0]
            raise DataError(f"{path}: expected a pickle of values and arrays, got {reason}. Fetch it again.") from error
    if type(value) is not dict:
        raise TypeError("something else than a dict")
    return {key.decode() if isinstance(key, bytes) else key: content for key, content in value.items()}


def _pickled_array(call: Any) -> np.ndarray:
    """The bytes of a numpy array of unsigned bytes from the record of how it is pickled."""
    named = call.function.dotted if isinstance(call, Call) else type(call).__name__
    if named not in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
        raise TypeError(f"{named} instead of an array")
    _, shape, dtype, column_first, content = call.state
    if dtype.arguments[0] not in ("u1", "|u1") or column_first is not False:
        raise TypeError("an array of another kind than unsigned bytes, row by row")
    if isinstance(content, Call):  # how protocol 2 writes bytes in Python 3
        content = content.arguments[0]
    data = content.encode("latin-1") if isinstance(content, str) else content
    return np.frombuffer(data, np.uint8).reshape(shape)


@dataclass(frozen=True)
class _Volume:
    """Images of an HDF5 file, read one at a time; opened each time, because processes must not share a handle."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return _read_volume(self.path, lambda file: np.asarray(file["x"][index]))


def _read_volume(path: Path, read: Callable[[Any], Any]) -> Any:
    import h5py

    with h5py.File(path, "r") as file:
        return read(file)


def _pcam(folder: Path, entry: DataSetEntry, split: str) -> ImageList:
    stem = f"camelyonpatch_level_2_split_{'valid' if split == 'val' else split}"
    images, path = folder / f"{stem}_x.h5", folder / f"{stem}_y.h5"
    with reading(images, "an HDF5 file with images of [N, 96, 96, 3] bytes as x"):
        shape, dtype = _read_volume(images, lambda file: (file["x"].shape, file["x"].dtype))
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"{dtype} {list(shape)}")
    with reading(path, f"an HDF5 file with the {shape[0]} labels of the images next to it as y"):
        labels = _read_volume(path, lambda file: np.asarray(file["y"]).reshape(-1))
        if len(labels) != shape[0]:
            raise ValueError(f"{len(labels)}")
    return ImageList(_Volume(images, int(shape[0])), checked_labels(labels, entry, path), (images,))
