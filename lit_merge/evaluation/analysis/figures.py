"""Every figure of an analysis, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lit_merge.evaluation.analysis.record import file_name
from lit_merge.report import model_figures, vector_figures
from lit_merge.report.coefficient_depth import depth_means
from lit_merge.report.coefficient_figures import coefficient_depth_figure, coefficient_heat_map
from lit_merge.report.figures import save_figure
from lit_merge.vectors import Coefficients

__all__ = ["draw_figures"]


def draw_figures(result: Mapping[str, Any], folder: Path, coefficients: Coefficients | None = None) -> list[Path]:
    """Draw what an analysis found into ``folder/figures``.

    Args:
        result: the content of ``analysis.json``.
        folder: of the analysis.
        coefficients: the merging coefficients that were given.

    Returns:
        The files, each of which appeared whole.
    """
    found, written = result["analyses"], []
    drawings: dict[str, Any] = {}
    for name in ("cosine", "norms", "signs"):
        if name in found:
            drawings[name] = partial(getattr(vector_figures, f"arrange_{name}"), result=result)
    for name in ("tau_jp", "advantage", "accuracy"):
        if name in found:
            drawings[name] = partial(getattr(model_figures, f"arrange_{name}"), result=result)
    if "accuracy" in found:
        drawings["methods"] = partial(model_figures.arrange_methods, result=result)
    for task in found.get("paths", {}):
        drawings[f"path-{file_name(task)}"] = partial(model_figures.arrange_path, result=result, task=task)
    for pair in found.get("disentanglement", {}).get("pairs", []):
        name = "-".join(map(file_name, pair["tasks"]))
        drawing = partial(model_figures.arrange_disentanglement, result=result, pair=pair)
        drawings[f"disentanglement-{name}"] = drawing
    for suffix in (".png", ".svg"):
        for name, drawing in drawings.items():
            written.append(save_figure(folder / "figures" / f"{name}{suffix}", drawing))
        if coefficients is not None and "coefficients" in found:
            written.append(coefficient_heat_map(coefficients, folder / "figures" / f"coefficients{suffix}"))
            if depth_means(coefficients) is not None:
                path = folder / "figures" / f"coefficients-depth{suffix}"
                written.append(coefficient_depth_figure(coefficients, path))
    return written
