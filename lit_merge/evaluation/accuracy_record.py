"""Accuracies that were measured before, so that an interrupted or repeated search goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lit_merge._version import __version__
from lit_merge.files.cache import Cache
from lit_merge.params import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["AccuracyRecord"]

# Part of every key: raise it when the evaluation changes.
_VERSION = 1


class AccuracyRecord:
    """The accuracies of models, cached one by one per model and set of tasks, as soon as they are known.

    A key is made of the values of the vector, not what it was made by, and its coefficient; the pre-trained model, the
    heads, and whether the model is linearised; the images, with labels and preprocessing; device type, precision and
    versions. So a transform whose code has changed is measured anew.

    Args:
        module: what is evaluated, with its heads built.
        loaders: task -> loader of the images. Where a data set has no ``digest()``, nothing is recorded.
    """

    def __init__(self, module: MultiTaskModule, loaders: Mapping[str, Any]) -> None:
        sets = {task: loader.dataset for task, loader in loaders.items() if hasattr(loader, "dataset")}
        self._active = len(sets) == len(loaders) and all(hasattr(images, "digest") for images in sets.values())
        if not self._active:
            return
        self._cache = Cache("accuracies")
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
        return self._cache.key(content)

    def read(self, key: str | None, tasks: Sequence[str]) -> dict[str, float] | None:
        """The accuracies with this key, task -> accuracy; None if there are none that can be trusted."""
        if key is None:
            return None
        accuracy = self._cache.value(key)
        complete = isinstance(accuracy, dict) and list(accuracy) == list(tasks)
        return accuracy if complete and all(_is_fraction(value) for value in accuracy.values()) else None

    def write(self, key: str | None, accuracy: Mapping[str, float]) -> None:
        """Record accuracies, task -> accuracy."""
        if key is not None:
            self._cache.write_value(key, dict(accuracy))


def _is_fraction(value: object) -> bool:
    return isinstance(value, float | int) and 0 <= value <= 1
