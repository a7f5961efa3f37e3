"""What products of bfloat16 cost on this processor: without units for them, some fifty times those of float32."""

from __future__ import annotations

import time
from functools import cache

import torch

__all__ = ["bfloat16_cost", "slow_precision"]

_SLOW = 3.0
"""A precision is said to be slow from this ratio on; processors with units are below 1, emulation is below 2."""


@cache
def bfloat16_cost(size: int = 256, rounds: int = 3) -> float:
    """How many times as long a product of bfloat16 takes on the processor as one of float32; measured once.

    Args:
        size: of the square matrices; with 256 and a processor without units, about 0.1 seconds.
        rounds: of either, of which the fastest counts.
    """
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return _seconds(matrix.bfloat16(), rounds) / _seconds(matrix, rounds)


def _seconds(matrix: torch.Tensor, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first may choose a kernel
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def slow_precision(precision: str, device: torch.device | str) -> str | None:
    """What to warn of, if products are in bfloat16 on a processor that has no units for them.

    Args:
        precision: as the trainer names it: 32-true, bf16-mixed, bf16-true …
        device: where the network is.
    """
    if not str(precision).startswith("bf16") or torch.device(device).type != "cpu":
        return None
    cost = bfloat16_cost()
    if cost < _SLOW:
        return None
    return (
        f"precision {precision}: this processor has no units for bfloat16; its products take {cost:.0f} times as long "
        "as those of float32 (measured). Use 32-true."
    )
