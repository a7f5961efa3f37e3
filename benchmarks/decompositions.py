"""What recipes that decompose matrices take, with LAPACK's own decomposition and with the one from squares.

    python benchmarks/decompositions.py             # nothing else running; ten minutes on two cores

Eight synthetic task vectors of float32 with falling singular values, the four matrices of one block of ViT-B/32 (a
model has twelve). Both ways in turn, three rounds, in one process; the errors are against the same recipe in float64.
The way before was ``torch.linalg.svd`` of the float32 matrix, for SVC of the float64 one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import (
    CART,
    Calibrate,
    Chain,
    DCMerge,
    IsoC,
    IsoCTS,
    Sum,
    Transform,
    TSVMerge,
    matrices,
    spectral,
)
from lit_merge.transforms import calibration as calibrating
from lit_merge.vectors import TaskVector, TaskVectors

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/decompositions.json"
PAGE = ROOT / "docs/recipes.md"
BEGIN, END = "<!-- decompositions: written by benchmarks/decompositions.py -->", "<!-- end of decompositions -->"
SHAPES = {
    "attn.in_proj_weight": (2304, 768),
    "attn.out_proj.weight": (768, 768),
    "mlp.c_fc.weight": (3072, 768),
    "mlp.c_proj.weight": (768, 3072),
}
RECIPES: dict[str, Callable[[], Transform]] = {
    "TSV-M": TSVMerge,
    "Iso-C": IsoC,
    "Iso-CTS": IsoCTS,
    "CART": CART,
    "DC-Merge": DCMerge,
    "SVC on task arithmetic": lambda: Chain((Sum(), Calibrate())),
}
GOAL = 2.0


def stacks(tasks: int, seed: int = 0) -> dict[str, Tensor]:
    """Name -> float64 ``(T, m, n)`` of task vectors whose singular values fall by two orders of magnitude."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in SHAPES.items():
        rank = min(shape)
        values = 1e-2 * torch.logspace(0, -2, rank)
        drawn = []
        for _ in range(tasks):
            left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in shape)
            drawn.append((left * values) @ right.mT)
        found[f"transformer.resblocks.0.{name}"] = torch.stack(drawn).double()
    return found


def vectors_of(found: dict[str, Tensor], dtype: torch.dtype) -> TaskVectors:
    """The task vectors, in memory."""
    count = len(next(iter(found.values())))
    return TaskVectors(
        [TaskVector({name: one[row].to(dtype) for name, one in found.items()}, str(row)) for row in range(count)]
    )


def merged(recipe: Callable[[], Transform], vectors: TaskVectors) -> dict[str, Tensor]:
    """Everything that the recipe gives, computed."""
    return dict(recipe()(vectors).single().items())


@contextmanager
def before() -> Iterator[None]:
    """Decompositions as they were."""

    def direct(matrix: Tensor, most: int, largest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = matrices._not_zero(values, matrix, most, largest)
        return left[:, :kept], values[:kept], right[:kept]

    def directly(matrix: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right = direct(matrix, min(matrix.shape), None)
        return left @ right, values

    with ExitStack() as stack:
        for module in (matrices, spectral):
            stack.enter_context(patch.object(module, "polar", directly))
        stack.enter_context(patch.object(matrices, "_from_squares", direct))
        own = matrices.left_vectors
        stack.enter_context(patch.object(calibrating, "left_vectors", lambda matrix, single: own(matrix, False)))
        yield


def measured(rounds: int, tasks: int, recipes: list[str]) -> list[dict[str, Any]]:
    """One row per recipe."""
    exact = stacks(tasks)
    single = vectors_of(exact, torch.float32)
    rows = []
    for name in recipes:
        recipe = RECIPES[name]
        seconds: dict[str, list[float]] = {"before": [], "now": []}
        found: dict[str, dict[str, Tensor]] = {}
        for _ in range(rounds):
            began = time.perf_counter()
            with before():
                found["before"] = merged(recipe, single)
            middle = time.perf_counter()
            found["now"] = merged(recipe, single)
            seconds["before"].append(round(middle - began, 3))
            seconds["now"].append(round(time.perf_counter() - middle, 3))
        wanted = merged(recipe, vectors_of(exact, torch.float64))
        ratios = [one / other for one, other in zip(seconds["before"], seconds["now"], strict=True)]
        row = {
            "recipe": name,
            "seconds": seconds,
            "times_faster": round(statistics.median(ratios), 2),
            "error": {way: _error(one, wanted) for way, one in found.items()},
        }
        rows.append({**row, "met": row["times_faster"] >= GOAL})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter, by norm."""
    norms = [float((got[name].double() - one).norm() / one.norm()) for name, one in wanted.items()]
    return float(f"{max(norms):.1e}")


def table(found: dict[str, Any]) -> str:
    """The table of docs/recipes.md."""
    lines = [
        "| recipe | before, s | now, s | times faster | error before | error now |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for row in found["rows"]:
        times = [f"{statistics.median(row['seconds'][way]):.1f}" for way in ("before", "now")]
        errors = [f"{row['error'][way]:.0e}" for way in ("before", "now")]
        lines.append(f"| {row['recipe']} | {' | '.join(times)} | {row['times_faster']:g} | {' | '.join(errors)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"One block of ViT-B/32, {found['tasks']} vectors of float32, in memory; medians of {found['rounds']} "
            f"rounds, {found['hardware']['cores']} cores ({found['hardware']['processor']}), torch "
            f"{found['versions']['torch']}. "
            "Errors: the largest of a matrix by norm, against the recipe in float64. From "
            "`benchmarks/results/decompositions.json`, written by `benchmarks/decompositions.py`.",
        ]
    )


def main() -> None:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows of other recipes in it stay")
    options = parser.parse_args()
    known = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.exists() else []
    rows = {row["recipe"]: row for row in [*known, *measured(options.rounds, options.tasks, options.recipes)]}
    ordered = [rows[name] for name in RECIPES if name in rows]
    found = {"tasks": options.tasks, "rounds": options.rounds, "goal": GOAL, "rows": ordered}
    found |= {"versions": versions(), "hardware": hardware()}
    write_text(options.output, json.dumps(found, indent=1) + "\n")
    text = table(found)
    sys.stdout.write(text + "\n")
    if options.output == RESULTS:
        place_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
