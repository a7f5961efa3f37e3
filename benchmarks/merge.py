"""Merging from disk to disk beside mergekit and FusionBench: time and peak memory on the shapes of CLIP's image towers.

Inputs are fine-tuned weights and their base with random values, as safetensors. Every run is a process of its own;
imports are not counted, reading the inputs and writing the result is. ``limit`` reads the inputs once and writes a file
as large as the result, synchronised to disk as ours is: no merge can be faster. Memory is the peak of resident memory
above that after the imports, pages of mapped files included.

lit-merge trims over the whole vector, as the paper of TIES does, in more passes than mergekit, which trims every tensor
by itself; ``ties_tensor`` is ours with mergekit's scope. LiNeS is in neither of the others.

    pip install -r benchmarks/requirements.txt
    python benchmarks/merge.py --output benchmarks/results/merge.json

What one call measures replaces the rows of the same shapes, methods and tools; measure all of a shape at once, so that
they stand side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
TASKS = 8
START, END = "<!-- merging: written by benchmarks/merge.py -->", "<!-- end of merging -->"
SHAPES = {  # width, blocks, patch, tokens, output
    "vit_b_32": (768, 12, 32, 50, 512),
    "vit_b_32_twice_as_deep": (768, 24, 32, 50, 512),
    "vit_l_14": (1024, 24, 14, 257, 768),
}
METHODS = {
    "task_arithmetic": ["limit", "lit_merge", "mergekit", "fusion_bench"],
    "ties": ["lit_merge", "fusion_bench"],
    "ties_tensor": ["lit_merge", "mergekit"],
    "dare": ["lit_merge", "mergekit", "fusion_bench"],
    "lines": ["lit_merge"],
}
OURS: dict[str, list[Any]] = {
    "task_arithmetic": [{"task_arithmetic": {"coefficient": 0.3}}],
    "ties": [{"ties": {"density": 0.2, "coefficient": 1.0}}],
    "ties_tensor": [{"ties": {"density": 0.2, "coefficient": 1.0, "scope": "tensor"}}],
    "dare": [{"dare_linear": {"p": 0.9, "coefficient": 0.3}}],
    "lines": [{"lines": {"alpha": "norm_ratio", "beta": 0.5}}],
    # Measured by benchmarks/merge_matrices.py.
    **{name: [{name: {}}] for name in ("tsv_m", "iso_c", "iso_cts", "svc", "cart", "esm", "dc_merge", "aswudi")},
}
MERGEKIT: dict[str, tuple[str, dict[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3, "normalize": False}),
    "ties_tensor": ("ties", {"density": 0.2, "weight": 1.0, "normalize": True}),
    "dare": ("dare_linear", {"density": 0.1, "weight": 0.3, "normalize": False}),
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """The parameters of open_clip's image tower."""
    width, blocks, patch, tokens, output = SHAPES[name]
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "proj": (width, output),
        "conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for index in range(blocks):
        block = f"transformer.resblocks.{index}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
        }
    return shapes


def prepare(folder: Path, name: str) -> None:
    """Write the base and the fine-tuned weights, if they are not there."""
    from safetensors.torch import save_file

    if (folder / f"{TASKS - 1}.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes_of(name).items()}
    save_file(base, folder / "base.safetensors")
    for task in range(TASKS):
        tuned = {key: value + 1e-3 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file(tuned, folder / f"{task}.safetensors")


class Holder(nn.Module):
    """A module with given parameters, as FusionBench merges modules."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(tensor))


def limit(method: str, folder: Path, output: Path) -> Callable[[], None]:
    """Read everything once in pieces and write as much as the result has."""

    def run() -> None:
        piece = memoryview(bytearray(1 << 20))
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as source:
                while source.readinto(piece):
                    pass
        with output.open("wb") as target:
            for _ in range((folder / "base.safetensors").stat().st_size >> 20):
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())

    return run


def lit_merge(method: str, folder: Path, output: Path) -> Callable[[], None]:
    """``lit-merge merge --base … --vectors … --parts …``."""
    from lit_merge.commands.merge import merge

    files = [str(folder / f"{task}.safetensors") for task in range(TASKS)]
    base = str(folder / "base.safetensors")
    return lambda: merge(files, str(output), parts=OURS[method], base=base, progress=False) and None


def mergekit(method: str, folder: Path, output: Path) -> Callable[[], None]:
    """``mergekit-pytorch``, with its own options as they are."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    name, parameters = MERGEKIT[method]
    models = [{"model": str(folder / f"{task}.safetensors")} for task in range(TASKS)]
    base = str(folder / "base.safetensors")
    config = RawPyTorchMergeConfig.model_validate(
        {"merge_method": name, "models": models, "base_model": base, "parameters": parameters, "dtype": "float32"}
    )
    options = MergeOptions()
    return lambda: Executor(plan_flat_merge(config, str(output), False, False, options)).execute()


def fusion_bench(method: str, folder: Path, output: Path) -> Callable[[], None]:
    """FusionBench's algorithms on modules that are loaded from the files."""
    from fusion_bench.method import DareTaskArithmetic, TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from safetensors.torch import load_file, save_file

    algorithm = {
        "task_arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3),
        "ties": lambda: TiesMergingAlgorithm(scaling_factor=1.0, threshold=20, remove_keys=[], merge_func="mean"),
        "dare": lambda: DareTaskArithmetic(scaling_factor=0.3, sparsity_ratio=0.9, only_on_linear_weights=False),
    }[method]()

    def run() -> None:
        from fusion_bench.modelpool import BaseModelPool

        names = {"_pretrained_": "base", **{str(task): str(task) for task in range(TASKS)}}
        pool = BaseModelPool({name: Holder(load_file(folder / f"{file}.safetensors")) for name, file in names.items()})
        save_file({name: value.detach() for name, value in algorithm.run(pool).state_dict().items()}, output)

    return run


TOOLS = {function.__name__: function for function in (limit, lit_merge, mergekit, fusion_bench)}


def resident() -> tuple[float, float]:
    """Resident memory now and at its peak, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def child(tool: str, method: str, folder: Path) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        output = Path(place) / "merged.safetensors"
        run = TOOLS[tool](method, folder, output)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, _ = resident()
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        return {"seconds": round(seconds, 3), "peak_mib": round(resident()[1] - before, 1)}


def measure(tool: str, method: str, folder: Path, memory: int) -> dict[str, Any]:
    """Start a process with a limit on its memory, and read what it measured."""
    arguments = [sys.executable, __file__, "--child", tool, method, str(folder)]

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))

    ended = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=restrict, check=False)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[-1:] or ["killed"]
        return {"failed": said[0][:200], "limit_gib": memory}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The tables of docs/recipes.md."""
    found = {(row["shapes"], row["method"], row["tool"]): row for row in result["rows"]}
    lines = []
    for shapes in dict.fromkeys(row["shapes"] for row in result["rows"]):
        limit_row = found[shapes, "task_arithmetic", "limit"]
        limit_seconds = statistics.median(limit_row["seconds"])
        lines += [
            *([""] if lines else []),
            f"{TASKS} × {shapes} (float32); reading the inputs and writing the result takes "
            f"{limit_seconds:.1f} s, a stack of the largest parameter {limit_row['largest_stack_mib']:.0f} MiB:",
            "",
            "| method | tool | seconds (range) | times ours | times the limit | peak memory, MiB | in stacks |",
            "| :-- | :-- | --: | --: | --: | --: | --: |",
        ]
        for method, tools in METHODS.items():
            ours = found.get((shapes, method, "lit_merge"))
            for tool in tools:
                row = found.get((shapes, method, tool))
                if row is None or tool == "limit":
                    continue
                if "failed" in row:
                    lines.append(f"| {method} | {tool} | more than {row['limit_gib']} GiB | | | | |")
                    continue
                cells = [
                    method,
                    tool,
                    f"{row['median']:.1f} ({min(row['seconds']):.1f}–{max(row['seconds']):.1f})",
                    f"{row['median'] / ours['median']:.1f}" if ours else "",
                    f"{row['median'] / limit_seconds:.1f}",
                    f"{row['peak_mib']:,.0f}",
                    f"{row['peak_mib'] / row['largest_stack_mib']:.1f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        known, on = limit_row["versions"], limit_row["hardware"]
        peers = ", ".join(f"{name} {known[name]}" for name in ("torch", "mergekit", "fusion-bench"))
        lines += ["", f"Side by side on {on['cores']} cores ({on['processor']}), {peers}."]
    lines += ["", "From `benchmarks/results/merge.json`, written by `benchmarks/merge.py`."]
    return "\n".join(lines)


def place(result: dict[str, Any]) -> None:
    """Put the tables into docs/recipes.md."""
    from placing import place_between  # not in a peer's environment, which has no lit-merge

    place_between(ROOT / "docs/recipes.md", START, END, table(result))


def main() -> None:
    """Measure all tools side by side, round by round, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "METHOD", "FOLDER"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=18, help="GiB that a process may allocate")
    parser.add_argument("--folder", type=Path, default=Path("runs/merge_benchmark"))
    parser.add_argument("--keep", action="store_true", help="keep the inputs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/merge.json"))
    options = parser.parse_args()
    if options.child:
        tool, method, folder = options.child
        print(json.dumps(child(tool, method, Path(folder).resolve())))
        return
    from lit_merge.files.text import write_text
    from lit_merge.report.environment import hardware, versions

    result: dict[str, Any] = {"rows": []}
    if options.output.exists():
        result |= json.loads(options.output.read_text())
    result["tasks"] = TASKS
    machine = {"versions": {**versions(), **_peers()}, "hardware": hardware()}
    for name in options.shapes:
        folder = options.folder.resolve() / name
        prepare(folder, name)
        largest = max(torch.Size(shape).numel() for shape in shapes_of(name).values())
        result["rows"] = [
            row
            for row in result["rows"]
            if row["shapes"] != name or row["method"] not in options.methods or row["tool"] not in options.tools
        ]
        rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for method in options.methods:
                for tool in METHODS[method]:
                    deep = name == "vit_b_32_twice_as_deep"
                    if tool not in options.tools or (deep and tool not in ("lit_merge", "limit")):
                        continue
                    found = rounds.setdefault((method, tool), [])
                    if not any("failed" in one for one in found):
                        found.append(measure(tool, method, folder, options.memory))
                        print(name, method, tool, found[-1], flush=True)
        for (method, tool), found in rounds.items():
            row: dict[str, Any] = {"shapes": name, "method": method, "tool": tool, **machine}
            row["largest_stack_mib"] = round(largest * 4 * TASKS / 2**20, 1)
            failed = [one for one in found if "failed" in one]
            if failed:
                result["rows"].append(row | failed[0])
                continue
            seconds = [one["seconds"] for one in found]
            row |= {"seconds": seconds, "median": statistics.median(seconds)}
            result["rows"].append(row | {"peak_mib": max(one["peak_mib"] for one in found)})
        write_text(options.output, json.dumps(result, indent=1) + "\n")
        if not options.keep:
            shutil.rmtree(folder)
    place(result)


def _peers() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("mergekit", "fusion-bench"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
