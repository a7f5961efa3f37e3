"""Differencing and importing a ViT-L/14 pair: peak memory and time, for every form in which such pairs are published.

The pair is a whole CLIP in float32 with random weights, 1.7 GB each (1.4 GB as pickled encoder objects, which have no
text transformer). Each run is a process of its own. ``difference`` computes the task vector of the image tower and its
base's fingerprint, piece by piece, and keeps nothing; ``own names`` that of all tensors, text tower included;
``import`` is the command ``lit-merge import``, which also compares the text towers and writes the task vector,
synchronised to disk.

Memory is above that of the interpreter with the package imported: the peak of resident memory, pages of mapped files
included, as the kernel keeps it (VmHWM), and the largest anonymous memory (RssAnon), sampled every two milliseconds.
Files are in the page cache when they are read, as they have just been written.

    python benchmarks/checkpoints.py --output benchmarks/results/checkpoints.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
MODEL = "ViT-L-14"
GOAL = 400  # MB
WAYS = ("difference", "own names", "import")
START, END = "<!-- checkpoints: written by benchmarks/checkpoints.py -->", "<!-- end of checkpoints -->"


class ImageEncoder(nn.Module):
    """An encoder object as the task-arithmetic papers pickled it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def random_clip() -> nn.Module:
    """The architecture with random weights, without its own slower initialisation."""
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(MODEL))
    model = model.to_empty(device="cpu")
    move(model, 0.02, start=True)
    return model


@torch.no_grad()
def move(model: nn.Module, size: float, start: bool = False) -> None:
    """Add noise to every parameter, or set it to noise."""
    generator = torch.Generator().manual_seed(0 if start else 1)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(0, size, generator=generator)
        parameter.copy_(noise) if start else parameter.add_(noise)


def write_safetensors(path: Path, model: Any) -> Path:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_state_dict(path: Path, model: Any) -> Path:
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def write_module(path: Path, model: Any) -> Path:
    """``torch.save(encoder)`` by a program whose package is ``src``."""
    module = types.ModuleType("src.modeling")
    module.ImageEncoder = ImageEncoder  # type: ignore[attr-defined]
    sys.modules |= {"src": types.ModuleType("src"), "src.modeling": module}
    ImageEncoder.__module__ = "src.modeling"
    text, model.transformer = model.transformer, None
    del model.transformer
    torch.save(ImageEncoder(model), path.with_suffix(".pt"))
    model.transformer = text
    return path.with_suffix(".pt")


def write_transformers(path: Path, model: Any) -> Path:
    """``save_pretrained`` of transformers' CLIPModel in shards."""
    from transformers import CLIPConfig, CLIPModel

    from lit_merge.checkpoints.layouts.towers import written_as

    state = written_as(model.state_dict(), "transformers")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    shared = {"projection_dim": 768}
    with torch.device("meta"):
        clip = CLIPModel(
            CLIPConfig(
                vision_config={**vision, **shared, "image_size": 224, "patch_size": 14},
                text_config={**text, **shared},
                **shared,
            )
        )
    clip = clip.to_empty(device="cpu")
    clip.load_state_dict({name: state[name] for name in clip.state_dict()})
    clip.save_pretrained(path, max_shard_size="500MB")
    return path


FORMATS: dict[str, Callable[[Path, Any], Path]] = {
    "safetensors": write_safetensors,
    "state dict": write_state_dict,
    "whole module": write_module,
    "transformers, sharded": write_transformers,
}


def prepare(folder: Path, kind: str) -> None:
    """Write θ0 and θ."""
    model = random_clip()
    (folder / "task").mkdir()
    FORMATS[kind](folder / "base", model)
    tower = model.visual
    move(tower, 1e-3)
    FORMATS[kind](folder / "task" / "tuned", model)


class Peak:
    """The memory that the process takes above what it has when this is made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._read()
        self.anonymous, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _read(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        pairs = (line.split()[:2] for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon")))
        return {name.rstrip(":"): int(size) * 1024 for name, size in pairs}

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.anonymous = max(self.anonymous, self._read()["RssAnon"] - self._before["RssAnon"])

    def stop(self) -> dict[str, int]:
        """In MB."""
        self._stop.set()
        self._thread.join()
        resident = self._read()["VmHWM"] - self._before["VmRSS"]
        return {"resident": round(resident / 1e6), "anonymous": round(self.anonymous / 1e6)}


def measure(way: str, base: str, tuned: str, output: str) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_num_threads(1)
    import lit_merge.commands.import_
    from lit_merge.files.lazy import stream
    from lit_merge.vectors import TaskVector

    peak, begin = Peak(), time.perf_counter()
    if way == "import":
        lit_merge.commands.import_.import_checkpoints(tuned, base, output=output)
    else:
        names: Any = "image_tower" if way == "difference" else "own"
        vector = TaskVector.from_checkpoints(base, tuned, names=names)
        for _, piece in stream(vector, list(vector)):
            assert piece.numel()
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "peak_mb": peak.stop()}


def table(result: dict[str, Any]) -> str:
    """The table of docs/checkpoints.md."""
    lines = [
        "| format | GB each | way | seconds | peak resident memory, MB | anonymous, MB |",
        "| :-- | --: | :-- | --: | --: | --: |",
    ]
    for row in result["rows"]:
        peak = row["peak_mb"]
        lines.append(
            f"| {row['format']} | {row['gigabytes_each']:.2f} | {row['way']} | {row['seconds']:.1f} | "
            f"{peak['resident']} | {peak['anonymous']} |"
        )
    return "\n".join(lines)


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process ended with {done.returncode}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/checkpoints.json")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        return prepare(Path(options.prepare[0]), options.prepare[1])
    if options.measure:
        return print(json.dumps(measure(*options.measure)))
    rows = []
    for kind in FORMATS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run("--prepare", name, kind)
            base, tuned = (next(folder.glob(pattern)) for pattern in ("base*", "task/tuned*"))
            size = sum(path.stat().st_size for path in ([base] if base.is_file() else base.iterdir()))
            for way in WAYS:
                output = folder / "task_vector.safetensors"
                found = json.loads(run("--measure", way, str(base), str(tuned), str(output)).splitlines()[-1])
                rows.append({"format": kind, "gigabytes_each": round(size / 1e9, 2), "way": way, **found})
                print(rows[-1], flush=True)
                output.unlink(missing_ok=True)
            shutil.rmtree(folder / "task")
    from lit_merge.report.environment import hardware, versions

    largest = max(row["peak_mb"]["resident"] for row in rows)
    result = {
        "model": MODEL,
        "goal_mb": GOAL,
        "largest_peak_mb": largest,
        "rows": rows,
        "versions": versions(),
        "hardware": hardware(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    from placing import place_between  # not in a peer's environment, which has no lit-merge

    place_between(ROOT / "docs/checkpoints.md", START, END, table(result))
    if largest > GOAL:
        raise SystemExit(f"expected at most {GOAL} MB, got {largest}")


if __name__ == "__main__":
    main()
