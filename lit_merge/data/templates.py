"""Prompt templates of the zero-shot heads, by data set.

Those of the eight standard data sets are the lists published with CLIP (Radford et al. 2021); for SVHN, which is not
among them, the field uses MNIST's. Those of the embedded suite are with its tasks.
"""

from __future__ import annotations

import difflib

from lit_merge.data.embedded.tasks import EMBEDDED_TASKS
from lit_merge.errors import ConfigurationError

__all__ = ["GENERIC", "TEMPLATES", "templates_for"]

GENERIC: tuple[str, ...] = ("a photo of a {}.",)

_AERIAL = ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view")
_NUMBER = ('a photo of the number: "{}".',)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "generic": GENERIC,
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "resisc45": tuple(f"{view} of {article}{{}}." for article in ("", "a ", "the ") for view in _AERIAL),
    "eurosat": (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    "svhn": _NUMBER,
    "gtsrb": (
        'a zoomed in photo of a "{}" traffic sign.',
        'a centered photo of a "{}" traffic sign.',
        'a close up photo of a "{}" traffic sign.',
    ),
    "mnist": _NUMBER,
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
}
"""The templates that do not belong to a task of the embedded suite."""


def templates_for(name: str) -> tuple[str, ...]:
    """Return the templates of a data set, each with one ``{}`` for the class name.

    Args:
        name: a key of :data:`TEMPLATES` or of :data:`~lit_merge.data.EMBEDDED_TASKS`, in any case.

    Raises:
        ConfigurationError: the name is unknown; the nearest ones are named.
    """
    known = {**TEMPLATES, **{task.name: task.templates for task in EMBEDDED_TASKS.values()}}
    if name.lower() in known:
        return known[name.lower()]
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else "Give templates of your own, or use 'generic'."
    raise ConfigurationError(f"templates: expected one of {', '.join(known)}, got {name!r}. {hint}")
