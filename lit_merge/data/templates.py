"""Prompt templates of the zero-shot heads, by data set.

Those that CLIP was published with (Radford et al. 2021) are its lists; the others are those of the programs of Ilharco
et al. (2023) and Wang et al. (2024): for SVHN MNIST's, for Fashion-MNIST STL-10's. ImageNet's are used for its shifts
too. Those of the embedded suite are with its tasks.
"""

from __future__ import annotations

import difflib

from lit_merge.data.embedded.tasks import EMBEDDED_TASKS
from lit_merge.errors import ConfigurationError

__all__ = ["GENERIC", "TEMPLATES", "templates_for"]

GENERIC: tuple[str, ...] = ("a photo of a {}.",)

_AERIAL = ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view")
_A_AND_THE = ("a photo of a {}.", "a photo of the {}.")
_NUMBER = ('a photo of the number: "{}".',)
_CIFAR = tuple(
    f"a {kind}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for kind, size in (
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    )
)
_IMAGENET = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "generic": GENERIC,
    "sun397": _A_AND_THE,
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
    "cifar100": _CIFAR,
    "stl10": _A_AND_THE,
    "flowers102": ("a photo of a {}, a type of flower.",),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "pcam": ("this is a photo of {}",),
    "fer2013": (
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ),
    "emnist": ('a photo of the digit character: "{}".',),
    "cifar10": _CIFAR,
    "food101": ("a photo of {}, a type of food.",),
    "fashion_mnist": _A_AND_THE,
    "rendered_sst2": ("a {} review of a movie.",),
    "kmnist": ("a photo of the character {}.",),
    **dict.fromkeys(("imagenet", "imagenet_v2", "imagenet_r", "imagenet_sketch", "imagenet_a", "objectnet"), _IMAGENET),
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
