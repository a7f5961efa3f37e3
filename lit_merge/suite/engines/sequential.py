"""One stage after the other, in this process."""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from lit_merge.errors import ConfigurationError, EndRequested, LitMergeError, one_line
from lit_merge.suite.engines.job import Job, Outcome
from lit_merge.suite.engines.process import LOG, StageProcess, is_refusal, refusal_in

__all__ = ["RunCommand", "SequentialEngine"]

RunCommand = Callable[[str, Sequence[str]], Any]
"""Runs one of lit-merge's commands in this process: its name, and what follows it on the command line."""


class SequentialEngine:
    """Runs every job at once, in this process unless it starts others.

    Args:
        run: runs a command, given its name and the arguments that follow it.
    """

    def __init__(self, run: RunCommand) -> None:
        self._run = run
        self._ended: list[Outcome] = []

    def free(self) -> bool:
        """Whether the last outcome has been taken."""
        return not self._ended

    def start(self, job: Job) -> None:
        """Run a job to its end."""
        if job.processes:
            process = StageProcess(job)
            try:
                self._ended.append(process.wait())
            finally:
                process.end()
            return
        started, error, refused = time.perf_counter(), None, False
        try:
            self._run_here(job)
        except LitMergeError as refusal:
            error, refused = refusal, is_refusal(refusal)
        except Exception as failure:  # its traceback is in the log
            reason = f"{type(failure).__name__}: {one_line(failure)}"
            error = LitMergeError(f"the stage failed with {reason}, see {Path(job.folder) / LOG}.")
        self._ended.append(Outcome(job.name, time.perf_counter() - started, error, refused))

    def wait(self) -> Outcome:
        """The outcome of the job that was run."""
        return self._ended.pop()

    def close(self) -> None:
        """There is nothing that still runs."""

    def _run_here(self, job: Job) -> None:
        log = Path(job.folder) / LOG
        try:
            with _written_to(log):
                self._run(job.command, job.arguments)
            gc.collect()  # a trainer and its model refer to each other, and would stay through the next stages
        except EndRequested:
            raise
        except SystemExit as error:  # from the parser
            raise refusal_in(log.read_text(encoding="utf-8")) or ConfigurationError(
                f"{job.command}: the configuration {job.folder}/stage.yaml was refused, see {log}."
            ) from error


@contextmanager
def _written_to(path: Path) -> Iterator[None]:
    """Everything that is printed, warned of and logged goes to a file, and so does the traceback of an error."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    handlers = [one for logger in loggers for one in logger.handlers if type(one) is logging.StreamHandler]
    with path.open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        before = [(handler, handler.setStream(log)) for handler in handlers]
        try:
            yield
        except Exception:
            traceback.print_exc(file=log)
            raise
        finally:
            for handler, stream in before:
                handler.setStream(stream or sys.__stderr__)
