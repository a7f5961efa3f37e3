"""Named methods: each is a chain of transforms, visible in one line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Chain, Transform, chain
from lit_merge.transforms.depth import LiNeS
from lit_merge.transforms.masks import ConsensusMask, TallMask
from lit_merge.transforms.reduce import Interpolate, Mean, Negate, Scale, Sum
from lit_merge.transforms.signs import DisjointMean, ElectSign
from lit_merge.transforms.sparsify import Drop, DropByRank, MagnitudeWindow, Trim

__all__ = [
    "RECIPES",
    "analogy",
    "breadcrumbs",
    "consensus_ta",
    "consensus_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "lines",
    "negation",
    "recipe",
    "rewarded_soup",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "weight_average",
]


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


def rewarded_soup(fraction: float = 0.5) -> Chain:
    """(1 − f) τ_1 + f τ_2 (Ramé et al. 2023); for exactly two vectors.

    Args:
        fraction: f, a point of the path between the two.
    """
    return chain(Interpolate(fraction))


def ties(density: float = 0.2, coefficient: float = 1.0, scope: Literal["global", "tensor"] = "global") -> Chain:
    """Trim, elect signs, average what agrees (Yadav et al. 2023).

    Args:
        density: share of the entries that each task vector keeps.
        coefficient: α, usually searched over 0.1 … 1.5 on validation data; the paper's default is 1.
        scope: over what the entries are ranked.
    """
    return chain(Trim(density, scope), ElectSign(), DisjointMean(), Scale(coefficient))


def dare_linear(p: float = 0.9, coefficient: float = 0.3, seed: int = 0) -> Chain:
    """Drop entries at random and rescale, then task arithmetic (Yu et al. 2024).

    Args:
        p: probability of being dropped.
        coefficient: α.
        seed: of the masks.
    """
    return chain(Drop(p, seed=seed), Sum(), Scale(coefficient))


def dare_ties(p: float = 0.9, density: float = 1.0, coefficient: float = 1.0, seed: int = 0) -> Chain:
    """Drop entries at random and rescale, then TIES (Yu et al. 2024).

    Args:
        p: probability of being dropped.
        density: share that TIES keeps of each vector; by default all of what was not dropped.
        coefficient: α.
        seed: of the masks.
    """
    return chain(Drop(p, seed=seed), Trim(density), ElectSign(), DisjointMean(), Scale(coefficient))


def consensus_ta(k: int = 2, threshold: float = 0.4, coefficient: float = 0.3) -> Chain:
    """Task arithmetic without what fewer than k tasks use (Wang et al. 2024).

    Args:
        k: number of tasks that must use an entry.
        threshold: λ of the masks.
        coefficient: α.
    """
    return chain(ConsensusMask(k, threshold, Sum()), Scale(coefficient))


def consensus_ties(k: int = 2, threshold: float = 0.4, density: float = 0.2, coefficient: float = 1.0) -> Chain:
    """TIES without what fewer than k tasks use (Wang et al. 2024).

    Args:
        k: number of tasks that must use an entry.
        threshold: λ of the masks.
        density: share of the entries that each task vector keeps in TIES.
        coefficient: α.
    """
    return chain(ConsensusMask(k, threshold, ties(density)), Scale(coefficient))


def tall_masks(threshold: float = 0.4, density: float | None = None) -> Chain:
    """A vector per task, cut out of the merged one (Wang et al. 2024).

    Args:
        threshold: λ of the masks.
        density: None to cut out of the sum of the vectors, a share to cut out of TIES with that density.
    """
    return chain(TallMask(threshold, Sum() if density is None else ties(density)))


def lines(
    merge: Transform | None = None,
    alpha: float | Literal["norm_ratio"] = "norm_ratio",
    beta: float = 1.0,
    schedule: Literal["linear", "sqrt", "quadratic"] = "linear",
) -> Chain:
    """Any merge, then scaled by depth (Wang et al. 2025).

    Args:
        merge: by default the sum of the vectors; it needs no coefficient of its own.
        alpha: factor of the first block.
        beta: what is added at the last one, usually searched on validation data.
        schedule: the growth with depth.
    """
    return chain(merge or Sum(), LiNeS(alpha, beta, schedule))


def breadcrumbs(density: float = 0.85, outliers: float = 0.01, coefficient: float = 0.3) -> Chain:
    """Task arithmetic without the smallest and the very largest entries of each parameter (Davari and Belilovsky 2024).

    Args:
        density: share of the entries that is kept.
        outliers: share of the largest entries that is left out.
        coefficient: α.
    """
    return chain(MagnitudeWindow(density, outliers), Sum(), Scale(coefficient))


def della(density: float = 0.7, epsilon: float = 0.1, coefficient: float = 1.0, seed: int = 0) -> Chain:
    """Drop small entries more often than large ones, elect signs, average what agrees (Deep et al. 2024).

    Args:
        density: mean share that is kept.
        epsilon: half the spread of the probabilities of being kept.
        coefficient: α.
        seed: of the masks.
    """
    return chain(DropByRank(density, epsilon, seed=seed), ElectSign(), DisjointMean(), Scale(coefficient))


RECIPES: dict[str, Callable[..., Chain]] = {
    function.__name__: function
    for function in (
        *(weight_average, task_arithmetic, negation, analogy, rewarded_soup),
        *(ties, dare_linear, dare_ties, breadcrumbs, della, consensus_ta, consensus_ties, tall_masks, lines),
    )
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
