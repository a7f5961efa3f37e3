"""What evaluation and prediction leave in the run's directory."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_merge.data.batch import ImageBatch
from lit_merge.errors import ConfigurationError
from lit_merge.files.text import write_text
from lit_merge.report.hits import save_hits

__all__ = ["WriteHits", "WriteMetrics", "WritePredictions", "write_text"]


class WriteMetrics(L.Callback):
    """Writes the metrics of ``validate`` and ``test`` as JSON, name -> number.

    Args:
        path: the file, relative to the run's directory.
    """

    def __init__(self, path: str = "metrics.json") -> None:
        self.path = path

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the test metrics."""
        self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the validation metrics, outside of fit."""
        if trainer.state.fn == "validate":
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
            write_text(Path(trainer.default_root_dir) / self.path, json.dumps(metrics, indent=2) + "\n")


class WriteHits(L.Callback):
    """Writes which test examples were right, a bit each, see :func:`lit_merge.report.hits.save_hits`.

    Paired comparisons of models are computed from these, whichever they are and whenever.

    Args:
        path: the file, relative to the run's directory.
    """

    def __init__(self, path: str = "test_hits.safetensors") -> None:
        self.path = path
        self._found: dict[str, dict[int, bool]] = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self._found = {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what a step returns: ``task``, ``hits`` and ``indices``; padding has index -1."""
        if not isinstance(outputs, dict) or "hits" not in outputs:
            return
        rows = self._found.setdefault(outputs["task"], {})
        for index, hit in zip(outputs["indices"].tolist(), outputs["hits"].tolist(), strict=True):
            if index >= 0:
                rows[index] = hit > 0.5

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the processes' rows and write the file."""
        parts = [self._found]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._found)
            parts = gathered
        if not trainer.is_global_zero:
            return
        rows: dict[str, dict[int, bool]] = {}
        for part in parts:
            for task, found in part.items():
                rows.setdefault(task, {}).update(found)
        hits = {task: torch.tensor([found[index] for index in sorted(found)]) for task, found in rows.items()}
        if hits:
            save_hits(Path(trainer.default_root_dir) / self.path, hits)


class WritePredictions(L.Callback):
    """Writes the class and the probabilities of every example as CSV, in the order of the examples.

    Columns: ``image``, or ``example`` where it is none, ``class``, ``probability``, then one column per class, which is
    ``probability of NAME`` for a class that is called like one of these; of a task whose label is a number ``image`` or
    ``example``, and ``number``. Tasks of next tokens have neither, and are refused with a
    :class:`~lit_merge.errors.ConfigurationError` at the first batch.

    Args:
        path: the file, relative to the run's directory.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = path
        self._rows: dict[int, Tensor] = {}
        self._column = "image"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self._rows = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's probabilities or numbers; padding has index -1."""
        self._column = "image" if isinstance(batch, ImageBatch) else "example"
        found = outputs["numbers"] if "numbers" in outputs else outputs["probabilities"]
        if found.ndim != 2:
            raise ConfigurationError(
                "predict: expected a task with classes, answers or a number, got one of next tokens, whose "
                "probabilities are no table. Use test for its perplexity, or the "
                "callback GeneratedAnswers for what is written."
            )
        for index, row in zip(outputs["indices"].tolist(), found.cpu(), strict=True):
            if index >= 0:
                self._rows[index] = row

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Gather the processes' rows and write the file."""
        rows = self._rows
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, rows)
            rows = {index: row for part in gathered for index, row in part.items()}
        if not trainer.is_global_zero:
            return
        names = trainer.datamodule.predict_names()  # type: ignore[attr-defined]
        classes = list(pl_module.classes)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        first = [self._column, *(["class", "probability"] if classes else ["number"])]
        writer.writerow([*first, *(f"probability of {name}" if name in first else name for name in classes)])
        for index in sorted(rows):
            if not classes:
                writer.writerow([names[index], f"{float(rows[index][0]):.6f}"])
                continue
            best = int(rows[index].argmax())
            numbers = [f"{float(value):.6f}" for value in rows[index]]
            writer.writerow([names[index], classes[best], numbers[best], *numbers])
        write_text(Path(trainer.default_root_dir) / self.path, table.getvalue())
