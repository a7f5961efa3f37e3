"""The data module of several tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lit_merge.data.batch import Batch
from lit_merge.data.embedded.drawing import draw_missing
from lit_merge.data.embedded.tasks import EMBEDDED_TASKS, FINE_SUITE
from lit_merge.data.packaged.registry import PACKAGED_SUITES
from lit_merge.data.published.registry import SUITES
from lit_merge.data.published.task import is_published
from lit_merge.data.published.text_registry import TEXT_SUITES
from lit_merge.data.sources import EmbeddedSource, Task
from lit_merge.data.task import TaskDataModule
from lit_merge.errors import ConfigurationError, first_few

__all__ = ["MultiTaskDataModule", "task_names"]


def task_names(data: Any) -> tuple[str, ...]:
    """The tasks of a data module.

    Raises:
        ConfigurationError: the data are not of several tasks.
    """
    if not hasattr(data, "task_names"):
        got = "none" if data is None else type(data).__name__
        raise ConfigurationError(f"data: expected a data module of several tasks, got {got}. Use MultiTaskDataModule.")
    return tuple(data.task_names)


class MultiTaskDataModule(L.LightningDataModule):
    """Several tasks side by side: a training batch holds one batch of each.

    A training batch is ``dict[task name, Batch]``. An epoch is as long as the largest task's; the others start
    again, in the same order, when they are through. Validation and test have one loader per task, in the order of
    :attr:`task_names`.

    Args:
        tasks: tasks of the embedded suite, published data sets, or suites of these, e.g. ``clip8``, ``t5_7`` or
            ``embedded20``; None for all of the embedded suite, or for none if there are ``paths`` or ``sources``.
        paths: name -> folder of own images, see :class:`~lit_merge.data.TaskDataModule`.
        batch_size: training images per task, process and batch.
        evaluation_batch_size: images per process and batch in validation and test.
        workers: processes per task that read the images.
        seed: of the order and the augmentation.
        augment: whether training images are augmented.
        class_names: name of a path -> its ``class_names``.
        templates: task name -> its ``templates``.
        fractions: shares of train, val and test where a folder is divided.
        split_seed: of that division.
        skip_corrupt: whether damaged images of the paths are left out.
        labelled: False gives the training images the label -1, as test-time merging wants it.
        preprocessing: what the model expects of images; None takes ``preprocessing`` of the trainer's module.
        root: the folder of the published data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        sources: name -> task of one's own, by class path.

    Attributes:
        tasks: task name -> its data module.

    Raises:
        ConfigurationError: no task, a task twice, a name that is none of the tasks, or what
            :class:`~lit_merge.data.TaskDataModule` refuses.
    """

    trainer: L.Trainer | None

    def __init__(
        self,
        tasks: list[str] | None = None,
        paths: dict[str, str] | None = None,
        batch_size: int = 128,
        evaluation_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
        class_names: dict[str, dict[str, str]] | None = None,
        templates: dict[str, list[str] | str] | None = None,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        skip_corrupt: bool = False,
        labelled: bool = True,
        preprocessing: Any = None,
        root: str | None = None,
        sources: dict[str, Task] | None = None,
    ) -> None:
        super().__init__()
        named = list(tasks) if tasks is not None else ([] if paths or sources else list(EMBEDDED_TASKS))
        suites = {**FINE_SUITE, **SUITES, **PACKAGED_SUITES, **{suite: one.tasks for suite, one in TEXT_SUITES.items()}}
        named = [name for given in named for name in suites.get(given, (given,))]
        folders = dict(paths or {})
        names = [*named, *folders, *(sources or {})]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if not names or repeated:
            raise ConfigurationError(
                f"tasks, paths and sources: expected at least one task, each name once, got "
                f"{f'{first_few(repeated)} more than once' if repeated else 'none'}. Name each task once."
            )
        self._refuse_unknown("class_names", class_names or {}, list(folders))
        self._refuse_unknown("templates", templates or {}, [*named, *folders])
        shared: dict[str, Any] = {
            "batch_size": batch_size,
            "evaluation_batch_size": evaluation_batch_size,
            "workers": workers,
            "seed": seed,
            "augment": augment,
            "labelled": labelled,
            "preprocessing": preprocessing,
        }
        self.tasks: dict[str, TaskDataModule] = {}
        for name in named:
            own_root = root if is_published(name) else None
            self.tasks[name] = TaskDataModule(task=name, templates=(templates or {}).get(name), root=own_root, **shared)
        for name, path in folders.items():
            self.tasks[name] = TaskDataModule(
                path=path,
                name=name,
                class_names=(class_names or {}).get(name),
                templates=(templates or {}).get(name),
                fractions=fractions,
                split_seed=split_seed,
                skip_corrupt=skip_corrupt,
                **shared,
            )
        for name, source in (sources or {}).items():
            source.name = name
            self.tasks[name] = TaskDataModule(source=source, **shared)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks' names, in the order of the loaders."""
        return tuple(self.tasks)

    def subset(self, names: Sequence[str]) -> MultiTaskDataModule:
        """A data module of some of the tasks, in the order given; it shares their data modules with this one.

        Raises:
            ConfigurationError: no name, a name twice, or a name that is none of the tasks.
        """
        names = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in self.tasks]
        if unknown or not names or len(set(names)) < len(names):
            raise ConfigurationError(
                f"subset: expected names among {', '.join(self.tasks)}, each once, got "
                f"{first_few(unknown or names) or 'none'}. Choose some of them."
            )
        chosen = copy.copy(self)
        chosen.trainer = None
        chosen.tasks = {name: self.tasks[name] for name in names}
        return chosen

    def prepare_data(self) -> None:
        """Draw and cache what is missing; Lightning calls this on one process per machine."""
        sources = [module.source for module in self.tasks.values()]
        draw_missing([(one.drawn, one.sizes) for one in sources if isinstance(one, EmbeddedSource)])
        for module in self.tasks.values():
            module.prepare_data()

    def setup(self, stage: str) -> None:
        """Read all tasks' splits of a stage: ``fit``, ``validate`` or ``test``.

        Raises:
            ConfigurationError: the preprocessing is not known.
            DataError: a task's images are missing or unreadable.
        """
        for module in self.tasks.values():
            module.trainer = self.trainer
            module.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """One batch of every task at a time, ``dict[task name, Batch]``, until the largest task is through."""
        loaders = {name: module.train_dataloader() for name, module in self.tasks.items()}
        return CombinedLoader(loaders, mode="max_size_cycle")

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per task, in the order of :attr:`task_names`; an empty one where a task has no such images."""
        return [module.evaluation_loader("val") for module in self.tasks.values()]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per task, in the order of :attr:`task_names`."""
        return [module.test_dataloader() for module in self.tasks.values()]

    def _refuse_unknown(self, argument: str, given: Mapping[str, object], valid: Sequence[str]) -> None:
        unknown = [name for name in given if name not in valid]
        if unknown:
            raise ConfigurationError(
                f"{argument}: expected names among {', '.join(valid) or 'those of paths, of which there are none'}, "
                f"got {first_few(unknown)}. Correct or remove them."
            )
