"""A linearised training step on a GPU beside an ordinary one and plain ``torch.func.jvp``, by the rule for attention.

Networks of random weights in bf16-mixed: ViT-B/32 and ViT-B/16 at batch 128, a decoder of GPT-2's size on 2,048 tokens.
A step is forward, cross-entropy and backward. Variants take turns in one process; milliseconds are CUDA events', memory
is what a step takes above what lay there before it. Compiled variants come last, as long as ``--seconds`` allow. What
fails is kept as its error. It needs torch, triton and this package's ``functional``, nothing else.

    python benchmarks/linearized_gpu.py
    python benchmarks/linearized_gpu.py --sweep
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge._version import __version__
from lit_merge.files.text import write_text
from lit_merge.functional import linearize, tangents

NETWORKS = {  # batch, tokens, heads, heads of keys, width of a head, causal
    "ViT-B/32, batch 128": (128, 50, 12, 12, 64, False),
    "ViT-B/16, batch 128": (128, 197, 12, 12, 64, False),
    "decoder of 2,048 tokens, batch 8": (8, 2048, 12, 12, 64, True),
}
ALONE = {**NETWORKS, "Llama's heads, 2,048 tokens, batch 4": (4, 2048, 32, 8, 128, True)}
VARIANTS = ["ordinary", "linearised, dense", "linearised, flash", "plain jvp"]
LAYERS = 12


class Block(nn.Module):
    """A pre-norm transformer's layer on [batch, tokens, width]."""

    def __init__(self, heads: int, width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in packed)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


def network(name: str, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Layers on embedded tokens, their input, and labels."""
    batch, tokens, heads, _, width, causal = NETWORKS[name]
    torch.manual_seed(0)
    layers = [Block(heads, heads * width, causal) for _ in range(LAYERS)]
    module = nn.Sequential(*layers, nn.LayerNorm(heads * width)).to(device)
    return module, torch.randn(batch, tokens, heads * width, device=device), torch.arange(batch, device=device) % 10


@contextmanager
def kernel(variant: str) -> Iterator[None]:
    """The rule that a variant asks for."""
    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(variant != "linearised, dense")
    try:
        with sdpa_kernel(SDPBackend.MATH) if variant == "plain jvp" else nullcontext():
            yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)


def step(variant: str, name: str, device: torch.device, compiled: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A function that computes a step's loss, and what it trains."""
    module, x, labels = network(name, device)
    head = torch.randn(x.shape[-1], 10, device=device) / 30

    def objective(features: Tensor) -> Tensor:
        return F.cross_entropy(features.float().mean(1) @ head, labels)

    initial = {key: value.detach() for key, value in module.named_parameters()}
    tau = {key: (torch.randn_like(value) * 1e-3).requires_grad_() for key, value in initial.items()}

    def evaluate() -> Tensor:
        if variant == "ordinary":
            return objective(module(x))
        if variant == "plain jvp":
            return objective(sum(jvp(lambda point: functional_call(module, point, (x,)), (initial,), (tau,))))
        return objective(sum(linearize(module, {}, tau, x)))

    evaluate = torch.compile(evaluate, dynamic=False) if compiled else evaluate

    def loss() -> Tensor:
        with kernel(variant), torch.autocast(device.type, torch.bfloat16):
            return evaluate()

    return loss, list(module.parameters()) if variant == "ordinary" else list(tau.values())


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds, and the peak of memory in MB above what lay there before."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - started), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), (torch.cuda.max_memory_allocated() - before) / 2**20


def turns(
    functions: dict[str, Callable[[], Any]], rounds: int, device: torch.device, kept: dict[str, Any]
) -> dict[str, Any]:
    """Medians of functions that take turns; the first one is the reference, ``kept`` has what failed before."""
    report: dict[str, Any] = dict(kept)
    seen: dict[str, list[tuple[float, float]]] = {}
    for name, function in functions.items():
        try:
            started = time.perf_counter()
            for _ in range(2):
                timed(function, device)
            seen[name] = []
            report[name] = {"warm_up_seconds": round(time.perf_counter() - started, 1)}
        except Exception as error:
            report[name] = failure(error)
    for _ in range(rounds):
        for name in list(seen):
            try:
                seen[name].append(timed(functions[name], device))
            except Exception as error:
                del seen[name]
                report[name] = failure(error)
    reference = next(iter(functions), None)
    for name, pairs in seen.items():
        milliseconds, memory = zip(*pairs, strict=True)
        report[name] |= {
            "milliseconds": round(statistics.median(milliseconds), 3),
            "spread": [round(min(milliseconds), 3), round(max(milliseconds), 3)],
            "memory_mb": round(max(memory), 1),
        }
        if reference in seen:
            ratios = [one / other for one, (other, _) in zip(milliseconds, seen[reference], strict=True)]
            report[name][f"ratio_to_{reference}"] = round(statistics.median(ratios), 3)
    return report


def failure(error: Exception) -> dict[str, str]:
    """An error as a result; whatever it left on the device is freed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}


def steps(name: str, variants: list[str], compiled: bool, rounds: int, device: torch.device) -> dict[str, Any]:
    """Whole training steps of a network."""
    functions: dict[str, Callable[[], Any]] = {}
    failed: dict[str, Any] = {}
    for variant in variants:
        try:
            loss, trained = step(variant, name, device, compiled)
        except Exception as error:
            failed[variant] = failure(error)
            continue
        functions[variant] = lambda loss=loss, trained=trained: torch.autograd.grad(loss(), trained)
    return turns(functions, rounds, device, failed)


def graph_breaks(variant: str, name: str, device: torch.device) -> dict[str, Any]:
    """How many graphs dynamo makes of a step, and why it stops."""
    try:
        loss, _ = step(variant, name, device, compiled=False)
        torch._dynamo.reset()
        explained = torch._dynamo.explain(loss)()
        reasons = [str(one.reason).strip().splitlines()[0] for one in explained.break_reasons]
        return {"graphs": explained.graph_count, "breaks": explained.graph_break_count, "reasons": sorted(set(reasons))}
    except Exception as error:
        return failure(error)
    finally:
        torch._dynamo.reset()


def drawn(name: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor], bool]:
    """Values and tangents of q, k and v."""
    batch, tokens, heads, shared, width, causal = ALONE[name]
    torch.manual_seed(0)
    sizes = [heads, shared, shared] * 2
    tensors = [torch.randn(batch, one, tokens, width, device=device, dtype=dtype) for one in sizes]
    return tensors[:3], [one.requires_grad_() for one in tensors[3:]], causal


def attention(name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Attention alone, forward and backward: torch's own kernel of the value, our two rules of value and tangent."""
    values, moves, causal = drawn(name, torch.bfloat16, device)
    gqa = {"is_causal": causal, "enable_gqa": values[0].shape[1] != values[1].shape[1]}

    def fused() -> Any:
        leaves = [one.detach().requires_grad_() for one in values]
        y = F.scaled_dot_product_attention(*leaves, **gqa)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    def rule(variant: str) -> Callable[[], Any]:
        def both() -> Any:
            with kernel(variant), torch.autograd.forward_ad.dual_level():
                duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(values, moves, strict=True)]
                tangent = torch.autograd.forward_ad.unpack_dual(tangents._attention(*duals, **gqa)).tangent
                return torch.autograd.grad(tangent, moves, torch.ones_like(tangent))

        return both

    functions = {"torch's kernel, no tangent": fused}
    functions |= {variant: rule(variant) for variant in ("linearised, dense", "linearised, flash")}
    return turns(functions, rounds, device, {})


def agreement(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Relative errors of both rules, of tangents and their gradients, against the dense rule in float64."""
    report: dict[str, Any] = {}
    for name in ALONE:
        values, moves, causal = drawn(name, torch.float32, device)
        values, moves = ([one[:1].detach().to(dtype) for one in group] for group in (values, moves))
        gqa = {"is_causal": causal, "enable_gqa": values[0].shape[1] != values[1].shape[1]}
        g = torch.randn_like(values[0])

        def results(kind: torch.dtype, variant: str) -> list[Tensor]:
            trained = [one.to(kind).requires_grad_() for one in moves]  # noqa: B023
            with kernel(variant), torch.autograd.forward_ad.dual_level():
                duals = [
                    torch.autograd.forward_ad.make_dual(one.to(kind), other)
                    for one, other in zip(values, trained, strict=True)  # noqa: B023
                ]
                pair = torch.autograd.forward_ad.unpack_dual(tangents._attention(*duals, **gqa))  # noqa: B023
            return [*pair, *torch.autograd.grad(pair.tangent, trained, g.to(kind))]  # noqa: B023

        try:
            expected = results(torch.float64, "linearised, dense")
            report[name] = {
                variant: [
                    float(f"{float((one.double() - other).norm() / other.norm()):.2g}")
                    for one, other in zip(results(dtype, variant), expected, strict=True)
                ]
                for variant in ("linearised, dense", "linearised, flash")
            }
        except Exception as error:
            report[name] = failure(error)
    return report


def sweep(device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of the kernels by their blocks, the fastest first; what does not fit is left out."""
    from lit_merge.functional import flash

    started, report = time.perf_counter(), {}
    sizes = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)))
    for name in ("ViT-B/32, batch 128", "decoder of 2,048 tokens, batch 8", "Llama's heads, 2,048 tokens, batch 4"):
        values, moves, causal = drawn(name, torch.bfloat16, device)
        g = torch.randn_like(values[0])
        for kind in ("forward", "queries", "keys"):
            wide = 64 if values[0].shape[-1] <= 64 else 128
            key, rows = (kind, wide, 2), {}
            before = flash._BLOCKS[key]
            trained = {"forward": [], "queries": moves[:1], "keys": moves[1:]}[kind]
            for size in [tuple(before), *sizes]:
                if time.perf_counter() - started > seconds or size[0] * size[1] > 128 * 64:
                    continue
                flash._BLOCKS[key] = flash._Blocks(*size)
                try:
                    _, tangent = flash.attend(*values, *moves, None, causal)
                    if trained:

                        def run() -> Any:
                            return torch.autograd.grad(tangent, trained, g, retain_graph=True)  # noqa: B023
                    else:

                        def run() -> Any:
                            return flash.attend(*values, *moves, None, causal)  # noqa: B023

                    timed(run, device)
                    rows[str(size)] = round(statistics.median(timed(run, device)[0] for _ in range(5)), 4)
                except Exception:  # shared memory or registers
                    torch.cuda.empty_cache()
            flash._BLOCKS[key] = before
            fastest = dict(sorted(rows.items(), key=lambda row: row[1])[:6])
            report[f"{name}, {kind}"] = {"now": {str(tuple(before)): rows.get(str(tuple(before)))}, "fastest": fastest}
    return report


def environment() -> dict[str, Any]:
    """Versions and hardware, of what is installed there."""
    import triton

    return {
        "lit_merge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seconds", type=float, default=150, help="nothing compiled starts later than this")
    parser.add_argument("--compiled", nargs="*", default=["ordinary", "linearised, dense", "linearised, flash"])
    parser.add_argument("--sweep", action="store_true", help="only the kernels by their blocks, which are printed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/linearized_gpu.json"))
    options = parser.parse_args()
    device, started = torch.device(options.device), time.perf_counter()
    if options.sweep:
        print(json.dumps(sweep(device, options.seconds), indent=2))
        return
    report: dict[str, Any] = {"rounds": options.rounds, "precision": "bf16-mixed", "environment": environment()}

    def keep(part: str, key: str, value: Any) -> None:
        report.setdefault(part, {})[key] = value
        write_text(options.output, json.dumps(report, indent=2) + "\n")  # whatever comes after may end the process
        print(part, key, json.dumps(value, indent=1), f"[{time.perf_counter() - started:.0f} s]", flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        keep("relative_errors_of_value_tangent_and_gradients", str(dtype), agreement(dtype, device))
    for name in ALONE:
        keep("attention_alone", name, attention(name, options.rounds, device))
    for name in options.networks:
        keep("steps", name, steps(name, VARIANTS, False, options.rounds, device))
    for name, variant in itertools.product(options.networks, options.compiled):
        if time.perf_counter() - started > options.seconds:
            keep("compiled_steps", f"{name}, {variant}", {"error": "no time was left"})
            continue
        if variant != "ordinary" and name == options.networks[0]:
            keep("graph_breaks", variant, graph_breaks(variant, name, device))
        torch._dynamo.reset()
        keep("compiled_steps", f"{name}, {variant}", steps(name, [variant], True, options.rounds, device)[variant])


if __name__ == "__main__":
    main()
