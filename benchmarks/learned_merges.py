"""AdaMerging and its relatives on the embedded suite, three seeds, beside the merges without learning.

The vectors are those of benchmarks/regimes.py (``--stages fit``): full fine-tunes of eight tasks. Coefficients are
learned with ``MergeModule``; learning rate and number of steps were chosen once, on validation images (``choose``).
What a merge without learning has to choose, it chooses on validation images per seed. Reported is the accuracy on all
test images of each task, and for every method its difference to task arithmetic, paired by image.

Stages: ``choose`` (seed 0 only), ``measure``, ``place`` (the tables of docs/adamerging.md). Goes on where it stopped.

    python benchmarks/regimes.py --stages fit --regimes full
    python benchmarks/learned_merges.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

from lit_merge import TaskVector, TaskVectors
from lit_merge.data import EMBEDDED_TASKS, MergeDataModule, MultiTaskDataModule, load_split
from lit_merge.data.images import corruptions
from lit_merge.evaluation.search import quiet, silent_trainer
from lit_merge.files.text import write_text
from lit_merge.modules import MergeModule, MultiTaskModule
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import LiNeS, Mean, Scale, Sum, Transform, chain, ties
from lit_merge.vectors import merged_parameters

ROOT = Path(__file__).parents[1]
TASKS = list(EMBEDDED_TASKS)
START, END = "<!-- learned: written by benchmarks/learned_merges.py -->", "<!-- end of learned -->"
LEFT_OUT = {"a": ["letters", "land"], "b": ["digits", "scenes"]}
SCHEDULES = {"500 × 0.001": (500, 1e-3), "200 × 0.003": (200, 3e-3), "100 × 0.01": (100, 1e-2)}
GRIDS: dict[str, tuple[Callable[[float], Transform], list[float]]] = {
    "average": (lambda _: Mean(), [1.0]),
    "task arithmetic": (lambda value: chain(Sum(), Scale(value)), [0.1, 0.15, 0.2, 0.25, 0.3, 0.4]),
    "TIES": (lambda value: chain(ties(0.2), Scale(value)), [0.5, 0.7, 1.0, 1.4]),
    "LiNeS": (lambda value: chain(Sum(), LiNeS("norm_ratio", value)), [0.15, 0.3, 0.5, 0.8]),
}
PLUS_PLUS = [{"Trim": {"density": 0.2}}, "ElectSign"]
LEARNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of MergeModule and of MergeDataModule
    "layer-wise": ({}, {"adapt_on": "test"}),
    "task-wise": ({"granularity": "task"}, {"adapt_on": "test"}),
    "layer-wise ++": ({"parts": PLUS_PLUS}, {"adapt_on": "test"}),
    "layer-wise, on validation images": ({}, {"adapt_on": "val"}),
    "supervised layer-wise, on validation images": (
        {"objective": "cross_entropy"},
        {"adapt_on": "val", "labelled": True},
    ),
    "layer-wise, 1 % of the images": ({}, {"adapt_on": "test", "fraction": 0.01}),
    "group-wise": ({"granularity": "group"}, {"adapt_on": "test"}),
    "layer-wise, 5 % of the images": ({}, {"adapt_on": "test", "fraction": 0.05}),
    "layer-wise, no clamp": ({"clamp": None}, {"adapt_on": "test"}),
    "supervised layer-wise, no clamp, on validation images": (
        {"objective": "cross_entropy", "clamp": None},
        {"adapt_on": "val", "labelled": True},
    ),
}


def files(seed: int, tasks: Sequence[str] = TASKS) -> list[str]:
    """Where benchmarks/regimes.py left the vectors."""
    choice = json.loads((ROOT / "benchmarks/results/regimes.json").read_text(encoding="utf-8"))["choices"]["full"]
    folder = Path("runs/regimes/full") / f"{choice['steps']}-{choice['learning_rate']:g}" / f"seed-{seed}"
    return [str(folder / f"{task}.safetensors") for task in tasks]


SEVERITY = 4
CORRUPTIONS = {"JPEG" if name == "jpeg" else name.replace("_", " "): name for name in corruptions.CORRUPTIONS}
"""How the table calls them, all of one severity."""


class Suite:
    """An encoder, the tasks' heads and images."""

    def __init__(self) -> None:
        self.module = MultiTaskModule()
        self.module.eval()
        data = MultiTaskDataModule(tasks=TASKS)
        self.heads = {task: self.module.make_head(one) for task, one in data.tasks.items()}

    @torch.no_grad()
    def hits(
        self, split: str, count: int | None = None, kind: str | None = None, tasks: Sequence[str] = TASKS
    ) -> dict[str, Tensor]:
        """Which images of each task are classified rightly with the encoder as it is, bool ``[N]``."""
        found = {}
        for task in tasks:
            images, labels = load_split(task, split)
            images, labels = images[:count], labels[:count]
            if kind is not None:
                settings = CORRUPTIONS[kind], SEVERITY
                images = torch.stack(
                    [corruptions.corrupt(image, *settings, place) for place, image in enumerate(images)]
                )
            predictions = [
                self.heads[task](self.module(self.module.preprocessing.normalise(part))).argmax(-1)
                for part in images.split(250)
            ]
            found[task] = torch.cat(predictions) == labels
        return found

    def load(self, vectors: TaskVectors | None) -> None:
        """Put θ0, or θ0 plus one vector, into the encoder."""
        start = self.module.initial_parameters
        self.module.load_parameters(start if vectors is None else dict(merged_parameters(start, vectors)))


def accuracy(hits: dict[str, Tensor]) -> float:
    """The mean over the tasks."""
    return mean(float(one.float().mean()) for one in hits.values())


def row_of(seed: int, method: str, hits: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """A row of the JSON; which images were right is kept, so that methods can be compared image by image."""
    packed = {task: np.packbits(one.numpy()).tobytes().hex() for task, one in hits.items()}
    by_task = {task: float(one.float().mean()) for task, one in hits.items()}
    return {"seed": seed, "method": method, "accuracy": by_task, "mean": accuracy(hits), "right": packed, **more}


def learn(
    seed: int, module: dict[str, Any], data: dict[str, Any], tasks: Sequence[str], steps: int, rate: float
) -> Any:
    """A MergeModule after its fit."""
    torch.manual_seed(seed)
    learned = MergeModule(files(seed, tasks), learning_rate=rate, **module)
    images = MergeDataModule(tasks=list(tasks), seed=seed, **data)
    trainer = silent_trainer(max_steps=steps, limit_val_batches=0)
    with quiet():
        trainer.fit(learned, images)
    return learned


def measure_learned(suite: Suite, seed: int, method: str, tasks: Sequence[str], steps: int, rate: float) -> list[Any]:
    """Rows of one learned merge."""
    module, data = LEARNED[method.partition(" without ")[0]]
    learned = learn(seed, module, data, tasks, steps, rate)
    with torch.no_grad():
        weights = learned.merged.merged_parameters()
        values = learned.merged.applied().detach()
    suite.module.load_parameters({**suite.module.initial_parameters, **weights})
    more = {
        "coefficients": [round(float(one), 4) for one in values.mean(1)],
        "saturated": float(((values <= 0) | (values >= 1)).float().mean()),
    }
    rows = [row_of(seed, method, suite.hits("test"), **more)]
    if method == "layer-wise":
        rows += [row_of(seed, f"{method}: {kind}", suite.hits("test", 250, kind)) for kind in CORRUPTIONS]
    return rows


def measure_fixed(suite: Suite, seed: int, method: str, tasks: Sequence[str]) -> list[Any]:
    """Rows of one merge without learning, its number chosen on validation images of the merged tasks."""
    vectors = TaskVectors([TaskVector.load(path) for path in files(seed, tasks)])
    build, grid = GRIDS[method.partition(" without ")[0]]
    scores = {}
    for value in grid if len(grid) > 1 else []:
        suite.load(build(value)(vectors))
        found = suite.hits("val", 250)
        scores[value] = accuracy({task: found[task] for task in tasks})
    best = max(scores, key=lambda value: scores[value]) if scores else grid[0]
    suite.load(build(best)(vectors))
    rows = [row_of(seed, method, suite.hits("test"), chosen=best)]
    if method == "task arithmetic":
        rows += [row_of(seed, f"{method}: {kind}", suite.hits("test", 250, kind)) for kind in CORRUPTIONS]
    return rows


def measure_references(suite: Suite, seed: int) -> list[Any]:
    """Rows of the model before fine-tuning, and of every task's own."""
    suite.load(None)
    rows = [row_of(seed, "zero-shot", suite.hits("test"))]
    individual = {}
    for task, path in zip(TASKS, files(seed), strict=True):
        suite.load(TaskVectors([TaskVector.load(path)]))
        individual[task] = suite.hits("test")[task]
    return [*rows, row_of(seed, "individual", individual)]


def measure_joint(suite: Suite, seed: int) -> list[Any]:
    """Rows of one encoder fine-tuned on all tasks, each of which gives as many images as to its own model.

    Its learning rate is that of the individual models, and was not tuned.
    """
    choice = json.loads((ROOT / "benchmarks/results/regimes.json").read_text(encoding="utf-8"))["choices"]["full"]
    torch.manual_seed(seed)
    joint = MultiTaskModule(learning_rate=choice["learning_rate"])
    images = MultiTaskDataModule(tasks=TASKS, batch_size=128 // len(TASKS), seed=seed)
    with quiet():
        silent_trainer(max_steps=choice["steps"] * len(TASKS), limit_val_batches=0).fit(joint, images)
    suite.module.load_parameters({name: value.detach() for name, value in joint.encoder.named_parameters()})
    return [row_of(seed, "joint", suite.hits("test"))]


def jobs(seeds: Sequence[int]) -> list[tuple[int, str, list[str]]]:
    """Seed, method and merged tasks of everything that is measured, the most important first."""
    found: list[tuple[int, str, list[str]]] = []
    for seed in seeds:
        found += [(seed, "references", TASKS), *((seed, method, TASKS) for method in GRIDS)]
    for method in LEARNED:
        found += [(seed, method, TASKS) for seed in seeds]
        if method == "layer-wise, 1 % of the images":
            for left in LEFT_OUT.values():
                rest = [task for task in TASKS if task not in left]
                for base in ("task arithmetic", "layer-wise"):
                    found += [(seed, f"{base} without {' and '.join(left)}", rest) for seed in seeds]
    return [*found, *((seed, "joint", TASKS) for seed in seeds)]


def work(job: tuple[int, str, list[str]], schedule: tuple[int, float]) -> tuple[str, list[Any]]:
    """Measure one job in this process."""
    torch.set_num_threads(1)
    seed, method, tasks = job
    suite = Suite()
    name = method.partition(" without ")[0]
    if method == "references":
        return f"{seed} {method}", measure_references(suite, seed)
    if method == "joint":
        return f"{seed} {method}", measure_joint(suite, seed)
    if name in GRIDS:
        return f"{seed} {method}", measure_fixed(suite, seed, method, tasks)
    return f"{seed} {method}", measure_learned(suite, seed, method, tasks, *schedule)


def _work(arguments: tuple[tuple[int, str, list[str]], tuple[int, float]]) -> tuple[str, list[Any]]:
    return work(*arguments)


def choose() -> dict[str, Any]:
    """Validation accuracy of layer-wise coefficients of seed 0, learned on validation images without labels."""
    suite, found = Suite(), {}
    for name, (steps, rate) in SCHEDULES.items():
        learned = learn(0, *LEARNED["layer-wise, on validation images"], TASKS, steps, rate)
        with torch.no_grad():
            suite.module.load_parameters({**suite.module.initial_parameters, **learned.merged.merged_parameters()})
        found[name] = accuracy(suite.hits("val"))
        print(name, found[name], flush=True)
    return {"seed": 0, "split": "val", "scores": found, "best": max(found, key=lambda name: found[name])}


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["choose", "measure", "place"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/learned_merges.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"rows": []}
    if options.output.exists():
        result |= json.loads(options.output.read_text())

    def save() -> None:
        result.update(versions=versions(), hardware=hardware())
        write_text(options.output, json.dumps(result, indent=1) + "\n")

    if "choose" in options.stages and "schedule" not in result:
        result["schedule"] = choose()
        save()
    if "measure" in options.stages:
        done = {(row["seed"], row["method"]) for row in result["rows"]}
        done |= {(seed, "references") for seed, method in done if method == "individual"}
        schedule = SCHEDULES[result["schedule"]["best"]]
        waiting = [(job, schedule) for job in jobs(options.seeds) if (job[0], job[1]) not in done]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for name, rows in pool.imap_unordered(_work, waiting):
                result["rows"] += rows
                save()
                print(name, [(row["method"], round(100 * row["mean"], 1)) for row in rows[:1]], flush=True)
    if "place" in options.stages:
        place(result)


def right(row: dict[str, Any]) -> list[Tensor]:
    """Which test images of each task were right, as 0 and 1."""
    parts = []
    for task, packed in row["right"].items():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))
        parts.append(torch.from_numpy(bits[: EMBEDDED_TASKS[task].size("test")].astype(np.float64)))
    return parts


def paired(row: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Difference of the mean accuracies in points, and its standard error over the test images, paired."""
    differences, variances = [], []
    for one, other in zip(right(row), right(reference), strict=True):
        change = one - other
        differences.append(float(change.mean()))
        variances.append(float(change.var() / len(change)))
    return 100 * mean(differences), 100 * (sum(variances) ** 0.5) / len(variances)


def table(result: dict[str, Any]) -> str:
    """The tables of docs/adamerging.md."""
    rows: dict[str, dict[int, Any]] = {}
    for row in result["rows"]:
        rows.setdefault(row["method"], {})[row["seed"]] = row
    steps, rate = SCHEDULES[result["schedule"]["best"]]
    seeds = sorted(rows["task arithmetic"])
    lines = [
        f"Accuracy in percent, mean over eight tasks, all test images, {len(seeds)} seeds ± their standard deviation; "
        "the difference to task arithmetic of each seed ± its standard error over the test images, paired.",
        "",
        f"Coefficients: {steps} steps of Adam with learning rate {rate:g}, batches of 16 images per task, chosen on "
        "validation images of seed 0 among "
        + ", ".join(f"{name} ({100 * score:.1f})" for name, score in result["schedule"]["scores"].items())
        + ". Without labels but where it says supervised; on test images but where it says otherwise.",
        "",
        "| method | accuracy | to task arithmetic, by seed |",
        "| :-- | --: | :-- |",
    ]
    order = ["zero-shot", *GRIDS, *LEARNED, "joint", "individual"]
    for method in order:
        if method not in rows:
            continue
        values = [100 * rows[method][seed]["mean"] for seed in sorted(rows[method])]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        against = []
        for seed in sorted(rows[method]):
            difference, error = paired(rows[method][seed], rows["task arithmetic"][seed])
            against.append(f"{difference:+.1f} ± {error:.1f}")
        lines.append(f"| {method} | {mean(values):.1f}{spread} | {', '.join(against)} |")
    lines += ["", *_orderings(rows), "", *_left_out(rows), "", *_corruptions(rows)]
    return "\n".join(lines)


ORDERINGS = [  # the paper's, better first
    ("layer-wise", "task arithmetic"),
    ("layer-wise", "TIES"),
    ("layer-wise", "task-wise"),
    ("task-wise", "task arithmetic"),
    ("layer-wise ++", "layer-wise"),
    ("supervised layer-wise, on validation images", "layer-wise, on validation images"),
    ("layer-wise", "layer-wise, on validation images"),
    ("layer-wise", "layer-wise, 5 % of the images"),
    ("layer-wise", "layer-wise, 1 % of the images"),
]


def _orderings(rows: dict[str, dict[int, Any]]) -> list[str]:
    """Which of the paper's orderings appear: where every seed's difference is beyond two standard errors."""
    lines = [
        "The paper's orderings (Yang et al. 2024). One holds if the difference is above two standard "
        "errors on every seed, and is reversed if it is below minus two on every seed:",
        "",
        "| better in the paper | worse | here, by seed | |",
        "| :-- | :-- | :-- | :-- |",
    ]
    for better, worse in ORDERINGS:
        seeds = sorted(set(rows.get(better, {})) & set(rows.get(worse, {})))
        found = [paired(rows[better][seed], rows[worse][seed]) for seed in seeds]
        if not found:
            continue
        signs = {(difference > 2 * error) - (difference < -2 * error) for difference, error in found}
        said = {frozenset({1}): "holds", frozenset({-1}): "is reversed"}.get(frozenset(signs), "undecided")
        cells = ", ".join(f"{difference:+.1f} ± {error:.1f}" for difference, error in found)
        lines.append(f"| {better} | {worse} | {cells} | {said} |")
    return lines


def _left_out(rows: dict[str, dict[int, Any]]) -> list[str]:
    if not any(" without " in method for method in rows):
        return ["Merges of six tasks, evaluated on the two that were left out, have not been measured yet."]
    lines = [
        "Six tasks merged, accuracy on these and on the two that were left out (the vectors are not there, and none of "
        "their images were seen):",
        "",
        "| left out | method | six merged | two left out |",
        "| :-- | :-- | --: | --: |",
    ]
    for left in LEFT_OUT.values():
        for base in ("task arithmetic", "layer-wise"):
            found = rows.get(f"{base} without {' and '.join(left)}", {})
            if not found:
                continue
            merged = mean(mean(v for t, v in row["accuracy"].items() if t not in left) for row in found.values())
            others = mean(mean(v for t, v in row["accuracy"].items() if t in left) for row in found.values())
            lines.append(f"| {' and '.join(left)} | {base} | {100 * merged:.1f} | {100 * others:.1f} |")
    return lines


def _corruptions(rows: dict[str, dict[int, Any]]) -> list[str]:
    lines = [
        "On corrupted test images (the first 250 of each task, one severity); coefficients as above, learned or chosen "
        "on clean images:",
        "",
        "| corruption | task arithmetic | layer-wise |",
        "| :-- | --: | --: |",
    ]
    for kind in CORRUPTIONS:
        cells = [rows.get(f"{method}: {kind}", {}) for method in ("task arithmetic", "layer-wise")]
        if all(cells):
            values = [f"{100 * mean(row['mean'] for row in cell.values()):.1f}" for cell in cells]
            lines.append(f"| {kind} | {' | '.join(values)} |")
    return lines


def place(result: dict[str, Any]) -> None:
    """Put the tables into docs/adamerging.md."""
    place_between(ROOT / "docs/adamerging.md", START, END, table(result))


if __name__ == "__main__":
    main()
