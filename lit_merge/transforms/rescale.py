"""Giving vectors back the size that they had."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.statistic import Statistic

__all__ = ["Rescale"]


@dataclass(frozen=True)
class Rescale(Transform):
    """Scales every vector to the norm of the input that it came from; a merged one to the mean norm of the inputs.

    Undoes what a sparsifying or reducing step did to the size of a vector; a zero vector stays zero.

    Args:
        norm: ``l1``, ``l2`` or ``linf``.
        scope: ``global`` takes the norm of the whole vector, in one pass over the inputs and one over the result so
            far; ``tensor`` that of every parameter by itself.

    Raises:
        ConfigurationError: there is no such norm or scope; on application, if the number of vectors is neither 1 nor
            that of the inputs.
    """

    norm: Literal["l1", "l2", "linf"] = "l2"
    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        self._choice("norm", ("l1", "l2", "linf"))
        self._choice("scope", ("global", "tensor"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every row of the stacks ``(T, *shape)``."""
        inputs = vectors.inputs
        if len(vectors.tasks) not in (1, len(inputs.tasks)):
            raise ConfigurationError(
                f"Rescale: expected 1 or {len(inputs.tasks)} vectors, as many as the inputs, got {len(vectors.tasks)}. "
                "Put it before the vectors are selected."
            )
        if self.scope == "tensor":
            return vectors.map(partial(_rescaled_stack, self.norm, inputs), note=self)
        compute = partial(_global_factors, self.norm, inputs, vectors)
        factors = Statistic("Rescale: norms", inputs.walk + vectors.walk, compute)
        return vectors.map_entries(partial(_rescaled, factors), note=self, statistics=[factors])


def _norms(kind: str, vectors: TaskVectors, names: tuple[str, ...]) -> list[float]:
    totals = [0.0] * len(vectors.tasks)
    for name in names:
        for _, piece in vectors.pieces(name):
            for row, value in enumerate(_powers(kind, piece)):
                totals[row] = max(totals[row], value) if kind == "linf" else totals[row] + value
    return [math.sqrt(total) if kind == "l2" else total for total in totals]


def _powers(kind: str, piece: Tensor) -> list[float]:
    """Σ|x|, Σx² or max|x| of every row, in float64."""
    if piece.shape[1] == 0:
        return [0.0] * len(piece)
    values = piece.double()
    if kind == "linf":
        return values.abs_().amax(1).tolist()
    return (values.square_() if kind == "l2" else values.abs_()).sum(1).tolist()


def _factors(before: list[float], after: list[float]) -> tuple[float, ...]:
    wanted = before if len(before) == len(after) else [math.fsum(before) / len(before)]
    return tuple(one / other if other else 1.0 for one, other in zip(wanted, after, strict=True))


def _global_factors(kind: str, inputs: TaskVectors, vectors: TaskVectors) -> tuple[float, ...]:
    return _factors(_norms(kind, inputs, inputs.names), _norms(kind, vectors, vectors.names))


def _rescaled(factors: Statistic[tuple[float, ...]], name: str, start: int, piece: Tensor) -> Tensor:
    return piece.mul_(torch.tensor(factors(), dtype=piece.dtype, device=piece.device).unsqueeze(1))


def _rescaled_stack(kind: str, inputs: TaskVectors, name: str, stack: Tensor) -> Tensor:
    flat = stack.view(len(stack), -1)
    found = _factors(_norms(kind, inputs, (name,)), [_root(kind, value) for value in _powers(kind, flat)])
    return flat.mul_(torch.tensor(found, dtype=flat.dtype, device=flat.device).unsqueeze(1)).view_as(stack)


def _root(kind: str, value: float) -> float:
    return math.sqrt(value) if kind == "l2" else value
