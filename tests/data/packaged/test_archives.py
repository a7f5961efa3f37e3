from __future__ import annotations

import bz2
import contextlib
import gzip
import re
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from builders.packages import tar_of, write_package

from lit_merge.data.packaged.archives import expanded, members
from lit_merge.errors import FileFormatError

FILES = {"a/one.txt": b"first", "a/two.txt": b"second" * 100, "b/three.bin": bytes(range(256))}
KINDS = ["p.whl", "p.tgz", "p.deb"]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_wanted_is_read_in_order(name: str, tmp_path: Path) -> None:
    path = write_package(tmp_path / name, FILES)
    assert list(members(path, lambda one: one.endswith(".txt"))) == list(FILES.items())[:2]
    assert dict(members(path, lambda one: True)) == FILES
    assert [one.name for one in tmp_path.iterdir()] == [name]  # nothing is unpacked


def test_an_archive_in_an_archive(tmp_path: Path) -> None:
    inner = write_package(tmp_path / "inner.whl", FILES).read_bytes()
    assert dict(members(Path("model.zip"), lambda one: True, file=BytesIO(inner))) == FILES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "a\\..\\out.txt"])
def test_names_that_lead_out_are_refused_wanted_or_not(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "p.deb" and name.startswith("/"):
        name = f"/{name}"  # after ./
    path = write_package(tmp_path / kind, {name: b"x", **FILES})
    with pytest.raises(FileFormatError, match=r"expected names inside the archive, got .*Do not use this file\."):
        list(members(path, lambda one: False))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_links_are_not_followed(kind: str, tmp_path: Path) -> None:
    path = write_package(tmp_path / kind, {}, links={"a/link.txt": "/etc/passwd"})
    assert list(members(path, lambda one: False)) == []
    with pytest.raises(FileFormatError, match=r"expected a file as a/link\.txt, got a link or device"):
        list(members(path, lambda one: True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_has_a_largest_size(kind: str, tmp_path: Path) -> None:
    path = write_package(tmp_path / kind, {"bomb": bytes(5_000_000)})
    assert path.stat().st_size < 50_000
    with pytest.raises(FileFormatError, match=r"expected at most 4,000,000 bytes in bomb, got 5,000,000"):
        list(members(path, lambda one: True, largest=4_000_000))


def test_a_zip_that_lies_about_a_size_gives_no_more_than_it_says(tmp_path: Path) -> None:
    path = write_package(tmp_path / "p.whl", {"bomb": bytes(5_000_000)})
    raw = path.read_bytes().replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match="expected a readable archive, got Bad CRC-32"):
        list(members(path, lambda one: True, largest=100))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_truncated_archive_no_member_is_cut(kind: str, tmp_path: Path) -> None:
    path = write_package(tmp_path / kind, FILES)
    raw = path.read_bytes()
    for length in range(0, len(raw) - 40, 37):
        path.write_bytes(raw[:length])
        found: dict[str, bytes] = {}
        with contextlib.suppress(FileFormatError):  # of a tar archive whose end is missing the members are whole
            found.update(members(path, lambda one: True))
        assert found.items() <= FILES.items()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FileFormatError, match=rf"^{re.escape(str(path))}: expected [^\n]*, got [^\n]*\.$"):
        list(members(path, lambda one: True))


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.rar"
    path.write_bytes(b"x")
    with pytest.raises(FileFormatError, match=r"expected a \.whl, \.zip, \.tgz or \.deb file"):
        list(members(path, lambda one: True))
    path = tmp_path / "p.deb"
    content = tar_of(FILES)
    head = f"{'data.tar.zst':<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(content):<10}`\n".encode()
    path.write_bytes(b"!<arch>\n" + head + content)
    with pytest.raises(FileFormatError, match=r"expected data\.tar\.xz or data\.tar\.gz in it, got data\.tar\.zst"):
        list(members(path, lambda one: True))
    path.write_bytes(b"!<arch>\n")
    with pytest.raises(FileFormatError, match=r"expected data\.tar\.xz in a Debian package, got none"):
        list(members(path, lambda one: True))


def test_packed_members_are_expanded_to_a_limit() -> None:
    assert expanded(gzip.compress(b"text"), "x.dict.dz") == b"text"
    assert expanded(bz2.compress(b"text"), "x.csv.bz2") == b"text"
    assert expanded(b"text", "x.txt") == b"text"
    with pytest.raises(FileFormatError, match=r"x\.gz: expected at most 1,000 bytes in it, got more"):
        expanded(gzip.compress(bytes(2000)), "x.gz", largest=1000)
    with pytest.raises(FileFormatError, match="expected a readable archive, got Not a gzipped file"):
        expanded(b"text", "x.gz")


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = write_package(tmp_path / "p.whl", {"one": b"x"})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(raw))
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].flag_bits & 1
    with pytest.raises(FileFormatError, match="is encrypted, password required"):
        list(members(path, lambda one: True))
