"""The hits that benchmarks/learned_merges.py has stored, in the form in which claims are judged.

    python benchmarks/collect_learned_merges.py    # then python benchmarks/claims_page.py

On the embedded suite benchmarks/all.py needs hours of two cores for the claims on learned merges. The same was measured
before with the schedule that validation images chose, three seeds, a bit for every test image. This takes those rows
over as the regimes ``full``, ``learned`` and ``learned_more``, until suites of these have been collected.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from collected import COLLECTED, INDIVIDUAL, JOINT, ZERO_SHOT, Stored, judged, written
from suites import ROOT

from lit_merge.data import EMBEDDED_TASKS
from lit_merge.files.text import write_text
from lit_merge.report.hits import save_hits

INSTRUMENT = "embedded"
SOURCE = ROOT / "benchmarks/results/learned_merges.json"
REFERENCES = {ZERO_SHOT: "zero-shot", INDIVIDUAL: "individual", JOINT: "joint"}
METHODS: dict[str, dict[str, str]] = {
    "full": {
        **{"weight_average": "average", "task_arithmetic": "task arithmetic", "ties": "TIES", "lines": "LiNeS"},
    },
    "learned": {
        **{"task_arithmetic": "task arithmetic", "ties": "TIES", "task_wise": "task-wise", "layer_wise": "layer-wise"},
        **{"layer_wise_plus_plus": "layer-wise ++", "layer_wise_held_out": "layer-wise, on validation images"},
        "supervised_layer_wise": "supervised layer-wise, on validation images",
        "layer_wise_without_letters_land": "layer-wise without letters and land",
        "layer_wise_without_digits_scenes": "layer-wise without digits and scenes",
        "task_arithmetic_without_letters_land": "task arithmetic without letters and land",
        "task_arithmetic_without_digits_scenes": "task arithmetic without digits and scenes",
    },
    "learned_more": {
        **{"task_arithmetic": "task arithmetic", "layer_wise": "layer-wise"},
        "layer_wise_1_percent": "layer-wise, 1 % of the images",
        "layer_wise_5_percent": "layer-wise, 5 % of the images",
    },
}
"""Regime -> method -> what its rows are called."""


def hits(row: dict[str, Any]) -> dict[str, Tensor]:
    """Task -> which test images were right, bool ``[N]``."""
    found = {}
    for task, packed in row["right"].items():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))
        found[task] = torch.from_numpy(bits[: EMBEDDED_TASKS[task].size("test")]).bool()
    return found


def digest(measured: dict[str, Any]) -> str:
    """Of all rows: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(measured["rows"], sort_keys=True).encode()).hexdigest()[:16]


def packed(measured: dict[str, Any], regime: str) -> dict[str, Tensor]:
    """What the file of a regime holds: ``zero_shot``, and by seed the references and methods, all tasks in a row."""
    rows = {(row["seed"], row["method"]): row for row in measured["rows"]}
    seeds = sorted({seed for seed, _ in rows})
    found = {ZERO_SHOT: _joined(rows[seeds[0], REFERENCES[ZERO_SHOT]])}
    names = {name: row for name, row in {**REFERENCES, **METHODS[regime]}.items() if name != ZERO_SHOT}
    for seed in seeds:
        found |= {f"{seed}/{name}": _joined(rows[seed, row]) for name, row in names.items()}
    return found


def numbers(measured: dict[str, Any], regime: str) -> dict[str, Any]:
    """The regime's part of the JSON."""
    rows = {(row["seed"], row["method"]): row for row in measured["rows"]}
    seeds: dict[str, Any] = {}
    for seed in sorted({seed for seed, _ in rows}):
        merged = {name: _described(rows[seed, row]) for name, row in METHODS[regime].items()}
        individual, joint = (_accuracy(rows[seed, REFERENCES[name]]) for name in (INDIVIDUAL, JOINT))
        seeds[str(seed)] = {"individual": individual, "references": {JOINT: joint}, "merged": merged}
    steps = {"schedule": measured["schedule"], "choices": "benchmarks/results/regimes.json"}
    script = "benchmarks/learned_merges.py"
    return {"script": script, "digest": digest(measured), "settings": steps, "seconds": 0.0, "seeds": seeds}


def _described(row: dict[str, Any]) -> dict[str, Any]:
    return {"accuracy": _accuracy(row), "coefficient": row.get("chosen")}


def _accuracy(row: dict[str, Any]) -> dict[str, float]:
    return {task: round(float(one.double().mean()), 5) for task, one in hits(row).items()}


def _joined(row: dict[str, Any]) -> Tensor:
    found = hits(row)
    return torch.cat([found[task] for task in EMBEDDED_TASKS])


def main() -> None:
    """Write the files of the regimes that no suite has been collected of."""
    measured = json.loads(SOURCE.read_text(encoding="utf-8"))
    path = COLLECTED / f"{INSTRUMENT}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    zero = next(row for row in measured["rows"] if row["method"] == REFERENCES[ZERO_SHOT])
    described = {
        **{
            "instrument": INSTRUMENT,
            "model": {"name": "lit-tiny", "parameters": 2734848},
            "tasks": list(EMBEDDED_TASKS),
        },
        "classes": {name: len(task.classes) for name, task in EMBEDDED_TASKS.items()},
        **{key: measured[key] for key in ("versions", "hardware")},
        "zero_shot": _accuracy(zero),
        "examples": {name: task.size("test") for name, task in EMBEDDED_TASKS.items()},
    }
    known = {**described, "rates": {}, "regimes": {}, **known}
    for regime in METHODS:
        if "script" in known["regimes"].get(regime, {"script": ""}):
            known["regimes"][regime] = numbers(measured, regime)
            save_hits(COLLECTED / f"{INSTRUMENT}-{regime}.safetensors", packed(measured, regime))
    known["claims"] = []
    write_text(path, written(known))
    known["claims"] = judged(Stored(INSTRUMENT))
    write_text(path, written(known))
    for row in known["claims"]:
        if "effect" in row:
            print(row["claim"], row["effect"], row["interval"], row["verdict"], sep=" | ")


if __name__ == "__main__":
    main()
