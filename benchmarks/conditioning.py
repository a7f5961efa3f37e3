"""Vectors that harm a merge, and their cure: a task trained too fast or with label smoothing, and conditioned (DisTaC).

    python benchmarks/all.py --instruments embedded --regimes full --output runs/all --keep   # the vectors
    python benchmarks/conditioning.py --vectors 'runs/all/embedded/full/seed-{seed}/seed-{seed}/fit'
    python benchmarks/conditioning.py --place    # the table of docs/recipes.md again, from the JSON

Of eight tasks one is fine-tuned again: with a learning rate five times as high, which makes its vector long, or
with label smoothing, which makes the model less sure. Its vector takes the place of the healthy one, as it is and after
conditioning on unlabelled training images: brought to the mean length of the others, or kept as long and made more
confident. Coefficients are chosen on validation images, per merge; the rate of conditioning on those of seed 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from explaining import LARGE, SMALL, TASKS, scaled
from learned_merges import Suite, accuracy
from placing import place_between
from verdicts import judge

from lit_merge import TaskVector, TaskVectors
from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data import TaskDataModule
from lit_merge.evaluation.search import quiet, silent_trainer
from lit_merge.files.text import write_text
from lit_merge.modules import ConditionModule, FineTuneModule
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import Sum, Transform, TSVMerge

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/conditioning.json", ROOT / "docs/recipes.md"
BEGIN, END = "<!-- conditioning: written by benchmarks/conditioning.py -->", "<!-- end of conditioning -->"
TASK, STEPS, RATE, CONDITION_STEPS = "digits", 60, 4e-4, 60
RATES = (1e-5, 1e-4)
ILL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of its fine-tuning, and of its conditioning
    "long": ({"learning_rate": 5 * RATE}, {}),
    "unsure": ({"learning_rate": RATE, "label_smoothing": 0.1}, {"scale": 1.0, "temperatures": (1.0, 10.0)}),
}
MERGES: dict[str, tuple[Transform, tuple[float, ...]]] = {
    "task arithmetic": (Sum(), SMALL),
    "TSV-M": (TSVMerge(), LARGE),
}
CHOSEN_ON = 256  # validation images of each task


def trained(module: FineTuneModule, folder: Path, name: str, steps: int, seed: int) -> Path:
    """The file of its vector."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        with quiet():
            L.seed_everything(seed, workers=True, verbose=False)
            trainer = silent_trainer(
                default_root_dir=folder,
                max_steps=steps,
                limit_val_batches=0,
                callbacks=[ExtractTaskVector(file.name)],
            )
            trainer.fit(module, TaskDataModule(TASK, seed=seed))
    return file


def vectors_of(files: dict[str, Path]) -> TaskVectors:
    """In the order of the tasks."""
    return TaskVectors([TaskVector.load(files[task]) for task in TASKS])


def merged(suite: Suite, name: str, vectors: TaskVectors) -> tuple[float, float, dict[str, Tensor]]:
    """The coefficient of best validation accuracy, that accuracy, and which test images are right with it."""
    transform, grid = MERGES[name]
    return scaled(suite, transform(vectors), grid, CHOSEN_ON)


def conditioned(suite: Suite, kind: str, ill: Path, healthy: dict[str, Path], folder: Path, seed: int) -> Path:
    """The conditioned vector; of the rates that of the best merge on validation images of seed 0."""
    others = [str(file) for task, file in healthy.items() if task != TASK]
    settings: dict[str, Any] = {**ILL[kind][1], **({} if "scale" in ILL[kind][1] else {"others": others})}
    choice, found = folder / f"{kind}-rate.json", {}
    if seed:
        rates: tuple[float, ...] = (json.loads((folder.parent / f"seed-0/{choice.name}").read_text())["rate"],)
    else:
        rates = RATES
    for rate in rates:
        module = ConditionModule(str(ill), **settings, learning_rate=rate)
        file = trained(module, folder, f"{kind}-conditioned-{rate:g}", CONDITION_STEPS, seed)
        found[rate] = file
    if len(rates) > 1:
        scores = {
            rate: merged(suite, "task arithmetic", vectors_of({**healthy, TASK: file}))[1]
            for rate, file in found.items()
        }
        best = max(scores, key=lambda rate: scores[rate])
        write_text(choice, json.dumps({"rate": best, "validation": {str(k): v for k, v in scores.items()}}) + "\n")
        return found[best]
    return found[rates[0]]


def of_seed(folder: str, output: Path, seed: int) -> dict[str, Any]:
    """All merges of a seed: ``case/merge`` -> coefficient and hits; and what the vectors are like."""
    torch.set_num_threads(1)
    suite, place = Suite(), output / f"seed-{seed}"
    healthy = {task: Path(folder.format(seed=seed)) / task / "task_vector.safetensors" for task in TASKS}
    cases = {"healthy": healthy[TASK]}
    for kind, (settings, _) in ILL.items():
        cases[kind] = trained(FineTuneModule(**settings), place, kind, STEPS, seed)
        cases[f"{kind}, conditioned"] = conditioned(suite, kind, cases[kind], healthy, place, seed)
    found: dict[str, Any] = {"vectors": {}, "merges": {}}
    others = mean(TaskVector.load(file).norm() for task, file in healthy.items() if task != TASK)
    for case, file in cases.items():
        vector = TaskVector.load(file)
        suite.load(TaskVectors([vector]))
        alone = accuracy(suite.hits("test", tasks=[TASK]))
        found["vectors"][case] = {
            "times_the_others": round(vector.norm() / others, 3),
            "confidence": vector.metadata.get("confidence", ""),
            "accuracy": round(100 * alone, 2),
        }
        for name in MERGES:
            best, _, right = merged(suite, name, vectors_of({**healthy, TASK: file}))
            found["merges"][f"{case}/{name}"] = (best, right)
            print(seed, case, name, best, round(100 * accuracy(right), 2), flush=True)
    return found


def summary(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Of all seeds: accuracies, and differences with their intervals."""
    rows = list(seeds.values())
    result: dict[str, Any] = {"vectors": {str(seed): one["vectors"] for seed, one in seeds.items()}}
    result["merges"] = {
        key: {
            "coefficients": [one["merges"][key][0] for one in rows],
            "accuracies": [round(100 * accuracy(one["merges"][key][1]), 2) for one in rows],
            "of_the_task": [round(100 * accuracy({TASK: one["merges"][key][1][TASK]}), 2) for one in rows],
        }
        for key in rows[0]["merges"]
    }
    pairs = [(kind, "healthy") for kind in ILL] + [(f"{kind}, conditioned", kind) for kind in ILL]
    result["compared"] = []
    for name, (first, second) in product(MERGES, pairs):
        a, b = ([one["merges"][f"{case}/{name}"][1] for one in rows] for case in (first, second))
        found = judge(a, b)
        row = {"merge": name, "first": first, "second": second, "points": round(100 * found.effect, 2)}
        result["compared"].append(row | {"interval": [round(100 * found.low, 2), round(100 * found.high, 2)]})
    return result


def table(found: dict[str, Any]) -> str:
    """What docs/recipes.md shows of it."""
    said = {"long": "learning rate times five", "unsure": "label smoothing of 0.1"}
    lines = [
        f"| vector of {found['task']} | times the others' length | accuracy alone | " + " | ".join(MERGES) + " |",
        "| :-- | --: | --: | " + " | ".join("--:" for _ in MERGES) + " |",
    ]
    for case in next(iter(found["vectors"].values())):
        kind, _, cured = case.partition(", ")
        of = [one[case] for one in found["vectors"].values()]
        cells = [said.get(kind, kind) + (f", {cured}" if cured else "")]
        cells += [f"{mean(one['times_the_others'] for one in of):.2f}", f"{mean(one['accuracy'] for one in of):.1f}"]
        for name in MERGES:
            cell = f"{mean(found['merges'][f'{case}/{name}']['accuracies']):.1f}"
            for row in found["compared"]:
                if (row["merge"], row["first"]) == (name, case):
                    cell += f" ({row['points']:+.1f} [{row['interval'][0]:+.1f}, {row['interval'][1]:+.1f}])"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Mean test accuracy of eight tasks of the embedded suite, {len(found['vectors'])} fine-tuning seeds; in "
            "brackets the difference, of a harmful vector to the healthy one and of a conditioned one to the harmful "
            f"one, with its 95 % interval. Conditioned for {found['condition_steps']} steps. From "
            "`benchmarks/results/conditioning.json`, written by `benchmarks/conditioning.py`.",
        ]
    )


def main() -> None:
    """Measure all seeds, write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", help="folder of a seed's task vectors, with {seed} in it")
    parser.add_argument("--place", action="store_true", help="the table alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/conditioning"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.place:
        started = time.perf_counter()
        jobs = [(options.vectors, options.folder, seed) for seed in options.seeds]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            found = [pool.apply(of_seed, jobs[0]), *pool.starmap(of_seed, jobs[1:])]  # the first one chooses rates
        rates = {kind: json.loads((options.folder / f"seed-0/{kind}-rate.json").read_text()) for kind in ILL}
        result: dict[str, Any] = {"task": TASK, "steps": STEPS, "condition_steps": CONDITION_STEPS, "rates": rates}
        result |= summary(dict(zip(options.seeds, found, strict=True)))
        result |= {"seconds": round(time.perf_counter() - started), "versions": versions(), "hardware": hardware()}
        write_text(options.output, json.dumps(result, indent=1) + "\n")
    text = table(json.loads(options.output.read_text(encoding="utf-8")))
    print(text)
    if options.output == RESULTS:
        place_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
