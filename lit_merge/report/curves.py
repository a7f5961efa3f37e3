"""Curves: by the depth of the network, and of two accuracies against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_merge.report.drawing import COLOURS
from lit_merge.report.panels import FAINT, INK, QUIET, quieten, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_by_depth", "draw_trade_off", "name_places"]


def name_places(axes: Axes, places: Sequence[str], fewest: int = 1) -> None:
    """Name places at 0, 1, … of the horizontal axis: blocks by their numbers, below them what lies outside.

    Args:
        axes: whose ticks are set.
        places: ``whole``, ``embedding``, ``block 0``, …, ``head``, or some of them.
        fewest: only every so many-th block has its number.
    """
    ticks = {}
    for index, name in enumerate(places):
        number = name.removeprefix("block ")
        if number == name:  # words are wider than the distance between two places
            ticks[index] = name if name == "whole" or len(places) < 3 else f"\n{name}"
        elif int(number) % fewest == 0:
            ticks[index] = number
    axes.set_xticks(list(ticks), list(ticks.values()))
    if any(name.startswith("block ") for name in places):
        axes.set_xlabel("block", color=QUIET, labelpad=-12)


def draw_by_depth(axes: Axes, values: Sequence[Sequence[float]], labels: Sequence[str], places: Sequence[str]) -> None:
    """A line per label through the blocks; what lies outside of them stands by itself.

    Args:
        axes: to draw into; a legend is left to the caller.
        values: one list per label with a value per place; what is not finite is left out.
        labels: what the lines are.
        places: ``embedding``, ``block 0``, …, ``head``, or some of them.
    """
    inside = [index for index, name in enumerate(places) if name.startswith("block ")]
    outside = [index for index in range(len(places)) if index not in inside]
    for number, (line, label) in enumerate(zip(values, labels, strict=True)):
        colour, marker = COLOURS[number % len(COLOURS)], "os^Dv"[number // len(COLOURS) % 5]
        axes.plot(
            inside,
            [line[index] for index in inside],
            f"-{marker}",
            color=colour,
            linewidth=1.8,
            markersize=5,
            label=shortened(label),
        )
        axes.plot(outside, [line[index] for index in outside], marker, color=colour, markersize=5, alpha=0.8)
    name_places(axes, places)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    quieten(axes, "bottom")


def draw_trade_off(
    axes: Axes, paths: Mapping[str, Sequence[Sequence[float]]], front: Sequence[Sequence[float]] = ()
) -> None:
    """Paths of models in the plane of two accuracies, in percent, and the front of what no other model dominates.

    Args:
        axes: to draw into; a legend is left to the caller.
        paths: name -> points (target, control), in [0, 1], in the order of the path.
        front: the points of the front, in any order.
    """
    for number, (name, points) in enumerate(paths.items()):
        xs, ys = ([100 * point[axis] for point in points] for axis in (0, 1))
        colour, marker = COLOURS[number % len(COLOURS)], "os^Dv"[number % 5]
        axes.plot(xs, ys, f"-{marker}", color=colour, linewidth=1.5, markersize=5, label=shortened(name))
    if front:
        ordered = sorted(([100 * one for one in point] for point in front), key=lambda point: (point[0], -point[1]))
        axes.plot(
            [point[0] for point in ordered],
            [point[1] for point in ordered],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=INK,
            markeredgewidth=1.2,
            label="no model is better in both",
            zorder=3,
        )
    axes.set_xlabel("target tasks, accuracy (%)", color=QUIET)
    axes.set_ylabel("control tasks, accuracy (%)", color=QUIET)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.margins(0.06)
    quieten(axes, "bottom", "left")
