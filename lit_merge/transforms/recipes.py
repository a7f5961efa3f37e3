"""Named methods: each is a chain of transforms, visible in one line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Chain, chain
from lit_merge.transforms.reduce import Mean, Negate, Scale, Sum

__all__ = ["RECIPES", "analogy", "negation", "recipe", "task_arithmetic", "weight_average"]


def task_arithmetic(coefficient: float = 0.3) -> Chain:
    """α Σ_t τ_t (Ilharco et al. 2023).

    Args:
        coefficient: α, usually searched over 21 points in [0, 1] on validation data.
    """
    return chain(Sum(), Scale(coefficient))


def weight_average() -> Chain:
    """(1/T) Σ_t τ_t: the average of the fine-tuned weights (Wortsman et al. 2022)."""
    return chain(Mean())


def negation(coefficient: float = 1.0) -> Chain:
    """−α τ: forgetting one task (Ilharco et al. 2023); for exactly one vector.

    Args:
        coefficient: α, usually the one with the lowest target accuracy that keeps 95 % of the control accuracy.
    """
    return chain(Negate(), Scale(coefficient))


def analogy(coefficient: float = 1.0) -> Chain:
    """α (τ_C + (τ_B − τ_A)): "A is to B as C is to …" (Ilharco et al. 2023).

    Args:
        coefficient: α; the vectors come in the order A, B, C.
    """
    return chain(Scale((-coefficient, coefficient, coefficient)), Sum())


RECIPES: dict[str, Callable[..., Chain]] = {
    function.__name__: function for function in (task_arithmetic, weight_average, negation, analogy)
}
"""Name -> function that builds the chain."""


def recipe(name: str, **fields: Any) -> Chain:
    """Build a named method, e.g. ``recipe("task_arithmetic", coefficient=0.4)``.

    Args:
        name: a key of :data:`RECIPES`.
        **fields: arguments of that function.

    Returns:
        The chain.

    Raises:
        ConfigurationError: the name or a field is unknown, or a value is refused.
    """
    if name not in RECIPES:
        raise ConfigurationError(
            f"recipe: expected one of {', '.join(sorted(RECIPES))}, got {name!r}. {_suggestion(name, RECIPES)}"
        )
    known = inspect.signature(RECIPES[name]).parameters
    unknown = [field for field in fields if field not in known]
    if unknown:
        raise ConfigurationError(
            f"recipe {name}: expected fields among {', '.join(known) or 'none'}, got {unknown[0]!r}. "
            f"{_suggestion(unknown[0], known)}"
        )
    return RECIPES[name](**fields)


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else "Use one of these."
