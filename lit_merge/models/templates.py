"""Prompt templates of the zero-shot heads, by data set.

Those of the eight standard data sets are the lists published with CLIP (Radford et al. 2021); for SVHN, which is not
among them, the field uses MNIST's.
"""

from __future__ import annotations

import difflib

from lit_merge.errors import ConfigurationError

__all__ = ["GENERIC", "TEMPLATES", "templates_for"]

GENERIC: tuple[str, ...] = ("a photo of a {}.",)

_AERIAL = ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view")
_NUMBER = ('a photo of the number: "{}".',)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "generic": GENERIC,
    # The eight standard data sets.
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
    # The tasks of the embedded suite.
    "digits": ("a photo of the number {}.", "the digit {}.", "a handwritten digit {}."),
    "clutter": ("a photo of the number {}.", "the digit {}.", "a street number {}."),
    "letters": ("the letter {}.", "a photo of the letter {}.", "capital letter {}."),
    "signs": ("a traffic sign showing {}.", "a photo of {}.", "a sign with {}."),
    "textures": ("a {} texture.", "a photo of a {} pattern.", "a {} surface."),
    "land": ("a satellite photo of {}.", "an aerial view of {}.", "{} seen from above."),
    "vehicles": ("a photo of a {}.", "a drawing of a {}.", "a {}."),
    "scenes": ("a photo of a {}.", "a landscape of a {}.", "a view of a {}."),
}


def templates_for(name: str) -> tuple[str, ...]:
    """Return the templates of a data set, each with one ``{}`` for the class name.

    Args:
        name: a key of :data:`TEMPLATES`, in any case.

    Raises:
        ConfigurationError: the name is unknown; the nearest ones are named.
    """
    if name.lower() in TEMPLATES:
        return TEMPLATES[name.lower()]
    close = difflib.get_close_matches(name.lower(), TEMPLATES, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else "Give templates of your own, or use 'generic'."
    raise ConfigurationError(f"templates: expected one of {', '.join(TEMPLATES)}, got {name!r}. {hint}")
