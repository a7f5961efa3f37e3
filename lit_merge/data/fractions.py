"""How examples are divided into train, val and test where they are not divided beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_merge.errors import ConfigurationError

__all__ = ["checked_fractions", "counts_of"]


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """The fractions of train, val and test.

    Raises:
        ConfigurationError: they are not three numbers with sum 1, or that of train is 0.
    """
    if (
        len(fractions) != 3
        or not all(0 <= fraction <= 1 for fraction in fractions)
        or fractions[0] == 0
        or not math.isclose(sum(fractions), 1, abs_tol=1e-6)
    ):
        raise ConfigurationError(
            f"fractions: expected those of train, val and test, with sum 1 and that of train not 0, got "
            f"{list(fractions)}. Use e.g. [0.8, 0.1, 0.1]."
        )
    first, second, third = fractions
    return first, second, third


def counts_of(count: int, fractions: Sequence[float]) -> list[int]:
    """How many of ``count`` go to train, val and test: at least one where the fraction is not 0."""
    counts = [max(1, math.floor(count * fraction + 0.5)) if fraction > 0 else 0 for fraction in fractions]
    counts[0] = count - counts[1] - counts[2]
    while counts[0] < 1:
        larger = 1 if counts[1] >= counts[2] else 2
        counts[larger] -= 1
        counts[0] += 1
    return counts
