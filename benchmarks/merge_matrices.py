"""Recipes that decompose matrices, from disk to disk on the shapes of ViT-B/32: time and memory.

    python benchmarks/merge_matrices.py    # nothing else running; some minutes on two cores

Inputs, processes and the limit are those of benchmarks/merge.py. Memory is also given in stacks: all vectors' values of
the largest parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from merge import TASKS, measure, prepare, shapes_of
from placing import place_between

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/merge_matrices.json"
PAGE = ROOT / "docs/recipes.md"
BEGIN, END = "<!-- matrices: written by benchmarks/merge_matrices.py -->", "<!-- end of matrices -->"
RECIPES = ("iso_c", "svc", "aswudi", "tsv_m", "dc_merge", "cart", "iso_cts", "esm")


def table(found: dict[str, Any]) -> str:
    """The table of docs/recipes.md."""
    limit, stack = found["limit"]["median"], found["largest_stack_mib"]
    lines = ["| recipe | seconds (range) | times the limit | peak memory, MiB | in stacks |"]
    lines += ["| :-- | --: | --: | --: | --: |"]
    for name, row in found["recipes"].items():
        times = f"{row['median']:.1f} ({min(row['seconds']):.1f}–{max(row['seconds']):.1f})"
        memory = f"{row['peak_mib']:,.0f} | {row['peak_mib'] / stack:.1f}"
        lines.append(f"| {name} | {times} | {row['median'] / limit:.0f} | {memory} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{TASKS} × {found['shapes']} (float32), {found['rounds']} round(s); reading and writing takes "
            f"{limit:.1f} s, a stack of the largest parameter {stack:.0f} MiB; {found['hardware']['cores']} cores "
            f"({found['hardware']['processor']}), torch {found['versions']['torch']}. From "
            "`benchmarks/results/merge_matrices.json`, written by `benchmarks/merge_matrices.py`.",
        ]
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all rounds of a recipe."""
    seconds = [one["seconds"] for one in rows]
    return {"seconds": seconds, "median": statistics.median(seconds), "peak_mib": max(one["peak_mib"] for one in rows)}


def main() -> None:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", default="vit_b_32")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--memory", type=int, default=18, help="GiB that a process may allocate")
    parser.add_argument("--folder", type=Path, default=Path("runs/merge_benchmark"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.folder.resolve() / options.shapes
    prepare(folder, options.shapes)
    largest = max(math.prod(shape) for shape in shapes_of(options.shapes).values())
    found: dict[str, Any] = {"shapes": options.shapes, "rounds": options.rounds}
    found |= {"largest_stack_mib": round(largest * 4 * TASKS / 2**20, 1), "recipes": {}}
    found |= {"versions": versions(), "hardware": hardware()}
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name in ("limit", *options.recipes):
            tool = "limit" if name == "limit" else "lit_merge"
            runs.setdefault(name, []).append(measure(tool, name, folder, options.memory))
            print(name, runs[name][-1], flush=True)
            if "failed" in runs[name][-1]:
                sys.exit(f"{name}: {runs[name][-1]['failed']}")
            (found if name == "limit" else found["recipes"])[name] = summary(runs[name])
            write_text(options.output, json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)
    text = table(found)
    print(text)
    if options.output == RESULTS:
        place_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
