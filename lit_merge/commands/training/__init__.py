"""The commands that train and evaluate, run by Lightning's command line.

Each takes the command line, and returns the CLI object with its trainer, model and data.
"""

from __future__ import annotations

from typing import Any

__all__ = ["fit", "predict", "test", "validate"]


def fit(*arguments: str) -> Any:
    """Run Lightning's ``fit``."""
    return _run("fit", arguments)


def validate(*arguments: str) -> Any:
    """Run Lightning's ``validate``."""
    return _run("validate", arguments)


def test(*arguments: str) -> Any:
    """Run Lightning's ``test``."""
    return _run("test", arguments)


def predict(*arguments: str) -> Any:
    """Run Lightning's ``predict``."""
    return _run("predict", arguments)


def _run(command: str, arguments: tuple[str, ...]) -> Any:
    from lit_merge.commands.training.lightning_cli import LitMergeCLI  # with --help alone Lightning is not imported

    return LitMergeCLI(command, arguments)
