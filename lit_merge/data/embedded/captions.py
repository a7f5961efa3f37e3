"""The captioned images on which ``lit-tiny`` and ``lit-small`` are pre-trained: like the tasks', but plainer.

Other fonts, plain colours, clean renderings (strong augmentation follows in training), invented signs and shapes, and
no handwriting. One image in seven has a weak caption that names only its kind. ``lit-small`` sees clean renderings of
the finer suite's tasks as well.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import COLOURS, SIZE, Brush, luminance, photograph
from lit_merge.data.embedded.characters import DIGIT_WORDS
from lit_merge.data.embedded.shapes import SHAPES, draw_shape
from lit_merge.data.embedded.tasks import EMBEDDED_TASKS, FINE_TASKS

__all__ = ["captioned_image"]

_COUNTS = ("one", "two", "three", "four", "five")
_SIGN_SHAPES = ("circle", "square", "triangle", "diamond", "hexagon")
_SYMBOLS = {
    "?": "a question mark",
    "!": "an exclamation mark",
    "+": "a plus sign",
    "&": "an ampersand",
    "=": "an equals sign",
    "%": "a percent sign",
    "#": "a hash",
    "@": "an at sign",
    "$": "a dollar sign",
}
_WEAK = {
    "clutter": "a digit",
    "letters": "a letter",
    "signs": "a road sign",
    "textures": "a pattern",
    "land": "a satellite photo",
    "vehicles": "a vehicle on a road",
    "scenes": "a landscape",
}


def _two_colours(brush: Brush) -> tuple[str, str]:
    first, second = brush.random.permutation(len(COLOURS))[:2]
    names = list(COLOURS)
    return names[first], names[second]


def _counted_shapes(brush: Brush) -> tuple[np.ndarray, str]:
    count, shape = brush.integer(1, 5), brush.choose(SHAPES)
    colour, ground = _two_colours(brush)
    image = brush.ground(brush.named(ground), 0.6 if brush.chance(0.3) else 0.0)
    pen = ImageDraw.Draw(image)
    if count == 1:
        x, y = SIZE / 2 + brush.uniform(-6, 6), SIZE / 2 + brush.uniform(-6, 6)
        draw_shape(pen, shape, x, y, brush.uniform(12, 27), brush.named(colour))
    else:
        radius = brush.uniform(7, 10)
        for cell in brush.random.permutation(9)[:count]:
            x, y = 11 + 21 * (cell % 3) + brush.uniform(-1, 1), 11 + 21 * (cell // 3) + brush.uniform(-1, 1)
            draw_shape(pen, shape, x, y, radius, brush.named(colour))
    plural = ("es" if shape.endswith("s") else "s") if count > 1 else ""
    caption = f"{_COUNTS[count - 1]} {colour} {shape}{plural}"
    return photograph(image, brush, blur=1, grain=8, exposure=0.2), (
        f"{caption} on a {ground} background" if brush.chance(0.5) else caption
    )


def _any_character(brush: Brush) -> tuple[np.ndarray, str]:
    kind = brush.uniform(0, 1)
    if kind < 0.25:
        character = str(brush.integer(0, 9))
        name = f"the digit {DIGIT_WORDS[int(character)]}"
    elif kind < 0.62:
        character = brush.choose(string.ascii_uppercase)
        name = f"the letter {character}"
    elif kind < 0.9:
        character = brush.choose(string.ascii_lowercase)
        name = f"the lowercase letter {character}"
    else:
        character = brush.choose(list(_SYMBOLS))
        name = _SYMBOLS[character]
    colour, ground_name = _two_colours(brush)
    ground, ink = brush.named(ground_name), brush.named(colour)
    legible = abs(luminance(ground) - luminance(ink)) >= 40
    if not legible:
        ink = brush.contrasting(ground, 90)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    image.paste(ink, (0, 0), brush.tilt(brush.glyph(character), 10, (0.8, 1.5), 0.12))
    wording = brush.uniform(0, 1)
    if legible and wording >= 0.8:
        name = f"{colour} character on {ground_name}"
    elif legible and wording >= 0.6:
        name = f"{name} in {colour}"
    return photograph(image, brush, blur=0.8), name


def _invented_sign(brush: Brush) -> tuple[np.ndarray, str]:
    colour, ground = _two_colours(brush)
    shape = brush.choose(_SIGN_SHAPES)
    image = Image.new("RGB", (SIZE, SIZE), brush.named(ground))
    pen = ImageDraw.Draw(image)
    panel = brush.named(colour)
    radius, y = brush.uniform(22, 29), SIZE / 2 + (5 if shape == "triangle" else 0)
    draw_shape(pen, shape, SIZE / 2, y, radius, panel)
    name = f"a {colour} {shape}"
    if brush.chance(0.5):
        panel = brush.contrasting(panel, 80)
        draw_shape(pen, shape, SIZE / 2, y, 0.68 * radius, panel)
        name = f"a {shape} with a {colour} border"
    if brush.chance(0.75):
        character = str(brush.integer(0, 9)) if brush.chance(0.6) else brush.choose(string.ascii_uppercase)
        side = 44
        symbol = brush.glyph(character).resize((side, side), Image.Resampling.BILINEAR)
        image.paste(brush.contrasting(panel, 105), ((SIZE - side) // 2, int(y - side / 2)), symbol)
        digit = character.isdigit()
        name += f" and the {'number ' + DIGIT_WORDS[int(character)] if digit else 'letter ' + character}"
    return photograph(image, brush, blur=0.6), name if brush.chance(0.6) else f"a sign with {name}"


def _clean_rendering(brush: Brush) -> tuple[np.ndarray, str]:
    task = EMBEDDED_TASKS[brush.choose(list(_WEAK))]
    label = brush.integer(0, len(task.classes) - 1)
    assert task.draw is not None  # every task with a weak caption is drawn
    image = task.draw(brush, label)
    if brush.chance(0.15):
        return image, _WEAK[task.name]
    templates = task.templates
    if task.name == "clutter" and brush.chance(0.5):
        templates = EMBEDDED_TASKS["digits"].templates
    return image, brush.choose(templates).format(task.classes[label])


_MIX: tuple[tuple[float, Callable[[Brush], tuple[np.ndarray, str]]], ...] = (
    (0.12, _counted_shapes),
    (0.14, _any_character),
    (0.08, _invented_sign),
    (0.66, _clean_rendering),
)


def _clean_fine_rendering(brush: Brush) -> tuple[np.ndarray, str]:
    task = FINE_TASKS[brush.choose(list(FINE_TASKS))]
    label = brush.integer(0, len(task.classes) - 1)
    assert task.draw is not None  # all of them are drawn
    return task.draw(brush, label), brush.choose(task.templates).format(task.classes[label])


def captioned_image(index: int, seed: int = 0, fine: float = 0.0) -> tuple[np.ndarray, str]:
    """Pre-training pair number ``index``; a pure function.

    Args:
        index: of the pair.
        seed: of all pairs.
        fine: fraction of the pairs that are clean renderings of the finer suite's tasks, in [0, 1].

    Returns:
        A uint8 image ``[32, 32, 3]`` and its caption.
    """
    brush = Brush((zlib.crc32(b"pretrain"), seed, index), "pretrain")
    if fine and brush.chance(fine):
        return _clean_fine_rendering(brush)
    position = brush.uniform(0, 1)
    for fraction, draw in _MIX:
        if position < fraction:
            return draw(brush)
        position -= fraction
    return _clean_rendering(brush)
