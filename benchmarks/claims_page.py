"""The parts of docs/results.md and docs/text_results.md that say which of the papers' claims hold, from collected hits.

    python benchmarks/claims_page.py            # write both pages
    python benchmarks/claims_page.py --check    # fail if they are not what the collected files say

Paragraphs on single claims are written by hand, in benchmarks/explanations.md, under the claim as a heading.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
import text_suite
from collected import COLLECTED, NOT_MEASURED, Stored, claims
from suites import ROOT, experiments
from verdicts import HOLDS, NOT, UNDECIDED

from lit_merge.files.text import write_text

TEXT_PAGE = ROOT / "docs/text_results.md"
EXPLANATIONS = ROOT / "benchmarks/explanations.md"
PUBLISHED = ROOT / "benchmarks/published.yaml"
BEGIN, END = "<!-- text regimes: written by benchmarks/claims_page.py -->", "<!-- end of text regimes -->"
FAMILIES = ("alone", "lines", "forget", "tall")
ORDER = (HOLDS, NOT, UNDECIDED, NOT_MEASURED)
UNITS = {"cosine": "hundredths of |cosine|", "tau_jp": "% of ‖τJp‖", "depth": "hundredths", "spearman": "hundredths"}
RULE = """\
Written down before the numbers were made, and applied by code (`benchmarks/verdicts.py`) to every row. A claim says
that method A is better than method B by more than m points; m is 0 unless the row says otherwise, and negative where
the paper says "as good as". Of every test example the difference of right and wrong is averaged over fine-tuning seeds;
the effect is the mean over tasks of the means over examples. Its variance is that over examples plus that over seeds;
the interval is 95 %, with Satterthwaite's degrees of freedom. *Holds*: the interval lies above m. *Does not hold*: it
lies below m, or contains m within half a point. *Undecided*: everything else, and whatever has one seed only. No
verdict comes from a mean over seeds or from a bare sign. Where it is not about accuracy, pairs of task vectors, or of a
vector and another task, stand for the examples. What the verdicts follow from is in `benchmarks/results/claims`, a bit
per example, model and seed, and the tests compute every verdict again. The claims are in `benchmarks/claims`, with what
they quote; what was run is `benchmarks/experiments.yaml` and `configs/paper`."""


def known_instruments() -> list[str]:
    """Those of which something has been collected."""
    return [name for name in experiments()["instruments"] if (COLLECTED / f"{name}.json").exists()]


def verdicts_of(stored: Stored) -> list[str]:
    """One per claim."""
    return [row["verdict"] for row in stored.numbers["claims"]]


def counts(every: Sequence[Stored], suite: Mapping[str, Any] | None = None) -> list[str]:
    """A table of verdicts per instrument, with those of the text suite's own, and how many of them chance decides."""
    rows, judged = [], 0
    if suite is not None:
        rows, judged = [text_suite_counts(suite)], len(suite["claims"])
    for stored in every:
        found = verdicts_of(stored)
        judged += len(found) - found.count(NOT_MEASURED)
        about = experiments()["instruments"][stored.instrument]["about"]
        items = sum(stored.numbers["examples"].values())
        seeds = max(len(one["seeds"]) for one in stored.numbers["regimes"].values())
        cells = [stored.instrument, about, f"{items:,}", str(seeds), *(str(found.count(one)) for one in ORDER)]
        rows.append(cells)
    return [
        *_table(["instrument", "what it is", "test examples", "seeds", *ORDER], rows),
        "",
        f"{judged} verdicts at 95 % each: about {judged / 20:.0f} of those on true zero differences are expected to be "
        "wrong.",
    ]


def text_suite_counts(measured: Mapping[str, Any]) -> list[str]:
    """The row of the table of counts for benchmarks/text_suite.py."""
    found = [row["verdict"] for row in measured["claims"]]
    about = "all-MiniLM-L6-v2, eight real tasks of text, 120 steps of 32 texts a task: merges of full fine-tuning"
    examples = sum(len(one) for one in text_suite.hits_of(text_suite.ZERO_SHOT, ["0"])[0].values())
    missing = len(text_suite.CLAIMS) - len(found)
    shown = [str(found.count(one)) for one in (HOLDS, NOT, UNDECIDED)]
    return ["text_full", about, f"{examples:,}", str(len(measured["seeds"])), *shown, str(missing)]


def claim_table(stored: Stored) -> list[str]:
    """Every claim with the difference, its interval and the verdict; those that were not measured at the end."""
    registered = {_identity(one): one for one in claims()}
    edges = at_the_edge(stored)
    rows, missing = [], []
    for row in stored.numbers["claims"]:
        claim = registered[_identity(row)]
        if row["verdict"] == NOT_MEASURED:
            missing.append(row["claim"])
            continue
        low, high = row["interval"]
        margin = f", m = {row['margin']:g}" if row["margin"] else ""
        unit = f" ({UNITS[row['measure']]})" if row["measure"] in UNITS else ""
        compared = [row[side] or "" for side in ("first", "second")]
        marked = " ‡" if any(fnmatchcase(edge, one) for edge in edges for one in compared) else ""
        cells = [f"{row['claim']}{marked}", f"“{claim['quote']}”, {claim['where']}"]
        cells += [f"{row['effect']:+.2f}{unit}{margin}", f"{low:+.2f} to {high:+.2f}"]
        cells += [", ".join(f"{one:+.2f}" for one in row["by_seed"]), row["verdict"]]
        rows.append(cells)
    lines = _table(["claim", "in the paper", "difference, points", "95 % interval", "by seed", "verdict"], rows)
    if edges:
        lines += ["", "‡ a coefficient was chosen at an edge of its grid on some seed: the method may do better."]
    if missing:
        listed = "".join(f"<li>{html.escape(one, quote=False)}</li>" for one in missing)
        said = f"{len(missing)} claims are not measured on this instrument"
        lines += ["", f"<details><summary>{said}</summary><ul>{listed}</ul></details>"]
    return lines


def accuracies(stored: Stored) -> list[str]:
    """Mean accuracy of every regime and method, with what was chosen."""
    rows = []
    for regime, found in stored.numbers["regimes"].items():
        seeds = list(found["seeds"].values())
        rows.append([regime, "individual", *_spread([_mean(one["individual"]) for one in seeds]), ""])
        for name in dict.fromkeys(name for one in seeds for name in one["merged"]):
            merged = [one["merged"][name] for one in seeds if name in one["merged"]]
            if any(name == f"{kind}_{task}" for kind in FAMILIES for task in stored.tasks):
                continue
            chosen = [one["coefficient"] for one in merged if one.get("values")]
            shown = ", ".join(f"{one:g}" for one in chosen if isinstance(one, int | float))
            rows.append([regime, name, *_spread([_mean(one["accuracy"]) for one in merged]), shown])
    zero = [["", "zero-shot", f"{100 * _mean(stored.numbers['zero_shot']):.1f}", ""]]
    return _table(["regime", "method", "accuracy", "chosen"], zero + rows)


def rates(stored: Stored) -> list[str]:
    """Learning rates with the accuracies on validation data that they were chosen by."""
    rows = []
    for name, one in stored.numbers["rates"].items():
        if one:
            tried = ", ".join(f"{rate}: {100 * accuracy:.1f}" for rate, accuracy in one["tried"].items())
            rows.append([name, f"{one['rate']:g}", tried or "chosen before, [regimes](regimes.md)"])
    of = ", ".join(experiments()["instruments"][stored.instrument]["choice_tasks"])
    return _table(["regime", "learning rate", f"tried: validation accuracy of {of}, seed 0"], rows) if rows else []


def interference(stored: Stored) -> list[str]:
    """τJp beside accuracy at coefficient 1 by regime, and their rank correlation."""
    rows, pairs = [], []
    for regime, found in stored.numbers["regimes"].items():
        seeds = [one for one in found["seeds"].values() if one.get("tau_jp")]
        if not seeds:
            continue
        norms = [mean(value for row in one["tau_jp"].values() for value in row.values()) for one in seeds]
        normal = [_normalised(one, "task_arithmetic_1") for one in seeds]
        pairs += list(zip(norms, normal, strict=True))
        rows.append([regime, f"{mean(norms):.3f}", *_spread(normal)])
    if len(rows) < 3:
        return []
    found = stats.spearmanr([one for one, _ in pairs], [other for _, other in pairs])
    return [
        *_table(["regime", "mean ‖τJp‖ on other tasks", "normalised accuracy at α = 1"], rows),
        "",
        f"Spearman's rank correlation over {len(pairs)} runs: {found.statistic:.2f}.",
    ]


def explanations() -> dict[str, str]:
    """Claim -> the paragraphs written about it."""
    text = EXPLANATIONS.read_text(encoding="utf-8") if EXPLANATIONS.exists() else ""
    parts = text.split("\n### ")[1:]
    return {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in parts}


def surprises(every: Sequence[Stored]) -> list[str]:
    """What was written about claims that do not hold somewhere, and which of these nothing was written about."""
    failed = dict.fromkeys(
        row["claim"] for stored in every for row in stored.numbers["claims"] if row["verdict"] == NOT
    )
    written, lines = explanations(), []
    for claim, paragraphs in written.items():
        lines += [f"### {claim}", "", paragraphs, ""]
    if without := [claim for claim in failed if claim not in written]:
        lines += [f"Not explained yet: {'; '.join(without)}.", ""]
    return lines


def at_the_edge(stored: Stored) -> set[str]:
    """``regime/method`` whose coefficient was chosen at an end of its grid on some seed, where the grid goes on."""
    found = set()
    for regime, one in stored.numbers["regimes"].items():
        for seed in one["seeds"].values():
            for name, merged in seed["merged"].items():
                values = merged.get("values")
                if values and len(values) > 2 and merged["coefficient"] == max(values) and max(values) != 1.0:
                    found.add(f"{regime}/{name}")
                if values and len(values) > 2 and merged["coefficient"] == min(values) and min(values) > 0:
                    found.add(f"{regime}/{name}")
    return found


def published() -> list[str]:
    """The papers' own numbers, by model and family of fine-tuned weights."""
    models = ["ViT-B/32", "ViT-B/16", "ViT-L/14"]
    rows = [
        [name, *(f"{numbers[model]:g}" if model in numbers else "" for model in models), family, source]
        for name, numbers, family, source in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["rows"]
    ]
    return _table(["method", *models, "weights", "source"], rows)


def instrument_part(stored: Stored, level: str = "##") -> list[str]:
    """All tables of one instrument."""
    numbers = stored.numbers
    hours = sum(one["seconds"] for one in numbers["regimes"].values()) / 3600
    scripts: dict[str, list[str]] = {}
    for name, one in numbers["regimes"].items():
        if "script" in one:
            scripts.setdefault(f"the rows of `{one['script']}`", []).append(name)
    lines = [f"{level} Claims", "", *claim_table(stored), "", f"{level} Accuracies", ""]
    lines += [
        f"Test accuracy in percent, mean over tasks ± standard deviation over seeds; {numbers['model']['name']}, "
        f"{numbers['model']['parameters']:,} parameters, torch {numbers['versions']['torch']}, {machines(numbers)}"
        + (f"; the suites' stages took {hours:.1f} hours of one process." if hours else ".")
        + "".join(f" {', '.join(names)}: {script}." for script, names in scripts.items()),
        "",
        *accuracies(stored),
    ]
    for title, part in (("Interference", interference(stored)), ("Learning rates", rates(stored))):
        lines += ["", f"{level} {title}", "", *part] if part else []
    return lines


def machines(numbers: Mapping[str, Any]) -> str:
    """What the seeds of an instrument ran on."""
    if accelerator := numbers["hardware"].get("accelerator"):
        return str(accelerator)
    ran = [
        seed["machine"] for one in numbers["regimes"].values() for seed in one["seeds"].values() if "machine" in seed
    ]
    found = dict.fromkeys(_machine(one) for one in ran)
    return " and ".join(found) or str(numbers["hardware"]["processor"])


def _machine(one: Mapping[str, Any]) -> str:
    widened = " (products of bfloat16 in float32, rounded: `benchmarks/widened.py`)" if one["widened"] else ""
    return f"{one['processor']}{widened}"


def truth_page_head() -> list[str]:
    """The head of docs/results.md: the rule, the counts, every claim by instrument, what is surprising."""
    every = [Stored(name) for name in known_instruments()]
    suite = json.loads(text_suite.RESULTS.read_text(encoding="utf-8"))
    lines = ["## The rule", "", *RULE.splitlines(), "", "## Counts", "", *counts(every, suite), ""]
    lines += ["## text_full: a published sentence encoder, merges of full fine-tuning", ""]
    lines += ["Protocol and every task's accuracy: [results on a real network](text_results.md).", ""]
    lines += [*text_suite.claim_table(suite), ""]
    for stored in every:
        about = experiments()["instruments"][stored.instrument]["about"]
        lines += [f"## {stored.instrument}: {about}", "", *instrument_part(stored, "###"), ""]
    if found := surprises(every):
        lines += ["## What is surprising", "", *found]
    return lines


def text_page() -> str:
    """docs/text_results.md with the tables of the text instrument, fine-tuning regimes, if they are there."""
    text = TEXT_PAGE.read_text(encoding="utf-8")
    if "text" not in known_instruments():
        return text
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    stored = Stored("text")
    lines = [*counts([stored]), "", *instrument_part(stored, "###")]
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}"


def write_pages() -> None:
    """Write both pages."""
    import results_page

    write_text(TEXT_PAGE, text_page())
    write_text(results_page.PAGE, results_page.page())


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["claim"], row["first"], row["second"], row["measure"]


def _mean(accuracy: Mapping[str, float]) -> float:
    return mean(accuracy.values())


def _normalised(seed: Mapping[str, Any], name: str) -> float:
    own, merged = seed["individual"], seed["merged"][name]["accuracy"]
    return mean(merged[task] / own[task] for task in own)


def _spread(values: Sequence[float]) -> list[str]:
    percent = [100 * value for value in values]
    return [f"{mean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = [":--" for _ in head]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        write_pages()
        return
    import results_page

    for path, text in ((TEXT_PAGE, text_page()), (results_page.PAGE, results_page.page())):
        if path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)}: run python benchmarks/claims_page.py")


if __name__ == "__main__":
    main()
