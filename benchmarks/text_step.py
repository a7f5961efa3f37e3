"""A training step of linearised language models beside an ordinary one and plain ``torch.func.jvp``.

Three networks of random weights: like BERT (6 layers, width 384: 22.7 million parameters, mean pooling, batch 32 of 64
tokens), like T5-small (60.5 million, text to text, batch 16 of 64 tokens and 8 to predict) and like GPT-2 (6 layers,
width 512: 44.9 million, batch 16 of 64 tokens, of which 16 are predicted). Half of the texts are half as long, so that
padding is masked. All variants take turns in one process, several rounds; reported are medians and ratios to the
ordinary step of the same round. A step is forward, loss and backward.

    python benchmarks/text_step.py
    python benchmarks/text_step.py --device cuda --output benchmarks/results/text_step_cuda.json

A second part merges batches of several lengths (AdaMerging's step over eight tasks, whose texts have 16 to 128 tokens):
all tasks in one padded pass, each in its own, and in groups of similar length as ``MergeModule`` makes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge import LinearizedModel
from lit_merge.data.text.batch import TextBatch
from lit_merge.files.text import write_text
from lit_merge.functional.attention import fast_attention
from lit_merge.functional.tokens import token_losses
from lit_merge.models import Attention
from lit_merge.models.language.modules import CausalModule, EncoderDecoderModule, PooledEncoder
from lit_merge.modules.passes import passes
from lit_merge.report.environment import hardware, versions

VARIANTS = ("ordinary", "linearized", "attention_ordinary", "attention", "plain_jvp")
LENGTHS = (16, 16, 24, 32, 48, 64, 96, 128)
FILLS = (0, 0, -1, -1)
LIMIT = 1.85


def network(name: str, small: bool) -> nn.Module:
    """One of the three; without dropout, as a linearised one has none."""
    torch.manual_seed(0)
    if name == "bert":
        settings = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6}
        config = transformers.BertConfig(**{**settings, **({"num_hidden_layers": 2} if small else {})})
        return PooledEncoder(transformers.BertModel(config, add_pooling_layer=False).eval())
    if name == "t5":
        config = transformers.T5Config(decoder_start_token_id=0, **({"num_layers": 1} if small else {}))
        return EncoderDecoderModule(transformers.T5ForConditionalGeneration(config).eval())
    config = transformers.GPT2Config(n_embd=512, n_head=8, n_layer=2 if small else 6)
    return CausalModule(transformers.GPT2LMHeadModel(config).eval())


def inputs_of(name: str, batch: int, length: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of B texts of which half are padded, and their targets."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30000, (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[batch // 2 :, length // 2 :] = 0
    if name == "bert":
        return (ids, mask), torch.randint(10, (batch,), generator=draw)
    count = 8 if name == "t5" else 16
    targets = torch.randint(1, 30000, (batch, count), generator=draw)
    if name == "t5":
        return (ids, mask, F.pad(targets, (1, -1))), targets
    positions = mask.sum(1, keepdim=True) - count + torch.arange(count)
    return (ids, mask, positions), targets


def loss_of(name: str, output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes by cosine, or of the next tokens."""
    if name == "bert":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            weight = torch.randn(10, output.shape[1])
        return F.cross_entropy(F.normalize(output, dim=-1) @ weight.T.to(output), targets)
    total, count = token_losses(output, targets)
    return (total / count).mean()


def variant(
    kind: str, name: str, inputs: tuple[Tensor, ...], targets: Tensor, small: bool, device: str
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A function that computes the loss of one step, and what it trains."""
    model = network(name, small).to(device)
    own = dict(model.named_parameters())
    chosen = Attention(1)(own)
    if "ordinary" in kind:
        if kind == "attention_ordinary":
            for key, value in own.items():
                value.requires_grad_(key in chosen)

        def ordinary() -> Tensor:
            with fast_attention(inputs[0].device):
                return loss_of(name, model(*inputs), targets)

        return ordinary, [value for value in own.values() if value.requires_grad]
    if kind == "plain_jvp":
        initial = {key: value.detach() for key, value in own.items()}
        tau = {key: torch.zeros_like(value).requires_grad_() for key, value in initial.items()}

        def plain() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                value, tangent = jvp(lambda point: functional_call(model, point, inputs), (initial,), (tau,))
            return loss_of(name, value + tangent, targets)

        return plain, list(tau.values())
    linearized = LinearizedModel(model, chosen if kind == "attention" else None)
    return lambda: loss_of(name, linearized(*inputs), targets), list(linearized.parameters())


def one_step(loss: Callable[[], Tensor], trained: list[Tensor]) -> None:
    """Forward and backward."""
    for value in trained:
        value.grad = None
    loss().backward()


def wait(device: str) -> None:
    """Until an accelerator has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(steps: Mapping[str, Callable[[], None]], rounds: int, reference: str, device: str) -> dict[str, Any]:
    """Seconds of each in every round, and their ratios to the reference of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
    report = {}
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds[reference], strict=True)]
        report[name] = {
            "seconds": round(statistics.median(values), 4),
            f"ratio_to_{reference}": round(statistics.median(ratios), 3),
            "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return report


def steps_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The variants of one network."""
    batch, length = (4, 16) if options.small else (32 if name == "bert" else 16, 64)
    inputs, targets = inputs_of(name, batch, length)
    inputs, targets = tuple(one.to(options.device) for one in inputs), targets.to(options.device)
    steps = {}
    for kind in options.variants:
        built = variant(kind, name, inputs, targets, options.small, options.device)
        steps[kind] = lambda built=built: one_step(*built)
    count = sum(value.numel() for value in network(name, options.small).parameters())
    return {
        "parameters": count,
        "batch": batch,
        "tokens": length,
        **timed(steps, options.rounds, "ordinary", options.device),
    }


def lengths(options: argparse.Namespace) -> dict[str, Any]:
    """One pass of all tasks, one each, and groups of similar length: forward and backward to the weights."""
    model = network("bert", options.small).to(options.device)
    batches = {}
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, 30000, (4 if options.small else 16, length), device=options.device)
        targets, places = torch.zeros(len(ids)), torch.arange(len(ids))
        batches[str(number)] = TextBatch((ids, torch.ones_like(ids)), targets, places, FILLS)
    ways = {
        "together": [list(batches)],
        "apart": [[task] for task in batches],
        "groups": passes(batches),
    }

    def step(groups: list[list[str]]) -> None:
        model.zero_grad()
        for tasks in groups:
            joined = TextBatch.join([batches[task] for task in tasks])
            with fast_attention(joined.inputs[0].device):
                model(*joined.inputs).square().mean().backward()

    steps = {name: lambda groups=groups: step(groups) for name, groups in ways.items()}
    return {
        "tokens": list(LENGTHS),
        "passes": len(ways["groups"]),
        **timed(steps, options.rounds, "together", options.device),
    }


SHOWN = {"bert": "like BERT, 6 layers", "t5": "like T5-small", "gpt2": "like GPT-2, 6 layers"}


def table(measured: Mapping[str, Any]) -> str:
    """What docs/language.md says of it: ratios to an ordinary step of the same round, medians, smallest and largest."""
    lines = [
        "| network | million parameters | ordinary step, s | linearised | attention alone, linearised | plain `jvp` |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name, said in SHOWN.items():
        row = measured[name]
        ratios = " | ".join(_ratio(row[variant]) for variant in ("linearized", "attention", "plain_jvp"))
        lines.append(f"| {said} | {row['parameters'] / 1e6:.1f} | {row['ordinary']['seconds']:.2f} | {ratios} |")
    return "\n".join(lines)


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["ratio_spread"]
    return f"{found['ratio_to_ordinary']:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="+", default=["bert", "t5", "gpt2"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="few layers and tokens: that everything runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/text_step.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {name: steps_of(name, options) for name in options.networks}
    report["lengths"] = lengths(options)
    if options.device != "cpu":
        report["device"] = torch.cuda.get_device_name(options.device)
    report |= {"limit": LIMIT, "rounds": options.rounds, "versions": versions(), "hardware": hardware()}
    write_text(options.output, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
