"""FeatCal beside the authors' program, on the same inputs: a tiny vision tower of two to four tasks.

The program is https://github.com/egangu/featcal, of which FOLDER is a checkout; it is run as it is, but for its data
sets, which are the inputs here. It solves in float32, whatever the models' dtype.

    pip install -r benchmarks/requirements.txt
    python benchmarks/parity_featcal.py --program FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from parity_blocks import BATCH_SIZE, IMAGES, SEED, Towers, towers
from torch import Tensor

from lit_merge._version import __version__
from lit_merge.evaluation.calibration import FeatCal
from lit_merge.report.environment import hardware
from lit_merge.transforms import task_arithmetic

START = task_arithmetic(0.3)
SETTINGS = {
    "as published": {},
    "the program's defaults": {"anchor": 2.2, "interpolation": 0.25},
    "λ = 1, anchored at the merge": {"ridge": 1.0, "anchor": 1.0},
    "experts' inputs alone": {"interpolation": 1.0},
}
TOLERANCE = 1e-4  # of a solve in float32


def theirs(program: Any, given: Towers, ours: FeatCal) -> Tensor:
    """τ of the program's model."""
    config = program.FeatCalConfig(
        num_calibration_examples=IMAGES,
        calibration_batch_size=BATCH_SIZE,
        lambda_ratio=ours.ridge,
        anchor_blend_rho=ours.anchor,
        teacher_interp_alpha=ours.interpolation,
    )
    program.load_task_dataset = lambda task, split, cache_dir=None: given.images[task]
    program.gc = SimpleNamespace(collect=lambda: None)  # after every block of every task
    program.make_clip_loader = lambda images, *arguments, **settings: images.split(BATCH_SIZE)
    merged, vectors = copy.deepcopy(given.base), START(given.vectors)
    with torch.no_grad():
        for name, value in merged.named_parameters():
            value.add_(vectors[name][0])
    calibrator = program.CLIPFeatCalibrator(config, processor=None, device=torch.device("cpu"))
    models = {"base_model": copy.deepcopy(given.base), "expert_models": copy.deepcopy(given.models)}
    return given.departure(calibrator.calibrate(merged_model=merged, tasks=list(given.models), **models))


def rows(program: Any) -> Iterator[dict[str, Any]]:
    """The largest difference, relative to the program's largest entry."""
    for name, settings in SETTINGS.items():
        ours, found = FeatCal(**settings), {}
        for dtype in (torch.float32, torch.float64):
            largest = 0.0
            for tasks in (2, 3, 4):
                given = towers(tasks, dtype)
                with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
                    reference = theirs(program, given, ours).double()
                difference = (given.calibrated(ours, START).double() - reference).abs().max()
                largest = max(largest, float(difference / reference.abs().max()))
            found[str(dtype).removeprefix("torch.")] = float(f"{largest:.2g}")
        yield {"settings": name, "lit_merge": repr(ours), **found, "agrees": max(found.values()) <= TOLERANCE}


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/parity_featcal.json"))
    options = parser.parse_args()
    sys.path.insert(0, str(options.program / "src"))
    import featcal.featcal as program

    found = list(rows(program))
    for row in found:
        print(f"{row['settings']:<30} float32 {row['float32']:.1e}  float64 {row['float64']:.1e}")
    report = {
        "seed": SEED,
        "program": "egangu/featcal 18c68b6",
        "tolerance": TOLERANCE,
        "rows": found,
        "versions": {"lit_merge": __version__, "python": platform.python_version(), "torch": str(torch.__version__)},
        "hardware": hardware(),
    }
    options.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
