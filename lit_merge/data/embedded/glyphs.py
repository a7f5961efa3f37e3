"""The glyphs that the embedded image-classification suite is drawn with.

The glyphs were rendered once from freely licensed fonts (see ``benchmarks/build_atlas.py``) and are
stored in one image, so that the suite looks the same on every machine and needs no installed fonts. The fonts are
divided into four pools, and no family of fonts is in more than one of them: what is measured on the ``test`` pool was
never seen in training.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

import numpy as np
from PIL import Image

from lit_merge.errors import DataError

__all__ = ["POOLS", "FontFace", "GlyphAtlas"]

POOLS = ("pretrain", "train", "val", "test")


@dataclass(frozen=True)
class FontFace:
    """One font of the atlas.

    Attributes:
        pool: The pool that the font belongs to: ``pretrain``, ``train``, ``val`` or ``test``.
        family: The family group; fonts of one group look alike and are never in two pools.
        face: The name of the font's file without its suffix, e.g. ``DejaVuSans-Bold``.
        licence: The SPDX identifier of the font's licence.
        characters: The characters that were rendered, in the order of their cells.
        first_cell: The number of the cell that holds the first character.
    """

    pool: str
    family: str
    face: str
    licence: str
    characters: str
    first_cell: int


class GlyphAtlas:
    """Rendered characters of many fonts, divided into pools of families that do not overlap.

    Use :meth:`load`; the constructor is for atlases other than the one in the package.

    Args:
        cells: The glyphs, ``uint8`` of shape ``[cells, height, width]``: 0 is background, 255 is ink.
        fonts: The fonts whose characters the cells hold.

    Attributes:
        fonts: Every font of the atlas, pool by pool.
    """

    fonts: tuple[FontFace, ...]

    def __init__(self, cells: np.ndarray, fonts: tuple[FontFace, ...]) -> None:
        self.fonts = fonts
        self._cells = cells
        self._cells.flags.writeable = False
        self._pools = {pool: tuple(font for font in fonts if font.pool == pool) for pool in POOLS}

    @classmethod
    def load(cls) -> GlyphAtlas:
        """Read the atlas that comes with the package; it is read once and then shared.

        Raises:
            DataError: The files of the atlas are missing or do not belong together.
        """
        return _load_packaged_atlas()

    def pool_size(self, pool: str) -> int:
        """Return the number of fonts in ``pool``.

        Raises:
            DataError: There is no such pool.
        """
        return len(self._fonts_of(pool))

    def characters(self, pool: str) -> str:
        """Return the characters that every font of ``pool`` has.

        Raises:
            DataError: There is no such pool.
        """
        fonts = self._fonts_of(pool)
        return fonts[0].characters if fonts else ""

    def glyph(self, pool: str, font: int, character: str) -> np.ndarray:
        """Return one glyph: white ink on black, centred by its ink, read-only.

        Args:
            pool: ``pretrain``, ``train``, ``val`` or ``test``.
            font: The number of the font within the pool, from 0 to ``pool_size(pool) - 1``.
            character: A single character of ``characters(pool)``.

        Returns:
            ``uint8`` of shape ``[48, 48]``, ink from 0 to 255.

        Raises:
            DataError: There is no such pool, font or character.
        """
        fonts = self._fonts_of(pool)
        if not 0 <= font < len(fonts):
            raise DataError(
                f"Expected a font number from 0 to {len(fonts) - 1} for the glyph pool {pool!r}, got {font}: "
                "take the font modulo pool_size(pool)."
            )
        face = fonts[font]
        position = face.characters.find(character) if len(character) == 1 else -1
        if position < 0:
            raise DataError(
                f"Expected one of the characters {face.characters!r} of the glyph pool {pool!r}, got {character!r}: "
                "draw only characters that characters(pool) lists."
            )
        return self._cells[face.first_cell + position]

    def _fonts_of(self, pool: str) -> tuple[FontFace, ...]:
        try:
            return self._pools[pool]
        except KeyError:
            raise DataError(
                f"Expected a glyph pool among {', '.join(POOLS)}, got {pool!r}: use one of these names."
            ) from None


@functools.cache
def _load_packaged_atlas() -> GlyphAtlas:
    assets = resources.files("lit_merge.data.embedded") / "assets"
    try:
        description = json.loads((assets / "glyphs.json").read_text(encoding="utf-8"))
        with (assets / "glyphs.png").open("rb") as stream, Image.open(stream) as image:
            sheet = np.array(image.convert("L"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"Expected the glyph atlas (glyphs.json and glyphs.png) inside the package, got {error}: "
            "reinstall lit-merge, or rebuild the atlas with python benchmarks/build_atlas.py."
        ) from error
    cell, columns = int(description["cell"]), int(description["columns"])
    fonts = tuple(FontFace(**font) for font in description["fonts"])
    height, width = sheet.shape
    needed = max((font.first_cell + len(font.characters) for font in fonts), default=0)
    if width != columns * cell or height % cell or (height // cell) * columns < needed:
        raise DataError(
            f"Expected a glyph sheet {columns * cell} pixels wide with at least {needed} cells of {cell} pixels, "
            f"got {width} x {height} pixels: glyphs.png and glyphs.json are not of one build, reinstall lit-merge."
        )
    grid = sheet.reshape(height // cell, cell, columns, cell).transpose(0, 2, 1, 3)
    return GlyphAtlas(np.ascontiguousarray(grid).reshape(-1, cell, cell), fonts)
