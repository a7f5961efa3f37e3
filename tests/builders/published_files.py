"""Writes tiny copies of the published data sets, in the formats and folders that the real ones have.

``write_published(name, root, layout)`` writes one data set of the registry below ``root``: all of its classes, with
real magic numbers, headers, annotation files and image codecs, and few images. Every image says which class it is of:
it has one colour, from which :func:`label_of` reads the label, so that a test can tell whether it came with its own.

The layouts are ``"torchvision"``, ``"class folders"`` and ``"split lists"`` (as the task-vectors repositories have it),
``"authors"`` (SUN397 with its lists), ``"parquet"`` and ``"archives"`` (as the Hub has it) and ``"saved"`` (as
``save_to_disk`` of the datasets library leaves it). :data:`DEFAULT_LAYOUTS` has the usual one of every data set.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from lit_merge.data.published.registry import REGISTRY, DataSetEntry

__all__ = ["DEFAULT_LAYOUTS", "label_of", "layouts_of", "write_idx", "write_published"]

_STEP = 8
_PER_CHANNEL = 256 // _STEP
_SIDE = 8


def layouts_of(entry: DataSetEntry) -> tuple[str, ...]:
    """The layouts that a data set has, the usual one first."""
    own = [entry.folder_layout] if entry.folder_layout != "torchvision" and entry.folder_splits else []
    if entry.torchvision in _WRITERS:
        own = ["torchvision", *own]
    if entry.folder_layout == "torchvision" and entry.folder_splits and entry.folder_classes:
        own.append("class folders")
    if entry.name == "sun397":
        own.append("authors")
    hub = ["archives" if "wds_" in str(entry.hub) else "parquet", "saved"] if entry.hub else []
    return (*own, *hub)


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of an image of a class; small errors of a codec do not matter."""
    return (label % _PER_CHANNEL * _STEP + 4, label // _PER_CHANNEL * _STEP + 4, 100)


def label_of(image: Image.Image) -> int:
    """The label that an image tells by the colour in its middle; grey images are 20 steps apart."""
    red, green, blue = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
    if abs(red - blue) <= 3 and abs(green - blue) <= 3 and abs(blue - 100) > 3:
        return round((blue - 10) / 20)
    return red // _STEP + _PER_CHANNEL * (green // _STEP)


def write_published(name: str, root: Path, layout: str | None = None, per_class: int = 1) -> dict[str, int]:
    """Write a tiny data set of the registry.

    Args:
        name: of the data set.
        root: the folder of the published data sets.
        layout: see above; None for the usual one.
        per_class: images of each class in each split.

    Returns:
        Split as it is on the disk (``train``, ``test``) -> how many images were written.
    """
    entry = REGISTRY[name]
    layout = layout or DEFAULT_LAYOUTS[name]
    labels = np.repeat(np.arange(len(entry.classes)), per_class).tolist()
    splits = ("train", "test") if "train" in entry.counts else ("test",)
    if layout == "torchvision":
        base = root / entry.torchvision_roots[0]
        for split in splits:
            for arguments in entry.torchvision_arguments[split]:
                _WRITERS[str(entry.torchvision)](base, entry, labels, **arguments)
    elif layout == "class folders":
        folder = root / entry.folders[0]
        for split, below in entry.folder_splits.items():
            for number, label in enumerate(labels):
                write_image(folder / below / entry.folder_classes[label] / f"{split}_{number:04d}.jpg", label)
    elif layout == "split lists":
        _write_split_lists(root / entry.folders[0], entry, labels)
    elif layout == "authors":
        _write_sun397(root / "SUN397", entry, labels)
    else:
        folder = root / str(entry.hub).partition("/")[2]
        {"parquet": write_parquet, "saved": write_saved, "archives": write_archives}[layout](
            folder, entry, labels, splits
        )
    written = {split: len(labels) * max(1, len(entry.torchvision_arguments.get(split, ()))) for split in splits}
    return written if layout == "torchvision" else dict.fromkeys(splits, len(labels))


def write_image(path: Path, label: int, side: int = _SIDE) -> Path:
    """An image file of a class, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".ppm": "PPM", ".png": "PNG"}.get(path.suffix, "JPEG")
    path.write_bytes(_encoded(label, kind, side))
    return path


def _encoded(label: int, kind: str, side: int = _SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour_of(label)).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _pixels(labels: Sequence[int], side: int) -> np.ndarray:
    """uint8 ``[N, side, side, 3]``."""
    colours = np.array([colour_of(label) for label in labels], np.uint8)
    return _marked(np.broadcast_to(colours[:, None, None], (len(labels), side, side, 3)).copy())


def _grey(labels: Sequence[int], side: int) -> np.ndarray:
    """uint8 ``[N, side, side]``."""
    greys = np.array([10 + 20 * label for label in labels], np.uint8)
    return _marked(np.broadcast_to(greys[:, None, None], (len(labels), side, side)).copy())


def _marked(images: np.ndarray) -> np.ndarray:
    """The same with a white spot, so that an image on its side is another one."""
    images[:, 0, 1:3] = 255
    return images


# Files of many images


def write_idx(path: Path, array: np.ndarray) -> Path:
    """An array of unsigned bytes in the IDX format; compressed if the path ends with ``.gz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _write_mnist(folder: str) -> Callable[..., None]:
    def write(root: Path, entry: DataSetEntry, labels: list[int], train: bool) -> None:
        _write_idx_pair(root / folder / "raw" / ("train" if train else "t10k"), labels)

    return write


def _write_emnist(root: Path, entry: DataSetEntry, labels: list[int], split: str, train: bool) -> None:
    _write_idx_pair(root / "EMNIST" / "raw" / f"emnist-{split}-{'train' if train else 'test'}", labels)


def _write_idx_pair(prefix: Path, labels: list[int]) -> None:
    write_idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte"), _grey(labels, 28))
    write_idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte"), np.array(labels))


def _write_svhn(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    digits = np.array([label or 10 for label in labels], np.uint8)[:, None]
    savemat(root / f"{split}_32x32.mat", {"X": _pixels(labels, 32).transpose(1, 2, 3, 0), "y": digits})


class _OldPickler(pickle._Pickler):  # type: ignore[misc]
    """Writes what Python 2 wrote: strings of bytes, and numpy's functions under their former names."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, text: str | bytes) -> None:
        data = text.encode("latin-1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    def save_old_global(self, function: Any, name: str | None = None) -> None:
        module = function.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{function.__name__}\n".encode())
        self.memoize(function)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            function = np.zeros(0).__reduce__()[0]
            return function, (np.ndarray, (0,), "b"), (1, value.shape, value.dtype, False, value.tobytes())
        return NotImplemented

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[type(len)] = dispatch[type] = save_old_global


def write_cifar(path: Path, content: dict[str, Any]) -> Path:
    """A pickle of CIFAR's kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        _OldPickler(file, protocol=2).dump(content)
    return path


def _write_cifar10(root: Path, entry: DataSetEntry, labels: list[int], train: bool) -> None:
    folder = root / "cifar-10-batches-py"
    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    for number, name in enumerate(names):
        own = labels[number :: len(names)]
        data = _pixels(own, 32).transpose(0, 3, 1, 2).reshape(len(own), -1)
        content = {"batch_label": name, "labels": own, "data": data, "filenames": [f"{one}.png" for one in own]}
        write_cifar(folder / name, content)
    write_cifar(
        folder / "batches.meta", {"num_cases_per_batch": 10000, "label_names": list(entry.classes), "num_vis": 3072}
    )


def _write_cifar100(root: Path, entry: DataSetEntry, labels: list[int], train: bool) -> None:
    folder = root / "cifar-100-python"
    data = _pixels(labels, 32).transpose(0, 3, 1, 2).reshape(len(labels), -1)
    content = {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels], "data": data}
    write_cifar(folder / ("train" if train else "test"), content)
    write_cifar(folder / "meta", {"fine_label_names": list(entry.classes), "coarse_label_names": ["people"]})


def _write_stl10(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_X.bin").write_bytes(_pixels(labels, 96).transpose(0, 3, 2, 1).tobytes())
    (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    (folder / "class_names.txt").write_text("\n".join(entry.classes) + "\n")


def _write_fer2013(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    """All splits share a file; the two halves of the test are there in turn."""
    path = root / "fer2013" / "fer2013.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else ["emotion,pixels,Usage"]
    for number, label in enumerate(labels):
        usage = "Training" if split == "train" else ("PublicTest", "PrivateTest")[number % 2]
        pixels = " ".join([str(10 + 20 * label)] * 48 * 48)
        lines.append(f"{label},{pixels},{usage}")
    path.write_text("\n".join(lines) + "\n")


def _write_pcam(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    import h5py

    stem = root / "pcam" / f"camelyonpatch_level_2_split_{'valid' if split == 'val' else split}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = _pixels(labels, 96)
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


# Files of one image, and the tables that belong to them


def _write_gtsrb(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    base = root / "gtsrb"
    if split == "train":
        for number, label in enumerate(labels):
            write_image(base / "GTSRB" / "Training" / f"{label:05d}" / f"{number:05d}_00000.ppm", label)
        return
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate(reversed(labels)):
        write_image(base / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", label)
        lines.append(f"{number:05d}.ppm;8;8;1;1;7;7;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


def _write_cars(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, label in enumerate(reversed(labels)):
        write_image(base / f"cars_{split}" / f"{number + 1:05d}.jpg", label)
        rows.append((1, 2, 3, 4, label + 1, f"{number + 1:05d}.jpg"))
    kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    path = base / "devkit/cars_train_annos.mat" if split == "train" else base / "cars_test_annos_withlabels.mat"
    savemat(path, {"annotations": np.array(rows, dtype=kind)[None]})
    names = np.empty((1, len(entry.classes)), object)
    names[0] = entry.classes
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})


def _write_dtd(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True, exist_ok=True)
    first = ("train", "val", "test").index(split) * 1000
    names = []
    for number, label in enumerate(labels):
        folder = entry.folder_classes[label]
        names.append(f"{folder}/{folder}_{first + number:04d}.jpg")
        write_image(base / "images" / names[-1], label)
    (base / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")


def _write_flowers(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    """Both splits share the table of labels, so that it is made for both at once."""
    from scipy.io import savemat

    base = root / "flowers-102"
    count = len(labels)
    ids = {
        "trnid": np.arange(1, count + 1),
        "valid": np.array([count + 1]),
        "tstid": np.arange(count + 2, 2 * count + 2),
    }
    base.mkdir(parents=True, exist_ok=True)
    savemat(base / "setid.mat", {key: value[None] for key, value in ids.items()})
    savemat(base / "imagelabels.mat", {"labels": np.array([*labels, 0, *labels])[None] + 1})
    for number, label in zip(ids["trnid" if split == "train" else "tstid"], labels, strict=True):
        write_image(base / "jpg" / f"image_{number:05d}.jpg", label)


def _write_pets(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, label in enumerate(reversed(labels)):
        cat = label in (0, 5, 6)
        name = entry.classes[label].replace(" ", "_")
        image = f"{name if cat else name.lower()}_{number + (split == 'test') * 500}"
        write_image(base / "images" / f"{image}.jpg", label)
        lines.append(f"{image} {label + 1} {1 if cat else 2} {label + 1}")
    (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def _write_food(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True, exist_ok=True)
    listed: dict[str, list[str]] = {}
    for number, label in enumerate(reversed(labels)):
        folder = entry.classes[label].replace(" ", "_")
        listed.setdefault(folder, []).append(f"{folder}/{number + (split == 'test') * 5000}")
        write_image(base / "images" / f"{listed[folder][-1]}.jpg", label)
    (base / "meta" / f"{split}.json").write_text(json.dumps(listed))


def _write_sst2(root: Path, entry: DataSetEntry, labels: list[int], split: str) -> None:
    folder = root / "rendered-sst2" / ("valid" if split == "val" else split)
    for number, label in enumerate(labels):
        write_image(folder / entry.classes[label] / f"{number}.png", label)


def _write_split_lists(folder: Path, entry: DataSetEntry, labels: list[int]) -> None:
    for split, name in entry.folder_splits.items():
        names = []
        for number, label in enumerate(labels):
            names.append(f"{entry.folder_classes[label]}_{split}{number:03d}.jpg")
            write_image(folder / entry.image_folder / entry.folder_classes[label] / names[-1], label)
        (folder / name).write_text("\n".join(reversed(names)) + "\n")


def _write_sun397(folder: Path, entry: DataSetEntry, labels: list[int]) -> None:
    """``a_apartment_building_outdoor`` is in ``a/apartment_building/outdoor``: the last word alone tells nothing."""
    nested = {"outdoor", "indoor", "exterior", "interior", "public", "shop", "vehicle"}
    for list_name, split in (("Training_01.txt", 0), ("Testing_01.txt", 1)):
        lines = []
        for number, label in enumerate(labels):
            name = entry.folder_classes[label]
            stem, _, last = name[2:].rpartition("_")
            below = f"{stem}/{last}" if last in nested and stem else name[2:]
            lines.append(f"/{name[0]}/{below}/sun_{split}{number:05d}.jpg")
            write_image(folder / lines[-1][1:], label)
        (folder / list_name).write_text("\n".join(reversed(lines)) + "\n")


# The Hub


def _table(entry: DataSetEntry, labels: list[int], names: Sequence[str] | None = None) -> Any:
    import datasets

    image, label = entry.hub_columns
    datasets.disable_progress_bars()
    if names is None:  # where names repeat, the Hub has more words
        repeated = {name for name in entry.classes if entry.classes.count(name) > 1}
        names = [f"{name}, {number}" if name in repeated else name for number, name in enumerate(entry.classes)]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    content = {image: [{"bytes": _encoded(one, "PNG"), "path": None} for one in labels], label: labels}
    return datasets.Dataset.from_dict(content, features=features)


def write_parquet(
    folder: Path, entry: DataSetEntry, labels: list[int], splits: Sequence[str], names: Sequence[str] | None = None
) -> None:
    """The files of a data set on the Hub, as ``hf download`` leaves them; ``names`` are those of its labels."""
    below = folder / (entry.hub_config or "data")
    below.mkdir(parents=True, exist_ok=True)
    for split in splits:
        name = entry.hub_splits.get(split, split)
        _table(entry, labels, names).to_parquet(str(below / f"{name}-00000-of-00001.parquet"))


def write_saved(folder: Path, entry: DataSetEntry, labels: list[int], splits: Sequence[str]) -> None:
    """What ``save_to_disk`` leaves."""
    import datasets

    tables = {entry.hub_splits.get(split, split): _table(entry, labels) for split in splits}
    datasets.DatasetDict(tables).save_to_disk(str(folder))


def write_archives(folder: Path, entry: DataSetEntry, labels: list[int], splits: Sequence[str]) -> None:
    """Archives of images and labels ("webdataset"), with the Hub's own numbers of the classes."""
    image, label = entry.hub_columns
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "PNG"}[image]  # what is in it is recognised by its content
    order = list(entry.hub_classes or entry.classes)
    for split in splits:
        path = folder / entry.hub_splits.get(split, split) / "0.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for number, one in enumerate(labels):
                own = order.index(entry.classes[one]) if entry.hub_classes else one
                for suffix, content in ((label, str(own).encode()), (image, _encoded(one, kind))):
                    member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


_WRITERS: dict[str, Callable[..., None]] = {
    "MNIST": _write_mnist("MNIST"),
    "FashionMNIST": _write_mnist("FashionMNIST"),
    "KMNIST": _write_mnist("KMNIST"),
    "EMNIST": _write_emnist,
    "SVHN": _write_svhn,
    "CIFAR10": _write_cifar10,
    "CIFAR100": _write_cifar100,
    "STL10": _write_stl10,
    "FER2013": _write_fer2013,
    "PCAM": _write_pcam,
    "GTSRB": _write_gtsrb,
    "StanfordCars": _write_cars,
    "DTD": _write_dtd,
    "Flowers102": _write_flowers,
    "OxfordIIITPet": _write_pets,
    "Food101": _write_food,
    "RenderedSST2": _write_sst2,
}

DEFAULT_LAYOUTS: dict[str, str] = {name: layouts_of(entry)[0] for name, entry in REGISTRY.items()}
"""The layout that :func:`write_published` writes unless told otherwise."""
