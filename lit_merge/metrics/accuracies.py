"""Measures of merged models that count right and wrong answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.metrics.plotting import DrawnMetric
from lit_merge.metrics.scores import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NonlinearAdvantage", "NormalisedAccuracy", "TargetControlTradeOff", "nonlinear_advantage", "right_answers"]

_UNLABELLED = -1


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """How many answers are right, and how many count.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]``, in [0, C), or -1 for what does not count.

    Returns:
        int64 ``[2]``.
    """
    counted = labels != _UNLABELLED
    return torch.stack([((logits.argmax(-1) == labels) & counted).sum(), counted.sum()])


def nonlinear_advantage(linear_error: Tensor | float, nonlinear_error: Tensor | float, classes: int) -> Tensor:
    """``(err_lin − err_nonlin) · C / (C − 1)`` (Ortiz-Jimenez et al. 2023): 1 if the linear model only guesses.

    Args:
        linear_error: share of wrong answers of the linearised model, in [0, 1].
        nonlinear_error: that of the network itself.
        classes: number C of classes, at least 2.

    Returns:
        A float64 scalar.

    Raises:
        ConfigurationError: there are fewer than two classes.
    """
    if classes < 2:
        raise ConfigurationError(f"classes: expected at least 2, got {classes}. Leave this task out.")
    difference = torch.as_tensor(linear_error, dtype=torch.float64) - nonlinear_error
    return difference * classes / (classes - 1)


class NormalisedAccuracy(DrawnMetric):
    """``1/T Σ_t accuracy_t / individual_t`` of a merged model (Ilharco et al. 2023).

    Args:
        individual: task -> accuracy of its own fine-tuned model, in (0, 1].
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: there is no task, or an accuracy to divide by is not in (0, 1].

    Examples:
        >>> import torch
        >>> metric = NormalisedAccuracy({"a": 1.0, "b": 0.5})
        >>> metric.update("a", torch.eye(2), torch.tensor([0, 1]))
        >>> metric.update("b", torch.eye(2), torch.tensor([0, 0]))
        >>> {name: value.tolist() for name, value in metric.compute().items()}
        {'mean': 1.0, 'tasks': [1.0, 1.0]}
    """

    higher_is_better = True
    counts: Tensor

    def __init__(self, individual: Mapping[str, float], **settings: Any) -> None:
        super().__init__(**settings)
        wrong = [f"{value:g} for {task}" for task, value in individual.items() if not 0 < value <= 1]
        if wrong or not individual:
            raise ConfigurationError(
                f"individual: expected accuracies in (0, 1] of at least one task, got {first_few(wrong) or 'none'}. "
                "Fine-tune longer, or leave the task out."
            )
        self.individual = dict(individual)
        self.add_state("counts", torch.zeros(len(individual), 2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, task: str, logits: Tensor, labels: Tensor) -> None:
        """Take in the merged model's answers on some images of a task.

        Args:
            task: one of those of ``individual``.
            logits: ``[N, C]``.
            labels: ``[N]``, in [0, C), or -1 for what does not count.

        Raises:
            ConfigurationError: the task is none of them.
        """
        self.counts[_position(task, list(self.individual))] += right_answers(logits, labels).to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """``tasks``: normalised accuracy of each, float64 ``[T]``, NaN without images; ``mean``: their mean."""
        reference = torch.tensor(list(self.individual.values()), dtype=torch.float64, device=self.counts.device)
        tasks = self.counts[:, 0].double() / self.counts[:, 1] / reference
        return {"mean": tasks.mean(), "tasks": tasks}

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw a bar per task, and a line at the mean."""
        from lit_merge.report.bars import draw_bars

        draw_bars(axes, list(self.individual), {"normalised accuracy": found["tasks"].reshape(-1).tolist()})
        axes.axhline(100 * float(found["mean"]), color="#59636e", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylabel("normalised accuracy (%)")


class NonlinearAdvantage(DrawnMetric):
    """:func:`nonlinear_advantage` over images that both the linearised and the direct model have seen.

    Args:
        classes: number C of classes, at least 2.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: there are fewer than two classes.

    Examples:
        >>> import torch
        >>> metric = NonlinearAdvantage(2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2), torch.tensor([0, 1]))
        >>> float(metric.compute())
        1.0
    """

    counts: Tensor

    def __init__(self, classes: int, **settings: Any) -> None:
        super().__init__(**settings)
        nonlinear_advantage(0.0, 0.0, classes)
        self.classes = classes
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, linear: Tensor, nonlinear: Tensor, labels: Tensor) -> None:
        """Take in both models' answers on some images.

        Args:
            linear: logits ``[N, C]`` of the linearised model.
            nonlinear: logits ``[N, C]`` of the network itself.
            labels: ``[N]``, in [0, C), or -1 for what does not count.
        """
        found = torch.stack([right_answers(linear, labels), right_answers(nonlinear, labels)])
        self.counts += found.to(self.counts)

    def compute(self) -> Tensor:
        """The advantage, a float64 scalar; NaN without images."""
        linear, nonlinear = 1 - self.counts[:, 0].double() / self.counts[:, 1]
        return nonlinear_advantage(linear, nonlinear, self.classes)


class TargetControlTradeOff(DrawnMetric):
    """Accuracy on target tasks against accuracy on control tasks of several models, with the Pareto front.

    Each model is a point ``(mean accuracy of the target tasks, mean accuracy of the control tasks)``: of a path
    ``θ0 + α τ`` (Wortsman et al. 2022b), of LiNeS with several α (Wang et al. 2025), or of whatever is compared.

    Args:
        models: names of the N models.
        target: the tasks that are to be done well.
        control: the tasks that are not to suffer.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: there is no model, no target or no control task, or a task is both.

    Examples:
        >>> import torch
        >>> metric = TargetControlTradeOff(["start", "end"], ["a"], ["b"])
        >>> answers = {("start", "a"): [0, 0], ("start", "b"): [0, 1], ("end", "a"): [0, 1], ("end", "b"): [0, 1]}
        >>> for (model, task), labels in answers.items():
        ...     metric.update(model, task, torch.eye(2), torch.tensor(labels))
        >>> {name: value.tolist() for name, value in metric.compute().items()}
        {'points': [[0.5, 1.0], [1.0, 1.0]], 'front': [False, True]}
    """

    counts: Tensor

    def __init__(self, models: Sequence[str], target: Sequence[str], control: Sequence[str], **settings: Any) -> None:
        super().__init__(**settings)
        both = [task for task in target if task in control]
        if not models or not target or not control or both:
            got = f"{first_few(both)} as both" if both else f"{len(models)}, {len(target)} and {len(control)}"
            raise ConfigurationError(
                f"TargetControlTradeOff: expected models, target tasks and other control tasks, got {got}. "
                "Name at least one of each."
            )
        self.models, self.target, self.control = tuple(models), tuple(target), tuple(control)
        shape = (len(self.models), len(self.target) + len(self.control), 2)
        self.add_state("counts", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, model: str, task: str, logits: Tensor, labels: Tensor) -> None:
        """See :meth:`NormalisedAccuracy.update`; of one of the models on one of the target or control tasks."""
        column = _position(task, [*self.target, *self.control])
        self.counts[_position(model, self.models, "model"), column] += right_answers(logits, labels).to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """``points``: float64 ``[N, 2]``, NaN without images; ``front``: bool ``[N]``, undominated points."""
        accuracy = self.counts[..., 0].double() / self.counts[..., 1]
        count = len(self.target)
        points = torch.stack([accuracy[:, :count].mean(1), accuracy[:, count:].mean(1)], dim=1)
        known = (~points.isnan().any(1)).nonzero().flatten()
        front = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        front[known[pareto_front(points[known].tolist())]] = True
        return {"points": points, "front": front}

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw the points, and the front as a line."""
        from lit_merge.report.curves import draw_trade_off

        points = found["points"].tolist()
        front = [point for point, best in zip(points, found["front"].reshape(-1).tolist(), strict=True) if best]
        draw_trade_off(axes, {"models": points}, front)
        for name, point in zip(self.models, points, strict=True):
            at = (100 * point[0], 100 * point[1])
            axes.annotate(name, at, (4, 4), textcoords="offset points", fontsize=8)


def _position(name: str, known: Sequence[str], what: str = "task") -> int:
    if name not in known:
        raise ConfigurationError(f"{what}: expected one of {', '.join(known)}, got {name!r}. Use one of these.")
    return known.index(name)
