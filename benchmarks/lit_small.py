"""How lit-small was made: pre-trains it, measures it zero-shot, and pins the released file.

Usage::

    python benchmarks/lit_small.py --output FOLDER [--workers 16]   # pre-trains; writes the weights and lit_small.json
    python benchmarks/lit_small.py --output FOLDER --weights FILE   # measures weights that are there
    python benchmarks/lit_small.py --pin FILE                       # writes their SHA-256 where the package looks

The record has the losses, seconds of drawing and of training, and zero-shot accuracies on validation images of the
eight tasks of the embedded suite and the twenty of the finer one, of lit-small and lit-tiny.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_merge.data import DRAWN_TASKS, load_split
from lit_merge.data.pretraining import CaptionDataModule
from lit_merge.models import load_clip

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/pretrain/lit_small.yaml"
PIN = ROOT / "lit_merge/models/assets/released.json"
SIZES = {"val": 1000}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pretrain(output: Path, workers: int, options: list[str]) -> tuple[Path, dict[str, Any]]:
    """Draw, train, and say how long each took."""
    data = dict(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]["init_args"])
    given = dict(option.removeprefix("--data.").split("=", 1) for option in options if option.startswith("--data."))
    data |= {name: yaml.safe_load(value) for name, value in given.items()} | {"workers": workers}
    started = time.perf_counter()
    CaptionDataModule(**data).prepare_data()
    drawn = time.perf_counter()
    print(f"drawn in {drawn - started:.0f} s", flush=True)
    weights = output / "lit-small.safetensors"
    run = output / "run"
    command = [
        *(sys.executable, "-m", "lit_merge", "fit", "--config", str(CONFIG), "--output", str(run)),
        *(f"--model.output={weights}", f"--data.workers={workers}", "--trainer.enable_progress_bar=false", *options),
    ]
    subprocess.run(command, check=True)
    seconds = {"drawing": round(drawn - started, 1), "training": round(time.perf_counter() - drawn, 1)}
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        losses = [
            {"step": int(row["step"]), "loss": float(row["train/loss"]), "accuracy": float(row["train/accuracy"])}
            for row in csv.DictReader(file)
            if row.get("train/loss")
        ]
    shutil.rmtree(run)  # checkpoints with the optimiser's state are larger than what comes back from a machine
    return weights, {"seconds": seconds, "images": data["count"], "losses": losses}


@torch.no_grad()
def zero_shot(model: str, pretrained: str | None, tasks: list[str]) -> dict[str, float]:
    """Accuracy in percent on validation images, of a head made of class names and templates."""
    clip = load_clip(model, pretrained)
    visual = clip.visual.to(device()).eval()
    found = {}
    for name in tasks:
        task = DRAWN_TASKS[name]
        texts = torch.stack(
            [clip.encode_text([template.format(one) for one in task.classes]) for template in task.templates]
        )
        head = torch.nn.functional.normalize(texts.mean(0), dim=-1).to(device())
        images, labels = load_split(name, "val", sizes=SIZES if task.draw else None)
        features = torch.cat([visual(clip.preprocessing.normalise(part.to(device()))) for part in images.split(500)])
        hits = (features @ head.T).argmax(-1).cpu() == labels
        found[name] = round(100 * hits.double().mean().item(), 2)
        print(f"{model} {name}: {found[name]}", flush=True)
    return found


def pin(weights: Path) -> None:
    """Write the hash of the released file into the one place that has it."""
    facts = json.loads(PIN.read_text(encoding="utf-8"))
    facts["lit-small"]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    PIN.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the weights and the record")
    parser.add_argument("--weights", type=Path, help="measure these instead of pre-training")
    parser.add_argument("--pin", type=Path, help="only write this file's hash where the package looks")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--tasks", nargs="+", default=list(DRAWN_TASKS))
    arguments, options = parser.parse_known_args()
    if arguments.pin:
        return pin(arguments.pin)
    if arguments.output is None:
        parser.error("--output: expected a folder, got none")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    weights = arguments.weights
    if weights is None:
        weights, record = pretrain(arguments.output, arguments.workers, options)
    record["bytes"], record["sha256"] = weights.stat().st_size, hashlib.sha256(weights.read_bytes()).hexdigest()
    record["torch"] = torch.__version__
    record["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    path = arguments.output / "lit_small.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["zero_shot"] = {
        model: zero_shot(model, pretrained, arguments.tasks)
        for model, pretrained in (("lit-small", str(weights)), ("lit-tiny", None))
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
