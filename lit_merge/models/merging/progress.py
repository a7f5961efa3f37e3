"""The progress bar of a merge: on the standard error, and only if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from lit_merge.files.lazy import LazyMapping
from lit_merge.files.shards import bytes_of
from lit_merge.vectors.global_value import Statistic

__all__ = ["MergeProgress", "merge_progress"]


class MergeProgress:
    """Tells how far a merge is; without a bar it is silent."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar

    def find_out(self, statistics: Sequence[Statistic[Any]]) -> None:
        """Compute what has to be known about all parameters, one statistic after the other."""
        for statistic in statistics:
            task = self._bar.add_task(statistic.what, total=None) if self._bar else None
            statistic()
            if self._bar and task is not None:
                self._bar.update(task, total=1, completed=1)

    def watch(self, tensors: LazyMapping, what: str) -> LazyMapping:
        """The same tensors; the bar moves when one is read."""
        if not self._bar:
            return tensors
        task = self._bar.add_task(what, total=sum(bytes_of(tensors, name) for name in tensors))
        return _Watched(tensors, self._bar, task)


@contextmanager
def merge_progress(shown: bool) -> Iterator[MergeProgress]:
    """A progress bar for the time of a merge, if it is asked for and the standard error is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield MergeProgress(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield MergeProgress(bar)


class _Watched(LazyMapping):
    def __init__(self, tensors: LazyMapping, bar: Progress, task: TaskID) -> None:
        self._tensors, self._bar, self._task = tensors, bar, task

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._bar.advance(self._task, bytes_of(self._tensors, name))
        return tensor

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, piece in self._tensors.stream(names):
            self._bar.advance(self._task, piece.nbytes)
            yield name, piece

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)
