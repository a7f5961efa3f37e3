"""Render the glyph atlas of the embedded suite from freely licensed fonts.

This is run by developers only, when ``fonts.json`` changes; its results are part of the package. ``fonts.json`` lists
the families, their pools, the Debian packages they come from and their licences. On a Debian system (the committed
atlas was made from Debian 12) the folder of fonts is made with ::

    mkdir fonts && cd fonts
    for package in $(python benchmarks/build_atlas.py --list-packages); do
        apt-get download "$package" && dpkg -x "$package"_*.deb "$package"
    done

and the atlas, from the root of the repository, with ::

    python benchmarks/build_atlas.py --fonts fonts

Every character is drawn large and reduced by averaging, so that no hinting is involved. Within a font all characters
have one scale, which makes the capital H 30 pixels high.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFont

from lit_merge.data.embedded.glyphs import POOLS, FontFace
from lit_merge.errors import DataError, first_few

__all__ = ["CELL", "CHARACTERS", "COLUMNS", "build_atlas", "main"]

CELL = 48
COLUMNS = 64
CHARACTERS = {
    "pretrain": string.digits + string.ascii_uppercase + string.ascii_lowercase + "?!+&=%#@$",
    "train": string.digits + string.ascii_uppercase,
    "val": string.digits + string.ascii_uppercase,
    "test": string.digits + string.ascii_uppercase,
}
ALLOWED_LICENCES = (
    "Apache-2.0",
    "Bitstream-Vera",
    "LicenseRef-GUST-Font-License",
    "LPPL-1.3c",
    "MIT",
    "OFL-1.1",
)

_HEIGHT_OF_H = 30
_LARGEST_INK = 46
_OVERSAMPLING = 8
_GREY_STEP = 17  # 255 / 15: sixteen levels of grey
_LOWEST_FIGURE = 0.85  # of the height of H; old-style figures are as low as small letters and easily misread
_HIGHEST_SMALL_LETTER = 0.9  # of the height of H; in a font of small capitals "a" is not told from "A" by shape


def _find_font(folder: Path, package: str, name: str) -> Path:
    candidates = sorted(
        path
        for path in (folder / package).rglob("*" + Path(name).suffix)
        if not path.is_symlink() and path.as_posix().endswith("/" + name)
    )
    if len(candidates) != 1:
        raise DataError(
            f"Expected exactly one file {name!r} in the unpacked package {package}, got {len(candidates)}: "
            f"unpack the package into {folder / package}, or name the file with enough of its folders in fonts.json."
        )
    return candidates[0]


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    mask = font.getmask(character, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    return image.crop(image.getbbox() or (0, 0, 0, 0))


def _scaled_font(path: Path) -> ImageFont.FreeTypeFont:
    """Open a font at the size that makes its H ``_HEIGHT_OF_H * _OVERSAMPLING`` pixels high."""
    trial_size = 1000
    layout = ImageFont.Layout.BASIC
    height = _ink(ImageFont.truetype(path, trial_size, layout_engine=layout), "H").height
    if not height:
        raise DataError(f"Expected a capital H with ink in {path.name}, got an empty glyph: drop it from fonts.json.")
    size = round(trial_size * _HEIGHT_OF_H * _OVERSAMPLING / height)
    return ImageFont.truetype(path, size, layout_engine=layout)


def _check_font(path: Path, font: ImageFont.FreeTypeFont, characters: str) -> None:
    # fontTools is needed to build the atlas only; Pillow cannot tell whether a font has a character.
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as tables:
        known = frozenset(tables.getBestCmap())
    missing = [character for character in characters if ord(character) not in known]
    missing += [character for character in characters if character not in missing and not _ink(font, character).height]
    if missing:
        raise DataError(
            f"Expected every one of {len(characters)} characters in {path.name}, got none for {first_few(missing)}: "
            "choose another font in fonts.json."
        )
    height = _ink(font, "H").height
    low = [figure for figure in string.digits if _ink(font, figure).height < _LOWEST_FIGURE * height]
    if low:
        raise DataError(
            f"Expected figures as high as capitals in {path.name}, got low ones for {first_few(low)}: "
            "choose a font with lining figures in fonts.json."
        )
    if "a" in characters and _ink(font, "a").height > _HIGHEST_SMALL_LETTER * height:
        raise DataError(
            f"Expected small letters lower than capitals in {path.name}, got small capitals: "
            "choose another font in fonts.json."
        )


def _render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Draw one character, centred by its ink in a cell of ``CELL`` pixels, with sixteen levels of grey."""
    ink = _ink(font, character)
    largest = _LARGEST_INK * _OVERSAMPLING
    if max(ink.size) > largest:
        factor = largest / max(ink.size)
        ink = ink.resize((max(1, round(ink.width * factor)), max(1, round(ink.height * factor))))
    side = CELL * _OVERSAMPLING
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    grey = np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float64)
    return (np.rint(grey / _GREY_STEP) * _GREY_STEP).astype(np.uint8)


def _licence_text(folder: Path, entry: dict[str, Any]) -> str:
    """Read a licence: a whole file, or the body of a stanza of a machine-readable Debian copyright file."""
    path = folder / entry["file"]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"Expected the licence text {entry['file']}, got {error}: unpack its package too.") from error
    if entry["stanza"] is None:
        return "\n".join(lines).strip("\n")
    for number, line in enumerate(lines):
        if line.split() != ["License:", entry["stanza"]]:
            continue
        body = []
        for following in lines[number + 1 :]:
            if not following.startswith((" ", "\t")):
                break
            body.append("" if following.strip() == "." else following)
        if body:
            return textwrap.dedent("\n".join(body)).strip("\n")
    raise DataError(f"Expected the licence {entry['stanza']!r} in {entry['file']}, got none: correct fonts.json.")


def _licence_file(folder: Path, table: dict[str, Any]) -> str:
    heading = (
        "The glyph images in glyphs.png are pictures of characters of the fonts below, rendered by build_atlas.py. "
        "The fonts themselves are not included. Each entry gives the family, the upstream name of its fonts, their "
        "licence and their copyright; the text of every licence follows."
    )
    parts = ["Fonts that the glyph atlas was rendered from", "=" * 44, "", *textwrap.wrap(heading, 100), ""]
    used: set[str] = set()
    for family in table["families"]:
        parts += [family["family"], "-" * len(family["family"])]
        for source in family["sources"]:
            used.add(source["licence"])
            parts += [
                f"Upstream name: {source['upstream']} (Debian package {source['package']})",
                f"Licence: {source['licence']}",
                f"Copyright: {source['copyright']}",
                "",
            ]
    if "LicenseRef-GUST-Font-License" in used:
        used.add("LPPL-1.3c")  # its text says that it is the LPPL with two comments
    for identifier, entry in table["licences"].items():
        if identifier in used:
            title = f"{entry['title']} ({identifier})"
            parts += ["=" * 100, title, "=" * 100, "", _licence_text(folder, entry), ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


def _check_table(table: dict[str, Any]) -> None:
    names = [family["family"] for family in table["families"]]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"Expected every family once in fonts.json, got {first_few(repeated)} again: "
            "a family belongs to one pool, join its entries."
        )
    for family in table["families"]:
        if family["pool"] not in POOLS:
            raise DataError(
                f"Expected a pool among {', '.join(POOLS)} for {family['family']}, got {family['pool']!r}: "
                "correct fonts.json."
            )
        for source in family["sources"]:
            if source["licence"] not in ALLOWED_LICENCES or source["licence"] not in table["licences"]:
                raise DataError(
                    f"Expected a licence among {', '.join(ALLOWED_LICENCES)} for {source['upstream']}, "
                    f"got {source['licence']!r}: choose another font in fonts.json."
                )


def build_atlas(fonts: Path, out: Path, table: dict[str, Any]) -> int:
    """Render every font of ``table`` and write ``glyphs.png``, ``glyphs.json`` and ``FONT_LICENSES.txt``.

    Args:
        fonts: The folder that holds one unpacked Debian package per sub-folder, named after the package.
        out: The folder to write to.
        table: The contents of ``fonts.json``.

    Returns:
        The number of glyphs.

    Raises:
        DataError: A font is missing, lacks a character, is hard to read or has a licence that is not allowed.
    """
    _check_table(table)
    faces: list[FontFace] = []
    glyphs: list[np.ndarray] = []
    for family in sorted(table["families"], key=lambda entry: POOLS.index(entry["pool"])):
        characters = CHARACTERS[family["pool"]]
        for source in family["sources"]:
            for name in source["files"]:
                path = _find_font(fonts, source["package"], name)
                font = _scaled_font(path)
                _check_font(path, font, characters)
                first_cell = len(glyphs)
                faces.append(
                    FontFace(family["pool"], family["family"], path.stem, source["licence"], characters, first_cell)
                )
                glyphs += [_render(font, character) for character in characters]
    rows = -(-len(glyphs) // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, CELL, CELL), dtype=np.uint8)
    sheet[: len(glyphs)] = np.stack(glyphs)
    pixels = sheet.reshape(rows, COLUMNS, CELL, CELL).transpose(0, 2, 1, 3).reshape(rows * CELL, COLUMNS * CELL)
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(out / "glyphs.png", optimize=True)
    listed = ",\n".join("    " + json.dumps(asdict(face)) for face in faces)
    (out / "glyphs.json").write_text(
        f'{{\n  "cell": {CELL},\n  "columns": {COLUMNS},\n  "fonts": [\n{listed}\n  ]\n}}\n', encoding="utf-8"
    )
    (out / "FONT_LICENSES.txt").write_text(_licence_file(fonts, table), encoding="utf-8")
    return len(glyphs)


def _packages(table: dict[str, Any]) -> list[str]:
    from_families = {source["package"] for family in table["families"] for source in family["sources"]}
    return sorted(from_families | {entry["file"].split("/")[0] for entry in table["licences"].values()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; see the documentation of the module."""
    here = Path(__file__).parents[1] / "lit_merge" / "data" / "embedded"
    parser = argparse.ArgumentParser(description="Render the glyph atlas of the embedded suite.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--fonts", type=Path, help="folder that holds one unpacked Debian package per sub-folder")
    action.add_argument("--list-packages", action="store_true", help="list the Debian packages that are needed")
    parser.add_argument("--out", type=Path, default=here / "assets", help="folder to write to (default: the package)")
    parser.add_argument("--table", type=Path, default=here / "fonts.json", help="table of the fonts")
    options = parser.parse_args(arguments)
    table = json.loads(options.table.read_text(encoding="utf-8"))
    if options.list_packages:
        sys.stdout.write("\n".join(_packages(table)) + "\n")
        return
    count = build_atlas(options.fonts, options.out, table)
    sys.stdout.write(f"{count} glyphs, {(options.out / 'glyphs.png').stat().st_size / 1e6:.2f} MB\n")


if __name__ == "__main__":
    main()
