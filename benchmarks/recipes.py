"""Merging recipes side by side on the embedded suite, on full and attention-only vectors, with and without LiNeS.

The vectors are those of benchmarks/regimes.py (``--stages fit``), three seeds of eight tasks. Every recipe has one
number that is chosen per seed on validation images: its coefficient or, with LiNeS, β (α is the ratio of norms).
Reported is the accuracy on the first test images of each task, absolute and relative to the individual models.

``single``: LiNeS on one task's vector, α chosen on validation images with the target weighted twice (Wang et al. 2025);
accuracy on the own task (target) and the mean over the other seven (control).

``place`` writes the tables of docs/recipes.md. Goes on where it stopped: what is in the JSON is not measured again.

    python benchmarks/regimes.py --stages fit --regimes full attention_1
    python benchmarks/recipes.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

from lit_merge import TaskVector, TaskVectors
from lit_merge.data import EMBEDDED_TASKS, MultiTaskDataModule
from lit_merge.evaluation.search import normalised_accuracy, quiet, silent_trainer
from lit_merge.evaluation.statistics.command import statistics
from lit_merge.files.text import write_text
from lit_merge.modules import MultiTaskModule
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import (
    WUDI,
    ConsensusMask,
    DisjointMean,
    Drop,
    DropByRank,
    ElectSign,
    FisherMean,
    IsoC,
    IsoCTS,
    LiNeS,
    MagnitudeWindow,
    ModelStock,
    RegMean,
    Scale,
    Sum,
    TallMask,
    Transform,
    Trim,
    TSVMerge,
    chain,
    ties,
)

TASKS = list(EMBEDDED_TASKS)
START, END = "<!-- recipes: written by benchmarks/recipes.py -->", "<!-- end of recipes -->"
REGIMES = ["full", "attention_1"]
REFERENCES, SINGLE = "references", "single task"
VALIDATION_IMAGES, TEST_IMAGES, CONTROL_IMAGES = 64, 256, 64  # the first ones of each task's split
SMALL = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4]
LARGE = [0.3, 0.5, 0.7, 1.0, 1.4, 2.0]
BETA = [0.0, 0.15, 0.3, 0.5, 0.8, 1.3, 2.0]
ALPHA = [0.0, 0.25, 0.5, 0.75, 1.0]
RECIPES: dict[str, tuple[Transform, list[float]]] = {  # what is merged, and the coefficients that are tried
    "task arithmetic": (Sum(), SMALL),
    "TIES": (chain(Trim(0.2), ElectSign(), DisjointMean()), LARGE),
    "DARE (linear)": (chain(Drop(0.9), Sum()), SMALL),
    "DARE (TIES)": (chain(Drop(0.9), ElectSign(), DisjointMean()), SMALL),
    "breadcrumbs": (chain(MagnitudeWindow(0.85, 0.01), Sum()), SMALL),
    "DELLA": (chain(DropByRank(0.7, 0.1), ElectSign(), DisjointMean()), LARGE),
    "consensus": (ConsensusMask(2, 0.4, Sum()), SMALL),
    "consensus TIES": (ConsensusMask(2, 0.4, ties(0.2)), LARGE),
    "model stock": (ModelStock(), [1.0, 2.0, 4.0, 6.0, 8.0, 12.0]),
    "TSV-M": (TSVMerge(), LARGE),
    "Iso-C": (IsoC(), LARGE),
    "Iso-CTS": (IsoCTS(), LARGE),
    "WUDI": (WUDI(), LARGE),
}
STATISTICS: dict[str, tuple[Any, str, int, list[float]]] = {  # from unlabelled training images: kind and how many
    "Fisher": (FisherMean, "fisher", 32, [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
    "RegMean": (RegMean, "gram", 128, [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]),
}
NAMES = [*RECIPES, *STATISTICS]


class Evaluator:
    """Accuracies of θ0 + τ, with the images of all tasks in memory."""

    def __init__(self) -> None:
        self.module = MultiTaskModule()
        data = MultiTaskDataModule(tasks=TASKS)
        with quiet():
            silent_trainer(limit_val_batches=0).validate(self.module, data, verbose=False)
            data.setup("test")
        self.module.eval()
        self.images = {
            split: {task: self._all(loader) for task, loader in zip(TASKS, loaders(), strict=True)}
            for split, loaders in (("val", data.val_dataloader), ("test", data.test_dataloader))
        }

    @staticmethod
    def _all(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(loader)
        return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])

    def __call__(self, vector: TaskVector, split: str, tasks: list[str], limit: int | None = None) -> dict[str, float]:
        with quiet():
            self.module.load_task_vector(vector)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return {task: self._accuracy(task, *self.images[split][task], limit) for task in tasks}

    def _accuracy(self, task: str, images: torch.Tensor, labels: torch.Tensor, limit: int | None) -> float:
        images, labels = images[labels >= 0][:limit], labels[labels >= 0][:limit]
        hits = [
            self.module.classify(self.module(part), task).argmax(-1) == truth
            for part, truth in zip(images.split(256), labels.split(256), strict=True)
        ]
        return float(torch.cat(hits).float().mean())


def files_of(folder: Path, regime: str, seed: int) -> Path:
    """Where the task vectors of one regime and seed are."""
    choice = json.loads(Path("benchmarks/results/regimes.json").read_text())["choices"][regime]
    return folder / regime / f"{choice['steps']}-{choice['learning_rate']:g}" / f"seed-{seed}"


def load(files: Path) -> TaskVectors:
    """The task vectors, in the order of the tasks."""
    return TaskVectors([TaskVector.load(files / f"{task}.safetensors") for task in TASKS])


def choose(
    evaluate: Evaluator, vectors: TaskVectors, build: Callable[[float], Transform], values: list[float], individual: Any
) -> tuple[float, list[float]]:
    """The number with the best mean normalised accuracy on validation images, and all of these."""
    curve = []
    for value in values:
        accuracy = evaluate(build(value)(vectors).single(), "val", TASKS, VALIDATION_IMAGES)
        curve.append(round(normalised_accuracy(accuracy, individual), 4))
    return values[max(range(len(values)), key=lambda index: (curve[index], -values[index]))], curve


def references(evaluate: Evaluator, vectors: TaskVectors) -> list[dict[str, Any]]:
    """What needs no choice: zero-shot, the individual models, the weight average, and a model per task cut out."""
    own = {task: evaluate(vectors.vector(task), "test", [task], TEST_IMAGES)[task] for task in TASKS}
    validation = {task: evaluate(vectors.vector(task), "val", [task], VALIDATION_IMAGES)[task] for task in TASKS}
    masked = TallMask(0.4)(vectors)
    found = {
        "zero-shot": evaluate(chain(Sum(), Scale(0.0))(vectors).single(), "test", TASKS, TEST_IMAGES),
        "individual": own,
        "weight average": evaluate(chain(Sum(), Scale(1 / len(TASKS)))(vectors).single(), "test", TASKS, TEST_IMAGES),
        "TALL masks (a model per task)": {
            task: evaluate(masked.vector(task), "test", [task], TEST_IMAGES)[task] for task in TASKS
        },
    }
    rows = [_row(name, accuracy, own) for name, accuracy in found.items()]
    rows[1]["validation"] = validation
    return rows


def with_statistics(files: Path, name: str) -> tuple[Transform, list[float]]:
    """A recipe that is weighted by statistics, which are collected unless they are there."""
    build, kind, images, coefficients = STATISTICS[name]
    paths = {task: files / f"{task}-{kind}.safetensors" for task in TASKS}
    for task, path in paths.items():
        if not path.exists():
            with quiet():
                statistics(kind, str(files / f"{task}.safetensors"), images=images)
    return build({task: str(path) for task, path in paths.items()}), coefficients


def recipe(
    evaluate: Evaluator, files: Path, name: str, individual: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """One recipe with its coefficient, and with LiNeS instead."""
    vectors = load(files)
    transform, coefficients = RECIPES[name] if name in RECIPES else with_statistics(files, name)
    rows = []
    merged = TaskVectors([TaskVector(dict(transform(vectors).single()), "merged")])  # once, for all the points
    ratio = _total(Sum()(vectors)) / _total(merged) / len(TASKS)  # what LiNeS("norm_ratio") comes to
    for with_lines, build, values in ((False, Scale, coefficients), (True, partial(LiNeS, ratio), BETA)):
        value, curve = choose(evaluate, merged, build, values, individual["val"])
        accuracy = evaluate(build(value)(merged).single(), "test", TASKS, TEST_IMAGES)
        more = {"lines": with_lines, "value": value, "values": values, "validation": curve}
        rows.append(_row(name, accuracy, individual["test"]) | more)
    return rows


def _total(vectors: TaskVectors) -> float:
    return sum(float(vectors[name].abs().sum(dtype=torch.float64)) for name in vectors)


def _row(name: str, accuracy: dict[str, float], individual: dict[str, float]) -> dict[str, Any]:
    return {
        "recipe": name,
        "accuracy": accuracy,
        "absolute": mean(accuracy.values()),
        "normalised": normalised_accuracy(accuracy, individual),
    }


def single(evaluate: Evaluator, vectors: TaskVectors, with_lines: bool) -> dict[str, Any]:
    """Target and control accuracy of the single models, as they are or scaled by depth."""
    target, control, chosen = {}, {}, {}
    for task in TASKS:
        others = [other for other in TASKS if other != task]
        alone = vectors.select([task])
        scores = {}
        for alpha in ALPHA if with_lines else []:
            accuracy = evaluate(LiNeS(alpha)(alone).single(), "val", TASKS, VALIDATION_IMAGES)
            scores[alpha] = 2 * accuracy[task] + mean(accuracy[other] for other in others)
        chosen[task] = max(scores, key=lambda alpha: (scores[alpha], alpha)) if scores else 1.0
        vector = LiNeS(chosen[task])(alone).single()
        target[task] = evaluate(vector, "test", [task], TEST_IMAGES)[task]
        control[task] = mean(evaluate(vector, "test", others, CONTROL_IMAGES).values())
    row = {"recipe": SINGLE, "lines": with_lines, "alpha": chosen}
    return row | {"target": mean(target.values()), "control": mean(control.values())}


def measure(folder: Path, regime: str, seed: int, what: str, individual: Any = None) -> list[dict[str, Any]]:
    """The rows of one job; a process builds its evaluator once."""
    torch.set_num_threads(1)
    if not _EVALUATORS:
        _EVALUATORS.append(Evaluator())
    evaluate, files = _EVALUATORS[0], files_of(folder, regime, seed)
    if what == REFERENCES:
        rows = references(evaluate, load(files))
    elif what == SINGLE:
        rows = [single(evaluate, load(files), with_lines) for with_lines in (False, True)]
    else:
        rows = recipe(evaluate, files, what, individual)
    return [{"regime": regime, "seed": seed, **row} for row in rows]


_EVALUATORS: list[Evaluator] = []


def _worker(job: tuple[Any, ...]) -> list[dict[str, Any]]:
    return measure(*job)


def jobs(result: dict[str, Any], seeds: list[int], folder: Path) -> list[tuple[Any, ...]]:
    """What is still to do, in two rounds: the individual models first, whose accuracy all others need."""
    rows = result["rows"]
    done = {(row["regime"], row["seed"], row["recipe"]) for row in rows}
    places = [(folder, regime, seed) for seed in seeds for regime in REGIMES]
    first = [(*place, REFERENCES) for place in places if (*place[1:], "individual") not in done]
    if first:
        return first
    second = []
    for place in places:
        own = next(row for row in rows if (row["regime"], row["seed"], row["recipe"]) == (*place[1:], "individual"))
        individual = {"val": own["validation"], "test": own["accuracy"]}
        second += [(*place, name, individual) for name in [*NAMES, SINGLE] if (*place[1:], name) not in done]
    return second


def _of(rows: list[dict[str, Any]], regime: str, recipe: str, lines: bool | None, key: str) -> list[float]:
    found = [row for row in rows if (row["regime"], row["recipe"], row.get("lines")) == (regime, recipe, lines)]
    return [row[key] for row in sorted(found, key=lambda row: row["seed"])]


def _shown(values: list[float]) -> str:
    values = [100 * value for value in values]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" if values else "–"


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/recipes.md."""
    rows, lines = result["rows"], []
    for regime in REGIMES:
        lines += [
            *([""] if lines else []),
            f"{regime}:",
            "",
            "| recipe | accuracy | normalised | with LiNeS | normalised | LiNeS gains, per seed |",
            "| :-- | --: | --: | --: | --: | --: |",
        ]
        for name in ("zero-shot", "weight average", "individual", "TALL masks (a model per task)"):
            absolute, normalised = (_of(rows, regime, name, None, key) for key in ("absolute", "normalised"))
            lines.append(f"| {name} | {_shown(absolute)} | {_shown(normalised)} | | | |")
        for name in NAMES:
            plain, scaled = (_of(rows, regime, name, one, "absolute") for one in (False, True))
            relative = [_of(rows, regime, name, one, "normalised") for one in (False, True)]
            gains = ", ".join(f"{100 * (more - less):+.1f}" for less, more in zip(plain, scaled, strict=True))
            cells = [name, _shown(plain), _shown(relative[0]), _shown(scaled), _shown(relative[1]), gains]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| single models | target | control | target with LiNeS | control |"]
    lines.append("| :-- | --: | --: | --: | --: |")
    for regime in REGIMES:
        cells = [_shown(_of(rows, regime, SINGLE, one, key)) for one in (False, True) for key in ("target", "control")]
        lines.append(f"| {regime} | {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"Accuracy in percent on {TEST_IMAGES} test images a task, {len(seeds)} fine-tuning seeds (± their standard "
        f"deviation), every recipe's one number chosen per seed on {VALIDATION_IMAGES} validation images a task; "
        f"control accuracy on {CONTROL_IMAGES} images of each other task; bf16, torch "
        f"{result['versions']['torch']}. From `benchmarks/results/recipes.json`, written by `benchmarks/recipes.py`.",
    ]
    return "\n".join(lines)


def place(result: dict[str, Any]) -> None:
    """Put the tables into docs/recipes.md."""
    place_between(Path(__file__).parents[1] / "docs/recipes.md", START, END, tables(result))


def main() -> None:
    """Measure what the JSON does not have, and place the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["measure", "place"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--vectors", type=Path, default=Path("runs/regimes"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recipes.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"rows": [], "split_of_choices": "val"}
    if options.output.exists():
        result |= json.loads(options.output.read_text())
    if "measure" in options.stages:
        result |= {"versions": versions(), "hardware": hardware()}
        MultiTaskDataModule(tasks=TASKS).prepare_data()
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            while wanted := jobs(result, options.seeds, options.vectors):
                for rows in pool.imap_unordered(_worker, wanted, chunksize=1):
                    result["rows"] += rows
                    write_text(options.output, json.dumps(result, indent=1) + "\n")
                    for row in rows:
                        print({key: row.get(key) for key in ("regime", "seed", "recipe", "lines", "value", "absolute")})
    if "place" in options.stages:
        place(result)


if __name__ == "__main__":
    main()
