"""The tasks of published suites of texts: found on the disk in any of the places in use, never downloaded."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from lit_merge.data.published.hub_tables import (
    cached_arrow,
    cached_snapshot,
    saved_split,
    snapshots_folder,
    split_files,
    tables_folder,
)
from lit_merge.data.published.registry import data_root
from lit_merge.data.published.text_registry import TextEntry
from lit_merge.data.text.stores import Store
from lit_merge.data.text.tables import Table, read_arrow, read_parquet, read_saved, read_table
from lit_merge.data.text.task import TextTask
from lit_merge.errors import DataError

__all__ = ["PublishedText"]


class PublishedText(TextTask):
    """A task of a published suite whose texts are on the disk; nothing is downloaded.

    Args:
        entry: the task.
        root: the folder of the published data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        templates: of the class-name head of an encoder.

    Attributes:
        name: of the task.
        entry: the task.
    """

    def __init__(
        self, entry: TextEntry, root: str | os.PathLike[str] | None = None, templates: list[str] | str | None = None
    ) -> None:
        super().__init__(path=data_root(root) / entry.folder, templates=templates, **entry.task)
        self.name, self.entry, self._store = entry.name, entry, PublishedStore(entry, data_root(root))

    def prepare(self) -> None:
        """Look whether the texts are there.

        Raises:
            DataError: they are not; the error names where they may be, what to run, and the size of the download.
        """
        assert isinstance(self._store, PublishedStore)
        self._store.check()

    def stored(self, name: str) -> Table:
        """A stored split, whole.

        Raises:
            DataError: it is missing or damaged.
        """
        table = self._store.table(name)
        if table is None:
            raise DataError(f"{self.name}: expected its split {name} in {self._store.where}, got none. Fetch it again.")
        return table


class PublishedStore(Store):
    """A data set of the Hub in any of the places where it may be on the disk."""

    def __init__(self, entry: TextEntry, root: Path) -> None:
        self._entry, self._root = entry, root

    @cached_property
    def where(self) -> str:  # type: ignore[override]
        """The folders that it may be in."""
        return ", ".join(map(str, self._folders))

    @property
    def files(self) -> list[Path]:
        """See :attr:`Store.files`."""
        return [path for split in self._entry.counts for path in self._found(split)]

    @property
    def _folders(self) -> list[Path]:
        names = (self._entry.folder, self._entry.hub, self._entry.name)
        return [self._root / name for name in dict.fromkeys(names)]

    def check(self) -> None:
        """Refuse a data set that is not there.

        Raises:
            DataError: none of its splits is.
        """
        entry = self._entry
        if any(self._found(split) for split in entry.counts):
            return
        places = [self.where, str(snapshots_folder(entry)), str(tables_folder(entry))]
        run = f"lit-merge data prepare {entry.name} --root {self._root} (downloads about {entry.megabytes:g} MB)"
        how = entry.manual or f"Run: {run}, or set root or LIT_MERGE_DATA to the folder that holds it."
        raise DataError(
            f"{entry.name}: expected {entry.title} ({entry.hub}{f', {entry.hub_config}' if entry.hub_config else ''}) "
            f"in one of these places ({'; '.join(places)}), got none of them. {how}"
        )

    def table(self, name: str) -> Table | None:
        """See :meth:`Store.table`."""
        found = self._found(name)
        if not found:
            self.check()
            return None
        first = found[0]
        if first.is_dir():
            return read_saved(first)
        if first.suffix == ".arrow":
            return read_arrow(found)
        table = read_parquet(found) if first.suffix == ".parquet" else read_table(first)
        return Table(
            {self._entry.renamed.get(key, key): cells for key, cells in table.columns.items()},
            table.where,
            table.label_names,
        )

    def _found(self, name: str) -> list[Path]:
        """The files of a stored split, or the folder that ``save_to_disk`` left; empty if there are none."""
        entry = self._entry
        snapshot = cached_snapshot(entry)
        for folder in [*self._folders, *([snapshot] if snapshot else [])]:
            own = folder / entry.hub_config if entry.hub_config else folder
            saved = saved_split(own, (name,)) or saved_split(folder, (name,))
            if saved is not None:
                return [saved]
            if name in entry.files and (folder / entry.files[name]).is_file():
                return [folder / entry.files[name]]
            files = split_files(folder, name, entry.hub_config, (".parquet",))
            if entry.hub_config is not None and folder != snapshot and folder.name != entry.name:
                files = tuple(path for path in files if entry.hub_config in path.relative_to(folder).parts)
            if files:
                return list(files)
        return cached_arrow(entry, name)
