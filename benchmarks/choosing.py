"""The measured columns of docs/choosing.md, from committed results alone.

    python benchmarks/choosing.py

Methods that were not measured yet are in the table without numbers.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/text_suite.json"
PAGE = ROOT / "docs/choosing.md"
BEGIN, END = "<!-- choosing: written by benchmarks/choosing.py -->", "<!-- end of choosing -->"
REFERENCE = "task_arithmetic"


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        key: name of the suite's recipe.
        text: what it is called on the page.
        costs: beside reading the vectors once; a number of steps is that of the suite.
    """

    key: str
    text: str
    costs: str


GROUPS: tuple[tuple[str, tuple[Method, ...]], ...] = (
    (
        "nothing but the vectors",
        (
            Method("weight_average", "`weight_average`", "nothing"),
            Method("aswudi", "`aswudi`, no number to choose", "one decomposition per matrix"),
            Method("actmerge", "`actmerge`", "one decomposition per matrix"),
            Method("emr", "`emr`, a model per task", "nothing"),
        ),
    ),
    (
        "some labelled validation examples, for one number",
        (
            Method("task_arithmetic", "`task_arithmetic`", "a test per value"),
            Method("ties", "`ties`", "a test per value"),
            Method("lines", "`lines`", "a test per value"),
            Method("svc", "`svc` after task arithmetic", "one decomposition per matrix, a test per value"),
            Method("tsv_m", "`tsv_m`", "T + 2 decompositions per matrix, a test per value"),
            Method("iso_c", "`iso_c`", "one decomposition per matrix, a test per value"),
            Method("iso_cts", "`iso_cts`", "T + 3 decompositions per matrix, a test per value"),
            Method("cart", "`cart`", "T decompositions per matrix, a test per value"),
            Method("esm", "`esm`", "T + 2 decompositions per matrix, a test per value"),
        ),
    ),
    (
        "a few hundred unlabelled inputs of every task, forward passes",
        (
            Method("regmean", "`regmean`", "Gram matrices of every layer's inputs"),
            Method("regmean_plus_plus", "`regmean++`", "the same, block after block"),
            Method("featcal", "`featcal`", "forward passes, one linear system per layer"),
        ),
    ),
    (
        "unlabelled inputs of every task, to learn on",
        (
            Method("adamerging", "coefficients by `entropy`", "forward and backward passes"),
            Method("expert", "coefficients by `expert`", "the same, and one more forward pass"),
            Method("adarank", "`AdaRank` masks by `entropy`", "the same; all directions in memory"),
            Method("adarank_expert", "`AdaRank` masks by `expert`", "the same; all directions in memory"),
            Method("expert_on_tsv_m", "coefficients on `TSVDirections` by `expert`", "the same as `expert`"),
            Method("symerge", "coefficients and heads by `expert`", "the same as `expert`; a head per task"),
            Method("surgery", "surgery after TSV-M", "forward passes; a small correction per task"),
        ),
    ),
    (
        "vectors that come one after another",
        (
            Method("continual", "`continual`, the tasks in order", "one decomposition per matrix and vector"),
            Method("continual_backwards", "`continual`, the other way round", "the same"),
            Method("continual_mixed", "`continual`, mixed", "the same"),
        ),
    ),
)


def table(measured: dict[str, Any]) -> str:
    """The decision table, with what a suite's results say about each method and nothing where they say nothing."""
    seeds = list(measured["seeds"].values())
    reference = _means(seeds, REFERENCE)
    lines = ["| you have | method | what it costs | accuracy | to task arithmetic | learned on |"]
    lines.append("| :-- | :-- | :-- | --: | --: | :-- |")
    for needs, methods in GROUPS:
        for place, method in enumerate(methods):
            found = _means(seeds, method.key)
            numbers = f"{_spread(found)} | {_difference(found, reference)} | {_learned(seeds, method.key)}"
            lines.append(f"| {needs if place == 0 else ''} | {method.text} | {method.costs} | {numbers} |")
    count = len(seeds)
    individual = _spread([100 * statistics.fmean(one["individual"].values()) for one in seeds])
    lines += [
        "",
        f"Mean test accuracy in percent over {len(measured['tasks'])} tasks, {count} fine-tuning seed"
        f"{'s ± their standard deviation' if count > 1 else ''}; individual models {individual}, pre-trained "
        f"{100 * statistics.fmean(measured['zero_shot'].values()):.1f}. What has no number has not been measured here.",
        "From `benchmarks/results/text_suite.json`; verdicts with intervals are in [Results on a real network]"
        "(text_results.md).",
    ]
    return "\n".join(lines)


def _means(seeds: list[dict[str, Any]], key: str) -> list[float]:
    """The mean accuracy of every seed, or nothing if a seed lacks the method."""
    found = [one["merged"].get(key, {}).get("accuracy") for one in seeds]
    return [100 * statistics.fmean(one.values()) for one in found] if all(found) else []


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _difference(values: list[float], reference: list[float]) -> str:
    if not values or not reference or values == reference:
        return ""
    return f"{statistics.fmean(values) - statistics.fmean(reference):+.1f}"


def _learned(seeds: list[dict[str, Any]], key: str) -> str:
    """The split, how many inputs and how many steps, of one seed."""
    said = seeds[0]["merged"].get(key, {}).get("learned")
    if not said:
        return ""
    return f"{said['learned_on']}, {sum(said['examples'].values()):,} inputs, {said['step']:,} steps"


def main() -> None:
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    place_between(PAGE, BEGIN, END, table(measured))
    print(table(measured))


if __name__ == "__main__":
    main()
