"""Plain shapes, by name."""

from __future__ import annotations

import math

from PIL import ImageDraw

from lit_merge.data.embedded.canvas import Colour, polygon_points

__all__ = ["SHAPES", "draw_shape"]

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon")


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: Colour | int | tuple[int, ...]
) -> None:
    """Draw one of :data:`SHAPES`, its middle at ``(x, y)``, within ``radius`` pixels of it."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "star":
        outer = polygon_points(5, radius, -math.pi / 2, (x, y))
        inner = polygon_points(5, 0.42 * radius, -math.pi / 2 + math.pi / 5, (x, y))
        pen.polygon([point for pair in zip(outer, inner, strict=True) for point in pair], fill=fill)
    elif shape == "cross":
        pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=fill)
        pen.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, int(0.35 * radius)))
    else:
        corners, start = {"triangle": (3, -math.pi / 2), "diamond": (4, 0.0), "hexagon": (6, 0.0)}[shape]
        pen.polygon(polygon_points(corners, radius, start, (x, y)), fill=fill)
