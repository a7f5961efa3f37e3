"""Which image comes when, and on which process.

All samplers are a ``DistributedSampler`` for any number of processes, one included: Lightning leaves such a sampler
in place, where it would replace or wrap another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice
from typing import cast

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from lit_merge.data.batch import PADDING
from lit_merge.errors import DataError

__all__ = ["EvaluationSampler", "GroupedSampler", "TrainingSampler", "training_batch_size"]


class TrainingSampler(DistributedSampler[int]):
    """A new order every epoch; together the processes see the same global batches as one process would.

    Process r of W takes every W-th entry of the epoch's permutation, from the r-th on, and the last ``N mod W`` are
    left out. What it yields is ``epoch * N + index``: the epoch travels with the index, so that it reaches a data set
    that was copied to a worker process in an earlier epoch.

    Args:
        dataset: the N images.
        processes: W.
        rank: r, in [0, W).
        seed: of the permutations.

    Attributes:
        skip: number of entries to leave out at the beginning, to go on in the middle of an epoch.
    """

    def __init__(self, dataset: Dataset[object], processes: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, processes, rank, shuffle=True, seed=seed, drop_last=True)
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(cast(Sized, self.dataset))
        return (start + index for index in islice(super().__iter__(), self.skip, None))


class GroupedSampler(TrainingSampler):
    """As :class:`TrainingSampler`, but batches hold examples of similar length.

    The epoch's permutation is cut into groups of so many global batches; within each group examples are put in the
    order of their lengths (equal ones in that of the permutation) and cut into batches; the epoch's batches, but for
    the last, incomplete one, then come in an order of their own. Every example is as probable in any place of the
    epoch as before, up to its group. Which examples a global batch holds does not depend on the number of processes.

    Args:
        dataset: the N examples.
        lengths: of the examples, int64 ``[N]``.
        groups: batches that are sorted together, at least 1.
        batch_size: examples per process and batch.
        processes: W.
        rank: r, in [0, W).
        seed: of the permutations.
    """

    def __init__(
        self,
        dataset: Dataset[object],
        lengths: np.ndarray,
        groups: int,
        batch_size: int,
        processes: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, processes, rank, seed)
        self.lengths, self.groups, self.global_batch = lengths, groups, batch_size * processes

    def __iter__(self) -> Iterator[int]:
        count = len(cast(Sized, self.dataset))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(count, generator=generator).numpy()
        size = self.groups * self.global_batch
        parts = [order[start : start + size] for start in range(0, count, size)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        whole = count // self.global_batch
        batches = order[: whole * self.global_batch].reshape(whole, self.global_batch)
        batches = batches[torch.randperm(whole, generator=generator).numpy()]
        order = np.concatenate([batches.reshape(-1), order[whole * self.global_batch :]])[: self.total_size]
        own = self.epoch * count + order[self.rank :: self.num_replicas]
        return iter(own[self.skip :].tolist())


class EvaluationSampler(DistributedSampler[int]):
    """The split in its own order; every process gets ``ceil(N / W)`` entries, the surplus ones are -1, padding.

    Args:
        dataset: the N images.
        processes: W.
        rank: r, in [0, W).
    """

    def __init__(self, dataset: Dataset[object], processes: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, processes, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        count = len(cast(Sized, self.dataset))
        return (index if index < count else PADDING for index in range(self.rank, self.total_size, self.num_replicas))


def training_batch_size(count: int, batch_size: int, processes: int, name: str) -> int:
    """Images per process and batch: ``batch_size``, or less where the split is smaller than one global batch.

    Args:
        count: images of the split.
        batch_size: what was asked for, per process.
        processes: number of processes.
        name: the task's name, for the message.

    Raises:
        DataError: there are fewer images than processes.
    """
    if count < processes:
        raise DataError(
            f"{name}: expected at least one training image per process, got {count} for {processes} processes. "
            "Use fewer devices or more images."
        )
    return min(batch_size, count // processes)
