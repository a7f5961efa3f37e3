"""What a run leaves: whole checkpoints, the task vector even if the last checkpoint cannot be written, one folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar

from lit_merge.callbacks import ExtractTaskVector, WriteMerge
from lit_merge.errors import WriteError, one_line
from lit_merge.files.writing import new_file, writing

__all__ = ["EpochBar", "Rescue", "WholeCheckpoints", "arrange", "check_room"]


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that take their name when they are complete; the earlier one of that name stays until then."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; one that goes to a URL is Lightning's affair.

        Raises:
            WriteError: the disk is full or not writable.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as content:
            try:
                torch.save(checkpoint, content)
            except RuntimeError as error:  # torch's writer reports what the file has refused in this way
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise


class Rescue(L.Callback):
    """Writes a finished run's results when its last checkpoint cannot be written."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write them if training has reached its end; otherwise they would be those of an unfinished run."""
        if not isinstance(exception, WriteError) or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        writers = [one for one in trainer.callbacks if isinstance(one, ExtractTaskVector | WriteMerge)]  # type: ignore[attr-defined]
        if not trainer.fit_loop.done or any(one.began for one in writers):
            return
        for writer in writers:
            try:
                writer.write(trainer, pl_module)
            except OSError as error:
                exception.args = (f"{one_line(exception)}; {one_line(error)}.", *exception.args[1:])


class EpochBar(RichProgressBar):
    """Lightning's bar, which shows the number of steps where that of epochs is not limited."""

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs is None or self.trainer.max_epochs >= 0:
            return super()._get_train_description(current_epoch)
        steps = self.trainer.max_steps
        return f"Epoch {current_epoch}, to step {steps}" if steps >= 0 else f"Epoch {current_epoch}"


def arrange(trainer: L.Trainer, directory: Path) -> None:
    """Let a trainer's checkpoints be written whole, and into the run's directory whatever its loggers are."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint) and getattr(callback, "dirpath", "") is None:
            callback.dirpath = str((directory / "checkpoints").absolute())  # type: ignore[attr-defined]


def check_room(trainer: L.Trainer, module: L.LightningModule, directory: Path, freed: int = 0) -> None:
    """Refuse to train where the results have no room: what trains, and with checkpoints its optimiser's state as well.

    Args:
        trainer: of the run.
        module: that it trains.
        directory: where it writes; it exists.
        freed: bytes of an earlier run there that is going to be removed.

    Raises:
        WriteError: the disk has less room.
    """
    trained = sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)
    checkpoint = 3 if trainer.checkpoint_callbacks else 0  # the parameters and Adam's two moments of each
    needed, free = trained * (1 + checkpoint), shutil.disk_usage(directory).free + freed
    if needed > free:
        raise WriteError(
            f"{directory}: expected room for about {needed:,} bytes (results{' and a checkpoint' * bool(checkpoint)}), "
            f"got {free:,}. Free space there, choose another --output, or add --trainer.enable_checkpointing false."
        )
