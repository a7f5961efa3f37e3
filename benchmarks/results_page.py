"""docs/results.md from the committed JSON of the other benchmarks: which claims hold, and what else was measured.

    python benchmarks/results_page.py            # write the page
    python benchmarks/results_page.py --check    # fail if the page is not what the JSON says

Verdicts are those of benchmarks/claims_page.py, by one rule; numbers without stored test examples stand without one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import claims_page

from lit_merge.files.text import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"


def read(name: str) -> dict[str, Any]:
    """A benchmark's JSON."""
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    percent = [100 * value for value in values]
    return f"{mean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")


class Learned:
    """Rows of learned_merges.json by method and seed."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, Any]] = {}
        for row in read("learned_merges")["rows"]:
            self.rows.setdefault(row["method"], {})[row["seed"]] = row

    def means(self, method: str) -> list[float]:
        """Mean accuracy, one per seed."""
        return [row["mean"] for _, row in sorted(self.rows[method].items())]


class Recipes:
    """Rows of recipes.json by recipe, with or without LiNeS, and seed."""

    def __init__(self, regime: str = "full") -> None:
        self.rows: dict[tuple[str, bool], dict[int, Any]] = {}
        for row in read("recipes")["rows"]:
            if row["regime"] == regime:
                self.rows.setdefault((row["recipe"], bool(row.get("lines"))), {})[row["seed"]] = row

    def values(self, recipe: str, key: str = "absolute", lines: bool = False) -> list[float]:
        """One per seed."""
        return [row[key] for _, row in sorted(self.rows[recipe, lines].items())]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """A Markdown table; with ``numbers`` all columns but the first are aligned to the right."""
    rule = [":--", *(("--:" if numbers else ":--") for _ in head[1:])]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


REGIMES = [
    *("full", "attention_1", "attention_2", "attention_3", "attention_4", "linearized", "post_hoc", "cyclic", "strict"),
    *("lora", "lin_lr", "exp_lr", "half_ft", "last_ft"),
]


def regimes_and_merges() -> list[str]:
    """References, merges without learning and learned merges of three seeds; then merges by regime."""
    learned = Learned()
    order = [name for name in learned.rows if ":" not in name and " without " not in name]
    order.sort(key=lambda name: mean(learned.means(name)))
    rows = [[name, spread(learned.means(name))] for name in order]
    lines = ["Full fine-tunes, all test images, mean over eight tasks (`benchmarks/learned_merges.py`):", ""]
    lines += table(["method", "accuracy"], rows, numbers=True)
    by_regime: dict[str, list[Any]] = {regime: [] for regime in REGIMES}
    for row in read("regimes")["rows"]:
        by_regime[row["regime"]].append(row)
    columns: list[tuple[str, Callable[[Any], float | None]]] = [
        ("individual", lambda row: row["target"] or mean(row["individual"].values())),
        ("task arithmetic, α = 1", lambda row: (row.get("at_one") or {}).get("absolute")),
        ("α tuned", lambda row: (row.get("tuned") or {}).get("absolute")),
        ("normalised", lambda row: (row.get("tuned") or {}).get("normalised")),
    ]
    rows = []
    for regime, found in by_regime.items():
        values = [[value(row) for row in found] for _, value in columns]
        rows.append([regime, *(spread(one) if all(v is not None for v in one) else "–" for one in values)])
    lines += ["", "By fine-tuning regime (`benchmarks/regimes.py`, [more](regimes.md)):", ""]
    lines += table(["regime", *(name for name, _ in columns)], rows, numbers=True)
    recipes, attention = Recipes(), Recipes("attention_1")
    names = [name for name, lines_too in recipes.rows if not lines_too and name != "single task"]
    rows = [[name, *_cells(recipes, name), *_cells(attention, name)] for name in dict.fromkeys(names)]
    lines += ["", "By recipe, on 256 test images a task (`benchmarks/recipes.py`, [more](recipes.md)):", ""]
    head = ["recipe", "full", "full, with LiNeS", "attention-only", "attention-only, with LiNeS"]
    return lines + table(head, rows, numbers=True)


def _cells(recipes: Recipes, name: str) -> list[str]:
    return [
        spread(recipes.values(name, lines=lines)) if (name, lines) in recipes.rows else "–" for lines in (False, True)
    ]


FOUR = {"paper": "in the papers' scheme", "fusion_bench": "in FusionBench", "lit_merge": "here"}


def costs() -> list[str]:
    """Time and memory against peers."""
    merge, rows = read("merge"), []
    for shapes, method in dict.fromkeys((row["shapes"], row["method"]) for row in merge["rows"]):
        tools = {r["tool"]: r for r in merge["rows"] if (r["shapes"], r["method"]) == (shapes, method)}
        if "lit_merge" not in tools or "limit" in method:
            continue
        cells = []
        for tool in ("lit_merge", "mergekit", "fusion_bench"):
            row = tools.get(tool, {})
            cells.append(f"{row['median']:.1f} s, {row['peak_mib']:,.0f} MiB" if row.get("median") else "–")
        rows.append([f"{method}, 8 × {shapes}", *cells])
    lines = ["Merging (`benchmarks/merge.py`):", ""]
    lines += table(["", "lit-merge", "mergekit", "FusionBench"], rows, numbers=True)
    goals = [
        [g["what"], f"{g['value']:.3g}", g["goal"], "yes" if g["met"] else "no"] for g in read("adamerging")["goals"]
    ]
    lines += ["", "Learning coefficients, ViT-B/32, 8 tasks (`benchmarks/adamerging.py`, [more](adamerging.md)):", ""]
    lines += table(["what", "measured", "goal", "met"], goals)
    four = {row["tool"]: mean(row["seconds"]) for row in read("adamerging_four_vectors")["steps"]}
    lines += [
        "",
        "With 8 vectors the papers' scheme needs more than 20 GiB. With 4, and 4 images of each task, a step takes "
        + ", ".join(f"{four[tool]:.1f} s {name}" for tool, name in FOUR.items())
        + " (`python benchmarks/adamerging.py --stages steps --vectors 4 --images 4 --rounds 2 --steps 2`).",
    ]
    search = read("linear_search")
    lines += [
        "",
        f"A coefficient search on linearised models: {search['times_faster']:g} times as fast as evaluating every "
        f"point, {search['times_faster_again']:g} times when repeated (`benchmarks/linear_search.py`).",
    ]
    for name, write in (
        ("disentanglement", _disentanglement),
        ("checkpoints", _checkpoints),
        ("hostile_files", _hostile),
    ):
        lines += ["", *write(read(name))]
    return lines


def _disentanglement(found: dict[str, Any]) -> list[str]:
    images = " and ".join(f"{count:,} images of {task}" for task, count in found["images"].items())
    rows = []
    for kind in ("direct", "linearised"):
        one = found[kind]
        apart = max(one["largest_difference"].values())
        cells = [f"{one['seconds_ours']:.0f} s", f"{one['seconds_naive']:.0f} s", f"{one['times_faster']:g}"]
        rows.append([kind, *cells, f"at least {one['goal']:g}", "yes" if one["reached"] else "no", f"{apart:.0e}"])
    head = ["models", "ours", "every point by itself", "times faster", "goal", "met", "largest difference"]
    timed = "; ".join(f"{kind}: {found[kind]['naive_points_timed']}" for kind in ("direct", "linearised"))
    side = len(found["grid"])
    return [
        f"Disentanglement error on a grid of {side} × {side}, {images} (`benchmarks/disentanglement.py`, "
        f"[more](analyze.md)); of the points by themselves some were timed, beside ours, and scaled up ({timed}):",
        "",
        *table(head, rows),
    ]


def _checkpoints(found: dict[str, Any]) -> list[str]:
    return [
        f"Importing and differencing published checkpoints, {found['model']}: at most {found['largest_peak_mb']} MB "
        "above the interpreter's own (`benchmarks/checkpoints.py`, [more](checkpoints.md))."
    ]


def _hostile(found: dict[str, Any]) -> list[str]:
    damaged = found["damaged_total"]
    hostile = {key: sum(kind[key] for kind in found["hostile"].values()) for key in ("files", "refused")}
    peak = found["peak_memory_above_start_mb"]
    return [
        f"Damaged files: {damaged['files']:,}, of which {damaged['refused']:,} were refused in one line and "
        f"{damaged['read equal']:,} read equal; at most {peak['damaged']:.0f} MB and "
        f"{found['slowest_damaged']['seconds']:.2f} s each. Hostile ones: {hostile['files']:,}, of which "
        f"{hostile['refused']:,} were refused and the others read as data; at most {peak['hostile']:.0f} MB and "
        f"{found['slowest_hostile']['seconds']:.1f} s. Nothing was imported, called or written "
        "(`benchmarks/hostile_files.py`)."
    ]


def page() -> str:
    """The page."""
    return "\n".join([*_decided(), *_accuracies(), "", *_costs_and_published()]) + "\n"


def _accuracies() -> list[str]:
    return [
        "## Accuracies of other runs",
        "",
        "The embedded suite, in the benchmarks that are named: three fine-tuning seeds, ± their standard deviation. "
        "Nothing is judged by numbers of which no test examples were stored.",
        "",
        *regimes_and_merges(),
    ]


def _decided() -> list[str]:
    return [
        "# Results",
        "",
        "Which of the papers' claims hold on networks and tasks that anyone can run, by one rule. Written by "
        "`python benchmarks/claims_page.py` from what `python benchmarks/all.py` has measured and collected, and from "
        "the JSON of the benchmarks that are named below. All choices, of learning rates and coefficients, were made "
        "on validation data; learned coefficients saw test data, without their labels, unless a row names others.",
        "",
        *claims_page.truth_page_head(),
    ]


def _costs_and_published() -> list[str]:
    return [
        "## Time and memory",
        "",
        *costs(),
        "",
        "## The papers' own numbers",
        "",
        "Eight tasks of the literature, accuracy in percent as published. Methods differ in their fine-tuned weights: "
        "A are those of Ilharco et al. 2023 (individual models 90.5 on ViT-B/32), B those of Wang et al. 2024 (92.8), "
        "C those of FusionBench (90.3), own the paper's. `configs/suite/clip8_vit_b32.yaml` and its relatives run the "
        "same on a machine with accelerators and the data; that has not been done.",
        "",
        *claims_page.published(),
    ]


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE.relative_to(ROOT)} is not what the JSON says: run python benchmarks/results_page.py")
        return
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
