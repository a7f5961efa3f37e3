"""Data sets of the Hugging Face Hub that are on the disk: saved tables, Parquet files, archives, and the two caches.

Nothing is downloaded here. Tables are read with the ``datasets`` library, which maps them into memory; Parquet files
are first converted, once, into the cache. Archives ("webdataset") are read without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_merge.data.published.class_names import checked_labels, labels_by_name, labels_in_order
from lit_merge.data.published.original_arrays import reading
from lit_merge.data.published.registry import DataSetEntry
from lit_merge.data.published.stored import ArchivePictures, Listed, TablePictures
from lit_merge.errors import DataError
from lit_merge.files.cache import cache_directory

__all__ = [
    "cached_snapshot",
    "cached_tables",
    "has_hub_files",
    "has_saved_tables",
    "hub_files",
    "saved_table",
    "snapshots_folder",
    "tables_folder",
]

_INSTALL = "Run: pip install 'lit-merge[data]'."
_DEPTH = 3
"""How deep below a folder the Hub's files lie: ``<configuration>/<split>/0000.parquet``."""


def has_saved_tables(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the ``datasets`` library wrote into a folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def saved_table(folder: Path, entry: DataSetEntry, split: str) -> Listed | None:
    """A split that ``save_to_disk`` wrote; None if there is none.

    Raises:
        DataError: it is damaged, lacks the columns, or has other classes; or ``datasets`` is not installed.
    """
    name = entry.hub_splits.get(split, split)
    path = next((folder / one for one in (name, split) if (folder / one / "state.json").exists()), None)
    if path is None:
        return None
    with reading(path, "a table that save_to_disk wrote"):
        return _listed(_datasets(path).load_from_disk(str(path)), entry, (path / "state.json",))


def has_hub_files(folder: Path) -> bool:
    """Whether Parquet files or archives lie in a folder as the Hub has them."""
    return bool(_files(folder))


def hub_files(folder: Path, entry: DataSetEntry, split: str) -> Listed | None:
    """A split whose Parquet files or archives lie in a folder as the Hub has them; None if there is none.

    Raises:
        DataError: a file is damaged, the columns are missing, or the classes are others.
    """
    name = entry.hub_splits.get(split, split)
    belongs = re.compile(rf"{re.escape(name)}([-_.]\d.*)?$")
    files = [
        path
        for path in _files(folder)
        if any(belongs.match(part) for part in (path.name.removesuffix(path.suffix), path.parent.name))
    ]
    configured = [path for path in files if entry.hub_config in path.relative_to(folder).parts]
    files = configured or files
    if not files:
        return None
    if {path.suffix for path in files} == {".tar"}:
        return _archives(files, entry)
    paths = tuple(path for path in files if path.suffix == ".parquet")
    with reading(paths[0], f"Parquet files with the columns {' and '.join(entry.hub_columns)}"):
        library = _datasets(paths[0])
        with _without_bars(library):
            table = library.Dataset.from_parquet(
                [str(path) for path in paths], cache_dir=str(cache_directory("tables"))
            )
        return _listed(table, entry, paths)


def cached_snapshot(entry: DataSetEntry) -> Path | None:
    """The newest folder of the data set in the Hub's own cache, where ``hf download`` leaves it; None if none."""
    folders = [folder for folder in snapshots_folder(entry).glob("*") if _files(folder)]
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns, default=None)


def snapshots_folder(entry: DataSetEntry) -> Path:
    """Where the Hub's own cache keeps the data set, a folder per revision."""
    home = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    cache = Path(home).expanduser() if home else _hugging_face_home() / "hub"
    return cache / f"datasets--{str(entry.hub).replace('/', '--')}" / "snapshots"


def cached_tables(entry: DataSetEntry, split: str) -> Listed | None:
    """A split in the cache of the ``datasets`` library, where ``load_dataset`` leaves it; None if there is none.

    Raises:
        DataError: it is damaged, lacks the columns, or has other classes.
    """
    name = entry.hub_splits.get(split, split)
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(tables_folder(entry).glob(f"{entry.hub_config or '*'}/*/*/*-{name}*.arrow")):
        if re.search(rf"-{re.escape(name)}(-\d+-of-\d+)?\.arrow$", path.name):
            by_folder.setdefault(path.parent, []).append(path)
    if not by_folder:
        return None
    paths = by_folder[max(by_folder, key=lambda folder: folder.stat().st_mtime_ns)]
    with reading(paths[0], "an Arrow file of the datasets library"):
        library = _datasets(paths[0])
        tables = [library.Dataset.from_file(str(path)) for path in paths]
        return _listed(library.concatenate_datasets(tables), entry, tuple(paths))


def tables_folder(entry: DataSetEntry) -> Path:
    """Where the ``datasets`` library caches the data set's tables."""
    home = os.environ.get("HF_DATASETS_CACHE")
    cache = Path(home) if home else _hugging_face_home() / "datasets"
    owner, _, name = str(entry.hub).partition("/")
    return cache.expanduser() / f"{owner}___{_snake_case(name)}"


def _hugging_face_home() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(shared) / "huggingface").expanduser()


def _snake_case(name: str) -> str:
    """As the library writes names of folders: ``PatchCamelyon`` -> ``patch_camelyon``."""
    apart = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z\d])([A-Z])", r"\1_\2", apart).lower()


def _files(folder: Path) -> list[Path]:
    """Parquet files and archives at most ``_DEPTH`` folders below, sorted; hidden folders are not looked at."""
    if not folder.is_dir():
        return []
    found = [path for depth in range(_DEPTH) for path in folder.glob("*/" * depth + "*") if not path.is_dir()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(path for path in visible if path.suffix in (".parquet", ".tar"))


def _datasets(where: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{where}: expected the datasets library to read it, got none. {_INSTALL}") from error
    return datasets


@contextlib.contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    """Leaves the progress bars of the ``datasets`` library out."""
    enabled = library.is_progress_bar_enabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            library.enable_progress_bars()


def _listed(table: Any, entry: DataSetEntry, files: tuple[Path, ...]) -> Listed:
    image, label = entry.hub_columns
    where = files[0].parent
    missing = [column for column in entry.hub_columns if column not in table.column_names]
    if missing:
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
        labels = _numbered(own, named, entry, where)
    pictures = table.select_columns([image]).cast_column(image, _datasets(where).Image(decode=False))
    return Listed(TablePictures(pictures, image, files), labels)


def _numbered(own: np.ndarray, named: Sequence[str] | None, entry: DataSetEntry, where: Path) -> np.ndarray:
    """Labels of the registry from those of the Hub."""
    numbers = checked_labels(own.astype(np.int64) if own.dtype == bool else own, entry, where)
    if named is not None:
        return labels_in_order(named, entry, where)[numbers]
    return labels_by_name(entry.hub_classes, entry, where)[numbers] if entry.hub_classes else numbers


def _archives(paths: Sequence[Path], entry: DataSetEntry) -> Listed:
    """Archives in which every image is followed, or preceded, by its label under the same name."""
    image, label = entry.hub_columns
    places, labels = [], []
    for number, path in enumerate(paths):
        with reading(path, f"an archive with .{image} and .{label} files"), tarfile.open(path, "r:") as archive:
            parts: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, kind = file.partition(".")
                key = f"{folder}/{stem}"
                if member.isfile() and kind in (image, label):
                    parts.setdefault(key, {})[kind] = member
            for key, part in parts.items():
                if len(part) < 2:
                    raise ValueError(f"{key} without its .{label if image in part else image}")
                content = archive.extractfile(part[label])
                labels.append(int(content.read(20) if content else b""))
                places.append((number, part[image].offset_data, part[image].size))
    checked = _numbered(np.array(labels, np.int64), None, entry, paths[0].parent)
    return Listed(ArchivePictures(tuple(paths), np.array(places, np.int64).reshape(-1, 3)), checked)
