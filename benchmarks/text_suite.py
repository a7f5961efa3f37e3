"""The real text suite: a suite's outcome on all-MiniLM-L6-v2 and eight real tasks, and the papers' claims judged by it.

    lit-merge data prepare text8
    lit-merge suite --config configs/suite/text_full.yaml
    python benchmarks/text_suite.py runs/text_full              # or several outputs, with other seeds of the same suite

``--add`` keeps the seeds that are in the committed files and not in these outputs. Reads results.json and every test's
hits; writes the JSON, the hits that the verdicts follow from (a bit each, one file per method and seed), and the tables
of docs/text_results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between
from verdicts import HOLDS, NOT, UNDECIDED, judge

from lit_merge.files.text import write_text
from lit_merge.report.hits import load_hits

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/text_suite.json"
HITS = ROOT / "benchmarks/results/text_hits"
PAGE = ROOT / "docs/text_results.md"
BEGIN, END = "<!-- text suite: written by benchmarks/text_suite.py -->", "<!-- end of text suite -->"
ZERO_SHOT, INDIVIDUAL = "zero_shot", "individual"

CLAIMS: tuple[tuple[str, str, float, str, str], ...] = (
    ("weight_average", ZERO_SHOT, 0.0, "averaging weights improves the pre-trained model", "Wortsman et al. 2022"),
    (
        "task_arithmetic",
        "weight_average",
        0.0,
        "task arithmetic is above the average: 69.1, 65.8",
        "Ilharco et al. 2023",
    ),
    ("ties", "task_arithmetic", 0.0, "TIES is above task arithmetic: 72.4, 69.1", "Yadav et al. 2023"),
    ("lines", "task_arithmetic", 0.0, "LiNeS improves task arithmetic: +2.5 of ViT-L/14", "Wang et al. 2025"),
    ("adamerging", "task_arithmetic", 0.0, "AdaMerging is above task arithmetic: 80.1, 69.1", "Yang et al. 2024"),
    ("adamerging", "ties", 0.0, "AdaMerging is above TIES: 80.1, 72.4", "Yang et al. 2024"),
    ("svc", "task_arithmetic", 3.0, "SVC adds 3 points to task arithmetic: 81.9, 68.9", "Li et al. 2026"),
    ("tsv_m", "task_arithmetic", 0.0, "TSV-M is above task arithmetic: 84.0, 69.1", "Gargiulo et al. 2025"),
    ("tsv_m", "adamerging", 0.0, "TSV-M, without data, is above AdaMerging: 84.0, 80.1", "Gargiulo et al. 2025"),
    ("iso_c", "task_arithmetic", 0.0, "Iso-C is above task arithmetic: 82.8, 69.1", "Marczak et al. 2025"),
    ("iso_c", "tsv_m", 0.0, "Iso-C is above TSV-M", "Marczak et al. 2025"),
    ("aswudi", "tsv_m", 0.5, "a spectral WUDI is half a point above TSV-M", "Wei et al. 2026"),
    ("regmean", "task_arithmetic", 0.0, "RegMean is above task arithmetic: 82.4, 68.0", "Jin et al. 2023"),
    ("regmean_plus_plus", "regmean", 1.0, "RegMean++ is a point above RegMean: 84.4, 82.4", "RegMean++ 2025"),
    ("featcal", "regmean", 1.0, "FeatCal is a point above RegMean: 85.5, 82.4", "FeatCal 2026"),
    ("adarank", "adamerging", 5.0, "AdaRank is five points above AdaMerging: 87.9, 80.1", "AdaRank 2026"),
    ("expert_on_tsv_m", "aswudi", 0.0, "a learned merge is above the best one without data", "AdaRank 2026"),
    ("continual", "weight_average", 0.0, "OPCM, one vector after another, is above the average", "OPCM 2025"),
    (INDIVIDUAL, "tsv_m", 0.0, "the best merge stays below the individual models", "Gargiulo et al. 2025"),
)
"""The first method is better than the second by more than the margin in points; in words with the published numbers of
ViT-B/32 on eight image tasks where they were seen; whose claim it is."""


def collected(suites: list[Path], add: bool = False) -> dict[str, Any]:
    """The suites' numbers, and their hits, copied.

    Args:
        suites: outputs of the same suite, each with other seeds.
        add: whether the seeds that are committed stay.

    Raises:
        SystemExit: what belongs together was not run with the same settings, or differs where it should not.
    """
    found = [json.loads((suite / "results.json").read_text(encoding="utf-8")) for suite in suites]
    seeds = {seed: suite for suite, one in zip(suites, found, strict=True) for seed in one["seeds"]}
    if add:
        found = [json.loads(RESULTS.read_text(encoding="utf-8")), *found]
    for name in ("model", "tasks", "zero_shot"):
        if any(one[name] != found[0][name] for one in found):
            sys.exit(f"{name}: expected the same of every suite, got others. Collect the suites of one configuration.")
    if differing := [name for one in found for name in differing_recipes(found[0], one)]:
        sys.exit(f"expected the same recipes, got others: {', '.join(differing)}. Collect suites of one configuration.")
    if not add:
        shutil.rmtree(HITS, ignore_errors=True)
    HITS.mkdir(parents=True, exist_ok=True)
    for suite in suites[:1]:
        shutil.copy(suite / "zero-shot/test_hits.safetensors", HITS / f"{ZERO_SHOT}.safetensors")
    for seed, suite in seeds.items():
        merged = next(one["seeds"][seed]["merged"] for one in reversed(found) if seed in one["seeds"])
        for task in found[0]["tasks"]:
            source = suite / f"seed-{seed}/individual/{task}/test_hits.safetensors"
            shutil.copy(source, HITS / f"{INDIVIDUAL}-{seed}-{task}.safetensors")
        for name in merged:
            shutil.copy(suite / f"seed-{seed}/test/{name}/test_hits.safetensors", HITS / f"{name}-{seed}.safetensors")
    together = {seed: numbers for one in found for seed, numbers in one["seeds"].items()}
    return {
        **{key: found[-1][key] for key in ("model", "tasks", "settings", "versions", "hardware", "zero_shot")},
        "seeds": {seed: together[seed] for seed in sorted(together, key=int)},
        "claims": judged(sorted(together, key=int)),
    }


def differing_recipes(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Of two suites: ``fit``, and the recipes of both, that are not the same."""
    one, other = first["settings"], second["settings"]
    names = [name for name in one["recipes"] if one["recipes"][name] != other["recipes"].get(name)]
    return [*(["fit"] if one["fit"] != other["fit"] else []), *names]


def hits_of(method: str, seeds: list[str]) -> list[dict[str, Any]]:
    """One mapping per seed; the pre-trained model is the same on every seed."""
    if method == ZERO_SHOT:
        return [load_hits(HITS / f"{ZERO_SHOT}.safetensors")] * len(seeds)
    if method != INDIVIDUAL:
        return [load_hits(HITS / f"{method}-{seed}.safetensors") for seed in seeds]
    found = []
    for seed in seeds:
        parts = [load_hits(path) for path in sorted(HITS.glob(f"{INDIVIDUAL}-{seed}-*.safetensors"))]
        found.append({task: hits for part in parts for task, hits in part.items()})
    return found


def judged(seeds: list[str]) -> list[dict[str, Any]]:
    """Every claim by the one rule, from the stored hits."""
    rows = []
    known = {path.name.removesuffix(".safetensors").partition("-")[0] for path in HITS.glob("*.safetensors")}
    for first, second, margin, text, source in CLAIMS:
        if not {first, second} <= known:  # of a method that was not run
            continue
        found = judge(hits_of(first, seeds), hits_of(second, seeds), margin / 100)
        rows.append(
            {
                **{"first": first, "second": second, "margin": margin, "claim": text, "source": source},
                **{"effect": round(100 * found.effect, 3), "error": round(100 * found.error, 3)},
                "interval": [round(100 * found.low, 3), round(100 * found.high, 3)],
                "by_seed": [round(100 * one, 3) for one in found.by_seed],
                "verdict": found.verdict,
            }
        )
    return rows


def tables(measured: dict[str, Any]) -> str:
    """The part of the page that is made of numbers."""
    tasks, seeds = measured["tasks"], measured["seeds"]
    count = len(seeds)
    methods = [ZERO_SHOT, *next(iter(seeds.values()))["merged"], INDIVIDUAL]
    lines = [f"| method | {' | '.join(tasks)} | mean | chosen |", "| :-- |" + " --: |" * (len(tasks) + 1) + " :-- |"]
    for method in methods:
        rows = [_accuracies(measured, seed, method) for seed in seeds]
        means = [sum(row[task] for row in rows) / count for task in tasks]
        cells = " | ".join(f"{100 * one:.1f}" for one in [*means, sum(means) / len(means)])
        lines.append(f"| {method.replace('_', ' ')} | {cells} | {_chosen(measured, method)} |")
    verdicts = [row["verdict"] for row in measured["claims"]]
    fits = f"{count} fine-tuning seed{'s' if count > 1 else ''}"
    said = ", ".join(f"{verdicts.count(one)} {one}" for one in (HOLDS, NOT, UNDECIDED))
    lines += [
        "",
        f"Test accuracy in percent, {fits}. {len(verdicts)} claims: {said};",
        *([f"{left} more are of methods that were not run;"] if (left := len(CLAIMS) - len(verdicts)) else []),
        f"at 95 % each, about {len(verdicts) / 20:.1f} verdicts of true zero differences are expected to be wrong.",
        "",
        *claim_table(measured),
    ]
    return "\n".join(lines)


def claim_table(measured: dict[str, Any]) -> list[str]:
    """Every claim with its difference and verdict."""
    lines = [
        "| claim, published numbers | source | difference, points | 95 % interval | by seed | verdict |",
        "| :-- | :-- | --: | :-- | :-- | :-- |",
    ]
    for row in measured["claims"]:
        low, high = row["interval"]
        by_seed = ", ".join(f"{one:+.2f}" for one in row["by_seed"])
        numbers = f"{row['effect']:+.2f} | {low:+.2f} to {high:+.2f} | {by_seed}"
        lines.append(f"| {row['claim']} | {row['source']} | {numbers} | {row['verdict']} |")
    return lines


def _accuracies(measured: dict[str, Any], seed: str, method: str) -> dict[str, float]:
    found = measured["seeds"][seed]
    if method == ZERO_SHOT:
        return measured["zero_shot"]
    return found["individual"] if method == INDIVIDUAL else found["merged"][method]["accuracy"]


def _chosen(measured: dict[str, Any], method: str) -> str:
    found = [one["merged"].get(method, {}) for one in measured["seeds"].values()]
    return ", ".join(f"{one['coefficient']:g}" for one in found if one.get("search") and one.get("coefficient"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "suites", type=Path, nargs="*", help="outputs of the suite; without, judge the committed hits again"
    )
    parser.add_argument("--add", action="store_true", help="keep the committed seeds")
    options = parser.parse_args()
    measured = collected(options.suites, options.add or not options.suites)
    write_text(RESULTS, json.dumps(measured, indent=1) + "\n")
    place_between(PAGE, BEGIN, END, tables(measured))
    print(tables(measured))


if __name__ == "__main__":
    main()
