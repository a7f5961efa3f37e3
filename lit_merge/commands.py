"""What runs each of the commands, with the configuration and the overrides that a user gave."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile

from lit_merge.command_parser import CommandParser

__all__ = ["run_command"]

_FUNCTIONS = {
    "merge": ("lit_merge.merging", "merge"),
    "soup": ("lit_merge.soup", "soup"),
    "statistics": ("lit_merge.statistics.command", "statistics"),
    "suite": ("lit_merge.suite", "suite"),
    "data": ("lit_merge.data", "contact_sheet"),
}


def run_command(command: str, arguments: Sequence[str], description: str = "") -> Any:
    """Run a command in this process.

    Args:
        command: ``fit``, ``validate``, ``test``, ``predict``, ``merge``, ``suite`` or ``data``.
        arguments: what follows it on the command line.
        description: for its help.

    Returns:
        What the command returns: for Lightning's, the CLI object with its trainer, model and data.

    Raises:
        SystemExit: help was asked for, or the parser has said on the standard error what is wrong.
        LitMergeError: the command refuses its input.
    """
    if command not in _FUNCTIONS:
        from lit_merge.lightning_cli import LitMergeCLI

        return LitMergeCLI(command, arguments)
    module, name = _FUNCTIONS[command]
    function = getattr(import_module(module), name)
    parser = CommandParser(prog=f"lit-merge {command}", description=description, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path of a YAML or JSON configuration file.")
    parser.add_function_arguments(function, as_group=False)
    config = parser.parse_args(arguments)
    resolved = parser.dump(config, skip_none=False)
    settings = parser.instantiate_classes(config)
    settings.pop("config", None)
    result = function(**settings.as_dict())
    if command == "merge" and not result.written:
        sys.stdout.write(f"{result.plan}\n")
    elif command == "merge":
        from lit_merge.callbacks.writing import write_text
        from lit_merge.merging import beside

        write_text(beside(result.output, "merge.yaml"), resolved)
        found = f", {result.search.describe()}" if result.search else ""
        sys.stdout.write(f"{result.transform!r}{found} -> {result.output}\n")
    elif command == "soup":
        sys.stdout.write(f"{result.describe()}\n")
    elif isinstance(result, Path):
        sys.stdout.write(f"{result}\n")
    return result
