"""Where a task's rows are stored: one table that is to be divided, or a table per split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_merge.data.published.hub_tables import saved_split, split_files
from lit_merge.data.text.tables import SUFFIXES, Table, from_hub, of_rows, read_parquet, read_saved, read_table
from lit_merge.errors import ConfigurationError, DataError

__all__ = ["STORED_NAMES", "FileStore", "FolderStore", "HubStore", "RowStore", "Store"]

STORED_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Split -> what it may be called where it is stored, the first that is there."""


class Store(ABC):
    """Tables of a task, read when they are asked for.

    Attributes:
        where: for messages.
        divided: whether there is a table per split; otherwise the one that there is goes by any name.
    """

    where: str
    divided = True

    @property
    def files(self) -> list[Path]:
        """The files, or folders of them, that the tables are in; none if they are nowhere on the disk of their own."""
        return []

    @abstractmethod
    def table(self, name: str) -> Table | None:
        """A stored split; None if there is none.

        Raises:
            DataError: it is missing, damaged or empty.
        """


class RowStore(Store):
    """Rows in memory: a list, or a list per split."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.where, self.divided = "rows", isinstance(rows, Mapping)
        self._rows = rows

    def table(self, name: str) -> Table | None:
        """See :meth:`Store.table`."""
        if not isinstance(self._rows, Mapping):
            return of_rows(self._rows)
        return of_rows(self._rows[name], f"rows.{name}") if name in self._rows else None


class FileStore(Store):
    """One file, or a file per split."""

    def __init__(self, files: str | Path | Mapping[str, str], encoding: str = "utf-8") -> None:
        self.divided = isinstance(files, Mapping)
        named = dict(files) if isinstance(files, Mapping) else {"": str(files)}
        if not named:
            raise ConfigurationError("files: expected a file for train at least, got none. Set files.train.")
        self._files = {name: Path(path).expanduser() for name, path in named.items()}
        self.where, self._encoding = str(next(iter(self._files.values()))), encoding

    @property
    def files(self) -> list[Path]:
        """See :attr:`Store.files`."""
        return list(self._files.values())

    def table(self, name: str) -> Table | None:
        """See :meth:`Store.table`."""
        path = self._files.get(name if self.divided else "")
        return None if path is None else read_table(path, self._encoding)


class FolderStore(Store):
    """A folder with a file per split, what ``save_to_disk`` left, or what ``hf download`` left of a data set."""

    def __init__(self, folder: Path, config: str | None = None, encoding: str = "utf-8") -> None:
        self.where, self._folder, self._config, self._encoding = str(folder), folder, config, encoding

    @cached_property
    def divided(self) -> bool:  # type: ignore[override]
        """False of a single table that ``save_to_disk`` left."""
        return not (self._folder / "state.json").exists()

    @property
    def files(self) -> list[Path]:
        """See :attr:`Store.files`."""
        return [self._folder]

    def table(self, name: str) -> Table | None:
        """See :meth:`Store.table`."""
        if not self._folder.is_dir():
            raise DataError(f"{self._folder}: expected a folder of texts, got no such path. Check the path.")
        if not self.divided:
            return read_saved(self._folder)
        saved = saved_split(self._folder, (name,))
        if saved is not None:
            return read_saved(saved)
        files = split_files(self._folder, name, self._config, SUFFIXES)
        parquet = [path for path in files if path.suffix == ".parquet"]
        if parquet:
            return read_parquet(parquet)
        if len(files) > 1:
            raise DataError(
                f"{self._folder}: expected one file of {name}, got {', '.join(path.name for path in files)}. Set files."
            )
        return read_table(files[0], self._encoding) if files else None


class HubStore(Store):
    """A data set on the Hub."""

    def __init__(self, name: str, config: str | None = None) -> None:
        self.where, self._name, self._config = f"{name}{f' ({config})' if config else ''}", name, config

    def table(self, name: str) -> Table | None:
        """See :meth:`Store.table`."""
        return from_hub(self._name, self._config, name)
