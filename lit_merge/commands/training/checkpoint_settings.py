"""A checkpoint's settings against those that were given: nothing is overridden without a word."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_merge.commands.parsing import configurations
from lit_merge.errors import ConfigurationError

__all__ = ["given_settings", "reconciled"]

_STRUCTURE = (
    *("class_path", "model", "linearized", "lora", "trainable"),
    *("vectors", "granularity", "parts", "tasks", "classes"),
)
"""What decides which parameters there are, or what they mean."""
_STARTS = ("pretrained", "task_vector", "weights")  # files may have moved; the module compares what they hold


def given_settings(arguments: Sequence[str]) -> set[str]:
    """The module's settings that a command line and its files name; ``class_path`` is one of them."""
    found: set[str] = set()
    for argument in arguments:
        option = argument.partition("=")[0].removeprefix("--").split(".")
        if option[0] == "model":
            found.add(next(part for part in (*option[1:], "class_path") if part != "init_args"))
    for content in configurations(arguments):
        model = content.get("model")
        if isinstance(model, dict):
            inner = model.get("init_args")
            found |= {*model, *(inner if isinstance(inner, dict) else ())} - {"init_args"}
        elif isinstance(model, str):
            found.add("class_path")
    return found


def reconciled(before: Any, after: Any, given: set[str], checkpoint: str) -> tuple[Any, str]:
    """What the module is built with.

    Args:
        before: the module's configuration as it was given, with its defaults.
        after: the same with the checkpoint's hyper-parameters over it.
        given: names of the settings that were given.
        checkpoint: its path, for messages.

    Returns:
        The configuration, and a line that names what was given and is not used; empty if there is nothing.

    Raises:
        ConfigurationError: what was given is another architecture or regime than the checkpoint's.
    """
    overridden = []
    if "class_path" in given and not _same_class(before.get("class_path"), after.get("class_path")):
        raise _contradiction("model", after.get("class_path"), before.get("class_path"), checkpoint)
    asked, found = before.get("init_args") or {}, after.get("init_args") or {}
    for name in sorted(given):
        if name not in found or name not in asked or _same(asked[name], found[name]):
            continue
        if name in _STARTS:
            found[name] = asked[name]
        elif name in _STRUCTURE:
            raise _contradiction(f"model.{name}", found[name], asked[name], checkpoint)
        else:
            overridden.append(f"{name}={found[name]!r} (given: {asked[name]!r})")
    line = f"{checkpoint}: its settings are used, {', '.join(overridden)}" if overridden else ""
    return after, line


def _contradiction(name: str, expected: Any, got: Any, checkpoint: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name}: expected {expected!r}, of which {checkpoint} is a checkpoint, got {got!r}. Leave {name} out, or "
        "start from another file."
    )


def _same(first: Any, second: Any) -> bool:
    if first == second:
        return True
    paths = isinstance(first, str) and isinstance(second, str) and Path(first).exists() and Path(second).exists()
    return paths and Path(first).samefile(second)


def _same_class(first: str | None, second: str | None) -> bool:
    classes = []
    for path in (first, second):
        module, _, name = str(path).rpartition(".")
        classes.append(getattr(import_module(module), name, path) if module else path)
    return first == second or classes[0] is classes[1]
