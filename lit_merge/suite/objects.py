"""Networks and tasks of one's own, from their class paths and settings in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lit_merge.errors import ConfigurationError, one_line

__all__ = ["build", "class_of"]


def class_of(what: str, config: Mapping[str, Any]) -> Any:
    """The class that ``{class_path: …}`` names, by its import path.

    Raises:
        ConfigurationError: there is none.
    """
    path = str(config.get("class_path"))
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{what}: expected the import path of a class, got {path!r} ({one_line(error)}). Start the command where "
            "it can be imported."
        ) from error


def build(what: str, kind: type, config: Mapping[str, Any]) -> Any:
    """The object that ``{class_path: …, init_args: …}`` stands for, as a stage's parser builds it.

    Args:
        what: the setting that it comes from, for messages.
        kind: what its class has to be a subclass of; of a protocol, what it has to have.
        config: its class path and, if it needs any, its arguments, which may be objects themselves.

    Raises:
        ConfigurationError: there is no such class, it is of another kind, or a setting is unknown or refused.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--object", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_object({"object": dict(config)})).object
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{what}: expected class_path and init_args of a {kind.__name__}, got {dict(config)!r} "
            f"({one_line(error, 300)}). Name a class that can be imported here."
        ) from error
