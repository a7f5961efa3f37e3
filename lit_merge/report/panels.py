"""The panels of the results figure, each drawn into axes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_merge.report.drawing import COLOURS, colours
from lit_merge.report.results import ZERO_SHOT, MergedResult, Results, display_name, summary
from lit_merge.report.tables import mean_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FAINT",
    "INK",
    "QUIET",
    "draw_means",
    "draw_numbers",
    "draw_search",
    "draw_tasks",
    "draw_vector_sizes",
    "quieten",
    "readable_on",
    "searched_methods",
    "shortened",
    "text_width",
]

INK, QUIET, FAINT = "#1f2328", "#59636e", "#d5dae0"
_COLOURS = COLOURS[:6]  # those of Okabe and Ito alone


def draw_means(axes: Axes, results: Results) -> None:
    """One row per method: the mean over tasks as a dot, the gain over zero-shot as a line, the seeds as small dots."""
    from matplotlib.transforms import offset_copy

    methods = results.methods()
    means = {method: [100 * value for value in results.mean_accuracy(method)] for method in methods}
    everything = [value for values in means.values() for value in values]
    margin = 0.07 * (max(everything) - min(everything)) or 1.0
    axes.set_xlim(min(everything) - margin, max(everything) + margin)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    below = offset_copy(axes.transData, fig=axes.get_figure(root=True), y=-9.5, units="points")
    for row, method in enumerate(methods):
        colour, mean = _colour(results, method), summary(means[method])[0]
        if method not in results.merged_methods():
            axes.axvline(mean, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        else:
            start = means[ZERO_SHOT][0]
            axes.plot([start, mean], [row, row], color=colour, linewidth=5, alpha=0.3, solid_capstyle="butt", zorder=2)
        axes.plot(mean, row, "o", color=colour, markersize=11, zorder=4)
        if len(results.seeds) > 1 and method != ZERO_SHOT:
            rows = [row] * len(means[method])
            axes.plot(means[method], rows, "o", color=colour, markersize=3.5, transform=below, zorder=3, clip_on=False)
    axes.set_yticks(range(len(methods)), [shortened(display_name(method)) for method in methods])
    axes.tick_params(axis="y", length=0, pad=10, labelcolor=INK, labelsize=12)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    quieten(axes, "bottom")
    _heading(axes, "mean over tasks (%)")


def draw_numbers(axes: Axes, results: Results, heading: str, normalised: bool = False) -> None:
    """One row per method: the mean over tasks in figures, with ± the standard deviation over seeds in small."""
    methods = results.methods()
    axes.set_ylim(len(methods) - 0.5, -0.5)
    for row, method in enumerate(methods):
        mean, _, spread = mean_cell(results, method, normalised).partition(" ± ")
        axes.text(0.46, row, mean, ha="right", va="center_baseline", fontsize=12)
        if spread:
            axes.text(0.5, row, f"± {spread}", va="center_baseline", fontsize=10, color=QUIET)
    axes.set_axis_off()
    _heading(axes, heading)


def draw_tasks(axes: Axes, results: Results, rotated: bool) -> None:
    """A heat map of the accuracy of every method on every task, with the percentages in the cells."""
    cells = [
        [100 * summary(results.accuracy(method, task))[0] for task in results.tasks] for method in results.methods()
    ]
    shades, scale = colours(cells, (min(90, 10 * (min(min(row) for row in cells) // 10)), 100))
    axes.pcolormesh(cells, cmap=shades, norm=scale, edgecolors="white", linewidth=2)
    axes.set_ylim(len(cells), 0)
    size, decimals = _cell_text(axes, len(results.tasks))
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            text, colour = f"{value:.{decimals}f}", readable_on(shades(scale(value)))
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center_baseline", color=colour, fontsize=size)
    _name_columns(axes, results, rotated)
    axes.tick_params(axis="x", top=False, labeltop=True, bottom=False, labelbottom=False)
    quieten(axes)


def draw_vector_sizes(axes: Axes, results: Results, names: bool) -> None:
    """‖τ‖ / ‖θ0‖ of every task, in the columns of the heat map."""
    size, decimals = _cell_text(axes, len(results.tasks))
    for column, task in enumerate(results.tasks):
        mean = summary([100 * seed.task_vectors[task].relative_norm for seed in results.seeds.values()])[0]
        axes.bar(column + 0.5, mean, width=0.56 * min(1.0, len(results.tasks) / 6), color="#afb8c1")
        text, at = f"{mean:.{max(decimals, 1)}f}", (column + 0.5, mean)
        axes.annotate(text, at, (0, 4), textcoords="offset points", ha="center", fontsize=min(size, 11))
    axes.set_xlim(0, len(results.tasks))
    _name_columns(axes, results, rotated=False)
    axes.tick_params(axis="x", labelbottom=names)
    axes.margins(y=0.2)
    quieten(axes, "bottom")
    _heading(axes, "distance from the pre-trained weights, ‖τ‖ / ‖θ₀‖ (%)")


def draw_search(axes: Axes, results: Results) -> None:
    """Normalised accuracy against the coefficient: one line per method and seed, the chosen coefficients marked."""
    from numpy import interp

    searched = searched_methods(results)
    if not searched:
        axes.set_axis_off()
        axes.text(0, 1, "no coefficient was searched for", color=QUIET, transform=axes.transAxes)
        return
    _heading(axes, f"{results.searched_on()} (%) by coefficient")
    roomy = len(searched) <= 3  # as many as fit with two lines each
    separator = "\nchosen " if roomy else ": "
    for method, models in searched.items():
        colour = _colour(results, method)
        for model in models:
            if model.search is not None:
                tried = sorted(zip(model.search.values, model.search.normalised, strict=True))
                values, scores = [value for value, _ in tried], [100 * score for _, score in tried]
                axes.plot(values, scores, color=colour, linewidth=1.5, alpha=0.8)
                if model.coefficient is not None:
                    score = interp(model.coefficient, values, scores)
                    axes.plot(model.coefficient, score, "o", color=colour, markersize=8, markeredgecolor="w", zorder=3)
        chosen = _range([model.coefficient for model in models if model.coefficient is not None])
        label = f"{shortened(display_name(method))}{separator}{chosen}"
        axes.plot([], [], "-o", color=colour, markersize=8, markeredgecolor="white", label=label)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        handlelength=1.5,
        labelspacing=0.6 if roomy else 0.3,
        fontsize=10.5 if roomy else 9,
    )
    axes.grid(color=FAINT, linewidth=0.6)
    axes.margins(x=0.03)
    axes.locator_params(axis="y", nbins=5)
    quieten(axes, "bottom", "left")


def searched_methods(results: Results) -> dict[str, list[MergedResult]]:
    """The methods whose coefficient was searched for, with their merged models."""
    merged = {method: results.merged(method) for method in results.merged_methods()}
    return {method: models for method, models in merged.items() if any(model.search for model in models)}


def shortened(name: str, longest: int = 22) -> str:
    """The name, cut with an ellipsis if it has more than ``longest`` characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def text_width(text: str, size: float) -> float:
    """Width of a line of text in points, at a font size in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def _range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    lowest, highest = (f"{end:.2f}" if end == round(end, 2) else f"{end:.3g}" for end in (min(values), max(values)))
    return lowest if lowest == highest else f"{lowest}–{highest}"


def _colour(results: Results, method: str) -> str:
    if method not in results.merged_methods():
        return QUIET
    return _COLOURS[results.merged_methods().index(method) % len(_COLOURS)]


def _cell_text(axes: Axes, columns: int) -> tuple[float, int]:
    """Size of the numbers in a heat map in points, and their decimals: what fits the width of a cell."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width = 72 * figure.get_figwidth() * axes.get_position().width / columns
    return (13.0, 1) if width > 38 else (min(13.0, width / 2), 0)


def readable_on(colour: tuple[float, float, float, float]) -> str:
    """White as soon as it contrasts 3.2 to 1 (relative luminance as WCAG 2 defines it), else ink.

    The larger ratio would put ink on mid-blue, where white is easier to read.
    """
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) >= 3.2 else INK


def _name_columns(axes: Axes, results: Results, rotated: bool) -> None:
    names = [shortened(task) for task in results.tasks]
    axes.set_xticks([column + 0.5 for column in range(len(names))], names, rotation=90 if rotated else 0)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=11)


def _heading(axes: Axes, text: str) -> None:
    axes.annotate(text, (0, 1), (0, 8), "axes fraction", textcoords="offset points", weight="bold")


def quieten(axes: Axes, *shown: str) -> None:
    """Thin grey axes: only the sides that are named, no tick marks."""
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in shown)
        spine.set_color(FAINT)
