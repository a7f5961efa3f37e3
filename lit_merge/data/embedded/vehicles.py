"""Vehicles from the side (the suite's Cars): eight bodies in any colour."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import SIZE, Brush, compose, photograph

__all__ = ["PAINTS", "VEHICLES", "draw_vehicle", "vehicle_body"]

VEHICLES = ("sedan", "hatchback", "van", "bus", "pickup truck", "lorry", "tanker", "sports car")
PAINTS = ("red", "blue", "white", "gray", "yellow", "green", "black", "orange")
_SILL = 45


def vehicle_body(brush: Brush, vehicle: str, colour: str | None = None) -> Image.Image:
    """A vehicle facing right, RGBA on a transparent surface, in any paint or in a named colour."""
    drawing = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(drawing)
    if colour is not None:
        paint = brush.named(colour)
    else:
        paint = brush.named(brush.choose(PAINTS)) if brush.clean else brush.any_colour()
    glass, dark = brush.near((152, 196, 220), 18), brush.near((58, 58, 58), 8)
    rise = 0 if brush.clean else brush.integer(-1, 1)
    if vehicle == "sedan":
        pen.rectangle((4, 32 + rise, 60, _SILL), fill=paint)
        pen.polygon(((15, 33), (22, 20 + rise), (41, 20 + rise), (49, 33)), fill=paint)
        pen.polygon(((19, 32), (24, 23), (30, 23), (30, 32)), fill=glass)
        pen.polygon(((33, 32), (33, 23), (40, 23), (45, 32)), fill=glass)
        wheels: tuple[int, ...] = (16, 48)
    elif vehicle == "hatchback":
        pen.rectangle((12, 30 + rise, 53, _SILL), fill=paint)
        pen.polygon(((12, 31), (13, 17 + rise), (35, 17 + rise), (45, 31)), fill=paint)
        pen.rectangle((16, 20, 23, 29), fill=glass)
        pen.polygon(((26, 29), (26, 20), (34, 20), (41, 29)), fill=glass)
        wheels = (19, 46)
    elif vehicle == "van":
        pen.rectangle((6, 14 + rise, 47, _SILL), fill=paint)
        pen.polygon(((46, 14 + rise), (58, 31), (58, _SILL), (46, _SILL)), fill=paint)
        pen.polygon(((43, 18), (47, 18), (54, 30), (43, 30)), fill=glass)
        wheels = (17, 48)
    elif vehicle == "bus":
        pen.rectangle((2, 15 + rise, 62, _SILL), fill=paint)
        for left in range(5, 50, 9):
            pen.rectangle((left, 20, left + 6, 29), fill=glass)
        pen.rectangle((54, 20, 61, 36), fill=glass)
        wheels = (14, 49)
    elif vehicle == "pickup truck":
        pen.rectangle((4, 34 + rise, 60, _SILL), fill=paint)
        pen.polygon(((31, 34), (32, 19 + rise), (44, 19 + rise), (50, 34)), fill=paint)
        pen.polygon(((35, 32), (35, 22), (43, 22), (47, 32)), fill=glass)
        pen.rectangle((4, 31, 6, 34), fill=paint)
        wheels = (16, 49)
    elif vehicle == "lorry":
        box = brush.named("white", 14) if brush.clean else brush.any_colour()
        pen.rectangle((2, 10 + rise, 42, 41), fill=box)
        pen.rectangle((44, 20 + rise, 61, _SILL), fill=paint)
        pen.rectangle((52, 23, 60, 32), fill=glass)
        pen.rectangle((2, 41, 46, _SILL), fill=dark)
        wheels = (10, 21, 53)
    elif vehicle == "tanker":
        tank = brush.near((190, 195, 200), 14) if brush.clean else brush.any_colour()
        pen.rounded_rectangle((2, 18 + rise, 42, 40), radius=11, fill=tank)
        pen.rectangle((44, 20 + rise, 61, _SILL), fill=paint)
        pen.rectangle((52, 23, 60, 32), fill=glass)
        pen.rectangle((6, 42, 46, _SILL), fill=dark)
        wheels = (10, 21, 53)
    else:
        outline = ((3, 37), (11, 32), (21, 31), (29, 25 + rise), (39, 25 + rise), (48, 34), (62, 39))
        pen.polygon((*outline, (62, _SILL), (3, _SILL)), fill=paint)
        pen.polygon(((26, 32), (31, 27), (38, 27), (44, 33)), fill=glass)
        pen.rectangle((2, 27, 9, 30), fill=paint)
        wheels = (15, 49)
    for middle in wheels:
        pen.ellipse((middle - 5, _SILL - 3, middle + 5, _SILL + 7), fill=(25, 25, 25))
        pen.ellipse((middle - 2, _SILL, middle + 2, _SILL + 4), fill=(150, 150, 150))
    return drawing


def draw_vehicle(brush: Brush, label: int) -> np.ndarray:
    """A vehicle on its road, facing either way, uint8 ``[32, 32, 3]``."""
    drawing = vehicle_body(brush, VEHICLES[label])
    if brush.chance(0.5):
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if brush.clean:
        drawing = brush.tilt(drawing, 2, (0.85, 1.0), 0.02)
        image = Image.new("RGB", (SIZE, SIZE), brush.near((226, 230, 235), 14))
        ImageDraw.Draw(image).rectangle((0, 45, SIZE, SIZE), fill=brush.near((110, 110, 110), 14))
        return photograph(compose(image, drawing), brush, blur=0.5)
    drawing = brush.tilt(drawing, 7, (0.8, 1.02), 0.12, shift=4)
    horizon = brush.choose(((150, 180, 210), (120, 110, 100), (90, 110, 80)))
    image = brush.ground(brush.near(horizon, 30), 0.8)
    road = (0, brush.integer(38, 47), SIZE, SIZE)
    ImageDraw.Draw(image).rectangle(road, fill=brush.near((100, 98, 95), 24))
    return photograph(compose(image, drawing), brush, blur=1.1, grain=11, exposure=0.4)
