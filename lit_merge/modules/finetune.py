"""Fine-tuning one task, so that its task vector can be merged with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.metrics.hits import UNLABELLED, hits
from lit_merge.models.encoder import Preprocessing
from lit_merge.models.heads import ZeroShotHead
from lit_merge.models.lora import LoRA
from lit_merge.models.rates import Rates
from lit_merge.models.selection import Selection
from lit_merge.modules.penalty import TauJpPenalty, split_batch
from lit_merge.modules.protocol import FineTuningProtocol, check_range

__all__ = ["FineTuneModule"]


class FineTuneModule(FineTuningProtocol):
    """Fine-tunes an image encoder under a frozen head; the defaults are the papers' protocol.

    AdamW with a cosine schedule after a warm-up over a tenth of the steps, weight decay 0.1 and gradients clipped at
    norm 1.0 (Ilharco et al. 2023, appendix B). The head is built from the data module's class names and templates
    unless one is given. For a new objective override :meth:`compute_loss`.

    The regime is the product of ``linearized``, ``trainable`` or ``lora``, ``rates`` and ``penalty``; each is one small
    object, and ``configs/finetune`` has the papers'.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        learning_rate: peak of the schedule.
        weight_decay: of every trained parameter, as in the papers' programs.
        warmup_fraction: share of the steps over which the rate grows, in [0, 1).
        gradient_clip: largest norm of the gradient; the trainer's ``gradient_clip_val`` wins if it is set.
        label_smoothing: in [0, 1).
        task_vector: file of a task vector to start from (θ0 stays the base).
        weights: file of whole weights to start from (θ0 stays the base).
        linearized: train ``f(x; θ0) + J τ``, the encoder's tangent, instead of the encoder (Ortiz-Jimenez et al. 2023).
        trainable: which parameters train, e.g. ``Attention`` (Jin et al. 2024); None for all.
        lora: train low-rank updates instead; the task vector is dense (Hu et al. 2022).
        rates: share of the learning rate that each block has, e.g. ``LinLR`` (Wang et al. 2025).
        penalty: on what τ does to other tasks' images, which the data module gives (Yoshida et al. 2025).
        encoder: any module instead of a CLIP; then ``head`` is needed.
        head: any module, features ``[B, d]`` -> logits ``[B, C]``; it is frozen.
        preprocessing: how images become the encoder's input.

    Raises:
        ConfigurationError: a number is out of its range, or settings exclude each other.
    """

    def __init__(
        self,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
        gradient_clip: float = 1.0,
        label_smoothing: float = 0.0,
        task_vector: str | None = None,
        weights: str | None = None,
        linearized: bool = False,
        trainable: Selection | None = None,
        lora: LoRA | None = None,
        rates: Rates | None = None,
        penalty: TauJpPenalty | None = None,
        encoder: nn.Module | None = None,
        head: nn.Module | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        check_range("label_smoothing", label_smoothing, below=1.0)
        if penalty is not None and lora is not None:
            raise ConfigurationError(
                "penalty and lora: expected one of them, got both: the tangent is not linear in LoRA's factors. "
                "Remove one, or choose parameters by trainable."
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
        self.penalty = penalty
        # Without the files that it started from: a checkpoint holds what they gave, and opens without them.
        self.save_hyperparameters(ignore=["encoder", "head", "preprocessing", "task_vector", "weights"])
        self.label_smoothing = label_smoothing
        self.head = head.requires_grad_(False).eval() if head is not None else None
        self.task, self.classes = "", tuple[str, ...]()
        self._other_heads: list[nn.Module] = []  # not registered: no part of a checkpoint

    @property
    def regime(self) -> str:
        """How the encoder is trained, in words that go into a task vector's header."""
        return super().regime if self.penalty is None else f"{super().regime}, {self.penalty!r}"

    def setup(self, stage: str) -> None:
        """Take the task's name, classes and templates from the data module and build the head."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.penalty is not None:
            self._prepare_penalty(data)
        if data is None or not hasattr(data, "classes"):
            if self.head is None:
                raise ConfigurationError(
                    "head: expected a data module with classes and templates, or head=…, got neither. "
                    "Use TaskDataModule, or pass head=…."
                )
        else:
            self.task, self.classes = data.name or "", tuple(data.classes)
            if self.head is None or (self.clip is not None and self._head_is_of_other_classes()):
                self.head = self.make_head(data.classes, data.templates).to(self.device)
        self.accuracy = nn.ModuleDict({split: MeanMetric() for split in ("fit", "val", "test")}).to(self.device)

    def _prepare_penalty(self, data: Any) -> None:
        """Know the other tasks, and build their heads if the penalty is on logits."""
        if not getattr(data, "other_sources", None):
            raise ConfigurationError(
                "penalty: expected a data module with other tasks, got "
                f"{type(data).__name__ if data is not None else 'none'}. Use TaskDataModule, or remove the penalty."
            )
        assert self.penalty is not None
        self._other_heads = [
            self.make_head(source.classes, source.templates).requires_grad_(False).eval()
            for source in (data.other_sources.values() if self.penalty.space == "logits" else ())
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FineTuneModule:
        """Move or convert the other tasks' heads together with the module."""
        for head in self._other_heads:
            head._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _head_is_of_other_classes(self) -> bool:
        return isinstance(self.head, ZeroShotHead) and self.head.classes != self.classes

    def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """The training objective; override it for another one.

        Args:
            logits: ``[B, C]``, of the batch's images.
            batch: an :class:`lit_merge.data.ImageBatch` with ``images`` ``[B, 3, S, S]`` and ``labels`` ``[B]``.

        Returns:
            A scalar: here the cross-entropy with label smoothing, averaged over the batch's labelled images.
        """
        return F.cross_entropy(logits, batch.labels, ignore_index=UNLABELLED, label_smoothing=self.label_smoothing)

    def classify(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` to logits ``[B, C]``."""
        return self._logits(self(images))

    def _logits(self, features: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One optimisation step's loss: the objective, plus λ times the penalty from its first step on."""
        batch, other = split_batch(batch)
        penalised = self.penalty is not None and self.trainer.global_step >= self.penalty.start_step
        norms = None
        if not penalised:
            logits = self.classify(batch.images)
        elif not self.linearized:
            logits, norms = self.classify(batch.images), self._penalise(*self.forward_parts(other.images), other)
        else:  # both batches in one pass
            count = len(batch.images)
            value, tangent = self.forward_parts(torch.cat([batch.images, other.images]))
            logits = self._logits(value[:count] + tangent[:count])
            norms = self._penalise(value[count:], tangent[count:], other)
        loss = self.compute_loss(logits, batch)
        if self.penalty is not None and norms is not None:
            loss = loss + self.penalty.weight * norms.mean()
            self.log("train/tau_jp", norms.mean(), prog_bar=True)
        self.check_loss(loss)
        accuracy = self._accuracy("fit")
        accuracy(*hits(logits, batch.labels))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, on_step=True, on_epoch=False)
        return loss

    def _penalise(self, value: Tensor, tangent: Tensor, other: Any) -> Tensor:
        assert self.penalty is not None
        return self.penalty.norms(value, tangent, other.tasks, self._other_heads)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy and loss on the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy and loss on the test split."""
        self._evaluate(batch, "test")

    def _accuracy(self, split: str) -> MeanMetric:
        return cast(MeanMetric, self.accuracy[split])

    def _evaluate(self, batch: Any, split: str) -> None:
        logits = self.classify(batch.images)
        counted = batch.labels >= 0
        total = F.cross_entropy(logits, batch.labels, ignore_index=UNLABELLED, reduction="sum")
        loss = total / counted.sum().clamp(min=1)
        accuracy = self._accuracy(split)
        accuracy.update(*hits(logits, batch.labels))
        self.log(f"{split}/accuracy", accuracy, prog_bar=True)
        self.log(f"{split}/loss", loss, sync_dist=True, batch_size=int(counted.sum()))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities ``[B, C]`` of a batch and the images' positions ``[B]``."""
        return {"probabilities": self.classify(batch.images).float().softmax(-1), "indices": batch.indices}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the head's classes beside its weights."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.head, ZeroShotHead):
            checkpoint["zero_shot_classes"] = list(self.head.classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the head back before its weights are loaded, so that a checkpoint opens without its data.

        Raises:
            StructureMismatchError: the checkpoint started from another base, or its head has other classes.
        """
        super().on_load_checkpoint(checkpoint)
        if "zero_shot_classes" not in checkpoint:
            return
        classes = tuple(checkpoint["zero_shot_classes"])
        if self.head is None:
            state: Mapping[str, Tensor] = checkpoint["state_dict"]
            self.head = ZeroShotHead(state["head.weight"], float(state["head.logit_scale"]), classes)
            self.classes = classes
        elif isinstance(self.head, ZeroShotHead) and self.head.classes != classes:
            raise StructureMismatchError(
                f"checkpoint: expected one with the classes {first_few(self.head.classes)}, got {first_few(classes)}. "
                "Use the task that it was trained on; to start another task from it, give its task_vector instead."
            )
