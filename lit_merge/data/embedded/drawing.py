"""Many splits at once, drawn into the cache by several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from torch.utils.data import DataLoader, Dataset

from lit_merge.data.embedded.tasks import (
    DRAWN_TASKS,
    EMBEDDED_TASKS,
    FINE_SUITE,
    SPLITS,
    cache_key,
    load_split,
    sized_task,
)
from lit_merge.errors import ConfigurationError
from lit_merge.files.cache import Cache

__all__ = ["DRAWN_NAMES", "draw_missing", "draw_splits"]

_Split = tuple[str, str, Mapping[str, int]]
"""A task's name, a split, and numbers of images, as for :func:`~lit_merge.data.embedded.tasks.sized_task`."""

DRAWN_NAMES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in DRAWN_TASKS},
    "embedded": tuple(EMBEDDED_TASKS),
    **FINE_SUITE,
}
"""Name of a drawn task, or of a suite of them -> the tasks."""


class _Splits(Dataset[str]):
    """Splits that are in the cache once they have been asked for; the largest are first, so that no process waits."""

    def __init__(self, splits: Sequence[_Split]) -> None:
        def size(one: _Split) -> int:
            return sized_task(one[0], one[2]).size(one[1])

        self.splits = sorted(splits, key=size, reverse=True)

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, index: int) -> str:
        name, split, sizes = self.splits[index]
        return f"{name}/{split}: {len(load_split(name, split, sizes=sizes)[1]):,} images"


def draw_missing(tasks: Sequence[tuple[str, Mapping[str, int]]]) -> None:
    """Draw the splits of some tasks that are not in the cache, by as many processes as this one may use processors.

    Args:
        tasks: name and numbers of images.

    Raises:
        WriteError: the disk is full or not writable.
    """
    cache = Cache("embedded")
    splits = [(name, split, sizes) for name, sizes in tasks for split in SPLITS]
    missing = [one for one in splits if not cache.has_tensors(cache_key(*one))]
    workers = min(_processors(), len(missing))
    for _ in DataLoader(_Splits(missing), batch_size=None, num_workers=workers if workers > 1 else 0):
        pass


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_splits(names: Sequence[str], workers: int | None, say: Callable[[str], object]) -> None:
    """Draw all splits of some tasks that are not in the cache.

    Args:
        names: of :data:`~lit_merge.data.embedded.tasks.DRAWN_TASKS`.
        workers: processes that draw, 0 for this one; None for as many as it may use processors.
        say: is given a line per split.

    Raises:
        ConfigurationError: ``workers`` is negative.
        WriteError: the disk is full or not writable.
    """
    if workers is None:
        workers = _processors()
    if workers < 0:
        raise ConfigurationError(f"workers: expected a number of at least 0, got {workers}. Raise it.")
    splits = _Splits([(name, split, {}) for split in SPLITS for name in dict.fromkeys(names)])
    for line in DataLoader(splits, batch_size=None, num_workers=min(workers, len(splits))):
        say(line)
