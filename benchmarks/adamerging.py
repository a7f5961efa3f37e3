"""One optimisation step of layer-wise AdaMerging: ours beside FusionBench's loop and the papers' own scheme.

Network, task vectors, heads and images are random, at the shapes of the literature's suite (eight vectors, ViT-B/32,
the eight tasks' classes); the contenders are in benchmarks/adamerging_peers.py. Every run is a process of its own, the
contenders take turns round by round, and what is compared are the rounds' ratios. After the first round their gradients
with respect to the coefficients are compared; programs that do not compute the same end the benchmark.

``steps``: seconds per step after one step to warm up, and the peak of memory. On a CPU this is resident memory above
that after the imports; on a GPU it is what torch has allocated there, and the device is synchronised whenever the clock
is read.
``parts``: merge forward and backward alone, the network's passes alone (all tasks' images in one batch, plain weights),
and a copy of a large tensor, taking turns in one process. The merge must read every vector twice, θ0 and the gradient
once, and write the merged weights; at the speed of the copy that takes ``limit`` seconds.
``memory``: steps with two, four and eight vectors that are stored in different ways, the images of a step divided among
the tasks, so that what grows is due to the vectors.

    pip install -r benchmarks/requirements.txt
    python benchmarks/adamerging.py
    python benchmarks/adamerging.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import adamerging_table
from adamerging_run import TOOLS, gradient_file

ROOT = Path(__file__).parents[1]
VECTORS, IMAGES = [2, 4, 8], 16  # of the memory runs; the images are a whole step's
TOLERANCE = 1e-3  # of the coefficients' gradients, float32


def start(job: dict[str, Any], memory: int) -> dict[str, Any]:
    """Start a process with a limit on its memory, and read what it measured; too little memory is a result as well.

    Raises:
        SystemExit: it ended for another reason.
    """

    def restrict() -> None:
        if job["device"] == "cpu":  # CUDA reserves addresses without end
            resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))

    arguments = [sys.executable, str(ROOT / "benchmarks/adamerging_run.py"), json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=restrict, check=False, env=environment)
    if ended.returncode:
        said = (ended.stderr.strip().splitlines()[-1:] or ["killed"])[0][:200]
        if not any(sign in said.lower() for sign in ("memory", "alloc", "killed")):
            raise SystemExit(f"{job['tool']}, {job['kind']}: {said}")
        found = {"failed": said, "limit_gib": memory}
    else:
        found = json.loads(ended.stdout.strip().splitlines()[-1])
    print({name: job[name] for name in ("kind", "tool", "images", "vectors", "storage", "device")}, found, flush=True)
    return found


def differences(jobs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each contender's gradient from the first one's: ‖g − g'‖ / ‖g'‖.

    Raises:
        SystemExit: one is larger than :data:`TOLERANCE`.
    """
    from safetensors.torch import load_file

    files = {job["tool"]: gradient_file(job) for job in jobs if gradient_file(job).exists()}
    gradients = {tool: load_file(file)["gradient"].double() for tool, file in files.items()}
    reference = next(iter(gradients.values()), None)
    if reference is None:  # none of them had enough memory
        return {}
    found = {tool: float((value - reference).norm() / reference.norm()) for tool, value in gradients.items()}
    wrong = [f"{tool} {value:.1e}" for tool, value in found.items() if not value <= TOLERANCE]
    if wrong:
        raise SystemExit(f"gradients: expected relative differences up to {TOLERANCE}, got {', '.join(wrong)}.")
    return dict(list(found.items())[1:])


def measure_steps(options: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the contenders' steps."""
    rows = []
    for images in options.images:
        jobs = [
            {**common, "kind": "steps", "tool": tool, "images": images, "storage": "device", "watch": False}
            for tool in options.tools
        ]
        found: dict[str, list[dict[str, Any]]] = {tool: [] for tool in options.tools}
        agreement: dict[str, float] = {}
        for job in jobs:
            gradient_file(job).unlink(missing_ok=True)
        for index in range(options.rounds):
            for job in jobs:
                if not any("failed" in one for one in found[job["tool"]]):
                    found[job["tool"]].append(start(job, options.memory))
            agreement = agreement if index else differences(jobs)
        for tool, runs in found.items():
            row = {"device": options.device, "images_per_task": images, "tool": tool}
            if tool in agreement:
                row["gradient_difference"] = agreement[tool]
            rows.append(row | summary(runs))
    return rows


def summary(runs: list[dict[str, Any]], of_peaks: Callable[[list[float]], float] = max) -> dict[str, Any]:
    """All rounds' numbers of one kind of run: every round's seconds, one peak of memory."""
    failed = [one for one in runs if "failed" in one]
    if failed:
        return failed[0]
    return {
        name: [one[name] for one in runs]
        if name.endswith("seconds") or name == "copy_gb_per_second"
        else of_peaks([one[name] for one in runs])
        for name in runs[0]
    }


def measure_parts(options: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the parts of our step."""
    rows = []
    for images in options.images:
        job = {**common, "kind": "parts", "tool": "lit_merge", "images": images, "storage": "device"}
        runs = [start(job, options.memory) for _ in range(options.rounds)]
        rows.append({"device": options.device, "images_per_task": images} | summary(runs))
    return rows


def measure_memory(options: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of our step with few and with many vectors; peaks are medians, as allocators differ from run to run."""
    rows = []
    for storage in options.storages:
        for vectors in VECTORS:
            here = {"kind": "memory", "tool": "lit_merge", "vectors": vectors, "images": max(1, IMAGES // vectors)}
            job = {**common, **here, "storage": storage, "watch": True}
            runs = [start(job, options.memory) for _ in range(options.rounds)]
            rows.append({"device": options.device, "storage": storage, "vectors": vectors} | summary(runs, median))
    return rows


def peer_versions() -> dict[str, str]:
    """The version of what is compared with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"fusion-bench": version("fusion-bench")}
    except PackageNotFoundError:
        return {"fusion-bench": "not installed"}


def main() -> None:
    """Measure what is asked for, write the JSON, and place the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["steps", "parts", "memory", "place"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="ViT-B-32", help="as for load_clip; lit-tiny is quick to try")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--images", nargs="+", type=int, default=[4, 16], help="images per task")
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument(
        "--storages", nargs="+", choices=list(adamerging_table.STORAGES), default=list(adamerging_table.STORAGES)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed in each process")
    parser.add_argument("--memory", type=int, default=20, help="GiB that a process may allocate")
    parser.add_argument("--folder", type=Path, default=Path("runs/adamerging_benchmark"))
    parser.add_argument("--keep", action="store_true", help="keep the inputs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/adamerging.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"steps": [], "parts": [], "memory": [], "machines": {}}
    if options.output.exists():
        result |= json.loads(options.output.read_text(encoding="utf-8"))
    if set(options.stages) - {"place"}:
        measure(options, result)
    if "place" in options.stages:
        adamerging_table.place(result)


def measure(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Replace the rows of this device and of the stages asked for; written after every stage."""
    import adamerging_peers as peers

    from lit_merge.files.text import write_text
    from lit_merge.report.environment import hardware, versions

    folder = options.folder.resolve() / options.model
    peers.write_inputs(folder, options.model)
    common = {"folder": str(folder), "model": options.model, "vectors": options.vectors, "device": options.device}
    common["steps"] = options.steps
    result |= {"seed": peers.SEED, "model": options.model, "vectors": options.vectors, "tasks": peers.TASKS}
    result["tolerance"] = TOLERANCE
    result["parameters"], tensors = peers.size(folder)
    result["coefficients"] = options.vectors * tensors
    machine = {"hardware": hardware(), "versions": {**versions(), **peer_versions()}}
    machine |= {"rounds": options.rounds, "timed_steps": options.steps}
    result["machines"] = {**result["machines"], options.device: machine}
    for stage, function in (("steps", measure_steps), ("parts", measure_parts), ("memory", measure_memory)):
        if stage in options.stages:
            others = [row for row in result[stage] if row["device"] != options.device]
            result[stage] = others + function(options, common)
            result["goals"] = adamerging_table.judge(result)
            write_text(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
