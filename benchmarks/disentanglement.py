"""The disentanglement grid of one pair of tasks beside evaluations of every point by itself.

Two tasks are fine-tuned briefly, directly and linearised (kept in runs/disentanglement). On a grid of 20 x 20
coefficients from -3 to 3, prediction and representation form, up to 2,048 test images of each task, two ways are timed
in turns, some naive points after every row of ours:

- ours, whole: what a line of the grid shares is computed once per line, 20 + 20 single and 400 joint models instead of
  four evaluations per point; linearised, f0 and J tau of every image are computed once, from an empty cache;
- naive: at every point each task's images under the single and the joint model, 1,600 evaluations for 400 points. It is
  timed at points spread over the grid (``--points`` of them, ``--points 400`` for all) and scaled up to all points.

Both have the images in memory and use the same network, batches and heads. Values must be the same.

    python benchmarks/disentanglement.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_merge import LinearizedModel, TaskVector
from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.evaluation.analysis import DirectPair, Grid, LinearPair, PlacedWeights, disentanglement_errors
from lit_merge.evaluation.analysis.images import TaskImages, task_images
from lit_merge.evaluation.analysis.processes import Processes
from lit_merge.evaluation.search import quiet, silent_trainer
from lit_merge.files.text import write_text
from lit_merge.metrics import disagreement, representation_divergence
from lit_merge.models import load_clip
from lit_merge.models.linear_features import LinearFeatureCache
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.report.environment import hardware, versions

PAIR = ("digits", "letters")
GOALS = {"direct": 1.8, "linearised": 50.0}
STEPS, RATE = 60, 4e-4
Features = Callable[[Tensor, Sequence[float]], Tensor]


def fit(task: str, linearized: bool) -> TaskVector:
    """A task's vector, fine-tuned with the package's own module, from disk if it is there."""
    folder = Path("runs/disentanglement") / ("linearised" if linearized else "direct")
    path = folder / f"{task}.safetensors"
    if not path.exists():
        with quiet():
            L.seed_everything(0, workers=True, verbose=False)
            trainer = silent_trainer(
                default_root_dir=folder,
                max_steps=STEPS,
                limit_val_batches=0,
                callbacks=[ExtractTaskVector(path.name)],
            )
            trainer.fit(FineTuneModule(learning_rate=RATE, linearized=linearized), TaskDataModule(task))
    return TaskVector.load(path)


class Naive:
    """One point of the grid at a time, without anything shared between points.

    Args:
        features: images and both coefficients -> features.
        images: of each task.
        heads: of each task.
    """

    def __init__(self, features: Features, images: Sequence[TaskImages], heads: Sequence[nn.Module]) -> None:
        self.features, self.images, self.heads = features, images, heads

    def error(self, first: float, second: float) -> dict[str, float]:
        """ξ of both forms: four evaluations of one task's images each."""
        found = {"prediction": 0.0, "representation": 0.0}
        for task, alone in enumerate(((first, 0.0), (0.0, second))):
            single, joint = (
                torch.cat([self.features(batch, alphas) for batch, _ in self.images[task]])
                for alphas in (alone, (first, second))
            )
            head = self.heads[task]
            found["prediction"] += float(disagreement(head(single), head(joint)).mean())
            found["representation"] += float(representation_divergence(single, joint).mean())
        return found


def direct_features(network: nn.Module, base: dict[str, Tensor], vectors: Sequence[TaskVector]) -> Features:
    """θ0 + α1 τ1 + α2 τ2 put into the network, parameter by parameter, whenever the coefficients are others."""
    taus = [dict(vector) for vector in vectors]
    present: list[Sequence[float]] = []

    def features(images: Tensor, alphas: Sequence[float]) -> Tensor:
        if present != [alphas]:
            present[:] = [alphas]
            for name, value in network.named_parameters():
                torch.add(base[name], taus[0][name], alpha=alphas[0], out=value.data)
                value.data.add_(taus[1][name], alpha=alphas[1])
        return network(images)

    return features


def linear_features(model: LinearizedModel, vectors: Sequence[TaskVector]) -> Features:
    """The tangent at θ0 along α1 τ1 + α2 τ2."""
    taus = [dict(vector) for vector in vectors]
    present: list[Sequence[float]] = []

    def features(images: Tensor, alphas: Sequence[float]) -> Tensor:
        if present != [alphas]:
            present[:] = [alphas]
            summed = {name: alphas[0] * value + alphas[1] * taus[1][name] for name, value in taus[0].items()}
            model.load_task_vector(summed)
        return model(images)

    return features


def in_turns(
    whole: Callable[[Callable[[], None]], dict[str, Tensor]],
    naive: Naive,
    values: Sequence[float],
    points: int,
    rounds: int,
) -> dict[str, Any]:
    """Time the whole grid, and between its rows some points; compare the values at these points."""
    everything = [(row, column) for row in range(len(values)) for column in range(len(values))]
    chosen = [everything[index * len(everything) // points] for index in range(points)]
    seconds: dict[str, list[float]] = {"ours": [], "naive_point": []}
    apart: dict[str, list[float]] = {"prediction": [], "representation": []}
    found: dict[str, Tensor] = {}
    plain: dict[tuple[int, int], dict[str, float]] = {}
    left, spent = list(chosen), [0.0]

    def between(most: int) -> None:
        paused = time.perf_counter()
        for row, column in (left.pop(0) for _ in range(min(most, len(left)))):
            started = time.perf_counter()
            plain[row, column] = naive.error(values[row], values[column])
            seconds["naive_point"].append(time.perf_counter() - started)
        spent[0] += time.perf_counter() - paused

    for _ in range(rounds):
        spent[0], started = 0.0, time.perf_counter()
        found = whole(lambda: between(-(-len(chosen) // (rounds * len(values)))))
        seconds["ours"].append(time.perf_counter() - started - spent[0])
    between(len(left))
    for (row, column), one in plain.items():
        for form, value in one.items():
            apart[form].append(abs(value - float(found[form][row, column])))
    ours, total = statistics.median(seconds["ours"]), statistics.mean(seconds["naive_point"]) * len(everything)
    return {
        "seconds_ours": round(ours, 2),
        "seconds_ours_rounds": [round(value, 2) for value in seconds["ours"]],
        "seconds_naive": round(total, 2),
        "naive_points_timed": len(seconds["naive_point"]),
        "naive_points": len(everything),
        "naive_is_scaled_up": len(seconds["naive_point"]) < len(everything),
        "times_faster": round(total / ours, 2),
        "largest_difference": {form: float(f"{max(values):.3g}") for form, values in apart.items()},
        "mean_error": {form: round(float(values.mean()), 4) for form, values in found.items()},
    }


@torch.no_grad()
def main() -> None:
    """Fine-tune, measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="coefficients of each vector")
    parser.add_argument("--points", type=int, default=40, help="points that the naive way of direct models is timed at")
    parser.add_argument("--linear_points", type=int, default=12, help="the same, of linearised models")
    parser.add_argument("--rounds", type=int, default=1, help="of direct models, whole grids")
    parser.add_argument("--linear_rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/disentanglement.json"))
    options = parser.parse_args()
    values = Grid(steps=options.steps).values
    with torch.enable_grad():
        vectors = {kind: [fit(task, kind == "linearised") for task in PAIR] for kind in options.kinds}
    module = MultiTaskModule().eval()
    data = MultiTaskDataModule(tasks=list(PAIR))
    known = task_images(data, PAIR, "test", module, options.images, 0, 256, Processes())
    images = (known[PAIR[0]], known[PAIR[1]])
    heads = [module.make_head(own) for own in images]
    for own in images:
        for _ in own:  # from now on they are in memory
            pass
    rows: dict[str, Any] = {}
    for kind in options.kinds:
        network, other = (
            load_clip().visual.eval().requires_grad_(False),
            load_clip().visual.eval().requires_grad_(False),
        )
        if kind == "direct":
            pair = DirectPair(network, PlacedWeights(network, vectors[kind]), images)
            base = {name: value.detach().clone() for name, value in other.named_parameters()}
            naive = Naive(direct_features(other, base, vectors[kind]), images, heads)

            def whole(ended: Callable[[], None], pair: DirectPair = pair) -> dict[str, Tensor]:
                return dict(disentanglement_errors(pair, heads, values, values, Grid().forms, ended=ended))

            rows[kind] = in_turns(whole, naive, values, min(options.points, len(values) ** 2), options.rounds)
            evaluations = {"ours": 2 * len(values) + 2 * len(values) ** 2, "naive": 4 * len(values) ** 2}
        else:
            naive = Naive(linear_features(LinearizedModel(other), vectors[kind]), images, heads)
            directions = {str(index): vector for index, vector in enumerate(vectors[kind])}

            def from_nothing(
                ended: Callable[[], None], network: nn.Module = network, directions: Any = directions
            ) -> dict[str, Tensor]:
                with tempfile.TemporaryDirectory() as folder:
                    cache = LinearFeatureCache(network, directions, folder)
                    one, two = (cache.of(own.loader()) for own in images)
                    pair = LinearPair((one, two))
                    return dict(disentanglement_errors(pair, heads, values, values, Grid().forms, ended=ended))

            count = min(options.linear_points, len(values) ** 2)
            rows[kind] = in_turns(from_nothing, naive, values, count, options.linear_rounds)
            evaluations = {"ours": "2 vectors x 2 tasks' images, once", "naive": 4 * len(values) ** 2}
        goal = GOALS[kind]
        rows[kind] |= {"evaluations": evaluations, "goal": goal, "reached": rows[kind]["times_faster"] >= goal}
        print(json.dumps({kind: rows[kind]}, indent=1), flush=True)
    report = {
        "pair": list(PAIR),
        "model": module.base_name,
        "images": {task: own.total for task, own in zip(PAIR, images, strict=True)},
        "split": "test",
        "grid": values,
        "fine_tuning": {"steps": STEPS, "learning_rate": RATE},
        **rows,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(options.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
