"""Conditioning a task vector before it is merged: another length or more confidence, distilled without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.functional.evaluation import evaluating
from lit_merge.models.merged import swapped
from lit_merge.models.network import TaskWords
from lit_merge.models.parametrisations import Direct, Linearised
from lit_merge.modules.finetune import FineTuneModule
from lit_merge.modules.protocol import check_range
from lit_merge.params import Params
from lit_merge.vectors.task_vector import TaskVector

__all__ = ["ConditionModule", "distillation"]


def distillation(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, float], counted: Tensor | None = None
) -> Tensor:
    """``T_t T_s KL(σ(z_t / T_t) ‖ σ(z_s / T_s))``, the mean over examples (DisTaC, Yoshida et al. 2026).

    Args:
        student: z_s, logits ``[B, C]``; or ``[B, M, V]`` of next tokens, of which an example's mean is taken, zeros at
            positions where nothing is predicted.
        teacher: z_t, of the same shape.
        temperatures: T_t and T_s. Equal ones ask for the teacher's predictions; with T_t < T_s the student becomes more
            confident.
        counted: ``[B]``, which examples count; all by default.

    Returns:
        A scalar.
    """
    of_teacher, of_student = temperatures
    wanted = (teacher.detach().float() / of_teacher).log_softmax(-1)
    found = (student.float() / of_student).log_softmax(-1)
    losses = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    if losses.ndim == 2:
        predicted = (teacher != 0).any(-1)
        losses = (losses * predicted).sum(-1) / predicted.sum(-1).clamp(min=1)
    losses = losses if counted is None else losses[counted]
    return of_teacher * of_student * losses.mean()


class ConditionModule(FineTuneModule):
    """Distils a task vector into one of another length or confidence, on unlabelled examples of its task.

    DisTaC (Yoshida et al. 2026, as in the authors' program). The student starts at ``θ0 + κ τ``, the teacher is
    ``θ0 + τ``; minimised is :func:`distillation` plus ``β ‖θ − (θ0 + κ τ)‖²``. Vectors that are much longer than others
    are shrunk with κ below 1; models of low confidence are sharpened with κ = 1 and temperatures (1, 10). Labels, if
    the data have any, are only what the logged accuracy is of. The outcome is a task vector as of any fine-tuning. Both
    have the task's head, which does not train: a classifier of its own is the one that lies beside τ.

    The authors take 500 steps of Adam at 1e-5 with batches of 128, of which their defaults make all a linear warm-up.

    Args:
        task_vector: file of τ.
        scale: κ, positive; by default the mean norm of ``others`` divided by the own one, or 1 without others.
        others: files of the task vectors that it is to be merged with.
        temperatures: of the teacher and of the student.
        anchor: β.
        weight_decay: of AdamW; 0 makes it Adam.
        **settings: of :class:`~lit_merge.FineTuneModule`, but for its objective.

    Attributes:
        scale: κ.

    Raises:
        ConfigurationError: a number is out of its range, settings exclude each other, or an objective is given; in fit,
            the task has a number instead of classes, or nobody has trained its classifier.
    """

    def __init__(
        self,
        task_vector: str,
        scale: float | None = None,
        others: list[str] | None = None,
        temperatures: tuple[float, float] = (10.0, 10.0),
        anchor: float = 0.1,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        check_range("anchor", anchor)
        if len(temperatures) != 2 or min(temperatures) <= 0:
            raise ConfigurationError(
                f"temperatures: expected two positive numbers, the teacher's and the student's, got {temperatures!r}."
            )
        if scale is not None and (others is not None or not scale > 0):
            got = "both" if others is not None else f"scale {scale}"
            raise ConfigurationError(
                f"scale and others: expected a positive number, or files whose mean norm is wanted, got {got}. Change "
                "one of them."
            )
        if given := [name for name in ("objective", "label_smoothing", "weights") if settings.get(name)]:
            raise ConfigurationError(
                f"{given[0]}: expected none, as a task vector is distilled, got {settings[given[0]]!r}. Remove it."
            )
        super().__init__(weight_decay=weight_decay, **settings)
        if not isinstance(self.parametrisation, Direct | Linearised):
            raise ConfigurationError(
                f"parametrisation: expected all weights to distil into, got {self.parametrisation!r}. Remove it."
            )
        vector = TaskVector.load(task_vector, verify=True)
        self.scale = scale if scale is not None else _scale(vector, others or [])
        self.temperatures, self.anchor = temperatures, anchor
        self.load_task_vector(vector)
        self._teacher = self._copy()
        self.load_task_vector(vector, self.scale)
        self._start = self._copy()
        self.look_beside([(task_vector, None)])

    @property
    def regime(self) -> str:
        """How the vector was made, as its header has it."""
        first, second = self.temperatures
        how = f"scale={self.scale:.4g}, temperatures=({first:g}, {second:g}), anchor={self.anchor:g}"
        return f"{super().regime}, conditioned({how})"

    def _copy(self) -> Params:
        return {name: own.detach().clone() for name, own in self.encoder.named_parameters()}

    def starts_head(self, task: TaskWords) -> bool:
        """None: the teacher's is a trained one."""
        return False

    def setup(self, stage: str) -> None:
        """Freeze the head, which is the teacher's as well."""
        super().setup(stage)
        assert self.head is not None
        if hasattr(self.head, "numbers"):
            raise ConfigurationError(
                f"data: expected a task with classes or tokens, whose probabilities are distilled, got {self.task}, "
                "which has a number. Merge its vector as it is."
            )
        self.head.requires_grad_(False)

    def on_fit_start(self) -> None:
        """Bring the teacher, and where the student started, to its device and dtype."""
        self.check_heads()
        super().on_fit_start()
        for name, own in self.encoder.named_parameters():
            for held in (self._teacher, self._start):
                held[name] = held[name].to(own)

    def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """The distillation of a batch, and how far the student has gone from where it started; no label is read."""
        with torch.no_grad(), evaluating(self.encoder), swapped(self.encoder, self._teacher):
            teacher = self.classify(*self.inputs(batch))
        moved = [
            (own - self._start[name]).square().sum()
            for name, own in super().trainable_parameters()
            if name in self._start
        ]
        distance = torch.stack(moved).sum()
        return distillation(logits, teacher, self.temperatures, batch.indices >= 0) + self.anchor * distance


def _scale(vector: TaskVector, others: Sequence[str]) -> float:
    """The mean norm of others by the own one; 1 without others."""
    own = vector.norm()
    if not own:
        raise ConfigurationError(
            "task_vector: expected one that is not zero, got zeros. Give the vector of a fine-tune."
        )
    if not others:
        return 1.0
    return sum(TaskVector.load(path).norm() for path in others) / len(others) / own
