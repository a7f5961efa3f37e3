"""Tests of what may explain claims that do not hold on the embedded suite: merges beside each other, one thing changed.

    python benchmarks/all.py --instruments embedded --regimes full --output runs/all --keep   # the vectors
    python benchmarks/explaining.py --vectors 'runs/all/embedded/full/seed-{seed}/seed-{seed}/fit'
    python benchmarks/explaining.py --regmean 'runs/all/embedded/calibrated/seed-{seed}' --vectors …    # RegMean's part
    python benchmarks/explaining.py --masks --vectors …    # TALL masks' part

Merges are evaluated in float32, those of the suites in bf16-mixed, which differs by about a tenth of a point.
Every merge's coefficient is chosen on validation images; differences on test images are judged by the rule of
benchmarks/verdicts.py, three fine-tuning seeds. What is concluded stands in benchmarks/explanations.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from collected import Stored
from learned_merges import TASKS, Suite, accuracy
from verdicts import judge

from lit_merge import TaskVector, TaskVectors
from lit_merge.files.text import write_text
from lit_merge.params import norm
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import (
    WUDI,
    Calibrate,
    Drop,
    IsoC,
    RegMean,
    Scale,
    Sum,
    TallMask,
    Transform,
    TSVMerge,
    chain,
    continual,
    ties,
)

RESULTS = Path(__file__).parents[1] / "benchmarks/results/explaining.json"
SMALL, LARGE = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4), (0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
LONG, WIDE = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0), (0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
Build = Callable[[TaskVectors], Transform]


def equal_lengths(vectors: TaskVectors) -> Transform:
    """Brings every vector to the mean of their lengths."""
    lengths = [norm(dict(vectors.select([task]).single())) for task in vectors.tasks]
    return Scale(tuple(mean(lengths) / one for one in lengths))


MERGES: dict[str, tuple[Build, tuple[float, ...]]] = {  # without the coefficient that is multiplied in the end
    "task arithmetic": (lambda _: Sum(), SMALL),
    "TIES": (lambda _: ties(density=0.2), (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)),
    "TIES, half kept": (lambda _: ties(density=0.5), (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)),
    "TIES, all kept": (lambda _: ties(density=1.0), (0.6, 0.8, 1.0, 1.3, 1.6, 2.0)),
    "DARE, half dropped": (lambda _: chain(Drop(0.5), Sum()), SMALL),
    "DARE, nine tenths dropped": (lambda _: chain(Drop(0.9), Sum()), SMALL),
    "TSV-M": (lambda _: TSVMerge(), LARGE),
    "TSV-M, equal lengths": (lambda own: chain(equal_lengths(own), TSVMerge()), LARGE),
    "WUDI": (lambda _: WUDI(), WIDE),
    "WUDI, steps eight times as long": (lambda _: WUDI(learning_rate=8e-5), WIDE),
    "WUDI, steps a quarter as long": (lambda _: WUDI(learning_rate=2.5e-6), WIDE),
    "continual, in order": (lambda _: continual(), LONG),
    "continual, the other way round": (lambda own: continual(0.5, own.tasks[::-1]), LONG),
    "continual, mixed": (lambda own: continual(0.5, own.tasks[1::2] + own.tasks[::2]), LONG),
    "Iso-C": (lambda _: IsoC(), LARGE),
    "Iso-C, equal lengths": (lambda own: chain(equal_lengths(own), IsoC()), LARGE),
}
COMPARED = [
    ("TIES", "task arithmetic"),
    ("TIES, half kept", "task arithmetic"),
    ("TIES, all kept", "task arithmetic"),
    ("DARE, half dropped", "task arithmetic"),
    ("DARE, nine tenths dropped", "task arithmetic"),
    ("WUDI, steps eight times as long", "WUDI"),
    ("WUDI, steps eight times as long", "TSV-M"),
    ("WUDI, steps a quarter as long", "WUDI"),
    ("continual, in order", "task arithmetic"),
    ("continual, in order", "TSV-M"),
    ("continual, the other way round", "continual, in order"),
    ("continual, mixed", "continual, in order"),
    ("Iso-C", "TSV-M"),
    ("Iso-C, equal lengths", "Iso-C"),
    ("TSV-M, equal lengths", "TSV-M"),
    ("Iso-C, equal lengths", "TSV-M, equal lengths"),
]


def vectors_of(folder: str, seed: int) -> TaskVectors:
    """All tasks' vectors of a seed."""
    place = Path(folder.format(seed=seed))
    return TaskVectors([TaskVector.load(place / task / "task_vector.safetensors") for task in TASKS])


def measured(job: tuple[str, int, str]) -> tuple[int, str, float, dict[str, Tensor]]:
    """Seed, merge, its coefficient, and which test images it has right."""
    folder, seed, name = job
    torch.set_num_threads(1)
    suite, vectors = Suite(), vectors_of(folder, seed)
    build, grid = MERGES[name]
    best, _, right = scaled(suite, build(vectors)(vectors), grid)
    return seed, name, best, right


def scaled(
    suite: Suite, merged: TaskVectors, grid: tuple[float, ...], count: int | None = None
) -> tuple[float, float, dict[str, Tensor]]:
    """The coefficient of best accuracy on so many validation images a task, that accuracy, and its test hits."""
    computed = TaskVectors([TaskVector(dict(merged.single()))])  # once for all coefficients
    scores = {}
    for value in grid:
        suite.load(Scale(value)(computed))
        scores[value] = accuracy(suite.hits("val", count))
    best = max(scores, key=lambda value: scores[value])
    suite.load(Scale(best)(computed))
    return best, scores[best], suite.hits("test")


def calibrated(vectors: TaskVectors) -> dict[str, float]:
    """How much calibration changes two merges, relative to their length, and how much of it is their length alone."""
    found = {}
    for name, before, alpha in (("task arithmetic", chain(Sum(), Scale(0.3)), 0.1), ("TSV-M", TSVMerge(), 1.0)):
        merged, changed = before(vectors).single(), chain(before, Calibrate(alpha))(vectors).single()
        pairs = [(merged[key].double().flatten(), changed[key].double().flatten()) for key in merged]
        first, second = torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])
        found[name] = round(float((second - first).norm() / first.norm()), 4)
        found[f"{name}, cosine"] = round(float(torch.dot(first, second) / first.norm() / second.norm()), 4)
        found[f"{name}, length"] = round(float(second.norm() / first.norm()), 4)
    return found


def compared(hits: dict[str, list[dict[str, Tensor]]]) -> list[dict[str, Any]]:
    """Every pair: difference in points with its interval, and by task."""
    rows = []
    for first, second in [pair for pair in COMPARED if set(pair) <= set(hits)]:
        found = judge(hits[first], hits[second])
        by_task = {
            task: round(100 * mean(float(a[task].double().mean() - b[task].double().mean()) for a, b in pairs), 2)
            for pairs in [list(zip(hits[first], hits[second], strict=True))]
            for task in TASKS
        }
        row = {"first": first, "second": second, "points": round(100 * found.effect, 2)}
        rows.append(row | {"interval": [round(100 * found.low, 2), round(100 * found.high, 2)], "by_task": by_task})
    return rows


def without_coefficient(suites: str, vectors: str, seeds: list[int]) -> dict[str, Any]:
    """RegMean++, which has no coefficient, against RegMean without one; the former's hits are those of its suites."""
    suite, stored, plain = Suite(), Stored("embedded"), []
    for seed in seeds:
        grams = Path(suites.format(seed=seed)) / f"seed-{seed}/statistics/regmean"
        files = {task: str(grams / task / "gram.safetensors") for task in TASKS}
        suite.load(RegMean(files)(vectors_of(vectors, seed)))
        plain.append(suite.hits("test"))
    found = judge([stored.hits("calibrated", "regmean_plus_plus", str(seed)) for seed in seeds], plain)
    row = {"first": "RegMean++", "second": "RegMean, no coefficient", "points": round(100 * found.effect, 2)}
    row |= {"interval": [round(100 * found.low, 2), round(100 * found.high, 2)]}
    return row | {"accuracies": [round(100 * accuracy(one), 2) for one in plain]}


THRESHOLDS, SCALES = (0.2, 0.3, 0.4, 0.5, 0.6), (0.7, 0.85, 1.0, 1.2)
MASKS: dict[str, tuple[int, tuple[float, ...]]] = {  # how many tasks are merged, and by what the cut-out is scaled
    "two tasks": (2, (1.0,)),
    "four tasks": (4, (1.0,)),
    "eight tasks": (8, (1.0,)),
    "eight tasks, scaled": (8, SCALES),
}


def masked(job: tuple[str, int]) -> tuple[int, dict[str, dict[str, Any]]]:
    """A seed, and of every row of MASKS how well TALL masks rebuild each task beside the ones that follow it."""
    folder, seed = job
    torch.set_num_threads(1)
    suite, every = Suite(), vectors_of(folder, seed)
    individual = {}
    for task in TASKS:
        suite.load(every.select([task]))
        individual[task] = accuracy(suite.hits("test", tasks=[task]))
    found: dict[str, dict[str, Any]] = {}
    for name, (count, scales) in MASKS.items():
        found[name] = {"normalised": {}, "threshold": {}, "scale": {}, "cosine": {}, "distance": {}}
        for place, task in enumerate(TASKS):
            vectors = every.select([TASKS[(place + step) % len(TASKS)] for step in range(count)])
            tried = {}
            for threshold, scale in product(THRESHOLDS, scales):
                suite.load(chain(TallMask(threshold), Scale(scale))(vectors).select([0]))
                tried[threshold, scale] = accuracy(suite.hits("val", tasks=[task]))
            threshold, scale = max(tried, key=lambda one: tried[one])
            cut = chain(TallMask(threshold), Scale(scale))(vectors).select([0])
            suite.load(cut)
            right = accuracy(suite.hits("test", tasks=[task]))
            one, other = (torch.cat([part[key].flatten() for key in part]) for part in (cut, every.select([task])))
            row = {"normalised": right / individual[task], "threshold": threshold, "scale": scale}
            row["cosine"] = float(torch.cosine_similarity(one, other, dim=0))
            row["distance"] = float((one - other).norm() / other.norm())
            for key, value in row.items():
                found[name][key][task] = round(value, 4)
    return seed, found


def main() -> None:
    """Measure all merges, some at a time, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", required=True, help="folder of a seed's task vectors, with {seed} in it")
    parser.add_argument("--regmean", help="a seed's suite of the regime calibrated: RegMean's part alone")
    parser.add_argument("--masks", action="store_true", help="TALL masks' part alone")
    parser.add_argument("--merges", nargs="+", choices=MERGES, default=list(MERGES), help="what else is known stays")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.masks:
        known = json.loads(options.output.read_text(encoding="utf-8"))
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            seeds = dict(pool.imap_unordered(masked, [(options.vectors, seed) for seed in options.seeds]))
        known["masks"] = {str(seed): seeds[seed] for seed in options.seeds}
        write_text(options.output, json.dumps(known, indent=1) + "\n")
        for name in MASKS:
            print(name, [round(100 * mean(one[name]["normalised"].values()), 2) for one in seeds.values()])
        return
    if options.regmean:
        known = json.loads(options.output.read_text(encoding="utf-8"))
        known["regmean"] = without_coefficient(options.regmean, options.vectors, options.seeds)
        write_text(options.output, json.dumps(known, indent=1) + "\n")
        print(known["regmean"])
        return
    hits: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in options.merges}
    chosen: dict[str, dict[int, float]] = {name: {} for name in options.merges}
    waiting = [(options.vectors, seed, name) for seed in options.seeds for name in options.merges]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for seed, name, best, right in pool.imap_unordered(measured, waiting):
            hits[name][seed], chosen[name][seed] = right, best
            print(seed, name, best, round(100 * accuracy(right), 2), flush=True)
    result: dict[str, Any] = {"merges": {}, "compared": []}
    if options.output.exists():
        result |= json.loads(options.output.read_text(encoding="utf-8"))
    for name in options.merges:
        result["merges"][name] = {
            "coefficients": [chosen[name][seed] for seed in options.seeds],
            "accuracies": [round(100 * accuracy(hits[name][seed]), 2) for seed in options.seeds],
            "grid": MERGES[name][1],
            "processor": hardware()["processor"],
        }
    rows = compared({name: [found[seed] for seed in options.seeds] for name, found in hits.items()})
    pairs = [(row["first"], row["second"]) for row in rows]
    result["compared"] = [row for row in result["compared"] if (row["first"], row["second"]) not in pairs] + rows
    every = {str(seed): vectors_of(options.vectors, seed) for seed in options.seeds}
    result["calibrated"] = {seed: calibrated(own) for seed, own in every.items()}
    result["lengths"] = {
        seed: {task: round(norm(dict(own.select([task]).single())), 4) for task in TASKS} for seed, own in every.items()
    }
    size = sum(value.numel() for value in every[str(options.seeds[0])].select([0]).single().values())
    result["root_mean_squares"] = {
        seed: round(mean(lengths.values()) / size**0.5, 6) for seed, lengths in result["lengths"].items()
    }
    result |= {"versions": versions(), "hardware": hardware()}
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["compared"], indent=1))


if __name__ == "__main__":
    main()
