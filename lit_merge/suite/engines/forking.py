"""The process that stages are forked from: ``python -m lit_merge.suite.engines.forking SOCKET MODULE …``.

It imports once what every stage imports, 4 to 10 seconds of each, and computes nothing, so that no thread and no random
state of it is copied. It is asked through a socket, which carries the descriptors of a stage's log and lifeline, and
says there how its children have ended; it ends when the socket's other end is closed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import socket
import sys
from collections.abc import Mapping
from typing import Any

from lit_merge.suite.engines.lifeline import LIFELINE

__all__ = ["serve"]

_LONGEST = 2**20


def serve(control: socket.socket) -> None:
    """Fork children for as long as somebody asks for them; returns in the children, each with its command line."""
    children: set[int] = set()
    while True:
        ready = select.select([control], [], [], 0.05 if children else None)[0]
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.discard(pid)
                control.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())
        if not ready:
            continue
        said, descriptors, _, _ = socket.recv_fds(control, _LONGEST, 2)
        if not said:
            sys.exit(0)
        pid = os.fork()
        if pid == 0:
            control.close()
            _become(json.loads(said), *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        children.add(pid)
        control.send(json.dumps({"pid": pid}).encode())


def _become(request: Mapping[str, Any], log: int, lifeline: int) -> None:
    """Make a fresh child what a process started for a stage is."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    os.environ.update({**request["environment"], LIFELINE: str(lifeline)})
    os.chdir(request["directory"])
    sys.argv[1:] = request["arguments"]


def _main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the suite was killed
        serve(control)
        runpy.run_module("lit_merge", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
