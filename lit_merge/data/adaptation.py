"""The data module that merging coefficients are learned on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import CombinedLoader

from lit_merge.data.batch import PADDING
from lit_merge.data.examples import Examples
from lit_merge.data.multitask import MultiTaskDataModule
from lit_merge.data.task import TaskDataModule
from lit_merge.errors import ConfigurationError, DataError, first_few

__all__ = ["MergeDataModule"]


class MergeDataModule(MultiTaskDataModule):
    """Several tasks whose images a merge is learned on: unlabelled and not augmented, of a split that is named.

    A training batch is ``dict[task name, ImageBatch]``, one batch of every task that is learned on. Validation and test
    have a loader per task, of all of them.

    Args:
        adapt_on: the split whose images are learned on: ``test``, as AdaMerging does (without labels, Yang et al.
            2024), or ``val``, which leaves the test images unseen, or ``train``.
        batch_size: images per task, process and batch; with ``divide: tasks``, images per task and batch.
        fraction: of the split's images that is used, in (0, 1]; at least one image. Which ones depends on ``seed``,
            and less is a part of more.
        adapted: tasks that are learned on, the others are evaluated only; None for the merged ones, if the module says
            which those are, otherwise for all.
        divide: what several processes divide among each other: the images of every task, or the tasks.
        labelled: whether labels are given to the module; the entropy needs none.
        seed: of the order, and of which images the fraction is.
        **settings: of :class:`~lit_merge.data.MultiTaskDataModule`.

    Attributes:
        adapted_tasks: the tasks that are learned on; after ``setup("fit")``.

    Raises:
        ConfigurationError: an argument is out of range, or what :class:`~lit_merge.data.MultiTaskDataModule` refuses.
    """

    def __init__(
        self,
        adapt_on: Literal["train", "val", "test"],
        batch_size: int = 16,
        fraction: float = 1.0,
        adapted: list[str] | None = None,
        divide: Literal["images", "tasks"] = "images",
        labelled: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        for name, value, valid in (
            ("adapt_on", adapt_on, ("train", "val", "test")),
            ("divide", divide, ("images", "tasks")),
        ):
            if value not in valid:
                raise ConfigurationError(f"{name}: expected {', '.join(valid)}, got {value!r}. Use one of them.")
        if not 0 < fraction <= 1:
            raise ConfigurationError(f"fraction: expected a number in (0, 1], got {fraction}. Use e.g. 0.01.")
        super().__init__(batch_size=batch_size, seed=seed, augment=False, labelled=labelled, **settings)
        unknown = [name for name in adapted or [] if name not in self.tasks]
        if unknown or adapted == []:
            raise ConfigurationError(
                f"adapted: expected names among {', '.join(self.tasks)}, got {first_few(unknown) or 'none'}. "
                "Name some of the tasks, or leave it out."
            )
        self.adapt_on, self.fraction, self.divide = adapt_on, fraction, divide
        self.labelled, self.seed = labelled, seed
        self._adapted = adapted
        self.adapted_tasks: tuple[str, ...] = ()

    @property
    def examples(self) -> dict[str, int]:
        """Task -> how many examples it is learned on; after ``setup("fit")``."""
        return {name: len(self.tasks[name].datasets["train"]) for name in self.adapted_tasks}

    @property
    def task_share(self) -> float:
        """The share of the tasks that one process has in its batches: 1, or 1/W where W processes divide them."""
        return 1.0 if self.divide == "images" or self.trainer is None else 1.0 / self.trainer.world_size

    def setup(self, stage: str) -> None:
        """Read all tasks' splits of a stage: ``fit``, ``validate`` or ``test``.

        Raises:
            ConfigurationError: the preprocessing is not known, or there are more processes than tasks to divide.
            DataError: images are missing or unreadable, or a task that is learned on has none.
        """
        if stage != "fit":
            super().setup(stage)
            return
        module = self.trainer.lightning_module if self.trainer is not None else None
        merged = getattr(module, "merged_tasks", None)
        self.adapted_tasks = tuple(self._adapted or [name for name in self.tasks if merged is None or name in merged])
        for name, task in self.tasks.items():
            task.trainer = self.trainer
            preprocessing = task.known_preprocessing()
            task.datasets["val"] = task.source.split("val", preprocessing)
            if name in self.adapted_tasks:
                task.whole = self.divide == "tasks"
                task.datasets["train"] = self._images(name, task, preprocessing)
        if self.divide == "tasks" and self._place()[0] > len(self.adapted_tasks):
            raise ConfigurationError(
                f"divide: expected at most {len(self.adapted_tasks)} processes for as many tasks, got "
                f"{self._place()[0]}. Divide the images, or use fewer devices."
            )

    def _images(self, name: str, task: TaskDataModule, preprocessing: Any) -> Examples:
        images = task.source.split(self.adapt_on, preprocessing)
        if not len(images):
            raise DataError(
                f"{name}: expected images in the split {self.adapt_on} to learn on, got none. Add some, choose another "
                "adapt_on, or leave the task out of adapted."
            )
        if self.fraction < 1:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
            count = math.ceil(Fraction(str(self.fraction)) * len(images))  # 0.07 of 100 is 7; as floats it is more
            images = images.subset(order[:count].sort().values.tolist())
        if not self.labelled:
            images.labels = torch.full_like(images.labels, PADDING)
        return images

    def train_dataloader(self) -> CombinedLoader:
        """One batch of every task that is learned on at a time, until the largest task is through."""
        processes, rank = self._place()
        loaders: dict[str, Any] = {}
        for place, name in enumerate(self.adapted_tasks):
            loader = self.tasks[name].train_dataloader()
            own = self.divide == "images" or place % processes == rank
            loaders[name] = loader if own else _Absent(len(loader))  # so that all epochs are equally long
        return CombinedLoader(loaders, mode="max_size_cycle")

    def _place(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


class _Absent:
    """Stands for a task that another process has: None instead of every batch."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[None]:
        return iter([None] * self._length)
