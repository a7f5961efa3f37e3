"""Argument parsing with one-line errors that name the nearest valid keys and classes."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["CommandParser", "LightningCommandParser"]

_KEY_PATTERNS = (
    re.compile(r"[Kk]ey ['\"](?P<key>[\w.]+)['\"] is not expected"),
    re.compile(r"No action for key ['\"](?P<key>[\w.]+)['\"]"),
    re.compile(r"[Uu]nrecognized arguments?: --(?P<key>[\w.]+)"),
    re.compile(r"[Uu]nrecognized key ['\"]?(?P<key>[\w.]+)"),
    re.compile(r"Option ['\"](?P<key>[\w.]+)['\"] is not accepted"),
    re.compile(r"Group ['\"]?(?P<group>[\w.]+)['\"]? does not accept nested key ['\"](?P<key>[\w.]+)['\"]"),
    re.compile(r"does not accept (?:option|nested key|argument) ['\"](?P<key>[\w.]+)['\"]"),
)
_CLASS_PATTERNS = (
    re.compile(r"class_path ['\"](?P<name>[\w.]+)['\"]"),
    re.compile(r"(?:No subclass|Not a valid subclass|Import path)[^'\"]*['\"](?P<name>[\w.]+)['\"]"),
)


def classes() -> list[str]:
    """Class names that a configuration is most likely to mean."""
    from lit_merge import callbacks, data, modules, transforms

    return sorted({*callbacks.__all__, *data.__all__, *modules.__all__, *transforms.__all__})


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``Did you mean max_steps?``, or nothing if nothing is near."""
    by_ending: dict[str, str] = {}
    for candidate in known:
        by_ending.setdefault(candidate.rpartition(".")[2], candidate)
    matches = difflib.get_close_matches(name.rpartition(".")[2], by_ending, 3, 0.6)
    return f" Did you mean {' or '.join(by_ending[match] for match in matches)}?" if matches else ""


class _NearestNames:
    """Turns a parser's error into one line with the nearest valid names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        hint = ""
        for pattern in _KEY_PATTERNS:
            match = pattern.search(text)
            if match:
                hint = nearest(match["key"], self._known_keys(text))
                break
        if not hint:
            for pattern in _CLASS_PATTERNS:
                match = pattern.search(text)
                if match:
                    hint = nearest(match["name"], classes())
                    break
        program = getattr(self, "prog", "lit-merge")
        shown = text if len(text) < 400 else f"{text[:400]} …"
        sys.stderr.write(f"{program}: error: {shown}{hint} See --help.\n")
        raise SystemExit(2)

    def _known_keys(self, text: str) -> list[str]:
        import inspect

        actions = [action.dest for action in self._actions if action.dest != argparse.SUPPRESS]  # type: ignore[attr-defined]
        parameters = []
        for name in classes():
            if name in text:
                home = _find_class(name)
                parameters += list(inspect.signature(home).parameters) if home is not None else []
        return parameters + actions


def _find_class(name: str) -> Any:
    from lit_merge import callbacks, data, modules, transforms

    for room in (modules, data, callbacks, transforms):
        if name in room.__all__:
            return getattr(room, name)
    return None


class CommandParser(_NearestNames, ArgumentParser):
    """The parser of ``merge``, ``suite`` and ``data``."""


class LightningCommandParser(_NearestNames, LightningArgumentParser):
    """The parser of ``fit``, ``validate``, ``test`` and ``predict``."""
