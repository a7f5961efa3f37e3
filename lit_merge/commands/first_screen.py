"""What ``--help`` shows: what a command does, examples, a line per setting; read without importing the command."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator

from lit_merge._version import __version__
from lit_merge.commands.table import Command, commands, groups

__all__ = ["command_screen", "group_screen", "overview"]

_GENERAL = {
    "--config FILE": "YAML or JSON with settings; those given after it win",
    "--print_config": "print the settings as YAML and do nothing else",
    "--help_all": "every setting with its type, nested ones included",
}


def overview() -> str:
    """All commands, a line each."""
    listed = {name: one.summary for name, one in commands().items() if " " not in name} | groups()
    return "\n".join(
        [
            f"lit-merge {__version__}: models are fine-tuned to be merged, and merged.",
            "",
            *_columns({f"lit-merge {name}": text for name, text in listed.items()}),
            "",
            "Each has --help, --config FILE and --print_config. The main job, on the embedded suite:",
            "  lit-merge suite --config configs/suite/quickstart.yaml",
            "",
        ]
    )


def group_screen(group: str) -> str:
    """The commands of a folder, such as ``data``."""
    listed = {f"lit-merge {name}": one.summary for name, one in commands().items() if name.startswith(f"{group} ")}
    return "\n".join([f"{groups()[group]}.", "", *_columns(listed), "", "Each has --help.", ""])


def command_screen(command: Command) -> str:
    """What it does, examples, and the settings, each with the start of what its docstring says."""
    parts = [*map(str.upper, command.positional)]
    usage = " ".join(["usage: lit-merge", command.name, *parts, "[--config FILE] [--SETTING VALUE ...]"])
    lines = [usage, "", command.docstring, ""]
    if not command.takes_command_line and command.definition is not None:
        lines += ["Settings (* is required):", *_columns(dict(_settings(command))), ""]
    return "\n".join([*lines, *_columns(_GENERAL), ""])


def _settings(command: Command) -> Iterator[tuple[str, str]]:
    definition = command.definition
    assert definition is not None
    texts = _arguments(ast.get_docstring(definition) or "")
    arguments = definition.args.args
    defaults = [None] * (len(arguments) - len(definition.args.defaults)) + [*definition.args.defaults]
    for argument, default in zip(arguments, defaults, strict=True):
        name = argument.arg
        shown = ast.unparse(default).strip("'\"") if default is not None else ""
        value = {"False": " true", "True": " false"}.get(shown, "")
        label = name.upper() if name in command.positional else f"--{name}{value}"
        ending = [" | ".join(choices)] if (choices := _choices(argument.annotation)) else []
        ending += [f"default {shown}"] if shown not in ("", "None", "False", "True") else []
        text = re.split(r"[.;:](?: |$)|, e\.g\.", texts.get(name, ""), maxsplit=1)[0]
        yield f"{label}{' *' if default is None else ''}", text + (f" [{'; '.join(ending)}]" if ending else "")


def _arguments(docstring: str) -> dict[str, str]:
    """Name -> text of the ``Args:`` of a Google docstring."""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)+)", f"{docstring}\n", re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


def _choices(annotation: ast.expr | None) -> list[str]:
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return [ast.unparse(one).strip("'") for one in values]
    return []


def _columns(rows: dict[str, str]) -> list[str]:
    """Names and texts next to each other, within the terminal's width."""
    wide = max(map(len, rows), default=0)
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    lines = []
    for name, text in rows.items():
        first = f"  {name:<{wide}}  "
        lines.append(textwrap.fill(text or "…", width, initial_indent=first, subsequent_indent=" " * len(first)))
    return lines
