"""Electing a sign for every element, and reducing the elements that agree with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import sum_rows

__all__ = ["DisjointMean", "DisjointSum", "ElectSign"]

_COLUMNS = 1 << 17


@dataclass(frozen=True)
class ElectSign(Transform):
    """Elects a sign for every element and sets to zero what disagrees with it; there are T vectors still.

    The second step of TIES (Yadav et al. 2023, section 4): the elected sign is that of Σ_t τ_t. Where the sum is zero,
    although some element is not, the sign that was elected most often over the whole vector is taken, as the authors'
    program does; finding it takes one more pass, only if there is such an element.

    Args:
        weighting: ``mass`` elects by the sum of the values, as the paper does; ``count`` by the number of positive and
            negative ones.

    Raises:
        ConfigurationError: there is no such weighting.
    """

    weighting: Literal["mass", "count"] = "mass"

    def __post_init__(self) -> None:
        self._choice("weighting", ("mass", "count"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Keep what agrees, in every stack ``(T, *shape)``."""
        compute = partial(_majority, vectors, self.weighting)
        majority = Statistic("ElectSign: majority sign, where votes are even", vectors.walk, compute, at_most=True)
        return vectors.map_elements(partial(_elected, self.weighting, majority), note=self, statistics=[majority])


@dataclass(frozen=True)
class DisjointMean(Transform):
    """The mean of the elements that are not zero, 0 where all are.

    The third step of TIES (Yadav et al. 2023, section 4).
    """

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce_elements(_disjoint_mean, note=self)


@dataclass(frozen=True)
class DisjointSum(Transform):
    """The sum of the elements that are not zero: as ``Sum``, under the name that goes with ``DisjointMean``."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce_elements(_disjoint_sum, note=self)


def _votes(weighting: str, chunk: Tensor) -> Tensor:
    """The elected signs, ``(1, n)``; 0 where votes are even."""
    if weighting == "count":
        return sum_rows(chunk.sign()).sign_()
    # In float64 the sum of float32 values is exact, but for extreme ratios: neither the order of the tasks nor the
    # length of the chunk decides.
    if _is_for_numpy(chunk):
        total = torch.from_numpy(np.add.reduce(chunk.detach().numpy(), axis=0, dtype=np.float64, keepdims=True))
    else:
        total = chunk.sum(0, keepdim=True, dtype=torch.float64)
    return total.sign_().to(chunk.dtype)


def _is_for_numpy(chunk: Tensor) -> bool:
    """Whether NumPy's reductions can be used, which take half the time of torch's or less."""
    return chunk.device.type == "cpu" and chunk.dtype in (torch.float32, torch.float64)


def _blocks(chunk: Tensor) -> Iterable[Tensor]:
    """The chunk's columns, so few at a time that what is made of them stays in the processor's cache."""
    return chunk.split(_COLUMNS if chunk.device.type == "cpu" else max(1, chunk.shape[1]), dim=1)


def _majority(vectors: TaskVectors, weighting: str) -> float:
    total = sum(vectors.over_chunks(partial(_sum_of_votes, weighting)))
    return float((total > 0) - (total < 0))


def _sum_of_votes(weighting: str, name: str, start: int, chunk: Tensor) -> int:
    return sum(int(_votes(weighting, block).sum(dtype=torch.float64)) for block in _blocks(chunk))


# In floating point where it can be: operators on masks take several times as long.


def _elected(weighting: str, majority: Statistic[float], name: str, start: int, chunk: Tensor) -> Tensor:
    largest = torch.finfo(chunk.dtype).max
    for block in _blocks(chunk):
        sign = _votes(weighting, block)
        undecided = _largest(block).sign_().relu_().mul_(1 - sign.abs())  # votes are even, and some element is positive
        if float(undecided.sum()):
            sign.add_(undecided, alpha=majority())
        torch.clamp(block, sign.clamp(max=0).mul_(largest), sign.clamp(min=0).mul_(largest), out=block)
    return chunk


def _largest(chunk: Tensor) -> Tensor:
    """The largest of every column, ``(1, n)``."""
    if _is_for_numpy(chunk):
        return torch.from_numpy(np.maximum.reduce(chunk.detach().numpy(), axis=0, keepdims=True))
    return chunk.amax(0, keepdim=True)


def _disjoint_mean(name: str, start: int, chunk: Tensor) -> Tensor:
    counts = torch.cat([_counts(block) for block in _blocks(chunk)], dim=1)
    return sum_rows(chunk).div_(counts)


def _counts(chunk: Tensor) -> Tensor:
    """How many elements of every column are not zero, ``(1, n)``, at least 1."""
    if _is_for_numpy(chunk):
        marks = np.not_equal(chunk.detach().numpy(), 0).view(np.int8)
        counts = torch.from_numpy(np.add.reduce(marks, axis=0, dtype=np.int32, keepdims=True))
    else:
        counts = torch.count_nonzero(chunk, dim=0).unsqueeze(0)
    return counts.clamp_(min=1)


def _disjoint_sum(name: str, start: int, chunk: Tensor) -> Tensor:
    return sum_rows(chunk)
