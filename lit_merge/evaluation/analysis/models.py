"""What can be said of models on images: accuracy, calibration, trade-offs, disturbance, and disentanglement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassCalibrationError

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.analysis.disentanglement import DirectPair, LinearPair, ModelPair, disentanglement_errors
from lit_merge.evaluation.analysis.images import TaskImages
from lit_merge.evaluation.analysis.record import Record
from lit_merge.evaluation.analysis.settings import Grid, Method, Paths
from lit_merge.evaluation.analysis.weights import PlacedWeights
from lit_merge.evaluation.search.evaluation import in_memory
from lit_merge.metrics import EntropyLossSpearman, NonlinearAdvantage, TauJp
from lit_merge.metrics.hits import UNLABELLED, hits
from lit_merge.metrics.scores import mean_accuracy, normalised_accuracy, pareto_front
from lit_merge.models.linear_features import LinearFeatureCache
from lit_merge.params import fingerprint
from lit_merge.transforms import LiNeS
from lit_merge.vectors import TaskVector, TaskVectors

if TYPE_CHECKING:
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["Bench", "accuracy", "advantage", "disentanglement", "paths", "tau_jp"]

Ended = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """What models are measured with.

    Attributes:
        module: evaluates ``θ0 + τ``, or the tangent, as it is set; on the device.
        vectors: the task vectors, with θ0 as their base.
        heads: task -> features ``[…, d]`` -> logits ``[…, C]``.
        images: task -> its images.
    """

    module: MultiTaskModule
    vectors: TaskVectors
    heads: Mapping[str, nn.Module]
    images: Mapping[str, TaskImages]

    def place(self, vector: TaskVector | None, coefficient: float = 1.0) -> None:
        """Set the model to θ0 + coefficient · τ; to θ0 for None."""
        if vector is None:
            self.module.load_parameters(self.module.initial_parameters)
        else:
            self.module.load_task_vector(vector, coefficient)

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
        for batch, labels in images:
            logits = head(self.module(batch))
            accuracy.update(*hits(logits, labels))
            for name, metric in wanted.items():
                metric.update(logits.softmax(-1) if name == "calibration_error" else logits, labels)
        return {"accuracy": float(accuracy.compute()), **{name: float(one.compute()) for name, one in wanted.items()}}

    def network(self) -> nn.Module:
        """The network itself, at θ0."""
        self.place(None)
        return self.module.network

    def features(self, directions: Mapping[str, TaskVector]) -> LinearFeatureCache:
        """f0 and J τ of any images, kept on disk."""
        return LinearFeatureCache(self.network(), directions)


def accuracy(bench: Bench, methods: Mapping[str, Method], record: Record, ended: Ended) -> dict[str, Any]:
    """Accuracy, calibration error and entropy–loss correlation of every model on every task.

    Models are the pre-trained one, each task's own, and the merged ones; a method that keeps one vector per task is
    measured on each task with its own.
    """
    tasks = list(bench.images)

    def measured(name: str, models: Iterable[tuple[TaskVector | None, Sequence[str]]]) -> dict[str, dict[str, float]]:
        rows: dict[str, dict[str, float]] = {}
        for lazy, measured_on in models:
            vector = None if lazy is None else in_memory(lazy)
            # By its values: what a transform gives may depend on files, and changes with its code.
            part = name if vector is None else f"{name} {fingerprint(vector)}"
            if part not in record:
                bench.place(vector)
                record[part] = {task: bench.measure(task) for task in measured_on}
            rows |= record[part]
        ended()
        return {task: rows[task] for task in tasks if task in rows}

    def each(vectors: TaskVectors) -> Iterator[tuple[TaskVector, list[str]]]:
        return ((vectors.vector(task), [task]) for task in vectors.tasks if task in tasks)

    found = {"zero-shot": measured("zero-shot", [(None, tasks)])}
    for name, method in methods.items():
        merged = method.resolved()(bench.vectors)
        one_for_all = len(merged.tasks) == 1
        found[name] = measured(f"method {name}", [(merged.single(), tasks)] if one_for_all else each(merged))
    found["individual"] = measured("individual", each(bench.vectors))
    reference = {task: row["accuracy"] for task, row in found["individual"].items()}
    return {
        "methods": {name: repr(method.resolved()) for name, method in methods.items()},
        "measured": found,
        "mean": {name: mean_accuracy(_column(rows), list(rows)) for name, rows in found.items()},
        "normalised": {name: _normalised(_column(rows), reference) for name, rows in found.items()},
    }


def paths(bench: Bench, settings: Paths, record: Record, ended: Ended) -> dict[str, Any]:
    """Accuracy on a vector's own task and on the others along ``θ0 + α τ`` and along LiNeS, with their Pareto front."""
    tasks = list(bench.images)
    result: dict[str, Any] = {}
    for task in settings.tasks or bench.vectors.tasks:
        control = [other for other in tasks if other != task]
        vector, stack = bench.vectors.vector(task), bench.vectors.select([task])
        curves: dict[str, Any] = {"wise_ft": [], "lines": []}
        for name, points in curves.items():
            for value in settings.values:
                key = f"{task} {name} {value:g}"
                if key not in record:
                    if name == "wise_ft":
                        bench.place(vector, value)
                    else:
                        bench.place(LiNeS(alpha=value)(stack).single())
                    record[key] = {one: bench.measure(one, all_of_it=False)["accuracy"] for one in tasks}
                found = record[key]
                points.append({"alpha": value, "target": found[task], "control": mean_accuracy(found, control)})
                ended()
        everything = [(name, index, point) for name, points in curves.items() for index, point in enumerate(points)]
        best = pareto_front([(point["target"], point["control"]) for _, _, point in everything])
        front = [{"path": everything[index][0], "point": everything[index][1]} for index in best]
        result[task] = {"control": control, **curves, "front": front}
    return result


def disentanglement(bench: Bench, grid: Grid, records: Callable[[str], Record], ended: Ended) -> dict[str, Any]:
    """ξ on the grid of every pair of tasks, of the network or, if the module is linearised, of its tangent."""
    result: dict[str, Any] = {"values": grid.values, "pairs": []}
    for one, other in grid.pairs or [list(bench.vectors.tasks[:2])]:
        vectors = (bench.vectors.vector(one), bench.vectors.vector(other))
        images = (bench.images[one], bench.images[other])
        pair = _tangents(bench, vectors, images) if bench.module.linearized else _network(bench, vectors, images)
        heads = (bench.heads[one], bench.heads[other])
        found = disentanglement_errors(
            pair, heads, grid.values, grid.values, grid.forms, records(f"{one}, {other}"), ended
        )
        surfaces: dict[str, Any] = {str(form): values.tolist() for form, values in found.items()}
        result["pairs"].append({"tasks": [one, other], **surfaces})
    return result


def tau_jp(bench: Bench, ended: Ended) -> dict[str, Any]:
    """The mean norm of τJp of every vector on every task's images."""
    cache = bench.features({task: bench.vectors.vector(task) for task in bench.vectors.tasks})
    rows: dict[str, dict[str, float]] = {task: {} for task in bench.vectors.tasks}
    for task, images in bench.images.items():
        found = cache.of(images.loader())
        for name, tangent in found.tangents.items():
            metric = TauJp().to(bench.module.device)
            metric.update(tangent.to(bench.module.device))
            rows[name][task] = float(metric.compute())
        ended()
    return {"measured_on": list(bench.images), "tau_jp": rows}


def advantage(bench: Bench, ended: Ended) -> dict[str, Any]:
    """Errors of every task's own model and of its post-hoc linearisation, with the non-linear advantage."""
    result: dict[str, Any] = {}
    for task in [task for task in bench.vectors.tasks if task in bench.images]:
        vector, images, head = bench.vectors.vector(task), bench.images[task], bench.heads[task]
        if len(images.classes) < 2:
            raise ConfigurationError(
                f"advantage: expected tasks with at least two classes, got {task} with {len(images.classes)}. "
                "Leave this analysis out."
            )
        parts = bench.features({"own": vector}).of(images.loader())
        metric = NonlinearAdvantage(len(images.classes)).to(bench.module.device)
        network, start = bench.network(), 0
        weights = PlacedWeights(network, [vector])
        weights.set([1.0])
        with torch.no_grad(), weights.in_place():
            for batch, labels in images:
                stop = start + len(batch)
                value, tangent = (part[start:stop].to(batch.device) for part in (parts.value, parts.tangents["own"]))
                metric.update(head(value + tangent), head(network(batch)), labels)
                start = stop
        found = float(metric.compute())  # which adds up the counts of all processes for a while
        with metric.sync_context():
            errors = (1 - metric.counts[:, 0].double() / metric.counts[:, 1]).tolist()
        result[task] = {"linear_error": errors[0], "nonlinear_error": errors[1], "advantage": found}
        ended()
    return result


def _network(bench: Bench, vectors: Sequence[TaskVector], images: tuple[TaskImages, TaskImages]) -> ModelPair:
    network = bench.network()
    return DirectPair(network, PlacedWeights(network, vectors), images, bench.module.device)


def _tangents(bench: Bench, vectors: Sequence[TaskVector], images: tuple[TaskImages, TaskImages]) -> ModelPair:
    cache = bench.features({str(index): vector for index, vector in enumerate(vectors)})
    one, other = (cache.of(own.loader()).to(bench.module.device) for own in images)
    return LinearPair((one, other))


def _column(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {task: row["accuracy"] for task, row in rows.items()}


def _normalised(accuracies: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """The mean over the tasks that have a model of their own; None without any."""
    known = {task: value for task, value in accuracies.items() if task in reference}
    return normalised_accuracy(known, reference) if known else None
