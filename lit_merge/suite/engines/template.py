"""Stages without their start-up: a process imports once what every stage imports, and is forked for each of them."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_merge.errors import LitMergeError

__all__ = ["ForkedProcess", "Template"]

_PROGRAM = "lit_merge.suite.engines.forking"
_LONGEST = 2**20
_UNKNOWN = -9
"""The exit code of a child of which nothing is known, because the process that started it was killed."""


class Template:
    """The process that is forked, started at once.

    Args:
        environment: variables to set in addition to those of this process; threads among them.
        modules: what it imports.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM, str(there.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        self._started: list[int] = []
        self._ended: dict[int, int] = {}

    @staticmethod
    def is_possible() -> bool:
        """Whether processes may be forked here: on Linux; other systems' libraries do not survive it."""
        return sys.platform == "linux"

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def start(
        self, arguments: Sequence[str], log: int, lifeline: int, environment: Mapping[str, str], directory: str | None
    ) -> ForkedProcess:
        """Fork a process that runs ``lit-merge ARGUMENTS``, in a session of its own.

        Args:
            arguments: of the command line, without the program.
            log: descriptor of what gets its output.
            lifeline: descriptor of the pipe that it ends with.
            environment: variables to set.
            directory: where to run it; None for here.

        Raises:
            LitMergeError: the process that is forked is gone.
        """
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": directory or str(Path.cwd()),
        }
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [log, lifeline])
            while not self._started:
                self._receive(None)
        except OSError:
            raise LitMergeError("the process from which stages are forked was killed. Run the suite again.") from None
        return ForkedProcess(self, self._started.pop())

    def code(self, pid: int, seconds: float | None = 0.0) -> int | None:
        """How a child has ended, as ``subprocess`` says it; None if it has not within so many seconds."""
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while pid not in self._ended:
                left = None if end is None else max(0.0, end - time.monotonic())
                if not self._receive(left) and left == 0.0:
                    return None
        except OSError:
            self._ended[pid] = _UNKNOWN
        return self._ended[pid]

    def _receive(self, seconds: float | None) -> bool:
        if not select.select([self._socket], [], [], seconds)[0]:
            return False
        said = self._socket.recv(_LONGEST)
        if not said:
            raise ConnectionResetError
        answer = json.loads(said)
        if "code" in answer:
            self._ended[answer["pid"]] = answer["code"]
        else:
            self._started.append(answer["pid"])
        return True

    def close(self) -> None:
        """End it; children that still run are not waited for."""
        self._socket.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:  # in the middle of its imports
            self._process.kill()
            self._process.wait()


class ForkedProcess:
    """A child of a :class:`Template`, with the part of ``subprocess.Popen`` that a stage needs.

    Args:
        template: whose child it is.
        pid: its number, and its group's.
    """

    def __init__(self, template: Template, pid: int) -> None:
        self.pid, self._template = pid, template

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._template.code(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        code = self._template.code(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code
