"""The page of a suite's results: tables, figures, settings, versions, hardware; and what ``lit-merge report`` does."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError
from lit_merge.files.text import write_text
from lit_merge.files.yaml_text import dump_yaml
from lit_merge.report.analysis_page import ANALYSIS, analysis_page
from lit_merge.report.document import Cell, Table, address_of, definitions, document, drawn_figure, drawn_table
from lit_merge.report.figures import results_svg
from lit_merge.report.results import ZERO_SHOT, Results, display_name, summary

__all__ = ["report", "results_page"]

_RESULTS, _CONFIGURATION = "results.json", "suite.yaml"  # what a suite leaves in its folder


def report(results: str, output: str | None = None, figures: list[str] | None = None) -> Path:
    """Write the results of a suite, or of an analysis, as one HTML file that opens from the disk.

    Args:
        results: the output folder of a suite or of ``lit-merge analyze``, or results.json or analysis.json in it.
        output: the file to write, ending in ``.html``; by default ``report.html`` in the folder of the results.
        figures: further pictures for the page, ``.svg`` or ``.png``, e.g. of ``lit-merge analyze``.

    Returns:
        The file written.

    Raises:
        ConfigurationError: ``output`` has another ending, its folder is missing, or a figure is missing or of another
            kind.
        FileFormatError: the results are missing or malformed.
    """
    source = Path(results)
    if source.is_dir():
        found = [source / name for name in (_RESULTS, ANALYSIS) if (source / name).is_file()]
        source = found[0] if found else source / _RESULTS
    target = Path(output) if output is not None else source.with_name("report.html")
    if target.suffix != ".html":
        raise ConfigurationError(f"output: expected a path that ends in .html, got {target}. Rename it.")
    pictures = [(Path(path).stem.replace("-", " ").replace("_", " "), address_of(path)) for path in figures or []]
    page = analysis_page(source, pictures) if source.name == ANALYSIS else _page_of_suite(source, pictures)
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: expected an existing folder to write into, got none. Create it first.")
    write_text(target, page)
    return target


def _page_of_suite(source: Path, pictures: Iterable[tuple[str, str]]) -> str:
    loaded = Results.load(source)
    settings = json.loads(source.read_text(encoding="utf-8")).get("settings", {})
    configuration = source.with_name(_CONFIGURATION)
    text = configuration.read_text(encoding="utf-8") if configuration.is_file() else None
    return results_page(loaded, settings, text, pictures)


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
    sections = [("figure", "Figure", drawn_figure("Means, tasks, coefficients and task vectors.", main))]
    sections += [(f"table-{number}", table.title, drawn_table(table, number)) for number, table in enumerate(tables)]
    extra = "".join(drawn_figure(caption, address) for caption, address in pictures)
    sections += [("figures", "Further figures", extra)] if extra else []
    sections += [("methods", "How each was merged", _methods(results))]
    sections += [("settings", "Settings and commands", _settings(settings or {}, configuration))]
    sections += [("environment", "Versions and hardware", _environment(results))]
    title = f"{results.name}: {results.model_and_scope()}"
    return document(title, [f"{results.protocol()}; {_seeds(results)}"], sections)


def _seeds(results: Results) -> str:
    names = ", ".join(results.seeds)
    return f"seeds {names}, ± their standard deviation" if len(results.seeds) > 1 else f"seed {names}, without a spread"


def _accuracies(results: Results) -> Table:
    rows = _rows(results, results.accuracy, results.mean_accuracy)
    note = "Percent; the best merged model of a column is bold."
    return Table(f"Accuracy on {results.evaluated_on}", note, ["method", *results.tasks, "mean"], rows)


def _normalised(results: Results) -> Table:
    rows = _rows(results, results.normalised, results.mean_normalised)
    note = "Percent of the accuracy of the model that was fine-tuned on the task alone, with the same seed."
    return Table("Normalised accuracy", note, ["method", *results.tasks, "mean"], rows)


def _rows(
    results: Results,
    by_task: Callable[[str, str], list[float]],
    over_tasks: Callable[[str], list[float]],
) -> list[list[Cell]]:
    columns: list[Callable[[str], list[float]]] = [partial(_of_task, by_task, task) for task in results.tasks]
    columns.append(over_tasks)
    best = [
        max((summary(column(method))[0] for method in results.merged_methods()), default=math.nan) for column in columns
    ]
    rows = []
    for method in results.methods():
        merged = method in results.merged_methods()
        cells = [_percent(column(method), merged, top) for column, top in zip(columns, best, strict=True)]
        rows.append([Cell(display_name(method), display_name(method)), *cells])
    return rows


def _of_task(by_task: Callable[[str, str], list[float]], task: str, method: str) -> list[float]:
    return by_task(method, task)


def _percent(values: list[float], merged: bool, best: float) -> Cell:
    mean, spread = summary(values)
    if math.isnan(mean):
        return Cell("–")
    spread = None if spread is None or spread == 0 else 100 * spread
    return Cell(f"{100 * mean:.1f}", 100 * mean, spread, best=merged and mean == best)


def _vectors(results: Results) -> Table:
    rows = []
    for task in results.tasks:
        sizes = [seed.task_vectors[task] for seed in results.seeds.values()]
        row = [Cell(task, task)]
        for values, digits in (
            ([size.norm for size in sizes], 3),
            ([100 * size.relative_norm for size in sizes], 2),
            ([float(size.steps) for size in sizes], 0),
        ):
            mean, spread = summary(values)
            row.append(Cell(f"{mean:.{digits}f}", mean, spread or None))
        rows.append([*row, Cell(str(results.classes[task]), float(results.classes[task]))])
    note = "How far fine-tuning moved the weights, the mean over seeds."
    return Table("Task vectors", note, ["task", "‖τ‖", "‖τ‖ / ‖θ0‖ (%)", "steps", "classes"], rows)


def _cosines(results: Results) -> list[Table]:
    if len(results.tasks) < 2:
        return []
    matrices = [seed.cosine_similarity for seed in results.seeds.values()]
    rows = []
    for row, task in enumerate(results.tasks):
        cells = [summary([matrix[row][column] for matrix in matrices]) for column in range(len(results.tasks))]
        rows.append([Cell(task, task), *(Cell(f"{mean:.3f}", mean, spread or None) for mean, spread in cells)])
    note = "Cosine similarity of the task vectors, the mean over seeds."
    return [Table("Cosine similarities", note, ["task", *results.tasks], rows)]


def _methods(results: Results) -> str:
    rows = {}
    for method in results.merged_methods():
        models = results.merged(method)
        coefficients = [f"{model.coefficient:g}" for model in models if model.coefficient is not None]
        chosen = f"; coefficient by seed {', '.join(coefficients)}" if coefficients else ""
        transforms = " or ".join(dict.fromkeys(model.transform for model in models))
        rows[display_name(method)] = f"<code>{escape(transforms)}</code>{escape(chosen)}"
    return definitions({**rows, ZERO_SHOT: "the pre-trained model, without a merge"})


def _settings(settings: dict[str, Any], configuration: str | None) -> str:
    command = f"lit-merge suite --config {_CONFIGURATION} --output FOLDER"
    if configuration is not None:
        return f"<p><code>{command}</code> with this file:</p><pre>{escape(configuration)}</pre>\n"
    text = dump_yaml(settings, default_flow_style=None, width=100)
    return f"<p>The part of the configuration that the results hold:</p><pre>{escape(text)}</pre>\n"


def _environment(results: Results) -> str:
    model = {
        "model": f"{results.model_name}, {results.model_parameters:,} parameters",
        "fingerprint": results.model_fingerprint,
    }
    entries = {**model, **results.hardware, **results.versions, "page written by": f"lit-merge {__version__}"}
    return definitions({key: escape(str(value)) for key, value in entries.items()})
