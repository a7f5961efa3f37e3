"""Argument parsing with one-line errors that name the nearest valid settings and classes."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_dumper, set_loader

from lit_merge.errors import ConfigurationError, did_you_mean, one_line
from lit_merge.files.yaml_text import check_yaml, dump_yaml, load_yaml, with_plain_keys

__all__ = ["CommandParser", "NearestNames", "configurations", "refuse_saved_permissions", "refuse_urls"]

_DONE = "\x1f"  # on both sides of what a class's own parser has said already
_SAID = re.compile(rf"(?:class_path '(?:\w+\.)*(\w+)':\s*)?{_DONE}([^{_DONE}]*){_DONE}")
_SETTING = re.compile(r"(?:Group '([\w.]+)' does not accept option '|unrecognized arguments: --|[Oo]ption ')([\w.]+)")
_CLASS = re.compile(r"(?:Expected a dot import path string: |class_path ')([\w.]+)(?:':\s+(?:module '|No module)|\n)")
_TYPE = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.(\w+\[.*?\])(?=\.|\n|$))")
_VALUE = re.compile(r"(?:Got|Given) value: (.+?)(?=\n\s*(?:- Expected|Given value)|\Z)", re.DOTALL)
_KIND = re.compile(r"<class '(lit_merge(?:\.\w+)+)\.\w+'>")
"""Of the classes that fit: their module has the others of their kind."""
_ON_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([\w.-]+/[\w.-]+)")
_FEW = 8


class NearestNames:
    """Turns a parser's error into one line with the nearest valid names.

    Attributes:
        left_out: settings of the command that this parser was not given.
        homes: modules whose classes need no module's name.
    """

    _actions: list[argparse.Action]
    exit_on_error: bool
    prog: str
    left_out: Sequence[str] = ()
    homes: tuple[str, ...] = ("lit_merge.transforms", "lit_merge.data")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say it on the standard error and exit with code 2."""
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
        branches = [] if args or kwargs.get("parent_key") else list(dict(cfg).items())
        settings = {action.dest for action in self._actions if not action.dest.endswith(".help")} if branches else set()
        groups = {setting[: dot.start()] for setting in settings for dot in re.finditer(r"\.", setting)}
        for key, value in branches:
            is_group = key in groups
            if isinstance(value, (dict, Namespace)) and (is_group or key not in settings):
                if not value and not is_group:
                    self.error(f"Option '{key}' is not accepted")
                branches += [(f"{key}.{inner}", content) for inner, content in dict(value).items()]
        return super()._apply_actions(cfg, *args, **kwargs)  # type: ignore[misc]

    def _explain(self, message: str, parser: NearestNames) -> str:
        where, _, rest = message.partition('":')
        where = f"{where.removeprefix('Parser key ').strip(chr(34))}: " if rest else ""
        if said := _SAID.findall(message):
            owner, line = next((one for one in said if "Did you mean" in one[1]), said[0])
            return f"{where}{owner}{': ' if owner else ''}{line}"
        if match := _SETTING.search(message):
            name = ".".join(filter(None, match.groups()))
            return f"expected a setting, got {name!r}, which there is not.{_hint(name, parser._keys())}"
        if match := _CLASS.search(message):
            known = _classes(match[1], (*self.homes, *dict.fromkeys(_KIND.findall(message))))
            if match[1] in known:
                return f"{where}expected a class that fits, got {match[1]!r}, which is of another kind."
            return f"{where}expected a class, got {match[1]!r}, which there is not.{_hint(match[1], known)}"
        types, value = dict.fromkeys(one or other for one, other in _TYPE.findall(message)), _VALUE.search(message)
        if types and value:
            got, listed = one_line(value[1], 300), any(one.lower().startswith(("list", "sequence")) for one in types)
            line = f"{where}expected {', '.join(types)}, got {got!r}.".replace("NoneType", "null")
            choices = re.findall(r"'([^']+)'", " ".join(one for one in types if one.startswith("Literal")))
            hint = did_you_mean(got, choices, "A list is written '[a, b]'." if listed else "")
            return f"{line} {hint}".rstrip()
        return f"{where}{one_line(rest or message, 300)}."

    def _keys(self) -> list[str]:
        """Settings, and those of the default classes of model and data."""
        actions = [action for action in self._actions if not action.dest.endswith(("help", argparse.SUPPRESS))]
        keys = [*(action.dest for action in actions), *self.left_out]
        for action in actions:
            path = action.default.get("class_path") if hasattr(action.default, "get") else None
            keys += [f"{action.dest}.{name}" for name in inspect.signature(_imported(path)).parameters] if path else []
        return keys


class CommandParser(NearestNames, ArgumentParser):
    """The parser of the commands that are functions."""


def configurations(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The content of every ``--config``, a file or YAML itself; what is wrong with the latter is for the parser to say.

    Raises:
        ConfigurationError: one is a URL, its aliases stand for too much, or a file holds no settings.
    """
    yield from (content for content, _ in _configured(arguments))


def refuse_saved_permissions(arguments: Sequence[str]) -> None:
    """Refuse ``overwrite: true`` in a file: who wrote it allowed that once, for another output.

    Raises:
        ConfigurationError: a file holds it.
    """
    for content, file in _configured(arguments):
        if file is not None and content.get("overwrite"):
            raise ConfigurationError(
                f"overwrite: expected on the command line only, got {file} with overwrite: true. Remove it from the "
                "file, and add --overwrite true if this output may be replaced."
            )


def refuse_urls(settings: Mapping[str, Any], owner: str = "") -> None:
    """Refuse addresses of the web where paths are expected.

    Args:
        settings: name -> value, of which texts, and those in lists and dictionaries, are looked at.
        owner: what goes before the names in the message.

    Raises:
        ConfigurationError: one of them is an address.
    """
    for name, value in settings.items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if urls := [one for one in values if isinstance(one, str) and re.fullmatch(r"https?://\S+", one)]:
            on_hub = _ON_HUB.match(urls[0])
            raise ConfigurationError(
                f"{owner}{name}: expected a path, or hf://owner/name/file on the Hugging Face Hub, got {urls[0]}: URLs "
                f"are not read. {f'Write hf://{on_hub[1]}' if on_hub else 'Download it first'}."
            )


def _configured(arguments: Sequence[str]) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """The content of every ``--config``, and the file that it comes from."""
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in ("-c", "--config"):
            continue
        value = value if equals else next(iter(arguments[position + 1 : position + 2]), "")
        refuse_urls({"config": value})
        file = None
        try:
            file = Path(value) if Path(value).is_file() else None
            text = file.read_text(encoding="utf-8") if file is not None else value
            check_yaml(text, str(file or "config"))
            content = load_yaml(with_plain_keys(text))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            if file is None:
                continue
            raise ConfigurationError(f"{file}: expected YAML in UTF-8, got {one_line(error)}. Correct it.") from error
        if isinstance(content, dict):
            yield content, file
        elif file is not None:
            got = "nothing" if content is None else f"a {type(content).__name__}"
            raise ConfigurationError(f"{file}: expected settings, a line each (output: runs/mine), got {got}.")


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    hint = did_you_mean(name, known, f"Known: {', '.join(known)}." if 0 < len(known) <= _FEW else "")
    return f" {hint}" if hint else ""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _classes(name: str, homes: Sequence[str]) -> list[str]:
    """Classes that ``name`` may mean: of its module, or those that need no module's name."""
    module = name.rpartition(".")[0]
    if module:
        try:
            importlib.import_module(module)
            homes = [module]
        except ImportError:
            pass
    listed = {}
    for home in map(importlib.import_module, homes):
        for one in getattr(home, "__all__", dir(home)):
            if inspect.isclass(getattr(home, one, None)):
                listed[one] = f"{home.__name__}.{one}" if "." in name else one
    return list(listed.values())


_load = get_loader("yaml")


def _load_limited(text: str) -> Any:
    if text.strip() == "None":  # null two classes deep, which the parser hands on as Python writes it
        return None
    check_yaml(text)
    return _load(with_plain_keys(text))


set_loader("yaml", _load_limited, exceptions=(yaml.YAMLError,))
set_dumper("yaml", functools.partial(dump_yaml, default_flow_style=False))
