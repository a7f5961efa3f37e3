"""What every drawn task shares: a seeded brush, palettes disjoint between splits, noise, and the final photo."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lit_merge.data.embedded.glyphs import GlyphAtlas

__all__ = ["COLOURS", "SIZE", "Brush", "Colour", "compose", "luminance", "photograph", "polygon_points", "to_image"]

SIZE = 64
"""Side of the drawing surface in pixels; :func:`photograph` halves it."""

Colour = tuple[int, int, int]
Choice = TypeVar("Choice")

COLOURS: dict[str, Colour] = {
    "red": (205, 40, 40),
    "green": (45, 160, 65),
    "blue": (45, 75, 205),
    "yellow": (232, 212, 50),
    "orange": (238, 138, 30),
    "purple": (135, 50, 170),
    "white": (243, 243, 243),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "pink": (243, 145, 180),
    "brown": (118, 74, 38),
    "cyan": (62, 200, 218),
}

_FRACTIONS = {"train": 0.58, "val": 0.16, "test": 0.26}
_LEVELS = 6  # the RGB cube is cut into 6 x 6 x 6 cells; each cell belongs to one split


@functools.cache
def _cells(split: str, count: int, purpose: str) -> tuple[int, ...]:
    """The cells out of ``count`` that belong to a split; pre-training draws from all of them."""
    if split == "pretrain":
        return tuple(range(count))
    order = np.random.default_rng(zlib.crc32(purpose.encode())).permutation(count)
    start = 0.0
    for name, fraction in _FRACTIONS.items():
        if name == split:
            chosen = order[round(start * count) : round((start + fraction) * count)]
            return tuple(int(cell) for cell in chosen)
        start += fraction
    raise KeyError(split)


def luminance(colour: Colour) -> float:
    """Perceived brightness in [0, 255]."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


class Brush:
    """A source of random choices for one image: everything drawn is a function of its seed and split.

    Args:
        seed: integers that identify the image.
        split: ``"pretrain"``, ``"train"``, ``"val"`` or ``"test"``; selects the fonts and the palette.
    """

    def __init__(self, seed: Sequence[int], split: str) -> None:
        self.random = np.random.default_rng(list(seed))
        self.split = split
        self.clean = split == "pretrain"
        atlas = GlyphAtlas.load()
        self._atlas = atlas
        self.font = int(self.random.integers(atlas.pool_size(split)))

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return float(self.random.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return int(self.random.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.random.random() < probability)

    def choose(self, options: Sequence[Choice]) -> Choice:
        """One of the options."""
        return options[int(self.random.integers(len(options)))]

    def near(self, centre: Colour, spread: int = 20) -> Colour:
        """A colour around ``centre``: 3 x 3 x 3 cells of side ``spread``, each owned by one split, jitter inside."""
        if self.clean:
            offset = self.random.uniform(-0.8 * spread, 0.8 * spread, 3)
        else:
            cell = self.choose(_cells(self.split, 27, f"near{centre}"))
            position = np.array([cell // 9, cell // 3 % 3, cell % 3]) - 1
            offset = spread * (position + self.random.uniform(-0.45, 0.45, 3))
        return _to_colour(np.asarray(centre) + offset)

    def named(self, name: str, spread: int = 20) -> Colour:
        """A variant of a named colour from this split's palette."""
        return self.near(COLOURS[name], spread)

    def any_colour(self) -> Colour:
        """Any colour of this split's palette."""
        if self.clean:
            return self.named(self.choose(list(COLOURS)))
        cell = self.choose(_cells(self.split, _LEVELS**3, "cube"))
        position = np.array([cell // _LEVELS**2, cell // _LEVELS % _LEVELS, cell % _LEVELS])
        return _to_colour((position + self.random.uniform(0.05, 0.95, 3)) * 256 / _LEVELS)

    def contrasting(self, colour: Colour, gap: float = 75) -> Colour:
        """A colour of the palette whose brightness differs from ``colour`` by more than ``gap``."""
        for _ in range(40):
            candidate = self.any_colour()
            if abs(luminance(candidate) - luminance(colour)) > gap:
                return candidate
        return self.named("white" if luminance(colour) < 128 else "black", 12)

    def noise(self, cells: int, amplitude: float) -> np.ndarray:
        """A smooth random field, float32 ``[SIZE, SIZE]``, in about ``[-amplitude, amplitude]``."""
        coarse = self.random.uniform(-1, 1, (cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) * amplitude

    def ground(self, colour: Colour, clutter: float) -> Image.Image:
        """A background: the colour, overlapping shapes and smooth noise, all growing with ``clutter`` (0 is plain)."""
        image = Image.new("RGB", (SIZE, SIZE), colour)
        if clutter == 0:
            return image
        pen = ImageDraw.Draw(image)
        for _ in range(int(self.uniform(0, 6) * clutter)):
            x, y = self.integer(0, SIZE), self.integer(0, SIZE)
            half_width, half_height = self.integer(3, 18), self.integer(3, 18)
            shape = pen.rectangle if self.chance(0.5) else pen.ellipse
            shape((x - half_width, y - half_height, x + half_width, y + half_height), fill=self.near(colour, 34))
        shade = self.noise(self.integer(2, 8), 32 * clutter)[..., None] * self.random.uniform(0.5, 1, 3)
        return Image.fromarray(np.clip(np.asarray(image, np.float32) + shade, 0, 255).astype(np.uint8))

    def glyph(self, character: str) -> Image.Image:
        """The character in this image's font, grey-scale ink on a ``SIZE`` x ``SIZE`` surface."""
        ink = Image.fromarray(self._atlas.glyph(self.split, self.font, character))
        surface = Image.new("L", (SIZE, SIZE), 0)
        surface.paste(ink, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2))
        return surface

    def tilt(
        self,
        image: Image.Image,
        degrees: float,
        scale: tuple[float, float],
        shear: float = 0.0,
        shift: float = 3.0,
        centre: tuple[float, float] = (0.0, 0.0),
    ) -> Image.Image:
        """Rotate, scale, shear and shift by random amounts within the given ranges, around the image's middle."""
        angle = math.radians(self.uniform(-degrees, degrees))
        inverse = 1 / self.uniform(*scale)
        slant = self.uniform(-shear, shear)
        cosine, sine = math.cos(angle) * inverse, math.sin(angle) * inverse
        matrix = np.array([[cosine, -sine + slant], [sine, cosine]])
        moved = np.array(centre) + self.random.uniform(-shift, shift, 2)
        middle = np.full(2, SIZE / 2)
        offset = middle - matrix @ (middle + moved)
        coefficients = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
        return image.transform((SIZE, SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)

    def wave(self, image: Image.Image, amplitude: float) -> Image.Image:
        """Bend an image by a sine wave along each axis, of up to ``amplitude`` pixels."""
        rows, columns = np.mgrid[0:SIZE, 0:SIZE]
        bent = []
        for along, across in ((columns, rows), (rows, columns)):
            turns, phase = self.uniform(0.6, 1.3), self.uniform(0, 2 * math.pi)
            shift = self.uniform(0.4, 1) * amplitude * np.sin(2 * math.pi * turns * along / SIZE + phase)
            bent.append(np.clip(np.rint(across + shift), 0, SIZE - 1).astype(int))
        return Image.fromarray(np.asarray(image)[bent[0], bent[1]])


def _to_colour(values: np.ndarray) -> Colour:
    red, green, blue = (int(value) for value in np.clip(values, 0, 255))
    return red, green, blue


def polygon_points(
    corners: int, radius: float, start: float, centre: tuple[float, float] = (SIZE / 2, SIZE / 2)
) -> list[tuple[float, float]]:
    """The corners of a regular polygon; ``start`` is the first corner's angle in radians."""
    return [
        (
            centre[0] + radius * math.cos(start + 2 * math.pi * corner / corners),
            centre[1] + radius * math.sin(start + 2 * math.pi * corner / corners),
        )
        for corner in range(corners)
    ]


def compose(background: Image.Image, drawing: Image.Image) -> Image.Image:
    """Lay an RGBA drawing over an RGB background."""
    background.paste(drawing, (0, 0), drawing)
    return background


def to_image(values: np.ndarray) -> Image.Image:
    """Float array ``[SIZE, SIZE, 3]`` in [0, 255] to an RGB image."""
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def photograph(
    image: Image.Image, brush: Brush, blur: float = 0.0, grain: float = 0.0, exposure: float = 0.0
) -> np.ndarray:
    """Halve the drawing to 32 x 32 as a camera would.

    Args:
        image: RGB, ``SIZE`` x ``SIZE``.
        brush: supplies the random amounts.
        blur: largest Gaussian radius, in drawing pixels.
        grain: largest standard deviation of the additive noise, in grey levels.
        exposure: 0 … 1, how much contrast and brightness vary.

    Returns:
        uint8 ``[32, 32, 3]``.
    """
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(brush.uniform(0, blur)))
    pixels = np.asarray(image.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX), np.float32)
    if exposure:
        contrast = brush.uniform(1 - exposure, 1 + 0.3 * exposure)
        pixels = (pixels - 128) * contrast + 128 + brush.uniform(-80, 60) * exposure
    if grain:
        pixels = pixels + brush.random.normal(0, brush.uniform(0, grain), pixels.shape).astype(np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)
