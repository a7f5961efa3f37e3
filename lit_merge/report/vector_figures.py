"""The figures of an analysis of task vectors, each arranged in an empty figure from the content of its JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_merge.report.bars import draw_bars
from lit_merge.report.curves import draw_by_depth, name_places
from lit_merge.report.drawing import place
from lit_merge.report.layout import HEADER, MARGIN, colour_bar, heading, names_below, numbers, title, widest
from lit_merge.report.matrices import draw_matrix
from lit_merge.report.panels import QUIET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["arrange_cosine", "arrange_norms", "arrange_signs"]


def arrange_cosine(figure: Figure, result: Mapping[str, Any]) -> None:
    """The matrix of the whole vectors with its numbers, and a small one for every place, all of these on one scale."""
    found, tasks = result["analyses"]["cosine"], result["tasks"]
    whole, *matrices = (numbers(matrix) for matrix in found["cosine"])
    places = found["places"][1:] if len(matrices) > 1 else []
    side = min(5.2, max(2.4, 0.62 * len(tasks)))
    right = MARGIN + widest(tasks) + 0.15 + side
    columns = min(len(places), max(3, math.ceil(math.sqrt(2 * len(places)))))
    rows = -(-len(places) // columns) if columns else 0
    small = max(1.0, min(1.7, side / rows - 0.32)) if rows else 0.0
    start, step = right + 1.25, small + 0.22
    bottom = HEADER + max(side + names_below(tasks, side), rows * (small + 0.32))
    size = (start + columns * step + 0.85 if columns else right + 1.1, bottom + MARGIN)
    title(figure, result, "Cosines between task vectors", "", size)
    axes = place(figure, right - side, right, HEADER, HEADER + side)
    decimals = 2 if max(map(abs, _apart(whole))) >= 0.1 else 3
    mesh = draw_matrix(axes, whole, tasks, tasks, diagonal=False, decimals=decimals)
    colour_bar(figure, mesh, right + 0.15, HEADER, HEADER + min(side, 2.5))
    shown = [value for matrix in matrices for value in _apart(matrix)]
    reach = max(map(abs, shown)) or 1.0
    limits = (-reach if min(shown) < 0 else 0.0, reach)
    for index, (name, matrix) in enumerate(zip(places, matrices, strict=True) if places else ()):
        row, column = divmod(index, columns)
        left, top = start + column * step, HEADER + row * (small + 0.32)
        panel = place(figure, left, left + small, top, top + small)
        mesh = draw_matrix(panel, matrix, tasks, tasks, diagonal=False, names=False, limits=limits)
        heading(panel, name, 9.5)
    if places:
        colour_bar(figure, mesh, start + columns * step, HEADER, HEADER + min(side, 2.5))


def arrange_norms(figure: Figure, result: Mapping[str, Any]) -> None:
    """‖τ‖ by depth, and in proportion to θ0, a line per task."""
    found, tasks = result["analyses"]["norms"], result["tasks"]
    places, panel, height = found["places"][1:], 4.3, 3.3
    step = panel + 0.75
    size = (MARGIN + 2 * step + widest(tasks) + 0.8, HEADER + height + 0.9)
    title(figure, result, "Task vectors by depth", "", size)
    for index, (name, text, factor) in enumerate(
        (("norm", "norm, ‖τ‖", 1), ("relative_norm", "relative norm, ‖τ‖ / ‖θ₀‖ (%)", 100))
    ):
        left = MARGIN + 0.55 + index * step
        axes = place(figure, left, left + panel, HEADER, HEADER + height)
        rows = [[factor * value for value in line] for line in numbers(found[name])[1:]]
        draw_by_depth(axes, [list(line) for line in zip(*rows, strict=True)], tasks, places)
        name_places(axes, places, math.ceil(0.3 * len(places) / panel))
        heading(axes, text)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=10)


def arrange_signs(figure: Figure, result: Mapping[str, Any]) -> None:
    """Bars of overlap and conflict in every place, and the matrix of conflicts between pairs."""
    found, tasks, places = result["analyses"]["signs"], result["tasks"], result["analyses"]["signs"]["places"]
    panel, side = min(9.0, max(4.6, 0.5 * len(places))), min(4.5, max(2.4, 0.55 * len(tasks)))
    top, height = HEADER + 0.3, max(side, 2.8)
    left = MARGIN + 0.55 + panel + 0.5 + widest(tasks)
    size = (left + side + 1.0, top + height + max(0.6, names_below(tasks, side)) + MARGIN)
    kept = f"the largest {100 * found['density']:g} % of every vector's entries"
    title(figure, result, "Overlap and sign conflict after trimming", kept, size)
    axes = place(figure, MARGIN + 0.55, MARGIN + 0.55 + panel, top, top + height)
    series = {
        "overlap: kept by two or more, of those kept by any": found["overlap"],
        "conflict: with both signs, of those kept by two or more": found["conflict"],
    }
    roomy = 72 * panel / len(places) >= 34
    draw_bars(axes, places, {name: numbers([row])[0] for name, row in series.items()}, numbers=roomy)
    name_places(axes, places, math.ceil(0.3 * len(places) / panel))
    axes.set_ylabel("share of entries (%)", color=QUIET)
    axes.legend(axes.containers, list(series), loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, fontsize=9)
    pairs = place(figure, left, left + side, top, top + side)
    percent = [[100 * value for value in line] for line in numbers(found["pair_conflict"][0])]
    ends = [value for value in _apart(percent) if math.isfinite(value)] or [0.0]
    limits = (10.0 * math.floor(min(ends) / 10), 10.0 * math.floor(max(ends) / 10 + 1))
    mesh = draw_matrix(pairs, percent, tasks, tasks, diagonal=False, decimals=0, limits=limits)
    heading(pairs, "conflict between two (%)")
    colour_bar(figure, mesh, left + side + 0.15, top, top + min(side, 2.5))


def _apart(matrix: Sequence[Sequence[float]]) -> list[float]:
    """What is not on the diagonal."""
    return [value for row, line in enumerate(matrix) for column, value in enumerate(line) if row != column]
