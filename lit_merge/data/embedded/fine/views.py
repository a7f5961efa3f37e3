"""Tasks of vehicles, land and landscapes: in a colour, in a place, in a season, in some weather."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import SIZE, Brush, compose, to_image
from lit_merge.data.embedded.fine.camera import backdrop, shot, stuck
from lit_merge.data.embedded.land import LAND_COVER, infra_red, land_pixels
from lit_merge.data.embedded.scenes import SCENES, landscape
from lit_merge.data.embedded.vehicles import PAINTS, VEHICLES, vehicle_body

__all__ = [
    "JOURNEYS",
    "PAINTED_VEHICLES",
    "SEASONS",
    "WEATHER",
    "draw_journey",
    "draw_painted_vehicle",
    "draw_season",
    "draw_weather",
]

_SEASONS = ("in summer", "in autumn", "under snow", "at dusk", "in infra-red")
_WEATHER = ("in clear weather", "in rain", "in snow", "in fog", "in a thunderstorm")

PAINTED_VEHICLES = tuple(f"{paint} {vehicle}" for paint in PAINTS for vehicle in VEHICLES)
JOURNEYS = tuple(f"{vehicle} and a {scene}" for scene in SCENES for vehicle in VEHICLES)
SEASONS = tuple(f"{cover} {season}" for season in _SEASONS for cover in LAND_COVER)
WEATHER = tuple(f"{scene} {weather}" for weather in _WEATHER for scene in SCENES)


def _facing(brush: Brush, drawing: Image.Image) -> Image.Image:
    return drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if brush.chance(0.5) else drawing


def draw_painted_vehicle(brush: Brush, label: int) -> np.ndarray:
    """A vehicle in one of eight colours, uint8 ``[32, 32, 3]``."""
    paint, vehicle = divmod(label, len(VEHICLES))
    drawing = _facing(brush, vehicle_body(brush, VEHICLES[vehicle], PAINTS[paint]))
    return stuck(brush, backdrop(brush, (110, 110, 110), 20), drawing, 8)


def draw_journey(brush: Brush, label: int) -> np.ndarray:
    """A vehicle in front of a landscape, uint8 ``[32, 32, 3]``."""
    scene, vehicle = divmod(label, len(VEHICLES))
    image = landscape(brush, scene)
    drawing = _facing(brush, vehicle_body(brush, VEHICLES[vehicle]))
    side = round(SIZE * (0.62 if brush.clean else brush.uniform(0.55, 0.7)))
    small = drawing.resize((side, side), Image.Resampling.BILINEAR)
    room = SIZE - side
    image.paste(small, (room // 2 if brush.clean else brush.integer(0, room), room + 6), small)
    return shot(brush, image)


def draw_season(brush: Brush, label: int) -> np.ndarray:
    """Land from above in one of five states, uint8 ``[32, 32, 3]``."""
    season, cover = divmod(label, len(LAND_COVER))
    pixels = land_pixels(brush, cover)
    kind = _SEASONS[season]
    grey = pixels.mean(-1, keepdims=True)
    if kind == "in autumn":
        pixels = 0.45 * pixels + 0.55 * grey * np.array([1.45, 0.95, 0.45])
    elif kind == "under snow":
        cover_of_snow = np.clip(0.72 + brush.noise(6, 0.3), 0, 1)[..., None]
        pixels = pixels * (1 - cover_of_snow) + (0.35 * grey + 165) * cover_of_snow
    elif kind == "at dusk":
        pixels = 0.5 * pixels * np.array([0.95, 0.7, 1.15])
    elif kind == "in infra-red":
        pixels = infra_red(pixels)
    return shot(brush, to_image(pixels))


def draw_weather(brush: Brush, label: int) -> np.ndarray:
    """A landscape in one of five weathers, uint8 ``[32, 32, 3]``."""
    weather, scene = divmod(label, len(SCENES))
    image = landscape(brush, scene)
    kind = _WEATHER[weather]
    if kind == "in fog":
        thick = np.clip(0.55 + brush.noise(4, 0.2), 0, 1)[..., None]
        image = to_image(np.asarray(image, np.float32) * (1 - thick) + 170 * thick)
    if kind in ("in rain", "in a thunderstorm"):
        image = to_image(0.75 * np.asarray(image, np.float32))
    pen = ImageDraw.Draw(image)
    if kind == "in rain":
        for _ in range(brush.integer(22, 34)):
            x, y, length = brush.integer(0, SIZE), brush.integer(-6, SIZE), brush.integer(6, 11)
            pen.line((x, y, x - 2, y + length), fill=brush.near((175, 195, 220), 14), width=2)
    elif kind == "in snow":
        for _ in range(brush.integer(30, 46)):
            x, y, radius = brush.integer(0, SIZE), brush.integer(0, SIZE), brush.uniform(1, 2.2)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=brush.near((245, 245, 248), 8))
    elif kind == "in a thunderstorm":
        _lightning(brush, image)
    return shot(brush, image)


def _lightning(brush: Brush, image: Image.Image) -> None:
    """A dark cloud and a bolt from it."""
    cloud = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(cloud)
    dark = brush.near((62, 62, 74), 12)
    for middle in range(0, SIZE + 1, 12):
        radius = brush.uniform(8, 13)
        pen.ellipse((middle - radius, -radius, middle + radius, 0.9 * radius), fill=dark)
    x, y = brush.uniform(14, 50), 9.0
    bolt = [(x, y)]
    for side in (-1, 1, -1, 1):
        x, y = x + side * brush.uniform(2, 6), y + brush.uniform(5, 8)
        bolt.append((x, y))
    pen.line(bolt, fill=brush.near((250, 245, 170), 8), width=3)
    compose(image, cloud)
