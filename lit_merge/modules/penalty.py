"""The τJp penalty: a task vector that leaves other tasks' images alone can be added without a coefficient."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import jvp

from lit_merge.errors import ConfigurationError
from lit_merge.metrics.tau_jp import tau_jp_norms

__all__ = ["Penalty", "TauJpPenalty", "split_batch"]


class Penalty(ABC):
    """What is added to the objective, times ``weight``; subclass it for another one, and name it by its import path.

    Attributes:
        name: under which it is logged, ``train/<name>``.
        weight: λ.
        start_step: the first optimiser step with it.
        reads_other_tasks: whether the data module adds examples of other tasks to every batch.
        reads_factors: whether it has ``files`` of other tasks' Kronecker factors, which a suite collects if none are
            named.
    """

    name: ClassVar[str] = "penalty"
    weight: float
    start_step: int = 0
    reads_other_tasks: ClassVar[bool] = False
    reads_factors: ClassVar[bool] = False

    def prepare(self, module: Any) -> None:  # noqa: B027 - most have nothing to do
        """A fit of the module begins, and its optimiser is not made yet.

        Args:
            module: as for :meth:`of_module`; it knows its ``task``.
        """

    def of_module(self, module: Any) -> Tensor | None:
        """The penalty of the module as it is, a scalar; None for one that is about other tasks' examples alone.

        Args:
            module: the :class:`~lit_merge.FineTuneModule` in training, with ``encoder``, ``base`` and
                ``parametrisation``.
        """
        return None


@dataclass(frozen=True)
class TauJpPenalty(Penalty):
    """``λ · E_x ‖J_θ f(x; θ0) · τ‖`` over unlabelled images of other tasks (Yoshida et al. 2025, eqs. 10 and 11).

    Args:
        schedule: ``cyclic`` takes the images of step i from other task i mod (T − 1); ``strict`` takes some of every
            other task at every step.
        weight: λ.
        squared: whether the norms are squared: the papers' program does not, its text does.
        batch_size: images per process and other task in a batch; None for an eighth of the task's own.
        start_step: the first optimiser step with a penalty.
        tasks: which of the data module's other tasks; None for all.
        images: how many images of each of them are ever used; None for all.
        split: which of their splits the images come from; labels are never read.
        space: ``features`` of the encoder, as in the paper, or the ``logits`` that the other task's head makes of them.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    name: ClassVar[str] = "tau_jp"
    reads_other_tasks: ClassVar[bool] = True
    schedule: Literal["cyclic", "strict"] = "cyclic"
    weight: float = 0.1
    squared: bool = False
    batch_size: int | None = None
    start_step: int = 0
    tasks: list[str] | None = None
    images: int | None = None
    split: Literal["train", "val", "test"] = "train"
    space: Literal["features", "logits"] = "features"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "schedule": ("cyclic", "strict"),
            "split": ("train", "val", "test"),
            "space": ("features", "logits"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ConfigurationError(
                    f"penalty.{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}. Change it."
                )
        if not isinstance(self.weight, int | float) or not 0 <= self.weight < float("inf"):
            raise ConfigurationError(
                f"penalty.weight: expected a finite number of at least 0, got {self.weight!r}. Change it."
            )
        for name, least, optional in (("batch_size", 1, True), ("images", 1, True), ("start_step", 0, False)):
            value = getattr(self, name)
            if (value is not None or not optional) and (type(value) is not int or value < least):
                raise ConfigurationError(
                    f"penalty.{name}: expected an integer of at least {least}, got {value!r}. Change it."
                )
        if isinstance(self.tasks, str):
            raise ConfigurationError(f"penalty.tasks: expected a list, got {self.tasks!r}. Write [{self.tasks}].")

    def norms(self, value: Tensor, tangent: Tensor, tasks: Tensor, heads: Sequence[Any] = ()) -> Tensor:
        """The (squared) norms of every image, whose mean times λ is the penalty.

        Args:
            value: ``f(x; θ0)``, ``[B, d]``; of a language model the logits of an example's tokens, ``[B, M, V]``.
            tangent: ``J_θ f(x; θ0) · τ``, of the same shape; its norm is that of all numbers of an example.
            tasks: ``[B]``, each image's position among the other tasks.
            heads: of the other tasks, for ``logits``.

        Returns:
            ``[B]``.
        """
        if self.space == "features":
            return tau_jp_norms(tangent.flatten(1), self.squared)
        parts = tangent.new_empty(len(tangent), dtype=torch.promote_types(tangent.dtype, torch.float32))
        for task in tasks.unique().tolist():
            chosen = tasks == task
            of_logits = jvp(heads[task], (value[chosen],), (tangent[chosen],))[1]
            parts = parts.masked_scatter(chosen, tau_jp_norms(of_logits.flatten(1), self.squared).to(parts.dtype))
        return parts


def split_batch(batch: Any) -> tuple[Any, Any]:
    """A task's own batch, and that of the other tasks or None."""
    return (batch["own"], batch["other"]) if isinstance(batch, Mapping) and "own" in batch else (batch, None)
