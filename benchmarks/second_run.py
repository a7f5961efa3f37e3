"""What ``lit-merge suite`` reads when it finds everything done: eight tasks at the shapes of ViT-B/32.

    python benchmarks/second_run.py CHECKOUT …

The stages are faked: in a moment each leaves files with the names, shapes and sizes of the real ones, whose content is
zero and takes no room on the disk. Planning, keys, records and results are the suite's own. Runs, each a process:

- ``first``: nothing is there;
- ``second``: the same command again;
- ``one changed``: after one task vector was written anew, with the bytes that it had.

``rchar`` of /proc/self/io counts what the process and its children asked for by read(), ``read_bytes`` what came from
the disk; most imports are done before the counting begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TASKS = ("digits", "clutter", "letters", "signs", "textures", "land", "vehicles", "scenes")
MODEL = "ViT-B-32-quickgelu"
Shapes = Mapping[str, tuple[int, ...]]


def write_zeros(path: Path, shapes: Shapes, metadata: Mapping[str, str], mark: int = 0) -> None:
    """A safetensors file of float32 zeros, but for the first element, which are holes on the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in sorted(shapes.items()):
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content + struct.pack("<f", mark + 1.0))
        file.truncate(8 + len(content) + end)


def clip_shapes() -> tuple[Shapes, Shapes, dict[str, int]]:
    """Of the whole model, of the image tower, and the inputs of its linear layers."""
    import open_clip
    import torch
    from torch import nn

    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config(MODEL))
    whole = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tower = {name: tuple(value.shape) for name, value in model.visual.named_parameters()}
    layers = {name: layer.in_features for name, layer in model.visual.named_modules() if isinstance(layer, nn.Linear)}
    return whole, tower, layers


def fake_stages(shapes: tuple[Shapes, Shapes, dict[str, int]], base: Mapping[str, str]) -> Callable[[Any], None]:
    """What writes a stage's outputs."""
    whole, tower, layers = shapes
    merged = {**base, "format": "lit-merge/task-vector/1", "task": "+".join(TASKS), "step": "0", "relative_norm": "0.1"}
    merged |= {"transform": "chain(Mean())", "transform_config": json.dumps(None)}
    grams: Shapes = {f"{name}.weight": (size, size) for name, size in layers.items()}

    def write(job: Any) -> None:
        folder = Path(job.folder)
        task = job.name.rpartition("/")[2]
        for name in job.outputs:
            path = folder / name
            if name == "test_metrics.json":
                found = {"test/accuracy": 0.5, **{f"test/{one}/accuracy": 0.5 for one in TASKS}}
                path.write_text(json.dumps(found), encoding="utf-8")
            elif name.endswith("-search.json"):
                curve = {"values": [0.3], "normalised": [0.9], "absolute": [0.5]}
                path.write_text(json.dumps({"best": 0.3, **curve}), encoding="utf-8")
            elif name == "coefficients.safetensors":
                _coefficients(path, tower)
            elif name == "task_vector.safetensors":
                mark = TASKS.index(task) if task in TASKS else len(TASKS)
                write_zeros(path, tower, {**merged, "task": task}, mark)
            elif "merged" in name:
                write_zeros(path, whole if "coefficients.safetensors" in job.outputs else tower, merged)
            else:  # statistics
                write_zeros(path, grams if "gram" in name or "regmean" in job.name else tower, {"task": task})

    return write


def _coefficients(path: Path, tower: Shapes) -> None:
    import torch

    from lit_merge.vectors import Coefficients

    names = tuple(tower)
    values = torch.full((len(TASKS), len(names)), 0.3)
    Coefficients(values, TASKS, names, {name: name for name in names}, metadata={"transform": "Sum()"}).save(str(path))


def run_suite(checkout: Path, folder: Path, measured: Path, recipes: Path | None) -> None:
    """One run of the suite in this process; the bytes go to ``measured``."""
    try:
        from lit_merge.commands.main import main as command
        from lit_merge.suite.engines import sequential
        from lit_merge.suite.engines.job import Outcome
    except ImportError:  # until 2cf9ff3
        from lit_merge.cli import main as command
        from lit_merge.engines import sequential
        from lit_merge.engines.job import Outcome
    import lit_merge
    import lit_merge.modules

    if Path(lit_merge.__file__).parents[1] != checkout:
        raise SystemExit(f"expected lit_merge of {checkout}, got {lit_merge.__file__}")
    shapes = clip_shapes()
    weights = folder / "clip.safetensors"
    if not weights.exists():
        write_zeros(weights, shapes[0], {})
    write, ran = fake_stages(shapes, {}), []

    def start(engine: Any, job: Any) -> None:
        write(job)
        ran.append(job.name)
        engine._ended.append(Outcome(job.name, 0.1))

    sequential.SequentialEngine.start = start  # type: ignore[method-assign]
    recipes = recipes or checkout / "configs/suite/protocol/recipes.yaml"
    suite = {"tasks": list(TASKS), "seeds": [0], "fit": {"trainer": {"max_steps": 2000}}, "recipes": str(recipes)}
    configuration = folder / "suite.yaml"
    configuration.write_text(json.dumps(suite), encoding="utf-8")
    arguments = [f"--config={configuration}", f"--model={MODEL}", f"--pretrained={weights}", "--output=suite"]
    began, before = time.perf_counter(), _read_so_far()
    code = command(["suite", *arguments])
    after, seconds = _read_so_far(), time.perf_counter() - began
    if code:
        raise SystemExit(code)
    found = {name: after[name] - before[name] for name in after}
    measured.write_text(json.dumps({**found, "seconds": round(seconds, 2), "stages_run": len(ran)}), encoding="utf-8")


def _read_so_far() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    found = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {name: found[name] for name in ("rchar", "read_bytes")}


def measure(checkout: Path, recipes: Path | None) -> dict[str, Any]:
    """All runs of one checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), dict[str, Any]()

        def run(kind: str) -> None:
            measured = folder / "measured.json"
            environment = {**os.environ, "PYTHONPATH": str(checkout), "LIT_MERGE_CACHE": str(folder / "cache")}
            words = [sys.executable, "-P", __file__, str(checkout), f"--run={measured}"]
            words += [f"--recipes={recipes.resolve()}"] if recipes else []
            ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if ended.returncode:
                sys.exit(f"{checkout}, {kind}: {(ended.stderr or ended.stdout)[-3000:]}")
            found[kind] = json.loads(measured.read_text(encoding="utf-8"))
            one = found[kind]
            size, ran = one["rchar"] / 1e9, one["stages_run"]
            sys.stdout.write(f"{checkout}, {kind}: {size:.3f} GB in {one['seconds']} s, {ran} stages run\n")
            sys.stdout.flush()

        run("first")
        files = [path for path in (folder / "suite").rglob("*") if path.is_file()]
        found["files"] = {"count": len(files), "bytes": sum(path.stat().st_size for path in files)}
        run("second")
        vector = folder / "suite/seed-0/fit/digits/task_vector.safetensors"
        shutil.copyfile(vector, folder / "again")
        (folder / "again").replace(vector)
        run("one changed")
        found["changed bytes"] = vector.stat().st_size
    return found


def main() -> None:
    """Measure the checkouts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/second_run.json")
    parser.add_argument("--recipes", type=Path, help="YAML instead of configs/suite/protocol/recipes.yaml")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_suite(options.checkouts[0].resolve(), options.run.parent, options.run, options.recipes)
        return
    found = {str(checkout): measure(checkout.resolve(), options.recipes) for checkout in options.checkouts}
    from lit_merge.report.environment import hardware, versions

    result = {"shapes": MODEL, "tasks": len(TASKS), "checkouts": found, "versions": versions(), "hardware": hardware()}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
