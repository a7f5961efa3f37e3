"""One encoder for several tasks, each with its own frozen head: joint fine-tuning, and evaluation of merged models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.metrics.tau_jp import TauJp
from lit_merge.models.encoder import Preprocessing
from lit_merge.models.heads import ZeroShotHead
from lit_merge.models.lora import LoRA
from lit_merge.models.rates import Rates
from lit_merge.models.selection import Selection
from lit_merge.modules.accuracy import UNLABELLED, hits
from lit_merge.modules.protocol import FineTuningProtocol
from lit_merge.vectors.task_vector import joined_task

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

    classes: tuple[str, ...] = ()
    """None of its own: every task has others."""

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
        self.tau_jp = tau_jp
        # Without the files that it started from: a checkpoint holds what they gave, and opens without them.
        self.save_hyperparameters(ignore=["encoder", "heads", "preprocessing", "task_vector", "weights"])
        self.tasks: tuple[str, ...] = tuple(heads or {})
        self.heads = nn.ModuleDict()
        for task, head in (heads or {}).items():
            self.heads[_key(task)] = head.requires_grad_(False).eval()

    @property
    def task(self) -> str:
        """The tasks' common name, e.g. ``digits+letters``."""
        return joined_task(self.tasks)

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
            if _key(task) not in self.heads or self._head_is_of_other_classes(task, data.tasks[task].classes):
                head = self.make_head(data.tasks[task].classes, data.tasks[task].templates)
                self.heads[_key(task)] = head.to(self.device)
        keys = [_key(task, split) for split in ("val", "test") for task in self.tasks]
        self.accuracy = nn.ModuleDict({key: MeanMetric() for key in keys}).to(self.device)
        self.disturbance = nn.ModuleDict({key: TauJp() for key in keys if self.tau_jp}).to(self.device)

    def _head_is_of_other_classes(self, task: str, classes: Sequence[str]) -> bool:
        head = self.heads[_key(task)]
        return isinstance(head, ZeroShotHead) and head.classes != tuple(classes)

    def classify(self, features: Tensor, task: str) -> Tensor:
        """Features ``[B, d]`` to the logits ``[B, C]`` of one task."""
        return self.heads[_key(task)](features)

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

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of one task on its validation split."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of one task on its test split."""
        self._evaluate(batch, "test", dataloader_idx)

    def _accuracy(self, split: str, task: str) -> MeanMetric:
        return cast(MeanMetric, self.accuracy[_key(task, split)])

    def _evaluate(self, batch: Any, split: str, dataloader_idx: int) -> None:
        task = self.tasks[dataloader_idx]
        metric = self._accuracy(split, task)
        features = self._measured_features(batch, split, task) if self.tau_jp else self(batch.images)
        metric.update(*hits(self.classify(features, task), batch.labels))
        self.log(f"{split}/{task}/accuracy", metric, add_dataloader_idx=False, batch_size=len(batch.images))

    def _measured_features(self, batch: Any, split: str, task: str) -> Tensor:
        """Features; on the way, the tangents' norms are logged."""
        value, tangent = self.forward_parts(batch.images)
        metric = cast(TauJp, self.disturbance[_key(task, split)])
        metric.update(tangent, batch.indices >= 0)
        self.log(f"{split}/{task}/tau_jp", metric, add_dataloader_idx=False, batch_size=len(batch.images))
        return value + tangent if self.linearized else self(batch.images)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the tasks."""
        self._log_mean("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean over the tasks."""
        self._log_mean("test")

    def _log_mean(self, split: str) -> None:
        metrics = [self._accuracy(split, task) for task in self.tasks]
        values = [metric.compute() for metric in metrics if metric.update_called]  # a task may have no such images
        self.log(f"{split}/accuracy", torch.stack(values).mean(), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the heads' classes beside their weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["zero_shot_classes"] = {
            key: list(head.classes) for key, head in self.heads.items() if isinstance(head, ZeroShotHead)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the heads back before their weights are loaded, so that a checkpoint opens without its data.

        Raises:
            StructureMismatchError: the checkpoint started from another base, or a head of it has other classes.
        """
        super().on_load_checkpoint(checkpoint)
        state: Mapping[str, Tensor] = checkpoint["state_dict"]
        for key, names in checkpoint.get("zero_shot_classes", {}).items():
            weight, scale = state[f"heads.{key}.weight"], float(state[f"heads.{key}.logit_scale"])
            saved = ZeroShotHead(weight, scale, names)
            if key not in self.heads:
                self.heads[key] = saved
            present = self.heads[key]
            if isinstance(present, ZeroShotHead) and present.classes != saved.classes:
                raise StructureMismatchError(
                    f"checkpoint: expected one with the classes {first_few(present.classes)}, got {first_few(names)}. "
                    "Use the tasks that it was trained on."
                )


def _key(task: str, split: str = "task") -> str:
    """A name for a task's part that a ``ModuleDict`` takes: it refuses dots and the names of its own methods."""
    return f"{split}-{task.replace('.', '%2E')}"
