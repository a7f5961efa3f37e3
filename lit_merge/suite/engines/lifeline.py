"""How a stage's process notices that what started it is gone, even if that was killed."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["LIFELINE", "follow_lifeline"]

LIFELINE = "LIT_MERGE_LIFELINE"
"""The variable that holds the descriptor of a pipe whose other end the starting process holds open."""


def follow_lifeline() -> None:
    """End this process's whole group when the pipe's other end closes; without such a pipe, do nothing.

    Otherwise the stages of a suite that was killed would go on writing where the next one writes.
    """
    descriptor = os.environ.pop(LIFELINE, "")  # not for the processes that this one starts: they are of its group
    if not descriptor.isdecimal() or os.getpgrp() != os.getpid():
        return
    threading.Thread(target=_watch, args=(int(descriptor),), daemon=True).start()


def _watch(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1):
            pass
    except OSError:  # not our pipe
        return
    os.killpg(0, signal.SIGKILL)
