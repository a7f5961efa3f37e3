"""One run of benchmarks/adamerging.py, in a process of its own: what it measured is the last line that it prints.

python benchmarks/adamerging_run.py '{"kind": "steps", "tool": "lit_merge", …}'
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

TOOLS = {  # the contenders, and what they import: that is not counted
    "paper": "adamerging_peers",
    "fusion_bench": "fusion_bench.method.adamerging.layer_wise_adamerging",
    "lit_merge": "lit_merge.modules",
}
MIB = 2**20


def resident(key: str) -> float:
    """A line of the process's status in MiB: ``VmRSS`` now, ``VmHWM`` at its peak, ``RssAnon`` without files' pages."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


class Anonymous(threading.Thread):
    """The peak of resident memory that is no file's, looked at every few milliseconds: the kernel keeps none of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_asked = 0.0, threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.005):
            self.peak = max(self.peak, resident("RssAnon"))

    def end(self) -> float:
        self._stop_asked.set()
        self.join()
        return self.peak


def synchronise(device: str) -> None:
    """Wait until the device has done what it was told."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def steps(job: dict[str, Any]) -> dict[str, Any]:
    """One run of some steps; the gradient of the first one is written beside the inputs."""
    import torch

    importlib.import_module(TOOLS[job["tool"]])
    import adamerging_peers as peers
    from safetensors.torch import save_file
    from torch.optim.optimizer import register_optimizer_step_post_hook

    before, before_anonymous, device = resident("VmRSS"), resident("RssAnon"), job["device"]
    inputs = peers.Inputs(Path(job["folder"]), job["model"], job["vectors"], job["images"], device)
    run = getattr(peers, job["tool"])(inputs, job["storage"])
    gradients: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not gradients:
            gradients.append(optimizer.param_groups[0]["params"][0].grad.detach().cpu().clone())

    register_optimizer_step_post_hook(keep)
    marks: list[float] = []

    def mark() -> None:
        synchronise(device)
        marks.append(time.perf_counter())

    trim_memory()
    setup_peak = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Anonymous() if job["watch"] else None  # it costs the steps a little
    if watch:
        watch.start()
    run(1 + job["steps"], mark)
    seconds = [later - earlier for earlier, later in pairwise(marks[1:])]
    found = {"seconds": round(median(seconds), 6), "peak_mib": round(resident("VmHWM") - before, 1)}
    found["setup_peak_mib"] = round(setup_peak - before, 1)
    if watch:
        found["anonymous_mib"] = round(watch.end() - before_anonymous, 1)
    if device == "cuda":
        found["cuda_peak_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
    gradient = gradients[0].T if job["tool"] == "paper" else gradients[0]  # (T, L)
    save_file({"gradient": gradient.contiguous()}, gradient_file(job))
    return found


def trim_memory() -> None:
    """Give back what the C library keeps of freed memory, so that the set-up's temporaries are not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def gradient_file(job: dict[str, Any]) -> Path:
    """Where a run leaves its gradient."""
    return Path(job["folder"]) / f"gradient-{job['tool']}-{job['images']}.safetensors"


def parts(job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of the merge, of the network and of a copy, which take turns in one process."""
    import adamerging_peers as peers
    import torch

    device = job["device"]
    inputs = peers.Inputs(Path(job["folder"]), job["model"], job["vectors"], job["images"], device)
    source = torch.ones(512 * MIB // 4, device=device)  # larger than any cache
    target = torch.empty_like(source)
    timed: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), **peers.parts(inputs)}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(1 + job["steps"]):
        for name, function in timed.items():
            repeats = 4 if name == "copy" else 1
            synchronise(device)
            started = time.perf_counter()
            for _ in range(repeats):
                function()
            synchronise(device)
            seconds[name].append((time.perf_counter() - started) / repeats)
    found = {name: median(values[1:]) for name, values in seconds.items()}  # after one of each to warm up
    parameters = sum(value.numel() for value in inputs.network.parameters())
    bandwidth = 2 * source.nbytes / found.pop("copy")
    moved = (2 * job["vectors"] + 3) * 4 * parameters
    return {
        **{f"{name}_seconds": round(value, 6) for name, value in found.items()},
        "copy_gb_per_second": round(bandwidth / 1e9, 2),
        "moved_gb": round(moved / 1e9, 3),
        "limit_seconds": round(moved / bandwidth, 6),
        "parameters": parameters,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps((parts if given["kind"] == "parts" else steps)(given)))
