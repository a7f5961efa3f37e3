"""What an analysis can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lit_merge.errors import ConfigurationError
from lit_merge.metrics.disentanglement import Form
from lit_merge.transforms import Transform
from lit_merge.transforms.base import finite_number, whole_number
from lit_merge.transforms.parts import resolve_transform

__all__ = ["ON_IMAGES", "Analysis", "Grid", "Method", "Paths", "check_analyses", "default_methods"]

Analysis = Literal[
    "cosine", "norms", "signs", "coefficients", "accuracy", "paths", "disentanglement", "tau_jp", "advantage"
]
"""What can be measured."""

ON_IMAGES = ("accuracy", "paths", "disentanglement", "tau_jp", "advantage")
"""The analyses that need a model and images."""


@dataclass(frozen=True)
class Grid:
    """The plane of two coefficients that disentanglement is measured on.

    Args:
        low: the smallest coefficient.
        high: the largest one.
        steps: how many there are, evenly spaced, of each of both vectors.
        forms: what is compared: predicted classes, the softmax of the features, or both.
        pairs: pairs of tasks; by default the first two.

    Raises:
        ConfigurationError: a number is out of its range, a form is unknown, or a pair is none.
    """

    low: float = -3.0
    high: float = 3.0
    steps: int = 20
    forms: list[Form] = field(default_factory=lambda: ["prediction", "representation"])
    pairs: list[list[str]] | None = None

    def __post_init__(self) -> None:
        low, high = (finite_number(f"grid.{name}", value) for name, value in (("low", self.low), ("high", self.high)))
        whole_number("grid.steps", self.steps, minimum=2)
        if low >= high:
            raise ConfigurationError(
                f"grid: expected low below high, got {low:g} and {high:g}. Use e.g. low: -3 and high: 3."
            )
        if not self.forms or any(one not in get_args(Form) for one in self.forms) or _repeats(self.forms):
            raise ConfigurationError(
                f"grid.forms: expected some of {', '.join(get_args(Form))}, each once, got {self.forms}."
            )
        wrong = [pair for pair in self.pairs or [] if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]]
        if wrong or self.pairs == []:
            raise ConfigurationError(
                f"grid.pairs: expected pairs of two different tasks, got {wrong[0] if wrong else 'none'}. "
                "Use e.g. [[digits, letters]]."
            )

    @property
    def values(self) -> list[float]:
        """The coefficients."""
        step = (self.high - self.low) / (self.steps - 1)
        return [round(self.low + index * step, 12) for index in range(self.steps)]


@dataclass(frozen=True)
class Paths:
    """Paths from the pre-trained model to a fine-tuned one: ``θ0 + α τ`` (WiSE-FT), and LiNeS with ``β = 1 − α``.

    Args:
        points: how many values of α there are, evenly spaced in [0, 1].
        tasks: whose vectors; by default all of them.

    Raises:
        ConfigurationError: there are fewer than two points, or no task.
    """

    points: int = 11
    tasks: list[str] | None = None

    def __post_init__(self) -> None:
        whole_number("paths.points", self.points, minimum=2)
        if self.tasks == []:
            raise ConfigurationError("paths.tasks: expected at least one task, got none. Leave it out, or name one.")

    @property
    def values(self) -> list[float]:
        """The values of α."""
        return [round(index / (self.points - 1), 12) for index in range(self.points)]


@dataclass(frozen=True)
class Method:
    """A way to merge all vectors into one, or into one for each task.

    Args:
        recipe: name of a method of :data:`lit_merge.transforms.RECIPES`.
        settings: its arguments.
        transform: instead, any transform by class path.
        parts: instead, a list of names of transforms and recipes, each with its fields if it needs any.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    transform: Transform | None = None
    parts: list[str | dict[str, Any]] | None = None

    def resolved(self) -> Transform:
        """The transform.

        Raises:
            ConfigurationError: not exactly one of them is given, or a name, a field or a value is refused.
        """
        return resolve_transform(self.recipe, self.settings or None, self.transform, self.parts)


def default_methods() -> dict[str, Method]:
    """The methods that are compared where none is named."""
    return {name: Method(name) for name in ("weight_average", "task_arithmetic", "ties")}


def check_analyses(analyses: list[Any]) -> None:
    """Refuse an empty list, an unknown name, and a name twice.

    Raises:
        ConfigurationError: it is one.
    """
    unknown = [name for name in analyses if name not in get_args(Analysis)]
    if unknown or not analyses or _repeats(analyses):
        got = unknown[0] if unknown else "one of them twice" if analyses else "none"
        raise ConfigurationError(f"analyses: expected some of {', '.join(get_args(Analysis))}, got {got}.")


def _repeats(items: list[Any]) -> bool:
    return len(set(items)) < len(items)
