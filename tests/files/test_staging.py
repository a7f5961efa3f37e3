"""Several files at once: all or none, and what killed commands have left."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_merge.errors import ConfigurationError, WriteError
from lit_merge.files.staging import remove_abandoned, staged
from lit_merge.files.text import write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from lit_merge.files.staging import staged

with staged(Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(b"0" * 1000)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("staged", flush=True)
    sys.stdin.read()
"""


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".temporary")]


def interrupted(folder: Path) -> None:
    with staged(folder) as inside:
        (inside / "a").write_text("1")
        raise KeyboardInterrupt


def test_all_files_or_none(tmp_path) -> None:
    with staged(tmp_path / "new" / "deep") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
        assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == [folder.name]
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir()) == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "other" / "deep")
    assert not (tmp_path / "other").exists()


def test_the_order_of_the_moves_and_what_is_stale(tmp_path, monkeypatch) -> None:
    for name in ("old.index.json", "old", "same"):
        (tmp_path / name).write_text("before")
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: moved.append(path.name) or replace(path, to))
    stale = [tmp_path / name for name in ("old.index.json", "old", "same")]
    with staged(tmp_path, lambda: stale, last=lambda path: path.name == "same") as folder:
        for name in ("z", "same", "b"):
            (folder / name).write_text("after")
    assert moved[-1] == "same"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"z": "after", "same": "after", "b": "after"}


def test_what_a_killed_command_left_is_removed_and_nothing_else(tmp_path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "kill"], stdin=subprocess.DEVNULL, check=False)
    assert len(temporaries(tmp_path)) == 1  # the second removed what the first had left
    alive = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert alive.stdout is not None
    assert alive.stdout.readline() == "staged\n"
    mine = temporaries(tmp_path)
    assert len(mine) == 1
    (tmp_path / ".0123456789abcdef.temporary").write_text("young")
    with staged(tmp_path) as folder:
        (folder / "a").write_text("1")
    assert sorted(temporaries(tmp_path)) == sorted([*mine, ".0123456789abcdef.temporary"])
    alive.send_signal(signal.SIGKILL)
    alive.wait()
    long_ago = time.time() - 48 * 3600
    os.utime(tmp_path / ".0123456789abcdef.temporary", (long_ago, long_ago))
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nobody_takes_a_living_command_s_folder_for_abandoned(tmp_path, monkeypatch) -> None:
    """Neither before it is locked, nor after all files were moved, which is no failure then."""
    lock, remove = fcntl.flock, shutil.rmtree

    def before_the_lock(file, how):
        if how == fcntl.LOCK_EX:
            remove_abandoned(tmp_path)  # as another command that starts now
        lock(file, how)

    def after_the_lock(path, **settings):
        remove(path, ignore_errors=True)  # as another command
        remove(path, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", before_the_lock)
        with staged(tmp_path) as folder:
            (folder / "a").write_text("1")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", after_the_lock)
        with staged(tmp_path) as folder:
            (folder / "b").write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_system_without_locks(tmp_path, monkeypatch) -> None:
    def refuse(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staged(tmp_path) as first:
        (first / "a").write_text("1")
        with staged(tmp_path) as second:
            (second / "b").write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_stale_is_asked_when_nobody_else_moves(tmp_path) -> None:
    def refuse():
        found = [path.name for path in tmp_path.iterdir() if path.suffix != ".temporary"]
        raise ConfigurationError(f"there is {found}")

    def both() -> None:
        with staged(tmp_path, refuse) as first:
            (first / "a").write_text("1")
            with staged(tmp_path) as second:
                (second / "b").write_text("2")

    with pytest.raises(ConfigurationError, match=r"there is .'b'."):
        both()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_cannot_be_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigurationError, match="output: expected a folder that can be created, got"),
        staged(tmp_path / "file" / "below"),
    ):
        pass


@pytest.mark.parametrize(
    ("write", "named"),
    [(lambda path: path.write_bytes(b"0" * 100), ""), (lambda path: write_text(path, "0" * 100), "/card.md")],
    ids=["by hand", "by write_text"],
)
def test_a_full_disk_is_said_with_the_final_path(tmp_path, full_disk, write, named) -> None:
    def stage():
        with staged(tmp_path / "out") as folder, full_disk():
            write(folder / "card.md")

    with pytest.raises(WriteError) as caught:
        stage()
    assert str(caught.value).startswith(f"{tmp_path}/out{named}: expected room ")
    assert not (tmp_path / "out").exists()


def test_folders_inside_are_moved_as_folders(tmp_path) -> None:
    for name in ("kept/foreign", "gone/old", "kept/old"):
        write_text(tmp_path / name, "before")
    with staged(tmp_path, lambda: [tmp_path / "gone/old", tmp_path / "kept/old"]) as folder:
        write_text(folder / "new/deep/a", "1")
        write_text(folder / "kept/b", "2")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["kept/b", "kept/foreign", "new/deep/a"]
    assert not (tmp_path / "gone").exists()


def test_folders_that_were_made_for_what_fails_do_not_stay(tmp_path, monkeypatch) -> None:
    def refuse(path, to):
        raise PermissionError(13, "Permission denied")

    def write() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "new").mkdir()
            (folder / "new/a").write_text("1")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(WriteError):
        write()
    assert not (tmp_path / "out").exists()
