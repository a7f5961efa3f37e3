"""Reducing several task vectors to one, and scaling them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform, finite_number
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["Mean", "Negate", "Scale", "Sum"]


@dataclass(frozen=True)
class Sum(Transform):
    """Σ_t τ_t: from T vectors to one (task arithmetic, Ilharco et al. 2023)."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce(_sum, note=self)


@dataclass(frozen=True)
class Mean(Transform):
    """(1/T) Σ_t τ_t: from T vectors to one (weight average, Wortsman et al. 2022)."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce(partial(_mean, len(vectors.tasks)), note=self)


@dataclass(frozen=True)
class Negate(Transform):
    """−τ_t: forgetting a task (Ilharco et al. 2023)."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Negate every stack ``(T, *shape)``."""
        return vectors.map(_negated, note=self)


class _PerTask(dict[str, float]):
    """A dict that is not changed any more, so that a transform which holds one can be hashed."""

    def _refuse(self, *args: Any, **keywords: Any) -> NoReturn:
        raise TypeError("the coefficients of a transform cannot be changed; build another transform")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self),))


@dataclass(frozen=True)
class Scale(Transform):
    """λ τ_t, or λ_t τ_t with one coefficient per task.

    Args:
        coefficient: one finite number for all; or one per task, by task name (all tasks, no others) or in the order of
            the vectors.

    Raises:
        ConfigurationError: a coefficient is not a finite number; on application, if the names or the number of
            per-task coefficients do not fit the vectors.
    """

    coefficient: float | Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        value: Any = self.coefficient
        if isinstance(value, Mapping):
            value = _PerTask(
                {task: finite_number(f"Scale.coefficient[{task!r}]", number) for task, number in value.items()}
            )
        elif isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(finite_number(f"Scale.coefficient[{index}]", number) for index, number in enumerate(value))
        else:
            value = finite_number("Scale.coefficient", value)
        object.__setattr__(self, "coefficient", value)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every stack ``(T, *shape)``."""
        return vectors.map(partial(_scaled, self._coefficients(vectors.tasks)), note=self)

    def _coefficients(self, tasks: tuple[str, ...]) -> float | tuple[float, ...]:
        if isinstance(self.coefficient, float):
            return self.coefficient
        if isinstance(self.coefficient, Mapping):
            return self._by_name(self.coefficient, tasks)
        if len(self.coefficient) != len(tasks):
            raise ConfigurationError(
                f"Scale.coefficient: expected one per task ({len(tasks)}: {', '.join(tasks)}), got "
                f"{len(self.coefficient)}. Give as many as there are vectors, or one number."
            )
        return tuple(self.coefficient)

    def _by_name(self, coefficient: Mapping[str, float], tasks: tuple[str, ...]) -> tuple[float, ...]:
        unknown = [name for name in coefficient if name not in tasks]
        missing = [task for task in tasks if task not in coefficient]
        if unknown or missing:
            got = [f"unknown {', '.join(map(repr, unknown))}"] if unknown else []
            got += [f"nothing for {', '.join(map(repr, missing))}"] if missing else []
            close = difflib.get_close_matches(unknown[0], tasks, n=1) if unknown else []
            hint = f"Did you mean {close[0]!r}?" if close else "Name every task once."
            raise ConfigurationError(
                f"Scale.coefficient: expected the tasks {', '.join(tasks)}, got {' and '.join(got)}. {hint}"
            )
        return tuple(coefficient[task] for task in tasks)


def _sum(name: str, rows: Iterator[Tensor]) -> Tensor:
    total = next(rows).clone()
    for row in rows:
        total.add_(row)
    return total


def _mean(count: int, name: str, rows: Iterator[Tensor]) -> Tensor:
    return _sum(name, rows).div_(count)


def _negated(name: str, stack: Tensor) -> Tensor:
    return stack.neg_()


def _scaled(coefficient: float | tuple[float, ...], name: str, stack: Tensor) -> Tensor:
    if isinstance(coefficient, float):
        return stack.mul_(coefficient)
    factors = torch.tensor(coefficient, dtype=stack.dtype, device=stack.device)
    return stack.mul_(factors.view(-1, *[1] * (stack.dim() - 1)))
