"""Reducing several task vectors to one, and scaling them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from lit_merge.errors import ConfigurationError, did_you_mean
from lit_merge.transforms.base import Transform, finite_number
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["Interpolate", "Mean", "Negate", "Scale", "Sum"]


@dataclass(frozen=True)
class Sum(Transform):
    """Σ_t τ_t: from T vectors to one (task arithmetic, Ilharco et al. 2023)."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce_sum(_same, note=self)


@dataclass(frozen=True)
class Mean(Transform):
    """(1/T) Σ_t τ_t: from T vectors to one (weight average, Wortsman et al. 2022)."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce_sum(partial(_divided, len(vectors.tasks)), note=self)


@dataclass(frozen=True)
class Negate(Transform):
    """−τ_t: forgetting a task (Ilharco et al. 2023)."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Negate every stack ``(T, *shape)``."""
        return vectors.map_rows(_negated, note=self)


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
        object.__setattr__(self, "coefficient", per_task("Scale.coefficient", self.coefficient))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every stack ``(T, *shape)``."""
        if isinstance(self.coefficient, float):
            return vectors.map_rows(partial(_scaled, self.coefficient), note=self)
        if len(vectors.tasks) == 1 < len(self.coefficient):
            raise ConfigurationError(
                f"Scale.coefficient: expected one number for the merged vector {vectors.tasks[0]}, got "
                f"{len(self.coefficient)}. Scale before the step that merges, e.g. parts: [{{Scale: {{coefficient: "
                "[1, -1]}, Sum]."
            )
        coefficients = per_task_values("Scale.coefficient", self.coefficient, vectors.tasks)
        return vectors.map_rows(partial(_scaled_by_task, coefficients), note=self)


@dataclass(frozen=True)
class Interpolate(Transform):
    """(1 − f) τ_1 + f τ_2: the path between two vectors (rewarded soups, Ramé et al. 2023, equation 1).

    Args:
        fraction: f; 0 gives the first vector, 1 the second.

    Raises:
        ConfigurationError: ``fraction`` is not a finite number; on application, if there are not exactly two vectors.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        self._number("fraction")

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(2, *shape)`` to ``(1, *shape)``."""
        if len(vectors.tasks) != 2:
            raise ConfigurationError(
                f"Interpolate: expected two vectors, got {len(vectors.tasks)} ({', '.join(vectors.tasks)}). "
                "Select two of them."
            )
        return vectors.reduce_elements(partial(_interpolated, self.fraction), note=self)


def per_task(what: str, value: Any, minimum: float | None = None) -> Any:
    """Check one number for all tasks, or one per task, and make it hashable.

    Args:
        what: how the message calls it.
        value: a number, a mapping task -> number, or a sequence of numbers.
        minimum: smallest allowed number.

    Returns:
        A float, a mapping that cannot be changed, or a tuple.

    Raises:
        ConfigurationError: something is not a finite number or too small.
    """
    if isinstance(value, Mapping):
        return _PerTask({task: finite_number(f"{what}[{task!r}]", number, minimum) for task, number in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(finite_number(f"{what}[{index}]", number, minimum) for index, number in enumerate(value))
    return finite_number(what, value, minimum)


def per_task_values(what: str, value: Any, tasks: tuple[str, ...]) -> tuple[float, ...]:
    """One number for each of the tasks, in their order, from what :func:`per_task` returned.

    Raises:
        ConfigurationError: the names or the number do not fit the tasks.
    """
    if isinstance(value, Mapping):
        return _by_name(what, value, tasks)
    if isinstance(value, float):
        return (value,) * len(tasks)
    if len(value) != len(tasks):
        raise ConfigurationError(
            f"{what}: expected one per task ({len(tasks)}: {', '.join(tasks)}), got {len(value)}. "
            "Give as many as there are vectors, or one number."
        )
    return tuple(value)


def _by_name(what: str, value: Mapping[str, float], tasks: tuple[str, ...]) -> tuple[float, ...]:
    unknown = [name for name in value if name not in tasks]
    missing = [task for task in tasks if task not in value]
    if unknown or missing:
        got = [f"unknown {', '.join(map(repr, unknown))}"] if unknown else []
        got += [f"nothing for {', '.join(map(repr, missing))}"] if missing else []
        hint = did_you_mean(unknown[0] if unknown else "", tasks, "Name every task once.")
        raise ConfigurationError(f"{what}: expected the tasks {', '.join(tasks)}, got {' and '.join(got)}. {hint}")
    return tuple(value[task] for task in tasks)


def _same(name: str, start: int, chunk: Tensor) -> Tensor:
    return chunk


def _divided(count: int, name: str, start: int, chunk: Tensor) -> Tensor:
    return chunk.div_(count)


def _negated(row: int, name: str, start: int, values: Tensor) -> None:
    values.neg_()


def _scaled(coefficient: float, row: int, name: str, start: int, values: Tensor) -> None:
    values.mul_(coefficient)


def _scaled_by_task(coefficients: tuple[float, ...], row: int, name: str, start: int, values: Tensor) -> None:
    values.mul_(coefficients[row])


def _interpolated(fraction: float, name: str, start: int, chunk: Tensor) -> Tensor:
    return (
        chunk[:1].mul_(1 - fraction).add_(chunk[1:].mul_(fraction))
    )  # a fused sum would round otherwise at a chunk's end
