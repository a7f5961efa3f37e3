"""Stages of a long job that are run once: a killed job goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.callbacks.writing import write_text
from lit_merge.errors import LitMergeError
from lit_merge.vectors import file_digest

__all__ = ["Conductor", "StageRecord", "folder_digest"]


@dataclass
class StageRecord:
    """What a finished stage left: its key, and the hashes of its outputs by path relative to the job's directory."""

    key: str
    outputs: dict[str, str]
    seconds: float


class Conductor:
    """Runs stages once: a stage that is recorded, with the same key and intact outputs, is skipped.

    Args:
        directory: the job's directory.
        total: how many stages there are.
        report: called with a line for every stage that has ended.
        starting: called with the name of every stage that begins.

    Attributes:
        seconds: stage -> how long it took when it ran.
    """

    def __init__(
        self,
        directory: Path,
        total: int,
        report: Callable[[str], None],
        starting: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.directory, self.total, self.report, self.starting = directory, total, report, starting
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, settings: Any, inputs: list[Path], work: Callable[[Path], list[Path]]) -> list[Path]:
        """Run ``work(folder)``, or skip it; returns its output files.

        Args:
            name: of the stage and of its folder, e.g. ``seed-0/fit/digits``; no stage's folder lies in another's.
            settings: everything that determines the outcome, as plain data.
            inputs: files that it reads; their contents are part of the key.
            work: writes into the folder, which exists and is empty, and returns the files that count.

        Raises:
            LitMergeError: the work refuses its input; the message names the stage.
        """
        relevant = {
            "stage": name,
            "settings": settings,
            "inputs": [file_digest(path) for path in inputs],
            "version": __version__,
        }
        key = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
        record_path = self.directory / "stages" / f"{name.replace('/', '--')}.json"
        record = _read(record_path)
        place = f"[{len(self.seconds) + 1}/{self.total}] {name}"
        self.starting(name)
        if record is not None and record.key == key and self._intact(record):
            self.seconds[name] = record.seconds
            self.report(f"{place}: done before")
            return [self.directory / path for path in record.outputs]
        record_path.unlink(missing_ok=True)
        folder = self.directory / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.perf_counter()
        try:
            outputs = work(folder)
        except LitMergeError as error:
            raise type(error)(f"{name}: {error}") from error
        self.seconds[name] = round(time.perf_counter() - started, 2)
        digests = {str(path.relative_to(self.directory)): file_digest(path) for path in outputs}
        record = StageRecord(key, digests, self.seconds[name])
        write_text(record_path, json.dumps(asdict(record), indent=2) + "\n")
        self.report(f"{place}: {record.seconds:.1f} s")
        return outputs

    def _intact(self, record: StageRecord) -> bool:
        paths = {self.directory / path: digest for path, digest in record.outputs.items()}
        return all(path.is_file() and file_digest(path) == digest for path, digest in paths.items())


def _read(path: Path) -> StageRecord | None:
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # missing or cut off in the middle: the stage runs again


def folder_digest(root: str | os.PathLike[str]) -> str:
    """A hash of the names, sizes and times of all files below a folder, which are not read."""
    found = hashlib.sha256()
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.exists():  # else a dangling link
                status = path.stat()
                found.update(
                    f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "replace")
                )
    return found.hexdigest()
