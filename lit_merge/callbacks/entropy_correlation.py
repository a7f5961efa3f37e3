"""Whether the entropy that a merge minimises without labels goes with the loss that it is meant to lower."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn import functional as F

from lit_merge.callbacks.steps import MergeRecorder
from lit_merge.data.multitask import task_names
from lit_merge.errors import ConfigurationError, DataError, first_few
from lit_merge.files.text import write_text
from lit_merge.functional.evaluation import evaluating
from lit_merge.functional.tokens import prediction_entropy, token_losses
from lit_merge.metrics import spearman
from lit_merge.transforms.base import one_of, whole_number

__all__ = ["EntropyLossCorrelation"]

_Rows = dict[int, list[float]]
"""Position of an image in its split -> its entropy and its loss."""


class EntropyLossCorrelation(MergeRecorder):
    """Measures how the entropy of single images correlates with their cross-entropy while a merge is learned.

    AdaMerging minimises the entropy of the merged model's predictions in place of the loss, for which it has no labels;
    it does so because the two rank images alike (Yang et al. 2024, who report 0.87 before and 0.92 after learning).
    This is that measurement: Spearman's rank correlation over labelled images, of every task, and of all tasks' images
    together. Logged to every logger, and written to the run's directory after every measurement:

    - ``spearman/{task}`` and ``spearman``, in [-1, 1]; NaN, in the file null, where all images have the same entropy or
      the same loss.

    Tasks whose label is a number, which have neither, are left out.

    The labels of the split are read for this measurement only; nothing is learned or chosen by it. The training goes on
    as if it had not happened, bit for bit: random states and modes are put back, and there are no gradients.
    Every process measures its share of the images; they are ranked together.

    Args:
        steps: the optimiser steps after which to measure, 0 being before the first; either this or ``every_n_steps``.
        every_n_steps: measure before the first optimiser step and after every so many.
        split: whose images, ``val`` or ``test``.
        limit_batches: batches per task and process; None for all.
        path: the file, relative to the run's directory.

    Raises:
        ConfigurationError: a setting is unknown, out of range, or contradicts another one; in fit, the module has no
            merged model, the data is none of several tasks, or the run ends before the last of ``steps``.
        DataError: a task has no labelled image in the split.
    """

    records_name = "measured"

    def __init__(
        self,
        steps: list[int] | None = None,
        every_n_steps: int | None = None,
        split: Literal["val", "test"] = "val",
        limit_batches: int | None = None,
        path: str = "spearman.json",
    ) -> None:
        super().__init__()
        if (steps is None) == (every_n_steps is None):
            got = "neither" if steps is None else "both"
            raise ConfigurationError(
                f"steps and every_n_steps: expected exactly one of them, got {got}. Use e.g. every_n_steps: 100."
            )
        whole_number("every_n_steps", every_n_steps, minimum=1, optional=True)
        whole_number("limit_batches", limit_batches, minimum=1, optional=True)
        if steps is not None and (
            isinstance(steps, str) or not steps or any(type(step) is not int or step < 0 for step in steps)
        ):
            raise ConfigurationError(
                f"steps: expected a list of numbers of optimiser steps, 0 or more, got {steps!r}. Use e.g. [0, 100]."
            )
        one_of("split", split, ("val", "test"))
        if Path(path).suffix != ".json":
            raise ConfigurationError(f"path: expected a file ending in .json, got {path!r}.")
        self.steps, self.every_n_steps = None if steps is None else sorted(set(steps)), every_n_steps
        self.split, self.limit_batches, self.path = split, limit_batches, path
        self._loaders: dict[str, Any] = {}

    @property
    def measured(self) -> list[dict[str, Any]]:
        """One record per measurement, as in the file."""
        return self.records

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Get hold of the images."""
        data: Any = getattr(trainer, "datamodule", None)
        names = task_names(data)
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            if self.split == "test":  # fit has set up the other one
                data.setup("test")
            loaders = data.val_dataloader() if self.split == "val" else data.test_dataloader()
            found = dict(zip(names, loaders, strict=True))
        head_of: Any = getattr(pl_module, "head_of", None)
        heads = {task: head_of(task) for task in names} if head_of is not None else {}
        self._loaders = {task: one for task, one in found.items() if not hasattr(heads.get(task), "numbers")}
        if not self._loaders:
            raise ConfigurationError(
                f"EntropyLossCorrelation: expected tasks with classes, got numbers alone in {first_few(names)}. Remove "
                "the callback."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the first step, or where a resumed run has not yet."""
        end = trainer.estimated_stepping_batches
        if self.steps is not None and self.steps[-1] > end:
            raise ConfigurationError(
                f"steps: expected none behind the run's last optimiser step, {end}, got {self.steps[-1]}. Remove it, "
                "or train longer."
            )
        super().on_train_start(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the images."""
        self._loaders = {}

    def _due(self, step: int) -> bool:
        return step in self.steps if self.steps is not None else step % (self.every_n_steps or 1) == 0

    def _record(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        step = trainer.global_step
        if self._recorded(step):
            return {}
        randomness = isolate_rng(include_cuda=pl_module.device.type == "cuda")
        # The merge need not have registered the network whose weights it stands in for.
        with randomness, torch.no_grad(), evaluating(pl_module, pl_module.merged.module), pl_module.merged_once():
            own = [self._entropies_and_losses(trainer, pl_module, task) for task in self._loaders]
        found = [torch.tensor(list(part.values()), dtype=torch.float64) for part in _of_all_processes(trainer, own)]
        rows = dict(zip(self._loaders, found, strict=True))
        empty = [task for task, numbers in rows.items() if not len(numbers)]
        if empty:
            raise DataError(
                f"{first_few(empty)}: expected labelled images in the {self.split} split, got none. Give the task "
                "some, or remove EntropyLossCorrelation."
            )
        tasks = {task: float(spearman(*numbers.T)) for task, numbers in rows.items()}
        together = float(spearman(*torch.cat(list(rows.values())).T))
        self.records.append({"step": step, "spearman": together, "tasks": tasks})
        logged = {**{f"spearman/{task}": value for task, value in tasks.items()}, "spearman": together}
        self._log(trainer, logged)
        if trainer.is_global_zero:
            self._write(trainer, {task: len(numbers) for task, numbers in rows.items()})
        return logged

    def _entropies_and_losses(self, trainer: L.Trainer, pl_module: Any, task: str) -> _Rows:
        """Entropy and loss of this process's labelled images of a task under the merged model."""
        rows: _Rows = {}
        for batch in islice(self._loaders[task], self.limit_batches):
            placed = move_data_to_device(trainer.precision_plugin.convert_input(batch), pl_module.device)
            with trainer.precision_plugin.val_step_context():
                logits = pl_module.classify(pl_module.features(placed), task)
            # In float64: in float32 all images that the model is sure of would have the loss 0.
            logits, labels, indices = logits.cpu().double(), batch.targets.cpu(), batch.indices.cpu()
            counted = (indices >= 0) & (labels >= 0 if labels.ndim == 1 else (labels >= 0).any(1))
            logits, labels = logits[counted], labels[counted]
            entropies = prediction_entropy(logits)
            if labels.ndim == 1:
                losses = F.cross_entropy(logits, labels, reduction="none")
            else:
                total, tokens = token_losses(logits, labels)
                losses = total / tokens
            for index, *numbers in zip(indices[counted].tolist(), entropies.tolist(), losses.tolist(), strict=True):
                rows[index] = numbers
        return rows

    def _write(self, trainer: L.Trainer, images: dict[str, int]) -> None:
        def plain(value: float) -> float | None:
            return None if math.isnan(value) else value

        measured = [
            {
                "step": record["step"],
                "spearman": plain(record["spearman"]),
                "tasks": {task: plain(value) for task, value in record["tasks"].items()},
            }
            for record in self.records
        ]
        content = {"split": self.split, "images": images, "measured": measured}
        write_text(Path(trainer.default_root_dir) / self.path, json.dumps(content, indent=2) + "\n")


def _of_all_processes(trainer: L.Trainer, own: list[_Rows]) -> list[_Rows]:
    """Every task's rows of all processes, on each of them; an image that several have counts once."""
    if trainer.world_size == 1:
        return own
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, own)
    return [{index: row for part in task for index, row in part.items()} for task in zip(*parts, strict=True)]
