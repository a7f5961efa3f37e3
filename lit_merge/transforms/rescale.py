"""Giving vectors back the size that they had."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic

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
            return vectors.map(partial(_rescaled_stack, self.norm), note=self, others=[inputs])
        compute = partial(_global_factors, self.norm, inputs, vectors)
        factors = Statistic("Rescale: norms", inputs.walk + vectors.walk, compute)
        return vectors.map_rows(partial(_rescaled, factors), note=self, statistics=[factors])


_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


def _norms(kind: str, chunks: Iterable[Tensor]) -> list[float]:
    """The norm of every row, from those of its chunks, in float64; no numbers if there is no element."""
    order = _ORDERS[kind]
    found = [torch.linalg.vector_norm(chunk, order, dim=1, dtype=torch.float64) for chunk in chunks if chunk.numel()]
    return torch.linalg.vector_norm(torch.stack(found), order, dim=0).tolist() if found else []


def _all_pieces(vectors: TaskVectors) -> Iterator[Tensor]:
    return (chunk for name in vectors for _, chunk in vectors.chunks(name))


def _factors(before: list[float], after: list[float]) -> tuple[float, ...]:
    wanted = before if len(before) == len(after) else [math.fsum(before) / len(before)]
    return tuple(one / other if other else 1.0 for one, other in zip(wanted, after, strict=True))


def _global_factors(kind: str, inputs: TaskVectors, vectors: TaskVectors) -> tuple[float, ...]:
    return _factors(_norms(kind, _all_pieces(inputs)), _norms(kind, _all_pieces(vectors)))


def _rescaled(factors: Statistic[tuple[float, ...]], row: int, name: str, start: int, values: Tensor) -> None:
    if len(values):
        values.mul_(factors()[row])


def _rescaled_stack(kind: str, name: str, stack: Tensor, before: Tensor) -> Tensor:
    if stack.numel() == 0:
        return stack
    found = _factors(_norms(kind, [before.view(len(before), -1)]), _norms(kind, [stack.view(len(stack), -1)]))
    return _scaled_rows(found, stack.view(len(stack), -1)).view_as(stack)


def _scaled_rows(factors: tuple[float, ...], rows: Tensor) -> Tensor:
    return rows.mul_(torch.tensor(factors, dtype=rows.dtype, device=rows.device).unsqueeze(1))
