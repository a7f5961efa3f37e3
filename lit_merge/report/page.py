"""One HTML file of a suite's results that needs no network: tables that sort, figures, settings, versions, hardware."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import yaml

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError
from lit_merge.files.text import write_text
from lit_merge.report.figures import results_svg
from lit_merge.report.results import ZERO_SHOT, Results, display_name, summary

__all__ = ["report", "results_page"]

_ASSETS = Path(__file__).parent / "assets"
_CONFIGURATION = "suite.yaml"  # what a suite leaves beside its results


@dataclass(frozen=True)
class _Cell:
    """What a cell shows, and what it is sorted and copied by."""

    text: str
    value: float | str = ""
    spread: float | None = None
    best: bool = False


@dataclass(frozen=True)
class _Table:
    """A table of the page; the first cell of a row is its heading."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[_Cell]]


def report(results: str, output: str | None = None, figures: list[str] | None = None) -> Path:
    """Write the results of a suite as one HTML file that opens from the disk.

    Args:
        results: results.json of a suite, or the suite's output folder.
        output: the file to write, ending in ``.html``; by default ``report.html`` beside the results.
        figures: further pictures for the page, ``.svg`` or ``.png``, e.g. of ``lit-merge analyze``.

    Returns:
        The file written.

    Raises:
        ConfigurationError: ``output`` has another ending, its folder is missing, or a figure is missing or of another
            kind.
        FileFormatError: the results are missing or malformed.
    """
    source = Path(results)
    source = source / "results.json" if source.is_dir() else source
    target = Path(output) if output is not None else source.with_name("report.html")
    if target.suffix != ".html":
        raise ConfigurationError(f"output: expected a path that ends in .html, got {target}. Rename it.")
    loaded = Results.load(source)
    plain = json.loads(source.read_text(encoding="utf-8"))
    configuration = source.with_name(_CONFIGURATION)
    text = configuration.read_text(encoding="utf-8") if configuration.is_file() else None
    pictures = [(Path(path).stem.replace("-", " ").replace("_", " "), _picture(path)) for path in figures or []]
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: expected an existing folder to write into, got none. Create it first.")
    write_text(target, results_page(loaded, plain.get("settings", {}), text, pictures))
    return target


def results_page(
    results: Results,
    settings: dict[str, Any] | None = None,
    configuration: str | None = None,
    pictures: Iterable[tuple[str, str]] = (),
) -> str:
    """The whole page as text.

    Args:
        results: of a suite.
        settings: ``settings`` of the results document: what fit was run with, and the recipes.
        configuration: the suite's whole configuration as YAML, if it is known.
        pictures: captions and data addresses (``data:image/…``) of further figures.
    """
    main = f"data:image/svg+xml;base64,{base64.b64encode(results_svg(results)).decode()}"
    tables = [_accuracies(results), _normalised(results), _vectors(results), *_cosines(results)]
    sections = [("figure", "Figure", _figure("Means, tasks, coefficients and task vectors.", main))]
    sections += [(f"table-{number}", table.title, _table(table, number)) for number, table in enumerate(tables)]
    extra = "".join(_figure(caption, address) for caption, address in pictures)
    sections += [("figures", "Further figures", extra)] if extra else []
    sections += [("methods", "How each was merged", _methods(results))]
    sections += [("settings", "Settings and commands", _settings(settings or {}, configuration))]
    sections += [("environment", "Versions and hardware", _environment(results))]
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>\n{content}</section>\n' for key, title, content in sections
    )
    title = f"{results.name}: {results.model_and_scope()}"
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<p class="quiet">{escape(results.protocol())}; '
        f"{escape(_seeds(results))}</p>\n<nav><ul>{links}</ul></nav></header>\n"
        f"<main>\n{body}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _seeds(results: Results) -> str:
    names = ", ".join(results.seeds)
    return f"seeds {names}, ± their standard deviation" if len(results.seeds) > 1 else f"seed {names}, without a spread"


def _accuracies(results: Results) -> _Table:
    rows = _rows(results, results.accuracy, results.mean_accuracy)
    note = "Percent; the best merged model of a column is bold."
    return _Table(f"Accuracy on {results.evaluated_on}", note, ["method", *results.tasks, "mean"], rows)


def _normalised(results: Results) -> _Table:
    rows = _rows(results, results.normalised, results.mean_normalised)
    note = "Percent of the accuracy of the model that was fine-tuned on the task alone, with the same seed."
    return _Table("Normalised accuracy", note, ["method", *results.tasks, "mean"], rows)


def _rows(
    results: Results,
    by_task: Callable[[str, str], list[float]],
    over_tasks: Callable[[str], list[float]],
) -> list[list[_Cell]]:
    columns: list[Callable[[str], list[float]]] = [partial(_of_task, by_task, task) for task in results.tasks]
    columns.append(over_tasks)
    best = [
        max((summary(column(method))[0] for method in results.merged_methods()), default=math.nan) for column in columns
    ]
    rows = []
    for method in results.methods():
        merged = method in results.merged_methods()
        cells = [_percent(column(method), merged, top) for column, top in zip(columns, best, strict=True)]
        rows.append([_Cell(display_name(method), display_name(method)), *cells])
    return rows


def _of_task(by_task: Callable[[str, str], list[float]], task: str, method: str) -> list[float]:
    return by_task(method, task)


def _percent(values: list[float], merged: bool, best: float) -> _Cell:
    mean, spread = summary(values)
    if math.isnan(mean):
        return _Cell("–")
    spread = None if spread is None or spread == 0 else 100 * spread
    return _Cell(f"{100 * mean:.1f}", 100 * mean, spread, best=merged and mean == best)


def _vectors(results: Results) -> _Table:
    rows = []
    for task in results.tasks:
        sizes = [seed.task_vectors[task] for seed in results.seeds.values()]
        row = [_Cell(task, task)]
        for values, digits in (
            ([size.norm for size in sizes], 3),
            ([100 * size.relative_norm for size in sizes], 2),
            ([float(size.steps) for size in sizes], 0),
        ):
            mean, spread = summary(values)
            row.append(_Cell(f"{mean:.{digits}f}", mean, spread or None))
        rows.append([*row, _Cell(str(results.classes[task]), float(results.classes[task]))])
    note = "How far fine-tuning moved the weights, the mean over seeds."
    return _Table("Task vectors", note, ["task", "‖τ‖", "‖τ‖ / ‖θ0‖ (%)", "steps", "classes"], rows)


def _cosines(results: Results) -> list[_Table]:
    if len(results.tasks) < 2:
        return []
    matrices = [seed.cosine_similarity for seed in results.seeds.values()]
    rows = []
    for row, task in enumerate(results.tasks):
        cells = [summary([matrix[row][column] for matrix in matrices]) for column in range(len(results.tasks))]
        rows.append([_Cell(task, task), *(_Cell(f"{mean:.3f}", mean, spread or None) for mean, spread in cells)])
    note = "Cosine similarity of the task vectors, the mean over seeds."
    return [_Table("Cosine similarities", note, ["task", *results.tasks], rows)]


def _table(table: _Table, number: int) -> str:
    name = f"values-{number}"
    head = "".join(f'<th scope="col" aria-sort="none"><button>{escape(one)}</button></th>' for one in table.columns)
    body = "".join(f"<tr>{''.join(_html(cell, at == 0) for at, cell in enumerate(row))}</tr>\n" for row in table.rows)
    return (
        f'<div class="bar"><p class="quiet">{escape(table.note)}</p>'
        f'<button class="copy" data-table="{name}">Copy as CSV</button></div>\n'
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def _html(cell: _Cell, heading: bool) -> str:
    value = f"{cell.value:.10g}" if isinstance(cell.value, float) else cell.value
    text = escape(cell.text)
    if heading:
        return f'<th scope="row" data-value="{escape(value)}">{text}</th>'
    spread = ""
    if cell.spread is not None:
        digits = len(cell.text.partition(".")[2])
        text += f" <small>± {cell.spread:.{digits}f}</small>"
        spread = f' data-spread="{cell.spread:.10g}"'
    best = ' class="best"' if cell.best else ""
    return f'<td data-value="{escape(value)}"{spread}{best}>{text}</td>'


def _figure(caption: str, address: str) -> str:
    return (
        f'<figure><div class="picture" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<img src="{address}" alt="{escape(caption)} The numbers are in the tables."></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _methods(results: Results) -> str:
    rows = []
    for method in results.merged_methods():
        models = results.merged(method)
        coefficients = [f"{model.coefficient:g}" for model in models if model.coefficient is not None]
        chosen = f"; coefficient by seed {', '.join(coefficients)}" if coefficients else ""
        transforms = " or ".join(dict.fromkeys(model.transform for model in models))
        rows.append(
            f"<dt>{escape(display_name(method))}</dt><dd><code>{escape(transforms)}</code>{escape(chosen)}</dd>"
        )
    rows.append(f"<dt>{ZERO_SHOT}</dt><dd>the pre-trained model, without a merge</dd>")
    return f"<dl>{''.join(rows)}</dl>\n"


def _settings(settings: dict[str, Any], configuration: str | None) -> str:
    command = f"lit-merge suite --config {_CONFIGURATION}"
    if configuration is not None:
        return f"<p><code>{command}</code> with this file:</p><pre>{escape(configuration)}</pre>\n"
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return f"<p>The part of the configuration that the results hold:</p><pre>{escape(text)}</pre>\n"


def _environment(results: Results) -> str:
    model = {
        "model": f"{results.model_name}, {results.model_parameters:,} parameters",
        "fingerprint": results.model_fingerprint,
    }
    entries = {**model, **results.hardware, **results.versions, "page written by": f"lit-merge {__version__}"}
    return f"<dl>{''.join(f'<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>' for k, v in entries.items())}</dl>\n"


def _picture(path: str | os.PathLike[str]) -> str:
    kinds = {".svg": "svg+xml", ".png": "png"}
    source = Path(path)
    if source.suffix not in kinds or not source.is_file():
        raise ConfigurationError(
            f"figures: expected files that end in {' or '.join(kinds)}, got {source}"
            f"{'' if source.is_file() else ', which is no file'}. Correct the path."
        )
    return f"data:image/{kinds[source.suffix]};base64,{base64.b64encode(source.read_bytes()).decode()}"
