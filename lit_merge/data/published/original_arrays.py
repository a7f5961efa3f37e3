"""Data sets whose authors keep many images in one file: IDX, MATLAB, CIFAR's and STL-10's files, CSV and HDF5.

Each function reads what the class of the same name in ``torchvision.datasets`` reads, from where that class expects it
below its ``root``, and takes that class's arguments. It does so without torchvision: pickles are not executed, files of
gigabytes are not hashed every time, and what is wrong is said in one line.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from lit_merge.checkpoints.pickles.machine import Call, read_pickle
from lit_merge.data.images.reading import first_line
from lit_merge.data.published.class_names import checked_labels, labels_by_name
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.data.published.stored import ArrayPictures, Listed, VolumePictures, open_volumes
from lit_merge.errors import DataError, FileFormatError, LitMergeError

__all__ = ["ARRAY_READERS", "ArrayReader", "read_mat", "reading"]

ArrayReader = Callable[..., Listed]
"""``(root, entry, **arguments of torchvision's class) -> images``."""


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a damaged file leads to into one line.

    Raises:
        DataError: the file is missing, truncated, malformed, or of another kind.
    """
    try:
        yield
    except LitMergeError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename or path}: expected {what}, got no such file. Complete the data set."
        ) from error
    except Exception as error:  # parsers raise whatever the damage leads to
        raise DataError(f"{path}: expected {what}, got {first_line(error)}. Fetch the file again.") from error


def read_mat(path: Path) -> Mapping[str, Any]:
    """Read a MATLAB file.

    Raises:
        DataError: it is missing or damaged, or scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{path}: expected scipy to read it, got none. Run: pip install 'lit-merge[data]'.") from error
    with reading(path, "a MATLAB file"):
        contents: Mapping[str, Any] = loadmat(str(path), squeeze_me=True)
        return contents


def _mnist(folder: str, root: Path, entry: DataSetEntry, train: bool) -> Listed:
    return _idx(root / folder / "raw", "train" if train else "t10k", entry)


def _emnist(root: Path, entry: DataSetEntry, split: str, train: bool) -> Listed:
    """As the files have them, on their side: the papers' programs do not turn them either."""
    return _idx(
        root / "EMNIST" / "raw", f"emnist-{split}-{'train' if train else 'test'}", entry, int(split == "letters")
    )


def _idx(folder: Path, prefix: str, entry: DataSetEntry, first_label: int = 0) -> Listed:
    """Images and labels of the IDX format (http://yann.lecun.com/exdb/mnist), compressed or not."""
    images, images_path = _idx_array(folder / f"{prefix}-images-idx3-ubyte", 3)
    labels, labels_path = _idx_array(folder / f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: expected the labels of the {len(images)} images beside it, got {len(labels)}. "
            "Fetch both files again."
        )
    checked = checked_labels(labels.astype(np.int64) - first_label, entry, labels_path)
    return Listed(ArrayPictures(images, (images_path, labels_path)), checked)


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
    """As many bytes as the shape says, and not one more; read in pieces, because the header may say anything."""
    count, pieces = int(np.prod([1, *shape], dtype=object)), []
    while count > 0 and (piece := file.read(min(count, 1 << 24))):
        pieces.append(piece)
        count -= len(piece)
    if count or file.read(1):
        raise ValueError(f"{'fewer' if count else 'more'} bytes than the {'x'.join(map(str, shape))} of its header")
    return b"".join(pieces)


def _svhn(root: Path, entry: DataSetEntry, split: str) -> Listed:
    path = root / f"{split}_32x32.mat"
    contents = read_mat(path)
    with reading(path, "X of [32, 32, 3, N] bytes and y of N labels"):
        images, labels = np.asarray(contents["X"]), np.atleast_1d(contents["y"]).astype(np.int64)
        if images.ndim == 3:  # of a single image
            images = images[..., None]
        if images.dtype != np.uint8 or images.shape != (*images.shape[:2], 3, len(labels)):
            raise ValueError(f"X of {images.dtype} {list(images.shape)} with {len(labels)} labels")
    digits = np.where(labels == 10, 0, labels)  # the file calls the digit 0 ten
    pictures = ArrayPictures(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), (path,))
    return Listed(pictures, checked_labels(digits, entry, path))


def _cifar(folder: str, files: Mapping[bool, Sequence[str]], names: tuple[str, str], labels: str) -> ArrayReader:
    def read(root: Path, entry: DataSetEntry, train: bool) -> Listed:
        paths = tuple(root / folder / name for name in files[train])
        batches = [_cifar_batch(path, labels) for path in paths]
        images = np.concatenate([batch[0] for batch in batches])
        meta = root / folder / names[0]
        with reading(meta, f"class names under {names[1]}"):
            listed = [str(name) for name in _plain_pickle(meta)[names[1]]]
        own = np.concatenate([batch[1] for batch in batches])
        mapped = labels_by_name(listed, entry, meta)[checked_labels(own, entry, paths[0])]
        return Listed(ArrayPictures(images, paths), mapped)

    return read


def _cifar_batch(path: Path, labels: str) -> tuple[np.ndarray, np.ndarray]:
    with reading(path, f"a batch of CIFAR images with {labels}"):
        batch = _plain_pickle(path)
        images = _array(batch["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if len(images) != len(batch[labels]):
            raise ValueError(f"{len(images)} images with {len(batch[labels])} labels")
        return np.ascontiguousarray(images), np.asarray(batch[labels])


def _plain_pickle(path: Path) -> dict[Any, Any]:
    """A dict of plain values; nothing that the file names is imported or called."""
    with path.open("rb") as file:
        try:
            value = read_pickle(file, path.stat().st_size, path, _no_persistent, _not_rebuilt).value
        except FileFormatError as error:
            reason = str(error).partition(", got ")[2].partition(". ")[0]
            raise DataError(f"{path}: expected a pickle of values and arrays, got {reason}. Fetch it again.") from error
    if type(value) is not dict:
        raise TypeError("something else than a dict")
    return {key.decode() if isinstance(key, bytes) else key: content for key, content in value.items()}


def _no_persistent(identifier: Any) -> Any:
    raise ValueError("a reference to another file")


def _not_rebuilt(function: Any, arguments: tuple[Any, ...]) -> Any:
    return NotImplemented


def _array(call: Any) -> np.ndarray:
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


def _stl10(root: Path, entry: DataSetEntry, split: str) -> Listed:
    folder = root / "stl10_binary"
    paths = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    with reading(paths[0], "images of 3 x 96 x 96 bytes each, column after column, with a label each"):
        labels = np.fromfile(paths[1], np.uint8).astype(np.int64) - 1
        if paths[0].stat().st_size != len(labels) * 3 * 96 * 96:
            raise ValueError(f"{paths[0].stat().st_size} bytes with {len(labels)} labels")
        images = np.memmap(paths[0], np.uint8, "r", shape=(len(labels), 3, 96, 96))
    names = folder / "class_names.txt"
    with reading(names, "class names, one per line"):
        listed = names.read_text(encoding="utf-8").split()
    mapped = labels_by_name(listed, entry, names)[checked_labels(labels, entry, paths[1])]
    return Listed(ArrayPictures(images.transpose(0, 3, 2, 1), paths), mapped)


def _fer2013(root: Path, entry: DataSetEntry, split: str) -> Listed:
    """Of ``fer2013.csv``, ``icml_face_data.csv``, or ``train.csv``: a competition's ``test.csv`` has no labels."""
    folder = root / "fer2013"
    names = ("fer2013.csv", "icml_face_data.csv", "train.csv")
    path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    usages = ("Training",) if split == "train" else ("PublicTest", "PrivateTest")
    if path.name == "train.csv" and split != "train":
        raise DataError(f"{folder}: expected fer2013.csv, got only train.csv, without test labels. Add fer2013.csv.")
    images: list[np.ndarray] = []
    labels: list[int] = []
    with reading(path, "columns emotion, pixels and Usage, of 48 x 48 pixels"), path.open(newline="") as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            if path.name != "train.csv" and row["Usage"] not in usages:
                continue
            pixels = np.fromstring(row["pixels"], np.int64, sep=" ")
            if len(pixels) != 48 * 48 or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError(f"other pixels in image {len(images)} of {split}")
            images.append(pixels.astype(np.uint8).reshape(48, 48))
            labels.append(int(row["emotion"]))
    pictures = ArrayPictures(np.stack(images) if images else np.zeros((0, 48, 48), np.uint8), (path,))
    return Listed(pictures, checked_labels(np.array(labels, np.int64), entry, path))


def _pcam(root: Path, entry: DataSetEntry, split: str) -> Listed:
    stem = f"camelyonpatch_level_2_split_{'valid' if split == 'val' else split}"
    images, labels = root / "pcam" / f"{stem}_x.h5", root / "pcam" / f"{stem}_y.h5"
    with reading(images, "an HDF5 file with images of [N, 96, 96, 3] bytes as x"):
        pictures = VolumePictures(images, "x")
    with reading(labels, f"an HDF5 file with the {len(pictures)} labels of the images beside it as y"):
        with open_volumes(labels) as file:
            own = np.asarray(file["y"]).reshape(-1)
        if len(own) != len(pictures):
            raise ValueError(f"{len(own)}")
    return Listed(pictures, checked_labels(own, entry, labels))


def _named(folder: str) -> ArrayReader:
    def read(root: Path, entry: DataSetEntry, train: bool) -> Listed:
        return _mnist(folder, root, entry, train)

    return read


ARRAY_READERS: Mapping[str, ArrayReader] = {
    "MNIST": _named("MNIST"),
    "FashionMNIST": _named("FashionMNIST"),
    "KMNIST": _named("KMNIST"),
    "EMNIST": _emnist,
    "SVHN": _svhn,
    "CIFAR10": _cifar(
        "cifar-10-batches-py",
        {True: [f"data_batch_{number}" for number in range(1, 6)], False: ["test_batch"]},
        ("batches.meta", "label_names"),
        "labels",
    ),
    "CIFAR100": _cifar(
        "cifar-100-python", {True: ["train"], False: ["test"]}, ("meta", "fine_label_names"), "fine_labels"
    ),
    "STL10": _stl10,
    "FER2013": _fer2013,
    "PCAM": _pcam,
}
"""Name of torchvision's class -> what reads its files."""
