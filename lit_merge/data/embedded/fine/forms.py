"""Tasks of shapes: their colour, number, place, filling, and what is in or beside them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import COLOURS, SIZE, Brush, Colour, to_image
from lit_merge.data.embedded.fine.camera import backdrop, blank, shot, stuck, turned
from lit_merge.data.embedded.shapes import SHAPES, draw_shape
from lit_merge.data.embedded.textures import TEXTURES, texture_field

__all__ = [
    "COLOURED_SHAPES",
    "COLOURED_TEXTURES",
    "COUNTED_SHAPES",
    "NESTED_SHAPES",
    "PAIRED_SHAPES",
    "PLACED_SHAPES",
    "TEXTURED_SHAPES",
    "draw_coloured_shape",
    "draw_coloured_texture",
    "draw_counted_shapes",
    "draw_nested_shapes",
    "draw_paired_shapes",
    "draw_placed_shape",
    "draw_textured_shape",
]

_INKS = tuple(COLOURS)
_CLOTHS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven")
_PLACES = tuple(
    f"{down} {across}".strip() for down in ("top", "middle", "bottom") for across in ("left", "centre", "right")
)
_MIDDLE = SIZE / 2

COLOURED_SHAPES = tuple(f"{colour} {shape}" for colour in _INKS for shape in SHAPES)
COUNTED_SHAPES = tuple(
    f"{count} {shape}" + ("" if count == "one" else "es" if shape.endswith("s") else "s")
    for count in _COUNTS
    for shape in SHAPES
)
NESTED_SHAPES = tuple(f"{inner} inside a {outer}" for outer in SHAPES for inner in SHAPES)
PAIRED_SHAPES = tuple(f"{left} left of a {right}" for left in SHAPES for right in SHAPES)
PLACED_SHAPES = tuple(f"{shape} at the {place}" for place in _PLACES for shape in SHAPES)
COLOURED_TEXTURES = tuple(f"{colour} {texture}" for colour in _CLOTHS for texture in TEXTURES)
TEXTURED_SHAPES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)


def _ink(brush: Brush) -> Colour:
    return brush.any_colour()


def draw_coloured_shape(brush: Brush, label: int) -> np.ndarray:
    """One shape of one colour among twelve, uint8 ``[32, 32, 3]``."""
    ink = brush.named(_INKS[label // len(SHAPES)], 14)
    drawing = blank()
    draw_shape(ImageDraw.Draw(drawing), SHAPES[label % len(SHAPES)], _MIDDLE, _MIDDLE, brush.uniform(15, 25), ink)
    return stuck(brush, backdrop(brush, ink, 50), drawing, 20, 6)


def draw_counted_shapes(brush: Brush, label: int) -> np.ndarray:
    """One to seven of a shape, uint8 ``[32, 32, 3]``."""
    count, shape = label // len(SHAPES) + 1, SHAPES[label % len(SHAPES)]
    ink = _ink(brush)
    image = backdrop(brush, ink, 70, 0.5)
    pen = ImageDraw.Draw(image)
    radius = brush.uniform(7, 9.5)
    for cell in brush.random.permutation(9)[:count]:
        x, y = 11 + 21 * (cell % 3) + brush.uniform(-1.5, 1.5), 11 + 21 * (cell // 3) + brush.uniform(-1.5, 1.5)
        draw_shape(pen, shape, x, y, radius, ink)
    return shot(brush, image)


def draw_nested_shapes(brush: Brush, label: int) -> np.ndarray:
    """A small shape on a large one, uint8 ``[32, 32, 3]``."""
    outer, inner = SHAPES[label // len(SHAPES)], SHAPES[label % len(SHAPES)]
    ink = _ink(brush)
    drawing = blank()
    pen = ImageDraw.Draw(drawing)
    low = 5 if outer == "triangle" else 0
    draw_shape(pen, outer, _MIDDLE, _MIDDLE + low, 29, ink)
    draw_shape(pen, inner, _MIDDLE, _MIDDLE + low, brush.uniform(10, 12), brush.contrasting(ink, 90))
    return stuck(brush, backdrop(brush, ink), drawing, 8, 2)


def draw_paired_shapes(brush: Brush, label: int) -> np.ndarray:
    """Two shapes side by side, uint8 ``[32, 32, 3]``."""
    ink = _ink(brush)
    drawing = blank()
    pen = ImageDraw.Draw(drawing)
    for x, shape in ((17, SHAPES[label // len(SHAPES)]), (47, SHAPES[label % len(SHAPES)])):
        draw_shape(pen, shape, x, _MIDDLE + brush.uniform(-6, 6), brush.uniform(11, 14), ink)
    return stuck(brush, backdrop(brush, ink), drawing, 8, 2)


def draw_placed_shape(brush: Brush, label: int) -> np.ndarray:
    """A shape in one of nine places, uint8 ``[32, 32, 3]``."""
    place, shape = divmod(label, len(SHAPES))
    ink = _ink(brush)
    image = backdrop(brush, ink, 70, 0.6)
    x, y = (12 + 20 * (step) + brush.uniform(-2, 2) for step in (place % 3, place // 3))
    draw_shape(ImageDraw.Draw(image), SHAPES[shape], x, y, brush.uniform(8, 11), ink)
    return shot(brush, image)


def _cloth(brush: Brush, texture: str, ground: Colour, ink: Colour, scale: float) -> Image.Image:
    angle = brush.uniform(-0.3, 0.3) if brush.clean else brush.uniform(0, math.pi)
    field = texture_field(brush, texture, scale, angle)[..., None]
    return to_image(np.array(ground) * (1 - field) + np.array(ink) * field)


def draw_coloured_texture(brush: Brush, label: int) -> np.ndarray:
    """A texture in one of eight colours on black, gray or white, uint8 ``[32, 32, 3]``."""
    ink = brush.named(_CLOTHS[label // len(TEXTURES)], 14)
    others = ("white", "black") if brush.clean else ("white", "black", "gray")
    ground = brush.named(brush.choose(others), 14)
    return shot(brush, _cloth(brush, TEXTURES[label % len(TEXTURES)], ground, ink, brush.uniform(0.8, 1.3)))


def draw_textured_shape(brush: Brush, label: int) -> np.ndarray:
    """A large shape cut out of a texture, uint8 ``[32, 32, 3]``."""
    texture, shape = TEXTURES[label // len(SHAPES)], SHAPES[label % len(SHAPES)]
    ground = brush.any_colour()
    cloth = _cloth(brush, texture, ground, brush.contrasting(ground, 80), brush.uniform(0.55, 0.8))
    mask = Image.new("L", (SIZE, SIZE), 0)
    draw_shape(ImageDraw.Draw(mask), shape, _MIDDLE, _MIDDLE, 30, 255)
    image = brush.ground(brush.near((128, 128, 128), 34), 0.0)
    image.paste(cloth, (0, 0), turned(brush, mask, 10))
    return shot(brush, image)
