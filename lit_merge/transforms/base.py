"""What a transform is, how transforms are chained, and how their fields are checked.

A transform is a frozen dataclass that maps :class:`~lit_merge.vectors.TaskVectors` to a new lazy view. One that works
on each parameter's stack by itself is a few lines::

    @dataclass(frozen=True)
    class Clip(Transform):
        limit: float = 1.0

        def __post_init__(self) -> None:
            self._number("limit", minimum=0.0)

        def __call__(self, vectors: TaskVectors) -> TaskVectors:
            return vectors.map(self._clip, note=self)

        def _clip(self, name: str, stack: Tensor) -> Tensor:
            return stack.clamp_(-self.limit, self.limit)

One that needs a statistic over all parameters goes through ``vectors`` in ``__call__`` first, one stack at a time.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any

from lit_merge.errors import ConfigurationError
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = [
    "OWN",
    "PACKAGE",
    "Chain",
    "Transform",
    "chain",
    "check_transform",
    "finite_number",
    "one_of",
    "plain_object",
    "whole_number",
]

PACKAGE = __name__.rpartition(".")[0]
OWN: dict[str, type[Transform]] = {}
"""Name -> transform of this package: the only ones that a file's header can ask for, and a part by its bare name."""


@dataclass(frozen=True)
class Transform(ABC):
    """A map from task vectors to task vectors that prints as the expression that builds it, compares and pickles.

    Subclasses are frozen dataclasses, check their fields in ``__post_init__`` (raising ``ConfigurationError``) and do
    not change their input.
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if cls.__module__.startswith(f"{PACKAGE}."):
            OWN[cls.__name__] = cls

    @abstractmethod
    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Apply the transform.

        Args:
            vectors: stacks ``(T, *shape)``.

        Returns:
            A new view with stacks ``(T', *shape)`` of the same names and dtypes; T' = 1 for a reducer.
        """

    def to_config(self) -> dict[str, Any]:
        """The transform as plain data, ``{"class_path": …, "init_args": {…}}``, as jsonargparse reads it."""
        return plain_object(self)

    def _number(
        self, field: str, minimum: float | None = None, maximum: float | None = None, below: float | None = None
    ) -> None:
        """Check that a field is a finite number in a range, and make it a float."""
        value = finite_number(f"{type(self).__name__}.{field}", getattr(self, field), minimum, maximum, below)
        object.__setattr__(self, field, value)

    def _fraction(self, field: str) -> None:
        """Check that a field is a fraction in (0, 1], and make it a float."""
        what = f"{type(self).__name__}.{field}"
        value = finite_number(what, getattr(self, field), minimum=0.0, maximum=1.0)
        if value == 0:
            raise ConfigurationError(f"{what}: expected a fraction above 0 and at most 1, got 0.")
        object.__setattr__(self, field, value)

    def _choice(self, field: str, valid: Sequence[str]) -> None:
        """Check that a field is one of the given strings."""
        one_of(f"{type(self).__name__}.{field}", getattr(self, field), valid)


@dataclass(frozen=True, repr=False)
class Chain(Transform):
    """Transforms applied one after the other, the first one first; without steps, the identity.

    Args:
        steps: the transforms; chains among them are replaced by their own steps.

    Raises:
        ConfigurationError: a step is not a transform.
    """

    steps: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        steps = [self.steps] if isinstance(self.steps, Transform) else list(self.steps)
        for step in steps:
            if not isinstance(step, Transform):
                raise ConfigurationError(
                    f"Chain.steps: expected transforms, got {step!r}. Pass instances, such as Sum() rather than Sum."
                )
        flat = [inner for step in steps for inner in (step.steps if isinstance(step, Chain) else (step,))]
        object.__setattr__(self, "steps", tuple(flat))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Apply the steps in order."""
        for step in self.steps:
            vectors = step(vectors)
        return vectors

    def __repr__(self) -> str:
        return f"chain({', '.join(repr(step) for step in self.steps)})"


def chain(*steps: Transform) -> Chain:
    """Compose transforms, the first one first: ``chain(Sum(), Scale(0.3))``.

    Raises:
        ConfigurationError: a step is not a transform.
    """
    return Chain(steps)


def finite_number(
    what: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> float:
    """Check a number and return it as a float.

    Args:
        what: how the message calls it, e.g. ``"Trim.density"``.
        value: what was given.
        minimum: smallest allowed value.
        maximum: largest allowed value.
        below: a value that it must stay below.

    Raises:
        ConfigurationError: not a number (a bool is none), not finite, or out of range.
    """
    bounds = [f"at least {minimum:g}"] if minimum is not None else []
    bounds += [f"at most {maximum:g}"] if maximum is not None else []
    bounds += [f"below {below:g}"] if below is not None else []
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    too_small = minimum is not None and number < minimum
    too_large = (maximum is not None and number > maximum) or (below is not None and number >= below)
    if not math.isfinite(number) or too_small or too_large:
        expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ConfigurationError(f"{what}: expected {expected}, got {value!r}.")
    return number


def whole_number(what: str, value: Any, minimum: int | None = None, optional: bool = False) -> Any:
    """Check a whole number, or None where it is optional.

    Raises:
        ConfigurationError: no whole number (a bool is none), or too small.
    """
    if optional and value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or (minimum is not None and value < minimum):
        bound = f" of at least {minimum}" if minimum is not None else ""
        bound += " or null" if optional else ""
        raise ConfigurationError(f"{what}: expected a whole number{bound}, got {value!r}.")
    return value


def one_of(what: str, value: Any, valid: Iterable[str]) -> None:
    """Check that a setting is one of the given texts.

    Raises:
        ConfigurationError: it is none of them.
    """
    if value not in valid:
        raise ConfigurationError(f"{what}: expected {' or '.join(valid)}, got {value!r}.")


def check_transform(what: str, value: object) -> None:
    """Check that a field is a transform.

    Raises:
        ConfigurationError: it is something else, such as a class.
    """
    if not isinstance(value, Transform):
        raise ConfigurationError(
            f"{what}: expected a transform, got {value!r}. Pass an instance, such as Sum() rather than Sum."
        )


def plain_object(value: Any) -> dict[str, Any]:
    """A dataclass as plain data, ``{"class_path": …, "init_args": {…}}``, as jsonargparse reads it.

    Raises:
        ConfigurationError: it is no dataclass, or one of its fields cannot be written down.
    """
    if not is_dataclass(value) or isinstance(value, type):
        raise ConfigurationError(
            f"to_config: expected a dataclass, whose fields are its settings, got {value!r}. Make it one."
        )
    arguments = {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
    return {"class_path": _import_path(type(value)), "init_args": arguments}


def _plain(value: Any) -> Any:
    if isinstance(value, Transform):
        return value.to_config()
    if is_dataclass(value) and not isinstance(value, type):  # part of a transform, such as an override
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return _import_path(value)
    raise ConfigurationError(
        f"to_config: expected numbers, strings, transforms or module-level functions, got {value!r}. "
        "Build this transform in Python instead."
    )


def _import_path(item: Any) -> str:
    """The shortest public import path of a class or function: that of the first package above it that exposes it."""
    names = item.__module__.split(".")
    packages = (".".join(names[:depth]) for depth in range(1, len(names)))
    public = (one for one in packages if getattr(sys.modules.get(one), item.__qualname__, None) is item)
    return f"{next(public, item.__module__)}.{item.__qualname__}"
