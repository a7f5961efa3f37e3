"""Axes to draw a metric into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_and_axes"]


def figure_and_axes(axes: Axes | None, **settings: Any) -> tuple[Figure, Axes]:
    """The axes with the figure that they are in; new ones of pyplot, as torchmetrics makes them, for None."""
    if axes is None:
        from matplotlib import pyplot

        return pyplot.subplots(layout="constrained", **settings)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure, axes
