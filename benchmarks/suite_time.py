"""What a suite costs on this machine: the time of its stages, measured, by kind.

Every stage of a suite leaves its seconds in ``timings.json``. This adds them up, so that a page may say what a suite
took on a device; nothing is extrapolated from another device or network::

    lit-merge suite --config configs/suite/clip8_vit_b32.yaml --data.root /data
    python benchmarks/suite_time.py runs/clip8_vit_b32 --output benchmarks/results/suite_times.json

The record has, by suite, the hardware, the versions, and for fine-tuning, merging, statistics and testing the number of
stages, their seconds in all, and the longest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lit_merge.files.text import write_text

KINDS = {"fit": "fine-tuning", "joint": "fine-tuning on all tasks", "statistics": "statistics", "merge": "merging"}


def kind_of(stage: str) -> str:
    """What a stage does, from its name, e.g. ``seed-0/fit/mnist``."""
    part = stage.split("/")[1] if stage.startswith("seed-") and "/" in stage else stage.split("/")[0]
    return KINDS.get(part, "testing") if not stage.endswith("joint/test") else "testing"


def summary(folder: Path) -> dict[str, Any]:
    """The times of one suite's directory."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    seconds: dict[str, float] = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
    grouped: dict[str, list[float]] = {}
    for stage, value in seconds.items():
        grouped.setdefault(kind_of(stage), []).append(value)
    return {
        "model": results["model"]["name"],
        "tasks": len(results["tasks"]),
        "seeds": len(results["seeds"]),
        "hardware": results["hardware"],
        "versions": results["versions"],
        "hours": round(sum(seconds.values()) / 3600, 3),
        "stages": {
            kind: {"stages": len(values), "seconds": round(sum(values), 1), "longest": round(max(values), 1)}
            for kind, values in grouped.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", type=Path, help="directories of finished suites")
    parser.add_argument("--output", type=Path, help="record to add them to")
    arguments = parser.parse_args()
    found = {folder.name: summary(folder) for folder in arguments.suites}
    if arguments.output is None:
        print(json.dumps(found, indent=2))
        return
    known = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    write_text(arguments.output, json.dumps({**known, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
