"""LiNeS on TIES with a global trim, from disk to disk, on checkpoints of T5-large's shapes, beside mergekit's TIES.

The shapes are T5 v1.1-large's and Flan-T5-large's (783 million parameters), as mergekit does not know the first T5's.

The base and eight fine-tunes have random values (the fine-tunes' differences from the base are normal, of 1e-3) and are
written by transformers itself, in shards. Every run is a fresh process, ``lit-merge merge`` or ``mergekit-yaml``;
imports, reading and writing are counted. Memory is the largest sum over the process and its children, sampled every 20
milliseconds: resident, pages of mapped files included, and anonymous alone. Before every run all inputs are read, so
that it finds them in the cache if there is room for them. ``limit`` reads them once more and writes as many bytes as
the result has, synchronised to disk.

mergekit trims every tensor by itself and has no LiNeS: ``ties`` is ours without it, ``ties_tensor`` with its scope too,
whose result is compared with mergekit's. mergekit goes into an environment of its own:

    python -m venv runs/mergekit && runs/mergekit/bin/pip install mergekit==0.1.5
    python benchmarks/t5_large.py --mergekit-python runs/mergekit/bin/python

In bfloat16 (the default) the inputs take 14 GB of disk and every tool's result 1.6 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from whole_processes import (
    copied,
    difference,
    lit_merge_command,
    measured,
    mergekit_command,
    names_of,
    settle,
    tensor,
    weights,
)

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions

ROOT = Path(__file__).parents[1]
DENSITY = 0.2
TIES = [{"Trim": {"density": DENSITY}}, "ElectSign", "DisjointMean"]
OURS: dict[str, list[Any]] = {
    "lines_ties": [*TIES, {"LiNeS": {"alpha": "norm_ratio", "beta": 0.5}}],
    "ties": TIES,
    "ties_tensor": [{"Trim": {"density": DENSITY, "scope": "tensor"}}, *TIES[1:]],
}
TOOLS = ("limit", *OURS, "mergekit")


def folders_of(place: Path, tasks: int) -> tuple[Path, list[Path]]:
    """The base's folder and the fine-tunes'."""
    return place / "base", [place / f"task{task}" for task in range(tasks)]


@torch.no_grad()
def prepare(place: Path, options: argparse.Namespace) -> None:
    """Write the checkpoints, unless they are there."""
    import transformers

    base, tuned = folders_of(place, options.tasks)
    if (tuned[-1] / "config.json").exists():
        return
    sizes = {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": options.layers}
    forms = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = transformers.T5Config(**sizes, **forms)
    model = transformers.T5ForConditionalGeneration(config).to(getattr(torch, options.dtype))
    draw = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.copy_(0.02 * torch.randn(value.shape, generator=draw))
    start = {name: value.clone() for name, value in model.named_parameters()}
    for folder in (base, *tuned):
        model.save_pretrained(folder, max_shard_size=options.shard_size)
        for name, value in model.named_parameters():
            value.copy_(start[name] + 1e-3 * torch.randn(value.shape, generator=draw))
        print(f"wrote {folder}", flush=True)


def command(tool: str, place: Path, output: Path, options: argparse.Namespace) -> list[str]:
    """What a fresh process runs."""
    base, tuned = folders_of(place, options.tasks)
    if tool == "mergekit":
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": str(one), "parameters": {"density": DENSITY, "weight": 1.0}} for one in tuned],
            "parameters": {"normalize": True},
            "dtype": options.dtype,
        }
        return mergekit_command(options.mergekit_python, recipe, place / "mergekit.yaml", output, options.shard_size)
    return lit_merge_command(base, tuned, output, OURS[tool], options.shard_size)


def one_run(tool: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and of merges peak memory and bytes."""
    base, tuned = folders_of(place, options.tasks)
    output = place / f"merged-{tool}"
    settle([base, *tuned])
    if tool == "limit":
        return {"seconds": round(copied([base, *tuned], output), 2)}
    return measured(command(tool, place, output, options), output, place / f"{tool}.log")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All tools, round by round."""
    place = options.folder.resolve()
    place.mkdir(parents=True, exist_ok=True)
    prepare(place, options)
    base, tuned = folders_of(place, options.tasks)
    tools = [one for one in options.tools if one != "mergekit" or options.mergekit_python]
    rows: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    for _ in range(options.rounds):
        for tool in tools:
            rows[tool].append(one_run(tool, place, options))
            print(tool, rows[tool][-1], flush=True)
    inputs = [file.stat().st_size for folder in (base, *tuned) for file in weights(folder)]
    parameters = sum(tensor(file, name).numel() for file in weights(base) for name in names_of(file))
    found: dict[str, Any] = {"parameters": parameters, "bytes_read": sum(inputs), "files": len(inputs)}
    found["tools"] = {
        tool: {
            "median_seconds": statistics.median(one["seconds"] for one in runs),
            **{key: max(one[key] for one in runs) for key in ("peak_mib", "anonymous_mib") if key in runs[0]},
            "runs": runs,
        }
        for tool, runs in rows.items()
    }
    if {"ties_tensor", "mergekit"} <= set(tools):
        found["ties_tensor_and_mergekit"] = difference(place / "merged-ties_tensor", place / "merged-mergekit")
    if not options.keep:
        shutil.rmtree(place)
    return found


SHOWN = {
    "limit": "all inputs read, the result's bytes written",
    "lines_ties": "LiNeS on TIES, trimmed over the whole vector",
    "ties": "TIES, trimmed over the whole vector",
    "ties_tensor": "TIES, every tensor trimmed by itself",
    "mergekit": "mergekit's TIES, every tensor trimmed by itself",
}


def table(measured: dict[str, Any]) -> str:
    """What docs/language.md says of it."""
    lines = ["| from disk to disk | seconds | resident memory, MiB | of it anonymous |", "|:--|--:|--:|--:|"]
    for tool, said in SHOWN.items():
        if (row := measured["tools"].get(tool)) is not None:
            memory = f"{row['peak_mib']:,} | {row['anonymous_mib']:,}" if "peak_mib" in row else "|"
            lines.append(f"| {said} | {row['median_seconds']:.1f} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the encoder, and of the decoder; T5-large has 24")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument(
        "--mergekit-python", type=Path, help="python of the environment with mergekit; without, ours alone"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/t5_large"))
    parser.add_argument("--keep", action="store_true", help="keep inputs and results")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/t5_large.json"))
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("layers", "tasks", "dtype", "shard_size", "rounds")}
    result = {**settings, "density": DENSITY, **run(options), "versions": versions(), "hardware": hardware()}
    if options.mergekit_python:
        asked = "import importlib.metadata as m; print(*(m.version(n) for n in ('mergekit', 'torch', 'transformers')))"
        said = subprocess.run([options.mergekit_python, "-c", asked], capture_output=True, text=True, check=True).stdout
        result["versions_of_mergekit"] = dict(zip(("mergekit", "torch", "transformers"), said.split(), strict=True))
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
