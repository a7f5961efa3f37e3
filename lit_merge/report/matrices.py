"""Heat maps: a matrix with its numbers, and values over a plane of two coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_merge.report.drawing import colours, signed
from lit_merge.report.panels import FAINT, INK, QUIET, quieten, readable_on, shortened, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_matrix", "draw_plane"]


def draw_matrix(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    decimals: int = 2,
    limits: tuple[float, float] | None = None,
    diagonal: bool = True,
    names: bool = True,
) -> Any:
    """A heat map with a number in every cell that has room for it.

    Args:
        axes: to draw into; their size says how much room there is.
        values: one list per row; what is not finite is left white, with a dash.
        rows: what the rows are.
        columns: what the columns are.
        decimals: of the numbers.
        limits: ends of the colour scale; by default from zero, or on both sides of it.
        diagonal: whether the diagonal is shown; it is grey otherwise, and does not count for the colours.
        names: whether the names are written.

    Returns:
        What a colour bar is made of.
    """
    shown = [
        [math.nan if not diagonal and row == column else value for column, value in enumerate(line)]
        for row, line in enumerate(values)
    ]
    shades, scale = colours(shown, limits)
    size = _cell_size(axes, len(rows), len(columns))
    mesh = axes.pcolormesh(shown, cmap=shades, norm=scale, edgecolors="white", linewidth=min(1.5, 0.08 * min(size)))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    longest = max(len(signed(value, decimals)) for line in shown for value in (*line, scale.vmin, scale.vmax))
    font = min(12.0, size[0] / (0.62 * longest), 0.62 * size[1])
    for row, line in enumerate(shown):
        for column, value in enumerate(line):
            if not diagonal and row == column:
                axes.fill_between([column, column + 1], row, row + 1, color=FAINT, linewidth=0, alpha=0.5)
            elif font >= 5.5:
                colour = readable_on(shades(scale(value))) if math.isfinite(value) else QUIET
                text = signed(value, decimals)
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center_baseline", color=colour, fontsize=font)
    if names:
        level = all(text_width(shortened(name, 14), 11) + 3 <= size[0] for name in columns)
        axes.set_xticks([column + 0.5 for column in range(len(columns))], [shortened(name, 14) for name in columns])
        axes.tick_params(axis="x", labelcolor=INK, labelsize=min(11.0, 0.8 * size[0]), labelrotation=0 if level else 90)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], [shortened(name) for name in rows])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=min(11.0, 0.8 * size[1]))
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    quieten(axes)
    return mesh


def draw_plane(
    axes: Axes,
    values: Sequence[Sequence[float]],
    first: Sequence[float],
    second: Sequence[float],
    limits: tuple[float, float] | None = None,
) -> Any:
    """Values over the plane of two coefficients; a frame marks where both are in [0, 1].

    Args:
        axes: to draw into.
        values: one list per value of the first coefficient; what is not finite is left grey.
        first: the coefficient on the horizontal axis.
        second: the coefficient on the vertical axis.
        limits: ends of the colour scale; by default from zero to the largest value.

    Returns:
        What a colour bar is made of.
    """
    from matplotlib.patches import Rectangle
    from numpy import array, ma

    shades, scale = colours(values, limits)
    shades = shades.with_extremes(bad=FAINT)
    mesh = axes.pcolormesh(
        first, second, ma.masked_invalid(array(values).T), cmap=shades, norm=scale, shading="nearest"
    )
    mesh.set_rasterized(True)  # else viewers draw hairlines between the cells
    if min(*first, *second) < 0 or max(*first, *second) > 1:
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.5))
    axes.set_aspect("equal")
    axes.locator_params(nbins=7)
    quieten(axes)
    return mesh


def _cell_size(axes: Axes, rows: int, columns: int) -> tuple[float, float]:
    """Width and height of a cell in points."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_position()
    return 72 * figure.get_figwidth() * box.width / columns, 72 * figure.get_figheight() * box.height / rows
