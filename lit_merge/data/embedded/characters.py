"""Digits on clutter (the suite's SVHN) and capital letters in many fonts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lit_merge.data.embedded.canvas import SIZE, Brush, photograph

__all__ = ["DIGIT_WORDS", "LETTERS", "draw_clutter", "draw_letter"]

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCEFHJKLMPRSTWXYZ")


def clean_character(brush: Brush, character: str) -> np.ndarray:
    """A character as pre-training sees it: plain ink on a plain ground, uint8 ``[32, 32, 3]``."""
    if brush.chance(0.4):
        ground, ink = brush.choose((((250, 250, 250), (8, 8, 8)), ((5, 5, 5), (250, 250, 250))))
    else:
        ground = brush.any_colour()
        ink = brush.contrasting(ground, 90)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    image.paste(ink, (0, 0), brush.tilt(brush.glyph(character), 6, (0.85, 1.5), 0.05))
    return photograph(image, brush, blur=0.8)


def draw_clutter(brush: Brush, label: int) -> np.ndarray:
    """A digit between its neighbours on a cluttered wall, uint8 ``[32, 32, 3]``."""
    if brush.clean:
        return clean_character(brush, str(label))
    wall = brush.any_colour()
    image = brush.ground(wall, 1.0)
    ink = brush.contrasting(wall, 62)
    for side in (-1, 1):
        if brush.chance(0.65):
            neighbour = brush.tilt(
                brush.glyph(str(brush.integer(0, 9))),
                4,
                (0.95, 1.35),
                0.1,
                shift=2,
                centre=(side * brush.uniform(31, 37), brush.uniform(-5, 5)),
            )
            image.paste(ink, (0, 0), neighbour)
    image.paste(ink, (0, 0), brush.tilt(brush.glyph(str(label)), 9, (1.05, 1.45), 0.15, shift=2.5))
    return photograph(image, brush, blur=2.1, grain=12, exposure=0.4)


def draw_letter(brush: Brush, label: int) -> np.ndarray:
    """A letter on a flag: slanted, bent by the wind, the cloth of stone or paper colour; uint8 ``[32, 32, 3]``."""
    character = LETTERS[label]
    if brush.clean:
        return clean_character(brush, character)
    surface = brush.near((62, 54, 46), 26) if brush.chance(0.5) else brush.near((205, 190, 160), 26)
    image = brush.ground(surface, 0.8)
    ink = brush.contrasting(surface, 75)
    painted = brush.wave(brush.tilt(brush.glyph(character), 22, (0.95, 1.45), 0.3, shift=4), 6)
    image.paste(ink, (0, 0), painted)
    return photograph(image, brush, blur=1.5, grain=16, exposure=0.45)
