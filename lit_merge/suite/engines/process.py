"""A stage as a process of its own, with all the processes that it starts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lit_merge.errors import ConfigurationError, EndRequested, LitMergeError
from lit_merge.suite.engines.job import Job, Outcome
from lit_merge.suite.engines.lifeline import LIFELINE
from lit_merge.suite.engines.template import ForkedProcess, Template

__all__ = ["LOG", "StageProcess", "cores", "is_refusal", "refusal_in", "with_threads"]

LOG = "stage.log"
"""In a stage's folder: what it said."""

_PROGRAM = [sys.executable, "-m", "lit_merge"]
_REFUSAL = re.compile(r"^lit-merge[\w -]*: error: (.*)$", re.MULTILINE)
_OF_THE_MACHINE = re.compile(r"^\[Errno \d+\]|out of memory|another process of this job has ended")


class StageProcess:
    """``python -m lit_merge COMMAND …``, started at once; it ends when this process does, however that ends.

    Args:
        job: what to run.
        environment: variables to set in addition to those of this process.
        directory: where to run it; None for here.
        template: what it is forked from; None starts an interpreter of its own.
    """

    def __init__(
        self,
        job: Job,
        environment: Mapping[str, str] | None = None,
        directory: str | None = None,
        template: Template | None = None,
    ) -> None:
        self.job = job
        self._log = Path(job.folder) / LOG
        self._started = time.perf_counter()
        there, self._lifeline = os.pipe()
        try:
            with self._log.open("wb") as log:
                self._process: ForkedProcess | subprocess.Popen[bytes]
                if template is not None:
                    given = (job.command, *job.arguments)
                    self._process = template.start(given, log.fileno(), there, environment or {}, directory)
                else:
                    self._process = subprocess.Popen(
                        [*_PROGRAM, job.command, *job.arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=directory,
                        env={**os.environ, **(environment or {}), LIFELINE: str(there)},
                        pass_fds=[there],
                        start_new_session=True,  # one group with all that it starts; Ctrl-C comes to us alone
                    )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(there)

    def poll(self) -> Outcome | None:
        """How it ended, or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._close_lifeline()
        seconds = time.perf_counter() - self._started
        if code == 0:
            return self._succeeded(seconds)
        said = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        refusal = refusal_in(said, ConfigurationError if code == 2 else LitMergeError)
        if refusal is not None and code in (1, 2):
            return Outcome(self.job.name, seconds, refusal, is_refusal(refusal))
        if code < 0 or code == EndRequested.status:
            number = -code if code < 0 else signal.SIGTERM
            reason = f"was killed by signal {number:d} ({_signal_name(number)}; the machine may be out of memory)"
        else:
            last = " ".join((said.strip().splitlines() or ["no message"])[-1].split())
            reason = f"failed with exit code {code}: {last.rstrip('.')}"
        return Outcome(self.job.name, seconds, LitMergeError(f"the process {reason}, see {self._log}."))

    def _succeeded(self, seconds: float) -> Outcome:
        paths = [Path(self.job.folder) / name for name in self.job.outputs]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            error = LitMergeError(f"expected the output {missing[0]}, got none, see {self._log}. Run it again.")
            return Outcome(self.job.name, seconds, error)
        return Outcome(self.job.name, seconds, sizes=tuple(path.stat().st_size for path in paths))

    def wait(self) -> Outcome:
        """Wait until it ends."""
        while (outcome := self.poll()) is None:
            time.sleep(0.05)
        return outcome

    def end(self, patience: float = 5.0) -> None:
        """End it and all that it started: they are asked to, and killed after so many seconds."""
        for request in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
                os.killpg(self._process.pid, request)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._close_lifeline()

    def _close_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def refusal_in(said: str, kind: type[LitMergeError] = ConfigurationError) -> LitMergeError | None:
    """What lit-merge has refused in the output of one of its commands, as an error; None if it has not."""
    found = _REFUSAL.search(said)
    return kind(found[1]) if found else None


def is_refusal(error: LitMergeError) -> bool:
    """Whether an error is about the input, so that to try again is no use, and not about the machine."""
    return not _OF_THE_MACHINE.search(str(error))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def cores() -> int:
    """How many processor cores this process may use: ``OMP_NUM_THREADS`` if it is set."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def with_threads(count: int) -> dict[str, str]:
    """The variables that give a process so many threads, at least one."""
    return {name: str(max(1, count)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
