"""The task vector of a fine-tuning run, written when it ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from lit_merge._version import __version__
from lit_merge.callbacks.steps import EverySteps
from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.writing import writing
from lit_merge.models.language.classifiers import TaskHead, head_file
from lit_merge.params import norm
from lit_merge.transforms.base import one_of, whole_number
from lit_merge.vectors.task_vector import TaskVector

__all__ = ["ExtractTaskVector"]


class ExtractTaskVector(EverySteps):
    """Writes τ = θ − θ0 as safetensors when fit ends, and on the way if asked to.

    Rank zero writes, atomically; the others wait. The header holds the task, its classes, the regime, the fingerprint
    of θ0, the step, the norms, the versions, and what training says about the model's confidence. A head that trained
    with the task goes into a file of its own beside it, ``task_vector.head.safetensors``, of several tasks
    ``task_vector.<task>.head.safetensors``: it is no part of what is merged.

    Args:
        path: the file, relative to the run's directory.
        dtype: ``float32``, or ``bfloat16`` for half the size; the relative rounding error is logged and kept in the
            header.
        every_n_steps: also write ``<name>-step=<n>.safetensors`` every so many steps.
        best: a logged metric, e.g. ``val/accuracy``: also write ``<name>-best.safetensors`` whenever it improves.
        mode: whether ``max`` or ``min`` of that metric is best.

    Attributes:
        vector: the last vector extracted, on rank zero.

    Raises:
        ConfigurationError: ``every_n_steps`` is not positive, the file's suffix is not ``.safetensors``, or ``dtype``
            or ``mode`` is unknown; in fit, the module has no task vector, or there is no such metric.
    """

    def __init__(
        self,
        path: str = "task_vector.safetensors",
        dtype: Literal["float32", "bfloat16"] = "float32",
        every_n_steps: int | None = None,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        whole_number("every_n_steps", every_n_steps, minimum=1, optional=True)
        if Path(path).suffix != ".safetensors":
            raise ConfigurationError(f"path: expected a file ending in .safetensors, got {path!r}.")
        one_of("dtype", dtype, ("float32", "bfloat16"))
        one_of("mode", mode, ("max", "min"))
        self.path, self.dtype, self.every_n_steps = path, dtype, every_n_steps
        self.best, self.mode = best, mode
        self.best_value: float | None = None
        self.vector: TaskVector | None = None
        self.began = False  # with the final vector

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a module that is no fine-tuning before it has been trained."""
        self.began = False
        missing = [name for name in ("task_vector", "task", "classes", "regime") if not hasattr(pl_module, name)]
        if missing:
            raise ConfigurationError(
                f"ExtractTaskVector: expected a module with a task vector, such as FineTuneModule, got "
                f"{type(pl_module).__name__} without {first_few(missing)}. Remove the callback."
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run does not forget it."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best_value = state_dict["best_value"]

    def _at_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._write(trainer, pl_module, f"-step={trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the best vector so far if this one is."""
        if self.best is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.best not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ConfigurationError(f"best: expected a logged metric, one of {known}, got {self.best!r}.")
        # Rank zero decides for all: a metric that is not synchronised differs, and a process would wait for ever.
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.best]))
        sign = 1 if self.mode == "max" else -1
        if not math.isnan(value) and (self.best_value is None or sign * value > sign * self.best_value):
            self.best_value = value
            self._write(trainer, pl_module, "-best")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the final vector."""
        self.began = True
        self._write(trainer, pl_module, "")
        if self.best is not None and self.best_value is None:
            raise ConfigurationError(
                f"best: expected a validation with a finite {self.best}, got none in this run; the final vector was "
                "written. Give the data a validation split, or validate more often."
            )

    def _write(self, trainer: L.Trainer, pl_module: Any, suffix: str) -> None:
        if trainer.is_global_zero:
            self.write(trainer, pl_module, suffix)
        trainer.strategy.barrier("task vector written")

    def write(self, trainer: L.Trainer, pl_module: Any, suffix: str = "") -> None:
        """Write the vector as it is now, from this process alone.

        Args:
            trainer: whose root folder it goes to.
            pl_module: that it is taken from.
            suffix: of the file's name.

        Raises:
            WriteError: the disk is full or not writable.
        """
        target = Path(trainer.default_root_dir) / self.path
        target = target.with_name(f"{target.stem}{suffix}{target.suffix}")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        tensors = pl_module.task_vector()
        self.vector = TaskVector(tensors, pl_module.task, metadata=self._describe(trainer, pl_module, tensors))
        several = {task: pl_module.head_of(task) for task in getattr(pl_module, "tasks", ())}
        for task, head in (several or {"": getattr(pl_module, "head", None)}).items():
            if isinstance(head, TaskHead):
                head.save(head_file(target, task))
        error = self.vector.save(target, torch.bfloat16 if self.dtype == "bfloat16" else None)
        rounding = f" ({self.dtype}, relative rounding error {error:.2e})" if error else ""
        L.pytorch.utilities.rank_zero_info(f"Task vector of {pl_module.task!r}: {target}{rounding}")

    def _describe(self, trainer: L.Trainer, pl_module: Any, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        length = norm(tensors)
        return {
            **pl_module.base_description(),
            "classes": json.dumps(list(pl_module.classes)),
            "regime": pl_module.regime,
            **(pl_module.training_description() if hasattr(pl_module, "training_description") else {}),
            "step": str(trainer.global_step),
            "norm": f"{length:.6g}",
            "relative_norm": f"{length / norm(pl_module.initial_parameters):.6g}",
            "versions": json.dumps(
                {"lit_merge": __version__, "torch": str(torch.__version__), "lightning": L.__version__}
            ),
        }
