"""Prompt templates of the zero-shot heads, by the name of a data set or of a task of the embedded suite."""

from __future__ import annotations

from collections.abc import Mapping

from lit_merge.data.published.registry import REGISTRY
from lit_merge.errors import ConfigurationError, did_you_mean

__all__ = ["GENERIC", "TEMPLATES", "templates_for"]

GENERIC: tuple[str, ...] = ("a photo of a {}.",)

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "generic": GENERIC,
    **{name: entry.templates for name, entry in REGISTRY.items()},
}
"""The templates that do not belong to a task of the embedded suite."""


def templates_for(name: str) -> tuple[str, ...]:
    """Return the templates of a data set, each with one ``{}`` for the class name.

    Args:
        name: a key of :data:`TEMPLATES` or of :data:`~lit_merge.data.DRAWN_TASKS`, in any case.

    Raises:
        ConfigurationError: the name is unknown; the nearest ones are named.
    """
    from lit_merge.data.embedded.tasks import DRAWN_TASKS  # imports torch

    known = {**TEMPLATES, **{task.name: task.templates for task in DRAWN_TASKS.values()}}
    if name.lower() in known:
        return known[name.lower()]
    hint = did_you_mean(name, known, "Give templates of your own, or use 'generic'.")
    raise ConfigurationError(f"templates: expected one of {', '.join(known)}, got {name!r}. {hint}")
