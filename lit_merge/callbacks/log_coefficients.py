"""Merging coefficients while they are learned: logged, kept by depth, and drawn at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.files.text import write_text
from lit_merge.report.coefficient_depth import depth_means
from lit_merge.report.coefficient_figures import coefficient_depth_figure, coefficient_heat_map

__all__ = ["LogCoefficients"]


class LogCoefficients(L.Callback):
    """Logs the coefficients of a merge that is being learned, and draws them when fit ends.

    Logged to every logger, at the start, every so many optimiser steps, and at the end:

    - ``coefficient/{task}``: the mean of a task's coefficients as applied, its groups counting alike;
    - ``coefficient/negative``: the share of all coefficients that are below zero, in [0, 1];
    - ``coefficient/saturated``: the share that lie at an end of the clamp, where no gradient moves them, in [0, 1].

    Written to the run's directory at the end:

    - ``coefficients_history.json``: all of these by step, and the means of every task by depth;
    - ``coefficients.png``: every coefficient, task by group;
    - ``coefficients_depth.png``, unless the coefficients have no depth, as task-wise ones have none: the means by
      depth, beside the line ``α + β · ℓ / (L − 1)`` of LiNeS that fits them best (Wang et al. 2025, eq. 3).

    If coefficients are negative or saturated in the end, one line says how many of which tasks.

    Args:
        every_n_steps: optimiser steps from one record to the next.
        figures: whether to draw.

    Attributes:
        history: one record per step, as in the file.
        depths: what the numbers of ``by_depth`` in a record belong to: ``embedding``, ``block 0``, …; empty if the
            coefficients have no depth.

    Raises:
        ConfigurationError: ``every_n_steps`` is not positive; in fit, the module learns no coefficients.
    """

    def __init__(self, every_n_steps: int = 50, figures: bool = True) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps: expected a positive number, got {every_n_steps!r}. Change it.")
        self.every_n_steps, self.figures = every_n_steps, figures
        self.history: list[dict[str, Any]] = []
        self.depths: tuple[str, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without a merge; forget another run. A resumed run's records come afterwards."""
        if stage == "fit":
            if not hasattr(pl_module, "merged"):
                raise ConfigurationError(
                    "LogCoefficients: expected a module that learns merging coefficients, such as MergeModule, got "
                    f"{type(pl_module).__name__} without merged. Remove the callback."
                )
            if trainer.global_step == 0:
                self.history = []

    def state_dict(self) -> dict[str, Any]:
        """The records so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = list(state_dict["history"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record where the coefficients start."""
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the coefficients when the step has come."""
        if trainer.global_step % self.every_n_steps == 0:
            for name, value in self._record(trainer, pl_module).items():
                # For monitors; the loggers have it, and not every log_every_n_steps.
                pl_module.log(name, value, on_step=True, on_epoch=False, logger=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the coefficients that were learned."""
        self._record(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the history and the figures; the process of rank zero does."""
        if trainer.is_global_zero:
            directory = Path(trainer.default_root_dir)
            content = {"depths": self.depths, "history": self.history}
            write_text(directory / "coefficients_history.json", json.dumps(content, indent=1) + "\n")
            module: Any = pl_module
            if self.figures:
                coefficients = module.merged.to_coefficients({**module.describe(), "step": str(trainer.global_step)})
                coefficient_heat_map(coefficients, directory / "coefficients.png")
                if self.depths:
                    coefficient_depth_figure(coefficients, directory / "coefficients_depth.png")
            remark = _remark(module.merged)
            if remark:
                rank_zero_info(remark)
        trainer.strategy.barrier("coefficients drawn")

    def _record(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Log the coefficients and keep them, once per step; return what was logged."""
        step = trainer.global_step
        coefficients = pl_module.merged.to_coefficients({})
        depth = depth_means(coefficients)
        self.depths = () if depth is None else depth.names
        if self.history and self.history[-1]["step"] == step:  # the gradients accumulate, or the run was resumed here
            return {}
        means = dict(zip(coefficients.tasks, coefficients.values.mean(1).tolist(), strict=True))
        negative, saturated = (float(mask.double().mean()) for mask in _masks(pl_module.merged))
        record = {"step": step, "mean": means, "negative": negative, "saturated": saturated}
        if depth is not None:
            record["by_depth"] = dict(zip(depth.tasks, depth.values.tolist(), strict=True))
        self.history.append(record)
        logged = {f"coefficient/{task}": mean for task, mean in means.items()}
        logged |= {"coefficient/negative": negative, "coefficient/saturated": saturated}
        for logger in trainer.loggers:  # as Lightning counts steps, from 0
            logger.log_metrics(logged, step=max(step - 1, 0))
        return logged


def _masks(merged: Any) -> tuple[Tensor, Tensor]:
    """Which coefficients are negative, and which lie at an end of the clamp; bool ``(T, L)`` each."""
    applied = merged.applied().detach()
    negative = applied < 0
    if merged.clamp is None:
        return negative, negative.new_zeros(negative.shape)
    low, high = (applied.new_tensor(end) for end in merged.clamp)  # rounded as the coefficients are
    return negative, (applied <= low) | (applied >= high)


def _remark(merged: Any) -> str:
    """One line about negative and saturated coefficients; empty if there are none."""
    parts = []
    ends = "" if merged.clamp is None else "at an end of the clamp [{:g}, {:g}]".format(*merged.clamp)
    for mask, what in zip(_masks(merged), ("negative", ends), strict=True):
        counts = {task: int(count) for task, count in zip(merged.tasks, mask.sum(1), strict=True) if count}
        if counts:
            tasks = ", ".join(f"{task} {count}" for task, count in counts.items())
            parts.append(f"{sum(counts.values())} of {mask.numel()} are {what} ({tasks})")
    return f"Merging coefficients: {'; '.join(parts)}." if parts else ""
