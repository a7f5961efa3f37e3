"""Validation accuracies of merged models, task by task; nothing here knows of a test split."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lit_merge._version import __version__
from lit_merge.errors import DataError
from lit_merge.evaluation.placed_model import PlacedModel
from lit_merge.files.cache import Cache
from lit_merge.metrics.example_mean import ExampleMean
from lit_merge.metrics.hits import hits_of
from lit_merge.models.linear_features import layout
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from lit_merge.evaluation.measures import Measure
    from lit_merge.models.linear_features import LinearFeatures
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = [
    "Evaluation",
    "LinearEvaluation",
    "in_memory",
    "quiet",
    "silent_trainer",
    "validation_loaders",
]

# Part of every key: raise it when the evaluation changes.
_VERSION = 2


class Evaluation:
    """Accuracies of θ0 + α τ on the validation images of every task; what was measured before is taken from disk.

    They are recorded as soon as they are known, unless the images have no ``digest()``. A key is made of the values of
    the vector, not what it was made by, and its coefficient; the pre-trained model and the heads, with their settings,
    and whether the model is linearised; the images, with labels and preprocessing; device type, precision and versions.
    So a transform whose code has changed is measured anew.

    Args:
        module: evaluates, as it is set: the encoder, or its tangent at θ0.
        loaders: task -> validation loader, from :func:`validation_loaders`.
        precision: 32-true, bf16-mixed or 16-mixed.
        measures: task -> what it is measured by, of the tasks whose accuracy is not meant.
    """

    def __init__(
        self,
        module: MultiTaskModule,
        loaders: Mapping[str, Any],
        precision: str = "32-true",
        measures: Mapping[str, Measure] | None = None,
    ) -> None:
        self.loaders, self.measures = dict(loaders), dict(measures or {})
        self.precision = precision
        self.model = PlacedModel(module)
        self._cache: Cache | None = None
        known = all(measure.key is not None for measure in self.measures.values())
        if known and all(hasattr(getattr(loader, "dataset", None), "digest") for loader in loaders.values()):
            self._cache = Cache("accuracies")
            keys = {task: measure.key for task, measure in self.measures.items()}
            self._images = {
                task: [loader.dataset.digest(), keys[task]] if task in keys else loader.dataset.digest()
                for task, loader in loaders.items()
            }
            self._identity = [
                *(_VERSION, __version__, torch.__version__, module.device.type, torch.get_float32_matmul_precision()),
                *(module.base_name, module.base_fingerprint, layout(module.network), module.linearized),
                *(fingerprint(dict(module.network.named_buffers())), fingerprint(module.heads.state_dict())),
                layout(module.heads),
                *([] if precision == "32-true" else [precision]),
            ]

    @property
    def module(self) -> MultiTaskModule:
        """What evaluates."""
        return self.model.module

    def accuracy(
        self, vector: TaskVector | None, coefficient: float = 1.0, tasks: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Task -> accuracy, in [0, 1], or what else the task is measured by.

        Args:
            vector: τ, which is read twice; None for the pre-trained model.
            coefficient: α.
            tasks: some of the tasks; by default all.

        Raises:
            StructureMismatchError: the vector belongs to another base or architecture.
        """
        chosen = list(self.loaders) if tasks is None else list(tasks)
        self.model.check(vector)
        key, found = "", None
        if self._cache is not None:
            values = None if vector is None else fingerprint(vector)
            images = [[task, self._images[task]] for task in chosen]
            key = self._cache.key([self._identity, values, coefficient, images])
            found = self._cache.value(key)
        if isinstance(found, dict) and list(found) == chosen and all(_is_fraction(one) for one in found.values()):
            return found
        with self.model.at(vector, coefficient):
            found = {task: self._measure(task) for task in chosen}
        if self._cache is not None:
            self._cache.write_value(key, found)
        return found

    def _measure(self, task: str) -> float:
        module, head = self.module, self.module.head_of(task)
        with torch.inference_mode(), self._autocast():
            placed = (batch.to(module.device) for batch in self.loaders[task])
            if task in self.measures:
                return self.measures[task](module, task, placed)
            return _accuracy(hits_of(head, head(module.features(batch)), batch) for batch in placed)

    def _autocast(self) -> torch.autocast:
        """As the trainer does it at this precision."""
        kind = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.module.device.type, kind, enabled=self.precision != "32-true")


class LinearEvaluation(Evaluation):
    """The same of a linearised module, for factors of few vectors: ``f0(x) + α J τ(x)`` for every α from one pass.

    Args:
        module: a linearised one.
        loaders: task -> validation loader of images that have a ``digest()``.
        individual: task -> its own vector; their tangents are computed in the same pass as the merged vector's.
        precision: 32-true, bf16-mixed or 16-mixed.
    """

    def __init__(
        self,
        module: MultiTaskModule,
        loaders: Mapping[str, Any],
        individual: Mapping[str, TaskVector],
        precision: str = "32-true",
    ) -> None:
        super().__init__(module, loaders, precision)
        self._individual = individual
        self._merged: TaskVector | None = None
        self._features: dict[str, LinearFeatures] = {}

    def accuracy(
        self, vector: TaskVector | None, coefficient: float = 1.0, tasks: Sequence[str] | None = None
    ) -> dict[str, float]:
        """See :meth:`Evaluation.accuracy`; images are read for the first vector, and for one that is no task's."""
        own = next((name for name, known in self._individual.items() if known is vector), None)
        if vector is not None and vector is not self._merged and (own is None or not self._features):
            self._read(vector)
        if vector is None and not self._features:
            return super().accuracy(None, coefficient, tasks)
        name = "merged" if own is None else f"task {own}"
        coefficients = {} if vector is None else {name: coefficient}
        chosen = list(self.loaders) if tasks is None else list(tasks)
        return {task: self._at(task, coefficients) for task in chosen}

    def _read(self, vector: TaskVector) -> None:
        from lit_merge.models.linear_features import LinearFeatureCache

        self.model.check(vector)
        names = {task: f"task {task}" for task in self._individual}
        directions = {"merged": vector, **{names[task]: own for task, own in self._individual.items()}}
        cache = LinearFeatureCache(self.module.network, directions, inputs=self.module.inputs)
        with self._autocast():
            self._features = {
                task: cache.of(loader, ["merged", *([names[task]] if task in names else [])])
                for task, loader in self.loaders.items()
            }
        self._merged = vector

    def _at(self, task: str, coefficients: Mapping[str, float]) -> float:
        features, head = self._features[task], self.module.head_of(task)
        parts = features.batches(self.loaders[task].batch_size or len(features))
        batches = (part.to(self.module.device) for part in parts)
        with torch.inference_mode(), self._autocast():
            return _accuracy(_hits(head, part.features(coefficients), part.labels) for part in batches)


def in_memory(vector: TaskVector) -> TaskVector:
    """The same vector with every tensor computed once, for what reads them several times."""
    return TaskVector(dict(vector), vector.task, metadata=vector.metadata)


def _hits(head: Any, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return hits_of(head, head(features), SimpleNamespace(targets=labels))


def _accuracy(counts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The accuracy of correctness and weights ``[B]``."""
    metric: ExampleMean | None = None
    for right, counted in counts:
        metric = metric or ExampleMean().to(right.device)
        metric.update(right, counted)
    return float("nan") if metric is None else float(metric.compute())


def _is_fraction(value: object) -> bool:
    return isinstance(value, float | int) and 0 <= value <= 1


def validation_loaders(module: MultiTaskModule, data: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Task -> loader of its validation images; builds the module's heads, and sets up no other split.

    Args:
        module: is put on the accelerator, for evaluation.
        data: a data module of several tasks.
        tasks: some of its tasks.

    Raises:
        ConfigurationError: the data are not of several tasks.
        DataError: a task has no validation images.
    """
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from lit_merge.data.multitask import task_names

    names = task_names(data)
    if not is_overridden("val_dataloader", data):
        raise DataError(
            f"search: expected validation data, got a {type(data).__name__} without val_dataloader. "
            "Add a validation split; test images are for the final evaluation only."
        )
    trainer = silent_trainer(limit_val_batches=0)
    with quiet():
        trainer.validate(module, datamodule=data, verbose=False)
    module.check_heads()  # without batches the validation has not started
    module.to(trainer.strategy.root_device).eval()
    given = data.val_dataloader()
    loaders = dict(zip(names, given if isinstance(given, list | tuple) else [given], strict=False))
    empty = [task for task in tasks if task not in loaders or not len(loaders[task])]
    if empty:
        raise DataError(
            f"search: expected validation images of every task, got none of {empty[0]}. "
            "Add a validation split; test images are for the final evaluation only."
        )
    return {task: loaders[task] for task in loaders if task in tasks}


def silent_trainer(**settings: Any) -> L.Trainer:
    """A trainer for evaluations inside a larger job: no files, no bars."""
    import lightning as L

    return L.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
        **settings,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's notices about devices, workers and seeds; errors still show."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "lightning")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
