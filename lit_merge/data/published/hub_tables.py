"""Data sets of the Hugging Face Hub that are on the disk: saved tables, Parquet files, archives, and the two caches.

Nothing is downloaded here. The ``datasets`` library reads them and maps them into memory; Parquet files and archives of
images and labels ("webdataset") it first converts, once, into lit-merge's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_merge.data.images.reading import reading
from lit_merge.data.published.class_names import checked_labels, labels_by_name, labels_in_order
from lit_merge.data.published.image_list import ImageList
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.errors import DataError
from lit_merge.files.cache_directory import cache_directory

__all__ = [
    "OnTheHub",
    "cached_arrow",
    "cached_snapshot",
    "cached_tables",
    "has_tables",
    "read_tables",
    "saved_split",
    "snapshots_folder",
    "split_files",
    "tables_folder",
]

_SUFFIXES = (".parquet", ".tar")

_DEPTH = 3
"""How deep below a folder the Hub's files lie: ``<configuration>/<split>/0000.parquet``."""


def has_tables(folder: Path) -> bool:
    """Whether a folder has what ``save_to_disk`` of the ``datasets`` library, or ``hf download``, leaves."""
    return _is_saved(folder) or bool(_files(folder))


def read_tables(folder: Path, entry: DataSetEntry, split: str) -> ImageList | None:
    """A split that ``save_to_disk`` or ``hf download`` left in a folder; None if there is none.

    Raises:
        DataError: it is damaged, lacks the columns, or has other classes; or ``datasets`` is not installed.
    """
    name = entry.hub_splits.get(split, split)
    if _is_saved(folder):
        path = saved_split(folder, (name, split))
        if path is None:
            return None
        with reading(path, "a table that save_to_disk wrote"):
            import datasets

            return _listed(datasets.load_from_disk(str(path)), entry, (path / "state.json",))
    files = split_files(folder, name, entry.hub_config)
    paths = tuple(path for path in files if path.suffix == ".parquet") or files
    if not paths:
        return None
    image, label = entry.hub_columns
    kind, what = (
        ("parquet", f"Parquet files with the columns {image} and {label}")
        if paths[0].suffix == ".parquet"
        else ("webdataset", f"an archive with .{image} and .{label} files")
    )
    with reading(paths[0], what):
        return _listed(_converted(kind, paths), entry, paths)


def saved_split(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these splits in what ``save_to_disk`` of several splits left in a folder; None if there is none."""
    return next((folder / name for name in names if (folder / name / "state.json").exists()), None)


def split_files(
    folder: Path, name: str, config: str | None = None, suffixes: Sequence[str] = _SUFFIXES
) -> tuple[Path, ...]:
    """The files of a split as they lie on the Hub: ``NAME-00000-of-00001.parquet``, or in a folder ``NAME``.

    Args:
        folder: which holds them, at most a few folders deep.
        name: of the split.
        config: the folder of a configuration; files in it are preferred.
        suffixes: of the files.
    """
    belongs = re.compile(rf"{re.escape(name)}([-_.]\d.*)?$")
    files = [
        path
        for path in _files(folder, suffixes)
        if belongs.match(path.name.removesuffix(path.suffix))
        or (path.parent != folder and belongs.match(path.parent.name))
    ]
    return tuple(path for path in files if config in path.relative_to(folder).parts) or tuple(files)


def _converted(kind: str, paths: Sequence[Path]) -> Any:
    """The table of some files; they are converted once, also if their folder moves."""
    import datasets

    facts = [kind, *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)]
    cache = cache_directory("tables") / hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if not _complete(cache):
        enabled = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            datasets.load_dataset(kind, data_files=list(map(str, paths)), split="train", cache_dir=str(cache))
        finally:
            if enabled:
                datasets.enable_progress_bars()
    return _joined(_complete(cache))


def _complete(cache: Path) -> list[Path]:
    found = cache.glob("*/*/*/*/*.arrow")
    return sorted(path for path in found if not path.parent.name.endswith(".incomplete"))


def _joined(paths: Sequence[Path]) -> Any:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])


class OnTheHub(Protocol):
    """What is known of a data set on the Hub."""

    @property
    def hub(self) -> str | None:
        """``owner/name``."""

    @property
    def hub_config(self) -> str | None:
        """Its configuration, if it has several."""


def cached_snapshot(entry: OnTheHub) -> Path | None:
    """The newest folder of the data set in the Hub's own cache, where ``hf download`` leaves it; None if none."""
    folders = [folder for folder in snapshots_folder(entry).glob("*") if _files(folder)]
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns, default=None)


def snapshots_folder(entry: OnTheHub) -> Path:
    """Where the Hub's own cache has the data set, a folder per revision."""
    home = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    cache = Path(home).expanduser() if home else _hugging_face_home() / "hub"
    return cache / f"datasets--{str(entry.hub).replace('/', '--')}" / "snapshots"


def cached_tables(entry: DataSetEntry, split: str) -> ImageList | None:
    """A split in the cache of the ``datasets`` library, where ``load_dataset`` leaves it; None if there is none.

    Raises:
        DataError: it is damaged, lacks the columns, or has other classes.
    """
    paths = cached_arrow(entry, entry.hub_splits.get(split, split))
    if not paths:
        return None
    with reading(paths[0], "an Arrow file of the datasets library"):
        return _listed(_joined(paths), entry, tuple(paths))


def cached_arrow(entry: OnTheHub, name: str) -> list[Path]:
    """The newest files of a split in the cache of the ``datasets`` library; none if it is not there."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(tables_folder(entry).glob(f"{entry.hub_config or '*'}/*/*/*-{name}*.arrow")):
        if re.search(rf"-{re.escape(name)}(-\d+-of-\d+)?\.arrow$", path.name):
            by_folder.setdefault(path.parent, []).append(path)
    return by_folder[max(by_folder, key=lambda folder: folder.stat().st_mtime_ns)] if by_folder else []


def tables_folder(entry: OnTheHub) -> Path:
    """Where the ``datasets`` library caches the data set's tables."""
    home = os.environ.get("HF_DATASETS_CACHE")
    cache = Path(home) if home else _hugging_face_home() / "datasets"
    owner, _, name = str(entry.hub).partition("/")
    for pattern in (
        r"([A-Z]+)([A-Z][a-z])",
        r"([a-z\d])([A-Z])",
    ):  # PatchCamelyon -> patch_camelyon
        name = re.sub(pattern, r"\1_\2", name)
    return cache.expanduser() / f"{owner}___{name.lower()}"


def _hugging_face_home() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(shared) / "huggingface").expanduser()


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def _files(folder: Path, suffixes: Sequence[str] = _SUFFIXES) -> list[Path]:
    """Files at most ``_DEPTH`` folders below, sorted; hidden folders are not looked at."""
    if not folder.is_dir():
        return []
    found = [path for depth in range(_DEPTH) for path in folder.glob("*/" * depth + "*") if not path.is_dir()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(path for path in visible if path.suffix in suffixes)


@dataclass(frozen=True)
class _Column:
    """A column of images, decoded when they are asked for."""

    table: Any
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index][self.name]


def _listed(table: Any, entry: DataSetEntry, files: tuple[Path, ...]) -> ImageList:
    import datasets

    image, label = entry.hub_columns
    where = files[0].parent
    if not {image, label} <= set(table.column_names):
        raise DataError(
            f"{where}: expected the columns {image} and {label}, got {', '.join(table.column_names)}. "
            f"It may be another data set than {entry.hub}: fetch that one."
        )
    own = np.asarray(table[label][:])
    if own.dtype.kind in "US":  # names instead of numbers
        names, numbers = np.unique(own, return_inverse=True)
        labels = labels_by_name(names.tolist(), entry, where)[numbers]
    else:
        named = getattr(table.features[label], "names", None)
        labels = checked_labels(own.astype(np.int64) if own.dtype == bool else own, entry, where)
        if named is not None:
            labels = labels_in_order(named, entry, where)[labels]
        elif entry.hub_classes:
            labels = labels_by_name(entry.hub_classes, entry, where)[labels]
    pictures = table.select_columns([image]).cast_column(image, datasets.Image())
    return ImageList(_Column(pictures, image), labels, files)
