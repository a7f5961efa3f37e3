"""Argument parsing with one-line errors that name the nearest valid settings and classes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["CommandParser", "LightningCommandParser", "nearest"]

_DONE = "\x1f"  # on both sides of what a class's own parser has said already
_SAID = re.compile(rf"(?:class_path '(?P<path>[\w.]+)':\s*)?{_DONE}(?P<line>[^{_DONE}]*){_DONE}")
_KEY = re.compile(r"Parser key \"(?P<key>[\w.]+)\":")
_SETTING = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option '|unrecognized arguments: --|[Oo]ption ')(?P<name>[\w.]+)"
)
_CLASS = re.compile(
    r"Expected a dot import path string: (?P<short>\w+)|class_path '(?P<path>[\w.]+)':\s+(?:module '|No module named)"
)
_NESTED = re.compile(r"NestedArg\(key='(?P<name>[\w.]+)', val='(?P<value>.*)'\)")
_VALUE = re.compile(r"Expected an? (?P<types>.+)\. Got value: (?P<value>.+)", re.DOTALL)
_UNION = re.compile(r"Subtypes: \[(?P<types>.+?)\]\n.*Given value: (?P<value>.+)", re.DOTALL)
_FEW = 8


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names that are most like ``name``, as a whole or in what follows the last dot; perhaps none."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        endings = name.rpartition(".")[2].lower(), candidate.rpartition(".")[2].lower()
        return max(whole, 0.95 * SequenceMatcher(None, *endings).ratio())

    scores = {candidate: likeness(candidate) for candidate in known}
    best = max(scores.values(), default=0.0)
    alike = [candidate for candidate in scores if scores[candidate] >= max(0.6, best - 0.1)]
    return sorted(alike, key=lambda candidate: -scores[candidate])[:limit]


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    if near := nearest(name, known):
        return f" Did you mean {' or '.join(near)}?"
    return f" Known: {', '.join(known)}." if 0 < len(known) <= _FEW else ""


class _NearestNames:
    """Turns a parser's error into one line with the nearest valid names."""

    _actions: list[argparse.Action]
    exit_on_error: bool
    prog: str

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        commands = [
            one for action in self._actions if isinstance(action.choices, dict) for one in action.choices.values()
        ]
        parser = getattr(ex, "subcommand_parser", commands[0] if commands else self)
        line = self._explain(message, parser)
        if not self.exit_on_error:  # the parser of a class's arguments: the command's parser has the last word
            raise argparse.ArgumentError(None, f"{_DONE}{line}{_DONE}") from ex
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: error: {line} See {program} --help.\n")
        raise SystemExit(2)

    def _apply_actions(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown keys without content, such as ``serch: {}``, which would get lost on the way."""
        settings = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        branches = [] if args or kwargs.get("parent_key") else list(dict(cfg).items())
        for key, value in branches:
            is_group = any(setting.startswith(f"{key}.") for setting in settings)
            if isinstance(value, (dict, Namespace)) and (is_group or key not in settings):
                if not value and not is_group:
                    self.error(f"Option '{key}' is not accepted")
                branches += [(f"{key}.{inner}", content) for inner, content in dict(value).items()]
        return super()._apply_actions(cfg, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _explain(message: str, parser: _NearestNames) -> str:
        key = match["key"] if (match := _KEY.search(message)) else ""
        where = f"{key}: " if key else ""
        if said := list(_SAID.finditer(message)):
            match = next((one for one in said if "Did you mean" in one["line"]), said[0])
            owner = f"{match['path'].rpartition('.')[2]}: " if match["path"] else ""
            return f"{where}{owner}{match['line']}"
        if match := _SETTING.search(message):
            name = f"{match['group']}.{match['name']}" if match["group"] else match["name"]
            return f"expected a setting, got {name!r}, which there is not.{_hint(name, parser._keys())}"
        if match := _NESTED.search(message):
            return (
                f"{where}expected a setting, got {match['name']!r}, which there is not, or not without others. "
                "Check its name, or give its entry as a whole."
            )
        if match := _CLASS.search(message):
            name = match["short"] or match["path"]
            known = _classes(name)
            if name in known:
                return f"{where}expected a class that fits, got {name!r}, which is of another kind. Choose another."
            return f"{where}expected a class, got {name!r}, which there is not.{_hint(name, known)}"
        if match := _UNION.search(message) or _VALUE.search(message):
            types = re.sub(r"<class '(?:\w+\.)*(\w+)'>|\b(?:\w+\.)+(?=\w)", r"\1", match["types"])
            types = types.replace("NoneType", "null")
            return f"{where}expected {types}, got {_one_line(match['value'])!r}."
        return _one_line(message).rstrip(".") + "."

    def _keys(self) -> list[str]:
        """Settings, and those of the default classes of model and data."""
        actions = [action for action in self._actions if not action.dest.endswith(("help", argparse.SUPPRESS))]
        keys = [action.dest for action in actions]
        for action in actions:
            path = action.default.get("class_path") if hasattr(action.default, "get") else None
            keys += [f"{action.dest}.{name}" for name in inspect.signature(_imported(path)).parameters] if path else []
        return keys


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]} …"


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _classes(name: str) -> list[str]:
    """Classes that ``name`` may mean: of its module, or those that need no module's name."""
    from lightning.pytorch import callbacks as lightning_callbacks
    from lightning.pytorch import loggers, strategies

    from lit_merge import callbacks, data, modules, transforms

    module = name.rpartition(".")[0]
    rooms = [modules, data, callbacks, transforms, lightning_callbacks, loggers, strategies]
    if module:
        try:
            rooms = [importlib.import_module(module)]
        except ImportError:
            module = ""
    listed = {}
    for room in rooms:
        for one in getattr(room, "__all__", dir(room)):
            if inspect.isclass(getattr(room, one, None)):
                listed[one] = f"{room.__name__}.{one}" if "." in name else one
    return list(listed.values())


class CommandParser(_NearestNames, ArgumentParser):
    """The parser of ``merge``, ``suite`` and ``data``."""


class LightningCommandParser(_NearestNames, LightningArgumentParser):
    """The parser of ``fit``, ``validate``, ``test`` and ``predict``."""
