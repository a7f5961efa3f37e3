"""LiNeS beside fine-tuning that forgets less, at equal target accuracy: a test of what explains their difference.

    python benchmarks/all.py --instruments embedded --regimes full --output runs/all --keep   # the vectors
    python benchmarks/target_control.py --vectors 'runs/all/embedded/full/seed-{seed}/seed-{seed}/fit'

The page compares LiNeS, whose α is chosen by a criterion, with a regime whose strength nobody chooses: they stand at
different places between target and control accuracy. Here all vectors of full fine-tuning are scaled by LiNeS with one
α, and by one plain coefficient, for a grid of values; the value whose mean target accuracy is nearest to that of the
other regime is compared with it. The regime's hits are the committed ones of benchmarks/results/claims. As the value is
found on the test images, this compares two curves; it is no way to choose α.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from collected import Stored
from explaining import TASKS, vectors_of
from learned_merges import Suite
from verdicts import judge

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import LiNeS, Scale, Transform

RESULTS = Path(__file__).parents[1] / "benchmarks/results/target_control.json"
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CURVES: dict[str, Any] = {"LiNeS": lambda value: LiNeS(value), "scaled": lambda value: Scale(value)}


def target_control(models: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one model per task the hits on its own task, and of every task the mean over the models of the others."""
    own = {task: models[task][task].double() for task in TASKS}
    others = {
        task: torch.stack([models[other][task].double() for other in TASKS if other != task]).mean(0) for task in TASKS
    }
    return own, others


def of_mean(hits: dict[str, Tensor]) -> float:
    """In percent."""
    return round(100 * mean(float(one.mean()) for one in hits.values()), 2)


def curve(suite: Suite, folder: str, seed: int, build: Any) -> dict[float, Any]:
    """Value -> hits on target and control tasks."""
    vectors, found = vectors_of(folder, seed), {}
    for value in GRID:
        transform: Transform = build(value)
        models = {}
        for task in TASKS:
            suite.load(transform(vectors.select([task])))
            models[task] = suite.hits("test")
        found[value] = target_control(models)
        print(seed, value, *map(of_mean, found[value]), flush=True)
    return found


def main() -> None:
    """Measure both curves of every seed, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", required=True, help="folder of a seed's task vectors, with {seed} in it")
    parser.add_argument(
        "--regimes", nargs="+", default=["lin_lr"], help="that are compared with, as they were collected"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    suite, stored = Suite(), Stored("embedded")
    curves = {
        name: {seed: curve(suite, options.vectors, seed, build) for seed in options.seeds}
        for name, build in CURVES.items()
    }
    result: dict[str, Any] = {
        "curves": {
            name: {
                str(seed): {str(value): list(map(of_mean, hits)) for value, hits in one.items()}
                for seed, one in seeds.items()
            }
            for name, seeds in curves.items()
        },
        "compared": [],
    }
    for regime in options.regimes:
        theirs = [
            target_control({task: stored.hits(regime, f"alone_{task}", str(seed)) for task in TASKS})
            for seed in options.seeds
        ]
        for name, seeds in curves.items():
            values, ours = [], []
            for seed, (wanted, _) in zip(options.seeds, theirs, strict=True):
                value = min(GRID, key=lambda one: abs(of_mean(seeds[seed][one][0]) - of_mean(wanted)))
                values.append(value)
                ours.append(seeds[seed][value])
            row: dict[str, Any] = {"curve": name, "regime": regime, "values": values}
            for place, what in enumerate(("target", "control")):
                found = judge([one[place] for one in ours], [one[place] for one in theirs])
                row[what] = {
                    "ours": [of_mean(one[place]) for one in ours],
                    "theirs": [of_mean(one[place]) for one in theirs],
                    "points": round(100 * found.effect, 2),
                    "interval": [round(100 * found.low, 2), round(100 * found.high, 2)],
                }
            result["compared"].append(row)
    result |= {"grid": GRID, "versions": versions(), "hardware": hardware()}
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["compared"], indent=1))


if __name__ == "__main__":
    main()
