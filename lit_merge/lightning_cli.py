"""LightningCLI with run directories, default modules and the callbacks that every run needs."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_merge.callbacks import ExtractTaskVector, WriteMetrics, WritePredictions
from lit_merge.cli import prepare_run_directory, run_directory
from lit_merge.command_parser import LightningCommandParser
from lit_merge.data.multitask import MultiTaskDataModule
from lit_merge.data.pretraining import CaptionDataModule
from lit_merge.data.task import TaskDataModule
from lit_merge.modules import ContrastiveModule, FineTuneModule, MultiTaskModule

__all__ = ["LitMergeCLI"]

# Known by their short names on the command line because they are imported here.
_SHORT_NAMES = (ContrastiveModule, FineTuneModule, MultiTaskModule, CaptionDataModule, MultiTaskDataModule, TaskDataModule)


class LitMergeCLI(LightningCLI):
    """One of Lightning's commands on any LightningModule and LightningDataModule.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: what follows it on the command line.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"config_filename": f"{command}.yaml", "overwrite": True},
            seed_everything_default=0,
            parser_class=LightningCommandParser,
            parser_kwargs={"prog": "lit-merge"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[command, *arguments],
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that runs: building the others' parsers takes time."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, never ``sys.argv``."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory, and the classes that a run is most likely about."""
        parser.add_argument("--output", type=str | None, default=None, help="Run directory (default: runs/COMMAND/TIME).")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace an earlier run in that directory.")
        parser.set_defaults(
            {
                "model": {"class_path": "lit_merge.modules.FineTuneModule"},
                "data": {"class_path": "lit_merge.data.TaskDataModule"},
            }
        )

    def before_instantiate_classes(self) -> None:
        """Claim the run directory before anything expensive happens."""
        settings = self.config[self.command]
        self.run_directory = run_directory(self.command, settings["output"])
        if rank_zero_only.rank == 0:
            resumed = self.command == "fit" and settings.get("ckpt_path") is not None
            prepare_run_directory(self.run_directory, self.command, settings["overwrite"], resumed)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Point the trainer, its logger and the writing callbacks at the run directory."""
        settings = self._get(self.config_init, "trainer")
        kwargs["default_root_dir"] = str(self.run_directory)
        if settings.get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(str(self.run_directory), name="", version="") if self.command == "fit" else False
        callbacks = list(settings.get("callbacks") or [])
        if self.command == "fit" and isinstance(self.model, FineTuneModule):
            if not any(isinstance(callback, ExtractTaskVector) for callback in callbacks):
                callbacks.append(ExtractTaskVector())
        elif self.command in ("validate", "test"):
            callbacks.append(WriteMetrics(f"{self.command}_metrics.json"))
        elif self.command == "predict":
            callbacks.append(WritePredictions())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if arguments.get("weights_only") is None:
            arguments["weights_only"] = True  # nothing read from disk is executed unless asked for
        return arguments
