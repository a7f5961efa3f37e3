"""One picture of a suite: means, every task, how the coefficients were chosen."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lit_merge.errors import ConfigurationError
from lit_merge.files.writing import new_file, writing
from lit_merge.report import panels
from lit_merge.report.drawing import place
from lit_merge.report.results import Results, display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["results_figure", "results_svg", "save_figure"]

# All lengths in inches.
_WIDTH, _HEIGHT, _MARGIN = 13.0, 6.5, 0.3
_RESOLUTION = 150  # dots per inch
_TITLE, _GAP, _BOTTOM = 1.25, 0.85, 0.4  # above the rows, between the rows and the lower panels, below these
_TALLEST_ROW, _FLATTEST_ROW, _LOWER = 0.6, 0.31, 1.25  # a row of the heat map, and the least for the lower panels
_LEGEND_LINE = 0.18  # of the coefficient searches, where there are many
_LEFT, _NUMBERS, _SECOND_NUMBERS, _RIGHT = 4.2, 4.42, 5.47, 6.65  # end of the dots, two columns, start of the heat map

# Without the software's version and the date, the same results give the same bytes.
_METADATA: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_SETTINGS = {
    "font.size": 11.0,
    "svg.hashsalt": "lit-merge",
    "text.color": panels.INK,
    "text.parse_math": False,  # a name may hold dollar signs
    "xtick.labelcolor": panels.QUIET,
    "ytick.labelcolor": panels.QUIET,
}


def results_figure(results: Results, path: str | os.PathLike[str]) -> Path:
    """Draw the results of a suite to a file, atomically; the same results give the same bytes.

    Rows are methods. On the left their mean accuracy, with a point per seed; beside it the accuracy on every task;
    below, the coefficient searches and how far fine-tuning on each task moved the weights.

    Args:
        results: of a suite.
        path: the file to write, ``.png`` or ``.svg``. Missing folders are created.

    Returns:
        The path written.

    Raises:
        ConfigurationError: the suffix is another one.
        OSError: the file cannot be written; what was at ``path`` is as it was before.
    """
    return save_figure(path, partial(_arrange, results=results))


def results_svg(results: Results) -> bytes:
    """The picture of :func:`results_figure` as the bytes of an SVG file, for a page that holds it."""
    return _drawn(partial(_arrange, results=results), ".svg")


def save_figure(path: str | os.PathLike[str], arrange: Callable[[Figure], None]) -> Path:
    """Draw a figure to a file, atomically, in the style of the reports and without pyplot.

    Args:
        path: the file to write, ``.png`` or ``.svg``. Missing folders are created.
        arrange: gives an empty figure its size and its content.

    Returns:
        The path written.

    Raises:
        ConfigurationError: the suffix is another one.
        OSError: the file cannot be written; what was at ``path`` is as it was before.
    """
    target = Path(path)
    if target.suffix not in _METADATA:
        raise ConfigurationError(
            f"{target}: expected a path that ends in {' or '.join(_METADATA)}, got {target.suffix!r}. Rename it."
        )
    content = _drawn(arrange, target.suffix)
    with writing(target, len(content)):
        target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target, len(content)) as file:
        file.write(content)
    return target


def _drawn(arrange: Callable[[Figure], None], suffix: str) -> bytes:
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with style.context(["default", _SETTINGS]):  # whatever the user's matplotlibrc says
        figure = Figure(dpi=_RESOLUTION, facecolor="white")
        FigureCanvasAgg(figure)
        arrange(figure)
        figure.savefig(content, format=suffix[1:], dpi=_RESOLUTION, metadata=_METADATA[suffix])
    return content.getvalue()


def _arrange(figure: Figure, results: Results) -> None:
    """Give the figure its size, title and panels."""
    methods, column = len(results.methods()), (_WIDTH - _MARGIN - _RIGHT) / len(results.tasks)
    longest = max(panels.text_width(panels.shortened(task), 11) / 72 for task in results.tasks)
    rotated = longest > column - 0.06
    header = _TITLE + (max(0.0, longest - 0.25) if rotated else 0.0)
    least = max(_LOWER, _LEGEND_LINE * len(panels.searched_methods(results)))
    space = _HEIGHT - header - _GAP - least - _BOTTOM
    rows = max(min(methods * _TALLEST_ROW, space), methods * _FLATTEST_ROW)
    height = max(_HEIGHT, header + rows + _GAP + least + _BOTTOM)
    figure.set_size_inches(_WIDTH, height)
    axes = partial(place, figure)
    figure.text(_MARGIN / _WIDTH, 1 - 0.48 / height, results.model_and_scope(), fontsize=17, weight="bold")
    figure.text(_MARGIN / _WIDTH, 1 - 0.75 / height, results.protocol(), fontsize=12, color=panels.QUIET)
    labels = max(panels.text_width(panels.shortened(display_name(method)), 12) / 72 for method in results.methods())
    left = _MARGIN + labels + 0.16
    upper, lower = (header, header + rows), (header + rows + _GAP, height - _BOTTOM)
    panels.draw_means(axes(left, _LEFT, *upper), results)
    panels.draw_numbers(axes(_NUMBERS, _SECOND_NUMBERS - 0.1, *upper), results, "accuracy")
    panels.draw_numbers(axes(_SECOND_NUMBERS, _RIGHT - 0.15, *upper), results, "normalised", normalised=True)
    panels.draw_tasks(axes(_RIGHT, _WIDTH - _MARGIN, *upper), results, rotated)
    panels.draw_search(axes(_MARGIN + 0.4, _LEFT, *lower), results)
    panels.draw_vector_sizes(axes(_RIGHT, _WIDTH - _MARGIN, *lower), results, names=not rotated)
