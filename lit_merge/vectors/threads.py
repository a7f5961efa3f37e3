"""Chunks of task vectors on several threads, each computing by itself.

A chunk is small, so that the threads of a single operator would spend their time waiting for each other, above all
beside other work. Here every thread computes whole chunks, and operators inside it use one thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

__all__ = ["NeededInMainThread", "begin", "chunk_threads", "in_worker", "ordered_map"]

_MOST_THREADS = 16  # each has some 30 MiB of chunks, and one thread digests and writes what all compute
_Result = TypeVar("_Result")
_state = threading.local()
_executors: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class NeededInMainThread(Exception):  # noqa: N818 - a request, not an error
    """A worker needs a value over all parameters, which is computed by all workers together."""

    def __init__(self, compute: Callable[[], object]) -> None:
        super().__init__()
        self.compute = compute


def in_worker() -> bool:
    """Whether this thread computes chunks."""
    return getattr(_state, "worker", False)


def chunk_threads() -> int:
    """On how many threads chunks are computed: as many as torch uses for an operator, 16 at most."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def ordered_map(function: Callable[..., _Result], jobs: Iterable[tuple[Any, ...]]) -> Iterator[_Result]:
    """``function(*job)`` of every job, in order, computed ahead on :func:`chunk_threads` threads.

    Gradients are not recorded; inference mode is that of the caller. In a worker, and where torch uses one thread, it
    is a plain loop.
    """
    _keep_freed_memory()
    threads = chunk_threads()
    if threads < 2 or in_worker():
        for job in jobs:
            yield function(*job)
        return
    executor, inference = _executor(threads), torch.is_inference_mode_enabled()
    pending: deque[tuple[tuple[Any, ...], Future[_Result | NeededInMainThread]]] = deque()
    try:
        for job in jobs:
            pending.append((job, executor.submit(_run, function, job, inference)))
            if len(pending) > threads:
                yield _result(function, *pending.popleft())
        while pending:
            yield _result(function, *pending.popleft())
    finally:
        for _, future in pending:
            future.cancel()


def begin(function: Callable[..., _Result], *arguments: Any) -> Future[_Result | NeededInMainThread] | None:
    """Start ``function(*arguments)`` on one of the threads that compute chunks, before those that are given out later.

    Returns:
        What it will be; None, and nothing is started, in a worker and where torch uses one thread.
    """
    threads = chunk_threads()
    if threads < 2 or in_worker():
        return None
    return _executor(threads).submit(_run, function, arguments, torch.is_inference_mode_enabled())


def _result(
    function: Callable[..., _Result], job: tuple[Any, ...], future: Future[_Result | NeededInMainThread]
) -> _Result:
    found = future.result()
    if not isinstance(found, NeededInMainThread):
        return found
    found.compute()
    return function(*job)


def _run(function: Callable[..., _Result], job: tuple[Any, ...], inference: bool) -> _Result | NeededInMainThread:
    with torch.inference_mode(inference), torch.no_grad():  # in this order: leaving inference mode records gradients
        try:
            return function(*job)
        except NeededInMainThread as request:  # not as a future's exception, whose frames hold the chunk
            return request.with_traceback(None)


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep what chunks free, for the next ones.

    By default it may give a few MiB back at every turn: the kernel then clears new pages for every chunk, which takes
    as long as computing it. Blocks of 32 MiB and more are given back as before. Other C libraries do without.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError on Windows
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def _executor(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _executors:
            ready, of_torch = threading.Barrier(threads + 1), torch.get_num_threads()
            executor = ThreadPoolExecutor(threads, "chunks", _begin)
            for _ in range(threads):
                executor.submit(ready.wait)
            ready.wait()
            torch.set_num_threads(of_torch)  # what the workers set for themselves is also the default of new threads
            _executors[threads] = executor
        return _executors[threads]


def _begin() -> None:
    _state.worker = True
    torch.set_num_threads(1)
    torch.get_num_threads()  # at its first use a thread takes over the setting of the process, which is to change back


os.register_at_fork(after_in_child=_executors.clear)  # threads do not survive a fork
