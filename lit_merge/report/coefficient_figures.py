"""Two pictures of merging coefficients: every one of them, and their course over the depth of the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_merge.errors import ConfigurationError
from lit_merge.naming import number_of_blocks
from lit_merge.report.coefficient_depth import DepthMeans, depth_means, group_places, lines_fit
from lit_merge.report.drawing import colours, place, signed
from lit_merge.report.figures import save_figure
from lit_merge.report.layout import colour_bar
from lit_merge.report.panels import FAINT, INK, QUIET, quieten, readable_on, shortened, text_width
from lit_merge.vectors.coefficients import Coefficients

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coefficient_depth_figure", "coefficient_heat_map"]

_TASK_COLOUR, _LINE_COLOUR = "#0072b2", "#d55e00"  # Okabe and Ito: safe for colour-blind
_KINDS = {
    "task": "one per task",
    "block": "one per task and block",
    "tensor": "one per task and parameter tensor",
    "group": "one per task, block and kind of layer",
}

# All lengths in inches.
_MARGIN, _HEADER, _TITLE, _SUBTITLE = 0.3, 1.1, 0.48, 0.75
_WIDEST_MAP, _WIDEST_CELL, _NUMBERS, _BAR = 9.6, 0.6, 0.65, 0.85
_NAMED_CELL, _NUMBERED_CELL = 0.16, 0.45  # the narrowest with a name of its own, and with the number in it
_DEPTH_WIDTH, _DEPTH_LEFT, _SMALL_LEFT, _LEGEND = 13.0, 5.3, 6.05, 0.75


def coefficient_heat_map(coefficients: Coefficients, path: str | os.PathLike[str]) -> Path:
    """Draw every coefficient as a cell, atomically: rows are tasks, columns are groups from the input to the output.

    Where there is room, cells hold their numbers and columns have names; otherwise the columns are marked by blocks.
    The colours run from zero, or on both sides of it if a coefficient is negative.

    Args:
        coefficients: of T tasks and L groups.
        path: the file to write, ``.png`` or ``.svg``. Missing folders are created.

    Returns:
        The path written.

    Raises:
        ConfigurationError: the suffix is another one.
        OSError: the file cannot be written; what was at ``path`` is as it was before.
    """
    return save_figure(path, partial(_arrange_map, coefficients=coefficients))


def coefficient_depth_figure(coefficients: Coefficients, path: str | os.PathLike[str]) -> Path:
    """Draw the mean coefficient by depth, atomically: of all tasks beside the line of LiNeS, and of every task.

    The line is the least-squares fit of :func:`lit_merge.report.coefficient_depth.lines_fit`.

    Args:
        coefficients: of groups that lie in one block each.
        path: the file to write, ``.png`` or ``.svg``. Missing folders are created.

    Returns:
        The path written.

    Raises:
        ConfigurationError: the coefficients have no depth, or the suffix is another one.
        OSError: the file cannot be written; what was at ``path`` is as it was before.
    """
    means = depth_means(coefficients)
    if means is None:
        raise ConfigurationError(
            f"coefficients: expected groups that lie in one block each, got {coefficients.granularity} coefficients of "
            f"{len(coefficients.groups)} groups. Use coefficient_heat_map, or learn them by block or tensor."
        )
    return save_figure(path, partial(_arrange_depth, coefficients=coefficients, means=means))


def _arrange_map(figure: Figure, coefficients: Coefficients) -> None:
    """Give the figure its size, title and panels."""
    places = group_places(coefficients)
    order = sorted(range(len(coefficients.groups)), key=lambda i: places[coefficients.groups[i]] if places else 0)
    cell = min(_WIDEST_CELL, _WIDEST_MAP / len(order))
    groups = [shortened(coefficients.groups[index], 48) for index in order]
    one_each = places is not None and len(set(places.values())) == len(places)
    named = cell >= _NAMED_CELL and not one_each
    longest = max(text_width(group, 8.5) / 72 for group in groups) if named else 0.0
    level = longest <= cell - 0.06
    row = 0.42 if len(coefficients.tasks) <= 12 else 0.3
    left = _MARGIN + max(text_width(shortened(task), 12) / 72 for task in coefficients.tasks) + 0.16
    right, bottom = left + cell * len(order), _HEADER + row * len(coefficients.tasks)
    bar = right + (_NUMBERS if len(order) > 1 else 0) + 0.3
    words = max(text_width(text, size) for text, size in _words(coefficients)) / 72
    width = max(bar + _BAR, words + 2 * _MARGIN)
    height = bottom + _MARGIN + ((longest + 0.2 if not level else 0.3) if named else 0.6)
    _title(figure, coefficients, width, height)

    values = coefficients.values[:, order].tolist()
    axes = place(figure, left, right, _HEADER, bottom)
    shades, scale = colours(values)
    mesh = axes.pcolormesh(
        values, cmap=shades, norm=scale, edgecolors="white", linewidth=1.5 if named or one_each else 0
    )
    axes.set_ylim(len(values), 0)
    if cell >= _NUMBERED_CELL:
        for line, numbers in enumerate(values):
            for column, value in enumerate(numbers):
                text, colour = signed(value), readable_on(shades(scale(value)))
                axes.text(column + 0.5, line + 0.5, text, ha="center", va="center_baseline", color=colour, fontsize=10)
    axes.set_yticks([line + 0.5 for line in range(len(values))], [shortened(task) for task in coefficients.tasks])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=12, pad=6)
    if named:
        axes.set_xticks([column + 0.5 for column in range(len(groups))], groups, rotation=0 if level else 90)
        axes.tick_params(axis="x", labelsize=8.5)
    elif places is None:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(groups)} groups in the order of the parameters", color=QUIET)
    else:
        blocks = number_of_blocks(coefficients.members)
        _mark_blocks(axes, [places[coefficients.groups[index]] for index in order], blocks, cell)
    quieten(axes)
    if len(order) > 1:
        means = place(figure, right, right + _NUMBERS, _HEADER, bottom)
        means.set_ylim(len(values), 0)
        means.set_axis_off()
        means.annotate("mean", (1, 1), (0, 8), "axes fraction", textcoords="offset points", ha="right", weight="bold")
        for line, numbers in enumerate(values):
            text = signed(sum(numbers) / len(numbers))
            means.text(1, line + 0.5, text, ha="right", va="center_baseline", fontsize=12)
    colour_bar(figure, mesh, bar, _HEADER, bottom)


def _mark_blocks(axes: Axes, places: Sequence[int], blocks: int, cell: float) -> None:
    """Separate the blocks, and name those that are wide enough for it."""
    edges = [0, *(column for column in range(1, len(places)) if places[column] != places[column - 1]), len(places)]
    for edge in edges[1:-1]:
        axes.axvline(edge, color="white", linewidth=min(2.0, 30 * cell))
    roomy = cell * len(places) > 2.2
    ticks: dict[float, str] = {}
    end = 0.0  # of the last number, in inches
    for start, stop in pairwise(edges):
        place, centre = places[start], (start + stop) / 2
        half = text_width(str(place), 10) / 144 + 0.03
        if place in (-1, blocks):
            ticks[centre] = "\nembedding" if place < 0 else "\nhead"  # below the numbers, where words have room
        elif centre * cell - half >= end:
            ticks[centre] = str(place) if roomy else f"block {place}"
            end = centre * cell + half
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("block" if roomy else "", color=QUIET, labelpad=-12)


def _arrange_depth(figure: Figure, coefficients: Coefficients, means: DepthMeans) -> None:
    """Give the figure its size, title and panels: all tasks on the left, one small panel for each on the right."""
    count = len(means.tasks)
    rows = 1 if count <= 2 else 2 if count <= 8 else -(-count // 4)
    columns = -(-count // rows) if count > 1 else 0
    top, bottom_space = _HEADER + _LEGEND, 0.6
    small, gap = max(1.0, 3.4 / rows - 0.4), 0.5
    bottom = top + rows * small + (rows - 1) * gap
    width = _DEPTH_WIDTH if columns else _DEPTH_LEFT + 2 * _MARGIN
    _title(figure, coefficients, width, bottom + bottom_space)

    lowest, highest = float(means.values.min()), float(means.values.max())
    margin = 0.06 * (highest - lowest) or 0.05
    main = place(figure, _MARGIN + 0.45, _DEPTH_LEFT, top, bottom)
    panels = [main]
    average = means.values.mean(0).tolist()
    for task in means.values.tolist() if columns else []:
        _course(main, means, task, color="#a8b0b8", linewidth=1, markersize=3, label="each task")
    fit = lines_fit(means)
    label = "mean over tasks" if columns else means.tasks[0]
    _course(main, means, average, color=INK, linewidth=2.5, markersize=6, label=label)
    if fit is not None:
        text = f"LiNeS line fitted to {'the mean' if columns else 'it'}: {signed(fit[0])} → {signed(fit[1])}"
        style: dict[str, Any] = {"color": _LINE_COLOUR, "linewidth": 2.5, "linestyle": (0, (4, 2)), "zorder": 4}
        main.plot([0, means.blocks - 1], fit, label=text, **style)
    handles = dict(zip(*reversed(main.get_legend_handles_labels()), strict=True))  # each label once
    main.legend(
        list(handles.values()),
        list(handles),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        frameon=False,
        labelspacing=0.25,
        borderpad=0.2,
    )
    if columns:
        each = (_DEPTH_WIDTH - _MARGIN - _SMALL_LEFT + 0.2) / columns
        for index, task in enumerate(means.tasks):
            line, column = divmod(index, columns)
            left, upper = _SMALL_LEFT + column * each, top + line * (small + gap)
            axes = place(figure, left, left + each - 0.2, upper, upper + small)
            _course(axes, means, average, color="#a8b0b8", linewidth=1.5, markersize=0)
            _course(axes, means, means.values[index].tolist(), color=_TASK_COLOUR, linewidth=2, markersize=4)
            axes.annotate(shortened(task, 18), (0, 1), (0, 5), "axes fraction", textcoords="offset points", fontsize=11)
            axes.tick_params(labelleft=column == 0, labelbottom=index + columns >= count, labelsize=9)
            panels.append(axes)
    for axes in panels:
        axes.set_xlim(-1.6, means.blocks + 0.6)
        axes.set_ylim(lowest - margin, highest + margin)
        axes.locator_params(axis="y", nbins=5)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        _name_places(axes, means, roomy=axes is main)
        quieten(axes, "bottom")


def _course(axes: Axes, means: DepthMeans, values: Sequence[float], label: str | None = None, **style: Any) -> None:
    """A line through the blocks; what lies outside of them stands by itself."""
    inside = [0 <= place < means.blocks for place in means.places]
    within = [(place, value) for place, value, block in zip(means.places, values, inside, strict=True) if block]
    beyond = [(place, value) for place, value, block in zip(means.places, values, inside, strict=True) if not block]
    axes.plot([place for place, _ in within], [value for _, value in within], "-o", label=label, **style)
    axes.plot([place for place, _ in beyond], [value for _, value in beyond], "o", **{**style, "linewidth": 0})


def _name_places(axes: Axes, means: DepthMeans, roomy: bool) -> None:
    """Ticks at some of the blocks, the first and the last among them, and outside if there is room for their names."""
    last = means.blocks - 1
    step = max(1, -(-last // 11)) if roomy else max(1, last)
    blocks = [block for block in range(0, last, step) if last - block >= step]
    ticks = {block: str(block) for block in (*blocks, last)}
    if roomy:
        # Below the numbers, as the words are wider than the distance between two blocks.
        ticks.update({-1: "\nembedding"} if -1 in means.places else {})
        ticks.update({means.blocks: "\nhead"} if means.blocks in means.places else {})
        axes.set_xlabel("block", color=QUIET, labelpad=-12)
    axes.set_xticks(list(ticks), list(ticks.values()))


def _title(figure: Figure, coefficients: Coefficients, width: float, height: float) -> None:
    figure.set_size_inches(width, height)
    (title, size), (subtitle, small) = _words(coefficients)
    figure.text(_MARGIN / width, 1 - _TITLE / height, title, fontsize=size, weight="bold")
    figure.text(_MARGIN / width, 1 - _SUBTITLE / height, subtitle, fontsize=small, color=QUIET)


def _words(coefficients: Coefficients) -> tuple[tuple[str, float], tuple[str, float]]:
    """Title and subtitle, each with its size."""
    known = coefficients.metadata
    parts = [shortened(known["base_model"], 40)] if known.get("base_model") else []
    parts += [_KINDS[coefficients.granularity]] if coefficients.granularity in _KINDS else []
    parts += [f"after {known['step']} steps"] if known.get("step") else []
    return ("Merging coefficients", 17.0), (", ".join(parts), 12.0)
