"""The ``lit-merge`` command: what is asked for, and how it ends."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.suite.engines.lifeline import follow_lifeline

__all__ = ["main", "run"]

_COMMANDS = {
    "fit": "fine-tune a model on a task (or pre-train); writes its task vector",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "write class names and probabilities for images",
    "import": "make task vectors of checkpoints that other programs wrote, or convert one",
    "merge": "merge task vectors into one model",
    "soup": "average the models that do not lower the average's validation accuracy",
    "statistics": "collect what Fisher merging and RegMean need of a task",
    "suite": "fine-tune every task, merge, evaluate, report: the whole experiment",
    "analyze": "measure and draw task vectors, alone and merged",
    "report": "write a suite's results as one HTML page",
    "inspect": "say what a file of vectors, weights or coefficients holds",
    "push": "put vectors, models or coefficients on the Hugging Face Hub",
    "pull": "copy them from it",
    "data": "list, check and prepare published data sets; draw a sheet of the embedded suite",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every refusal is one line on the standard error.

    Args:
        arguments: without the program's name; by default ``sys.argv[1:]``.

    Returns:
        0 for success, 1 for a failure, 2 for a wrong command line or configuration, 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parent = os.getppid()
    follow_lifeline()
    if str(Path.cwd()) not in sys.path:  # the user's own modules are found wherever the command itself is installed
        sys.path.append(str(Path.cwd()))
    try:
        run(arguments)
    except KeyboardInterrupt:
        if _is_first():
            on = "; run the same command again to go on" if arguments[:1] in (["suite"], ["analyze"]) else ""
            sys.stderr.write(f"lit-merge: interrupted{on}\n")
        return 130
    except SystemExit as request:  # from the argument parsers: --help, --print_config, a usage error
        return request.code if isinstance(request.code, int) else (0 if request.code is None else 1)
    except Exception as error:
        if _has_ended(parent):
            return 1
        refusal = _refusal(error)
        if refusal is None and re.search("Connection (closed|reset) by peer", str(error)):
            refusal = LitMergeError("another process of this job has ended; what it said, if anything, is above.")
        if refusal is None:
            raise
        sys.stderr.write(f"lit-merge: error: {_one_line(refusal)}\n")
        return 2 if isinstance(refusal, ConfigurationError) else 1
    return 0


def run(arguments: Sequence[str]) -> Any:
    """Run a command line in this process; what is wrong with it is raised.

    Returns:
        What the command returns, e.g. a suite's results.

    Raises:
        LitMergeError: there is no such command, or it refuses its input.
        SystemExit: the parser has said on the standard error what is wrong, or help was asked for.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return sys.stdout.write(_overview())
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        return sys.stdout.write(f"lit-merge {__version__}\n")
    if command in _COMMANDS:
        from lit_merge.commands.running import run_command

        return run_command(command, rest, _COMMANDS[command])
    from lit_merge.commands.parsing import nearest

    near = nearest(command, _COMMANDS, 1)
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


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _has_ended(parent: int, patience: float = 5.0) -> bool:
    """Whether the process that started this one for another device ends as well: it has said why, or this one does."""
    waited_until = time.monotonic() + patience
    while not _is_first() and os.getppid() == parent and time.monotonic() < waited_until:
        time.sleep(0.1)
    return not _is_first() and os.getppid() != parent


def _refusal(error: BaseException | None) -> BaseException | None:
    """The error among this one and its causes that is meant for the user, or None: a bug needs its traceback."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    meant = (LitMergeError, MisconfigurationException, OSError, ImportError)
    while error is not None and not isinstance(error, meant) and type(error).__name__ != "OutOfMemoryError":
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    # Errors from a data loader's worker process come as a traceback whose last line is the message.
    last = re.sub(r"^[\w.]*(Error|Exception): ", "", text.splitlines()[-1]) if "Traceback" in text else text
    return " ".join(last.split())


if __name__ == "__main__":
    sys.exit(main())
