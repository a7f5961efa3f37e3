"""What several figures draw alike: axes placed in inches, colours around zero, signed numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "colours", "place", "signed"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c8c8c")
"""Of lines and bars, in this order: Okabe and Ito's, safe for colour-blind, and two more."""

_SHADES = ("YlGnBu", 0.06, 0.86)  # colour map and the part of it in use: no cell vanishes on white or is near black
_SHADES_WITH_NEGATIVE = ("PuOr", 0.08, 0.92)  # its middle, at zero, is nearly white


def place(figure: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes between two distances from the left and two from the top, in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))


def colours(values: Sequence[Sequence[float]], limits: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """Colour map and scale: from zero, or as far below it as above; what is not finite does not count.

    Args:
        values: what is to be drawn.
        limits: ends of the scale instead; on both sides of zero they have a colour map with a pale middle.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from numpy import linspace

    finite = [value for row in values for value in row if math.isfinite(value)] or [0.0]
    lowest, highest = min(finite), max(finite)
    reach = max(highest, -lowest) or 1.0
    first, last = limits or (0 if lowest >= 0 else -reach, reach)
    name, start, end = _SHADES if first >= 0 else _SHADES_WITH_NEGATIVE
    shades = LinearSegmentedColormap.from_list("shades", colormaps[name](linspace(start, end, 256)))
    return shades, Normalize(first, last)


def signed(value: float, decimals: int = 2) -> str:
    """The number with so many decimals, without a minus sign before zero; a dash for what is no number."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−") if math.isfinite(value) else "–"
