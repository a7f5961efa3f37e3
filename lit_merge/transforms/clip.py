"""Limiting how far any element moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors

__all__ = ["Clip"]


@dataclass(frozen=True)
class Clip(Transform):
    """``sign(τ) · min(|τ|, limit)``: no element moves further than a limit.

    Of one vector it is NearSwap (alchemonaut 2024, of which there is no paper): the weight of the second of two models
    is ``min(1, t / |θ_2 − θ_1|)`` element by element, so that θ_1 moves towards θ_2 by t at most.

    Args:
        limit: at least 0.

    Raises:
        ConfigurationError: ``limit`` is negative or not finite.
    """

    limit: float = 1e-4

    def __post_init__(self) -> None:
        self._number("limit", minimum=0.0)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Limit every element of the stacks ``(T, *shape)``."""
        return vectors.map_elements(partial(_clipped, self.limit), note=self)


def _clipped(limit: float, name: str, start: int, chunk: Tensor) -> Tensor:
    return chunk.clamp_(-limit, limit)
