"""One encoder for several tasks, each with its own frozen head: joint fine-tuning, and evaluation of merged models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lit_merge.errors import ConfigurationError
from lit_merge.models.encoder import Preprocessing
from lit_merge.modules.protocol import FineTuningProtocol

__all__ = ["MultiTaskModule"]


class MultiTaskModule(FineTuningProtocol):
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
        encoder: any module instead of a CLIP; then ``heads`` are needed.
        heads: task -> module, features ``[B, d]`` -> logits ``[B, C]``; they are frozen.
        preprocessing: how images become the encoder's input.
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
        encoder: nn.Module | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(
            learning_rate,
            weight_decay,
            warmup_fraction,
            gradient_clip,
            model=model,
            pretrained=pretrained,
            encoder=encoder,
            preprocessing=preprocessing,
            task_vector=task_vector,
            weights=weights,
        )
        self.save_hyperparameters(ignore=["encoder", "heads", "preprocessing"])
        self.heads = nn.ModuleDict({task: head.requires_grad_(False) for task, head in (heads or {}).items()})
        self.tasks: tuple[str, ...] = tuple(self.heads)

    def setup(self, stage: str) -> None:
        """Build a head for every task of the data module."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "task_names"):
            raise ConfigurationError(
                "data: expected a data module of several tasks, got "
                f"{type(data).__name__ if data is not None else 'none'}. Use MultiTaskDataModule."
            )
        self.tasks = tuple(data.task_names)
        for task in self.tasks:
            if task not in self.heads:
                self.heads[task] = self.make_head(data.tasks[task].classes, data.tasks[task].templates).to(self.device)
        self.accuracy = nn.ModuleDict(
            {
                f"{split}-{task}": MulticlassAccuracy(len(data.tasks[task].classes), average="micro", ignore_index=-1)
                for split in ("val", "test")
                for task in self.tasks
            }
        ).to(self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean cross-entropy of one batch of every task, in one pass through the encoder."""
        present = {task: part for task, part in batch.items() if part is not None}
        features = self(torch.cat([part.images for part in present.values()]))
        slices = features.split([len(part.images) for part in present.values()])
        losses = [
            F.cross_entropy(self.heads[task](part_features), part.labels)
            for (task, part), part_features in zip(present.items(), slices, strict=True)
        ]
        loss = self.check_loss(torch.stack(losses).mean())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(features))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of one task on its validation split."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of one task on its test split."""
        self._evaluate(batch, "test", dataloader_idx)

    def _evaluate(self, batch: Any, split: str, dataloader_idx: int) -> None:
        task = self.tasks[dataloader_idx]
        metric = self.accuracy[f"{split}-{task}"]
        metric(self.heads[task](self(batch.images)), batch.labels)
        self.log(f"{split}/{task}/accuracy", metric, add_dataloader_idx=False, batch_size=len(batch.images))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the tasks."""
        self._log_mean("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean over the tasks."""
        self._log_mean("test")

    def _log_mean(self, split: str) -> None:
        values = [self.accuracy[f"{split}-{task}"].compute() for task in self.tasks]
        self.log(f"{split}/accuracy", torch.stack(values).mean(), prog_bar=True)
