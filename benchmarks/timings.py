"""How long the main job takes on this machine: drawing the suite, fine-tuning one task, the whole quickstart, twice.

Each is a process of its own, started as a user would, imports included; run it with nothing else running.

    python benchmarks/timings.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions

ROOT = Path(__file__).parents[1]
DRAW = (
    "from lit_merge.data import EMBEDDED_TASKS, load_split\n"
    "for task in EMBEDDED_TASKS:\n"
    "    for split in ('train', 'val', 'test'):\n"
    "        load_split(task, split)\n"
)


def seconds(arguments: list[str], folder: str) -> float:
    """Wall-clock time of a process with a cache of its own."""
    started = time.perf_counter()
    environment = {**os.environ, "LIT_MERGE_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], check=True, cwd=folder, env=environment, capture_output=True)
    return round(time.perf_counter() - started, 1)


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/timings.json")
    parser.add_argument("--tasks", nargs="+", default=["digits", "textures", "scenes"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        full = [str(ROOT / "configs/finetune/full.yaml"), "--trainer.enable_checkpointing", "false"]
        quickstart = ["-m", "lit_merge", "suite", "--config", str(ROOT / "configs/suite/quickstart.yaml")]
        measured = {
            "quickstart (nothing cached)": seconds(quickstart, folder),
            "quickstart, started again": seconds(quickstart, folder),
            "quickstart by stage": json.loads(Path(folder, "runs/quickstart/timings.json").read_text(encoding="utf-8")),
            "fit, 120 steps, with imports": {
                task: seconds(["-m", "lit_merge", "fit", "--config", *full, "--data.task", task], folder)
                for task in options.tasks
            },
        }
    with tempfile.TemporaryDirectory() as folder:
        measured["drawing all eight tasks"] = seconds(["-c", DRAW], folder)
    result = {"seconds": measured, "versions": versions(), "hardware": hardware()}
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result["seconds"], indent=2) + "\n")


if __name__ == "__main__":
    main()
