"""Tasks of characters, arrows, clocks, flags, playing cards and dominoes."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from lit_merge.data.embedded.canvas import SIZE, Brush, Colour, polygon_points
from lit_merge.data.embedded.characters import DIGIT_WORDS, LETTERS
from lit_merge.data.embedded.fine.camera import backdrop, blank, stuck
from lit_merge.data.embedded.shapes import draw_shape

__all__ = [
    "ARROWS",
    "CARDS",
    "CLOCKS",
    "COLOURED_LETTERS",
    "DOMINOES",
    "FLAGS",
    "MONOGRAMS",
    "NUMBERS",
    "PLATES",
    "draw_arrow",
    "draw_card",
    "draw_clock",
    "draw_coloured_letter",
    "draw_domino",
    "draw_flag",
    "draw_monogram",
    "draw_number",
    "draw_plate",
]

_MIDDLE = SIZE / 2
_INITIALS = "ABEHKMRSTX"
_INKS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
_PANELS = ("circle", "square", "triangle", "diamond", "hexagon")
_PANEL_COLOURS = ("red", "blue", "yellow")
_DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
_HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
_MINUTES = ("{} o'clock", "ten past {}", "twenty past {}", "half past {}", "twenty to {next}", "ten to {next}")
_STRIPES = ("red", "white", "blue", "green", "yellow", "black")
_RANKS = ("ace", *DIGIT_WORDS[2:], "ten", "jack", "queen", "king")
_INDICES = ("A", *"23456789", "10", "J", "Q", "K")
_SUITS = ("hearts", "diamonds", "clubs", "spades")
_PIPS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
# Cells of a three by three grid, as on dice.
_PIP_CELLS = (
    *((4,), (0, 8), (0, 4, 8), (0, 2, 6, 8), (0, 2, 4, 6, 8), (0, 2, 3, 5, 6, 8), (0, 2, 3, 4, 5, 6, 8)),
    (0, 1, 2, 3, 5, 6, 7, 8),
)

NUMBERS = tuple(f"{tens} {ones}" for tens in DIGIT_WORDS for ones in DIGIT_WORDS)
MONOGRAMS = tuple(f"{first} {second}" for first in _INITIALS for second in _INITIALS)
COLOURED_LETTERS = tuple(f"{colour} letter {letter}" for colour in _INKS for letter in LETTERS)
PLATES = tuple(
    f"{colour} {panel} with the number {digit}"
    for colour in _PANEL_COLOURS
    for panel in _PANELS
    for digit in DIGIT_WORDS
)
ARROWS = tuple(f"{colour} arrow pointing {direction}" for colour in _INKS for direction in _DIRECTIONS)
CLOCKS = tuple(
    minute.format(hour, next=_HOURS[(place + 1) % 12]) for place, hour in enumerate(_HOURS) for minute in _MINUTES
)
_FLAGS = tuple(permutations(_STRIPES, 3))
FLAGS = tuple(" ".join(stripes) for stripes in _FLAGS)
CARDS = tuple(f"{rank} of {suit}" for suit in _SUITS for rank in _RANKS)
DOMINOES = tuple(f"{upper} over {lower}" for upper in _PIPS for lower in _PIPS)


def _written(brush: Brush, text: str, side: int, pitch: int, y: float = _MIDDLE) -> Image.Image:
    """Characters side by side in this image's font, grey-scale ink."""
    surface = Image.new("L", (SIZE, SIZE), 0)
    for place, character in enumerate(text):
        glyph = brush.glyph(character).resize((side, side), Image.Resampling.BILINEAR)
        x = _MIDDLE + pitch * (place - (len(text) - 1) / 2) - side / 2
        surface.paste(255, (round(x), round(y - side / 2)), glyph)
    return surface


def _inked(mask: Image.Image, ink: Colour) -> Image.Image:
    drawing = Image.new("RGBA", (SIZE, SIZE), (*ink, 0))
    drawing.putalpha(mask)
    return drawing


def draw_number(brush: Brush, label: int) -> np.ndarray:
    """A number of two digits, uint8 ``[32, 32, 3]``."""
    ink = brush.any_colour()
    return stuck(brush, backdrop(brush, ink), _inked(_written(brush, f"{label:02d}", 62, 28), ink), 9)


def draw_monogram(brush: Brush, label: int) -> np.ndarray:
    """Two letters, uint8 ``[32, 32, 3]``."""
    ink = brush.any_colour()
    text = _INITIALS[label // len(_INITIALS)] + _INITIALS[label % len(_INITIALS)]
    return stuck(brush, backdrop(brush, ink), _inked(_written(brush, text, 58, 29), ink), 9)


def draw_coloured_letter(brush: Brush, label: int) -> np.ndarray:
    """A letter in one of eight colours, uint8 ``[32, 32, 3]``."""
    ink = brush.named(_INKS[label // len(LETTERS)], 14)
    letter = _inked(brush.glyph(LETTERS[label % len(LETTERS)]), ink)
    return stuck(brush, backdrop(brush, ink, 55), letter, 16, 4)


def draw_plate(brush: Brush, label: int) -> np.ndarray:
    """A plate of some shape and colour with a digit on it, uint8 ``[32, 32, 3]``."""
    rest, digit = divmod(label, len(DIGIT_WORDS))
    colour, panel = divmod(rest, len(_PANELS))
    fill = brush.named(_PANEL_COLOURS[colour], 14)
    drawing, y = blank(), _MIDDLE + (6 if _PANELS[panel] == "triangle" else 0)
    radius = 32 if _PANELS[panel] in ("triangle", "diamond") else 27
    draw_shape(ImageDraw.Draw(drawing), _PANELS[panel], _MIDDLE, y, radius, fill)
    drawing.paste((*brush.contrasting(fill, 80), 255), (0, 0), _written(brush, str(digit), 46, 0, y))
    return stuck(brush, backdrop(brush, fill, 45), drawing, 9)


def draw_arrow(brush: Brush, label: int) -> np.ndarray:
    """An arrow in one of eight directions and colours, uint8 ``[32, 32, 3]``."""
    colour, direction = divmod(label, len(_DIRECTIONS))
    ink = brush.named(_INKS[colour], 14)
    angle = math.pi / 4 * direction + brush.uniform(-0.12, 0.12)
    cosine, sine = math.cos(angle), math.sin(angle)
    stem, head = brush.uniform(4, 7), brush.uniform(13, 17)
    outline = [(-25, -stem), (3, -stem), (3, -head), (26, 0), (3, head), (3, stem), (-25, stem)]
    drawing = blank()
    pointed = [(_MIDDLE + x * cosine - y * sine, _MIDDLE + x * sine + y * cosine) for x, y in outline]
    ImageDraw.Draw(drawing).polygon(pointed, fill=ink)
    return stuck(brush, backdrop(brush, ink, 55), drawing, 5)


def draw_clock(brush: Brush, label: int) -> np.ndarray:
    """A clock face with two hands, at full tens of minutes, uint8 ``[32, 32, 3]``."""
    hour, tens = divmod(label, len(_MINUTES))
    face = brush.any_colour()
    ink = brush.contrasting(face, 95)
    drawing = blank()
    pen = ImageDraw.Draw(drawing)
    pen.ellipse((2, 2, 62, 62), fill=face, outline=ink, width=2)
    for mark in polygon_points(12, 26, 0, (_MIDDLE, _MIDDLE)):
        pen.ellipse((mark[0] - 1, mark[1] - 1, mark[0] + 1, mark[1] + 1), fill=ink)
    for turn, length, width in (((hour + tens / 6) / 12, 14, 5), (tens / 6, 24, 3)):
        angle = 2 * math.pi * turn - math.pi / 2
        tip = (_MIDDLE + length * math.cos(angle), _MIDDLE + length * math.sin(angle))
        pen.line(((_MIDDLE, _MIDDLE), tip), fill=ink, width=width)
    return stuck(brush, backdrop(brush, face), drawing, 4, 2)


def draw_flag(brush: Brush, label: int) -> np.ndarray:
    """A flag of three horizontal stripes, blown by the wind in the task, uint8 ``[32, 32, 3]``."""
    drawing = blank()
    pen = ImageDraw.Draw(drawing)
    for place, colour in enumerate(_FLAGS[label]):
        pen.rectangle((4, 11 + 14 * place, 60, 24 + 14 * place), fill=brush.named(colour, 14))
    if not brush.clean:
        drawing = brush.wave(drawing, 4)
    return stuck(brush, brush.ground(brush.near((150, 165, 180), 26), 0.0 if brush.clean else 0.6), drawing, 9)


def _suit(pen: ImageDraw.ImageDraw, suit: str, x: float, y: float, size: float, ink: Colour) -> None:
    def disc(across: float, down: float, radius: float) -> None:
        pen.ellipse((x + across - radius, y + down - radius, x + across + radius, y + down + radius), fill=ink)

    if suit == "diamonds":
        pen.polygon(((x, y - size), (x + 0.75 * size, y), (x, y + size), (x - 0.75 * size, y)), fill=ink)
        return
    half = 0.5 * size
    if suit == "hearts":
        disc(-half, -0.35 * size, half + 1)
        disc(half, -0.35 * size, half + 1)
        pen.polygon(((x - size, y - 0.1 * size), (x + size, y - 0.1 * size), (x, y + size)), fill=ink)
        return
    if suit == "spades":
        disc(-half, 0.25 * size, half)
        disc(half, 0.25 * size, half)
        pen.polygon(((x - size, y + 0.2 * size), (x + size, y + 0.2 * size), (x, y - size)), fill=ink)
    else:
        disc(0, -half, half)
        disc(-half, 0.3 * size, half)
        disc(half, 0.3 * size, half)
    pen.polygon(((x, y), (x + 0.35 * size, y + size), (x - 0.35 * size, y + size)), fill=ink)


def draw_card(brush: Brush, label: int) -> np.ndarray:
    """A playing card: its rank above its suit, uint8 ``[32, 32, 3]``."""
    suit, rank = divmod(label, len(_RANKS))
    paper = brush.near((240, 240, 236), 12)
    ink = brush.near((200, 30, 36), 14) if suit < 2 else brush.near((24, 24, 26), 12)
    drawing = blank()
    pen = ImageDraw.Draw(drawing)
    pen.rounded_rectangle((9, 1, 55, 63), radius=5, fill=paper, outline=(110, 110, 110))
    drawing.paste((*ink, 255), (0, 0), _written(brush, _INDICES[rank], 44, 19, 18))
    _suit(pen, _SUITS[suit], _MIDDLE, 46, 12, ink)
    table: Colour = (50, 110, 70)
    return stuck(brush, brush.ground(brush.near(table, 26), 0.0 if brush.clean else 0.7), drawing, 12)


def draw_domino(brush: Brush, label: int) -> np.ndarray:
    """A domino with one to eight pips on each half, uint8 ``[32, 32, 3]``."""
    tile = brush.any_colour()
    ink = brush.contrasting(tile, 100)
    drawing = blank()
    pen = ImageDraw.Draw(drawing)
    pen.rounded_rectangle((15, 1, 49, 63), radius=4, fill=tile)
    pen.line((18, 32, 46, 32), fill=ink, width=1)
    for top, pips in ((7, label // len(_PIPS)), (38, label % len(_PIPS))):
        for cell in _PIP_CELLS[pips]:
            x, y = 22 + 10 * (cell % 3), top + 9 * (cell // 3)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
    return stuck(brush, backdrop(brush, tile), drawing, 9, 2)
