"""The ``lit-merge`` command: Lightning's ``fit | validate | test | predict``, and ``merge | suite | data``."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError, LitMergeError

__all__ = ["main", "run"]

_LIGHTNING = ("fit", "validate", "test", "predict")
_COMMANDS = {
    "fit": "fine-tune a model on a task (or pre-train); writes its task vector",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "write class names and probabilities for images",
    "merge": "merge task vectors into one model",
    "suite": "fine-tune every task, merge, evaluate, report: the whole experiment",
    "data": "draw a contact sheet of the embedded suite",
}
_OUTPUTS = {
    "fit": ("task_vector*.safetensors", "metrics.csv", "checkpoints"),
    "validate": ("validate_metrics.json",),
    "test": ("test_metrics.json",),
    "predict": ("predictions.csv",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every refusal is one line on the standard error.

    Args:
        arguments: without the program's name; by default ``sys.argv[1:]``.

    Returns:
        0 for success, 1 for a refusal or failure, 2 for a wrong command line, 130 after an interruption.
    """
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.stderr.write("lit-merge: interrupted; run the same command again to go on or start over\n")
        return 130
    except SystemExit as request:  # from the argument parsers: --help, --print_config, a usage error
        return request.code if isinstance(request.code, int) else (0 if request.code is None else 1)
    except Exception as error:
        message = _one_line(error)
        if message is None:
            raise
        sys.stderr.write(f"lit-merge: error: {message}\n")
        return 1
    return 0


def run(arguments: Sequence[str]) -> Any:
    """Run a command line in this process and return what the command returns.

    Raises:
        ConfigurationError: there is no such command.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return sys.stdout.write(_overview())
    if arguments[0] in ("-V", "--version"):
        return sys.stdout.write(f"lit-merge {__version__}\n")
    command, rest = arguments[0], arguments[1:]
    if command in _LIGHTNING:
        return run_lightning(command, rest)
    if command in _COMMANDS:
        return _run_function(command, rest)
    near = difflib.get_close_matches(command, _COMMANDS, 1)
    raise ConfigurationError(
        f"command: expected one of {', '.join(_COMMANDS)}, got {command!r}. "
        f"{f'Did you mean {near[0]}?' if near else 'See lit-merge --help.'}"
    )


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  lit-merge {name:<{width}}  {text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        [
            f"lit-merge {__version__}: models are fine-tuned to be merged, and merged.",
            "",
            *lines,
            "",
            "Each has --help, --config FILE and --print_config. The main job, on the embedded suite:",
            "  lit-merge suite --config configs/suite/quickstart.yaml",
            "",
        ]
    )


def _one_line(error: Exception) -> str | None:
    """A refusal's message as one line, or None for an error that is a bug and needs its traceback."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if not isinstance(error, (LitMergeError, MisconfigurationException)):
        return None
    text = str(error).strip()
    # Errors from a data loader's worker process come as a traceback whose last line is the message.
    last = re.sub(r"^[\w.]*(Error|Exception): ", "", text.splitlines()[-1]) if "Traceback" in text else text
    return " ".join(last.split())


def _run_function(command: str, arguments: list[str]) -> Any:
    from jsonargparse import ActionConfigFile

    parser_class = _parser_class()
    parser = parser_class(prog=f"lit-merge {command}", description=f"lit-merge {command}: {_COMMANDS[command]}")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path of a YAML or JSON configuration file.")
    function = _functions()[command]
    parser.add_function_arguments(function, as_group=False)
    config = parser.parse_args(arguments)
    resolved = parser.dump(config, skip_none=False)
    settings = parser.instantiate_classes(config)
    settings.pop("config", None)
    if command == "merge":
        from lit_merge.callbacks.writing import write_text

        result = function(**settings.as_dict())
        write_text(result.output.with_suffix(".yaml"), resolved)
        found = f", {result.search.field} {result.search.best:g} chosen on validation data" if result.search else ""
        sys.stdout.write(f"{result.transform!r}{found} -> {result.output}\n")
        return result
    return function(**settings.as_dict())


def _functions() -> dict[str, Callable[..., Any]]:
    from lit_merge.data import contact_sheet
    from lit_merge.merging import merge
    from lit_merge.suite import suite

    return {"merge": merge, "suite": suite, "data": contact_sheet}


def _parser_class() -> type[Any]:
    from lit_merge.command_parser import CommandParser

    return CommandParser


def run_lightning(command: str, arguments: list[str]) -> Any:
    """Run one of Lightning's commands; returns the CLI object with its trainer, model and data."""
    from lit_merge.lightning_cli import LitMergeCLI

    return LitMergeCLI(command, arguments)


def run_directory(command: str, output: str | None) -> Path:
    """The directory of a run: ``output``, or ``runs/<command>/<time>``, the same for every process of a job."""
    if output is not None:
        return Path(output)
    variables = ("LIT_MERGE_RUN_NAME", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
    given = [os.environ[name] for name in variables if os.environ.get(name) not in (None, "", "none")]
    name = given[0] if given else datetime.now().strftime("%Y%m%d-%H%M%S")
    os.environ["LIT_MERGE_RUN_NAME"] = name  # processes that Lightning starts for other devices inherit it
    return Path("runs") / command / name


def prepare_run_directory(directory: Path, command: str, overwrite: bool, resumed: bool) -> None:
    """Refuse a directory that holds such a run already, or clear that run's files if that was asked for.

    Raises:
        ConfigurationError: the directory holds a run of this command, or cannot be created.
    """
    config = directory / f"{command}.yaml"
    if config.exists() and not overwrite and not resumed:
        raise ConfigurationError(
            f"output: expected a new run directory, got {directory}, which holds a run already ({config.name}). "
            "Choose another --output, or add --overwrite true."
        )
    if config.exists() and not resumed:
        for pattern in (config.name, *_OUTPUTS[command]):
            for path in directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"output: expected a folder that can be created, got {directory} ({error.strerror}).") from error


if __name__ == "__main__":
    sys.exit(main())
