"""A 21-point coefficient search on linearised models, beside 21 evaluations of the validation images.

Both in one run, in turns: the cached search from an empty cache, once more from a full one, and one evaluation per grid
point with ``MultiTaskModule(linearized=True)``. Either way the individual models are evaluated on their own tasks too,
as the normalised criterion wants it. The accuracies must be the same.

    python benchmarks/linear_search.py --vectors runs/*/task_vector.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lit_merge import TaskVector, TaskVectors
from lit_merge.data import EMBEDDED_TASKS, MultiTaskDataModule
from lit_merge.evaluation.search import CoefficientSearch, quiet, search_coefficient, silent_trainer
from lit_merge.files.text import write_text
from lit_merge.modules import MultiTaskModule
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import task_arithmetic


def stand_ins() -> list[TaskVector]:
    """Random vectors of three per cent of θ0's length, where no fine-tuned ones are given."""
    module = MultiTaskModule()
    base = module.initial_parameters
    made = []
    for index, task in enumerate(EMBEDDED_TASKS):
        generator = torch.Generator().manual_seed(index)
        tensors = {
            name: 0.03 * torch.randn(value.shape, generator=generator) * value.norm() / value.numel() ** 0.5
            for name, value in base.items()
        }
        made.append(TaskVector(tensors, task, metadata=module.base_description()))
    return made


def one_by_one(vectors: TaskVectors, values: list[float], data: MultiTaskDataModule) -> list[dict[str, float]]:
    """An evaluation of every individual model on its task, and one of all tasks per grid point."""
    module, curve = MultiTaskModule(linearized=True), []
    for task in vectors.tasks:
        module.load_task_vector(vectors.vector(task))
        with quiet():
            silent_trainer().validate(module, data.subset([task]), verbose=False)
    for value in values:
        module.load_task_vector(task_arithmetic(value)(vectors).single())
        trainer = silent_trainer()
        with quiet():
            trainer.validate(module, data, verbose=False)
        curve.append({task: float(trainer.callback_metrics[f"val/{task}/accuracy"]) for task in data.task_names})
    return curve


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", nargs="*", type=Path, default=[])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/linear_search.json"))
    options = parser.parse_args()
    loaded = [TaskVector.load(path) for path in options.vectors] or stand_ins()
    vectors, search = TaskVectors(loaded), CoefficientSearch()
    data = MultiTaskDataModule(tasks=[vector.task for vector in loaded])
    data.prepare_data()
    rounds = []
    for _ in range(options.rounds):
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LIT_MERGE_CACHE"], kept = _with_data(folder), os.environ.get("LIT_MERGE_CACHE")
            for name in ("cached_search", "search_again"):
                started = time.perf_counter()
                found = search_coefficient(vectors, task_arithmetic(), search, data=data, linearized=True)
                seconds[name] = time.perf_counter() - started
            os.environ.pop("LIT_MERGE_CACHE")
            if kept is not None:
                os.environ["LIT_MERGE_CACHE"] = kept
        started = time.perf_counter()
        curve = one_by_one(vectors, search.values, data)
        seconds["evaluations"] = time.perf_counter() - started
        different = sum(one != other for one, other in zip(found.accuracy, curve, strict=True))
        rounds.append({**{name: round(value, 2) for name, value in seconds.items()}, "different_points": different})
    ratios = [row["evaluations"] / row["cached_search"] for row in rounds]
    report = {
        "points": len(search.values),
        "vectors": [path.stem for path in options.vectors] or "random, 3 % of θ0",
        "images": "validation split of every task, and every individual model on its own task",
        "rounds": rounds,
        "times_faster": round(statistics.median(ratios), 1),
        "times_faster_again": round(statistics.median(row["evaluations"] / row["search_again"] for row in rounds), 1),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(options.output, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _with_data(folder: str) -> str:
    """An empty cache that still has the drawn images and the heads."""
    from lit_merge.files.cache import cache_directory

    for kept in cache_directory("").iterdir():
        if kept.name != "linear_features":
            (Path(folder) / kept.name).symlink_to(kept)
    return folder


if __name__ == "__main__":
    main()
