"""Merging coefficients while they are learned: logged, kept by depth, and drawn at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_merge.callbacks.steps import MergeRecorder
from lit_merge.files.text import write_text
from lit_merge.report.coefficient_depth import depth_means
from lit_merge.report.coefficient_figures import coefficient_depth_figure, coefficient_heat_map
from lit_merge.transforms.base import whole_number

__all__ = ["LogCoefficients"]


class LogCoefficients(MergeRecorder):
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
        depths: what the numbers of ``by_depth`` in a record belong to: ``embedding``, ``block 0``, …; empty if the
            coefficients have no depth.

    Raises:
        ConfigurationError: ``every_n_steps`` is not positive; in fit, the module learns no coefficients.
    """

    records_name = "history"

    def __init__(self, every_n_steps: int = 50, figures: bool = True) -> None:
        super().__init__()
        whole_number("every_n_steps", every_n_steps, minimum=1)
        self.every_n_steps, self.figures = every_n_steps, figures
        self.depths: tuple[str, ...] = ()

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record per step, as in the file."""
        return self.records

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record where the coefficients start."""
        self._record(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the coefficients that were learned."""
        self._record(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the history and the figures; the process of rank zero does."""
        if trainer.is_global_zero:
            directory = Path(trainer.default_root_dir)
            content = {"depths": self.depths, "history": self.records}
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

    def _due(self, step: int) -> bool:
        return step % self.every_n_steps == 0

    def _record(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        step = trainer.global_step
        coefficients = pl_module.merged.to_coefficients({})
        depth = depth_means(coefficients)
        self.depths = () if depth is None else depth.names
        if self._recorded(step):
            return {}
        means = dict(zip(coefficients.tasks, coefficients.values.mean(1).tolist(), strict=True))
        negative, saturated = (float(mask.double().mean()) for mask in _masks(pl_module.merged))
        record = {"step": step, "mean": means, "negative": negative, "saturated": saturated}
        if depth is not None:
            record["by_depth"] = dict(zip(depth.tasks, depth.values.tolist(), strict=True))
        self.records.append(record)
        logged = {f"coefficient/{task}": mean for task, mean in means.items()}
        return self._log(trainer, {**logged, "coefficient/negative": negative, "coefficient/saturated": saturated})


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
