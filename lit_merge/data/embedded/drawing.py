"""Many splits at once, drawn into the cache by several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from torch.utils.data import DataLoader, Dataset

from lit_merge.data.embedded.tasks import DRAWN_TASKS, EMBEDDED_TASKS, FINE_SUITE, SPLITS, load_split
from lit_merge.errors import ConfigurationError

__all__ = ["DRAWN_NAMES", "draw_splits"]

DRAWN_NAMES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in DRAWN_TASKS},
    "embedded": tuple(EMBEDDED_TASKS),
    **FINE_SUITE,
}
"""Name of a drawn task, or of a suite of them -> the tasks."""


class _Splits(Dataset[str]):
    """Splits that are in the cache once they have been asked for; the largest are first, so that no process waits."""

    def __init__(self, names: Sequence[str]) -> None:
        self.splits = [
            (name, split) for split in sorted(SPLITS, key=SPLITS.__getitem__, reverse=True) for name in names
        ]

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, index: int) -> str:
        name, split = self.splits[index]
        return f"{name}/{split}: {len(load_split(name, split)[1]):,} images"


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
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 0:
        raise ConfigurationError(f"workers: expected a number of at least 0, got {workers}. Raise it.")
    splits = _Splits(list(dict.fromkeys(names)))
    for line in DataLoader(splits, batch_size=None, num_workers=min(workers, len(splits))):
        say(line)
