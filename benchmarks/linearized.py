"""A training step of the linearised encoder beside an ordinary one and plain ``torch.func.jvp``, on ViT-B/32.

Time: all variants take turns in one process, several rounds; reported are medians and ratios to the ordinary step of
the same round. A step is forward, cross-entropy and backward; AdamW is timed apart. Memory: the peak of a process (on a
GPU, of the allocator) during three steps of one variant with AdamW, less what it had before the model was built.

    python benchmarks/linearized.py
    python benchmarks/linearized.py --device cuda --batch_size 128 --precision bf16-mixed
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

from lit_merge import LinearizedModel
from lit_merge.evaluation.statistics import collect_kfac
from lit_merge.files.text import write_text
from lit_merge.functional.attention import fast_attention
from lit_merge.metrics import tau_jp_norms
from lit_merge.models import Attention
from lit_merge.modules.curvature import Curvature, curvatures, dtype_of_products
from lit_merge.report.environment import hardware, versions

START, END = "<!-- cost: written by benchmarks/linearized.py -->", "<!-- end of cost -->"
RESULTS = Path(__file__).parents[1] / "benchmarks/results/linearized.json"
OTHERS = 7  # tasks beside the own one, as in the papers' suite
LIMIT = {"linearized": 5 / 3, "attention": 44 / 36}


def tower(device: torch.device) -> nn.Module:
    """The image encoder of ViT-B/32 with random weights."""
    config = open_clip.get_model_config("ViT-B-32")
    torch.manual_seed(0)
    built = open_clip.model._build_vision_tower(
        config["embed_dim"], open_clip.model.CLIPVisionCfg(**config["vision_cfg"])
    )
    return built.to(device)


def variant(name: str, device: torch.device, batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A function that computes the loss of one step, and what it trains."""
    model = tower(device)
    head = torch.randn(10, 512, device=device)
    eighth = max(1, batch // 8)
    count = batch + {"cyclic": eighth, "strict": OTHERS * eighth}.get(name, 0)
    images = torch.randn(count, 3, 224, 224, device=device)
    labels = torch.arange(batch, device=device) % 10

    def objective(features: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(features, dim=-1) @ head.T, labels)

    if name in ("ordinary", "attention_ordinary"):
        if name == "attention_ordinary":
            chosen = set(Attention(1)(dict(model.named_parameters())))
            for key, value in model.named_parameters():
                value.requires_grad_(key in chosen)

        def ordinary() -> Tensor:
            with fast_attention(device):
                return objective(model(images))

        return ordinary, [value for value in model.parameters() if value.requires_grad]
    if name == "plain_jvp":  # as the papers' programs, with only what it needs to run
        initial = {key: value.detach() for key, value in model.eval().named_parameters()}
        tau = {key: torch.zeros_like(value).requires_grad_() for key, value in initial.items()}

        def plain() -> Tensor:
            torch.backends.mha.set_fastpath_enabled(False)
            with sdpa_kernel(SDPBackend.MATH):
                value, tangent = jvp(lambda point: functional_call(model, point, (images,)), (initial,), (tau,))
            torch.backends.mha.set_fastpath_enabled(True)
            return objective(value + tangent)

        return plain, list(tau.values())
    names = Attention(1)(dict(model.named_parameters())) if name == "attention" else None
    linearized = LinearizedModel(model, names)

    forms = factors(model, images[:8]) if name == "tak" else []
    kept: dict[torch.dtype, list[Curvature]] = {}

    def step() -> Tensor:
        value, tangent = linearized.forward_parts(images)
        loss = objective(value[:batch] + tangent[:batch])
        if forms:
            changes = linearized.changes()
            dtype = dtype_of_products(next(iter(changes.values())))
            if dtype not in kept:
                kept[dtype] = [one.to(device, dtype) for one in forms]
            terms = (one.of(changes) for one in kept[dtype])
            return loss + torch.stack([term for term in terms if term is not None]).sum()
        return loss + 0.1 * tau_jp_norms(tangent[batch:]).mean() if count > batch else loss

    return step, list(linearized.parameters())


def factors(model: nn.Module, images: Tensor) -> list[Curvature]:
    """The Kronecker factors of a few images: a penalty's cost does not depend on their values."""
    return curvatures(collect_kfac(model, [images]), dict(model.named_parameters()), "factors")


VARIANTS = ["ordinary", "linearized", "attention_ordinary", "attention", "cyclic", "strict", "tak", "plain_jvp"]


def one_step(loss: Callable[[], Tensor], trained: list[Tensor], device: torch.device, precision: str) -> None:
    """Forward and backward."""
    for value in trained:
        value.grad = None
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        result = loss()
    result.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def timings(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of every variant in every round, and of AdamW."""
    built = {name: variant(name, device, options.batch_size) for name in options.variants}
    seconds: dict[str, list[float]] = {name: [] for name in [*built, "adamw"]}
    for loss, trained in built.values():
        one_step(loss, trained, device, options.precision)
    for _ in range(options.rounds):
        for name, (loss, trained) in built.items():
            started = time.perf_counter()
            one_step(loss, trained, device, options.precision)
            seconds[name].append(time.perf_counter() - started)
    trained = built["ordinary"][1]
    optimizer = torch.optim.AdamW(trained)
    for _ in range(options.rounds + 1):
        started = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds["adamw"].append(time.perf_counter() - started)
    seconds["adamw"] = seconds["adamw"][1:]
    report = {}
    for name, values in seconds.items():
        reference = "linearized" if name in ("cyclic", "strict", "tak") else "ordinary"
        ratios = [value / other for value, other in zip(values, seconds[reference], strict=True)]
        report[name] = {
            "seconds": round(statistics.median(values), 4),
            "spread": [round(min(values), 4), round(max(values), 4)],
            f"ratio_to_{reference}": round(statistics.median(ratios), 3),
            "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return report


def profile(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by operator, the largest first."""
    loss, trained = variant(name, device, options.batch_size)
    one_step(loss, trained, device, options.precision)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as recorded:
        one_step(loss, trained, device, options.precision)
    which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -getattr(row, which))[:12]
    return {row.key: round(getattr(row, which) / 1000, 1) for row in rows}


def peak(name: str, options: argparse.Namespace, device: torch.device) -> float:
    """Megabytes at the peak of three steps with AdamW, less what the process had before."""
    before = _resident()
    loss, trained = variant(name, device, options.batch_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: what built it is not counted
    optimizer = torch.optim.AdamW(trained)
    for _ in range(3):
        one_step(loss, trained, device, options.precision)
        optimizer.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident() - before


def _resident() -> float:
    """Largest resident size so far, in megabytes; ``getrusage`` would count the parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def table(kept: dict[str, Any]) -> str:
    """The costs of docs/regimes.md."""
    lines = []
    for setting, report in kept.items():
        hardware_line = report["hardware"]
        lines += [
            f"ViT-B/32, {setting}, {hardware_line['cores']} cores ({hardware_line['processor']}), torch "
            f"{report['versions']['torch']}, {report['rounds']} rounds:",
            "",
            "| step | seconds | times an ordinary one (range) | peak memory, MB | ratio |",
            "| :-- | --: | --: | --: | --: |",
        ]
        ordinary = report["time"]["ordinary"]["seconds"]
        for name, row in report["time"].items():
            if name == "adamw":
                continue
            reference = "linearized" if "ratio_to_linearized" in row else "ordinary"
            low, high = row["ratio_spread"]
            ratio = f"{row.get('ratio_to_ordinary', row['seconds'] / ordinary):.2f}"
            ratio += (
                f" ({row['ratio_to_linearized']:.2f} × linearised, {low:.2f}–{high:.2f})"
                if reference == "linearized"
                else f" ({low:.2f}–{high:.2f})"
            )
            cells = [name, f"{row['seconds']:.2f}", ratio]
            known = name in report["memory_mb"]  # not of all variants
            cells += [f"{report['memory_mb'][name]:,}", f"{report['memory_ratio'][name]:.2f}"] if known else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append("From `benchmarks/results/linearized.json`, written by `benchmarks/linearized.py`.")
    return "\n".join(lines)


def place(kept: dict[str, Any]) -> None:
    """Put the table into docs/regimes.md."""
    place_between(Path(__file__).parents[1] / "docs/regimes.md", START, END, table(kept))


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--memory_of", help="only print the peak memory of this variant")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.memory_of:
        print(peak(options.memory_of, options, device))
        return
    report: dict[str, Any] = {"time": timings(options, device)}
    report["memory_mb"] = {}
    for name in options.variants:
        arguments = [sys.executable, __file__, "--memory_of", name, "--device", options.device]
        arguments += ["--batch_size", str(options.batch_size), "--precision", options.precision]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        report["memory_mb"][name] = round(float(done.stdout.strip().splitlines()[-1]))
    ordinary = report["memory_mb"]["ordinary"]
    report["memory_ratio"] = {name: round(value / ordinary, 2) for name, value in report["memory_mb"].items()}
    report["profile_ms"] = {name: profile(name, options, device) for name in ("ordinary", "linearized")}
    report["arithmetic_limit"] = {name: round(value, 3) for name, value in LIMIT.items()}
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    kept[f"{options.device}, batch {options.batch_size}, {options.precision}"] = {
        **report,
        "rounds": options.rounds,
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(options.output, json.dumps(kept, indent=2) + "\n")
    if options.output == RESULTS:
        place(kept)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
