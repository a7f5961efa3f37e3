"""LightningCLI with run directories, default modules and the callbacks that every run needs."""

from __future__ import annotations

import atexit
import copy
import logging
import pickle
import traceback
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch.distributed
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_merge.callbacks import ExtractTaskVector, WriteHits, WriteMerge, WriteMetrics, WritePredictions
from lit_merge.commands.parsing import NearestNames, configurations, refuse_saved_permissions, refuse_urls
from lit_merge.commands.training.checkpoint_settings import given_settings, reconciled
from lit_merge.commands.training.run_directory import RunDirectory
from lit_merge.commands.training.run_files import EpochBar, Rescue, arrange, check_room
from lit_merge.data.adaptation import MergeDataModule
from lit_merge.data.multitask import MultiTaskDataModule
from lit_merge.data.pretraining import CaptionDataModule
from lit_merge.data.task import TaskDataModule
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, one_line
from lit_merge.files.yaml_text import dump_yaml, load_yaml
from lit_merge.modules import ConditionModule, ContrastiveModule, FineTuneModule, MergeModule, MultiTaskModule

__all__ = ["LitMergeCLI", "check_configuration"]

# Known by their short names on the command line because they are imported here.
_SHORT_NAMES = (
    ConditionModule,
    ContrastiveModule,
    FineTuneModule,
    MergeModule,
    MultiTaskModule,
    CaptionDataModule,
    MergeDataModule,
    MultiTaskDataModule,
    TaskDataModule,
)


_PARSERS: dict[tuple[str, frozenset[str]], tuple[LightningArgumentParser, dict[str, Any], dict[str, list[str]]]] = {}

_RESTORING = "_restore_modules_and_callbacks"  # where Lightning opens a checkpoint


class LightningCommandParser(NearestNames, LightningArgumentParser):
    """The parser of ``fit``, ``validate``, ``test`` and ``predict``."""

    homes = (
        *("lit_merge.modules", "lit_merge.data", "lit_merge.callbacks", "lit_merge.transforms"),
        *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies"),
    )


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run's directory, whatever the logger, once the data are there.

    What holds for this run alone is not saved: ``overwrite``, and ``ckpt_path`` but as a comment.

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
        config = self.config.clone()
        checkpoint = config.pop("ckpt_path", None)
        config.pop("overwrite", None)
        if stage == "fit":
            check_room(trainer, pl_module, self.directory.path, self.directory.replaced_bytes())
        note = f"# from the checkpoint {checkpoint}\n" if checkpoint is not None else ""
        self.directory.begin(note + self.parser.dump(config, skip_none=False, skip_validation=True))


class LitMergeCLI(LightningCLI):
    """One of Lightning's commands on any LightningModule and LightningDataModule.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: what follows it on the command line.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        refuse_saved_permissions(arguments)
        self._arguments = _classes_first(arguments)
        self._named = frozenset(_named_classes(self._arguments))
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

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Build the parser, or take that of an earlier command of this process: building takes as long as parsing."""
        known = _PARSERS.pop((self.command, self._named), None)
        if known is None:
            super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        else:
            self.parser, self._subcommand_parsers, self._subcommand_method_arguments = known

    def _add_instantiators(self) -> None:
        """What gives the classes their settings lives as long as this command, not as long as the parser."""
        LightningCLI._add_instantiators(weakref.proxy(self))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, never ``sys.argv``."""
        self.config = parser.parse_args(args)
        # Whatever else happened, such as --print_config, may have left something in it.
        parts = self.parser, self._subcommand_parsers, self._subcommand_method_arguments
        _PARSERS[self.command, self._named] = parts

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory, and the classes that a run is most likely about."""
        parser.add_argument(
            "--output", type=str | None, default=None, help="Run directory (default: runs/COMMAND/TIME)."
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace an earlier run in that directory.")
        # Only where no other class is named: it would take over the default class's settings of the same names.
        defaults = {"model": "lit_merge.modules.FineTuneModule", "data": "lit_merge.data.TaskDataModule"}
        parser.set_defaults({key: {"class_path": path} for key, path in defaults.items() if key not in self._named})

    def _parse_ckpt_path(self) -> None:
        """Claim the run directory before anything expensive happens, then take over the checkpoint's settings."""
        settings = self.config[self.command]
        refuse_urls({name: settings.get(name) for name in ("output", "ckpt_path")})
        for key in _CLASSES:
            if str(settings[key].get("class_path")).startswith("lit_merge."):  # another's may know addresses
                refuse_urls((settings[key].get("init_args") or Namespace()).as_dict(), f"{key}.")
        checkpoint = str(settings["ckpt_path"]) if settings.get("ckpt_path") is not None else None
        self.run_directory = RunDirectory(self.command, settings["output"], settings["overwrite"], checkpoint)
        settings["ckpt_path"] = checkpoint = self.run_directory.checkpoint
        self.save_config_kwargs = {"directory": self.run_directory}
        before = copy.deepcopy(settings["model"])
        try:
            super()._parse_ckpt_path()
        except (KeyboardInterrupt, SystemExit, LitMergeError):
            raise
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise _no_checkpoint(checkpoint, error) from error
        if checkpoint is not None:
            settings = self.config[self.command]
            settings["model"], line = reconciled(before, settings["model"], given_settings(self._arguments), checkpoint)
            if line:
                rank_zero_info(line)

    def _dump_config(self) -> None:
        """What goes into checkpoints as the classes' settings: of the command, without checking it once more."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = load_yaml(text)[self.command]

    def instantiate_classes(self) -> None:
        """Loggers that are not told where to write do so in the run directory; the saved configuration is as given."""
        self._given = self.config
        self.config = copy.deepcopy(self.config)
        loggers = self._get(self.config, "trainer").get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            settings = logger.get("init_args") if hasattr(logger, "get") else None
            if settings is not None and settings.get("save_dir", "elsewhere") in (None, "."):
                settings["save_dir"] = str(self.run_directory.path) if self.run_directory else "."
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Point the trainer, its logger and the writing callbacks at the run directory."""
        assert self.run_directory is not None
        self.config = self._given
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
        shown = settings.get("enable_progress_bar") is not False and not settings.get("barebones")
        if self.command == "fit" and shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(EpochBar())
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            reason = one_line(error).rstrip("!")
            raise ConfigurationError(
                f"trainer: {reason}. Change its accelerator, devices, strategy, precision or plugins."
            ) from error
        arrange(trainer, self.run_directory.path)
        return trainer

    def _writers(self, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
        if self.command == "fit":
            wanted = {FineTuneModule: ExtractTaskVector, MergeModule: WriteMerge}
            return [
                Rescue(),
                *(
                    writer()
                    for module, writer in wanted.items()
                    if isinstance(self.model, module) and not any(isinstance(one, writer) for one in callbacks)
                ),
            ]
        if self.command == "predict":
            return [WritePredictions()]
        written = [WriteHits()] if self.command == "test" else []
        return [WriteMetrics(f"{self.command}_metrics.json"), *written]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if arguments.get("weights_only") is None:
            arguments["weights_only"] = True  # nothing read from disk is executed unless asked for
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as request:
            assert self.run_directory is not None
            going_on = self.run_directory.going_on()
            if isinstance(request.__context__, KeyboardInterrupt):  # Lightning ends an interrupted run in this way
                raise KeyboardInterrupt(going_on) from request
            if isinstance(request, SIGTERMException):
                request.args = (going_on,)
            raise
        except (pickle.UnpicklingError, KeyError, RuntimeError, IsADirectoryError) as error:
            checkpoint = self.config[subcommand].get("ckpt_path")
            if checkpoint and _RESTORING in [frame.name for frame in traceback.extract_tb(error.__traceback__)]:
                raise _no_checkpoint(checkpoint, error) from error
            raise


_CLASSES = ("model", "data")


def _classes_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments, but a class is named before its settings: these are then its own, not the default's."""
    given = list(arguments)
    for key in _CLASSES:
        settings = [index for index, one in enumerate(given) if one.startswith(f"--{key}.") and not _names(key, one)]
        named = [index for index, one in enumerate(given) if _names(key, one)]
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
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        value = value or next(iter(arguments[index + 1 : index + 2]), "")
        for key in _CLASSES:
            if _names(key, argument) and key not in seen:
                found.add(key)
            elif option.startswith(f"--{key}."):
                seen.add(key)
        for content in configurations([option, value]):
            entries = {name for name, entry in content.items() if isinstance(entry, dict) and "class_path" in entry}
            found |= entries & set(_CLASSES) - seen
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
    _ParseOnly(command, ["--config", dump_yaml(config)])


def _no_checkpoint(path: Any, error: Exception) -> FileFormatError:
    reason = f"{type(error).__name__}: {str(error).strip().partition('. ')[0]}".splitlines()[:2]
    way_out = "Remove it to start anew" if "hpc_ckpt_" in str(path) else "Give another"
    return FileFormatError(f"{path}: expected a checkpoint of such a run, got {' '.join(reason)}. {way_out}.")


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
