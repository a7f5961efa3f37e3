"""Choosing a merging coefficient on validation data; every evaluated point is kept."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_merge.errors import ConfigurationError, DataError
from lit_merge.transforms import Chain, Mean, Negate, Scale, Sum, Transform, replace_field
from lit_merge.vectors import TaskVectors, check_base

if TYPE_CHECKING:
    import lightning as L
    from torch.utils.data import DataLoader

    from lit_merge.linear_features import LinearFeatures
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["CoefficientSearch", "SearchResult", "direction_of", "normalised_accuracy", "search_coefficient"]

_HOMOGENEOUS = (Scale, Sum, Mean, Negate)
"""Transforms T with T(α τ) = α T(τ)."""


def _grid() -> list[float]:
    return [round(0.05 * step, 2) for step in range(21)]


@dataclass(frozen=True)
class CoefficientSearch:
    """A grid search over one field of a chain.

    Args:
        values: the grid; by default the papers' 21 points in [0, 1].
        field: which field of the chain.
        criterion: ``normalised`` (mean over tasks of accuracy / the single fine-tuned model's accuracy, on the same
            validation images) or ``absolute`` mean accuracy.

    Raises:
        ConfigurationError: the grid is empty, or there is no such criterion.
    """

    values: list[float] = field(default_factory=_grid)
    field: str = "coefficient"
    criterion: Literal["normalised", "absolute"] = "normalised"

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigurationError("search.values: expected at least one value, got none. Use e.g. [0.2, 0.3, 0.4].")
        if self.criterion not in ("normalised", "absolute"):
            raise ConfigurationError(
                f"search.criterion: expected normalised or absolute, got {self.criterion!r}. Use one of them."
            )


@dataclass(frozen=True)
class SearchResult:
    """The curve of a search.

    Attributes:
        field: the field that was varied.
        values: the grid.
        normalised: mean normalised accuracy at each value.
        absolute: mean accuracy at each value.
        best: the chosen value; the smallest one among equals.
        criterion: by which it was chosen.
        split: the data it was chosen on.
        accuracy: per grid point, task -> accuracy.
    """

    field: str
    values: list[float]
    normalised: list[float]
    absolute: list[float]
    best: float
    criterion: str
    split: str
    accuracy: list[dict[str, float]]

    def save(self, path: Path) -> None:
        """Write the curve as JSON."""
        from lit_merge.callbacks.writing import write_text

        write_text(path, json.dumps(asdict(self), indent=2) + "\n")


def normalised_accuracy(accuracy: dict[str, float], individual: dict[str, float]) -> float:
    """``1/T Σ_t accuracy_t / individual_t`` over the tasks of ``accuracy``.

    Raises:
        DataError: an individual accuracy is 0, so that nothing can be divided by it.
    """
    zero = [task for task in accuracy if individual[task] <= 0]
    if zero:
        raise DataError(
            f"normalised accuracy: expected positive individual accuracies, got 0 for {zero[0]}. Fine-tune longer."
        )
    return sum(value / individual[task] for task, value in accuracy.items()) / len(accuracy)


def search_coefficient(
    vectors: TaskVectors,
    transform: Transform,
    search: CoefficientSearch,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    data: Any = None,
    linearized: bool = False,
) -> SearchResult:
    """Evaluate ``θ0 + transform(vectors)`` for every value of one field, on the validation split of every task.

    Linearised, where the field is only a factor (:func:`direction_of`), the features at every value are
    ``f0(x) + α J τ(x)``: the network sees each image once, and in a search with the same vectors and images not at all,
    as ``f0`` and the tangents are kept (:class:`lit_merge.linear_features.LinearFeatureCache`).

    Args:
        vectors: the task vectors; their tasks name the tasks of ``data``.
        transform: a chain that reduces to one vector.
        search: the grid.
        model: the base model.
        pretrained: its weights.
        data: a :class:`lit_merge.data.MultiTaskDataModule`; by default the embedded tasks of the vectors.
        linearized: whether to evaluate the encoder's tangent at θ0, as vectors that were trained linearised want it.

    Returns:
        The curve and the chosen value.

    Raises:
        ConfigurationError: the chain has no such field, or the vectors' tasks are not in the data.
    """
    from lit_merge.data.multitask import MultiTaskDataModule
    from lit_merge.modules.multitask import MultiTaskModule

    candidates = [replace_field(transform, search.field, value) for value in search.values]
    data = data if data is not None else MultiTaskDataModule(tasks=list(vectors.tasks))
    missing = [task for task in vectors.tasks if task not in data.task_names]
    if missing:
        raise ConfigurationError(
            f"search: expected data of every task, got none of {missing[0]!r} (data: {', '.join(data.task_names)}). "
            "Name the tasks of data as the vectors'."
        )
    module = MultiTaskModule(model, pretrained, linearized=linearized)
    direction = direction_of(transform, search.field) if linearized else None
    loaders = _loaders(module, data) if direction is not None else {}
    if direction is not None and loaders:
        individual, accuracy = _linear_curve(module, vectors, direction, search.values, loaders)
    else:
        individual, accuracy = _curve(module, vectors, candidates, data)
    tasks = list(vectors.tasks)
    absolute = [sum(point[task] for task in tasks) / len(tasks) for point in accuracy]
    normalised = [normalised_accuracy({task: point[task] for task in tasks}, individual) for point in accuracy]
    scores = normalised if search.criterion == "normalised" else absolute
    best = search.values[max(range(len(scores)), key=lambda index: (scores[index], -search.values[index]))]
    return SearchResult(
        search.field, list(search.values), normalised, absolute, best, search.criterion, "val", accuracy
    )


def direction_of(transform: Transform, field: str) -> Transform | None:
    """The transform D with ``transform(vectors) = α D(vectors)`` for every value α of a field, if structure tells.

    That is: the field is the one number of a :class:`~lit_merge.transforms.Scale`, and nothing but ``Scale``, ``Sum``,
    ``Mean`` and ``Negate`` comes after it; before it anything may. D is the same chain with α = 1.

    Args:
        transform: a transform or a chain.
        field: name of a field that exactly one step has.

    Returns:
        D, or None where α may be more than a factor, e.g. one coefficient per task or the density of a trim.

    Examples:
        >>> from lit_merge.transforms import task_arithmetic
        >>> direction_of(task_arithmetic(0.3), "coefficient")
        chain(Sum(), Scale(coefficient=1.0))
    """
    steps = transform.steps if isinstance(transform, Chain) else (transform,)
    for index, step in enumerate(steps):
        if field in {item.name for item in fields(step)}:
            factor = type(step) is Scale and isinstance(step.coefficient, float)
            linear = all(type(later) in _HOMOGENEOUS for later in steps[index + 1 :])
            return replace_field(transform, field, 1.0) if factor and linear else None
    return None


def _curve(
    module: MultiTaskModule, vectors: TaskVectors, candidates: Sequence[Transform], data: Any
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Accuracies of the individual models and of every candidate, each by an evaluation of its own."""
    individual: dict[str, float] = {}
    for task in vectors.tasks:
        module.load_task_vector(vectors.vector(task))
        individual.update(_validate(module, data.subset([task])))
    accuracy = []
    for candidate in candidates:
        module.load_task_vector(candidate(vectors).single())
        accuracy.append(_validate(module, data))
    return individual, accuracy


def _loaders(module: MultiTaskModule, data: Any) -> dict[str, DataLoader[Any]]:
    """Task -> validation loader, with the module's heads built; none if a data set does not tell what it holds."""
    trainer = silent_trainer(limit_val_batches=0)
    with quiet():
        trainer.validate(module, datamodule=data, verbose=False)
    module.to(trainer.strategy.root_device).eval()
    loaders = dict(zip(data.task_names, data.val_dataloader(), strict=True))
    return loaders if all(hasattr(loader.dataset, "digest") for loader in loaders.values()) else {}


def _linear_curve(
    module: MultiTaskModule,
    vectors: TaskVectors,
    direction: Transform,
    values: Sequence[float],
    loaders: Mapping[str, DataLoader[Any]],
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The same of a linearised module, for ``value`` times the direction, from one pass over the images."""
    from lit_merge.linear_features import LinearFeatureCache

    merged = direction(vectors).single()
    check_base(merged, module.base_fingerprint, module.base_name)
    names = {task: f"task {task}" for task in vectors.tasks}
    directions = {"merged": dict(merged), **{names[task]: vectors.vector(task) for task in vectors.tasks}}
    cache = LinearFeatureCache(module.network, directions)
    individual, curves = dict[str, float](), dict[str, list[float]]()
    for task, loader in loaders.items():
        own = [names[task]] if task in names else []
        features = cache.of(loader, ["merged", *own])
        points = [{name: 1.0} for name in own] + [{"merged": value} for value in values]
        accuracy = _accuracies(module, task, features, points, loader.batch_size or len(features))
        if own:
            individual[task] = accuracy.pop(0)
        curves[task] = accuracy
    return individual, [dict(zip(curves, point, strict=True)) for point in zip(*curves.values(), strict=True)]


def _accuracies(
    module: MultiTaskModule, task: str, features: LinearFeatures, points: Sequence[Mapping[str, float]], size: int
) -> list[float]:
    """Accuracies of one task at each of the coefficients, counted as the module counts them."""
    from torchmetrics import MeanMetric

    from lit_merge.modules.accuracy import hits

    metrics = [MeanMetric().to(module.device) for _ in points]
    with torch.inference_mode():
        for part in features.batches(size):
            batch = part.to(module.device)
            for metric, coefficients in zip(metrics, points, strict=True):
                metric.update(*hits(module.classify(batch.features(coefficients), task), batch.labels))
    return [float(metric.compute()) for metric in metrics]


def _validate(module: MultiTaskModule, data: Any) -> dict[str, float]:
    """Validation accuracies, task -> accuracy; a new trainer, as one remembers which loader a task came from."""
    with quiet():
        trainer = silent_trainer()
        trainer.validate(module, datamodule=data, verbose=False)
    return {task: float(trainer.callback_metrics[f"val/{task}/accuracy"]) for task in data.task_names}


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
