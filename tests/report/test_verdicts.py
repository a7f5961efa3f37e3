"""The one rule for claims: paired over items, combined over seeds."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from builders.documents import ROOT
from scipy import stats


@pytest.fixture(scope="module")
def rule() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import verdicts

        yield verdicts
        sys.modules.pop("verdicts", None)


def drawn(generator, gain, seeds=3, tasks=2, items=400, spread=0.0):
    """Two methods whose hits are paired: most items are right or wrong for both."""
    easy = [generator.random(items) for _ in range(tasks)]
    first, second = [], []
    for _ in range(seeds):
        shift = gain + spread * generator.standard_normal()
        noise = [generator.normal(0, 0.05, items) for _ in range(tasks)]
        first.append({f"t{t}": torch.from_numpy(easy[t] + noise[t] < 0.7 + shift) for t in range(tasks)})
        second.append({f"t{t}": torch.from_numpy(easy[t] < 0.7) for t in range(tasks)})
    return first, second


def test_effect_error_and_interval_are_those_of_the_definition(rule):
    first, second = drawn(np.random.default_rng(0), 0.03, spread=0.01)
    found = rule.judge(first, second)
    pairs = list(zip(first, second, strict=True))
    d = np.array([[(a[t].numpy().astype(float) - b[t].numpy()) for t in ("t0", "t1")] for a, b in pairs])
    by_seed = d.mean(axis=2).mean(axis=1)
    items = sum(d.mean(axis=0)[t].var(ddof=1) / 400 for t in range(2)) / 4
    between = by_seed.var(ddof=1) / 3
    freedom = (items + between) ** 2 / (items**2 / 399 + between**2 / 2)
    assert found.effect == pytest.approx(by_seed.mean())
    assert found.error == pytest.approx(math.sqrt(items + between))
    assert found.high - found.low == pytest.approx(2 * found.error * stats.t.ppf(0.975, freedom))
    assert found.by_seed == pytest.approx(by_seed)


@pytest.mark.parametrize(
    ("gain", "items", "margin", "verdict"),
    [
        (0.1, 400, 0.0, "holds"),
        (-0.1, 400, 0.0, "does not hold"),
        (0.0, 60, 0.0, "undecided"),
        (0.1, 400, 0.3, "does not hold"),
        (0.0, 20_000, 0.0, "does not hold"),
    ],
)
def test_the_three_verdicts(rule, gain, items, margin, verdict):
    first, second = drawn(np.random.default_rng(1), gain, items=items)
    assert rule.judge(first, second, margin).verdict == verdict


def test_no_verdict_from_one_seed_or_from_signs_alone(rule):
    first, second = drawn(np.random.default_rng(2), 0.2, seeds=1)
    assert rule.judge(first, second).verdict == "undecided"
    one = {"t": torch.tensor([True] * 51 + [False] * 49)}
    other = {"t": torch.tensor([True] * 49 + [False] * 51)}
    assert rule.judge([one] * 3, [other] * 3).verdict == "undecided"  # the same sign on every seed, two items of 100


def test_a_zero_difference_is_seldom_called_one(rule):
    """Over 200 claims of no difference, about one in twenty may be called one; the bound is four deviations above."""
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(200):
        easy = generator.random(500)
        hits = [
            [{"t": torch.from_numpy(easy + generator.normal(0, 0.2, 500) < 0.6)} for _ in range(3)] for _ in range(2)
        ]
        found = rule.judge(*hits)
        wrong += found.low > 0 or found.high < 0
    assert wrong <= 22


def test_what_cannot_be_paired_is_refused(rule):
    one, other = {"t": torch.ones(3, dtype=torch.bool)}, {"t": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="same tasks and items"):
        rule.judge([one], [other])
    with pytest.raises(ValueError, match="same seeds, at least one, got 2 and 1"):
        rule.judge([one, one], [one])
