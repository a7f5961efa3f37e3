"""Which elements of a network its outputs are least sensitive to, for fine-tuning that trains nothing else (TaLoS)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, DataError
from lit_merge.functional.evaluation import evaluating
from lit_merge.params import Params, working_dtype

__all__ = ["least_sensitive"]


def least_sensitive(
    module: nn.Module,
    head: nn.Module,
    batches: Callable[[], Iterable[tuple[Any, ...]]],
    names: Sequence[str],
    fraction: float = 0.1,
    rounds: int = 4,
    seed: int = 0,
) -> Params:
    r"""Masks of the elements with the smallest ``Σ_n (∂ z_{n,y} / ∂θ)²``, y drawn from the model (TaLoS, ICLR 2025).

    z are logits at the current parameters. In round r of R the ``fraction^(r/R)`` least sensitive elements of all are
    kept, among those of the round before; the others are multiplied by 0.1 while the next one looks, as in the authors'
    program. Of elements at the threshold all are kept. It costs R backward passes per example, and twice the parameters
    in memory. Parameters, modes and gradients are as before afterwards.

    Args:
        module: inputs -> features.
        head: features -> logits ``[B, C]``.
        batches: gives the inputs of the examples, batch by batch, every time it is called.
        names: of the parameters that may train.
        fraction: of their elements, in (0, 1].
        rounds: R.
        seed: of the drawing.

    Returns:
        Name -> bool tensor of the parameter's shape, on its device; True where it trains.

    Raises:
        ConfigurationError: the outputs are no logits.
        DataError: there is no example.
    """
    own = dict(module.named_parameters())
    chosen: Params = {name: own[name] for name in names}
    required = {name: value.requires_grad for name, value in chosen.items()}
    before = {name: value.detach().clone() for name, value in chosen.items()}
    kept = torch.ones(sum(value.numel() for value in chosen.values()), dtype=torch.bool)
    try:
        for value in chosen.values():
            value.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), evaluating(module, head):
            for number in range(1, rounds + 1):
                generator = torch.Generator().manual_seed(seed + number)
                scores = _scores(module, head, batches(), chosen, generator)
                flat = torch.cat([one.flatten().cpu() for one in scores.values()])
                flat[~kept] = torch.inf
                count = max(1, round(fraction ** (number / rounds) * len(flat)))
                kept = (flat <= flat.kthvalue(count).values) & kept
                _shrink(chosen, before, kept)
    finally:
        with torch.no_grad():
            for name, value in chosen.items():
                value.copy_(before[name])
                value.requires_grad_(required[name])
    return _by_name(chosen, kept)


def _scores(
    module: nn.Module,
    head: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    chosen: Params,
    generator: torch.Generator,
) -> Params:
    totals = {name: torch.zeros_like(value, dtype=working_dtype(value.dtype)) for name, value in chosen.items()}
    empty = True
    for inputs in batches:
        for single in zip(*(one.split(1) for one in inputs), strict=True):
            logits = head(module(*single))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ConfigurationError(
                    f"TaLoS: expected logits [1, C] of one example, got {got}. Use a head of classes."
                )
            drawn = int(torch.multinomial(logits[0].detach().cpu().double().softmax(0), 1, generator=generator))
            gradients = torch.autograd.grad(logits[0, drawn], list(chosen.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.to(total.dtype), gradient.to(total.dtype))
            empty = False
    if empty:
        raise DataError("TaLoS: expected at least one training example, got none. Check the data.")
    return totals


@torch.no_grad()
def _shrink(chosen: Params, before: Params, kept: Tensor) -> None:
    for name, mask in _by_name(chosen, kept).items():
        chosen[name].copy_(torch.where(mask, before[name], 0.1 * before[name]))


def _by_name(chosen: Params, kept: Tensor) -> Params:
    parts = kept.split([value.numel() for value in chosen.values()])
    return {name: part.view_as(chosen[name]).to(chosen[name].device) for name, part in zip(chosen, parts, strict=True)}
