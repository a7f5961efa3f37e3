"""When a callback acts while a module trains, and what one that watches a merge records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L

from lit_merge.errors import ConfigurationError

__all__ = ["EverySteps", "MergeRecorder"]


class EverySteps(L.Callback, ABC):
    """Acts after every ``every_n_steps`` optimiser steps, None for never; not where a resumed run begins."""

    every_n_steps: int | None
    _last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which is not 0 in a resumed run."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act when the step has come."""
        step = trainer.global_step
        if self.every_n_steps and step != self._last_step and step % self.every_n_steps == 0:
            self._at_step(trainer, pl_module)
        self._last_step = step  # while gradients accumulate, a step takes several batches

    @abstractmethod
    def _at_step(self, trainer: L.Trainer, pl_module: Any) -> None: ...


class MergeRecorder(L.Callback, ABC):
    """Records numbers of a merge that is being learned, once per step at most, and logs them to every logger.

    Attributes:
        records: one per step that was recorded, with its ``step``; a resumed run goes on with those of its checkpoint.
    """

    records_name: str
    """What a checkpoint calls the records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without a merge; forget another run. A resumed run's records come afterwards."""
        if stage == "fit":
            if not hasattr(pl_module, "merged"):
                raise ConfigurationError(
                    f"{type(self).__name__}: expected a module that learns merging coefficients, such as MergeModule, "
                    f"got {type(pl_module).__name__} without merged. Remove the callback."
                )
            if trainer.global_step == 0:
                self.records = []

    def state_dict(self) -> dict[str, Any]:
        """The records so far."""
        return {self.records_name: self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.records = list(state_dict[self.records_name])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record before the first step, or where a resumed run has not yet."""
        self._record_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record when the step has come."""
        for name, value in self._record_if_due(trainer, pl_module).items():
            # For monitors; the loggers have it, and not every log_every_n_steps.
            pl_module.log(name, value, on_step=True, on_epoch=False, logger=False)

    def _record_if_due(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        return self._record(trainer, pl_module) if self._due(trainer.global_step) else {}

    def _recorded(self, step: int) -> bool:
        """Whether the step has a record: gradients accumulate, or the run was resumed here."""
        return bool(self.records) and self.records[-1]["step"] == step

    def _log(self, trainer: L.Trainer, logged: dict[str, float]) -> dict[str, float]:
        for logger in trainer.loggers:  # as Lightning counts steps, from 0
            logger.log_metrics(logged, step=max(trainer.global_step - 1, 0))
        return logged

    @abstractmethod
    def _due(self, step: int) -> bool: ...

    @abstractmethod
    def _record(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Record, unless that was done at this step, and return what was logged."""
