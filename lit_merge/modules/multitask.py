"""One encoder for several tasks, each with its own frozen head: joint fine-tuning, and evaluation of merged models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.metrics.hits import UNLABELLED
from lit_merge.models.encoder import Preprocessing
from lit_merge.models.lora import LoRA
from lit_merge.models.rates import Rates
from lit_merge.models.selection import Selection
from lit_merge.modules.protocol import FineTuningProtocol
from lit_merge.modules.task_heads import TaskHeads

__all__ = ["MultiTaskModule"]


class MultiTaskModule(FineTuningProtocol, TaskHeads):
    """Evaluates an encoder on several tasks, or fine-tunes it on all of them jointly (the upper reference).

    Joint fine-tuning minimises the mean of the tasks' cross-entropies, every task giving one batch per step.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        task_vector: file of a task vector: the encoder is θ0 + τ.
        weights: file of whole, e.g. merged, weights.
        learning_rate: peak of the schedule.
        weight_decay: of every parameter.
        warmup_fraction: share of the steps over which the rate grows, in [0, 1).
        gradient_clip: largest norm of the gradient; the trainer's ``gradient_clip_val`` wins if it is set.
        linearized: train or evaluate ``f(x; θ0) + J τ`` instead of the encoder.
        trainable: which parameters train; None for all.
        lora: low-rank updates train instead.
        rates: share of the learning rate that each block has.
        tau_jp: evaluation also logs ``test/{task}/tau_jp``, the mean norm of J τ over a task's images.
        encoder: any module instead of a CLIP; then ``heads`` are needed.
        heads: task -> module, features ``[B, d]`` -> logits ``[B, C]``; they are frozen.
        preprocessing: how images become the encoder's input.

    Attributes:
        tasks: names of the tasks, those of ``heads`` or, once set up, of the data.
    """

    def __init__(
        self,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        task_vector: str | None = None,
        weights: str | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
        gradient_clip: float = 1.0,
        linearized: bool = False,
        trainable: Selection | None = None,
        lora: LoRA | None = None,
        rates: Rates | None = None,
        tau_jp: bool = False,
        encoder: nn.Module | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if tau_jp and lora is not None:
            raise ConfigurationError(
                "tau_jp and lora: expected one of them, got both: the tangent is not linear in LoRA's factors. Remove "
                "one, or measure the task vector in a module without lora."
            )
        super().__init__(
            learning_rate,
            weight_decay,
            warmup_fraction,
            gradient_clip,
            rates,
            heads=heads,
            tau_jp=tau_jp,
            model=model,
            pretrained=pretrained,
            encoder=encoder,
            preprocessing=preprocessing,
            task_vector=task_vector,
            weights=weights,
            linearized=linearized,
            trainable=trainable,
            lora=lora,
        )
        # Without the files that it started from: a checkpoint holds what they gave, and opens without them.
        self.save_hyperparameters(ignore=["encoder", "heads", "preprocessing", "task_vector", "weights"])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean over the tasks of a batch's cross-entropy, all tasks in one pass through the encoder."""
        present = {task: part for task, part in batch.items() if part is not None}
        features = self(torch.cat([part.images for part in present.values()]))
        slices = features.split([len(part.images) for part in present.values()])
        losses = [
            F.cross_entropy(self.classify(part_features, task), part.labels, ignore_index=UNLABELLED)
            for (task, part), part_features in zip(present.items(), slices, strict=True)
        ]
        loss = self.check_loss(torch.stack(losses).mean())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(features))
        return loss
