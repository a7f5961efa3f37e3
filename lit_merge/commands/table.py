"""The table of commands is this folder: one file per command, read without importing it.

A file ``merge.py`` with a function ``merge`` is the command ``merge`` (``import_.py`` is ``import``, a folder's
``data/list_.py`` is ``data list``). Its docstring is what ``lit-merge merge --help`` shows first; the function may be
imported from elsewhere. ``POSITIONAL``, a tuple in the file, names the arguments that need no ``--name``. A function of
``*arguments`` gets the command line as it is.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = ["Command", "commands", "groups"]

_FOLDER = Path(__file__).parent
_PACKAGE = __package__.partition(".")[0]


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
