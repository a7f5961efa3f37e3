"""What can be said of models on images: accuracy, calibration, trade-offs, disturbance, and disentanglement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassCalibrationError

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.evaluation.accuracies import in_memory
from lit_merge.evaluation.analysis.disentanglement import DirectPair, LinearPair, ModelPair, disentanglement_errors
from lit_merge.evaluation.analysis.images import TaskImages
from lit_merge.evaluation.analysis.record import Record
from lit_merge.evaluation.analysis.settings import Grid, Method, Paths
from lit_merge.evaluation.placed_model import PlacedModel
from lit_merge.functional import linearize
from lit_merge.metrics import EntropyLossSpearman, NonlinearAdvantage, TauJp
from lit_merge.metrics.hits import UNLABELLED, hits_of
from lit_merge.metrics.scores import mean_accuracy, normalised_accuracy, pareto_front
from lit_merge.models.linear_features import LinearFeatureCache
from lit_merge.models.placed_weights import PlacedWeights
from lit_merge.params import fingerprint
from lit_merge.transforms import LiNeS
from lit_merge.vectors import TaskVector, TaskVectors

if TYPE_CHECKING:
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["Evaluator", "accuracy", "advantage", "disentanglement", "paths", "tau_jp"]

Ended = Callable[[], object]
_Tangents = Callable[[TaskImages], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Evaluator:
    """What models are measured with.

    Attributes:
        model: evaluates ``θ0 + τ``, or the tangent, as it is set; on the device.
        vectors: the task vectors, with θ0 as their base.
        heads: task -> features ``[…, d]`` -> logits ``[…, C]``.
        images: task -> its images.
    """

    model: PlacedModel
    vectors: TaskVectors
    heads: Mapping[str, nn.Module]
    images: Mapping[str, TaskImages]

    @property
    def module(self) -> MultiTaskModule:
        """What evaluates."""
        return self.model.module

    @torch.inference_mode()
    def measure(self, task: str, all_of_it: bool = True) -> dict[str, float]:
        """The model's accuracy on a task, and if all is asked for its calibration error and rank correlation."""
        head, images = self.heads[task], self.images[task]
        accuracy = MeanMetric().to(self.module.device)
        others = {
            "calibration_error": MulticlassCalibrationError(len(images.classes), ignore_index=UNLABELLED),
            "entropy_loss_spearman": EntropyLossSpearman(),
        }
        wanted = {name: metric.to(self.module.device) for name, metric in others.items() if all_of_it}
        for batch in images:
            logits = head(self.module.features(batch))
            accuracy.update(*hits_of(head, logits, batch))
            for name, metric in wanted.items():
                metric.update(logits.softmax(-1) if name == "calibration_error" else logits, batch.targets)
        return {"accuracy": float(accuracy.compute()), **{name: float(one.compute()) for name, one in wanted.items()}}

    @property
    def network(self) -> nn.Module:
        """The network itself, at θ0."""
        return self.module.network

    def encode(self, batch: Any) -> Tensor:
        """Features of a batch by the network's own modules."""
        features: Tensor = self.network(*self.module.inputs(batch))
        return features

    def features(self, directions: Mapping[str, TaskVector]) -> LinearFeatureCache:
        """f0 and J τ of any images, kept on disk."""
        return LinearFeatureCache(self.network, directions, inputs=self.module.inputs)


def accuracy(evaluator: Evaluator, methods: Mapping[str, Method], record: Record, ended: Ended) -> dict[str, Any]:
    """Accuracy, calibration error and entropy–loss correlation of every model on every task.

    Models are the pre-trained one, each task's own, and the merged ones; a method that keeps one vector per task is
    measured on each task with its own.

    Raises:
        ConfigurationError: a task has no classes.
    """
    tasks = list(evaluator.images)
    if without := [task for task, images in evaluator.images.items() if not images.classes]:
        raise ConfigurationError(
            f"accuracy: expected tasks with classes or answers, got {first_few(without)} without. Leave accuracy out "
            "of analyses, or measure these tasks by test (perplexity, exact match, Spearman)."
        )

    def measured(name: str, models: Iterable[tuple[TaskVector | None, Sequence[str]]]) -> dict[str, dict[str, float]]:
        rows: dict[str, dict[str, float]] = {}
        for lazy, measured_on in models:
            vector = None if lazy is None else in_memory(lazy)
            # By its values: what a transform gives may depend on files, and changes with its code. And by the tasks, as
            # two of them may have equal vectors.
            part = name if vector is None else f"{name} {fingerprint(vector)} {list(measured_on)}"
            if part not in record:
                with evaluator.model.at(vector):
                    record[part] = {task: evaluator.measure(task) for task in measured_on}
            rows |= record[part]
        ended()
        return {task: rows[task] for task in tasks if task in rows}

    def each(vectors: TaskVectors) -> Iterator[tuple[TaskVector, list[str]]]:
        return ((vectors.vector(task), [task]) for task in vectors.tasks if task in tasks)

    found = {"zero-shot": measured("zero-shot", [(None, tasks)])}
    for name, method in methods.items():
        merged = method.resolved()(evaluator.vectors)
        one_for_all = len(merged.tasks) == 1
        found[name] = measured(f"method {name}", [(merged.single(), tasks)] if one_for_all else each(merged))
    found["individual"] = measured("individual", each(evaluator.vectors))
    reference = {task: row["accuracy"] for task, row in found["individual"].items()}
    return {
        "methods": {name: repr(method.resolved()) for name, method in methods.items()},
        "measured": found,
        "mean": {name: mean_accuracy(_column(rows), list(rows)) for name, rows in found.items()},
        "normalised": {name: _normalised(_column(rows), reference) for name, rows in found.items()},
    }


def paths(evaluator: Evaluator, settings: Paths, record: Record, ended: Ended) -> dict[str, Any]:
    """Accuracy on a vector's own task and on the others along ``θ0 + α τ`` and along LiNeS, with their Pareto front."""
    tasks = list(evaluator.images)
    result: dict[str, Any] = {}
    for task in settings.tasks or evaluator.vectors.tasks:
        control = [other for other in tasks if other != task]
        vector, stack = evaluator.vectors.vector(task), evaluator.vectors.select([task])
        curves: dict[str, Any] = {"wise_ft": [], "lines": []}
        for name, points in curves.items():
            for value in settings.values:
                key = f"{task} {name} {value:g}"
                if key not in record:
                    scaled = LiNeS(alpha=value)(stack).single()
                    with evaluator.model.at(vector, value) if name == "wise_ft" else evaluator.model.at(scaled):
                        record[key] = {one: evaluator.measure(one, all_of_it=False)["accuracy"] for one in tasks}
                found = record[key]
                points.append({"alpha": value, "target": found[task], "control": mean_accuracy(found, control)})
                ended()
        everything = [(name, index, point) for name, points in curves.items() for index, point in enumerate(points)]
        best = pareto_front([(point["target"], point["control"]) for _, _, point in everything])
        front = [{"path": everything[index][0], "point": everything[index][1]} for index in best]
        result[task] = {"control": control, **curves, "front": front}
    return result


def disentanglement(evaluator: Evaluator, grid: Grid, records: Callable[[str], Record], ended: Ended) -> dict[str, Any]:
    """ξ on the grid of every pair of tasks, of the network or, if the module is linearised, of its tangent."""
    result: dict[str, Any] = {"values": grid.values, "pairs": []}
    for one, other in grid.pairs or [list(evaluator.vectors.tasks[:2])]:
        vectors = (evaluator.vectors.vector(one), evaluator.vectors.vector(other))
        images = (evaluator.images[one], evaluator.images[other])
        pair: ModelPair
        if evaluator.module.linearized:
            cache = evaluator.features({str(index): vector for index, vector in enumerate(vectors)})
            first, second = (cache.of(own.loader()).to(evaluator.module.device) for own in images)
            pair = LinearPair((first, second))
        else:
            weights = PlacedWeights(evaluator.network, vectors)
            pair = DirectPair(evaluator.encode, weights, images, evaluator.module.device)
        heads = (evaluator.heads[one], evaluator.heads[other])
        found = disentanglement_errors(
            pair, heads, grid.values, grid.values, grid.forms, records(f"{one}, {other}"), ended
        )
        surfaces: dict[str, Any] = {str(form): values.tolist() for form, values in found.items()}
        result["pairs"].append({"tasks": [one, other], **surfaces})
    return result


def tau_jp(evaluator: Evaluator, ended: Ended) -> dict[str, Any]:
    """The mean norm of τJp of every vector on every task's images; of tokens, that of all numbers of an example."""
    directions = {task: evaluator.vectors.vector(task) for task in evaluator.vectors.tasks}
    kept = getattr(evaluator.module.base, "vector_features", True)  # not logits over a vocabulary at every position
    tangents = _kept_tangents(evaluator.features(directions)) if kept else _new_tangents(evaluator, directions)
    rows: dict[str, dict[str, float]] = {task: {} for task in directions}
    for task, images in evaluator.images.items():
        metrics = {name: TauJp().to(evaluator.module.device) for name in directions}
        for name, tangent in tangents(images):
            metrics[name].update(tangent.to(evaluator.module.device))
        for name, metric in metrics.items():
            rows[name][task] = float(metric.compute())
        ended()
    return {"measured_on": list(evaluator.images), "tau_jp": rows}


def _kept_tangents(cache: LinearFeatureCache) -> _Tangents:
    """J τ of all images of a task, which are kept for other analyses."""
    return lambda images: cache.of(images.loader()).tangents.items()


def _new_tangents(evaluator: Evaluator, directions: Mapping[str, TaskVector]) -> _Tangents:
    """J τ of one batch after the other, whose examples may be of other shapes than the next one's."""
    own = dict(evaluator.network.named_parameters())
    placed = {task: {name: one[name].to(value) for name, value in own.items()} for task, one in directions.items()}

    @torch.no_grad()
    def tangents(images: TaskImages) -> Iterator[tuple[str, Tensor]]:
        for batch in images:
            for name, vector in placed.items():
                yield name, linearize(evaluator.network, {}, vector, *evaluator.module.inputs(batch))[1].flatten(1)

    return tangents


def advantage(evaluator: Evaluator, ended: Ended) -> dict[str, Any]:
    """Errors of every task's own model and of its post-hoc linearisation, with the non-linear advantage."""
    result: dict[str, Any] = {}
    for task in [task for task in evaluator.vectors.tasks if task in evaluator.images]:
        vector, images, head = evaluator.vectors.vector(task), evaluator.images[task], evaluator.heads[task]
        if len(images.classes) < 2:
            raise ConfigurationError(
                f"advantage: expected tasks with at least two classes, got {task} with {len(images.classes)}. "
                "Leave this analysis out."
            )
        parts = evaluator.features({"own": vector}).of(images.loader())
        metric = NonlinearAdvantage(len(images.classes)).to(evaluator.module.device)
        start = 0
        weights = PlacedWeights(evaluator.network, [vector])
        weights.set([1.0])
        with torch.no_grad(), weights.in_place():
            for batch in images:
                stop = start + len(batch)
                value, tangent = (
                    part[start:stop].to(batch.targets.device) for part in (parts.value, parts.tangents["own"])
                )
                metric.update(head(value + tangent), head(evaluator.encode(batch)), batch.targets)
                start = stop
        found = float(metric.compute())  # which adds up the counts of all processes for a while
        with metric.sync_context():
            errors = (1 - metric.counts[:, 0].double() / metric.counts[:, 1]).tolist()
        result[task] = {"linear_error": errors[0], "nonlinear_error": errors[1], "advantage": found}
        ended()
    return result


def _column(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {task: row["accuracy"] for task, row in rows.items()}


def _normalised(accuracies: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """The mean over the tasks that have a model of their own; None without any."""
    known = {task: value for task, value in accuracies.items() if task in reference}
    return normalised_accuracy(known, reference) if known else None
