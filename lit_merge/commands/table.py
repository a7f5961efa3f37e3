"""The table of commands is this folder, one file per command, which is read without importing it, for ``--help`` too.

A file ``merge.py`` with a function ``merge`` is the command ``merge`` (``import_.py`` is ``import``, a folder's
``data/list_.py`` is ``data list``). Its docstring is what ``lit-merge merge --help`` shows first; the function may be
imported from elsewhere. ``POSITIONAL``, a tuple in the file, names the arguments that need no ``--name``. A function of
``*arguments`` gets the command line as it is.
"""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lit_merge._version import __version__

__all__ = ["Command", "command_screen", "commands", "group_screen", "groups", "overview"]

_FOLDER = Path(__file__).parent
_PACKAGE = __package__.partition(".")[0]
_GENERAL = {
    "--config FILE": "YAML or JSON with settings; those given after it win",
    "--print_config": "print the settings as YAML and do nothing else",
    "--help_all": "every setting with its type, nested ones included",
}


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as it is typed, e.g. ``data list``.
        module: import path of its file.
        file: the file.
    """

    name: str
    module: str
    file: Path

    @cached_property
    def _tree(self) -> ast.Module:
        return _parsed(self.file)

    @property
    def docstring(self) -> str:
        """Of the file: what the command does in one line, then examples."""
        return ast.get_docstring(self._tree) or ""

    @property
    def summary(self) -> str:
        """What it does."""
        return self.docstring.partition("\n")[0].rstrip(".")

    @property
    def positional(self) -> tuple[str, ...]:
        """Arguments that need no ``--name``."""
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "POSITIONAL":
                return tuple(ast.literal_eval(node.value))
        return ()

    @cached_property
    def definition(self) -> ast.FunctionDef | None:
        """The function's definition, wherever it is imported from; None if this file is no command."""
        return _definition(self._tree, self.file.stem)

    @property
    def takes_command_line(self) -> bool:
        """Whether the function parses its arguments itself."""
        return self.definition is not None and self.definition.args.vararg is not None

    def load(self) -> ModuleType:
        """Import its file."""
        return import_module(self.module)


@cache
def commands() -> dict[str, Command]:
    """Name -> command: those that train and evaluate first, then by the alphabet."""
    found = [one for file in sorted(_FOLDER.rglob("*.py")) if (one := _command(file)) is not None]
    return {one.name: one for one in sorted(found, key=lambda one: (not one.takes_command_line, one.name))}


@cache
def groups() -> dict[str, str]:
    """Folders of commands, such as ``data``, each with what it is about."""
    names = dict.fromkeys(name.partition(" ")[0] for name in commands() if " " in name)
    return {
        name: (ast.get_docstring(_parsed(_FOLDER / name / "__init__.py")) or "").partition("\n")[0].rstrip(".")
        for name in names
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
    if not command.takes_command_line:
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


def _command(file: Path) -> Command | None:
    parts = file.relative_to(_FOLDER).with_suffix("").parts
    if file.stem in ("__init__", "main"):  # main.py is the program
        return None
    one = Command(" ".join(part.rstrip("_") for part in parts), ".".join((str(__package__), *parts)), file)
    return one if one.definition is not None else None


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Name):
            return _definition(tree, node.value.id)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{_PACKAGE}."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    path = _FOLDER.parents[1].joinpath(*str(node.module).split("."))
                    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                    return _definition(_parsed(file), alias.name)
    return None
