"""Landscapes by day and by night (the suite's SUN397): six places x two times of day, as faded photographs."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import SIZE, Brush, Colour, photograph, to_image

__all__ = ["SCENES", "draw_scene", "landscape"]

_PLACES = ("mountain", "city", "forest", "desert", "sea", "village")
SCENES = tuple(f"{place} {time}" for place in _PLACES for time in ("during the day", "at night"))
_WINDOW_LIGHT = (250, 220, 120)


class _Scene:
    """One landscape in the making: the picture, its horizon and how dark it is."""

    def __init__(self, brush: Brush, night: bool) -> None:
        self.brush = brush
        self.night = night
        self.horizon = 38 if brush.clean else 38 + brush.integer(-8, 8)
        sky: Colour = (18, 22, 50) if night else (150, 195, 235)
        if not brush.clean and not night and brush.chance(0.35):
            sky = (235, 160, 110)
        pixels = np.zeros((SIZE, SIZE, 3), np.float32) + np.array(brush.near(sky, 6 if brush.clean else 24))
        pixels += np.linspace(-1, 1, SIZE, dtype=np.float32)[:, None, None] * (12 if night else 25)
        if not brush.clean:
            pixels += brush.noise(5, 22)[..., None]
        self.image = to_image(pixels)
        self.pen = ImageDraw.Draw(self.image)
        if brush.clean or brush.chance(0.6):
            x, y, radius = brush.integer(8, 55), brush.integer(6, 15), brush.integer(3, 5)
            light: Colour = (235, 235, 225) if night else (250, 235, 140)
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=light)

    def tone(self, colour: Colour, spread: int | None = None) -> Colour:
        """A surface of this colour in the light of the scene."""
        light = 0.3 if self.night else 1.0
        wide = spread if spread is not None else (6 if self.brush.clean else 22)
        red, green, blue = (int(value * light) for value in colour)
        return self.brush.near((red, green, blue), max(3, int(wide * (light + 0.1))))

    def ground(self, colour: Colour) -> None:
        self.pen.rectangle((0, self.horizon, SIZE, SIZE), fill=self.tone(colour))

    def mountain(self) -> None:
        brush, horizon = self.brush, self.horizon
        for _ in range(brush.integer(2, 3)):
            x, half, height = brush.integer(4, 59), brush.integer(18, 33), brush.integer(18, 31)
            rock, snow = self.tone((120, 115, 120)), self.tone((245, 245, 250))
            self.pen.polygon(((x - half, horizon + 4), (x, horizon - height), (x + half, horizon + 4)), fill=rock)
            cap = (x - 0.25 * half, horizon - 0.72 * height), (x + 0.25 * half, horizon - 0.72 * height)
            self.pen.polygon((cap[0], (x, horizon - height), cap[1]), fill=snow)
        self.ground((95, 130, 76))

    def city(self) -> None:
        brush, left = self.brush, 0
        while left < SIZE:
            width, height = brush.integer(6, 12), brush.integer(12, 33)
            top = self.horizon - height
            self.pen.rectangle((left, top, left + width, SIZE), fill=self.tone((130, 130, 140)))
            window = _WINDOW_LIGHT if self.night else (80, 90, 110)
            for y in range(top + 2, SIZE, 4):
                for x in range(left + 2, left + width - 1, 3):
                    if brush.chance(0.6):
                        self.pen.rectangle((x, y, x, y + 1), fill=window)
            left += width + brush.integer(0, 2)

    def forest(self) -> None:
        brush = self.brush
        self.ground((70, 100, 52))
        for _ in range(brush.integer(7, 11)):
            x, foot = brush.integer(0, 63), self.horizon + brush.integer(0, 15)
            half, height = brush.integer(5, 8), brush.integer(18, 33)
            self.pen.rectangle((x - 1, foot - 4, x + 1, foot), fill=self.tone((90, 60, 36)))
            crown = ((x - half, foot - 3), (x, foot - height), (x + half, foot - 3))
            self.pen.polygon(crown, fill=self.tone((36, 95, 46)))

    def desert(self) -> None:
        brush = self.brush
        for dune in range(3):
            crest, phase, length = self.horizon - 4 + 9 * dune, brush.uniform(0, 6), brush.uniform(8, 16)
            ridge = [(x, crest + 5 * math.sin(x / length + phase)) for x in range(0, SIZE + 1, 2)]
            sand = (225 - 18 * dune, 185 - 18 * dune, 120 - 14 * dune)
            self.pen.polygon([*ridge, (SIZE, SIZE), (0, SIZE)], fill=self.tone(sand, 5 if brush.clean else 13))

    def sea(self) -> None:
        brush, horizon = self.brush, self.horizon
        self.ground((36, 96, 150))
        for _ in range(14):
            x, y = brush.integer(0, 59), brush.integer(horizon + 1, SIZE - 1)
            self.pen.line((x, y, x + brush.integer(4, 9), y), fill=self.tone((130, 175, 210)))
        if brush.chance(0.5):
            x = brush.integer(12, 49)
            self.pen.polygon(
                ((x, horizon - 12), (x, horizon - 1), (x + 8, horizon - 1)), fill=self.tone((250, 250, 250))
            )
            hull = ((x - 6, horizon), (x + 9, horizon), (x + 6, horizon + 4), (x - 3, horizon + 4))
            self.pen.polygon(hull, fill=self.tone((120, 60, 40)))

    def village(self) -> None:
        brush = self.brush
        self.ground((105, 140, 80))
        for _ in range(brush.integer(2, 4)):
            x, foot = brush.integer(0, 51), self.horizon + brush.integer(0, 11)
            width, height = brush.integer(10, 16), brush.integer(8, 12)
            self.pen.rectangle((x, foot - height, x + width, foot), fill=self.tone((225, 205, 175)))
            roof = ((x - 2, foot - height), (x + width // 2, foot - height - 8), (x + width + 2, foot - height))
            self.pen.polygon(roof, fill=self.tone((170, 66, 50)))
            door = _WINDOW_LIGHT if self.night else self.tone((90, 60, 36))
            self.pen.rectangle((x + width // 2 - 2, foot - 6, x + width // 2 + 1, foot), fill=door)


def landscape(brush: Brush, label: int) -> Image.Image:
    """A landscape in its own colours, RGB, ``SIZE`` x ``SIZE``."""
    scene = _Scene(brush, night=label % 2 == 1)
    getattr(scene, _PLACES[label // 2])()
    image: Image.Image = scene.image
    return image


def draw_scene(brush: Brush, label: int) -> np.ndarray:
    """A landscape, uint8 ``[32, 32, 3]``."""
    image = landscape(brush, label)
    if brush.clean:
        return photograph(image, brush, blur=0.5, grain=2)
    faded = np.asarray(image, np.float32) @ np.array((0.25, 0.6, 0.15), np.float32)
    tone = brush.near((232, 200, 150), 18)  # a photograph of a hundred years ago: one tone, faded, grainy
    pixels = 22 + 1.2 * faded[..., None] * np.array(tone, np.float32) / 255
    return photograph(to_image(pixels), brush, blur=1.2, grain=12, exposure=0.35)
