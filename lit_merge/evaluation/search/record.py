"""Accuracies that were measured before, so that an interrupted or repeated search goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_merge._version import __version__
from lit_merge.files.cache import cache_directory
from lit_merge.params import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["AccuracyRecord"]

# Part of every key: raise it when the evaluation changes.
_VERSION = 1


class AccuracyRecord:
    """The accuracies of models, one small file per model and set of tasks, written as soon as they are known.

    A file's name is the SHA-256 of all that the accuracies depend on: the values of the vector, not what it was made
    by, and its coefficient; the pre-trained model, the heads, and whether the model is linearised; the images, with
    labels and preprocessing; device type, precision and versions. So a transform whose code has changed is measured
    anew. A damaged file is measured again. The folder is ``cache_directory("accuracies")``.

    Args:
        module: what is evaluated, with its heads built.
        loaders: task -> loader of the images. Where a data set has no ``digest()``, nothing is recorded.
    """

    def __init__(self, module: MultiTaskModule, loaders: Mapping[str, Any]) -> None:
        sets = {task: loader.dataset for task, loader in loaders.items() if hasattr(loader, "dataset")}
        self._active = len(sets) == len(loaders) and all(hasattr(images, "digest") for images in sets.values())
        if not self._active:
            return
        self._folder = cache_directory("accuracies")
        self._images = {task: images.digest() for task, images in sets.items()}
        self._model = [
            *(_VERSION, __version__, torch.__version__, module.device.type, torch.get_float32_matmul_precision()),
            *(module.base_name, module.base_fingerprint, str(module.network), module.linearized),
            *(fingerprint(dict(module.network.named_buffers())), fingerprint(module.heads.state_dict())),
        ]

    def key(self, vector: Mapping[str, Tensor] | None, coefficient: float, tasks: Sequence[str]) -> str | None:
        """The key of θ0 + coefficient · vector on some tasks; None if it cannot be recorded.

        Args:
            vector: read once; None for θ0.
            coefficient: its factor.
            tasks: the tasks that it is evaluated on.
        """
        if not self._active:
            return None
        values = None if vector is None else fingerprint(vector)
        content = [self._model, values, coefficient, [[task, self._images[task]] for task in tasks]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, key: str | None, tasks: Sequence[str]) -> dict[str, float] | None:
        """The accuracies with this key, task -> accuracy; None if there are none that can be trusted."""
        if key is None:
            return None
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            accuracy = dict(found["accuracy"])
            complete = found["key"] == key and list(accuracy) == list(tasks)
            if complete and all(0 <= value <= 1 for value in accuracy.values()):
                return accuracy
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def write(self, key: str | None, accuracy: Mapping[str, float]) -> None:
        """Record accuracies, task -> accuracy; a file appears whole or not at all."""
        from lit_merge.files.text import write_text

        if key is not None:
            write_text(self._path(key), json.dumps({"key": key, "accuracy": accuracy}) + "\n")

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"
