"""Traffic signs (the suite's GTSRB): sixteen classes of rims, discs, triangles and a few of their own shape."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import SIZE, Brush, compose, photograph, polygon_points, to_image

__all__ = ["SIGN_CLASSES", "draw_sign"]

_MIDDLE = SIZE / 2
_NUMBERS = ("1", "2", "5", "7")
_ARROWS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1)}
_WARNINGS = ("an exclamation mark", "a cross", "a bump", "a person")
# The colour of the light at noon, at dusk, under sodium lamps and under fluorescent ones.
_LIGHTS = ((1.0, 1.0, 1.0), (0.62, 0.5, 0.85), (0.95, 0.62, 0.25), (0.5, 0.95, 0.75))
_OTHERS = {
    "stop": "a red octagon",
    "yield": "an upside down triangle with a red border",
    "priority": "a yellow diamond",
    "no entry": "a red circle with a white bar",
    "end": "a gray circle with a diagonal bar",
}

SIGN_CLASSES = (
    *(f"a white circle with a red border and the number {number}" for number in _NUMBERS),
    *(f"a blue circle with an arrow pointing {direction}" for direction in _ARROWS),
    *(f"a triangle with a red border and {warning}" for warning in _WARNINGS),
    *_OTHERS.values(),
)


def _disc(pen: ImageDraw.ImageDraw, radius: float, fill: tuple[int, int, int]) -> None:
    pen.ellipse((_MIDDLE - radius, _MIDDLE - radius, _MIDDLE + radius, _MIDDLE + radius), fill=fill)


def _warning_symbol(pen: ImageDraw.ImageDraw, warning: str, ink: tuple[int, int, int]) -> None:
    x, y = _MIDDLE, _MIDDLE + 3
    if warning == "an exclamation mark":
        pen.rectangle((x - 2, y - 8, x + 2, y + 5), fill=ink)
        pen.ellipse((x - 3, y + 8, x + 3, y + 14), fill=ink)
    elif warning == "a cross":
        pen.line((x - 8, y - 3, x + 8, y + 13), fill=ink, width=4)
        pen.line((x + 8, y - 3, x - 8, y + 13), fill=ink, width=4)
    elif warning == "a bump":
        pen.pieslice((x - 12, y, x + 12, y + 24), 180, 360, fill=ink)
    else:
        pen.ellipse((x - 3, y - 9, x + 3, y - 3), fill=ink)
        pen.line((x, y - 3, x, y + 6), fill=ink, width=4)
        pen.line((x - 7, y, x + 7, y), fill=ink, width=2)
        pen.line((x, y + 6, x - 6, y + 14), fill=ink, width=3)
        pen.line((x, y + 6, x + 6, y + 14), fill=ink, width=3)


def _panel(brush: Brush, label: int) -> Image.Image:
    """The sign itself, RGBA on a transparent surface."""
    panel = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(panel)
    red, white = brush.near((200, 32, 36), 20), brush.near((238, 238, 238), 12)
    blue, black = brush.near((32, 82, 188), 20), brush.near((24, 24, 24), 12)
    if label < len(_NUMBERS):
        _disc(pen, 27, red)
        _disc(pen, 20, white)
        number = brush.glyph(_NUMBERS[label]).resize((54, 54), Image.Resampling.BILINEAR)
        panel.paste((*black, 255), (5, 5), number)
        return panel
    label -= len(_NUMBERS)
    if label < len(_ARROWS):
        across, down = list(_ARROWS.values())[label]
        _disc(pen, 27, blue)
        arrow = [(-17, -5), (1, -5), (1, -14), (18, 0), (1, 14), (1, 5), (-17, 5)]
        turned = [(_MIDDLE + x * across - y * down, _MIDDLE + x * down + y * across) for x, y in arrow]
        pen.polygon(turned, fill=white)
        return panel
    label -= len(_ARROWS)
    if label < len(_WARNINGS):
        pen.polygon(polygon_points(3, 34, -math.pi / 2, (_MIDDLE, _MIDDLE + 6)), fill=red)
        pen.polygon(polygon_points(3, 23, -math.pi / 2, (_MIDDLE, _MIDDLE + 7)), fill=white)
        _warning_symbol(pen, _WARNINGS[label], black)
        return panel
    kind = list(_OTHERS)[label - len(_WARNINGS)]
    if kind == "stop":
        pen.polygon(polygon_points(8, 28, math.pi / 8), fill=red)
        for place, character in enumerate("STOP"):
            small = brush.glyph(character).resize((26, 26), Image.Resampling.BILINEAR)
            panel.paste((*white, 255), (2 + round(11.5 * place), 19), small)
    elif kind == "yield":
        pen.polygon(polygon_points(3, 34, math.pi / 2, (_MIDDLE, _MIDDLE - 6)), fill=red)
        pen.polygon(polygon_points(3, 21, math.pi / 2, (_MIDDLE, _MIDDLE - 6)), fill=white)
    elif kind == "priority":
        pen.polygon(polygon_points(4, 30, 0), fill=white)
        pen.polygon(polygon_points(4, 23, 0), fill=brush.near((243, 198, 35), 16))
    elif kind == "no entry":
        _disc(pen, 27, red)
        pen.rectangle((_MIDDLE - 18, _MIDDLE - 5, _MIDDLE + 18, _MIDDLE + 5), fill=white)
    else:
        _disc(pen, 27, brush.near((142, 142, 142), 12))
        _disc(pen, 24, white)
        pen.line(
            (_MIDDLE - 18, _MIDDLE + 18, _MIDDLE + 18, _MIDDLE - 18), fill=brush.near((105, 105, 105), 12), width=7
        )
    return panel


def _snow(brush: Brush, image: Image.Image) -> None:
    """Patches of snow that hide up to about a quarter of the picture."""
    pen = ImageDraw.Draw(image)
    for _ in range(brush.integer(2, 5)):
        x, y = brush.integer(0, SIZE), brush.integer(0, SIZE)
        half_width, half_height = brush.integer(4, 10), brush.integer(3, 8)
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        pen.ellipse(box, fill=brush.near((232, 236, 242), 12))


def draw_sign(brush: Brush, label: int) -> np.ndarray:
    """A traffic sign by the road, snowed on, in the light of day or lamps; uint8 ``[32, 32, 3]``."""
    panel = _panel(brush, label)
    if brush.clean:
        panel = brush.tilt(panel, 3, (0.8, 1.05), 0.03)
        plain = brush.near((235, 235, 235), 12) if brush.chance(0.5) else brush.near((120, 188, 120), 16)
        return photograph(compose(Image.new("RGB", (SIZE, SIZE), plain), panel), brush, blur=0.5)
    surroundings = brush.choose(((108, 138, 90), (140, 160, 190), (96, 90, 84), (60, 70, 60)))
    panel = brush.tilt(panel, 14, (0.7, 1.05), 0.16, shift=4.5)
    image = compose(brush.ground(brush.near(surroundings, 26), 0.9), panel)
    if brush.chance(0.6):
        _snow(brush, image)
    image = to_image(np.asarray(image, np.float32) * np.array(brush.choose(_LIGHTS)))
    return photograph(image, brush, blur=1.8, grain=14, exposure=0.5)
