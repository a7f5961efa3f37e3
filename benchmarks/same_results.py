"""Do two checkouts write the same numbers? Every configuration and recipe at tiny size, tensor by tensor.

    python benchmarks/same_results.py BEFORE AFTER
    python benchmarks/same_results.py BEFORE AFTER --only fit/linearized recipe/ties
    python benchmarks/same_results.py BEFORE AFTER --only quickstart

BEFORE and AFTER are folders of checkouts. One process for each runs, with its own code, configurations and cache:

- ``fit/…``: three steps of every fine-tuning regime, on a tiny CLIP with random weights;
- ``statistics/…``: what Fisher merging and RegMean need;
- ``recipe/…``: every named method on the same three vectors, which BEFORE wrote, and ``merge/…``: dtypes and shards;
- ``adamerging``: layer-wise coefficients, learned in a few steps, and the merged weights;
- ``suite``: fine-tuning, searching, merging and evaluating two tasks; its results.json;
- ``quickstart``, only if it is named: the shipped quickstart at its full size.

Compared are the names, dtypes, shapes and bytes of all tensors written, not the files' metadata, nor which shard of a
model holds which tensor; of results.json
everything but versions and hardware. The exit code is 1 if anything differs that EXPECTED does not explain.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EXPECTED: dict[str, str] = {
    "recipe/wudi": "matrices with n > 2 T m are multiplied with the vectors, no longer with an n × n matrix: rounding",
    "merge/shards": "a merge reads its base from the file, in the file's order: the same tensors in other shards",
}
"""Case -> why it differs."""

TASKS = ("digits", "signs", "land")
CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
_ATTENTION = "model.trainable.init_args.paradigm"
_PAPERS = ("full", "linearized", "exp_lr", "lin_lr", "half_ft", "last_ft", "tau_jp_cyclic", "tau_jp_strict")
_ALONE = (*_PAPERS, "linearized_attention", "lora", "tau_jp_direct", "penalised_from_vector", "own_images")
_ALONE = (*_ALONE, "clip_vit_b32", "evaluate_merge")
REGIMES: dict[str, list[tuple[list[str], list[str]]]] = {
    **{name: [([name], [])] for name in _ALONE},
    "attention_1": [(["attention_1"], []), (["attention"], [])],
    "attention_2": [(["attention_2"], []), (["attention"], [f"--{_ATTENTION}=2"])],
    **{
        f"attention_{number}": [
            ([f"attention_{number}"], []),
            (["attention"], [f"--{_ATTENTION}={number}", "--model.learning_rate=8e-4"]),
        ]
        for number in (3, 4)
    },
    **{f"clip/{name}": [([f"clip/{name}"], []), ([name, "clip_vit_b32"], [])] for name in (*_PAPERS, "attention")},
}
"""Regime -> how it is written: files of configs/finetune and options, as the first layout that a checkout has."""

FEWER = {"negation": 1, "rewarded_soup": 2, "slerp": 2}
"""Recipe -> how many vectors it takes, where that is not all three."""


@dataclass(frozen=True)
class Case:
    """A command line whose ``output`` is compared, a file or folder in the side's own."""

    name: str
    command: str
    arguments: tuple[str, ...]
    output: str


# One side


def cases(checkout: Path, shared: Path) -> Iterator[Case]:
    """All that is run, in this order; what several cases read is what BEFORE wrote to ``shared``."""
    weights = ("model", "pretrained"), (str(shared / "clip.json"), str(shared / "clip.safetensors"))
    model = tuple(f"--{key}={value}" for key, value in zip(*weights, strict=True))
    module = tuple(argument.replace("--", "--model.", 1) for argument in model)
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu")
    short = (*quiet, "--trainer.max_steps=3", "--trainer.enable_checkpointing=false")
    vectors = [str(shared / "vectors" / task / "task_vector.safetensors") for task in TASKS]
    listed = [f"--vectors=[{', '.join(vectors[:count])}]" for count in range(len(TASKS) + 1)]
    statistics = {
        kind: {task: str(shared / f"{kind}-{task}.safetensors") for task in TASKS} for kind in ("fisher", "gram")
    }

    def fit(name: str, files: list[Path], *options: str) -> Case:
        configs = (f"--config={path}" for path in files)
        output = name.replace("/", "-")
        return Case(name, "fit", (*configs, *module, *short, *options, f"--output={output}"), output)

    full = checkout / "configs/finetune/full.yaml"
    for task in TASKS:
        yield fit(f"vectors/{task}", [full], "--trainer.limit_val_batches=0", f"--data.task={task}")
    for name, layouts in REGIMES.items():
        files, options = _regime(checkout, name, layouts, vectors)
        yield fit(f"fit/{name}", files, *options)
    for kind, collected in statistics.items():
        for task, vector in zip(TASKS, vectors, strict=True):
            output = f"{kind}-{task}.safetensors"
            options = (f"--kind={kind}", f"--task_vector={vector}", "--images=16", f"--output={output}")
            yield Case(f"statistics/{kind}/{task}", "statistics", (*model, *options), Path(collected[task]).name)
    layer_wise = checkout / "configs/adamerging/layer_wise.yaml"
    learned = (f"--model.vectors=[{', '.join(vectors)}]", f"--data.tasks=[{', '.join(TASKS)}]", "--data.batch_size=8")
    yield fit("adamerging", [layer_wise], *learned, "--trainer.limit_val_batches=0")
    given = {
        "fisher": {"statistics": statistics["fisher"]},
        "regmean": {"statistics": statistics["gram"]},
        "adamerging": {"coefficients": str(shared / "coefficients.safetensors")},
    }
    from lit_merge.transforms import RECIPES

    for recipe in RECIPES:
        settings = (f"--settings={json.dumps(given[recipe])}",) if recipe in given else ()
        output = f"recipe-{recipe}{'' if recipe == 'tall_masks' else '.safetensors'}"
        count = FEWER.get(recipe, len(TASKS))
        options = (*model, listed[count], f"--recipe={recipe}", *settings, f"--output={output}")
        yield Case(f"recipe/{recipe}", "merge", options, output)
    for name, output, options in (
        ("task_vector", "vector.safetensors", ("--kind=task_vector", "--recipe=ties")),
        ("bfloat16", "bfloat16.safetensors", ("--dtype=bfloat16", "--recipe=weight_average")),
        ("shards", "shards", ("--shard_size=50KB", "--recipe=lines")),
    ):
        yield Case(f"merge/{name}", "merge", (*model, listed[-1], *options, f"--output={output}"), output)
    suite = {
        "tasks": list(TASKS[:2]),
        "seeds": [0],
        "fit": {"trainer": {"max_steps": 3, "accelerator": "cpu"}},
        "test": {"trainer": {"accelerator": "cpu"}},
        "recipes": {
            "weight_average": {"recipe": "weight_average"},
            "task_arithmetic": {"recipe": "task_arithmetic", "search": {"values": [0.2, 0.4]}},
            "ties": {"recipe": "ties"},
        },
    }
    Path("suite.yaml").write_text(json.dumps(suite), encoding="utf-8")
    yield Case("suite", "suite", ("--config=suite.yaml", *model, "--output=suite"), "suite")
    quickstart = (f"--config={checkout / 'configs/suite/quickstart.yaml'}", "--output=quickstart")
    yield Case("quickstart", "suite", quickstart, "quickstart")


def _regime(
    checkout: Path, name: str, layouts: list[tuple[list[str], list[str]]], vectors: list[str]
) -> tuple[list[Path], list[str]]:
    """Files and options of a regime, with its own number of images per step."""
    folder = checkout / "configs/finetune"
    layout = next(one for one in layouts if all((folder / f"{file}.yaml").exists() for file in one[0]))
    files, options = [folder / f"{file}.yaml" for file in layout[0]], list(layout[1])
    if name == "evaluate_merge":
        callback = {
            "class_path": "lit_merge.callbacks.EvaluateMerge",
            "init_args": {"vectors": vectors[:2], "recipe": "task_arithmetic", "limit_batches": 1},
        }
        extract = {"class_path": "lit_merge.callbacks.ExtractTaskVector", "init_args": {"best": "merge/accuracy"}}
        options += [f"--trainer.callbacks={json.dumps([callback, extract])}", "--data.task=land"]
        options += ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"]
    else:
        options += ["--trainer.limit_val_batches=0", "--data.task=digits", "--data.workers=0"]
    if "tau_jp" in name or "penalised" in name:
        options += ["--data.other_tasks=[signs, land]"]
    if "penalised" in name:
        options += [f"--model.task_vector={vectors[0]}"]
    return files, options


def run_side(checkout: Path, shared: Path, first: bool, only: list[str]) -> None:
    """Run the cases in this process, in the current folder, and write what became of each to ``outcomes.json``."""
    import lit_merge

    if Path(lit_merge.__file__).parents[1] != checkout:
        raise SystemExit(f"expected lit_merge of {checkout}, got {lit_merge.__file__}")
    outcomes = {}
    for case in cases(checkout, shared):
        needed = first and case.name.startswith(("vectors/", "statistics/", "adamerging"))
        if not needed and not _chosen(case.name, only):
            continue
        outcomes[case.name] = {"output": case.output, "error": _run(_command(), [case.command, *case.arguments])}
        sys.stdout.write(f"  {case.name}{': failed' if outcomes[case.name]['error'] else ''}\n")
        sys.stdout.flush()
        if first and needed:
            _share(case, shared)
    Path("outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


def _command() -> Callable[[list[str]], int]:
    try:
        from lit_merge.commands.main import main
    except ImportError:  # its place until 2cf9ff3
        from lit_merge.cli import main
    return main


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> str:
    """Run a command; what it said if it failed, otherwise nothing."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = command(arguments)
        except Exception:
            return traceback.format_exc()
    return said.getvalue()[-2000:] or f"exit code {code}" if code else ""


def _share(case: Case, shared: Path) -> None:
    kind, _, name = case.name.partition("/")
    found = Path(case.output)
    if kind == "vectors":
        target = shared / "vectors" / name / "task_vector.safetensors"
        found = found / "task_vector.safetensors"
    elif kind == "adamerging":
        target, found = shared / "coefficients.safetensors", found / "coefficients.safetensors"
    else:
        target = shared / found.name
    if found.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.read_bytes())


# Both


def write_clip(shared: Path) -> None:
    """A CLIP that costs next to nothing, with random weights, without lit-merge."""
    from open_clip import model
    from safetensors.torch import save_file

    (shared / "clip.json").write_text(json.dumps(CLIP), encoding="utf-8")
    torch.manual_seed(0)
    save_file(
        {name: value.contiguous() for name, value in model.CLIP(**CLIP).state_dict().items()},
        shared / "clip.safetensors",
    )


def compare(before: Path, after: Path) -> dict[str, Any]:
    """All tensors and the results below two folders, or of two files; ``difference`` is the largest of them."""
    files = [_files(before), _files(after)]
    found: dict[str, Any] = {"tensors": 0, "same": bool(files[0]) and files[0].keys() == files[1].keys()}
    if not found["same"]:
        return {**found, "files": sorted(files[0].keys() ^ files[1].keys()) or "none"}
    different = [
        name for name, path in files[0].items() if name.endswith(".json") and _results(path) != _results(files[1][name])
    ]
    total, largest = hashlib.sha256(), 0.0
    with ExitStack() as stack:
        tensors = [_tensors(side, stack) for side in files]
        different += sorted(tensors[0].keys() ^ tensors[1].keys())
        for name in sorted(tensors[0].keys() & tensors[1].keys()):
            values = [side[name].get_tensor(name.rpartition(": ")[2]) for side in tensors]
            content = _content(name, values[0])
            total.update(content)
            found["tensors"] += 1
            if content == _content(name, values[1]):
                continue
            different.append(name)
            if values[0].shape == values[1].shape and values[0].numel():
                largest = max(largest, float((values[0].double() - values[1].double()).abs().max()))
    if different:
        return {**found, "same": False, "difference": largest, "first": different[:5], "count": len(different)}
    return {**found, "sha256": total.hexdigest()}


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    wanted = (".safetensors", "results.json")
    return {str(file.relative_to(path)): file for file in path.rglob("*") if file.name.endswith(wanted)}


def _tensors(files: dict[str, Path], stack: ExitStack) -> dict[str, Any]:
    """File and tensor -> the opened file; the shards of a model are one file."""
    found = {}
    for name, path in files.items():
        if path.suffix == ".safetensors":
            opened = stack.enter_context(safe_open(path, "pt"))
            whole = re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", name)
            found |= {f"{whole}: {tensor}": opened for tensor in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


def _results(path: Path) -> Any:
    return _without_versions(json.loads(path.read_text(encoding="utf-8")))


def _content(name: str, value: torch.Tensor) -> bytes:
    head = f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode()
    return head + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _without_versions(results: Any) -> Any:
    if isinstance(results, dict):
        return {key: _without_versions(one) for key, one in results.items() if key not in ("versions", "hardware")}
    return [_without_versions(one) for one in results] if isinstance(results, list) else results


def _chosen(name: str, only: list[str]) -> bool:
    if not only:
        return name != "quickstart"
    return any(name == one or name.startswith(f"{one}/") for one in only)


def _commit(checkout: Path) -> str | None:
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None


def main() -> None:
    """Run both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="cases, or groups of them, e.g. fit recipe/ties")
    parser.add_argument("--output", type=Path, help="JSON, e.g. benchmarks/results/same_results.json")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    if options.side:
        side = options.side.name
        run_side(checkouts[side], options.side.parent / "shared", side == "before", options.only)
        return
    with tempfile.TemporaryDirectory() as folder:
        (shared := Path(folder, "shared")).mkdir()
        write_clip(shared)
        outcomes = {}
        for side, checkout in checkouts.items():
            sys.stdout.write(f"{side}: {checkout}\n")
            sys.stdout.flush()
            (own := Path(folder, side)).mkdir()
            environment = {**os.environ, "PYTHONPATH": str(checkout), "LIT_MERGE_CACHE": str(own / "cache")}
            words = [sys.executable, "-P", __file__, str(checkouts["before"]), str(checkouts["after"])]
            only = ["--only", *options.only] if options.only else []
            log = own / "log.txt"
            with log.open("w") as stream:
                side_of = [*words, f"--side={own}", *only]
                code = subprocess.run(side_of, cwd=own, env=environment, stderr=stream, check=False).returncode
            if code:
                sys.exit(f"{side}: {log.read_text(encoding='utf-8')[-4000:]}")
            outcomes[side] = json.loads((own / "outcomes.json").read_text(encoding="utf-8"))
        found = {}
        for name in {**outcomes["before"], **outcomes["after"]}:
            if not _chosen(name, options.only):
                continue
            pair = [outcomes[side].get(name, {"error": "no such recipe"}) for side in checkouts]
            failed = {side: one["error"] for side, one in zip(checkouts, pair, strict=True) if one["error"]}
            outputs = [
                Path(folder, side, one["output"]) for side, one in zip(checkouts, pair, strict=True) if not failed
            ]
            found[name] = {"same": False, "failed": failed} if failed else compare(*outputs)
            found[name] |= {"expected": EXPECTED[name]} if name in EXPECTED else {}
            sys.stdout.write(f"{name}: {_line(found[name])}\n")
    wrong = [name for name, one in found.items() if not one["same"] and "expected" not in one]
    if options.output:
        from lit_merge.report.environment import hardware, versions

        commits = {side: _commit(checkout) for side, checkout in checkouts.items()}
        result = {"commits": commits, "cases": found, "versions": versions(), "hardware": hardware()}
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    same = sum(one["same"] for one in found.values())
    sys.stdout.write(f"{same} of {len(found)} same; {len(wrong)} differ without a reason\n")
    sys.exit(1 if wrong else 0)


def _line(found: dict[str, Any]) -> str:
    if found["same"]:
        return f"same ({found['tensors']} tensors)"
    if "failed" in found:
        return "; ".join(f"{side} failed: {error.strip().splitlines()[-1]}" for side, error in found["failed"].items())
    if "files" in found:
        return f"differs: files {found['files']}"
    reason = f" (expected: {found['expected']})" if "expected" in found else ""
    return f"differs by at most {found['difference']:.3g}: {', '.join(found['first'])} ({found['count']}){reason}"


if __name__ == "__main__":
    main()
