"""How long commands take that neither train nor evaluate, before and after, and ``import torch`` as a measure.

    python benchmarks/startup.py BEFORE AFTER

BEFORE and AFTER are folders of checkouts. Every command runs in a process of its own, by turns on both sides, with the
files in the system's cache; run it with nothing else running. The times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "import torch"
COMMANDS = {
    "--help": ["--help"],
    "merge --help": ["merge", "--help"],
    "inspect FILE": ["inspect", "vector.safetensors"],
    "import --help": ["import", "--help"],
    "data list": ["data", "list"],
    "fit --help": ["fit", "--help"],
}
WRITE = (
    "import torch; from lit_merge import TaskVector;"
    "TaskVector({f'layer.{i}.weight': torch.ones(64, 64) for i in range(100)}, 'digits').save('vector.safetensors')"
)


def run(words: list[str], checkout: Path | None, folder: str) -> tuple[float, float]:
    """Seconds and the most memory, in MiB, of a Python process."""
    environment = {**os.environ, "PYTHONPATH": "" if checkout is None else str(checkout)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)}: {said.strip()[-500:]}")
    return seconds, used.ru_maxrss / 1024


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/startup.json")
    options = parser.parse_args()
    sides = {"before": options.before.resolve(), "after": options.after.resolve()}
    seconds: dict[str, dict[str, list[float]]] = {TORCH: {"python": []}}
    seconds |= {name: {side: [] for side in sides} for name in COMMANDS}
    memory: dict[str, dict[str, float]] = {name: {} for name in seconds}

    def note(name: str, side: str, words: list[str], folder: str, measured: bool) -> None:
        took, used = run(words, sides.get(side), folder)
        if measured:
            seconds[name][side].append(round(took, 3))
            memory[name][side] = round(max(used, memory[name].get(side, 0.0)), 1)

    with tempfile.TemporaryDirectory() as folder:
        run(["-c", WRITE], sides["before"], folder)
        for turn in range(options.runs + 1):  # the first one fills the caches
            note(TORCH, "python", ["-c", TORCH], folder, measured=turn > 0)
            for name, arguments in COMMANDS.items():
                for side in sides if turn % 2 else reversed(sides):
                    note(name, side, ["-m", "lit_merge", *arguments], folder, measured=turn > 0)
    middle = {name: {side: statistics.median(values) for side, values in one.items()} for name, one in seconds.items()}
    torch = middle[TORCH]["python"]
    sys.stdout.write(f"import torch: {torch:.2f} s\n")
    ratios = {}
    for name in COMMANDS:
        before, after = middle[name]["before"], middle[name]["after"]
        ratios[name] = {"after / before": round(after / before, 3), "after / import torch": round(after / torch, 3)}
        sys.stdout.write(
            f"{name}: {before:.2f} s -> {after:.2f} s, {after / before:.2f} of before, {after / torch:.2f} of import "
            f"torch; {memory[name]['before']:.0f} -> {memory[name]['after']:.0f} MiB\n"
        )
    from lit_merge.report.environment import hardware, versions  # late: a child's memory begins as its parent's

    result = {"seconds": seconds, "median": middle, "ratios": ratios, "memory_mib": memory}
    result |= {"versions": versions(), "hardware": hardware()}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
