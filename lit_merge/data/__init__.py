"""Data modules, the embedded suite, published data sets, texts. Importing is light: what is used comes then."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_merge.data.adaptation import MergeDataModule
    from lit_merge.data.batch import Batch, ImageBatch, OtherBatch
    from lit_merge.data.corrupted import CorruptedTask
    from lit_merge.data.embedded.sheet import contact_sheet
    from lit_merge.data.embedded.tasks import DRAWN_TASKS, EMBEDDED_TASKS, load_split
    from lit_merge.data.examples import Examples, TensorExamples
    from lit_merge.data.images.corruptions import CORRUPTIONS, corrupt
    from lit_merge.data.multitask import MultiTaskDataModule
    from lit_merge.data.pretraining import CaptionDataModule
    from lit_merge.data.published.registry import REGISTRY, SUITES
    from lit_merge.data.published.task import PublishedSource
    from lit_merge.data.sources import EmbeddedSource, Task
    from lit_merge.data.task import TaskDataModule
    from lit_merge.data.templates import templates_for
    from lit_merge.data.text.batch import TextBatch
    from lit_merge.data.text.examples import TextExamples
    from lit_merge.data.text.task import TextTask

__all__ = [
    "CORRUPTIONS",
    "DRAWN_TASKS",
    "EMBEDDED_TASKS",
    "REGISTRY",
    "SUITES",
    "Batch",
    "CaptionDataModule",
    "CorruptedTask",
    "EmbeddedSource",
    "Examples",
    "ImageBatch",
    "MergeDataModule",
    "MultiTaskDataModule",
    "OtherBatch",
    "PublishedSource",
    "Task",
    "TaskDataModule",
    "TensorExamples",
    "TextBatch",
    "TextExamples",
    "TextTask",
    "contact_sheet",
    "corrupt",
    "load_split",
    "templates_for",
]

_HOMES = {
    "CORRUPTIONS": "images.corruptions",
    "DRAWN_TASKS": "embedded.tasks",
    "EMBEDDED_TASKS": "embedded.tasks",
    "REGISTRY": "published.registry",
    "SUITES": "published.registry",
    "Batch": "batch",
    "CaptionDataModule": "pretraining",
    "CorruptedTask": "corrupted",
    "EmbeddedSource": "sources",
    "Examples": "examples",
    "ImageBatch": "batch",
    "MergeDataModule": "adaptation",
    "MultiTaskDataModule": "multitask",
    "OtherBatch": "batch",
    "PublishedSource": "published.task",
    "Task": "sources",
    "TaskDataModule": "task",
    "TensorExamples": "examples",
    "TextBatch": "text.batch",
    "TextExamples": "text.examples",
    "TextTask": "text.task",
    "contact_sheet": "embedded.sheet",
    "corrupt": "images.corruptions",
    "load_split": "embedded.tasks",
    "templates_for": "templates",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
