"""The glyph atlas: what the committed asset holds, how it is read and what the script refuses."""

import io
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from lit_merge.data.embedded.glyphs import POOLS, GlyphAtlas
from lit_merge.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import build_atlas

ASSETS = Path(str(resources.files("lit_merge.data.embedded"))) / "assets"
TABLE = json.loads((ASSETS.parent / "fonts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def atlas() -> GlyphAtlas:
    return GlyphAtlas.load()


def every_glyph(atlas: GlyphAtlas):
    for pool in POOLS:
        for font in range(atlas.pool_size(pool)):
            for character in atlas.characters(pool):
                yield f"{pool} {font} {character}", atlas.glyph(pool, font, character)


def test_pools_share_no_family(atlas):
    families = {pool: {font.family for font in atlas.fonts if font.pool == pool} for pool in POOLS}
    for pool in POOLS:
        for other in POOLS:
            assert pool == other or not families[pool] & families[other]


def test_pools_share_no_upstream_font():
    pools_of_upstream: dict[str, set[str]] = {}
    for family in TABLE["families"]:
        for source in family["sources"]:
            pools_of_upstream.setdefault(source["upstream"], set()).add(family["pool"])
    assert all(len(pools) == 1 for pools in pools_of_upstream.values())


@pytest.mark.parametrize(
    ("pool", "fewest_fonts", "most_fonts", "fewest_families"),
    [("pretrain", 25, 30, 8), ("train", 25, 30, 12), ("val", 8, 10, 5), ("test", 12, 14, 8)],
)
def test_sizes_of_the_pools(atlas, pool, fewest_fonts, most_fonts, fewest_families):
    assert fewest_fonts <= atlas.pool_size(pool) <= most_fonts
    assert len({font.family for font in atlas.fonts if font.pool == pool}) >= fewest_families


def test_the_asset_is_what_the_table_says(atlas):
    expected = [
        (family["pool"], family["family"], Path(name).stem, source["licence"])
        for family in sorted(TABLE["families"], key=lambda entry: POOLS.index(entry["pool"]))
        for source in family["sources"]
        for name in source["files"]
    ]
    assert [(font.pool, font.family, font.face, font.licence) for font in atlas.fonts] == expected
    assert all(font.characters == build_atlas.CHARACTERS[font.pool] for font in atlas.fonts)
    assert len({font.face for font in atlas.fonts}) == len(atlas.fonts)


def test_cells_of_the_fonts_do_not_overlap(atlas):
    cell = 0
    for font in atlas.fonts:
        assert font.first_cell == cell
        cell += len(font.characters)


def test_every_glyph_has_ink_and_is_centred(atlas):
    for name, glyph in every_glyph(atlas):
        assert glyph.shape == (48, 48), name
        assert glyph.dtype == np.uint8, name
        assert glyph.max() > 100, name
        for axis in (0, 1):
            inked = np.flatnonzero(glyph.any(axis=axis))
            assert inked[0] >= 1, name  # at most 46 of 48 pixels
            assert abs(inked[0] - (47 - inked[-1])) <= 1, name


def test_glyphs_have_sixteen_levels_of_grey(atlas):
    assert all(not (glyph % 17).any() for _, glyph in every_glyph(atlas))


def test_capital_h_is_thirty_pixels_high(atlas):
    for pool in POOLS:
        for font in range(atlas.pool_size(pool)):
            height = np.count_nonzero(atlas.glyph(pool, font, "H").max(axis=1) > 60)
            assert 29 <= height <= 32, (pool, font, height)


def test_no_two_fonts_are_the_same(atlas):
    for pool in POOLS:
        seen = {
            b"".join(atlas.glyph(pool, font, character).tobytes() for character in "ABRS258")
            for font in range(atlas.pool_size(pool))
        }
        assert len(seen) == atlas.pool_size(pool)


def test_glyphs_are_read_only(atlas):
    with pytest.raises(ValueError, match="read-only"):
        atlas.glyph("test", 0, "A")[0, 0] = 1


def test_the_atlas_is_read_once():
    assert GlyphAtlas.load() is GlyphAtlas.load()


def test_every_licence_is_allowed_and_documented(atlas):
    notice = (ASSETS / "FONT_LICENSES.txt").read_text(encoding="utf-8")
    for font in atlas.fonts:
        assert font.licence in build_atlas.ALLOWED_LICENCES
        assert f"({font.licence})" in notice
    for family in TABLE["families"]:
        heading = f"\n{family['family']}\n{'-' * len(family['family'])}\n"
        assert heading in notice
        for source in family["sources"]:
            assert source["copyright"].strip()
            assert source["upstream"] in notice
            assert source["copyright"] in notice


def test_the_asset_is_small():
    sizes = [(ASSETS / name).stat().st_size for name in ("glyphs.png", "glyphs.json", "FONT_LICENSES.txt")]
    assert sum(sizes) <= 3_000_000


def test_unknown_pool(atlas):
    for question in (atlas.pool_size, atlas.characters, lambda pool: atlas.glyph(pool, 0, "A")):
        with pytest.raises(DataError, match="Expected a glyph pool among pretrain, train, val, test, got 'dev': use"):
            question("dev")


@pytest.mark.parametrize("font", [-1, 1000])
def test_unknown_font(atlas, font):
    with pytest.raises(DataError, match=rf"Expected a font number from 0 to \d+ .*'val', got {font}: take"):
        atlas.glyph("val", font, "A")


@pytest.mark.parametrize("character", ["a", "?", "AB", ""])
def test_unknown_character(atlas, character):
    with pytest.raises(DataError, match=r"Expected one of the characters '0123.*'train', got .*: draw only"):
        atlas.glyph("train", 0, character)


def table_of(licence: str = "OFL-1.1", pool: str = "val", names: tuple[str, ...] = ("One",)) -> dict:
    source = {"upstream": "One", "package": "fonts-one", "licence": licence, "copyright": "Nobody", "files": ["a.ttf"]}
    return {
        "licences": {"OFL-1.1": {"title": "OFL", "file": "fonts-one/copyright", "stanza": None}},
        "families": [{"pool": pool, "family": name, "sources": [source]} for name in names],
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of(licence="Proprietary"), "Expected a licence among .*got 'Proprietary': choose another font"),
        (table_of(pool="dev"), "Expected a pool among .*got 'dev': correct"),
        (table_of(names=("One", "One")), "Expected every family once in fonts.json, got One again"),
        (table_of(), "Expected exactly one file 'a.ttf' in the unpacked package fonts-one, got 0: unpack"),
    ],
)
def test_the_script_refuses_a_wrong_table(tmp_path, table, message):
    with pytest.raises(DataError, match=message):
        build_atlas.build_atlas(tmp_path, tmp_path / "out", table)
    assert not (tmp_path / "out").exists()


def test_the_script_lists_its_packages(capsys):
    build_atlas.main(["--list-packages"])
    listed = capsys.readouterr().out.split()
    assert listed == sorted(set(listed))
    assert "fonts-dejavu-core" in listed
    assert "base-files" in listed


def one_font(characters: str, small_figures: bool = False) -> bytes:
    """Make a font in which every character is a box as high as a capital, or lower for old-style figures."""
    builder_module = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def box(height: int):
        pen = pens.TTGlyphPen(None)
        pen.moveTo((50, 0))
        for corner in ((50, height), (450, height), (450, 0)):
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    names = [".notdef"] + [f"character{ord(character)}" for character in characters]
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): f"character{ord(character)}" for character in characters})
    heights = [700, *(450 if small_figures and character.isdigit() else 700 for character in characters)]
    builder.setupGlyf({name: box(height) for name, height in zip(names, heights, strict=True)})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (500, 50)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "One", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    stream = io.BytesIO()
    builder.save(stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("lacking", "small_figures", "message"),
    [
        ("QZ", False, "Expected every one of 36 characters in a.ttf, got none for Q, Z: choose another font"),
        ("", True, "Expected figures as high as capitals in a.ttf, got low ones for 0, 1, 2 and 7 more: choose"),
    ],
)
def test_the_script_refuses_an_unfit_font(tmp_path, lacking, small_figures, message):
    characters = "".join(character for character in build_atlas.CHARACTERS["val"] if character not in lacking)
    (tmp_path / "fonts-one").mkdir()
    (tmp_path / "fonts-one" / "a.ttf").write_bytes(one_font(characters, small_figures))
    with pytest.raises(DataError, match=message):
        build_atlas.build_atlas(tmp_path, tmp_path / "out", table_of())


def test_the_script_refuses_small_capitals(tmp_path):
    (tmp_path / "fonts-one").mkdir()
    (tmp_path / "fonts-one" / "a.ttf").write_bytes(one_font(build_atlas.CHARACTERS["pretrain"]))
    with pytest.raises(DataError, match=r"Expected small letters lower than capitals in a.ttf, got small capitals"):
        build_atlas.build_atlas(tmp_path, tmp_path / "out", table_of(pool="pretrain"))


def test_the_script_renders_a_font(tmp_path):
    (tmp_path / "fonts-one").mkdir()
    (tmp_path / "fonts-one" / "a.ttf").write_bytes(one_font(build_atlas.CHARACTERS["val"]))
    (tmp_path / "fonts-one" / "copyright").write_text("Do as you like.\n", encoding="utf-8")
    assert build_atlas.build_atlas(tmp_path, tmp_path / "out", table_of()) == 36
    described = json.loads((tmp_path / "out" / "glyphs.json").read_text(encoding="utf-8"))
    assert [font["face"] for font in described["fonts"]] == ["a"]
    assert "Do as you like." in (tmp_path / "out" / "FONT_LICENSES.txt").read_text(encoding="utf-8")
