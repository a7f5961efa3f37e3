"""Land cover seen from above (the suite's EuroSAT and RESISC45).

The task shows false-colour infra-red composites, in which vegetation is red; pre-training shows natural colour.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import SIZE, Brush, Colour, photograph, to_image

__all__ = ["LAND_COVER", "draw_land", "infra_red", "land_pixels"]

LAND_COVER = (
    "forest",
    "river",
    "highway",
    "residential buildings",
    "industrial buildings",
    "annual crop fields",
    "orchard",
    "pasture",
    "sea",
    "desert",
)


def _soil(brush: Brush, colour: Colour, cells: int = 6, amplitude: float = 14) -> np.ndarray:
    """Ground of one colour with coarse and fine variation, float ``[SIZE, SIZE, 3]``."""
    tone = np.array(brush.near(colour, 8 if brush.clean else 18), np.float32)
    return tone + (brush.noise(cells, amplitude) + brush.noise(24, 0.6 * amplitude))[..., None]


def _turned_grid(angle: float) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:SIZE, 0:SIZE] - SIZE / 2
    return math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y


def _strip(brush: Brush, cover: str, angle: float) -> np.ndarray:
    across, along = _turned_grid(angle)
    ground = _soil(brush, (92, 125, 62) if brush.chance(0.7) else (150, 135, 95))
    if cover == "river":
        bend = 10 * np.sin(along / brush.uniform(8, 16) + brush.uniform(0, 6)) + brush.uniform(-6, 6)
        wet = np.abs(across - bend) < brush.uniform(5, 11)
        return np.where(wet[..., None], _soil(brush, (52, 82, 105), 5, 5), ground)
    middle = brush.uniform(-9, 9)
    road = np.abs(across - middle) < brush.uniform(3.2, 6)
    marking = np.abs(across - middle) < 0.8
    ground = np.where(road[..., None], _soil(brush, (124, 122, 118), 5, 5), ground)
    return np.where(marking[..., None], _soil(brush, (215, 215, 205), 3, 3), ground)


def _buildings(brush: Brush, cover: str, angle: float) -> np.ndarray:
    soil: Colour = (96, 116, 76) if cover.startswith("residential") else (120, 115, 106)
    image = to_image(_soil(brush, soil))
    pen = ImageDraw.Draw(image)
    if cover.startswith("residential"):
        spacing = brush.integer(9, 13)
        for row in range(-2, 9):
            for column in range(-2, 9):
                if brush.chance(0.85):
                    x, y = row * spacing + brush.integer(-1, 1), column * spacing + brush.integer(-1, 1)
                    roof = brush.near(brush.choose(((165, 85, 65), (176, 160, 150), (140, 70, 56))), 14)
                    pen.rectangle((x, y, x + brush.integer(4, 7), y + brush.integer(4, 7)), fill=roof)
    else:
        for _ in range(brush.integer(3, 6)):
            x, y = brush.integer(-5, 49), brush.integer(-5, 49)
            roof = brush.near(brush.choose(((210, 212, 215), (160, 175, 190), (190, 185, 170))), 14)
            box = (x, y, x + brush.integer(14, 29), y + brush.integer(14, 29))
            pen.rectangle(box, fill=roof, outline=(80, 80, 80))
    if not brush.clean:
        image = image.rotate(math.degrees(angle), Image.Resampling.BILINEAR, fillcolor=soil)
    return np.asarray(image, np.float32)


def _fields(brush: Brush, cover: str, angle: float) -> np.ndarray:
    across, along = _turned_grid(angle)
    if cover == "orchard":
        spacing = brush.uniform(6.5, 10)
        tree = ((across / spacing % 1 - 0.5) ** 2 + (along / spacing % 1 - 0.5) ** 2) < 0.1
        return np.where(tree[..., None], _soil(brush, (46, 82, 42), 10, 8), _soil(brush, (150, 135, 96)))
    width = brush.uniform(14, 24)
    row = np.floor((across + brush.uniform(0, 20)) / width).astype(int) % 7
    column = np.floor((along + brush.uniform(0, 20)) / (1.7 * width)).astype(int) % 5
    crops = ((165, 145, 85), (110, 135, 66), (190, 165, 106), (130, 105, 70), (86, 120, 60))
    tones = np.array([brush.near(brush.choose(crops), 12) for _ in range(35)], np.float32)
    return tones[row * 5 + column] + brush.noise(24, 8)[..., None]


def land_pixels(brush: Brush, label: int) -> np.ndarray:
    """A patch of land from above in natural colours, float ``[SIZE, SIZE, 3]``."""
    cover = LAND_COVER[label]
    angle = 0.0 if brush.clean and brush.chance(0.5) else brush.uniform(0, math.pi)
    if cover == "forest":
        pixels = _soil(brush, (40, 76, 40), 20, 16)
    elif cover == "pasture":
        pixels = _soil(brush, (110, 145, 72), 4, 12)
    elif cover == "sea":
        pixels = _soil(brush, (32, 66, 110), 5, 5)
    elif cover == "desert":
        pixels = _soil(brush, (200, 170, 122), 5, 16)
    elif cover in ("river", "highway"):
        pixels = _strip(brush, cover, angle)
    elif cover.endswith("buildings"):
        pixels = _buildings(brush, cover, angle)
    else:
        pixels = _fields(brush, cover, angle)
    return pixels + brush.uniform(-1, 1) * (4 if brush.clean else 14) * np.array([1, 0, -1])


def infra_red(pixels: np.ndarray) -> np.ndarray:
    """The false-colour composite of natural colours, in which vegetation is red."""
    red, green, blue = np.moveaxis(np.clip(pixels, 0, 255), -1, 0)
    return np.stack([1.15 * green + 15, 0.8 * red, 0.35 * green + 0.6 * blue], -1)


def draw_land(brush: Brush, label: int) -> np.ndarray:
    """A patch of land from above, uint8 ``[32, 32, 3]``."""
    pixels = land_pixels(brush, label)
    if brush.clean:
        return photograph(to_image(pixels), brush, blur=0.4, grain=4, exposure=0.1)
    if brush.chance(0.3):
        haze = np.clip(brush.noise(4, 1.0), 0, 1)[..., None] * 0.7
        pixels = pixels * (1 - haze) + 235 * haze
    return photograph(to_image(infra_red(pixels)), brush, blur=1.2, grain=9, exposure=0.35)
