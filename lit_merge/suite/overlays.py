"""Parts of a suite's configuration in files of their own, shared by several suites, and single settings of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_merge.errors import ConfigurationError
from lit_merge.files.yaml_text import SafeLoader, dump_yaml, load_yaml
from lit_merge.suite.settings import combine

__all__ = ["with_parts"]

_PARTS = ("data", "fit", "joint", "network", "recipes", "sources", "test")


class _Loader(SafeLoader):
    """YAML as the command line's parser reads it: ``1e-3`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def with_parts(arguments: Sequence[str]) -> list[str]:
    """A suite's command line with its parts (``fit``, ``test``, ``recipes``, …) given once, each as a whole.

    Each of these parts may be a YAML file, or a list of such files and of settings, later ones over earlier ones. In a
    configuration file their paths are relative to it. A part that is given later replaces an earlier one;
    ``--fit.trainer.max_steps 3`` changes one setting and leaves the others. A recipe may be a method's name, a list of
    parts or a transform by class path instead of a mapping of what :class:`~lit_merge.suite.recipe.Recipe` takes.

    Args:
        arguments: what follows ``suite``.

    Raises:
        ConfigurationError: a file is missing, or is no YAML mapping.
    """
    others: list[str] = []
    parts: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        option, equals, value = arguments[position].partition("=")
        name = option.removeprefix("--")
        follows = not equals and position + 1 < len(arguments)
        value = arguments[position + 1] if follows else value
        if option in ("-c", "--config") and (content := _configuration(value)) is not None:
            folder = Path(value).parent if Path(value).is_file() else Path()
            for key in [key for key in content if _part_of(key)]:
                _assign(parts, key, content.pop(key), folder)
            others += [option, dump_yaml(content)]
        elif option.startswith("--") and _part_of(name) and (equals or follows):
            _assign(parts, name, _loaded(value), Path())
        else:
            others.append(arguments[position])
            follows = False
        position += 1 + follows
    if isinstance(recipes := parts.get("recipes"), dict):
        parts["recipes"] = {name: _recipe(one) for name, one in recipes.items()}
    return [*(f"--{name}={json.dumps(part)}" for name, part in parts.items()), *others]


def _part_of(key: object) -> bool:
    return str(key).partition(".")[0] in _PARTS


def _configuration(path: str) -> dict[str, Any] | None:
    """A configuration, from a file or as it is; None if the parser is to refuse it."""
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8") if Path(path).is_file() else path, _Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) and any(map(_part_of, content)) else None


def _assign(parts: dict[str, Any], key: str, value: Any, folder: Path) -> None:
    """Set a part, or one of its settings, whose path has dots."""
    name, *path = key.split(".")
    if not path:
        parts[name] = _whole(name, value, folder)
        return
    for step in reversed(path):
        value = {step: value}
    known = parts.get(name)
    parts[name] = combine(known if isinstance(known, dict) else {}, value)


def _whole(name: str, value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return combine(*(_read(name, one, folder) for one in value))
    return _read(name, value, folder) if isinstance(value, str) else value


def _read(name: str, value: Any, folder: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    path = folder / str(value)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "no YAML"
        raise ConfigurationError(
            f"{name}: expected settings or a YAML file of them, got {path} ({reason}). Check the path."
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{name}: expected a YAML file of settings, got {path}, which holds {type(content).__name__}. Name another."
        )
    return content


def _recipe(value: Any) -> Any:
    if isinstance(value, str | list):
        return {"recipe" if isinstance(value, str) else "parts": value}
    return {"transform": value} if isinstance(value, dict) and "class_path" in value else value


def _loaded(value: str) -> Any:
    try:
        return load_yaml(value, _Loader)
    except yaml.YAMLError:
        return value
