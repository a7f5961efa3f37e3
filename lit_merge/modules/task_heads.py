"""One encoder and a frozen head for each of several tasks: what evaluates merged models, and trains on all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.metrics.example_mean import ExampleMean
from lit_merge.metrics.hits import hits_of
from lit_merge.metrics.of_heads import more_metrics, update_more
from lit_merge.metrics.tau_jp import TauJp
from lit_merge.models.heads import ZeroShotHead
from lit_merge.models.task_output import TaskOutput
from lit_merge.modules.encoding import EncoderModule
from lit_merge.vectors.task_vector import joined_task

__all__ = ["TaskHeads"]


class TaskHeads(EncoderModule):
    """An encoder module with one frozen head per task, which it is evaluated with on every task's images.

    Args:
        heads: task -> module, features ``[B, d]`` -> logits ``[B, C]``, frozen; by default the network's own heads of
            the data's tasks, built when it is set up.
        tau_jp: evaluation also logs ``test/{task}/tau_jp``, the mean norm of J τ over a task's images.
        task_outputs: task -> file that a learned merge wrote beside its weights: a correction of the task's features, a
            classifier in place of its head, or both.
        **encoder_settings: of :class:`EncoderModule`.

    Attributes:
        tasks: names of the tasks, those of ``heads`` or, once set up, of the data.
    """

    classes: tuple[str, ...] = ()
    """None of its own: every task has others."""

    def __init__(
        self,
        heads: Mapping[str, nn.Module] | None = None,
        tau_jp: bool = False,
        task_outputs: dict[str, str] | None = None,
        **encoder_settings: Any,
    ) -> None:
        super().__init__(**encoder_settings)
        self.tau_jp = tau_jp
        self.tasks: tuple[str, ...] = tuple(heads or {})
        self.heads = nn.ModuleDict()
        for task, head in (heads or {}).items():
            self.heads[_key(task)] = head.requires_grad_(False).eval()
        self.outputs = nn.ModuleDict()
        for task, path in (task_outputs or {}).items():
            self.outputs[_key(task)] = self._loaded_output(task, path)

    def _loaded_output(self, task: str, path: str) -> TaskOutput:
        output, header = TaskOutput.load(path)
        known = {"task": task, "base_fingerprint": self.base_fingerprint}
        for name, expected in known.items():
            if header.get(name, expected) != expected:
                raise StructureMismatchError(
                    f"{path}: expected the {name} {expected}, got {header[name]}. Give the file of this task that the "
                    "merge of this base wrote."
                )
        return output

    @property
    def task(self) -> str:
        """The tasks' common name, e.g. ``digits+letters``."""
        return joined_task(self.tasks)

    def setup(self, stage: str) -> None:
        """Build a head for every task of the data module."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "task_names"):
            raise ConfigurationError(
                "data: expected a data module of several tasks, got "
                f"{type(data).__name__ if data is not None else 'none'}. Use MultiTaskDataModule."
            )
        self.tasks = tuple(data.task_names)
        for task in self.tasks:
            known = _key(task) in self.heads and task not in self._refused
            if not known or self._head_is_of_other_classes(task, data.tasks[task].classes):
                head = self._head_to_restore(data.tasks[task]).requires_grad_(False).eval()
                self.heads[_key(task)] = head.to(self.device)
        self._check_outputs()
        keys = [_key(task, split) for split in ("val", "test") for task in self.tasks]
        self.accuracy = nn.ModuleDict({key: ExampleMean() for key in keys}).to(self.device)
        more = {_key(task, one): more_metrics(self.head_of(task)) for one in ("val", "test") for task in self.tasks}
        self.more = nn.ModuleDict(more).to(self.device)
        self.disturbance = nn.ModuleDict({key: TauJp() for key in keys if self.tau_jp}).to(self.device)

    def _check_outputs(self) -> None:
        tasks = {_key(task): task for task in self.tasks}
        if strangers := [key for key in self.outputs if key not in tasks]:
            raise ConfigurationError(
                f"task_outputs: expected tasks of data, {first_few(self.tasks)}, got {strangers[0].partition('-')[2]}. "
                "Remove it, or add the task to data."
            )
        for key, output in self.outputs.items():
            own, frozen = cast(TaskOutput, output).head, self.heads[key]
            if own is not None and own.out_features != len(getattr(frozen, "weight", own.weight)):
                raise StructureMismatchError(
                    f"task_outputs of {tasks[key]}: expected a classifier of {len(frozen.weight)} classes, got "  # type: ignore[arg-type]
                    f"{own.out_features}. Use the task that it was learned on."
                )

    def _head_is_of_other_classes(self, task: str, classes: Sequence[str]) -> bool:
        head = self.heads[_key(task)]
        return isinstance(head, ZeroShotHead) and head.classes != tuple(classes)

    def head_of(self, task: str) -> nn.Module:
        """The head of one task, once set up."""
        return self.heads[_key(task)]

    def classify(self, features: Tensor, task: str) -> Tensor:
        """Features ``[B, d]`` to the logits ``[B, C]`` of one task."""
        return self.scores(self.represent(features, task), task)

    def represent(self, features: Tensor, task: str) -> Tensor:
        """Features ``[B, d]`` as the task has them: corrected, if its file says so."""
        output = self.output_of(task)
        return features if output is None else output.represent(features)

    def scores(self, features: Tensor, task: str) -> Tensor:
        """What :meth:`represent` gave to the logits ``[B, C]`` of one task."""
        output, head = self.output_of(task), self.heads[_key(task)]
        logits: Tensor = head(features) if output is None else output.classify(features, head)
        return logits

    def add_output(self, task: str, output: TaskOutput) -> None:
        """Let one task have something of its own behind the encoder."""
        self.outputs[_key(task)] = output.to(self.device)

    def output_of(self, task: str) -> TaskOutput | None:
        """What there is for one task behind the encoder beside its head, if anything."""
        key = _key(task)
        return cast(TaskOutput, self.outputs[key]) if key in self.outputs else None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of one task on its validation split."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Accuracy of one task on its test split; returns which examples were right."""
        hits = self._evaluate(batch, "test", dataloader_idx)
        return {"task": self.tasks[dataloader_idx], "hits": hits, "indices": batch.indices}

    def _accuracy(self, split: str, task: str) -> ExampleMean:
        return cast(ExampleMean, self.accuracy[_key(task, split)])

    def _evaluate(self, batch: Any, split: str, dataloader_idx: int) -> Tensor:
        task = self.tasks[dataloader_idx]
        metric = self._accuracy(split, task)
        features = self._measured_features(batch, split, task) if self.tau_jp else self.features(batch)
        logits = self.classify(features, task)
        right, counted = hits_of(self.heads[_key(task)], logits, batch)
        metric.update(right, counted)
        self.log(f"{split}/{task}/accuracy", metric, add_dataloader_idx=False, batch_size=len(batch))
        for name, one in update_more(self.more[_key(task, split)], self.head_of(task), logits, batch):
            self.log(f"{split}/{task}/{name}", one, add_dataloader_idx=False, batch_size=len(batch))
        self.log_more(logits, batch, split, dataloader_idx)
        return right

    def log_more(self, logits: Tensor, batch: Any, split: str, dataloader_idx: int) -> None:
        """Log more about one task's predictions; nothing here.

        Args:
            logits: ``[B, C]``.
            batch: their :class:`lit_merge.data.Batch`.
            split: ``val`` or ``test``.
            dataloader_idx: the task's position in :attr:`tasks`.
        """

    def _measured_features(self, batch: Any, split: str, task: str) -> Tensor:
        """Features; on the way, the tangents' norms are logged."""
        value, tangent = self.forward_parts(*self.inputs(batch))
        metric = cast(TauJp, self.disturbance[_key(task, split)])
        metric.update(tangent.flatten(1), batch.indices >= 0)
        self.log(f"{split}/{task}/tau_jp", metric, add_dataloader_idx=False, batch_size=len(batch))
        return value + tangent if self.linearized else self.features(batch)

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
        outputs = {key: cast(TaskOutput, one) for key, one in self.outputs.items()}
        if outputs:
            normalised = {key: one.head is not None and one.head.normalised for key, one in outputs.items()}
            checkpoint["task_outputs"] = normalised

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the heads back before their weights are loaded, so that a checkpoint opens without its data.

        Raises:
            StructureMismatchError: the checkpoint started from another base, a head of it has other classes, or it
                lacks surgery or a head of a task.
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
        outputs = checkpoint.get("task_outputs", {})
        if lacking := [key.partition("-")[2] for key in self.outputs if key not in outputs]:
            got = first_few([key.partition("-")[2] for key in outputs]) or "none"
            raise StructureMismatchError(
                f"checkpoint: expected surgery or heads of {first_few(lacking)}, got those of {got}. Set learn and "
                "data.adapted, or task_outputs, as that run did."
            )
        for key, normalised in outputs.items():
            start = f"outputs.{key}."
            own = {name.removeprefix(start): one for name, one in state.items() if name.startswith(start)}
            if key not in self.outputs:
                self.outputs[key] = TaskOutput.of_state(own, normalised)


def _key(task: str, split: str = "task") -> str:
    """A name for a task's part that a ``ModuleDict`` takes: it refuses dots and the names of its own methods."""
    return f"{split}-{task.replace('.', '%2E')}"
