"""What the points of a search are compared by: pure functions of accuracies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from lit_merge.errors import DataError

__all__ = [
    "at_least",
    "best_point",
    "hypervolume",
    "kept_share",
    "mean_accuracy",
    "negation_score",
    "normalised_accuracy",
    "pareto_front",
    "target_control_score",
]

_ROUNDING = 1e-6  # relative: accuracies are quotients in float32, of which means and quotients are made


def at_least(value: float, other: float) -> bool:
    """Whether ``value >= other``, where what differs by the rounding of accuracies alone counts as equal."""
    return value >= other or math.isclose(value, other, rel_tol=_ROUNDING)


def mean_accuracy(accuracy: Mapping[str, float], tasks: Sequence[str]) -> float:
    """``1/T Σ_t accuracy_t`` over the given tasks, at least one."""
    return sum(accuracy[task] for task in tasks) / len(tasks)


def normalised_accuracy(accuracy: Mapping[str, float], individual: Mapping[str, float]) -> float:
    """``1/T Σ_t accuracy_t / individual_t`` over the tasks of ``accuracy``.

    Raises:
        DataError: an individual accuracy is 0, so that nothing can be divided by it.
    """
    zero = [task for task in accuracy if individual[task] <= 0]
    if zero:
        raise DataError(
            f"normalised accuracy: expected positive individual accuracies, got 0 for {zero[0]}. Fine-tune longer."
        )
    return sum(value / individual[task] for task, value in accuracy.items()) / len(accuracy)


def target_control_score(
    accuracy: Mapping[str, float],
    individual: Mapping[str, float],
    zero_shot: Mapping[str, float],
    target_weight: float = 2.0,
) -> float:
    """What a model does on its own tasks against what it forgets: ``(w N_target + N_control) / (w + 1)``.

    ``N_target`` is the mean over the target tasks of accuracy / accuracy of the single fine-tuned model, ``N_control``
    the mean over the control tasks of accuracy / accuracy of the pre-trained model, as in the program of LiNeS
    (Wang et al. 2025), where w = 2.

    Args:
        accuracy: task -> accuracy, in [0, 1].
        individual: target task -> accuracy of its single model.
        zero_shot: control task -> accuracy of the pre-trained model.
        target_weight: w, at least 0.

    Raises:
        DataError: an accuracy to divide by is 0.
    """
    target = normalised_accuracy({task: accuracy[task] for task in individual}, individual)
    if zero := [task for task, value in zero_shot.items() if value <= 0]:
        raise DataError(
            f"target_control: expected positive accuracies of the pre-trained model, got 0 for {zero[0]}. "
            "Leave this task out of control."
        )
    control = normalised_accuracy({task: accuracy[task] for task in zero_shot}, zero_shot)
    return (target_weight * target + control) / (target_weight + 1)


def negation_score(target: float, control: float, pretrained_control: float, control_share: float = 0.95) -> float:
    """How well a task was forgotten, for a search of the highest: −target where the control accuracy is kept.

    Of the points that keep at least ``control_share · pretrained_control``, the one with the lowest target accuracy has
    the highest score (Ilharco et al. 2023, section 3). All others have a score below −1, the lower the more is lost.

    Args:
        target: mean accuracy on the target tasks, in [0, 1].
        control: mean accuracy on the control tasks, in [0, 1].
        pretrained_control: that of the pre-trained model.
        control_share: the share of it that has to be kept.
    """
    required = control_share * pretrained_control
    return -target if at_least(control, required) else -1 - (required - control)


def kept_share(
    found: Mapping[str, float], pretrained: Mapping[str, float], tasks: Sequence[str], alone: Sequence[str] = ()
) -> float:
    """The share that a model keeps of what the pre-trained one has on control tasks of several measures.

    It is the smallest of the ratios found / pretrained: of the mean over the tasks that are measured alike, by their
    accuracies, and of each of the others by itself. Of ``1 / perplexity`` the ratio is ``perplexity(θ0) /
    perplexity(θ)``, so that to keep 95 % is ``perplexity(θ) ≤ perplexity(θ0) / 0.95``.

    Args:
        found: task -> measure, the more the better.
        pretrained: task -> that of the pre-trained model.
        tasks: the control tasks, at least one.
        alone: those among them that are not measured by accuracy.

    Raises:
        DataError: the pre-trained model has nothing to keep.
    """
    together = [task for task in tasks if task not in alone]
    groups = [[task] for task in tasks if task in alone] + ([together] if together else [])
    shares = []
    for group in groups:
        before = mean_accuracy(pretrained, group)
        if before <= 0:
            raise DataError(
                f"control: expected a positive measure of the pre-trained model, got {before:.4g} for "
                f"{', '.join(group)}. Leave it out of control."
            )
        shares.append(mean_accuracy(found, group) / before)
    return min(shares)


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """The points that no other one dominates.

    A point dominates another one if it is at least as high in every coordinate and higher in one. Equal points do not
    dominate each other.

    Args:
        points: N points of as many coordinates each, to be high.

    Returns:
        The positions of the front's points, ascending.
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return tuple(one) != tuple(other) and all(a >= b for a, b in zip(one, other, strict=True))

    return [index for index, point in enumerate(points) if not any(dominates(other, point) for other in points)]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume that is dominated by some of the points, and dominates a reference point (Zitzler and Thiele 1998).

    That is the volume of the union of the boxes from the reference to each point; a point that is not above the
    reference in every coordinate has none. It is computed exactly, by slices along the last coordinate.

    Args:
        points: N points of d coordinates each, to be high; as many as a front has: time grows as N^d.
        reference: d coordinates.

    Examples:
        >>> hypervolume([(2.0, 1.0), (1.0, 3.0)], (0.0, 0.0))
        4.0
    """
    above = [tuple(point) for point in points if all(a > b for a, b in zip(point, reference, strict=True))]
    if not above:
        return 0.0
    if len(reference) == 1:
        return max(point[0] for point in above) - reference[0]
    volume, upper = 0.0, [*sorted({point[-1] for point in above}, reverse=True), reference[-1]]
    for high, low in itertools.pairwise(upper):
        slice_ = [point[:-1] for point in above if point[-1] >= high]
        volume += (high - low) * hypervolume(slice_, reference[:-1])
    return volume


def best_point(scores: Sequence[float], values: Sequence[Sequence[float]]) -> int:
    """The position of the highest score; among equals (:func:`at_least`), that of the smallest values, in order.

    Args:
        scores: N of them, at least one.
        values: the fields' values at each of the N points.
    """
    known = [-math.inf if math.isnan(score) else score for score in scores]
    equals = [index for index, score in enumerate(known) if at_least(score, max(known))]
    return min(equals, key=lambda index: tuple(values[index]))
