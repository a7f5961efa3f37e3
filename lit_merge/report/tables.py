"""Tables for the terminal (rich) and for documents (Markdown)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lit_merge.report.results import INDIVIDUAL, ZERO_SHOT, Results, display_name, summary

if TYPE_CHECKING:
    from rich.table import Column, Table
    from rich.text import Text

__all__ = ["accuracy_table", "markdown_table", "mean_cell", "vector_table"]

_MOST_COLUMNS = 10  # of methods, for which a terminal has room


def accuracy_table(results: Results, normalised: bool = False) -> Table:
    """Accuracy in percent: one row per task and one for their mean, one column per method; many methods are rows.

    Args:
        results: of a suite. With several seeds every value is a mean over them, and the mean over tasks adds ± the
            sample standard deviation.
        normalised: divide by the accuracy of the individual models.

    Returns:
        A table to print with ``rich.console.Console().print``.
    """
    title = f"{results.model_and_scope()}: {'normalised ' if normalised else ''}{results.protocol()}"
    methods = results.methods()
    many = len(methods) > _MOST_COLUMNS
    table = _table(title, ["method", *results.tasks, "mean"] if many else ["task", *map(display_name, methods)])
    table.caption = _text("percent" + ("; ± standard deviation over seeds" if len(results.seeds) > 1 else ""))
    columns = [_task_cells(results, method, normalised) for method in methods]
    if many:
        for method, cells in zip(methods, columns, strict=True):
            table.add_row(*map(_text, [display_name(method), *cells, mean_cell(results, method, normalised)]))
        return table
    for task, *cells in zip(results.tasks, *columns, strict=True):
        table.add_row(*map(_text, [task, *cells]))
    table.add_section()
    table.add_row(*map(_text, ["mean", *(mean_cell(results, method, normalised) for method in methods)]))
    return table


def vector_table(results: Results) -> Table:
    """How far fine-tuning moved the weights, one row per task; with several seeds mean ± standard deviation.

    Args:
        results: of a suite.

    Returns:
        A table to print with ``rich.console.Console().print``.
    """
    table = _table(f"{results.model_and_scope()}: task vectors", ["task", "‖τ‖", "‖τ‖ / ‖θ0‖ (%)", "steps"])
    for task in results.tasks:
        sizes = [seed.task_vectors[task] for seed in results.seeds.values()]
        steps = sorted({size.steps for size in sizes})
        cells = [
            task,
            _with_spread([size.norm for size in sizes], decimals=3),
            _with_spread([100 * size.relative_norm for size in sizes], decimals=2),
            str(steps[0]) if len(steps) == 1 else f"{steps[0]}–{steps[-1]}",
        ]
        table.add_row(*map(_text, cells))
    return table


def markdown_table(results: Results) -> str:
    """The accuracies in percent as a Markdown table; the last two columns are the mean and the mean normalised.

    Args:
        results: of a suite. With several seeds every value is a mean over them, and the last two columns add ± the
            sample standard deviation.

    Returns:
        The lines of the table, each with a line break at its end.
    """
    rows = [["method", *results.tasks, "mean", "normalised"]]
    rows.append([":--", *["--:"] * (len(rows[0]) - 1)])
    for method in results.methods():
        means = [mean_cell(results, method, normalised) for normalised in (False, True)]
        rows.append([display_name(method), *_task_cells(results, method), *means])
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def mean_cell(results: Results, method: str, normalised: bool = False) -> str:
    """Mean accuracy over tasks in percent, ± the standard deviation over seeds where seeds can differ.

    Args:
        results: of a suite.
        method: one of ``results.methods()``.
        normalised: divide by the accuracy of the individual models.
    """
    values = results.mean_normalised(method) if normalised else results.mean_accuracy(method)
    same_by_definition = method == (INDIVIDUAL if normalised else ZERO_SHOT)
    return _with_spread([100 * value for value in (values[:1] if same_by_definition else values)], decimals=1)


def _with_spread(values: list[float], decimals: int) -> str:
    """Mean ± sample standard deviation as text, without the latter for one value; a dash if undefined."""
    mean, spread = summary(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.{decimals}f}" if spread is None else f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _task_cells(results: Results, method: str, normalised: bool = False) -> list[str]:
    values = results.normalised if normalised else results.accuracy
    return [_with_spread([100 * summary(values(method, task))[0]], decimals=1) for task in results.tasks]


def _table(title: str, columns: list[str]) -> Table:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    class Folding(Table):
        """A table that is printed in several ones below each other where its columns have no room in one."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            groups = _groups([_width(column) for column in self.columns], options.max_width)
            for number, group in enumerate(groups):
                last = number == len(groups) - 1
                part = Table(title=None if number else self.title, caption=self.caption if last else None)
                part.title_style, part.title_justify, part.caption_justify = "bold", "left", "left"
                for index in group:
                    column = self.columns[index]
                    part.add_column(column.header, justify=column.justify, min_width=_width(column))
                cells = [list(self.columns[index].cells) for index in group]
                for row, values in zip(self.rows, zip(*cells, strict=True), strict=True):
                    part.add_row(*values, end_section=row.end_section)
                yield part

    table = Folding(title=_text(title))
    for index, column in enumerate(columns):
        table.add_column(_text(column), justify="right" if index else "left")
    return table


def _width(column: Column) -> int:
    """Characters that a column needs: of its heading the longest word, of its cells everything."""
    heading = max((len(word) for word in str(column.header).split()), default=0)
    return max([heading, *(len(str(cell)) for cell in column.cells)])


def _groups(widths: list[int], most: int) -> list[list[int]]:
    """The columns of each of the tables, in order: the first one, and as many of the others as have room."""
    border, between = 1, 3
    groups: list[list[int]] = []
    left = 0
    for index, width in enumerate(widths[1:], start=1):
        left -= width + between
        if left < 0 or not groups:
            groups.append([0])
            left = most - border - (widths[0] + between) - (width + between)
        groups[-1].append(index)
    return groups


def _text(content: str) -> Text:
    """Text that rich shows as it is: names may hold square brackets."""
    from rich.text import Text

    return Text(content)
