"""Scaling by depth: a factor per block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.naming import Depth
from lit_merge.transforms.base import Transform, finite_number
from lit_merge.transforms.reduce import Sum
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic

__all__ = ["LiNeS", "ScaleBlocks"]


@dataclass(frozen=True)
class ScaleBlocks(Transform):
    """λ_ℓ τ for the parameters of block ℓ.

    Args:
        coefficients: one finite number per block, the first block first.
        outside: the factor of the parameters outside the blocks.

    Raises:
        ConfigurationError: a number is not finite; on application, if the number of blocks is another one.
    """

    coefficients: Sequence[float]
    outside: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.coefficients, str) or not isinstance(self.coefficients, Sequence):
            raise ConfigurationError(
                f"ScaleBlocks.coefficients: expected one number per block, got {self.coefficients!r}. Give a list."
            )
        numbers = [
            finite_number(f"ScaleBlocks.coefficients[{index}]", value) for index, value in enumerate(self.coefficients)
        ]
        object.__setattr__(self, "coefficients", tuple(numbers))
        self._number("outside")

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every stack ``(T, *shape)``."""
        depth = _depth_of(self, vectors)
        if depth.blocks != len(self.coefficients):
            raise ConfigurationError(
                f"ScaleBlocks.coefficients: expected one per block ({depth.blocks}), got {len(self.coefficients)}. "
                "Give as many as the network has blocks."
            )
        return vectors.map_elements(partial(_scaled_by_block, depth, self.coefficients, self.outside), note=self)


@dataclass(frozen=True)
class LiNeS(Transform):
    """Scales block ℓ = 0 … L − 1 by ``α + β · s(ℓ / (L − 1))``: little below, much above (Wang et al. 2025, eq. 3).

    For one task, ``α`` is chosen and ``β = 1 − α``. For several, ``alpha="norm_ratio"`` is the paper's
    ``α = (‖Σ_t τ_t‖₁ / ‖τ‖₁) / T``, where τ is the merged vector that the transform is applied to and τ_t are the
    inputs of the chain, and β is searched. It follows any other transform. Blocks are those of
    :class:`lit_merge.naming.Depth`: of an encoder and a decoder the encoder's first.

    Args:
        alpha: the factor of the first block; or ``norm_ratio``, which takes one more pass over the inputs and one over
            the merged vector, unless that is their plain sum, of which it is 1 / T.
        beta: what is added at the last block; by default ``1 − alpha``.
        schedule: s, the growth with depth: linear, the square root, or quadratic.
        outside: the factor of the parameters outside the blocks (embeddings, the last normalisation, the projection);
            by default ``alpha``, as in the authors' program.

    Raises:
        ConfigurationError: a number is not finite, or there is no such schedule; on application, if no parameter
            belongs to a block, or ``norm_ratio`` meets several vectors.
    """

    alpha: float | Literal["norm_ratio"]
    beta: float | None = None
    schedule: Literal["linear", "sqrt", "quadratic"] = "linear"
    outside: float | None = None

    def __post_init__(self) -> None:
        if self.alpha != "norm_ratio":
            if isinstance(self.alpha, str):
                raise ConfigurationError(f"LiNeS.alpha: expected a finite number or norm_ratio, got {self.alpha!r}.")
            self._number("alpha")
        for name in ("beta", "outside"):
            if getattr(self, name) is not None:
                self._number(name)
        self._choice("schedule", ("linear", "sqrt", "quadratic"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every stack ``(T, *shape)``."""
        depth = _depth_of(self, vectors)
        if self.alpha != "norm_ratio":
            assert not isinstance(self.alpha, str)
            function = partial(_lines, self, depth, self.alpha)
            return vectors.map_elements(function, note=self)
        if len(vectors.tasks) != 1:
            raise ConfigurationError(
                f"LiNeS.alpha: expected one merged vector for norm_ratio, got {len(vectors.tasks)}. "
                "Reduce them first, e.g. with Sum(), or give a number."
            )
        if vectors.sums_inputs and vectors.provenance == (*vectors.inputs.provenance, str(Sum())):
            return vectors.map_elements(partial(_lines, self, depth, 1 / len(vectors.inputs.tasks)), note=self)
        reads = vectors.inputs.walk + vectors.walk
        ratio = Statistic("LiNeS: ratio of norms", reads, partial(_norm_ratio, vectors))
        return vectors.map_elements(partial(_lines, self, depth, ratio), note=self, statistics=[ratio])

    def factors(self, blocks: int, alpha: float) -> list[float]:
        """The factor of each block, the first one first.

        Args:
            blocks: their number L.
            alpha: the value of ``alpha``, or what ``norm_ratio`` came to.
        """
        beta = 1 - alpha if self.beta is None else self.beta
        grow = {"linear": float, "sqrt": math.sqrt, "quadratic": lambda depth: depth**2}[self.schedule]
        return [alpha + beta * grow(index / (blocks - 1) if blocks > 1 else 1.0) for index in range(blocks)]


def _depth_of(transform: Transform, vectors: TaskVectors) -> Depth:
    depth = Depth(vectors.model_names)
    if not depth.blocks:
        name = type(transform).__name__
        raise ConfigurationError(
            f"{name}: expected parameters in numbered blocks, such as blocks.3.mlp.weight, got none among "
            f"{len(vectors)} names. Use another transform for this network."
        )
    return depth


def _scaled_by_block(
    depth: Depth, factors: Sequence[float], outside: float, name: str, start: int, chunk: Tensor
) -> Tensor:
    block = depth.block(name)
    return chunk.mul_(outside if block is None else factors[block])


def _lines(
    transform: LiNeS, depth: Depth, alpha: float | Statistic[float], name: str, start: int, chunk: Tensor
) -> Tensor:
    first = alpha() if isinstance(alpha, Statistic) else alpha
    outside = first if transform.outside is None else transform.outside
    return _scaled_by_block(depth, transform.factors(depth.blocks, first), outside, name, start, chunk)


def _norm_ratio(vectors: TaskVectors) -> float:
    """(‖Σ τ_t‖₁ / ‖τ‖₁) / T; 1 / T for a merged vector of zeros, which no factor changes."""
    inputs = vectors.inputs
    merged = _total(vectors)
    return (_total(Sum()(inputs)) / merged if merged else 1.0) / len(inputs.tasks)


def _total(vectors: TaskVectors) -> float:
    return math.fsum(vectors.over_chunks(_sum_of_magnitudes))


def _sum_of_magnitudes(name: str, start: int, chunk: Tensor) -> float:
    return float(chunk.abs_().sum(dtype=torch.float64))
