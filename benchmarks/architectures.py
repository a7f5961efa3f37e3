"""Merges of transformers' architectures: made from tiny configurations, fine-tuned, merged, opened again, compared.

Of every architecture in tests/builders/tiny_architectures.py two copies are fine-tuned by one step; base and copies are
saved by the library in float32 as one file, and in bfloat16 as shards, and merged by task arithmetic. What the library
opens of the output folder is compared with θ0 + α Σ (θ_t − θ0) in float64: outputs, relative to the largest; and, where
the merge keeps bfloat16, every parameter in units of one rounding.

The run fails if an output differs by more than 1e-5, or a parameter by more than one rounding. It writes the table of
docs/checkpoints.md as well.

    python benchmarks/architectures.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from builders.tiny_architectures import ARCHITECTURES, COEFFICIENT, trial  # noqa: E402

from lit_merge.commands.merge import merge  # noqa: E402
from lit_merge.files.text import write_text  # noqa: E402
from lit_merge.report.environment import hardware, versions  # noqa: E402

PAGE = ROOT / "docs/checkpoints.md"
START, END = "<!-- architectures: written by benchmarks/architectures.py -->", "<!-- end of architectures -->"
LARGEST = 1e-5  # of a difference of outputs
ONE_ROUNDING = 1.0 + 2**-10  # half a unit in the last place of bfloat16, and what float32 has lost before


def measure(names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per architecture, and what is wrong."""
    rows, failures = [], []
    for name in names:
        architecture = ARCHITECTURES[name]
        with tempfile.TemporaryDirectory() as folder:
            errors = trial(architecture, Path(folder), merge)
        rows.append({"architecture": name, "class": architecture.model, "kind": architecture.kind, **errors})
        failures += [f"{name}: {line}" for line in wrong(errors)]
        print(json.dumps(rows[-1]), flush=True)
    return rows, failures


def wrong(errors: dict[str, Any]) -> list[str]:
    """Which errors of a trial are larger than they may be."""
    limits = {"outputs": LARGEST, "roundings": ONE_ROUNDING}
    found = [(setting, what, value) for setting, one in errors.items() if isinstance(one, dict)
             for what, value in one.items()]  # fmt: skip
    return [f"{setting}: {what} {value:.3g}" for setting, what, value in found if not value <= limits[what]]


def table(measured: dict[str, Any]) -> str:
    """The table of docs/checkpoints.md: by kind of network the architectures and the largest errors."""
    kinds = dict.fromkeys(row["kind"] for row in measured["rows"])
    lines = [
        "| kind | architectures | float32 | bfloat16 to float32 | bfloat16, roundings |",
        "| :-- | :-- | --: | --: | --: |",
    ]
    for kind in kinds:
        rows = [row for row in measured["rows"] if row["kind"] == kind]
        whole = max(row["float32"]["outputs"] for row in rows)
        widened = max(row["bfloat16, sharded, to float32"]["outputs"] for row in rows)
        kept = max(row["bfloat16, sharded"]["roundings"] for row in rows)
        names = ", ".join(row["architecture"] for row in rows)
        lines.append(f"| {kind} | {names} | {whole:.1e} | {widened:.1e} | {kept:.2f} |")
    return "\n".join(lines)


def place(measured: dict[str, Any]) -> None:
    """Put the table where it stands in the page."""
    place_between(PAGE, START, END, table(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/architectures.json")
    options = parser.parse_args()
    start = time.perf_counter()
    rows, failures = measure(options.architectures)
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} failures:", *failures]))
    known = {**versions(), "transformers": metadata.version("transformers")}
    settings = {"coefficient": COEFFICIENT, "largest_difference": LARGEST, "largest_rounding": ONE_ROUNDING}
    seconds = round(time.perf_counter() - start, 1)
    result = {"settings": settings, "rows": rows, "seconds": seconds, "versions": known, "hardware": hardware()}
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    if options.architectures == list(ARCHITECTURES):
        place(result)


if __name__ == "__main__":
    main()
