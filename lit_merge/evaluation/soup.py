"""Greedy soups: the average of those vectors that do not lower its validation accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lit_merge.metrics.scores import at_least
from lit_merge.transforms import Mean
from lit_merge.vectors import TaskVector, TaskVectors

__all__ = ["SoupResult", "SoupStep", "greedy_soup"]


@dataclass(frozen=True)
class SoupStep:
    """One vector that was tried.

    Attributes:
        row: its position among the vectors.
        accuracy: of the soup with it.
        kept: whether it stayed in.
    """

    row: int
    accuracy: float
    kept: bool


@dataclass(frozen=True)
class SoupResult:
    """A greedy soup, step by step.

    Attributes:
        individual: every vector's own accuracy, in the order of the vectors.
        steps: the vectors in the order in which they were tried, the best one first.
    """

    individual: list[float]
    steps: list[SoupStep]

    @property
    def chosen(self) -> list[int]:
        """Positions of the vectors in the soup, in the order in which they were added."""
        return [step.row for step in self.steps if step.kept]

    @property
    def accuracy(self) -> float:
        """Accuracy of the soup, at least that of the best vector."""
        return [step.accuracy for step in self.steps if step.kept][-1]


def greedy_soup(vectors: TaskVectors, evaluate: Callable[[TaskVector], float]) -> SoupResult:
    """Average vectors greedily (Wortsman et al. 2022, recipe 1).

    The vectors are sorted by their own accuracy, the best first, equal ones in the given order. The soup starts with
    the first one; each of the others stays in if the mean with it, ``1/|S| Σ_{t ∈ S} τ_t``, is at least as accurate as
    without.

    Args:
        vectors: of one task or of several, T of them.
        evaluate: the accuracy of θ0 + τ on held-out data; called 2 T − 1 times.

    Returns:
        Every step; ``Mean()(vectors.select(result.chosen))`` is the soup.
    """
    individual = [evaluate(vectors.vector(row)) for row in range(len(vectors.tasks))]
    first, *others = sorted(range(len(individual)), key=lambda row: -individual[row])
    chosen, best = [first], individual[first]
    steps = [SoupStep(first, best, True)]
    for row in others:
        accuracy = evaluate(Mean()(vectors.select([*chosen, row])).single())
        steps.append(SoupStep(row, accuracy, at_least(accuracy, best)))
        if steps[-1].kept:
            chosen, best = [*chosen, row], accuracy
    return SoupResult(individual, steps)
