"""lit-merge: models are fine-tuned to be merged, and merged.

Names are loaded when they are first used: importing :mod:`lit_merge`, :mod:`lit_merge.vectors` or
:mod:`lit_merge.transforms` costs torch only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_merge._version import __version__

if TYPE_CHECKING:
    from lit_merge import callbacks, functional, metrics, transforms
    from lit_merge.errors import LitMergeError
    from lit_merge.models.linearized import LinearizedModel
    from lit_merge.models.merged import MergedModel
    from lit_merge.models.merging.in_memory import merge
    from lit_merge.modules.finetune import FineTuneModule
    from lit_merge.modules.merge import MergeModule
    from lit_merge.modules.multitask import MultiTaskModule
    from lit_merge.vectors import Coefficients, TaskVector, TaskVectors

_HOMES = {
    "Coefficients": "lit_merge.vectors",
    "FineTuneModule": "lit_merge.modules",
    "LinearizedModel": "lit_merge.models.linearized",
    "LitMergeError": "lit_merge.errors",
    "MergeModule": "lit_merge.modules",
    "MergedModel": "lit_merge.models.merged",
    "MultiTaskModule": "lit_merge.modules",
    "TaskVector": "lit_merge.vectors",
    "TaskVectors": "lit_merge.vectors",
    "merge": "lit_merge.models.merging.in_memory",
}
_ROOMS = ("callbacks", "functional", "metrics", "transforms")

__all__ = [
    "Coefficients",
    "FineTuneModule",
    "LinearizedModel",
    "LitMergeError",
    "MergeModule",
    "MergedModel",
    "MultiTaskModule",
    "TaskVector",
    "TaskVectors",
    "__version__",
    "callbacks",
    "functional",
    "merge",
    "metrics",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"lit_merge.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lit_merge' has no attribute {name!r}")
