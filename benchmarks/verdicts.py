"""One rule for every claim that one method beats another: paired over test items, combined over seeds.

For a claim "A − B > m" (m is 0 unless the claim has a margin) on T tasks with N_t test items and S fine-tuning seeds,
with h the hits:

- of every item the difference averaged over seeds, d_ti = mean_s (h^A_sti − h^B_sti); the effect is the mean over tasks
  of their means, D = mean_t mean_i d_ti;
- the items' variance V_i = Σ_t var_i(d_ti) / N_t / T², since the same test items are used on every seed;
- the seeds' variance V_s = var_s(D_s) / S of the effect per seed; with one seed it is unknown, and the verdict says so;
- the interval D ± t · sqrt(V_i + V_s), two-sided 95 %, with Satterthwaite's degrees of freedom.

*holds*: the interval lies above m; *does not hold*: it lies below m, or contains m and lies within ± 0.5 points of it
(no difference worth the name); *undecided*: everything else. No verdict comes from a mean over seeds alone or from a
bare sign. With k claims judged at 95 % each, about k / 20 verdicts of true zero differences are expected to be wrong;
the page says k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

__all__ = ["HOLDS", "NOT", "UNDECIDED", "Verdict", "judge"]

HOLDS, NOT, UNDECIDED = "holds", "does not hold", "undecided"
LEVEL = 0.95
NEGLIGIBLE = 0.005
"""An interval that contains the margin and is within this of it shows that there is no difference worth the name."""

Hits = Mapping[str, Tensor]
"""Task -> bool ``[N]`` over the same test items for both methods."""


@dataclass(frozen=True)
class Verdict:
    """A claim, judged.

    Attributes:
        effect: D, as a fraction.
        error: its standard error.
        low: lower end of the interval.
        high: upper end.
        by_seed: the effect on every seed.
        verdict: one of the three.
    """

    effect: float
    error: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    verdict: str

    def __str__(self) -> str:
        return (
            f"{100 * self.effect:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}] ({len(self.by_seed)} seeds: "
            + ", ".join(f"{100 * one:+.2f}" for one in self.by_seed)
            + ")"
        )


def judge(first: Sequence[Hits], second: Sequence[Hits], margin: float = 0.0) -> Verdict:
    """Judge the claim that ``first`` is better than ``second`` by more than ``margin``.

    Args:
        first: A's hits, one mapping per seed.
        second: B's, of the same seeds, tasks and items. A method without seeds is given once per seed.
        margin: m, as a fraction of accuracy.

    Raises:
        ValueError: the two are not of the same seeds, tasks and items.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"expected hits of the same seeds, at least one, got {len(first)} and {len(second)}")
    tasks = list(first[0])
    for own, other in zip(first, second, strict=True):
        if {t: len(own[t]) for t in own} != {t: len(other[t]) for t in other} or set(own) != set(tasks):
            raise ValueError("expected hits of the same tasks and items for both methods")
    per_seed = torch.stack(
        [
            torch.stack([(a[t].double() - b[t].double()).mean() for t in tasks]).mean()
            for a, b in zip(first, second, strict=True)
        ]
    )
    effect, seeds, count = float(per_seed.mean()), len(first), len(tasks)
    items, smallest = 0.0, math.inf
    for task in tasks:
        mean = torch.stack([a[task].double() - b[task].double() for a, b in zip(first, second, strict=True)]).mean(0)
        items += float(mean.var(correction=1)) / len(mean) / count**2 if len(mean) > 1 else 0.0
        smallest = min(smallest, len(mean))
    between = float(per_seed.var(correction=1)) / seeds if seeds > 1 else 0.0
    variance = items + between
    freedom = variance**2 / (items**2 / max(smallest - 1, 1) + between**2 / max(seeds - 1, 1)) if variance else math.inf
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) if math.isfinite(freedom) else 1.96
    error = math.sqrt(variance)
    low, high = effect - quantile * error, effect + quantile * error
    return Verdict(effect, error, low, high, tuple(per_seed.tolist()), _verdict(low, high, margin, seeds))


def _verdict(low: float, high: float, margin: float, seeds: int) -> str:
    if seeds < 2:
        return UNDECIDED
    if low > margin:
        return HOLDS
    within = margin - NEGLIGIBLE <= low and high <= margin + NEGLIGIBLE
    return NOT if high < margin or within else UNDECIDED
