"""Fine-tuning one task, so that its task vector can be merged with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.metrics.example_mean import ExampleMean
from lit_merge.metrics.hits import hits_of, losses_of
from lit_merge.metrics.of_heads import more_metrics, update_more
from lit_merge.models.heads import ZeroShotHead
from lit_merge.models.language.classifiers import TaskHead
from lit_merge.models.network import ModuleNetwork, TaskWords
from lit_merge.models.selection import TaLoS
from lit_merge.modules.objectives import CrossEntropy, Objective, minimised
from lit_merge.modules.penalty import Penalty, TauJpPenalty, split_batch
from lit_merge.modules.protocol import FineTuningProtocol
from lit_merge.modules.sensitivity import least_sensitive
from lit_merge.params import Params

__all__ = ["FineTuneModule"]

_OBJECTS = ("encoder", "network", "parametrisation", "preprocessing", "optimizer_wrapper")
"""Settings that a checkpoint does not hold: they are given again."""

_FADING = 0.95  # per step, of what counts in the confidence at the end of training: about the last twenty steps


class FineTuneModule(FineTuningProtocol):
    """Fine-tunes an image encoder under a frozen head; the defaults are the papers' protocol.

    AdamW with a cosine schedule after a warm-up over a tenth of the steps, weight decay 0.1 and gradients clipped at
    norm 1.0 (Ilharco et al. 2023, appendix B). The head is built from the data module's class names and templates
    unless one is given. For a new objective override :meth:`compute_loss`.

    The regime is the product of ``linearized``, ``trainable`` or ``lora``, ``rates`` and ``penalty``; each is one small
    object, and ``configs/finetune`` has the papers'.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`; a shorthand for a CLIP as ``network``.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        label_smoothing: of the default objective, in [0, 1).
        objective: what is minimised, by class path; None for the head's own, or the cross-entropy.
        penalty: on what τ does, e.g. to other tasks' examples, which the data module gives (Yoshida et al. 2025).
        head: any module, features ``[B, d]`` -> logits ``[B, C]``; it is frozen, unless it has ``trains = True``. None
            for the network's own.
        **settings: of :class:`FineTuningProtocol` and :class:`EncoderModule`.

    Raises:
        ConfigurationError: a number is out of its range, or settings exclude each other.
    """

    _recent: Tensor

    def __init__(
        self,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        label_smoothing: float = 0.0,
        objective: Objective | None = None,
        penalty: TauJpPenalty | Penalty | None = None,
        head: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        own = CrossEntropy(label_smoothing)
        if objective is not None and label_smoothing:
            raise ConfigurationError(
                f"objective: expected no label_smoothing together with it, got {label_smoothing}. Put it into the "
                "objective's own settings."
            )
        needs_tangent = penalty is not None and penalty.reads_other_tasks
        if needs_tangent and settings.get("lora") is not None and not settings.get("linearized"):
            raise ConfigurationError(
                "penalty and lora: expected one of them, got both: the tangent is not linear in LoRA's factors. "
                "Remove one, set linearized, or choose parameters by trainable."
            )
        super().__init__(model, pretrained, **settings)
        if needs_tangent and not self.parametrisation.has_tangent:
            raise ConfigurationError(
                f"penalty: expected a parametrisation with a tangent, got {self.parametrisation!r}. Remove one."
            )
        self.penalty = penalty
        # Without the files that it started from: a checkpoint holds what they gave, and opens without them.
        self.save_hyperparameters(ignore=[*_OBJECTS, "head", "objective", "task_vector", "weights"])
        self.label_smoothing, self._objective, self._own_objective = label_smoothing, objective, own
        self.head = None if head is None else _prepared(head)
        self.task, self.classes = "", tuple[str, ...]()
        self._vector_files = [(path, None) for path, _ in self._vector_files]  # whatever the data call the task
        self._other_heads: list[nn.Module] = []  # not registered: no part of a checkpoint
        self.masks: Params = {}
        self._held: Params = {}
        self.register_buffer("_recent", torch.zeros(3), persistent=False)  # examples, their confidence, right ones

    @property
    def regime(self) -> str:
        """How the encoder is trained, in words that go into a task vector's header."""
        return super().regime if self.penalty is None else f"{super().regime}, {self.penalty!r}"

    def setup(self, stage: str) -> None:
        """Take the task's name, classes and templates from the data module and build the head."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.penalty is not None and self.penalty.reads_other_tasks:
            self._prepare_penalty(data)
        if data is None or not hasattr(data, "classes"):
            if self.head is None:
                raise ConfigurationError(
                    "head: expected a data module with classes and templates, or head=…, got neither. "
                    "Use TaskDataModule, MultiTaskModule for several tasks, or pass head=…."
                )
        else:
            self.task, self.classes = data.name or "", tuple(data.classes)
            if self.head is None or self.task in self._refused or self._head_is_of_other_classes():
                self.head = _prepared(self._head_to_restore(data)).to(self.device)
        if stage == "fit" and self.penalty is not None:
            self.penalty.prepare(self)
        self.accuracy = nn.ModuleDict({split: ExampleMean() for split in ("fit", "val", "test")}).to(self.device)
        self.loss = nn.ModuleDict({split: ExampleMean() for split in ("val", "test")}).to(self.device)
        self.more = nn.ModuleDict({split: more_metrics(self.head) for split in ("val", "test")}).to(self.device)

    def starts_head(self, task: TaskWords) -> bool:
        """In fit, the head of the task that is trained on; not those of others."""
        return self._stage == "fit" and (task.name or "") == self.task

    def on_fit_start(self) -> None:
        """With :class:`~lit_merge.models.TaLoS`, find which elements train, unless a checkpoint has said it."""
        if not self.masks_elements:
            return
        assert self.head is not None
        selection: TaLoS = self.parametrisation.trainable  # type: ignore[attr-defined]
        trained = {name: value for name, value in self.encoder.named_parameters() if value.requires_grad}
        if not self.masks:
            settings = (list(trained), selection.fraction, selection.rounds, selection.seed)
            found = least_sensitive(self.network, self.head, lambda: self._examples_of(selection), *settings)
            self.masks = self.trainer.strategy.broadcast(found)  # rounding may differ between devices
        self.masks = {name: mask.to(trained[name].device) for name, mask in self.masks.items()}
        self._held = {name: value.detach() * ~self.masks[name] for name, value in trained.items()}
        for name, value in trained.items():
            value.register_hook(partial(torch.mul, self.masks[name]))

    def _examples_of(self, selection: TaLoS) -> Iterator[tuple[Any, ...]]:
        """Inputs of the task's training examples, without augmentation, on the module's device."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            self.trainer.fit_loop.setup_data()
            batches: Any = self.trainer.train_dataloader
        elif hasattr(data, "examples"):
            examples = data.examples("train", self)
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(selection.seed)).tolist()
            sampler, size = order[: selection.examples], min(32, len(order))
            batches = DataLoader(examples, size, sampler=sampler, collate_fn=_as_it_is)
        else:
            batches = data.train_dataloader()
        left = selection.examples
        for batch in batches:
            own = split_batch(batch)[0].to(self.device)
            inputs = self.inputs(own)
            yield tuple(one[:left] for one in inputs)
            left -= len(own)
            if left <= 0:
                return

    @torch.no_grad()
    def hold_elements(self) -> None:
        """See :class:`FineTuningProtocol`."""
        for name, value in self.encoder.named_parameters():
            if name in self._held:
                value.mul_(self.masks[name]).add_(self._held[name])

    def _prepare_penalty(self, data: Any) -> None:
        """Know the other tasks, and build their heads if the penalty is on logits."""
        if not getattr(data, "other_sources", None):
            raise ConfigurationError(
                "penalty: expected a data module with other tasks, got "
                f"{type(data).__name__ if data is not None else 'none'}. Use TaskDataModule, or remove the penalty."
            )
        assert isinstance(self.penalty, TauJpPenalty)
        self._other_heads = [
            self.make_head(source).requires_grad_(False).eval()
            for source in (data.other_sources.values() if self.penalty.space == "logits" else ())
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FineTuneModule:
        """Move or convert the other tasks' heads together with the module."""
        for head in self._other_heads:
            head._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _head_is_of_other_classes(self) -> bool:
        others = isinstance(self.head, ZeroShotHead) and self.head.classes != self.classes
        return others and not isinstance(self.base, ModuleNetwork)

    def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """The training objective; override it, or give an ``objective``, for another one.

        Args:
            logits: ``[B, C]``, of the batch's examples.
            batch: a :class:`lit_merge.data.Batch` with ``targets`` ``[B]``, of images also with ``images``
                ``[B, 3, S, S]`` and ``labels``, which are the targets.

        Returns:
            A scalar: by default the cross-entropy with label smoothing, averaged over the batch's labelled examples.
        """
        if self._objective is not None:
            return self._objective(logits, batch)
        return minimised(self._own_objective, self.head, logits, batch)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Of the encoder those that require gradients, and a head that trains with the task."""
        heads = [] if self.head is None else [(f"head.{name}", one) for name, one in self.head.named_parameters()]
        return [*super().trainable_parameters(), *(pair for pair in heads if pair[1].requires_grad)]

    def classify(self, *inputs: Any) -> Tensor:
        """Inputs of the network, e.g. images ``[B, 3, S, S]``, to logits ``[B, C]``."""
        return self._logits(self(*inputs))

    def _logits(self, features: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One optimisation step's loss: the objective, plus λ times the penalty from its first step on."""
        batch, other = split_batch(batch)
        penalised = self.penalty is not None and self.trainer.global_step >= self.penalty.start_step
        penalty = None
        if not penalised or other is None:
            logits = self.classify(*self.inputs(batch))
            penalty = self.penalty.of_module(self) if penalised and self.penalty is not None else None
        elif not self.linearized:
            logits = self.classify(*self.inputs(batch))
            penalty = self._penalise(*self.forward_parts(*self.inputs(other)), other)
        else:  # both batches in one pass
            count = len(batch)
            value, tangent = self.forward_parts(*self.inputs(type(batch).join([batch, other])))
            logits = self._logits(batch.own_outputs(value[:count] + tangent[:count]))
            penalty = self._penalise(value[count:], tangent[count:], other)
        loss = self.compute_loss(logits, batch)
        if self.penalty is not None and penalty is not None:
            loss = loss + self.penalty.weight * penalty
        self.check_loss(loss)
        if self.evaluates_again:
            return loss
        if self.penalty is not None and penalty is not None:
            self.log(f"train/{self.penalty.name}", penalty, prog_bar=True)
        accuracy, (right, counted) = self._accuracy("fit"), hits_of(self.head, logits, batch)
        accuracy(right, counted)
        self._note_confidence(logits.detach(), right, counted)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, on_step=True, on_epoch=False)
        return loss

    def _note_confidence(self, logits: Tensor, right: Tensor, counted: Tensor) -> None:
        """Of the labelled examples of the last steps, the mean probability of what is predicted, and of right ones."""
        if logits.ndim == 2 and not hasattr(self.head, "numbers"):
            surest = logits.float().softmax(-1).amax(-1)
            batch = torch.stack([counted.sum(), (surest * counted).sum(), (right * counted).sum()])
            self._recent = _FADING * self._recent + batch.to(self._recent)

    def training_description(self) -> dict[str, str]:
        """What is known to matter for merges, as a task vector's header has it.

        ``label_smoothing``, if there was any, and of the last steps' labelled training examples the mean
        ``confidence``, the probability of the class that is predicted, and the ``train_accuracy``.
        """
        smoothing = getattr(self._objective, "label_smoothing", self.label_smoothing)
        found = {"label_smoothing": f"{smoothing:g}"} if smoothing else {}
        count, surest, right = self._recent.tolist()
        if count:
            found |= {"confidence": f"{surest / count:.4f}", "train_accuracy": f"{right / count:.4f}"}
        return found

    def _penalise(self, value: Tensor, tangent: Tensor, other: Any) -> Tensor:
        assert isinstance(self.penalty, TauJpPenalty)
        return self.penalty.norms(value, tangent, other.tasks, self._other_heads).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy and loss on the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Accuracy and loss on the test split; returns which examples were right."""
        hits = self._evaluate(batch, "test")
        return {"task": self.task, "hits": hits, "indices": batch.indices}

    def _accuracy(self, split: str) -> ExampleMean:
        return cast(ExampleMean, self.accuracy[split])

    def _evaluate(self, batch: Any, split: str) -> Tensor:
        logits = self.classify(*self.inputs(batch))
        right, counted = hits_of(self.head, logits, batch)
        accuracy, loss = self._accuracy(split), cast(ExampleMean, self.loss[split])
        accuracy.update(right, counted)
        loss.update(losses_of(self.head, logits, batch), counted)
        self.log(f"{split}/accuracy", accuracy, prog_bar=True, batch_size=len(batch))
        self.log(f"{split}/loss", loss, batch_size=len(batch))
        for name, metric in update_more(self.more[split], self.head, logits, batch):
            self.log(f"{split}/{name}", metric, batch_size=len(batch))
        return right

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities ``[B, C]`` of a batch, or its numbers ``[B, 1]``, and the examples' positions ``[B]``."""
        logits = self.classify(*self.inputs(batch)).float()
        found = {"numbers": logits} if hasattr(self.head, "numbers") else {"probabilities": logits.softmax(-1)}
        return {**found, "indices": batch.indices}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the head's classes beside its weights, and the last steps' confidence."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["recent_confidence"] = self._recent.tolist()
        if isinstance(self.head, ZeroShotHead | TaskHead):
            kind = "zero_shot_classes" if isinstance(self.head, ZeroShotHead) else "classifier_classes"
            checkpoint[kind] = list(self.head.classes)
        if self.masks:
            checkpoint["masks"] = {name: mask.cpu() for name, mask in self.masks.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the head back before its weights are loaded, so that a checkpoint opens without its data.

        Raises:
            StructureMismatchError: the checkpoint started from another base, or its head has other classes.
        """
        super().on_load_checkpoint(checkpoint)
        self.masks = dict(checkpoint.get("masks", {}))
        self._recent = torch.tensor(checkpoint.get("recent_confidence", [0.0] * 3), device=self._recent.device)
        if self.head is None and "classifier_classes" in checkpoint:
            self.classes = tuple(checkpoint["classifier_classes"])
            self.head = _prepared(TaskHead.of_state(under(checkpoint["state_dict"], "head."), self.classes))
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


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepared(head: nn.Module) -> nn.Module:
    """A head in evaluation mode and frozen, unless it says that it trains with its task."""
    return head.requires_grad_(getattr(head, "trains", False)).eval()
