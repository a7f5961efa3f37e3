"""The page of an analysis: its figures, and the numbers behind them as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.errors import FileFormatError, one_line
from lit_merge.files.text import read_json
from lit_merge.report.document import Cell, Section, Table, address_of, definitions, document, drawn_figure, drawn_table
from lit_merge.report.results import display_name

__all__ = ["ANALYSIS", "analysis_page"]

ANALYSIS = "analysis.json"


def analysis_page(source: Path, pictures: Iterable[tuple[str, str]] = ()) -> str:
    """The whole page as text.

    Args:
        source: ``analysis.json`` as ``lit-merge analyze`` writes it; its figures are looked for in ``figures``.
        pictures: captions and data addresses of further figures.

    Raises:
        FileFormatError: the file is missing or no such file.
    """
    try:
        found = read_json(source)
        if found["kind"] != "analysis":
            raise ValueError(f"kind {found['kind']!r}")
        known = [(_TABLES[name], content) for name, content in found["analyses"].items() if name in _TABLES]
        tables = [table for make, content in known for table in make(content, found["tasks"])]
        title = f"Analysis of {', '.join(found['tasks'])}"
        line = f"{found['model']['name']}, {found['model']['parameters']:,} parameters"
        sections = _sections(found)
    except OSError as error:
        raise FileFormatError(f"{source}: expected an analysis, got {error.strerror}. Check the path.") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise FileFormatError(
            f"{source}: expected an analysis of lit-merge analyze, got {reason}. Run it again."
        ) from error
    files = sorted(source.parent.glob("figures/*.svg"), key=lambda path: path.stem)
    drawn = [(path.stem.replace("-", " ").replace("_", " "), address_of(path)) for path in files]
    figures = "".join(drawn_figure(caption, address) for caption, address in (*drawn, *pictures))
    first: list[Section] = [("figures", "Figures", figures)] if figures else []
    numbers = [(f"table-{number}", table.title, drawn_table(table, number)) for number, table in enumerate(tables)]
    return document(title, [line], [*first, *numbers, *sections])


def _cosine(found: Mapping[str, Any], tasks: Sequence[str]) -> list[Table]:
    pairs = combinations(range(len(tasks)), 2)
    rows = {f"{tasks[one]}, {tasks[two]}": [each[one][two] for each in found["cosine"]] for one, two in pairs}
    return [_table("Cosines between task vectors", "Of the whole vectors, and by depth.", found["places"], rows)]


def _norms(found: Mapping[str, Any], tasks: Sequence[str]) -> list[Table]:
    norm, relative = (dict(zip(tasks, zip(*found[key], strict=True), strict=True)) for key in ("norm", "relative_norm"))
    percent = {task: _percent(row) for task, row in relative.items()}
    return [
        _table("Norms", "‖τ‖, of the whole vectors, and by depth.", found["places"], norm),
        _table("Relative norms", "‖τ‖ / ‖θ0‖ in percent.", found["places"], percent),
    ]


def _signs(found: Mapping[str, Any], tasks: Sequence[str]) -> list[Table]:
    note = f"Percent, of the largest {100 * found['density']:g} % of every vector's elements."
    rows = {key: _percent(found[key]) for key in ("overlap", "conflict")}
    pairs = dict(zip(tasks, map(_percent, found["pair_conflict"][0]), strict=True))
    return [
        _table("Overlap and sign conflict", note, found["places"], rows),
        _table("Sign conflict between two", note, tasks, pairs),
    ]


def _coefficients(found: Mapping[str, Any], _: Sequence[str]) -> list[Table]:
    rows = dict(zip(found["tasks"], found["values"], strict=True))
    return [_table("Merging coefficients", f"By {found['granularity']}.", found["groups"], rows)]


def _tau_jp(found: Mapping[str, Any], _: Sequence[str]) -> list[Table]:
    columns = found["measured_on"]
    rows = {vector: [norms[column] for column in columns] for vector, norms in found["tau_jp"].items()}
    return [_table("Mean norm of J τ", "Rows are vectors, columns are images.", columns, rows)]


def _advantage(found: Mapping[str, Any], _: Sequence[str]) -> list[Table]:
    errors = ("nonlinear_error", "linear_error", "advantage")
    rows = {task: _percent([row[key] for key in errors]) for task, row in found.items()}
    return [_table("Non-linear advantage", "Percent.", ["error", "error linearised", "advantage"], rows)]


def _paths(found: Mapping[str, Any], _: Sequence[str]) -> list[Table]:
    return [_path(task, content) for task, content in found.items()]


def _accuracies(found: Mapping[str, Any], _: Sequence[str]) -> list[Table]:
    """A table for everything that was measured of every model on every task."""
    measured = found["measured"]
    tasks = list(measured["zero-shot"])
    tables = []
    for key in measured["zero-shot"][tasks[0]]:
        rows = {
            display_name(name): [row[task][key] if task in row else None for task in tasks]
            for name, row in measured.items()
        }
        columns, note = tasks, ""
        if key == "accuracy":
            columns, note = [*tasks, "mean", "normalised"], "Percent; normalised by the individual models."
            means = ([found[mean][name] for mean in ("mean", "normalised")] for name in measured)
            rows = {name: _percent([*row, *more]) for (name, row), more in zip(rows.items(), means, strict=True)}
        tables.append(_table(display_name(key).capitalize(), note, columns, rows))
    return tables


def _path(task: str, found: Mapping[str, Any]) -> Table:
    rows = {
        f"{name}, α = {point['alpha']:g}": _percent([point["target"], point["control"]])
        for key, name in (("wise_ft", "WiSE-FT"), ("lines", "LiNeS"))
        for point in found[key]
    }
    note = f"Accuracy in percent; control tasks: {', '.join(found['control'])}."
    return _table(f"From the pre-trained model to {task}", note, [task, "control tasks"], rows)


_TABLES: dict[str, Callable[[Mapping[str, Any], Sequence[str]], list[Table]]] = {
    "cosine": _cosine,
    "norms": _norms,
    "signs": _signs,
    "coefficients": _coefficients,
    "accuracy": _accuracies,
    "tau_jp": _tau_jp,
    "advantage": _advantage,
    "paths": _paths,
}
"""Analysis -> its numbers as tables; of a plane of coefficients there is the figure alone."""


def _table(title: str, note: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Table:
    cells = [[Cell(name, name), *map(_cell, values)] for name, values in rows.items()]
    return Table(title, note, ["name", *columns], cells)


def _cell(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.4g}", float(value))


def _percent(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def _sections(found: Mapping[str, Any]) -> list[Section]:
    """How it was measured, and on what."""
    methods = found["analyses"].get("accuracy", {}).get("methods", {})
    shown = {display_name(name): f"<code>{escape(text)}</code>" for name, text in methods.items()}
    keys = ("asked", "split", "images", "linearized", "seeds", "vectors")
    settings = {key: f"<code>{escape(json.dumps(found[key]))}</code>" for key in keys if key in found}
    entries = {"fingerprint": found["model"]["fingerprint"], **found["hardware"], **found["versions"]}
    entries["page written by"] = f"lit-merge {__version__}"
    environment = definitions({key: escape(str(value)) for key, value in entries.items()})
    warned = "".join(f"<p>{escape(line)}</p>" for line in found.get("warnings", []))
    return [
        *([("warnings", "Warnings", warned)] if warned else []),
        *([("methods", "How each was merged", definitions(shown))] if shown else []),
        ("settings", "Settings", definitions(settings)),
        ("environment", "Versions and hardware", environment),
    ]
