"""LightningCLI with run directories, default modules and the callbacks that every run needs."""

from __future__ import annotations

import atexit
import contextlib
import logging
import pickle
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_merge.callbacks import ExtractTaskVector, WriteMerge, WriteMetrics, WritePredictions
from lit_merge.commands.parsing import LightningCommandParser
from lit_merge.commands.training.run_directory import RunDirectory
from lit_merge.data.adaptation import MergeDataModule
from lit_merge.data.multitask import MultiTaskDataModule
from lit_merge.data.pretraining import CaptionDataModule
from lit_merge.data.task import TaskDataModule
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError
from lit_merge.modules import ContrastiveModule, FineTuneModule, MergeModule, MultiTaskModule

__all__ = ["LitMergeCLI", "check_configuration"]

# Known by their short names on the command line because they are imported here.
_SHORT_NAMES = (
    ContrastiveModule,
    FineTuneModule,
    MergeModule,
    MultiTaskModule,
    CaptionDataModule,
    MergeDataModule,
    MultiTaskDataModule,
    TaskDataModule,
)


_RESTORING = "_restore_modules_and_callbacks"  # where Lightning opens a checkpoint


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run's directory, whatever the logger, once the data are there.

    Args:
        parser: of the command.
        config: what it parsed.
        directory: the run's.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, directory: RunDirectory) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.directory = directory

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save it; Lightning calls this on rank zero."""
        self.directory.begin(self.parser.dump(self.config, skip_none=False))


class LitMergeCLI(LightningCLI):
    """One of Lightning's commands on any LightningModule and LightningDataModule.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: what follows it on the command line.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self._arguments = _classes_first(arguments)
        self.run_directory: RunDirectory | None = None
        _hush()
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                save_config_callback=SaveRunConfig,
                seed_everything_default=0,
                parser_class=LightningCommandParser,
                parser_kwargs={"prog": "lit-merge", "allow_abbrev": False},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=[command, *self._arguments],
                auto_configure_optimizers=False,
            )
        except BaseException:
            if self.run_directory is not None:
                trained = command == "fit" and hasattr(self, "trainer") and self.trainer.global_step > 0
                self.run_directory.discard(begun=trained)
            raise
        if self.run_directory is not None and self._get(self.config, "trainer").get("fast_dev_run"):
            self.run_directory.discard()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that runs: building the others' parsers takes time."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, never ``sys.argv``."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory, and the classes that a run is most likely about."""
        parser.add_argument(
            "--output", type=str | None, default=None, help="Run directory (default: runs/COMMAND/TIME)."
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace an earlier run in that directory.")
        # Only where no other class is named: it would take over the default class's settings of the same names.
        named = _named_classes(self._arguments)
        defaults = {"model": "lit_merge.modules.FineTuneModule", "data": "lit_merge.data.TaskDataModule"}
        parser.set_defaults({key: {"class_path": path} for key, path in defaults.items() if key not in named})

    def _parse_ckpt_path(self) -> None:
        """Claim the run directory before anything expensive happens, then take over the checkpoint's settings."""
        settings = self.config[self.command]
        checkpoint = str(settings["ckpt_path"]) if settings.get("ckpt_path") is not None else None
        self.run_directory = RunDirectory(self.command, settings["output"], settings["overwrite"], checkpoint)
        settings["ckpt_path"] = checkpoint = self.run_directory.checkpoint
        self.save_config_kwargs = {"directory": self.run_directory}
        try:
            super()._parse_ckpt_path()
        except (KeyboardInterrupt, SystemExit, LitMergeError):
            raise
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise _no_checkpoint(checkpoint, error) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Point the trainer, its logger and the writing callbacks at the run directory."""
        assert self.run_directory is not None
        settings, directory = self._get(self.config_init, "trainer"), str(self.run_directory.path)
        kwargs["default_root_dir"] = directory
        if settings.get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(directory, name="", version="") if self.command == "fit" else False
        if self.command != "fit" and settings.get("enable_checkpointing") is None:
            kwargs["enable_checkpointing"] = False
        callbacks = settings.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        if not settings.get("fast_dev_run"):  # a trial, which leaves nothing
            callbacks += self._writers(callbacks)
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            reason = str(error).strip().rstrip(".!")
            raise ConfigurationError(
                f"trainer: {reason}. Change its accelerator, devices, strategy, precision or plugins."
            ) from error

    def _writers(self, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
        if self.command == "fit":
            wanted = {FineTuneModule: ExtractTaskVector, MergeModule: WriteMerge}
            return [
                writer()
                for module, writer in wanted.items()
                if isinstance(self.model, module) and not any(isinstance(callback, writer) for callback in callbacks)
            ]
        if self.command == "predict":
            return [WritePredictions()]
        return [WriteMetrics(f"{self.command}_metrics.json")]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if arguments.get("weights_only") is None:
            arguments["weights_only"] = True  # nothing read from disk is executed unless asked for
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as request:
            if isinstance(request.__context__, KeyboardInterrupt):  # Lightning ends an interrupted run in this way
                raise KeyboardInterrupt from request
            raise
        except (pickle.UnpicklingError, KeyError, RuntimeError) as error:
            checkpoint = self.config[subcommand].get("ckpt_path")
            if checkpoint and _RESTORING in [frame.name for frame in traceback.extract_tb(error.__traceback__)]:
                raise _no_checkpoint(checkpoint, error) from error
            raise


_CLASSES = ("model", "data")


def _classes_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments, but a class is named before its settings: these are then its own, not the default's."""
    given = list(arguments)
    for key in _CLASSES:
        settings = [place for place, one in enumerate(given) if one.startswith(f"--{key}.") and not _names(key, one)]
        named = [place for place, one in enumerate(given) if _names(key, one)]
        if named and settings and settings[0] < named[0]:
            count = 1 if "=" in given[named[0]] else 2
            moved = given[named[0] : named[0] + count]
            del given[named[0] : named[0] + count]
            given[settings[0] : settings[0]] = moved
    return given


def _names(key: str, argument: str) -> bool:
    return argument.partition("=")[0] in (f"--{key}", f"--{key}.class_path")


def _named_classes(arguments: Sequence[str]) -> set[str]:
    """Which of model and data have their class named, before any of its settings, by an argument or in a file."""
    found: set[str] = set()
    seen: set[str] = set()
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        value = value or next(iter(arguments[place + 1 : place + 2]), "")
        for key in _CLASSES:
            if _names(key, argument) and key not in seen:
                found.add(key)
            elif option.startswith(f"--{key}."):
                seen.add(key)
        if option in ("-c", "--config"):
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # what is wrong with it is said in parsing
                path = Path(value)
                content = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else value)
                entries = content.items() if isinstance(content, dict) else ()
                named = {name for name, entry in entries if isinstance(entry, dict) and "class_path" in entry}
                found |= named & set(_CLASSES) - seen
    return found


class _ParseOnly(LitMergeCLI):
    def _parse_ckpt_path(self) -> None:
        pass

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_configuration(command: str, config: dict[str, Any]) -> None:
    """Parse a configuration of one of Lightning's commands, and do nothing else.

    Raises:
        SystemExit: it is wrong, and the parser has said so on the standard error.
    """
    _ParseOnly(command, ["--config", yaml.safe_dump(config)])


def _no_checkpoint(path: Any, error: Exception) -> FileFormatError:
    reason = f"{type(error).__name__}: {str(error).strip().partition('. ')[0]}".splitlines()[:2]
    return FileFormatError(f"{path}: expected a checkpoint of such a run, got {' '.join(reason)}. Give another.")


@atexit.register
def _leave_process_group() -> None:
    """Leave the group of processes before the interpreter ends.

    Lightning does it for NCCL alone; gloo's threads, alive when the interpreter is torn down, can abort a process that
    has done its work ("terminate called without an active exception").
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _hush() -> None:
    """Keep advertisements, and warnings about other packages' insides, from the user."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(("💡 Tip", "Detected KeyboardInterrupt"))
