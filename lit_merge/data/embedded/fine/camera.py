"""How the finer tasks' drawings become photographs: plain for pre-training, cluttered and worn in the tasks."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lit_merge.data.embedded.canvas import SIZE, Brush, Colour, compose, photograph, to_image

__all__ = ["backdrop", "blank", "shot", "stuck", "turned"]

# The colour of the light: noon, an overcast sky, late afternoon.
_LIGHTS = ((1.0, 1.0, 1.0), (0.86, 0.94, 1.0), (1.0, 0.9, 0.74))


def blank() -> Image.Image:
    """A transparent RGBA surface."""
    return Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))


def backdrop(brush: Brush, ink: Colour, gap: float = 70, clutter: float = 0.8) -> Image.Image:
    """What is behind a drawing of one colour: a colour of another brightness, with clutter in the tasks."""
    return brush.ground(brush.contrasting(ink, gap), 0.0 if brush.clean else clutter)


def turned(brush: Brush, drawing: Image.Image, degrees: float = 12, shift: float = 3.0) -> Image.Image:
    """A drawing as it is held: upright for pre-training, turned, sheared and moved in the tasks."""
    if brush.clean:
        return brush.tilt(drawing, 2, (0.9, 1.05), 0.02, shift=1)
    return brush.tilt(drawing, degrees, (0.8, 1.05), 0.12, shift=shift)


def stuck(
    brush: Brush, image: Image.Image, drawing: Image.Image, degrees: float = 12, shift: float = 3.0
) -> np.ndarray:
    """An RGBA drawing on a backdrop, photographed, uint8 ``[32, 32, 3]``."""
    return shot(brush, compose(image, turned(brush, drawing, degrees, shift)))


def shot(brush: Brush, image: Image.Image) -> np.ndarray:
    """The photograph, uint8 ``[32, 32, 3]``."""
    if brush.clean:
        return photograph(image, brush, blur=0.5)
    lit = to_image(np.asarray(image, np.float32) * np.array(brush.choose(_LIGHTS)))
    return photograph(lit, brush, blur=1.3, grain=12, exposure=0.35)
