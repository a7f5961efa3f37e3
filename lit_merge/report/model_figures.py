"""The figures of an analysis of models, each arranged in an empty figure from the content of its JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_merge.report.bars import draw_bars
from lit_merge.report.curves import draw_trade_off
from lit_merge.report.drawing import COLOURS, place
from lit_merge.report.layout import HEADER, MARGIN, arrange_table, colour_bar, heading, numbers, title, widest
from lit_merge.report.matrices import draw_plane
from lit_merge.report.panels import FAINT, QUIET, quieten, shortened
from lit_merge.report.results import display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "arrange_accuracy",
    "arrange_advantage",
    "arrange_disentanglement",
    "arrange_methods",
    "arrange_path",
    "arrange_tau_jp",
]

_FORMS = {"prediction": "predicted classes that differ", "representation": "KL of the features' softmax"}


def arrange_tau_jp(figure: Figure, result: Mapping[str, Any]) -> None:
    """The mean norm of τJp: a row per vector, a column per task whose images were seen."""
    found = result["analyses"]["tau_jp"]
    rows, columns = list(found["tau_jp"]), found["measured_on"]
    values = numbers([[found["tau_jp"][row][column] for column in columns] for row in rows])
    more = "mean norm of J τ; rows: vectors, columns: images"
    arrange_table(figure, result, "How far a vector moves features, τJp", more, values, rows, columns, decimals=1)


def arrange_advantage(figure: Figure, result: Mapping[str, Any]) -> None:
    """Errors of every task's own model, and of its linearisation."""
    found = result["analyses"]["advantage"]
    top, height = HEADER + 0.2, 3.0
    size = (max(7.0, 0.95 * len(found) + 1.5), top + height + 0.6)
    title(figure, result, "Non-linear advantage", "(error linearised − error) · C / (C − 1)", size, images=True)
    width = figure.get_figwidth()
    axes = place(figure, MARGIN + 0.6, width - MARGIN, top, top + height)
    series = {
        "error of the network": [row["nonlinear_error"] for row in found.values()],
        "error of its linearisation": [row["linear_error"] for row in found.values()],
        "advantage": [row["advantage"] for row in found.values()],
    }
    draw_bars(axes, list(found), {name: numbers([row])[0] for name, row in series.items()}, numbers=True)
    lowest = min(series["advantage"])
    axes.set_ylim(bottom=100 * lowest - 3 if lowest < 0 else 0)
    axes.set_ylabel("%", color=QUIET)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, ncols=3, fontsize=10)


def arrange_accuracy(figure: Figure, result: Mapping[str, Any]) -> None:
    """Accuracy on every task, a bar per model."""
    found = result["analyses"]["accuracy"]["measured"]
    tasks = list(found["zero-shot"])
    width = max(7.0, len(tasks) * max(0.8, 0.14 * len(found)) + 1.4)
    series = {display_name(name): _accuracies(rows, tasks) for name, rows in found.items()}
    per_line = max(1, min(len(found), int((width - 1.2) / (widest(list(series)) + 0.65))))
    top, height = HEADER - 0.1 + 0.22 * -(-len(found) // per_line), 3.2
    title(figure, result, "Accuracy on every task", "", (width, top + height + 0.6), images=True)
    axes = place(figure, MARGIN + 0.6, width - MARGIN, top, top + height)
    draw_bars(axes, tasks, series, numbers=len(found) * len(tasks) <= 24)
    axes.set_ylabel("accuracy (%)", color=QUIET)
    axes.set_ylim(0, 100)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, ncols=per_line, fontsize=9.5)


def arrange_methods(figure: Figure, result: Mapping[str, Any]) -> None:
    """The table of models and tasks, with the means."""
    content = result["analyses"]["accuracy"]
    found, tasks = content["measured"], list(content["measured"]["zero-shot"])
    rows = []
    for name, measured in found.items():
        normalised = content["normalised"][name]
        means = [100 * content["mean"][name], math.nan if normalised is None else 100 * normalised]
        rows.append([*(100 * value for value in _accuracies(measured, tasks)), *means])
    lowest = min(value for row in rows for value in row if math.isfinite(value))
    names, columns = [display_name(name) for name in found], [*tasks, "mean", "normalised"]
    limits = (min(90.0, 10.0 * (lowest // 10)), 100.0)
    axes = arrange_table(figure, result, "Methods and tasks", "accuracy (%)", rows, names, columns, 1, limits)
    axes.axvline(len(tasks), color="white", linewidth=8)


def arrange_path(figure: Figure, result: Mapping[str, Any], task: str) -> None:
    """The accuracy on a task against that on the others, along WiSE-FT and LiNeS, and along α."""
    found = result["analyses"]["paths"][task]
    names = {"wise_ft": "WiSE-FT, θ₀ + α τ", "lines": "LiNeS, β = 1 − α"}
    top, height, width = HEADER + 0.2, 3.5, 10.6
    more = shortened(f"control tasks: {', '.join(found['control'])}", 64)
    title(figure, result, f"From the pre-trained model to {task}", more, (width, top + height + 0.75), images=True)
    axes = place(figure, MARGIN + 0.6, MARGIN + 4.9, top, top + height)
    curves = {label: [(point["target"], point["control"]) for point in found[name]] for name, label in names.items()}
    best = [found[one["path"]][one["point"]] for one in found["front"]]
    draw_trade_off(axes, curves, [(point["target"], point["control"]) for point in best])
    axes.set_xlabel(f"{shortened(task)}, accuracy (%)", color=QUIET)
    axes.set_ylabel("control tasks, mean accuracy (%)", color=QUIET)
    style: dict[str, Any] = {"frameon": False, "ncols": 3, "fontsize": 9, "columnspacing": 1.0, "handletextpad": 0.5}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), **style)
    by_alpha = place(figure, MARGIN + 6.1, width - MARGIN, top, top + height)
    for name, colour, marker in zip(names, COLOURS, "os", strict=False):
        for part, line in (("target", "-"), ("control", "--")):
            xs, ys = [point["alpha"] for point in found[name]], [100 * point[part] for point in found[name]]
            by_alpha.plot(xs, ys, line, marker=marker, color=colour, linewidth=1.5, markersize=4)
    by_alpha.set_xlabel("α", color=QUIET)
    by_alpha.set_ylabel("accuracy (%)", color=QUIET)
    by_alpha.grid(color=FAINT, linewidth=0.6)
    heading(by_alpha, f"full lines: {shortened(task, 14)}; dashed: control tasks", 9)
    quieten(by_alpha, "bottom", "left")


def arrange_disentanglement(figure: Figure, result: Mapping[str, Any], pair: Mapping[str, Any]) -> None:
    """ξ over the plane of both coefficients, a panel for each form."""
    values, (one, other) = result["analyses"]["disentanglement"]["values"], pair["tasks"]
    forms = [form for form in _FORMS if form in pair]
    side, each = 3.3, 5.0
    more = "linearised; frame: both in [0, 1]" if result["linearized"] else "frame: both in [0, 1]"
    size = (MARGIN + each * len(forms), HEADER + side + 0.8)
    title(figure, result, f"Disentanglement error of {one} and {other}", more, size, images=True)
    for index, form in enumerate(forms):
        left = MARGIN + 0.6 + index * each
        axes = place(figure, left, left + side, HEADER, HEADER + side)
        mesh = draw_plane(axes, numbers(pair[form]), values, values)
        axes.set_xlabel(f"α of {shortened(one)}", color=QUIET)
        axes.set_ylabel(f"α of {shortened(other)}", color=QUIET, labelpad=1)
        heading(axes, f"ξ, {_FORMS[form]}", 10.5)
        colour_bar(figure, mesh, left + side + 0.15, HEADER, HEADER + side)


def _accuracies(rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> list[float]:
    return [rows[task]["accuracy"] if task in rows else math.nan for task in tasks]
