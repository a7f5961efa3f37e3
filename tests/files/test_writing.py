"""New files: whole or not at all, and a refusal that says of what and how much is missing."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

from lit_merge.errors import LitMergeError, WriteError
from lit_merge.files import writing as module
from lit_merge.files.shards import plan_shards, write_shards
from lit_merge.files.store import write_tensors
from lit_merge.files.text import write_text
from lit_merge.files.writing import new_file, writing

TENSORS = {"a": torch.zeros(1000), "b": torch.zeros(1000)}


def shards(path):
    path.mkdir(exist_ok=True)
    write_shards(path, TENSORS, {}, plan_shards(TENSORS, 4000, "model"), "model")


WRITERS = {
    "text": lambda path: write_text(path, "x" * 5000),
    "tensors": lambda path: write_tensors(path, TENSORS, {}),
    "shards": shards,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_grows_too_large(tmp_path, writer, full_disk):
    """By the system's own refusal."""
    target = tmp_path / "target"
    with pytest.raises(WriteError) as caught, full_disk():
        WRITERS[writer](target)
    assert str(caught.value).startswith(f"{target}")
    assert "expected room for " in str(caught.value)
    assert "got File too large (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_how_much_is_missing(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: usage(10**6, 10**6, 3456))
    path = tmp_path / "notes.json"
    with pytest.raises(WriteError) as caught:
        write_text(path, "é" * 2500)
    got = os.strerror(number)
    expected = f"{path}: expected room for 5,000 bytes, got {got} (3,456 bytes free, 1,544 too few). Free space there,"
    assert str(caught.value).startswith(expected)
    assert caught.value.errno == number
    assert isinstance(caught.value, LitMergeError)
    assert isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_what_cannot_be_written(tmp_path, number):
    line = rf"place: expected a path that can be written, got {os.strerror(number)}\."
    with pytest.raises(WriteError, match=line), writing(tmp_path / "place"):
        raise OSError(number, os.strerror(number), "some/temporary/name")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("")
    with pytest.raises(WriteError, match=r"/a: expected a path that can be written, got Is a directory\."):
        write_text(tmp_path / "a", "text")
    with pytest.raises(WriteError, match=r"/b/c: expected a path that can be written, got (File exists|Not a dir)"):
        write_text(tmp_path / "b" / "c", "text")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("of a library"), KeyboardInterrupt()], ids=repr)
def test_what_fails_in_the_block_passes_through(tmp_path, error):
    (tmp_path / "old").write_bytes(b"old")

    def fail():
        with new_file(tmp_path / "old") as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert (tmp_path / "old").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
