"""What the metrics of merging have in common: how torchmetrics treats them, and how they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DrawnMetric"]


class DrawnMetric(Metric):
    """A metric that draws what it computes; a subclass says how in ``_draw``, and a number is drawn as a point."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    def plot(self, val: Any = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw what was found.

        Args:
            val: what ``compute`` gave, of a single number also a list of them; computed by default.
            ax: axes to draw into; new ones by default.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(layout="constrained")[1]
        self._draw(ax, self.compute() if val is None else val)
        figure = ax.get_figure(root=True)
        assert figure is not None
        return figure, ax

    def _draw(self, axes: Axes, found: Any) -> None:
        self._plot(found, axes)
