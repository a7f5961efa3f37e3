"""Unlabelled images of other tasks beside every training batch, for a penalty on what the task vector does to them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from lit_merge.data.batch import OtherBatch
from lit_merge.data.embedded.tasks import EMBEDDED_TASKS, FINE_TASKS, SPLITS
from lit_merge.data.examples import Examples
from lit_merge.data.images.folders import FolderSource
from lit_merge.data.loading import ResumableLoader
from lit_merge.data.paths import named_path
from lit_merge.data.published.task import named_source
from lit_merge.data.sources import EmbeddedSource, Task
from lit_merge.errors import ConfigurationError, DataError, first_few

__all__ = [
    "ImagePenalty",
    "OtherImages",
    "OtherLoader",
    "OtherSampler",
    "images_per_task",
    "known_others",
    "read_other_images",
    "sources_in_use",
]

_SCHEDULES = ("strict", "cyclic")


class ImagePenalty(Protocol):
    """What the data need to know of the ``penalty`` of the trainer's module."""

    @property
    def schedule(self) -> Literal["strict", "cyclic"]:
        """Whether a step sees images of every other task, or of one at a time in turn."""

    @property
    def batch_size(self) -> int | None:
        """Images per process, batch and other task; None for an eighth of the own task's, at least 1."""

    @property
    def tasks(self) -> Sequence[str] | None:
        """The other tasks to use, in this order; None for all that the data module knows."""

    @property
    def images(self) -> int | None:
        """How many images of each other task to use, chosen at random; None for all."""

    @property
    def split(self) -> Literal["train", "val", "test"]:
        """Which of the other tasks' splits the images come from."""


def known_others(
    own: Task,
    embedded: Sequence[str] | None,
    folders: Mapping[str, str],
    fractions: Sequence[float],
    split_seed: int,
    skip_corrupt: bool,
    root: str | None = None,
    given: Mapping[str, Task] | None = None,
) -> dict[str, Task]:
    """The tasks beside the own one, by name; nothing is read.

    Args:
        own: the own task.
        embedded: tasks of the embedded suite or published data sets; None for all of the own one's suite but that
            one, or for none if it is not a drawn task.
        folders: name -> folder.
        fractions: of the folders, see :class:`~lit_merge.data.images.folders.FolderSource`.
        split_seed: of the folders.
        skip_corrupt: of the folders.
        root: the folder of the published data sets.
        given: name -> further tasks.

    Raises:
        ConfigurationError: a name is unknown, given twice, or that of the own task; a folder is the own task's.
    """
    if embedded is None:
        beside = (
            () if not isinstance(own, EmbeddedSource) else FINE_TASKS if own.drawn in FINE_TASKS else EMBEDDED_TASKS
        )
        embedded = [name for name in beside if name != own.name]
    names = [*embedded, *folders, *(given or {})]
    sources: dict[str, Task] = {name: named_source(name, root) for name in embedded}
    for name, path in folders.items():
        source = named_path(path, fractions=fractions, seed=split_seed, skip_incomplete=skip_corrupt)
        same = False
        if isinstance(own, FolderSource) and isinstance(source, FolderSource):
            same = source.path.resolve() == own.path.resolve()
        if name == own.name or same:
            names.append(own.name)
        source.name = name
        sources[name] = source
    sources.update(given or {})
    repeated = sorted({name for name in names if names.count(name) > 1})
    if own.name in names or repeated:
        got = f"{own.name} itself" if own.name in names else f"{first_few(repeated)} more than once"
        raise ConfigurationError(
            f"other_tasks and other_paths: expected tasks beside {own.name}, each name once, got {got}. Remove it."
        )
    return sources


def sources_in_use(penalty: ImagePenalty, known: Mapping[str, Task], trainer: Any) -> dict[str, Task]:
    """The other tasks that a penalty is about, in its order; nothing is read.

    Raises:
        ConfigurationError: there are none, ``penalty.tasks`` has an unknown name or one twice, another setting is
            unknown or out of its range, or the trainer cannot keep the schedule.
    """
    if not known:
        raise ConfigurationError(
            "penalty: expected at least one other task, got none. "
            "Set data.other_tasks or data.other_paths, or remove the penalty."
        )
    names = list(known if penalty.tasks is None else penalty.tasks)
    wrong = [name for name in names if name not in known or names.count(name) > 1]
    if wrong or not names:
        raise ConfigurationError(
            f"penalty.tasks: expected names among {', '.join(known)}, each once, got {first_few(wrong) or 'none'}. "
            "Choose some of them."
        )
    _check_settings(penalty)
    _check_trainer(penalty, trainer)
    return {name: known[name] for name in names}


def images_per_task(penalty: ImagePenalty, batch_size: int) -> int:
    """Images per process, batch and other task, beside ``batch_size`` of the own one."""
    return max(1, batch_size // 8) if penalty.batch_size is None else penalty.batch_size


def read_other_images(
    penalty: ImagePenalty,
    sources: Mapping[str, Task],
    preprocessing: Any,
    seed: int,
    augment: bool,
    batch_size: int,
    processes: int,
) -> OtherImages:
    """The images that a penalty may draw.

    Args:
        penalty: whose images.
        sources: its other tasks.
        preprocessing: what the network needs of its data.
        seed: of the choice and the augmentation.
        augment: whether to augment.
        batch_size: images per process, batch and other task.
        processes: number of processes.

    Raises:
        DataError: a task's images are missing or unreadable, or its split has none.
        ConfigurationError: a task has fewer images than all processes draw at a time.
    """
    read = {
        name: source.split(penalty.split, preprocessing, seed if augment else None) for name, source in sources.items()
    }
    images = OtherImages(read, penalty.images, seed)
    for (name, whole), used in zip(read.items(), images.used, strict=True):
        if not len(whole):
            raise DataError(f"{name}: expected {penalty.split} images for the penalty, got none. Change penalty.split.")
        if len(used) < batch_size * processes:
            raise ConfigurationError(
                f"penalty.batch_size: expected at most the {len(used)} images used of {name} for all processes "
                f"together, got {batch_size} x {processes} = {batch_size * processes}. "
                f"Lower penalty.batch_size{' or raise penalty.images' if len(used) < len(whole) else ''}."
            )
    return images


class OtherImages(Dataset[OtherBatch]):
    """Images of K other tasks, indexed by what :class:`OtherSampler` yields: ``(task, round * N + index)``.

    Args:
        tasks: name -> the N images of its split.
        count: how many of each task may be used, chosen at random; None for all.
        seed: of the choice.

    Attributes:
        names: of the tasks.
        tasks: their images.
        used: of each task the positions in its split that may be used, int64, ascending.
    """

    def __init__(self, tasks: Mapping[str, Examples], count: int | None = None, seed: int = 0) -> None:
        self.names, self.tasks = tuple(tasks), tuple(tasks.values())
        self.used = [
            np.sort(_generator(seed, name, 0).permutation(len(images))[:count]) for name, images in tasks.items()
        ]

    def __len__(self) -> int:
        return sum(map(len, self.used))

    def __getitem__(self, draw: tuple[int, int]) -> OtherBatch:
        """A batch of one."""
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> OtherBatch:
        """The batch of B draws, those of a task side by side; torch's loader calls it with all of a batch's."""
        parts = [
            self.tasks[task].__getitems__([draw for _, draw in group]) for task, group in groupby(draws, itemgetter(0))
        ]
        joined = type(parts[0]).join(parts)
        return OtherBatch(joined.inputs, torch.tensor([task for task, _ in draws]), joined.indices)


class OtherSampler(DistributedSampler[Any]):
    """Which images of K other tasks come beside which batch of the own task.

    A batch of optimiser step s holds, per process, b images of every task (``"strict"``), or b of task ``s mod K``
    (``"cyclic"``). Each task's images are an endless stream, one permutation of them after another; the processes take
    W·b at a time from it, process r every W-th from the r-th on. Where a batch's images are in the streams is a
    function of the epoch and the batch's place in it. It is a ``DistributedSampler`` for any number of processes, so
    that Lightning leaves it in place.

    What it yields is ``(task, round * N + index)``, see :class:`~lit_merge.data.sampling.TrainingSampler`.

    Args:
        dataset: the images.
        schedule: ``"strict"`` or ``"cyclic"``.
        batch_size: b.
        length: batches of the own task's loader.
        processes: W.
        rank: r, in [0, W).
        seed: of the permutations.

    Attributes:
        entries: of a batch: b, or K·b.
        batches: batches that an epoch has, at most ``length``.
        accumulate: batches of an optimiser step; an epoch's last step may have fewer.
        skip: number of entries to leave out at the beginning, to go on in the middle of an epoch.
    """

    dataset: OtherImages

    def __init__(
        self,
        dataset: OtherImages,
        schedule: Literal["strict", "cyclic"],
        batch_size: int,
        length: int,
        processes: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, processes, rank, seed=seed)
        self.schedule, self.batch_size, self.length = schedule, batch_size, length
        self.entries = batch_size * (len(dataset.names) if schedule == "strict" else 1)
        self.batches, self.accumulate, self.skip = length, 1, 0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.length * self.entries

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for batch in range(self.skip // self.entries, self.batches):
            for task, turn in self._turns(batch):
                yield from ((task, draw) for draw in self._draws(task, turn))

    def _turns(self, batch: int) -> list[tuple[int, int]]:
        """The tasks of a batch of this epoch, and how many batches of the run have drawn from each before."""
        count = len(self.dataset.names)
        if self.schedule == "strict":
            return [(task, self.epoch * self.batches + batch) for task in range(count)]
        steps = math.ceil(self.batches / self.accumulate)
        step = self.epoch * steps + batch // self.accumulate
        task = step % count
        # Steps with the same task would all have had as many batches, but for those that ended an epoch early.
        missing = steps * self.accumulate - self.batches
        ended = sum(last % count == task for last in range(steps - 1, self.epoch * steps, steps))
        return [(task, step // count * self.accumulate + batch % self.accumulate - missing * ended)]

    def _draws(self, task: int, turn: int) -> list[int]:
        start, size = turn * self.batch_size * self.num_replicas, self.batch_size * self.num_replicas
        places = np.arange(start + self.rank, start + size, self.num_replicas)
        rounds, places = np.divmod(places, len(self.dataset.used[task]))
        orders = np.stack([self._order(task, number) for number in range(rounds[0], rounds[-1] + 1)])
        return (rounds * len(self.dataset.tasks[task]) + orders[rounds - rounds[0], places]).tolist()

    def _order(self, task: int, number: int) -> np.ndarray:
        """Positions of a task's images in the order of a round; the last round is kept."""
        if task not in self._orders or self._orders[task][0] != number:
            generator = _generator(self.seed, self.dataset.names[task], 1 + number)
            self._orders[task] = number, generator.permutation(self.dataset.used[task])
        return self._orders[task][1]


class OtherLoader(ResumableLoader):
    """The loader of an :class:`OtherSampler`: as long as the own task's, and going on where that one does."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of one epoch; the schedule is the trainer's, which it knows when the first is asked for."""
        sampler: Any = self.sampler
        if self.trainer is not None:
            sampler.batches = min(len(self), self.trainer.num_training_batches)
            sampler.accumulate = self.trainer.accumulate_grad_batches
        yield from super().__iter__()


def _generator(seed: int, name: str, number: int) -> np.random.Generator:
    """By name, so that a task's stream does not depend on which others there are."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), number))


def _check_settings(penalty: ImagePenalty) -> None:
    for setting, value, known in (
        ("schedule", penalty.schedule, _SCHEDULES),
        ("split", penalty.split, tuple(SPLITS)),
    ):
        if value not in known:
            raise ConfigurationError(
                f"penalty.{setting}: expected one of {', '.join(known)}, got {value!r}. Change it."
            )
    for setting, count in (("batch_size", penalty.batch_size), ("images", penalty.images)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ConfigurationError(
                f"penalty.{setting}: expected an integer of at least 1, or none, got {count!r}. Change it."
            )


def _check_trainer(penalty: ImagePenalty, trainer: Any) -> None:
    if trainer.overfit_batches:
        raise ConfigurationError(
            f"overfit_batches: expected 0 with a penalty, because it replaces the order of the other tasks' images, "
            f"got {trainer.overfit_batches}. Set limit_train_batches instead."
        )
    factors = {
        factor
        for callback in trainer.callbacks
        if isinstance(callback, GradientAccumulationScheduler)
        for factor in callback.scheduling.values()
    }
    if penalty.schedule == "cyclic" and len(factors) > 1:
        raise ConfigurationError(
            "penalty.schedule: expected strict with a GradientAccumulationScheduler, because the cycle counts steps, "
            "got cyclic. Set accumulate_grad_batches instead, or penalty.schedule to strict."
        )
