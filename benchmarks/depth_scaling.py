"""LiNeS on single models along its α, beside fine-tuning with smaller rates in early blocks: target and control.

    python benchmarks/all.py --instruments embedded --regimes post_hoc --output runs/all --keep   # vectors of full
    python benchmarks/depth_scaling.py --vectors 'runs/all/embedded/post_hoc/seed-{seed}/seed-{seed}/fit'

Every task's vector of full fine-tuning is scaled by depth, from α in the first block to 1 in the last. *Target* is the
accuracy on the task's own test images, *control* the mean over the other tasks' (Wang et al. 2025, table 1); means over
tasks, in percent. Models that were fine-tuned with rates by block, or in part, are those of the committed suites; for
each of them stands what LiNeS keeps of control at the same target, between the two nearest α. No α is chosen here: it
is a curve on test images that explains, and decides nothing. Evaluated in float32; the suites in bf16-mixed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from collected import NotMeasuredError, Stored
from explaining import vectors_of
from learned_merges import TASKS, Suite

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import LiNeS

RESULTS = Path(__file__).parents[1] / "benchmarks/results/depth_scaling.json"
ALPHAS = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)
REGIMES = ("lin_lr", "exp_lr", "half_ft", "last_ft")


def point(hits: dict[str, dict[str, Tensor]], count: int) -> dict[str, float]:
    """Target and control accuracy in percent, of each task's model the hits on all tasks' first images."""
    accuracy = {task: {one: float(hits[task][one][:count].double().mean()) for one in TASKS} for task in TASKS}
    target = mean(accuracy[task][task] for task in TASKS)
    control = mean(mean(accuracy[task][one] for one in TASKS if one != task) for task in TASKS)
    return {"target": round(100 * target, 3), "control": round(100 * control, 3)}


def curve(job: tuple[str, int, int]) -> tuple[int, list[dict[str, float]]]:
    """A seed, and its points along α."""
    folder, seed, count = job
    torch.set_num_threads(1)
    suite, every = Suite(), vectors_of(folder, seed)
    found: list[dict[str, float]] = []
    for alpha in ALPHAS:
        hits: dict[str, dict[str, Tensor]] = {}
        for task in TASKS:
            suite.load(LiNeS(alpha=alpha)(every.select([task])))
            hits[task] = suite.hits("test", count)
        found.append({"alpha": alpha, **point(hits, count)})
        print(seed, found[-1], flush=True)
    return seed, found


def control_at(target: float, points: list[dict[str, float]]) -> float | None:
    """Control accuracy of LiNeS at this target accuracy, None outside the curve."""
    for low, high in pairwise(points):
        if low["target"] <= target <= high["target"]:
            share = (target - low["target"]) / max(high["target"] - low["target"], 1e-9)
            return low["control"] + share * (high["control"] - low["control"])
    return None


def beside(seeds: dict[str, list[dict[str, float]]], count: int) -> dict[str, Any]:
    """Of every regime that is measured: its points, and how much more control LiNeS keeps at the same target."""
    stored, found = Stored("embedded"), dict[str, Any]()
    for regime in REGIMES:
        rows: list[dict[str, Any]] = []
        for seed, points in seeds.items():
            try:
                own = point({task: stored.hits(regime, f"alone_{task}", seed) for task in TASKS}, count)
            except NotMeasuredError:
                continue
            kept = control_at(own["target"], points)
            rows.append({"seed": seed, **own, "lines_control": kept if kept is None else round(kept, 3)})
        more = [row["lines_control"] - row["control"] for row in rows if row["lines_control"] is not None]
        spread = round(stdev(more), 2) if len(more) > 1 else None
        found[regime] = {"seeds": rows, "lines_more": round(mean(more), 2) if more else None, "spread": spread}
    return found


def main() -> None:
    """Measure the curves, some seeds at a time, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", help="folder of a seed's task vectors, with {seed} in it; without, known curves")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=500, help="of every task's test images")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.vectors:
        jobs = [(options.vectors, seed, options.images) for seed in options.seeds]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            seeds = dict(pool.imap_unordered(curve, jobs))
        result: dict[str, Any] = {"images": options.images, "curve": {str(seed): seeds[seed] for seed in options.seeds}}
        result |= {"versions": versions(), "hardware": hardware()}
    else:
        result = json.loads(options.output.read_text(encoding="utf-8"))
    result["regimes"] = beside(result["curve"], result["images"])
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["regimes"], indent=1))


if __name__ == "__main__":
    main()
