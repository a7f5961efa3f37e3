"""What the points of a search are compared by: pure functions of accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_merge.errors import DataError

__all__ = [
    "best_point",
    "mean_accuracy",
    "negation_score",
    "normalised_accuracy",
    "pareto_front",
    "target_control_score",
]


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
    return -target if control >= required else -1 - (required - control)


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


def best_point(scores: Sequence[float], values: Sequence[Sequence[float]]) -> int:
    """The position of the highest score; among equals, that of the smallest values, compared in order.

    Args:
        scores: N of them, at least one.
        values: the fields' values at each of the N points.
    """
    return min(range(len(scores)), key=lambda index: (-scores[index], tuple(values[index])))
