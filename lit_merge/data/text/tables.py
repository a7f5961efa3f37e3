"""Rows from whatever texts come in: CSV, TSV, JSON lines, Parquet, folders that ``datasets`` saved, the Hub, lists.

Everything is read as data: no pickle, no loading script. Parquet needs ``pyarrow``, and what ``datasets`` saved needs
that library (the extra ``text``).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.data.text.prompts import is_missing
from lit_merge.errors import ConfigurationError, DataError, LitMergeError, first_few, one_line
from lit_merge.files.text import unique_items

__all__ = [
    "SUFFIXES",
    "Table",
    "from_hub",
    "is_table",
    "of_rows",
    "read_arrow",
    "read_parquet",
    "read_saved",
    "read_table",
]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Of the files that are read."""

_LONGEST_CELL = 1 << 26  # characters; the csv module's own limit is 131,072
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Table:
    """N rows with the same columns.

    Attributes:
        columns: name -> N cells.
        where: where they come from, for messages.
        label_names: column -> names of the integers that are in it, where the file says so.
    """

    columns: Mapping[str, Sequence[Any]]
    where: str
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def row(self, index: int) -> dict[str, Any]:
        """Column -> cell."""
        return {name: cells[index] for name, cells in self.columns.items()}

    def take(self, rows: Sequence[int]) -> Table:
        """Some of the rows, in the order given."""
        chosen = {name: [cells[index] for index in rows] for name, cells in self.columns.items()}
        return Table(chosen, self.where, self.label_names)


def is_table(path: Path) -> bool:
    """Whether a path looks like texts: a file of them, or a folder with one for train, or that ``datasets`` saved."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    return saved or any(one.stem.startswith("train") and one.suffix.lower() in SUFFIXES for one in path.iterdir())


def read_table(path: Path, encoding: str = "utf-8") -> Table:
    """Read one file.

    Args:
        path: with one of :data:`SUFFIXES`; a ``.json`` file holds a list of objects, or an object per line.
        encoding: of the text files.

    Raises:
        DataError: the file is missing, empty, damaged, of another encoding, or its rows differ in their columns.
        ConfigurationError: the encoding is unknown.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path}: expected a file of texts ({', '.join(SUFFIXES)}), got no such file. Check the path.")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {suffix or 'no ending'}.")
    table = read_parquet([path]) if suffix == ".parquet" else _read_text(path, suffix, encoding)
    if not len(table):
        raise DataError(f"{path}: expected rows of texts, got an empty file. Check the path.")
    return table


def of_rows(rows: Sequence[Mapping[str, Any]], where: str = "rows") -> Table:
    """The table of mappings from column to cell.

    Raises:
        DataError: there are none, or one of them has other columns.
    """
    if not rows or not isinstance(rows[0], Mapping):
        raise DataError(f"{where}: expected rows of texts, got {'none' if not rows else f'{rows[0]!r:.60}'}.")
    names = list(rows[0])
    other = next(
        (index for index, row in enumerate(rows) if not isinstance(row, Mapping) or set(row) != set(names)), None
    )
    if other is not None:
        found = ", ".join(rows[other]) if isinstance(rows[other], Mapping) else f"{rows[other]!r:.60}"
        raise DataError(
            f"{where}: expected the columns {', '.join(names)} in every row, got {found} in row {other + 1}."
        )
    return Table({name: [row[name] for row in rows] for name in names}, where)


def read_parquet(paths: Sequence[Path]) -> Table:
    """Read Parquet files with the same columns, with the class names that the Hub's files carry.

    Raises:
        DataError: a file is damaged, or ``pyarrow`` is not installed.
    """
    try:
        from pyarrow import parquet

        tables = [parquet.read_table(path) for path in paths]
        columns = {
            name: [cell for table in tables for cell in table.column(name).to_pylist()]
            for name in tables[0].column_names
        }
        metadata = tables[0].schema.metadata or {}
    except ImportError as error:
        raise DataError(
            f"{paths[0]}: expected pyarrow to read it, got none. Run: pip install 'lit-merge[text]'."
        ) from error
    except Exception as error:  # pyarrow raises whatever the damage leads to
        raise DataError(f"{paths[0]}: expected a Parquet file, got {one_line(error, 200)}. Fetch it again.") from error
    return Table(columns, str(paths[0]), _names_in(metadata.get(b"huggingface", b"{}")))


def read_saved(folder: Path) -> Table:
    """Read one split that ``save_to_disk`` of the ``datasets`` library left.

    Raises:
        DataError: it is damaged, or ``datasets`` is not installed.
    """
    try:
        import datasets

        return _of_dataset(datasets.load_from_disk(str(folder)), str(folder))
    except ImportError as error:
        raise _no_datasets(str(folder)) from error
    except Exception as error:
        raise DataError(
            f"{folder}: expected what save_to_disk of the datasets library wrote, got {one_line(error, 200)}."
        ) from error


def read_arrow(paths: Sequence[Path]) -> Table:
    """Read the Arrow files of a split in the cache of the ``datasets`` library.

    Raises:
        DataError: a file is damaged, or ``datasets`` is not installed.
    """
    try:
        import datasets

        whole = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
    except ImportError as error:
        raise _no_datasets(str(paths[0])) from error
    except Exception as error:
        raise DataError(
            f"{paths[0]}: expected an Arrow file of the datasets library, got {one_line(error, 200)}."
        ) from error
    return _of_dataset(whole, str(paths[0]))


def from_hub(name: str, config: str | None, split: str) -> Table | None:
    """A split of a data set on the Hub, from its cache or the network; None if it has no such split.

    A data set that is a program is refused.

    Raises:
        DataError: it cannot be reached, or ``datasets`` is not installed.
    """
    where = f"{name}{f' ({config})' if config else ''}, {split}"
    try:
        import datasets

        return _of_dataset(datasets.load_dataset(name, config, split=split), where)
    except ImportError as error:
        raise _no_datasets(where) from error
    except Exception as error:  # the network, the cache, a wrong name
        if isinstance(error, ValueError) and "Unknown split" in str(error):
            return None
        raise DataError(
            f"{where}: expected this data set of the Hub in its cache or on the network, got {one_line(error, 200)}. "
            f"Check the name, or run: hf download {name} --repo-type dataset."
        ) from error


def _of_dataset(found: Any, where: str) -> Table:
    names = {
        column: tuple(feature.names) for column, feature in found.features.items() if getattr(feature, "names", None)
    }
    return Table({name: found[name][:] for name in found.column_names}, where, names)


def _no_datasets(where: str) -> DataError:
    return DataError(
        f"{where}: expected the datasets library to read it, got none. Run: pip install 'lit-merge[text]'."
    )


def _names_in(raw: bytes) -> dict[str, tuple[str, ...]]:
    """Class names in what the ``datasets`` library writes into a Parquet file's header."""
    try:
        features = json.loads(raw)["info"]["features"]
        return {
            name: tuple(map(str, one["names"])) for name, one in features.items() if one.get("_type") == "ClassLabel"
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _read_text(path: Path, suffix: str, encoding: str) -> Table:
    text = _decoded(path, encoding)
    if not text.strip():
        raise DataError(f"{path}: expected rows of texts, got an empty file. Check the path.")
    if suffix in (".csv", ".tsv"):
        return _separated(text, path, "," if suffix == ".csv" else "\t")
    try:
        if suffix == ".json" and text.lstrip().startswith("["):
            return of_rows(json.loads(text, object_pairs_hook=unique_items), str(path))
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = []
        for number, line in lines:  # noqa: B007 - the message below names it
            rows.append(json.loads(line, object_pairs_hook=unique_items))
    except LitMergeError:
        raise
    except (ValueError, RecursionError) as error:
        place = "" if suffix == ".json" and text.lstrip().startswith("[") else f" in line {number}"
        raise DataError(
            f"{path}: expected a JSON object per line, got {one_line(error, 120)}{place}. Correct it."
        ) from error
    return of_rows(rows, str(path))


def _decoded(path: Path, encoding: str) -> str:
    raw = path.read_bytes()
    mark = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    if mark == "utf-8-sig" and encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = mark
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise ConfigurationError(
            f"encoding: expected one that Python knows, got {encoding!r}. Use e.g. utf-8."
        ) from error
    except UnicodeDecodeError as error:
        likely = mark or "latin-1 or cp1252"
        raise DataError(
            f"{path}: expected text in {encoding}, got byte 0x{raw[error.start]:02x} at {error.start:,}, as in "
            f"{likely}. Set encoding to {mark or 'what it is in'}, or convert it."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path}: expected text in {encoding}, got a zero byte, as in UTF-16 or a binary file. Set encoding, e.g. "
            "to utf-16-le, or convert it."
        )
    return text


def _separated(text: str, path: Path, sign: str) -> Table:
    lines = _cells(text, path, sign)
    names, rows = [name.strip() for name in lines[0]], lines[1:]
    wrong = next((index for index, row in enumerate(rows) if len(row) != len(names)), None)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or any(is_missing(name) for name in names):
        raise DataError(
            f"{path}: expected a first line with a name for every column, each once, got "
            f"{first_few(map(repr, twice or names))}. Name them."
        )
    if wrong is not None:
        raise DataError(
            f"{path}: expected {len(names)} cells in every row, as its first line has, got {len(rows[wrong])} in row "
            f"{wrong + 1}. Put texts that contain the separator in quotes."
        )
    return Table({name: [row[place] for row in rows] for place, name in enumerate(names)}, str(path))


def _cells(text: str, path: Path, sign: str) -> list[list[str]]:
    """The lines that are not empty, cell by cell.

    Two kinds of file have tabs: spreadsheets' and pandas', with quotes as in CSV, and those of GLUE and its like, in
    which a quote is a character as any other. Of the second kind is one that can only be read so, or of whose lines
    quotes would make fewer although all of them are whole by themselves.
    """
    previous = csv.field_size_limit(_LONGEST_CELL)
    plain = [line.split("\t") for line in re.split(r"\r\n|\r|\n", text) if line] if sign == "\t" and '"' in text else []
    whole = len(plain) > 1 and len(plain[0]) > 1 and all(len(line) == len(plain[0]) for line in plain)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
        lines = [line for line in reader if line]
    except csv.Error as error:
        if whole:
            return plain
        raise DataError(
            f"{path}: expected cells separated by {'commas' if sign == ',' else 'tabs'}, with quotes that are closed, "
            f"got {one_line(error)} in line {reader.line_num}. Correct it."
        ) from error
    finally:
        csv.field_size_limit(previous)
    return plain if whole and len(lines) < len(plain) else lines
