"""RAM: what one task alone has changed stays as it is, what several have changed is averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import sum_rows

__all__ = ["RAM"]

Factors = Statistic[tuple[float, ...]]


@dataclass(frozen=True)
class RAM(Transform):
    """The mean over the tasks that changed an element, and more of what only one of them did: from T vectors to one.

    RAM and RAM+ (Yuan et al. 2026), made for sparse vectors of reinforcement learning. A task has changed an element
    if ``|τ| > threshold``. What several tasks have changed is averaged over them; what only task t has changed is
    multiplied by ``λ_t = 1 + boost · min(ρ_t, limit)``, ρ_t the number of its shared elements over that of its own.

    Args:
        threshold: at least 0.
        boost: at least 0; 0 is RAM. The authors' program takes 0.2 with ``limit`` 1, mergekit 0.1 with 0.2.
        limit: of ρ_t, at least 0.
        scope: ``global`` counts over the whole vector, in one more pass, as the authors' program does; ``tensor``
            within every parameter, as mergekit does.

    Raises:
        ConfigurationError: a number is out of range, or there is no such scope.
    """

    threshold: float = 1e-5
    boost: float = 0.0
    limit: float = 1.0
    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        for field in ("threshold", "boost", "limit"):
            self._number(field, minimum=0.0)
        self._choice("scope", ("global", "tensor"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        if self.boost == 0:
            ones = (1.0,) * len(vectors.tasks)
            return vectors.reduce_elements(partial(_merged_elements, self.threshold, ones), note=self)
        if self.scope == "tensor":
            return vectors.map(partial(_merged_stack, self), tasks=[vectors.merged_tasks], note=self)
        factors: Factors = Statistic("RAM: overlap of each task", vectors.walk, partial(_factors, self, vectors))
        return vectors.reduce_elements(partial(_merged_with, self.threshold, factors), note=self, statistics=[factors])


def _changed(threshold: float, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """1 where a task has changed an element, ``(T, n)``, and how many have, ``(1, n)``."""
    changed = (chunk.abs() > threshold).to(chunk.dtype)
    return changed, changed.sum(0, keepdim=True)


def _counts(threshold: float, name: str, start: int, chunk: Tensor) -> Tensor:
    """Elements of each task that are shared, and that are its own: ``(2, T)``."""
    changed, count = _changed(threshold, chunk)
    return torch.stack([(changed * (count > 1)).sum(1), (changed * (count == 1)).sum(1)]).double().cpu()


def _boosts(transform: RAM, counts: Tensor) -> tuple[float, ...]:
    ratios = [shared / own if own else math.inf if shared else 0.0 for shared, own in counts.T.tolist()]
    return tuple(1 + transform.boost * min(ratio, transform.limit) for ratio in ratios)


def _factors(transform: RAM, vectors: TaskVectors) -> tuple[float, ...]:
    found = list(vectors.over_chunks(partial(_counts, transform.threshold)))
    return _boosts(transform, torch.stack(found).sum(0))


def _merged(threshold: float, factors: tuple[float, ...], chunk: Tensor) -> Tensor:
    changed, count = _changed(threshold, chunk)
    own = torch.tensor(factors, dtype=chunk.dtype, device=chunk.device).unsqueeze(1)
    weights = torch.where(count == 1, own, 1 / count.clamp(min=1))
    return sum_rows(chunk.mul_(changed).mul_(weights))


def _merged_elements(threshold: float, factors: tuple[float, ...], name: str, start: int, chunk: Tensor) -> Tensor:
    return _merged(threshold, factors, chunk)


def _merged_with(threshold: float, factors: Factors, name: str, start: int, chunk: Tensor) -> Tensor:
    return _merged(threshold, factors(), chunk)


def _merged_stack(transform: RAM, name: str, stack: Tensor) -> Tensor:
    flat = stack.reshape(len(stack), -1)
    factors = _boosts(transform, _counts(transform.threshold, name, 0, flat))
    return _merged(transform.threshold, factors, flat).view(1, *stack.shape[1:])
