"""The ledger: what is read, what is not, and that no change goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from lit_merge.errors import FileFormatError
from lit_merge.suite import ledger as module
from lit_merge.suite.ledger import FileLedger


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that have been read."""
    found: list[str] = []
    original = module.file_digest

    def digest(path: Path) -> str:
        found.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(module, "file_digest", digest)
    return found


def opened(folder: Path) -> FileLedger:
    return FileLedger(folder / "ledger.json", folder)


def test_a_file_is_read_once_within_and_across_runs(tmp_path, read) -> None:
    (tmp_path / "a").write_text("one")
    first = opened(tmp_path)
    assert first.digest(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    assert first.digest(tmp_path / "a") == first.digest(str(tmp_path / "a"))
    first.save()
    assert opened(tmp_path).digest(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    assert read == ["a"]


@pytest.mark.parametrize("change", ["longer", "truncated", "same size", "same size and time", "replaced", "touched"])
def test_every_change_is_noticed(tmp_path, read, change) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    ledger, before = opened(tmp_path), path.stat()
    ledger.digest(path)
    content = {"longer": "more", "truncated": "on", "touched": "one"}.get(change, "two")
    if change == "replaced":
        (tmp_path / "b").write_text("two")
        (tmp_path / "b").replace(path)
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.write_text(content)
    if change in ("same size and time", "replaced"):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ledger.digest(path) == hashlib.sha256(content.encode()).hexdigest()
    assert len(read) == 2


def test_a_file_written_twice_within_a_tick_is_not_mistaken(tmp_path, monkeypatch) -> None:
    """On a file system whose times are so coarse that both look the same."""
    path, stamp = tmp_path / "a", 5 * 10**9
    monkeypatch.setattr(module, "_identity", lambda path: [Path(path).stat().st_size, stamp, stamp, 1])
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    for now, wait in ((stamp + 5 * 10**8, 1.5), (stamp + 3 * 10**9, None), (stamp - 5 * 10**9, "untrusted")):
        monkeypatch.setattr(module.time, "time_ns", lambda now=now: now)
        ledger, slept[:] = opened(tmp_path), []
        path.write_text("one")
        ledger.digest(path)
        assert slept == ([pytest.approx(wait)] if isinstance(wait, float) else [])
        path.write_text("two")
        trusted = wait != "untrusted"
        assert ledger.digest(path) == hashlib.sha256(b"one" if trusted else b"two").hexdigest()


def test_a_file_that_changes_while_it_is_read_is_not_recorded(tmp_path, monkeypatch) -> None:
    path, original = tmp_path / "a", module.file_digest
    path.write_text("one")

    def digest(path: Path) -> str:
        found = original(path)
        path.write_text("two!")
        return found

    monkeypatch.setattr(module, "file_digest", digest)
    ledger = opened(tmp_path)
    ledger.digest(path)
    monkeypatch.setattr(module, "file_digest", original)
    assert ledger.digest(path) == hashlib.sha256(b"two!").hexdigest()


def test_a_moved_folder_is_known_and_a_damaged_ledger_is_empty(tmp_path, read) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_text("one")
    ledger = opened(tmp_path / "x")
    ledger.digest(tmp_path / "x/a")
    ledger.save()
    (tmp_path / "x").rename(tmp_path / "y")
    assert opened(tmp_path / "y").digest(tmp_path / "y/a")
    assert read == ["a"]
    saved = (tmp_path / "y/ledger.json").read_text()
    for text in (saved[:-10], "[]", '{"a": 3}', "[" * 100_000, json.dumps({"a": [1, 2, 3, 4]})):
        (tmp_path / "y/ledger.json").write_text(text)
        assert opened(tmp_path / "y").digest(tmp_path / "y/a") == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 6
    with pytest.raises(FileFormatError, match="none"):
        ledger.digest(tmp_path / "none")


def test_nothing_new_is_not_written(tmp_path) -> None:
    ledger = opened(tmp_path)
    ledger.save()
    assert not ledger.path.exists()
    (tmp_path / "a").write_text("one")
    ledger.digest(tmp_path / "a")
    ledger.save()
    before = ledger.path.stat().st_mtime_ns
    time.sleep(0.02)
    again = opened(tmp_path)
    again.digest(tmp_path / "a")
    again.save()
    assert ledger.path.stat().st_mtime_ns == before


def test_a_folders_digest_sees_names_and_contents(tmp_path, read) -> None:
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (root / "a/1").write_text("one")
    (root / "a/2").write_text("two")
    ledger = opened(tmp_path)
    found = {ledger.tree_digest(root)}
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(root / "a/1", ns=(1, 1))
    assert {ledger.tree_digest(root), ledger.tree_digest(tmp_path / "copy")} == found  # other times, another place
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    assert ledger.tree_digest(root) in found
    (root / "a/1").rename(root / "a/3")
    found.add(ledger.tree_digest(root))
    (root / "a/3").write_text("1ne")
    found.add(ledger.tree_digest(root))
    (root / "a/2").rename(root / "2")
    found.add(ledger.tree_digest(root))
    assert len(found) == 4
    count = len(read)
    assert ledger.tree_digest(root) in found
    assert len(read) == count


def test_a_root_that_is_a_file_counts_with_its_name(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("one")
    ledger = opened(tmp_path)
    found = [ledger.tree_digest(), ledger.tree_digest(tmp_path / "a"), ledger.tree_digest(tmp_path / "b")]
    found += [ledger.tree_digest(tmp_path / "a", tmp_path / "b"), ledger.tree_digest(tmp_path)]
    assert len(set(found)) == 5
