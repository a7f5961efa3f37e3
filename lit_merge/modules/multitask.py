"""One encoder for several tasks, each with its own frozen head: joint fine-tuning, and evaluation of merged models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError
from lit_merge.models.network import TaskWords
from lit_merge.modules.objectives import CrossEntropy, Objective, minimised
from lit_merge.modules.passes import passes
from lit_merge.modules.protocol import FineTuningProtocol
from lit_merge.modules.task_heads import TaskHeads

__all__ = ["MultiTaskModule"]

_OBJECTS = ("encoder", "heads", "network", "objective", "optimizer_wrapper", "parametrisation", "preprocessing")
"""Settings that a checkpoint does not hold: they are given again."""


class MultiTaskModule(FineTuningProtocol, TaskHeads):
    """Evaluates an encoder on several tasks, or fine-tunes it on all of them jointly (the upper reference).

    Joint fine-tuning minimises the mean of the tasks' cross-entropies, every task giving one batch per step.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`; a shorthand for a CLIP as ``network``.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        task_vector: file of a task vector: the encoder is θ0 + τ.
        weights: file of whole, e.g. merged, weights.
        tau_jp: evaluation also logs ``test/{task}/tau_jp``, the mean norm of J τ over a task's images.
        objective: what is minimised, the mean over the tasks of it; by class path.
        **settings: of :class:`FineTuningProtocol`, :class:`TaskHeads` and :class:`EncoderModule`.

    Attributes:
        tasks: names of the tasks, those of ``heads`` or, once set up, of the data.
    """

    def __init__(
        self,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        task_vector: str | None = None,
        weights: str | None = None,
        tau_jp: bool = False,
        objective: Objective | None = None,
        **settings: Any,
    ) -> None:
        if tau_jp and settings.get("lora") is not None and not settings.get("linearized"):
            raise ConfigurationError(
                "tau_jp and lora: expected one of them, got both: the tangent is not linear in LoRA's factors. Remove "
                "one, set linearized, or measure the task vector in a module without lora."
            )
        super().__init__(model, pretrained, task_vector=task_vector, weights=weights, tau_jp=tau_jp, **settings)
        if tau_jp and not self.parametrisation.has_tangent:
            raise ConfigurationError(
                f"tau_jp: expected a parametrisation with a tangent, got {self.parametrisation!r}. Remove one."
            )
        self.objective = objective or CrossEntropy()
        # Without the files that it started from: a checkpoint holds what they gave, and opens without them.
        self.save_hyperparameters(ignore=[*_OBJECTS, "task_outputs", "task_vector", "weights"])

    def setup(self, stage: str) -> None:
        """Build a head for every task; to fit, those that train with their tasks do."""
        super().setup(stage)
        for head in self.heads.values() if stage == "fit" else ():
            head.requires_grad_(getattr(head, "trains", False))

    def starts_head(self, task: TaskWords) -> bool:
        """In fit, all of them."""
        return self._stage == "fit"

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Of the encoder those that require gradients, and the heads that train with their tasks."""
        heads = [(f"heads.{name}", one) for name, one in self.heads.named_parameters() if one.requires_grad]
        return [*super().trainable_parameters(), *heads]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean over the tasks of a batch's cross-entropy; texts of very different lengths go apart."""
        present = {task: part for task, part in batch.items() if part is not None}
        losses = []
        for tasks in passes(present):
            parts = [present[task] for task in tasks]
            slices = self.features(type(parts[0]).join(parts)).split([len(part) for part in parts])
            losses += [
                minimised(self.objective, self.head_of(task), self.classify(part.own_outputs(features), task), part)
                for task, part, features in zip(tasks, parts, slices, strict=True)
            ]
        loss = self.check_loss(torch.stack(losses).mean())
        if not self.evaluates_again:
            self.log("train/loss", loss, prog_bar=True, batch_size=sum(map(len, present.values())))
        return loss
