"""Stages of a long job that are run once: a killed job goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError, LitMergeError, first_few
from lit_merge.files.text import write_text
from lit_merge.files.yaml_text import dump_yaml
from lit_merge.suite.engines import Engine, Job, Outcome
from lit_merge.suite.ledger import FileLedger

__all__ = ["Scheduler", "Stage", "StageRecord"]

_INTO_A_FOLDER = ("fit", "validate", "test", "predict")  # commands whose output is a folder, an argument


@dataclass(frozen=True)
class Stage:
    """One command with its configuration, and what it reads and writes; plain data.

    Attributes:
        name: of the stage and of its folder in the job's directory, e.g. ``seed-0/fit/digits``; no stage's folder is
            in another's.
        command: one of lit-merge's.
        config: its configuration, with paths as seen from the current directory.
        settings: everything that determines the outcome, as plain data without paths of other stages.
        outputs: names of the files that it leaves in its folder.
        inputs: files that it reads; their contents are part of the key. One that is another stage's output makes this
            stage wait for that one.
        devices: how many GPUs or other devices it uses where there are some.
    """

    name: str
    command: str
    config: Mapping[str, Any]
    settings: Any
    outputs: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    devices: int = 1

    def paths(self, directory: Path) -> list[Path]:
        """Its outputs, in a job's directory."""
        return [directory / self.name / name for name in self.outputs]


@dataclass
class StageRecord:
    """What a finished stage left: its key, and the hashes of its outputs by path relative to the job's directory."""

    key: str
    outputs: dict[str, str]
    seconds: float


@dataclass
class _Started:
    stage: Stage
    key: str
    attempts: int = 1


@dataclass
class Scheduler:
    """Runs a graph of stages, each once: one that is recorded, with the same key and intact outputs, is skipped.

    Args:
        directory: the job's directory.
        total: how many stages there are.
        report: called with a line for every stage that has ended, and for every further attempt.
        engine: runs them; whoever opened it closes it.
        starting: called with the names of the stages that run.
        retries: how often a stage that was killed or broke off is tried again; one that refuses its input is not.

    Attributes:
        ledger: the hashes of inputs and outputs, which a later run finds in ``digests.json``.
        seconds: stage -> how long it took when it ran, in the order of the stages.
    """

    directory: Path
    total: int
    report: Callable[[str], None]
    engine: Engine
    starting: Callable[[str], None] = lambda names: None
    retries: int = 1
    ledger: FileLedger = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = FileLedger(self.directory / "digests.json", self.directory)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run what is not done yet, in the stages' order as far as the engine takes them one by one.

        When a stage has failed, those that do not depend on it are finished.

        Raises:
            LitMergeError: stages have failed; the message names them, and why. Or stages wait for each other.
        """
        makers = {path: stage.name for stage in stages for path in stage.paths(self.directory)}
        waiting, done = list(stages), set[str]()
        running: dict[str, _Started] = {}
        failed: dict[str, LitMergeError] = {}
        try:
            while True:
                if running and not self.engine.free():
                    self._ended(self.engine.wait(), running, done, failed)
                elif (ready := self._next(waiting, done, makers)) is not None:
                    running[ready.stage.name] = ready
                    self.starting(first_few(running))
                    self._start(ready.stage)
                elif running:
                    self._ended(self.engine.wait(), running, done, failed)
                else:
                    break
        finally:
            self.ledger.save()
        self.seconds = {one.name: self.seconds[one.name] for one in stages if one.name in self.seconds}
        if failed:
            raise _failure(failed, len(waiting))
        if waiting:
            raise ConfigurationError(
                f"stages: expected none that waits for itself, got {first_few(one.name for one in waiting)}. Let "
                "recipes name files of other recipes."
            )

    def _next(self, waiting: list[Stage], done: set[str], makers: Mapping[Path, str]) -> _Started | None:
        """Take the first stage whose inputs are there and that is not done yet, or None; what is done is skipped."""
        while True:
            stage = next((one for one in waiting if _needed(one, makers) <= done), None)
            if stage is None:
                return None
            waiting.remove(stage)
            key = self._key(stage)
            if not self._done_before(stage, key):
                return _Started(stage, key)
            done.add(stage.name)

    def _key(self, stage: Stage) -> str:
        relevant = {
            "stage": stage.name,
            "settings": stage.settings,
            "inputs": [self.ledger.digest(path) for path in stage.inputs],
            "version": __version__,
        }
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()

    def _done_before(self, stage: Stage, key: str) -> bool:
        record = _read(self._record(stage))
        outputs = {str(path.relative_to(self.directory)) for path in stage.paths(self.directory)}
        if record is None or record.key != key or set(record.outputs) != outputs or not self._intact(record):
            return False
        self._note(stage.name, record.seconds, "done before")
        return True

    def _start(self, stage: Stage) -> None:
        """Give a stage to the engine, with its configuration in a folder that is empty but for it."""
        self._record(stage).unlink(missing_ok=True)
        folder = self.directory / stage.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = folder / "stage.yaml"
        write_text(config, dump_yaml(dict(stage.config)))
        arguments = ["--config", str(config)]
        if stage.command in _INTO_A_FOLDER:
            arguments += ["--output", str(folder)]
        several = stage.command in _INTO_A_FOLDER and str(stage.config.get("trainer", {}).get("devices", 1)) != "1"
        absolute = str(folder.resolve())
        job = Job(stage.name, stage.command, tuple(arguments), absolute, stage.outputs, stage.devices, several)
        self.engine.start(job)

    def _ended(
        self, outcome: Outcome, running: dict[str, _Started], done: set[str], failed: dict[str, LitMergeError]
    ) -> None:
        started = running[outcome.name]
        if outcome.error is not None and not outcome.refused and started.attempts <= self.retries:
            started.attempts += 1
            self.report(f"{outcome.name}: {outcome.error} Trying again.")
            self._start(started.stage)
            return
        del running[outcome.name]
        if outcome.error is not None:
            failed[outcome.name] = outcome.error
            self.report(f"{outcome.name}: failed")
            return
        outputs = started.stage.paths(self.directory)
        seconds = round(outcome.seconds, 2)
        digests = {str(path.relative_to(self.directory)): self.ledger.digest(path) for path in outputs}
        self.ledger.save()
        record = StageRecord(started.key, digests, seconds)
        write_text(self._record(started.stage), json.dumps(asdict(record), indent=2) + "\n")
        done.add(outcome.name)
        self._note(outcome.name, seconds, f"{seconds:.1f} s{f' on {outcome.machine}' if outcome.machine else ''}")

    def _note(self, name: str, seconds: float, how: str) -> None:
        self.seconds[name] = seconds
        self.report(f"[{len(self.seconds)}/{self.total}] {name}: {how}")

    def _record(self, stage: Stage) -> Path:
        return self.directory / "stages" / f"{stage.name.replace('/', '--')}.json"

    def _intact(self, record: StageRecord) -> bool:
        paths = {self.directory / path: digest for path, digest in record.outputs.items()}
        return all(path.is_file() and self.ledger.digest(path) == digest for path, digest in paths.items())


def _needed(stage: Stage, makers: Mapping[Path, str]) -> set[str]:
    return {makers[path] for path in stage.inputs if path in makers}


def _failure(failed: Mapping[str, LitMergeError], left: int) -> LitMergeError:
    """One error for all stages that failed, of their own kind if that is the same."""
    kinds = {type(error) for error in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else LitMergeError
    reasons = [f"{name}: {error}" for name, error in failed.items()]
    if len(failed) == 1:
        return kind(reasons[0])
    return kind(f"{len(failed)} stages failed, and {left} that need them were not run: {' | '.join(reasons)}")


def _read(path: Path) -> StageRecord | None:
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # missing or cut off in the middle: the stage runs again
