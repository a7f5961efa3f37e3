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

from lit_merge.files.text import write_text

__all__ = ["WriteMetrics", "WritePredictions", "write_text"]


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


class WritePredictions(L.Callback):
    """Writes the class and the probabilities of every image as CSV, in the order of the images.

    Columns: ``image``, ``class``, ``probability``, then one column per class.

    Args:
        path: the file, relative to the run's directory.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = path
        self._rows: dict[int, Tensor] = {}

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
        """Keep a batch's probabilities; padding has index -1."""
        for index, row in zip(outputs["indices"].tolist(), outputs["probabilities"].cpu(), strict=True):
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
        writer.writerow(["image", "class", "probability", *classes])
        for index in sorted(rows):
            best = int(rows[index].argmax())
            numbers = [f"{float(value):.6f}" for value in rows[index]]
            writer.writerow([names[index], classes[best], numbers[best], *numbers])
        write_text(Path(trainer.default_root_dir) / self.path, table.getvalue())
