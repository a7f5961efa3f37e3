"""Bars side by side, in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_merge.report.drawing import COLOURS, signed
from lit_merge.report.panels import FAINT, INK, quieten, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_bars"]


def draw_bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]], numbers: bool = False) -> None:
    """Groups of bars, one bar of each series in every group.

    Args:
        axes: to draw into; a legend is left to the caller.
        groups: names of the groups, from left to right.
        series: name -> a share in [0, 1] per group; what is not finite has no bar.
        numbers: whether each bar has its number above.
    """
    width = 0.84 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [100 * value if math.isfinite(value) else 0.0 for value in values]
        colour = COLOURS[number % len(COLOURS)]
        hatch = ("", "///", "...")[number // len(COLOURS) % 3]
        axes.bar(places, heights, 0.92 * width, color=colour, hatch=hatch, edgecolor="white", label=shortened(name, 30))
        for place, height, value in zip(places, heights, values, strict=True):
            if numbers and math.isfinite(value):
                at = (0, 2 if height >= 0 else -10)
                text = signed(height, 0)
                axes.annotate(text, (place, height), at, textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(groups)), [shortened(group, 14) for group in groups])
    axes.tick_params(axis="x", labelcolor=INK)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    quieten(axes, "bottom")
