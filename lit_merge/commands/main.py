"""The ``lit-merge`` command: what is asked for, and how it ends."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.commands.running import run_command
from lit_merge.commands.table import overview
from lit_merge.errors import ConfigurationError, EndRequested, LitMergeError, one_line

__all__ = ["main", "process", "run"]


def process() -> int:
    """:func:`main` as the program of a process, which ends with it.

    What a command imports are 200,000 objects and more that stay. Python's garbage collector would go through them
    again and again while they are made, at every full collection of a training, and several times at the end.
    """
    gc.disable()  # until a command has imported what it needs
    try:
        return main()
    finally:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every refusal is one line on the standard error.

    Args:
        arguments: without the program's name; by default ``sys.argv[1:]``.

    Returns:
        0 for success, 1 for a failure, 2 for a wrong command line or configuration, 130 after an interruption, 143
        where the process was asked to end.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parent = os.getppid()
    if "LIT_MERGE_LIFELINE" in os.environ:  # a suite has started this process
        from lit_merge.suite.engines.lifeline import follow_lifeline

        follow_lifeline()
    if str(Path.cwd()) not in sys.path:  # the user's own modules are found wherever the command itself is installed
        sys.path.append(str(Path.cwd()))
    try:
        run(arguments)
    except KeyboardInterrupt as request:
        if _is_first():
            said = str(request.args[0]) if request.args else ""
            sys.stderr.write(f"lit-merge: interrupted{_going_on(arguments, said)}\n")
        return 130
    except EndRequested as request:
        if _is_first():
            sys.stderr.write(f"lit-merge: asked to end (SIGTERM){_going_on(arguments, request.going_on)}\n")
        return EndRequested.status
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
        line = one_line(refusal)
        sys.stderr.write(f"lit-merge: error: {line}{'' if line.endswith('?') else '.'}\n")
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
        return sys.stdout.write(overview())
    if arguments[0] in ("-V", "--version"):
        return sys.stdout.write(f"lit-merge {__version__}\n")
    return run_command(arguments[0], arguments[1:])


def _going_on(arguments: Sequence[str], said: str) -> str:
    if arguments[:1] in (["suite"], ["analyze"]):
        said = "run the same command again to go on"
    return f"; {said}" if said else ""


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
    by_name = ("MisconfigurationException", "OutOfMemoryError")  # whose packages may not be imported
    while error is not None and not isinstance(error, (LitMergeError, OSError, ImportError)):
        if type(error).__name__ in by_name:
            break
        error = error.__cause__
    return error


if __name__ == "__main__":
    sys.exit(process())
