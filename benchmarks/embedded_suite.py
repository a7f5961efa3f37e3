"""The measured table: run the full protocol on the embedded suite, keep its JSON, and put table and picture in place.

Goes on where it stopped. Everything written is derived from ``results.json``: the README's table, ``docs/results.png``.

    python benchmarks/embedded_suite.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

from lit_merge.commands.main import run
from lit_merge.files.text import write_text
from lit_merge.report import Results, markdown_table, results_figure

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: written by benchmarks/embedded_suite.py -->", "<!-- end of results -->"


def place(results: dict[str, Any]) -> None:
    """Write the README's table and the picture from results."""
    loaded = Results.from_dict(results)
    results_figure(loaded, ROOT / "docs" / "results.png")
    place_between(ROOT / "README.md", START, END, f"{markdown_table(loaded)}\n{facts(results)}")


def facts(results: dict[str, Any]) -> str:
    """One line on how the table came about."""
    lengths = [
        100 * vector["relative_norm"] for seed in results["seeds"].values() for vector in seed["task_vectors"].values()
    ]
    hardware, versions = results["hardware"], results["versions"]
    return (
        f"Test accuracy in percent, {len(results['seeds'])} fine-tuning seeds (± their standard deviation), "
        f"coefficients chosen on validation data; ‖τ‖/‖θ0‖ {min(lengths):.1f}–{max(lengths):.1f} %; "
        f"{hardware['cores']} cores ({hardware['processor']}), torch {versions['torch']}. "
        "From `benchmarks/results/embedded_suite.json`, written by `benchmarks/embedded_suite.py`."
    )


def main() -> None:
    """Run the suite, then keep what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/suite/embedded.yaml")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/embedded_suite.json")
    parser.add_argument("--only_place", action="store_true", help="do not run, only rewrite README and picture")
    options = parser.parse_args()
    if not options.only_place:
        results = run(["suite", "--config", str(options.config)])
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
        kept = {**results, "commit": commit.stdout.strip()}
        write_text(options.output, json.dumps(kept, indent=2) + "\n")
    place(json.loads(options.output.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
