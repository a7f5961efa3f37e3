"""Named methods: each is a chain of transforms, visible in one line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from lit_merge.errors import ConfigurationError, did_you_mean
from lit_merge.transforms.base import Chain, Transform, chain
from lit_merge.transforms.calibration import Calibrate, Polarise
from lit_merge.transforms.clip import Clip
from lit_merge.transforms.conflicts.competition import PCB
from lit_merge.transforms.conflicts.largest import LargestMagnitude, SignMask
from lit_merge.transforms.conflicts.overlap import RAM
from lit_merge.transforms.conflicts.trust_region import TrustRegion
from lit_merge.transforms.conflicts.variance import SCE
from lit_merge.transforms.continual import ProjectedSum, RunningMean
from lit_merge.transforms.covariance import ACE
from lit_merge.transforms.depth import LiNeS
from lit_merge.transforms.directions import TSVDirections
from lit_merge.transforms.essential import ESM
from lit_merge.transforms.fields import parts_of
from lit_merge.transforms.geometry import KarcherMean, ModelStock, Slerp, Space
from lit_merge.transforms.interference import WUDI, OptMerge, SpectralWUDI
from lit_merge.transforms.learned import LearnedScale, transform_before
from lit_merge.transforms.masks import ConsensusMask, TallMask
from lit_merge.transforms.projective import DOGE
from lit_merge.transforms.reduce import Interpolate, Mean, Negate, Scale, Sum
from lit_merge.transforms.rescale import Rescale
from lit_merge.transforms.rotations import OrthoMerge
from lit_merge.transforms.signs import DisjointMean, ElectSign
from lit_merge.transforms.sparsify import Drop, DropByRank, MagnitudeWindow, Trim
from lit_merge.transforms.spectral import CART, DCMerge, IsoC, IsoCTS, TSVMerge
from lit_merge.transforms.subspaces import CoreSpace, KnOTS
from lit_merge.transforms.weighted import FisherMean, RegMean

__all__ = [
    "RECIPES",
    "ace",
    "actmerge",
    "adamerging",
    "analogy",
    "aswudi",
    "breadcrumbs",
    "cart",
    "check_call",
    "check_fields",
    "consensus_ta",
    "consensus_ties",
    "continual",
    "continual_average",
    "core_space",
    "dare_linear",
    "dare_ties",
    "dc_merge",
    "della",
    "doge",
    "emr",
    "esm",
    "fisher",
    "iso_c",
    "iso_cts",
    "iwudi",
    "karcher",
    "knots",
    "lines",
    "magmax",
    "model_stock",
    "nearswap",
    "negation",
    "optmerge",
    "orthomerge",
    "pcb",
    "ram",
    "ram_plus",
    "recipe",
    "regmean",
    "rewarded_soup",
    "sce",
    "slerp",
    "svc",
    "swudi",
    "tall_masks",
    "task_arithmetic",
    "tatr",
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


def magmax(coefficient: float = 0.5) -> Chain:
    """Of every element that of the task where it is largest (Marczak et al. 2024).

    Args:
        coefficient: α; the authors take 0.5 for vectors that were fine-tuned independently.
    """
    return chain(LargestMagnitude(), Scale(coefficient))


def emr() -> Chain:
    """A vector per task: the unified one, masked where its signs are the task's, and rescaled (Huang et al. 2024)."""
    return chain(SignMask(), Rescale("l1"))


def pcb(fraction: float = 0.05, coefficient: float = 1.2) -> Chain:
    """Elements weighed by competition within and between tasks (Du et al. 2024).

    Args:
        fraction: of each task's elements that have a weight.
        coefficient: α; the authors take 1.2, or search a coefficient for every task.
    """
    return chain(PCB(fraction), Scale(coefficient))


def sce(density: float = 0.1, coefficient: float = 1.0) -> Chain:
    """The elements on which tasks differ most, weighed by the tasks' energies (Wan et al. 2024).

    Args:
        density: fraction of the elements of each parameter that is selected.
        coefficient: α; the paper needs none.
    """
    return chain(SCE(density), Scale(coefficient))


def ram(threshold: float = 1e-5, coefficient: float = 1.0) -> Chain:
    """The mean over the tasks that changed an element (Yuan et al. 2026).

    Args:
        threshold: magnitude above which an element has changed.
        coefficient: α; the paper needs none.
    """
    return chain(RAM(threshold), Scale(coefficient))


def ram_plus(threshold: float = 1e-5, boost: float = 0.2, limit: float = 1.0, coefficient: float = 1.0) -> Chain:
    """RAM, with more of what only one task has changed (Yuan et al. 2026).

    Args:
        threshold: magnitude above which an element has changed.
        boost: how much more, times the ratio of a task's shared elements to its own.
        limit: of that ratio.
        coefficient: α; the paper needs none.
    """
    return chain(RAM(threshold, boost, limit), Scale(coefficient))


def tatr(fraction: float = 0.01, statistics: Mapping[str, str] | None = None, coefficient: Coefficient = 0.3) -> Chain:
    """Task arithmetic without the elements in which tasks conflict most (Sun et al. 2025).

    Args:
        fraction: of the elements that is left out.
        statistics: task -> file of its mean absolute gradients, from ``lit-merge statistics --kind gradients``; None
            for the variant without data.
        coefficient: α, or one number per task.
    """
    return chain(TrustRegion(fraction, statistics), *_scaled_sum(coefficient))


def doge(steps: int = 400, strength: float = 0.07, density: float = 0.3, coefficient: float = 1.0) -> Chain:
    """Task arithmetic after a common change that lowers what tasks cost each other (Wei et al. 2025).

    Args:
        steps: of Adam on every matrix.
        strength: of every task in every matrix, times the inverse norm.
        density: fraction of the elements of each vector that is kept.
        coefficient: α; the paper needs none.
    """
    return chain(DOGE(steps, strength=strength, density=density), Scale(coefficient))


def nearswap(limit: float = 1e-4) -> Chain:
    """A step of at most so much towards another model, element by element (alchemonaut 2024); for one vector.

    Args:
        limit: how far an element moves.
    """
    return chain(Clip(limit))


def knots(merge: Transform | None = None, coefficient: float = 1.0) -> Chain:
    """Any merge, in the space of the outputs that the vectors span (Stoica et al. 2024).

    Args:
        merge: by default TIES with density 0.2.
        coefficient: α, usually searched on validation data.
    """
    return chain(KnOTS(merge or ties()), Scale(coefficient))


def core_space(merge: Transform | None = None, coefficient: float = 1.0) -> Chain:
    """Any merge, in the spaces of outputs and inputs that the vectors span (Panariello et al. 2025).

    Args:
        merge: by default TSV-M.
        coefficient: α, usually searched on validation data.
    """
    return chain(CoreSpace(merge or tsv_m()), Scale(coefficient))


def iwudi(time: float = 300.0, coefficient: float = 1.0) -> Chain:
    """WUDI as a gradient descent that is stopped, in closed form (Wei et al. 2026).

    Args:
        time: when it is stopped.
        coefficient: α; the paper needs none.
    """
    return chain(SpectralWUDI(time), Scale(coefficient))


def swudi(time: float = 1300.0, rank: float = 0.65, coefficient: float = 1.0) -> Chain:
    """WUDI as a gradient descent in the strongest directions of the inputs alone (Wei et al. 2026).

    Args:
        time: when it is stopped; the authors take 1300 for ViT-B/32 and 1800 for ViT-B/16.
        rank: fraction of the directions.
        coefficient: α; the paper needs none.
    """
    return chain(SpectralWUDI(time, rank), Scale(coefficient))


def aswudi(coefficient: float = 1.0) -> Chain:
    """WUDI's minimum in as many directions as each matrix's spectrum says; nothing is chosen (Wei et al. 2026).

    Args:
        coefficient: α; the paper needs none.
    """
    return chain(SpectralWUDI(None, "participation"), Scale(coefficient))


def ace(ridge: float = 1e-2, coefficient: float = 1.0) -> Chain:
    """RegMean with covariances that are estimated from the vectors and adapted to their lengths (Xu et al. 2026).

    Args:
        ridge: what is added to the diagonal of every covariance.
        coefficient: α; the paper needs none.
    """
    return chain(ACE(ridge), Scale(coefficient))


def actmerge(floor: float = 1e-8, coefficient: float = 1.0) -> Chain:
    """RegMean with the vectors' own τᵀτ in place of Gram matrices (2026, 2604.01329); needs no data.

    Args:
        floor: of eigenvalues, relative to the largest.
        coefficient: α; the paper needs none.
    """
    return chain(SpectralWUDI(None, normalise=False, floor=floor), Scale(coefficient))


def optmerge(steps: int = 300, coefficient: float = 1.0) -> Chain:
    """WUDI with vectors of low rank (Wei et al. 2025).

    Args:
        steps: of Adam on every matrix.
        coefficient: α; the paper needs none.
    """
    return chain(OptMerge(steps), Scale(coefficient))


def cart(rank_fraction: float = 0.16, coefficient: float = 2.3) -> Chain:
    """The mean, plus what each task has beside it, cut to a low rank (Choi et al. 2024).

    Args:
        rank_fraction: fraction of the rank that a task keeps.
        coefficient: λ of what a task has beside the mean, usually searched on validation data; both defaults are those
            with which AdaRank's authors start on eight tasks of ViT-B/32.
    """
    return chain(CART(rank_fraction, coefficient))


def esm(statistics: Mapping[str, str] | None = None, coefficient: float = 1.0) -> Chain:
    """Each task in the output dimensions that it moves most, with polarised scaling (Li et al. 2026).

    Args:
        statistics: task -> file of its Gram matrices, from ``lit-merge statistics --kind gram``; None for the
            variant without data.
        coefficient: α, searched on validation data.
    """
    return chain(ESM(statistics), Polarise("layers"), Scale(coefficient))


def dc_merge(keep: float = 1e-3, smoothing: Literal["mean", "linear"] | None = None, coefficient: float = 1.0) -> Chain:
    """Sign-elected means of the few largest elements in a space that covers all tasks (2026, 2603.06242).

    Args:
        keep: fraction of the elements that stay there.
        smoothing: of the singular values; the authors take ``mean`` for LoRA.
        coefficient: α, usually searched on validation data.
    """
    return chain(DCMerge(keep, smoothing), Scale(coefficient))


def orthomerge(coefficient: float = 0.2, conflicts: bool = False) -> Chain:
    """What turns the inputs of a weight is merged as rotations, the rest by task arithmetic (Yang et al. 2026).

    Args:
        coefficient: α of the rest; the authors take 0.2 for five language models.
        conflicts: whether only rows that point against the mean of the tasks are rotated.
    """
    return chain(OrthoMerge(chain(Sum(), Scale(coefficient)), conflicts))


def svc(merge: Transform | None = None, alpha: float | None = None) -> Chain:
    """Any merge, then singular value calibration (Li et al. 2026).

    Args:
        merge: its coefficient included; by default task arithmetic with 0.3.
        alpha: smallest projection; by default the authors' for the merge: 1 if TSV-M or WUDI (here: any of its family)
            is in it, also within another part, 0.2 if Iso-CTS is, 0.1 otherwise.
    """
    before = chain(merge or task_arithmetic())
    if alpha is None:
        found = list(parts_of(before, tuple(_CALIBRATED)))
        alpha = next(own for kind, own in _CALIBRATED.items() if isinstance(found[-1], kind)) if found else 0.1
    return chain(before, Calibrate(alpha))


_CALIBRATED: dict[type[Transform], float] = {
    **dict.fromkeys((TSVMerge, TSVDirections, WUDI, OptMerge, SpectralWUDI), 1.0),
    IsoCTS: 0.2,
}


def continual(alpha: float = 0.5, order: Sequence[str] | None = None, coefficient: float = 1.0) -> Chain:
    """One vector after another, each beside the strongest directions of what is merged (OPCM, Tang et al. 2025).

    Args:
        alpha: fraction of the singular values' sum that is protected.
        order: of the tasks, the first one first; by default as the vectors come.
        coefficient: of the mean norm of the vectors, which the merge is brought to.
    """
    return chain(ProjectedSum(alpha, order), Rescale(), Scale(coefficient))


def continual_average() -> Chain:
    """The running average over tasks: of a merge of n tasks and a new vector, (n M + τ) / (n + 1)."""
    return chain(RunningMean())


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
        *(magmax, emr, pcb, sce, ram, ram_plus, tatr, doge, nearswap, knots, core_space),
        *(tsv_m, iso_c, iso_cts, wudi, slerp, karcher, model_stock),
        *(iwudi, swudi, aswudi, actmerge, ace, optmerge, cart, esm, dc_merge, orthomerge, svc),
        *(continual, continual_average),
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
        hint = did_you_mean(name, RECIPES, f"Use one of {', '.join(sorted(RECIPES))}.")
        raise ConfigurationError(f"recipe: expected the name of a method, got {name!r}. {hint}")
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
        told = re.search(rf"^ *{needed[0]}: (.*(?:\n {{5,}}.*)*)", inspect.getdoc(function) or "", re.MULTILINE)
        meaning = f" It is: {' '.join(told[1].replace('``', '').split())}" if told else ""
        raise ConfigurationError(f"{what}: expected a value for {', '.join(needed)}, got none.{meaning}")


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
