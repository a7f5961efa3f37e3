"""Tables and a figure from the results JSON of a suite; figures of merging coefficients.

Importing this imports neither rich nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

# Spelled out for readers and type checkers; the imports themselves happen on first use.
__all__ = [
    "Results",
    "accuracy_table",
    "coefficient_depth_figure",
    "coefficient_heat_map",
    "display_name",
    "markdown_table",
    "report",
    "results_figure",
    "results_page",
    "summary",
    "vector_table",
]

_HOMES = {
    "Results": "results",
    "accuracy_table": "tables",
    "coefficient_depth_figure": "coefficient_figures",
    "coefficient_heat_map": "coefficient_figures",
    "display_name": "results",
    "markdown_table": "tables",
    "report": "page",
    "results_figure": "figures",
    "results_page": "page",
    "summary": "results",
    "vector_table": "tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
