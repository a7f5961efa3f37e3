"""Named methods: each is a chain of transforms, visible in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from lit_merge.errors import ConfigurationError, did_you_mean
from lit_merge.transforms.base import Chain, Transform, chain
from lit_merge.transforms.depth import LiNeS
from lit_merge.transforms.geometry import KarcherMean, ModelStock, Slerp, Space
from lit_merge.transforms.interference import WUDI
from lit_merge.transforms.learned import LearnedScale, transform_before
from lit_merge.transforms.masks import ConsensusMask, TallMask
from lit_merge.transforms.reduce import Interpolate, Mean, Negate, Scale, Sum
from lit_merge.transforms.signs import DisjointMean, ElectSign
from lit_merge.transforms.sparsify import Drop, DropByRank, MagnitudeWindow, Trim
from lit_merge.transforms.spectral import IsoC, IsoCTS, TSVMerge
from lit_merge.transforms.weighted import FisherMean, RegMean

__all__ = [
    "RECIPES",
    "adamerging",
    "analogy",
    "breadcrumbs",
    "check_call",
    "check_fields",
    "consensus_ta",
    "consensus_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "fisher",
    "iso_c",
    "iso_cts",
    "karcher",
    "lines",
    "model_stock",
    "negation",
    "recipe",
    "regmean",
    "rewarded_soup",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "weight_average",
    "wudi",
]


Coefficient = float | Sequence[float] | Mapping[str, float]
"""One number for the sum of the task vectors, or one for each of them, as :class:`Scale` takes them."""


def task_arithmetic(coefficient: Coefficient = 0.3) -> Chain:
    """α Σ_t τ_t, or Σ_t α_t τ_t (Ilharco et al. 2023).

    Args:
        coefficient: α, usually searched over 21 points in [0, 1] on validation data; or one number per task.
    """
    return chain(*_scaled_sum(coefficient))


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
        density: fraction of the elements that each task vector keeps.
        coefficient: α, usually searched over 0.1 … 1.5 on validation data; the paper's default is 1.
        scope: over what the elements are ranked.
    """
    return chain(Trim(density, scope), ElectSign(), DisjointMean(), Scale(coefficient))


def dare_linear(p: float = 0.9, coefficient: Coefficient = 0.3, seed: int = 0) -> Chain:
    """Drop elements at random and rescale, then task arithmetic (Yu et al. 2024).

    Args:
        p: probability of being dropped.
        coefficient: α, or one number per task.
        seed: of the masks.
    """
    return chain(Drop(p, seed=seed), *_scaled_sum(coefficient))


def dare_ties(p: float = 0.9, density: float = 1.0, coefficient: float = 1.0, seed: int = 0) -> Chain:
    """Drop elements at random and rescale, then TIES (Yu et al. 2024).

    Args:
        p: probability of being dropped.
        density: fraction that TIES keeps of each vector; by default all of what was not dropped.
        coefficient: α.
        seed: of the masks.
    """
    return chain(Drop(p, seed=seed), Trim(density), ElectSign(), DisjointMean(), Scale(coefficient))


def consensus_ta(k: int = 2, threshold: float = 0.4, coefficient: float = 0.3) -> Chain:
    """Task arithmetic without what fewer than k tasks use (Wang et al. 2024).

    Args:
        k: number of tasks that must use an element.
        threshold: λ of the masks.
        coefficient: α.
    """
    return chain(ConsensusMask(k, threshold, Sum()), Scale(coefficient))


def consensus_ties(k: int = 2, threshold: float = 0.4, density: float = 0.2, coefficient: float = 1.0) -> Chain:
    """TIES without what fewer than k tasks use (Wang et al. 2024).

    Args:
        k: number of tasks that must use an element.
        threshold: λ of the masks.
        density: fraction of the elements that each task vector keeps in TIES.
        coefficient: α.
    """
    return chain(ConsensusMask(k, threshold, ties(density)), Scale(coefficient))


def tall_masks(threshold: float = 0.4, density: float | None = None) -> Chain:
    """A vector per task, cut out of the merged one (Wang et al. 2024).

    Args:
        threshold: λ of the masks.
        density: None to cut out of the sum of the vectors, a fraction to cut out of TIES with that density.
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


def breadcrumbs(density: float = 0.85, outliers: float = 0.01, coefficient: Coefficient = 0.3) -> Chain:
    """Task arithmetic without the smallest and the largest elements of each parameter (Davari and Belilovsky 2024).

    Args:
        density: fraction of the elements that is kept.
        outliers: fraction of the largest elements that is left out.
        coefficient: α, or one number per task.
    """
    return chain(MagnitudeWindow(density, outliers), *_scaled_sum(coefficient))


def della(density: float = 0.7, epsilon: float = 0.1, coefficient: float = 1.0, seed: int = 0) -> Chain:
    """Drop small elements more often than large ones, elect signs, average what agrees (Deep et al. 2024).

    Args:
        density: mean fraction that is kept.
        epsilon: half the spread of the probabilities of being kept.
        coefficient: α.
        seed: of the masks.
    """
    return chain(DropByRank(density, epsilon, seed=seed), ElectSign(), DisjointMean(), Scale(coefficient))


def tsv_m(coefficient: float = 1.0) -> Chain:
    """An equal part of the rank for every task, with singular vectors orthogonal to the others' (Gargiulo et al. 2025).

    Args:
        coefficient: α; the paper's default is 1.
    """
    return chain(TSVMerge(), Scale(coefficient))


def iso_c(coefficient: float = 1.0) -> Chain:
    """Task arithmetic with a flat spectrum (Marczak et al. 2025).

    Args:
        coefficient: α, usually searched on validation data.
    """
    return chain(IsoC(), Scale(coefficient))


def iso_cts(common_fraction: float = 0.8, coefficient: float = 1.0) -> Chain:
    """A flat spectrum over directions of the sum and directions of every task (Marczak et al. 2025).

    Args:
        common_fraction: fraction of the rank that the sum takes.
        coefficient: α, usually searched on validation data.
    """
    return chain(IsoCTS(common_fraction), Scale(coefficient))


def wudi(steps: int = 300, coefficient: float = 1.0) -> Chain:
    """The sum, changed so that it disturbs no task where that task's vector acts (Cheng et al. 2025).

    Args:
        steps: of Adam on every matrix.
        coefficient: α; the paper needs none.
    """
    return chain(WUDI(steps), Scale(coefficient))


def slerp(fraction: float = 0.5, space: Space = "weights") -> Chain:
    """A point of the arc between two models (Shoemake 1985); for exactly two vectors.

    Args:
        fraction: 0 gives the first model, 1 the second.
        space: ``weights`` for the arc between the models, which needs the vectors' ``base``; ``task_vectors`` for the
            one between the vectors.
    """
    return chain(Slerp(fraction, space))


def karcher(space: Space = "weights") -> Chain:
    """The mean on the sphere of directions, times the mean norm (Wang, Ye and Yin 2026).

    Args:
        space: ``weights`` for the mean of the models, which needs the vectors' ``base``; ``task_vectors`` for that of
            the vectors.
    """
    return chain(KarcherMean(space))


def model_stock() -> Chain:
    """The mean, shortened by how much the vectors differ (Jang et al. 2024); for at least two vectors."""
    return chain(ModelStock())


def fisher(
    statistics: Mapping[str, str],
    floor: float = 1e-6,
    normalise: Literal["norm", "mean"] | None = "norm",
    coefficient: float = 1.0,
) -> Chain:
    """The mean of the weights, each element weighted by its Fisher information (Matena and Raffel 2022).

    Args:
        statistics: task -> file of its Fisher information, from ``lit-merge statistics --kind fisher``.
        floor: smallest Fisher information.
        normalise: by what that of each task is divided.
        coefficient: α; the paper has none, which is 1.
    """
    return chain(FisherMean(statistics, floor=floor, normalise=normalise), Scale(coefficient))


def regmean(statistics: Mapping[str, str], off_diagonal: float = 0.9, coefficient: float = 1.0) -> Chain:
    """The weights that best reproduce every task's linear layers on its own inputs (Jin et al. 2023).

    Args:
        statistics: task -> file of its Gram matrices, from ``lit-merge statistics --kind gram``.
        off_diagonal: factor of the Gram matrices' off-diagonal elements.
        coefficient: α; the paper has none, which is 1.
    """
    return chain(RegMean(statistics, off_diagonal), Scale(coefficient))


def adamerging(coefficients: str) -> Chain:
    """Σ_t λ_t τ_t with learned coefficients, one per task and group of parameters (Yang et al. 2024).

    What had been applied to the vectors when the coefficients were learned, such as the trimming and the election of
    signs of AdaMerging++, is applied first, as the file says.

    Args:
        coefficients: file of coefficients, from ``lit-merge fit`` with ``MergeModule``, or
            :meth:`lit_merge.vectors.Coefficients.save`.
    """
    before = transform_before(coefficients)
    return chain(*([before] if before else []), LearnedScale(coefficients), Sum())


RECIPES: dict[str, Callable[..., Chain]] = {
    function.__name__: function
    for function in (
        *(weight_average, task_arithmetic, negation, analogy, rewarded_soup),
        *(ties, dare_linear, dare_ties, breadcrumbs, della, consensus_ta, consensus_ties, tall_masks, lines),
        *(tsv_m, iso_c, iso_cts, wudi, slerp, karcher, model_stock),
        *(fisher, regmean, adamerging),
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
        known = ", ".join(sorted(RECIPES))
        raise ConfigurationError(
            f"recipe: expected one of {known}, got {name!r}. {did_you_mean(name, RECIPES)}".rstrip()
        )
    check_call(f"recipe {name}", RECIPES[name], fields)
    return RECIPES[name](**fields)


def check_call(what: str, function: Callable[..., object], fields: Mapping[str, Any]) -> None:
    """Refuse fields that a function does not take, and a call without those that it needs.

    Raises:
        ConfigurationError: a field is unknown or missing.
    """
    known = inspect.signature(function).parameters
    check_fields(what, fields, known)
    needed = [field for field, one in known.items() if one.default is one.empty and field not in fields]
    if needed:
        raise ConfigurationError(f"{what}: expected a value for {', '.join(needed)}, got none.")


def check_fields(what: str, fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse unknown fields.

    Raises:
        ConfigurationError: a field is unknown.
    """
    known = tuple(known)
    unknown = [str(field) for field in fields if field not in known]
    if unknown:
        raise ConfigurationError(
            f"{what}: expected fields among {', '.join(known) or 'none'}, got {unknown[0]!r}. "
            f"{did_you_mean(unknown[0], known)}".rstrip()
        )


def _scaled_sum(coefficient: Coefficient) -> tuple[Transform, Transform]:
    """α Σ_t τ_t, or Σ_t α_t τ_t if there is one number per task."""
    scale = Scale(coefficient)
    return (Sum(), scale) if isinstance(scale.coefficient, float) else (scale, Sum())
