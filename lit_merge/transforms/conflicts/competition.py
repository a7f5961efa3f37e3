"""PCB: an element weighs as much as it matters within its task and agrees with the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.transforms.magnitudes import Cut, cuts_over_all, find_global_cuts, size_of
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import sum_rows

__all__ = ["PCB"]

Cuts = Statistic[tuple[Cut, ...]]
Values = Statistic[tuple[float, ...]]
_SMALLEST_TOTAL = 1e-12  # of an element's weights, as in the authors' program


@dataclass(frozen=True)
class PCB(Transform):
    r"""The weighted mean of what the tasks want of every element, the weights of a task being those of few elements.

    .. math::
        \tau = \frac{\sum_t w_t \hat\tau_t}{\sum_t w_t}, \qquad
        \beta_t = \exp(T n_t^2) \tanh\Big(\tau_t \sum_s \operatorname{sign}(\tau_s)\, n_s\Big)

    Parameter competition balancing (Du et al. 2024), as their program for CLIP computes it: τ̂_t is τ_t with the
    magnitudes limited to the quantiles ``clamp`` and 1 − ``clamp`` of the whole vector; n_t are these magnitudes
    brought to [0, 1]; the first factor of β_t is the competition within a task, the second that between tasks. w_t is
    β_t brought to [0, 1] between its quantile 1 − ``fraction``, below which it is 0, and its maximum. Where no task
    has a weight, the result is 0. The paper's factors are softmaxes, ``Softmax(T · Norm(τ_t ⊙ τ_t))`` and
    ``Σ_s Softmax(Norm(τ_t ⊙ τ_s))``; ``fraction`` is its mask ratio.

    Quantiles are exact, over the whole vector, and found in streamed passes. A quantile q of d elements is the
    ⌊q d⌋-th smallest, counted from 0, the upper one of the magnitudes the one before it, as in the program.

    Args:
        fraction: of each task's elements that have a weight, in (0, 1].
        clamp: the quantile below and above which magnitudes are limited, in [0, 0.5).
        others: what β_t compares τ_t with: ``normalised`` the sum above; ``plain`` the sum of the vectors, as in
            another of their programs, which takes ``clamp`` 0.0001 and ``fraction`` 0.1.

    Raises:
        ConfigurationError: a fraction is out of range, or there is no such sum.
    """

    fraction: float = 0.05
    clamp: float = 0.01
    others: Literal["normalised", "plain"] = "normalised"

    def __post_init__(self) -> None:
        self._fraction("fraction")
        self._number("clamp", minimum=0.0, below=0.5)
        self._choice("others", ("normalised", "plain"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        size = size_of(vectors)
        lower, upper = floor_of(self.clamp, size), max(floor_of(self.clamp, size, upper=True) - 1, 0)
        low = cuts_over_all("PCB: smallest magnitude", vectors, max(size - lower, 1))
        high = cuts_over_all("PCB: largest magnitude", vectors, max(size - max(upper, lower), 1))
        balance = vectors.map_elements(partial(_balance, self.others, low, high), statistics=[low, high])
        positive, negative = (balance.map_elements(partial(_one_side, sign)) for sign in (1, -1))
        place = min(floor_of(self.fraction, size, upper=True), max(size - 1, 0))
        reads = cuts_over_all("", positive, 1).reads
        compute = partial(_signed_threshold, positive, negative, size - place, place + 1)
        threshold: Values = Statistic("PCB: threshold of the balance", 2 * reads, compute, at_most=True)
        largest: Values = Statistic("PCB: largest balance", balance.walk, partial(_largest, balance))
        function = partial(_merged, self.others, low, high, threshold, largest)
        return vectors.reduce_elements(function, note=self, statistics=[low, high, threshold, largest])


def floor_of(fraction: float, size: int, upper: bool = False) -> int:
    """⌊f · size⌋, or ⌊(1 − f) · size⌋, with the fraction read as it is written."""
    exact = Fraction(repr(fraction))
    return int((1 - exact if upper else exact) * size)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _limited(low: Cuts, high: Cuts, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """The magnitudes between the limits, and the same brought to [0, 1]; both ``(T, n)``."""
    lower, upper = (_column(tuple(cut.threshold for cut in cuts()), chunk) for cuts in (low, high))
    magnitudes = chunk.abs().clamp_(min=lower).clamp_(max=upper)
    span = upper - lower  # 0 for a vector of one magnitude, such as zeros
    return magnitudes, (magnitudes - lower).div_(span.masked_fill(span == 0, 1))


def _balance_of(others: str, normalised: Tensor, chunk: Tensor) -> Tensor:
    """β_t up to a factor exp(−T), without which it overflows; the weights do not see it."""
    # In float64 the sum does not depend on the order of the tasks, which would decide what is above the threshold.
    total = torch.zeros_like(chunk[:1], dtype=torch.float64)
    for row, values in zip(chunk, normalised, strict=True):
        total.add_(values.copysign(row).mul_(row != 0) if others == "normalised" else row)
    within = normalised.square().sub_(1).mul_(len(chunk)).exp_()
    return within.mul_((chunk * total).tanh_().to(chunk.dtype))


def _balance(others: str, low: Cuts, high: Cuts, name: str, start: int, chunk: Tensor) -> Tensor:
    return _balance_of(others, _limited(low, high, chunk)[1], chunk) if chunk.numel() else chunk


def _one_side(sign: int, name: str, start: int, chunk: Tensor) -> Tensor:
    return chunk.mul_(sign).relu_()


def _signed_threshold(
    positive: TaskVectors, negative: TaskVectors, from_above: int, from_below: int
) -> tuple[float, ...]:
    """Of every row the element that is the so-manyth largest, which is also the so-manyth smallest."""
    found = [cut.threshold for cut in find_global_cuts(positive, from_above)]
    if all(found):
        return tuple(found)
    below = [cut.threshold for cut in find_global_cuts(negative, from_below)]
    return tuple(above or -under for above, under in zip(found, below, strict=True))


def _largest(balance: TaskVectors) -> tuple[float, ...]:
    found = [one for one in balance.over_chunks(_row_maxima) if one is not None]
    return tuple(torch.stack(found).amax(0).tolist())


def _row_maxima(name: str, start: int, chunk: Tensor) -> Tensor | None:
    return chunk.amax(1).double().cpu() if chunk.numel() else None


def _merged(
    others: str, low: Cuts, high: Cuts, threshold: Values, largest: Values, name: str, start: int, chunk: Tensor
) -> Tensor:
    if not chunk.numel():
        return chunk[:1]
    magnitudes, normalised = _limited(low, high, chunk)
    floor = _column(threshold(), chunk)
    span = _column(largest(), chunk) - floor
    weights = _balance_of(others, normalised, chunk).sub_(floor).clamp_(min=0)
    weights.div_(span.masked_fill(span == 0, 1))
    merged = sum_rows(magnitudes.mul_(chunk.sign_()).mul_(weights))
    return merged.div_(sum_rows(weights).clamp_(min=_SMALLEST_TOTAL))
