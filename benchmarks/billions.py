"""Merging decoders of billions of parameters, from disk to disk, beside mergekit: time, memory, bytes.

The shapes are Llama 3's (``1b``: 16 blocks of width 2,048, tied embeddings, 1.24 billion parameters; ``8b``: 32 blocks
of width 4,096, untied, 8.03 billion), in bfloat16 and in shards, as transformers writes them. Values are random: the
fine-tunes' differences from the base are normal, of 1e-3. ``--layers`` takes fewer blocks where disk or time is short.

Every run is a fresh process; imports, reading and writing are counted. Memory is the largest sum over the process and
its children, sampled every 20 milliseconds: resident, pages of mapped files included, and anonymous alone. Bytes read
are those of system calls. Before every run all inputs are read, so that it finds them in the cache if there is room for
them. ``limit`` reads them once more and writes as many bytes as the result has, synchronised to disk.

    python -m venv runs/mergekit && runs/mergekit/bin/pip install mergekit==0.1.5
    python benchmarks/billions.py --shapes 1b --mergekit-python runs/mergekit/bin/python
    python benchmarks/billions.py --shapes 8b --tasks 3    # 80 GB of disk

Trimming over the whole vector is the paper's; mergekit trims every tensor by itself, ``ties_tensor`` does, too. Of
shapes that were measured before with the same number of blocks and vectors, rows that are measured again are replaced.
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
from placing import place_between
from whole_processes import copied, lit_merge_command, measured, mergekit_command, names_of, settle, tensor, weights

from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/billions.json"
PAGE = ROOT / "docs/speed.md"
BEGIN, END = "<!-- billions: written by benchmarks/billions.py -->", "<!-- end of billions -->"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    },
    "8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    },
    "tiny": {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": True},
    },
}
TIES = ["ElectSign", "DisjointMean"]
OURS: dict[str, list[Any]] = {
    "task_arithmetic": [{"task_arithmetic": {"coefficient": 0.3}}],
    "dare": [{"dare_linear": {"p": 0.9, "coefficient": 0.3}}],
    "lines": [{"lines": {"alpha": "norm_ratio", "beta": 0.5}}],
    "ties": [{"Trim": {"density": 0.2}}, *TIES],
    "ties_tensor": [{"Trim": {"density": 0.2, "scope": "tensor"}}, *TIES],
    "tsv_m": [{"TSVMerge": {"exclude": "embed_tokens|lm_head"}}],
}
MERGEKIT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # method, of every model, of all
    "mergekit_task_arithmetic": ("task_arithmetic", {"weight": 0.3}, {"normalize": False}),
    "mergekit_dare": ("dare_linear", {"weight": 0.3, "density": 0.1}, {"normalize": False}),
    "mergekit_ties": ("ties", {"weight": 1.0, "density": 0.2}, {"normalize": True}),
}
TOOLS = ("limit", *OURS, *MERGEKIT)
SHOWN = {
    "limit": "all inputs read, the result's bytes written",
    "task_arithmetic": "task arithmetic",
    "dare": "DARE",
    "lines": "LiNeS",
    "ties": "TIES, trimmed over the whole vector",
    "ties_tensor": "TIES, every tensor trimmed by itself",
    "tsv_m": "TSV-M, without the embeddings",
    "mergekit_task_arithmetic": "mergekit's task arithmetic",
    "mergekit_dare": "mergekit's DARE",
    "mergekit_ties": "mergekit's TIES, every tensor trimmed by itself",
}
SHARD = "2GB"


@torch.no_grad()
def prepare(folders: list[Path], shapes: dict[str, Any]) -> None:
    """Write the checkpoints, the base first, unless they are there."""
    import transformers

    if (folders[-1] / "config.json").exists():
        return
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes))
    torch.set_default_dtype(torch.float32)
    draw = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.normal_(0.0, 0.02, generator=draw) if value.ndim > 1 else value.fill_(1.0)
    start = {name: value.clone() for name, value in model.named_parameters()}
    for folder in folders:
        model.save_pretrained(folder, max_shard_size=SHARD)
        for name, value in model.named_parameters():
            value.normal_(0.0, 1e-3, generator=draw).add_(start[name])
        print(f"wrote {folder}", flush=True)


def one_run(tool: str, place: Path, folders: list[Path], mergekit: Path | None) -> dict[str, Any]:
    """Seconds, and of merges peak memory and bytes."""
    output, log = place / "merged", place / f"{tool}.log"
    base, *tuned = folders
    settle(folders)
    if tool == "limit":
        return {"seconds": round(copied(folders, output), 3)}
    if tool in OURS:
        return measured(lit_merge_command(base, tuned, output, OURS[tool], SHARD), output, log)
    assert mergekit is not None
    method, each, common = MERGEKIT[tool]
    recipe = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(one), "parameters": each} for one in tuned],
        "parameters": common,
        "dtype": "bfloat16",
    }
    return measured(mergekit_command(mergekit, recipe, place / "mergekit.yaml", output, SHARD), output, log)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all rounds."""
    largest = {key: max(one[key] for one in runs) for key in runs[0] if key != "seconds"}
    return {"median_seconds": statistics.median(one["seconds"] for one in runs), **largest, "runs": runs}


def rounds(row: dict[str, Any]) -> str:
    """Of all tools: rows that were measured again may have more of them."""
    counts = sorted({len(one["runs"]) for one in row["tools"].values()})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def table(found: dict[str, Any]) -> str:
    """What docs/speed.md says of it."""
    lines: list[str] = []
    for row in found["rows"]:
        limit, size = row["tools"]["limit"]["median_seconds"], row["bytes"]
        lines += [
            *([""] if lines else []),
            f"{row['tasks']} × {row['parameters'] / 1e9:.2f} billion parameters (`{row['shapes']}`, {row['layers']} "
            f"blocks, bfloat16; {row['files']} files, {size / 2**30:.1f} GiB with the base), {rounds(row)} round(s):",
            "",
            "| from disk to disk | seconds | times the limit | resident, MiB | of it anonymous | bytes read per byte |",
            "| :-- | --: | --: | --: | --: | --: |",
        ]
        for tool, said in SHOWN.items():
            if (one := row["tools"].get(tool)) is None:
                continue
            cells = [said, f"{one['median_seconds']:.1f}", f"{one['median_seconds'] / limit:.1f}"]
            cells += [f"{one[key]:,}" if key in one else "" for key in ("peak_mib", "anonymous_mib")]
            cells.append(f"{one['bytes_read'] / size:.1f}" if "bytes_read" in one else "")
            lines.append(f"| {' | '.join(cells)} |")
    last = found["rows"][-1]
    cores, cpu = last["hardware"]["cores"], last["hardware"]["processor"]
    peer = next((f", mergekit {row['mergekit']}" for row in found["rows"] if row.get("mergekit")), "")
    lines += [
        "",
        "Of whole processes, imports included; mergekit maps its files, which are read without system calls. "
        f"{cores} cores ({cpu}), torch {last['versions']['torch']}{peer}. From "
        "`benchmarks/results/billions.json`, written by `benchmarks/billions.py`.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure all tools side by side, round by round; write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="blocks; by default the shapes' own")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--mergekit-python", type=Path, help="of an environment with mergekit; without, ours alone")
    parser.add_argument("--folder", type=Path, default=Path("runs/billions"))
    parser.add_argument("--keep", action="store_true", help="keep the inputs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    shapes = dict(SHAPES[options.shapes])
    shapes["num_hidden_layers"] = layers = options.layers or shapes["num_hidden_layers"]
    place = options.folder.resolve() / f"{options.shapes}-{layers}"
    folders = [place / name for name in ("base", *(f"task{task}" for task in range(options.tasks)))]
    prepare(folders, shapes)
    files = [file for folder in folders for file in weights(folder)]
    row: dict[str, Any] = {"shapes": options.shapes, "layers": layers, "tasks": options.tasks, "rounds": options.rounds}
    row["parameters"] = sum(tensor(file, name).numel() for file in weights(folders[0]) for name in names_of(file))
    row |= {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    row |= {"versions": versions(), "hardware": hardware(), "tools": {}}
    known: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    same = [one for one in known["rows"] if all(one[key] == row[key] for key in ("shapes", "layers", "tasks"))]
    row["tools"] |= same[0]["tools"] if same else {}
    row |= {"mergekit": same[0]["mergekit"]} if same and same[0].get("mergekit") else {}
    if options.mergekit_python:
        asked = "import importlib.metadata as m; print(m.version('mergekit'))"
        said = subprocess.run([options.mergekit_python, "-c", asked], capture_output=True, text=True, check=True).stdout
        row["mergekit"] = said.strip()
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for tool in options.tools:
            if tool in MERGEKIT and not options.mergekit_python:
                continue
            runs.setdefault(tool, []).append(one_run(tool, place, folders, options.mergekit_python))
            print(tool, runs[tool][-1], flush=True)
            row["tools"][tool] = summary(runs[tool])
            known["rows"] = [one for one in known["rows"] if one not in same] + [row]
            write_text(options.output, json.dumps(known, indent=1) + "\n")
            same = [row]
    if not options.keep:
        shutil.rmtree(place)
    text = table(known)
    print(text)
    if options.output == RESULTS:
        place_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
