"""Who holds a suite's output: one at a time, not for longer than it lives, and said in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.suite import lock
from lit_merge.suite.lock import LOCK, locked

HELD = r"^output: expected .*/S to be free, got it held by another suite on {} \(process {}\) since \d{{4}}-.*\. Wait"


@pytest.fixture
def quick(monkeypatch) -> None:
    """Signs of life come, and are waited for, a hundred times faster."""
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_PATIENCE", 0.4)


@pytest.fixture
def holder(tmp_path) -> Iterator[int]:
    """A process that holds ``S``, with a worker that outlives it."""
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "S"):
            if worker := os.fork():
                (tmp_path / "worker").write_text(str(worker))
                (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    until = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.01)
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def elsewhere(directory: Path, **other: object) -> Path:
    """A lock file that a suite on another machine has written."""
    directory.mkdir(exist_ok=True)
    content = {"host": "far", "process": 7, "since": "2026-01-01 00:00:00 +0000", **other}
    (directory / LOCK).write_text(json.dumps(content))
    return directory / LOCK


def test_a_second_suite_is_refused_until_the_first_is_killed(tmp_path, holder) -> None:
    with (
        pytest.raises(LitMergeError, match=HELD.format(re.escape(socket.gethostname()), holder)),
        locked(tmp_path / "S"),
    ):
        pass
    assert (tmp_path / "S" / LOCK).exists()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "S" / LOCK).exists()  # nobody was there to remove it
    with locked(tmp_path / "S"):
        assert json.loads((tmp_path / "S" / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / "S").exists()  # nothing else was written


def test_a_lock_ends_with_its_suite_and_leaves_what_was_written(tmp_path) -> None:
    def fail() -> None:
        with locked(tmp_path / "S"):
            (tmp_path / "S/a").touch()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    with locked(tmp_path / "S"):
        pass
    assert [path.name for path in (tmp_path / "S").iterdir()] == ["a"]


def test_signs_of_life_are_given_while_it_is_held(tmp_path, quick) -> None:
    with locked(tmp_path / "S"):
        before = (tmp_path / "S" / LOCK).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / "S" / LOCK).stat().st_mtime_ns > before


def test_another_machine_holds_it_as_long_as_it_shows_signs_of_life(tmp_path, quick) -> None:
    path, ended = elsewhere(tmp_path / "S"), threading.Event()
    beat = threading.Thread(target=lock._beat, args=(path, ended))
    beat.start()
    with pytest.raises(LitMergeError, match=HELD.format("far", 7)), locked(tmp_path / "S"):
        pass
    ended.set()
    beat.join()
    with locked(tmp_path / "S"):  # after which it counts as ended
        assert json.loads((tmp_path / "S" / LOCK).read_text())["host"] == socket.gethostname()


def test_where_the_file_system_has_no_locks_the_content_decides(tmp_path, quick, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    here = socket.gethostname()
    elsewhere(tmp_path / "S", host=here, process=os.getppid())
    with pytest.raises(LitMergeError, match=HELD.format(re.escape(here), os.getppid())), locked(tmp_path / "S"):
        pass
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    elsewhere(tmp_path / "S", host=here, process=child)
    with locked(tmp_path / "S"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "far"}', "\0" * 50])
def test_a_damaged_lock_file_holds_nothing(tmp_path, content) -> None:
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / LOCK).write_text(content)
    with locked(tmp_path / "S"):
        pass


def test_a_folder_that_cannot_be_created(tmp_path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationError, match="output: expected a folder that can be created"),
        locked(tmp_path / "file/S"),
    ):
        pass
