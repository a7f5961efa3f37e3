"""What runs each of the commands, with the configuration and the overrides that a user gave."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile

from lit_merge.commands.parsing import CommandParser, nearest
from lit_merge.errors import ConfigurationError

__all__ = ["run_command"]

_FUNCTIONS = {
    "import": ("lit_merge.commands.import_", "import_checkpoints"),
    "merge": ("lit_merge.commands.merge", "merge"),
    "soup": ("lit_merge.commands.soup", "soup"),
    "statistics": ("lit_merge.evaluation.statistics.command", "statistics"),
    "suite": ("lit_merge.commands.suite", "suite"),
    "analyze": ("lit_merge.evaluation.analysis.command", "analyze"),
    "report": ("lit_merge.report.page", "report"),
    "inspect": ("lit_merge.commands.inspect", "inspect"),
    "push": ("lit_merge.commands.push", "push"),
    "pull": ("lit_merge.commands.pull", "pull"),
    "data list": ("lit_merge.data.published.checking", "list_data"),
    "data check": ("lit_merge.data.published.checking", "check"),
    "data prepare": ("lit_merge.data.published.preparation", "prepare"),
    "data sheet": ("lit_merge.data", "contact_sheet"),
}
_POSITIONAL = frozenset({"inspect", "push", "pull"})  # commands whose required arguments need no --name
_NAMED = frozenset({"data list", "data check", "data prepare"})  # commands that take any number of names
_OF_DATA = {
    "list": "show the published data sets that can be tasks",
    "check": "say which of them are on the disk, and whether they are complete",
    "prepare": "download some of them, through torchvision or from the Hugging Face Hub",
    "sheet": "draw a contact sheet of the embedded suite",
}


def run_command(command: str, arguments: Sequence[str], description: str = "") -> Any:
    """Run a command in this process.

    Args:
        command: as ``lit-merge --help`` lists them, e.g. ``fit``, ``merge`` or ``data``.
        arguments: what follows it on the command line.
        description: for its help.

    Returns:
        What the command returns: for Lightning's, the CLI object with its trainer, model and data.

    Raises:
        SystemExit: help was asked for, or the parser has said on the standard error what is wrong.
        LitMergeError: the command refuses its input.
    """
    if command == "data":
        command, arguments, description = _of_data(arguments)
        if not description:
            return sys.stdout.write(_data_overview())
    if command not in _FUNCTIONS:
        from lit_merge.commands.training.lightning_cli import LitMergeCLI

        return LitMergeCLI(command, arguments)
    module, name = _FUNCTIONS[command]
    function = getattr(import_module(module), name)
    parser = CommandParser(prog=f"lit-merge {command}", description=description, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path of a YAML or JSON configuration file.")
    names: set[int | str] = {"names"} if command in _NAMED else set()
    if names:
        parser.add_argument("names", nargs="*", type=str, help="data sets or suites, e.g. mnist or clip8")
    parser.add_function_arguments(function, as_group=False, as_positional=command in _POSITIONAL, skip=names)
    if command == "suite":
        from lit_merge.suite.overlays import with_parts

        arguments = with_parts(arguments)
    config = parser.parse_args(arguments)
    resolved = parser.dump(config, skip_none=False)
    settings = parser.instantiate_classes(config)
    settings.pop("config", None)
    result = function(**settings.as_dict())
    if command == "merge" and not result.written:
        sys.stdout.write(f"{result.plan}\n")
    elif command == "merge":
        from lit_merge.commands.merge import beside
        from lit_merge.files.text import write_text

        write_text(beside(result.output, "merge.yaml"), resolved)
        found = f", {result.search.describe()}" if result.search else ""
        sys.stdout.write(f"{result.transform!r}{found} -> {result.output}\n")
    elif command in ("soup", "push", "import"):
        sys.stdout.write(f"{result.describe()}\n")
    elif command == "data check":
        sys.stdout.write(f"{result.describe()}\n")
        result.refuse()
    elif isinstance(result, Path) or command == "data list":
        sys.stdout.write(f"{result}\n")
    return result


def _of_data(arguments: Sequence[str]) -> tuple[str, Sequence[str], str]:
    """``data``'s own command, what follows it, and its description, which is empty if help was asked for."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return "data", (), ""
    if arguments[0] not in _OF_DATA:
        near = nearest(arguments[0], _OF_DATA, 1)
        raise ConfigurationError(
            f"data: expected one of {', '.join(_OF_DATA)}, got {arguments[0]!r}. "
            f"{f'Did you mean {near[0]}?' if near else 'See lit-merge data --help.'}"
        )
    return f"data {arguments[0]}", arguments[1:], _OF_DATA[arguments[0]]


def _data_overview() -> str:
    lines = [f"  lit-merge data {name:<8} {text}" for name, text in _OF_DATA.items()]
    return "\n".join(
        ["The data sets of the literature, and the embedded suite:", "", *lines, "", "Each has --help.", ""]
    )
