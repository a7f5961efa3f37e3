"""Merging commands as fresh processes: time, memory of the process and all below it, bytes read and written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = [
    "copied",
    "difference",
    "lit_merge_command",
    "measured",
    "mergekit_command",
    "names_of",
    "settle",
    "tensor",
    "weights",
]

PAGE, MIB = os.sysconf("SC_PAGESIZE"), 2**20


def weights(folder: Path) -> list[Path]:
    """The files that hold a model's weights."""
    return sorted(folder.glob("*.safetensors"))


def lit_merge_command(
    base: Path, tuned: Sequence[Path], output: Path, parts: Sequence[Any], shard_size: str
) -> list[str]:
    """``lit-merge merge`` of folders of transformers."""
    given = ["--base", str(base), "--vectors", json.dumps([str(one) for one in tuned])]
    given += ["--parts", json.dumps(list(parts)), "--shard_size", shard_size, "--progress", "false"]
    return [sys.executable, "-m", "lit_merge", "merge", *given, "--output", str(output)]


def mergekit_command(python: Path, recipe: dict[str, Any], config: Path, output: Path, shard_size: str) -> list[str]:
    """``mergekit-yaml`` of a recipe, which is written to ``config``."""
    config.write_text(json.dumps(recipe), encoding="utf-8")
    size = shard_size.upper().removesuffix("B").replace("G", "B")  # in billions, as mergekit spells it
    more = ["--no-copy-tokenizer", "--out-shard-size", size]
    return [str(python), "-m", "mergekit.scripts.run_yaml", str(config), str(output), *more]


def settle(folders: Sequence[Path]) -> None:
    """Write what waits for the disk, and read all inputs: every run finds in memory what has room there."""
    os.sync()
    piece = memoryview(bytearray(MIB))
    for folder in folders:
        for file in weights(folder):
            with file.open("rb", buffering=0) as source:
                while source.readinto(piece):
                    pass


def copied(folders: Sequence[Path], output: Path) -> float:
    """Seconds to read everything once in pieces, and to write as much as the first folder has."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    started, piece = time.perf_counter(), memoryview(bytearray(MIB))
    for folder in folders:
        for file in weights(folder):
            with file.open("rb", buffering=0) as source:
                while source.readinto(piece):
                    pass
    output.mkdir(parents=True)
    with (output / "copy.safetensors").open("wb") as target:
        for _ in range(-(-sum(file.stat().st_size for file in weights(folders[0])) // MIB)):
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - started


def tree(process: int) -> list[int]:
    """A process and all below it."""
    try:
        below = [
            int(child)
            for thread in Path(f"/proc/{process}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except OSError:  # it has just ended
        return []
    return [process, *(one for child in below for one in tree(child))]


def memory(process: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and all below it."""
    resident = anonymous = 0
    for one in tree(process):
        try:
            _, total, shared, *_ = map(int, Path(f"/proc/{one}/statm").read_text().split())
        except (OSError, ValueError):
            continue
        resident, anonymous = resident + total * PAGE, anonymous + (total - shared) * PAGE
    return resident, anonymous


def read_by(process: int) -> int:
    """Bytes that a process and all below it have read so far, from disk or its cache, by system calls."""
    found = 0
    for one in tree(process):
        try:
            lines = Path(f"/proc/{one}/io").read_text().splitlines()
        except OSError:
            continue
        found += next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), 0)
    return found


def measured(arguments: Sequence[str], output: Path, log: Path) -> dict[str, Any]:
    """One run: seconds, peak memory, and bytes read by system calls (``rchar``) and written as weights.

    Raises:
        SystemExit: the process failed; the end of its log is said.
    """
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    environment, peaks, read = {**os.environ, "HF_HUB_OFFLINE": "1"}, (0, 0), 0
    if arguments[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    with log.open("w", encoding="utf-8") as said:
        started = time.perf_counter()
        running = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT, env=environment)
        while running.poll() is None:
            resident, anonymous = memory(running.pid)
            peaks = max(peaks[0], resident), max(peaks[1], anonymous)
            read = max(read, read_by(running.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
    if running.returncode:
        sys.exit(f"{arguments[2:4]}: ended with {running.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")
    written = sum(file.stat().st_size for file in weights(output))
    found = {"seconds": round(seconds, 2), "peak_mib": round(peaks[0] / MIB), "anonymous_mib": round(peaks[1] / MIB)}
    return {**found, "bytes_read": read, "bytes_written": written}


def difference(ours: Path, theirs: Path) -> dict[str, float]:
    """How far two results are from each other: the largest difference, and the fraction of elements that differ."""
    where = [{name: file for file in weights(one) for name in names_of(file)} for one in (ours, theirs)]
    worst, unequal, count = 0.0, 0, 0
    for name in sorted(set(where[0]) & set(where[1])):
        first, second = (tensor(place[name], name).float() for place in where)
        gap = (first - second).abs()
        worst, unequal = max(worst, float(gap.max())), unequal + int((gap > 1e-6).sum())
        count += gap.numel()
    return {"tensors": len(set(where[0]) & set(where[1])), "largest": worst, "fraction_unequal": unequal / count}


def names_of(file: Path) -> list[str]:
    """The tensors of a file."""
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def tensor(file: Path, name: str) -> torch.Tensor:
    """One of a file."""
    with safe_open(file, "pt") as stored:
        return stored.get_tensor(name)
