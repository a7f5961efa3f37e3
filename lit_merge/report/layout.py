"""What the figures of an analysis share: title, colour bar, headings, room for names, a table as a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_merge.report.drawing import place
from lit_merge.report.matrices import draw_matrix
from lit_merge.report.panels import QUIET, quieten, shortened, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["HEADER", "MARGIN", "arrange_table", "colour_bar", "heading", "names_below", "numbers", "title", "widest"]

# All lengths in inches.
MARGIN, HEADER = 0.3, 1.15
_TITLE, _SUBTITLE = 0.48, 0.75
_NAME, _NAME_BELOW = 22, 14  # characters of a row's name, and of a column's


def title(
    figure: Figure, result: Mapping[str, Any], text: str, more: str, size: tuple[float, float], images: bool = False
) -> None:
    """Give a figure its size, a title, and a line that says what was measured; wider if these need it.

    Args:
        figure: empty.
        result: the content of ``analysis.json``.
        text: the title.
        more: what else the line says.
        size: width and height.
        images: whether the line says how many images were looked at.
    """
    tasks = len(result["tasks"])
    parts = [result["model"]["name"], f"{tasks} task{'s' * (tasks != 1)}"]
    if images:
        counts = sorted({one["images"] for one in result["images"].values()})
        number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
        parts.append(f"{number} {result['split']} images per task")
    line = "; ".join([", ".join(parts), *([more] if more else [])])
    words = max(text_width(text, 17) * 1.12, text_width(line, 11)) / 72 + 2 * MARGIN  # the title is bold
    width, height = max(size[0], words), size[1]
    figure.set_size_inches(width, height)
    figure.text(MARGIN / width, 1 - _TITLE / height, text, fontsize=17, weight="bold")
    figure.text(MARGIN / width, 1 - _SUBTITLE / height, line, fontsize=11, color=QUIET)


def colour_bar(figure: Figure, mesh: Any, left: float, top: float, bottom: float) -> None:
    """A narrow one, at least long enough to be read."""
    axes = place(figure, left, left + 0.14, top, max(bottom, top + 0.84))
    figure.colorbar(mesh, cax=axes)
    axes.locator_params(axis="y", nbins=5)
    quieten(axes)


def heading(axes: Axes, text: str, size: float = 11) -> None:
    """A line above axes."""
    axes.annotate(text, (0, 1), (0, 6), "axes fraction", textcoords="offset points", weight="bold", fontsize=size)


def widest(names: Sequence[str], longest: int = _NAME) -> float:
    """The room that names of rows need."""
    return max(text_width(shortened(name, longest), 11) for name in names) / 72


def names_below(names: Sequence[str], width: float) -> float:
    """The room that names of columns need below a matrix of this width, level or upright."""
    longest = widest(names, _NAME_BELOW)
    return 0.3 if longest + 0.05 <= width / len(names) else longest + 0.15


def numbers(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Numbers from JSON, with NaN for null."""
    return [[math.nan if value is None else value for value in row] for row in rows]


def arrange_table(
    figure: Figure,
    result: Mapping[str, Any],
    text: str,
    more: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    decimals: int = 2,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """A heat map with its numbers as the only panel, as wide as its columns' names if there are few of them."""
    cell = min(1.05, max(0.62, widest(columns, _NAME_BELOW) + 0.12)) if len(columns) <= 12 else 0.56
    line = 0.42 if len(rows) <= 12 else 0.34
    left, side, bottom = MARGIN + widest(rows) + 0.15, cell * len(columns), HEADER + line * len(rows)
    size = (left + side + 1.1, bottom + names_below(columns, side) + MARGIN)
    title(figure, result, text, more, size, images=True)
    axes = place(figure, left, left + side, HEADER, bottom)
    mesh = draw_matrix(axes, values, rows, columns, decimals=decimals, limits=limits)
    colour_bar(figure, mesh, left + side + 0.15, HEADER, bottom)
    return axes
