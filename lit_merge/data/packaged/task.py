"""The classification tasks that `lit-merge data prepare text8` leaves on the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_merge.data.packaged.division import SPLITS
from lit_merge.data.packaged.preparation import found_files
from lit_merge.data.packaged.registry import PACKAGED_SUITES, PACKAGED_TASKS
from lit_merge.data.published.registry import data_root
from lit_merge.data.text.examples import TextExamples
from lit_merge.data.text.task import TextTask
from lit_merge.errors import ConfigurationError, DataError, did_you_mean

__all__ = ["RealTextTask", "real_tasks"]


class RealTextTask(TextTask):
    """Real texts with labels, divided by hash so that no text is in two splits.

    Nothing is downloaded: ``lit-merge data prepare`` does that.

    Args:
        name: a key of :data:`~lit_merge.data.packaged.registry.PACKAGED_TASKS`.
        root: the folder of the data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        templates: prompt templates, see :func:`~lit_merge.data.sources.chosen_templates`; None for the task's own.
        length_groups: see :class:`~lit_merge.data.TextTask`.

    Attributes:
        name: the task's name.
        entry: what is known of it.
        root: the folder of the data sets.

    Raises:
        ConfigurationError: there is no such task, or a setting is out of its range.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike[str] | None = None,
        templates: list[str] | str | None = None,
        length_groups: int = 0,
    ) -> None:
        if name not in PACKAGED_TASKS:
            hint = did_you_mean(name, PACKAGED_TASKS, "`lit-merge data list text12` shows them.")
            raise ConfigurationError(f"name: expected one of {', '.join(PACKAGED_TASKS)}, got {name!r}. {hint}")
        self.entry, self.root = PACKAGED_TASKS[name], data_root(root)
        folder = self.entry.folder(self.root)
        super().__init__(
            files={split: str(folder / f"{split}.jsonl") for split in SPLITS},
            classes=dict(self.entry.labels),
            templates=list(self.entry.templates) if templates is None else templates,
            length_groups=length_groups,
        )
        self.name = name

    def prepare(self) -> None:
        """Look whether all texts are there, and whether they are those of this version.

        Raises:
            DataError: they are not; the error says what to run.
        """
        found = found_files(self.entry, self.root)
        if found.state != "complete":
            raise DataError(found.problem)

    def split(self, split: str, preprocessing: Any, augmentation_seed: int | None = None) -> TextExamples:
        """See :meth:`TextTask.split <lit_merge.data.text.task.TextTask.split>`.

        Raises:
            DataError: as :meth:`prepare` if there is no such file, or the texts do not suit the network.
        """
        if not Path(self.entry.folder(self.root), f"{split}.jsonl").is_file():
            self.prepare()
        return super().split(split, preprocessing, augmentation_seed)


def real_tasks(
    names: Sequence[str] = PACKAGED_SUITES["text8"], root: str | os.PathLike[str] | None = None
) -> dict[str, RealTextTask]:
    """Name -> task, of several.

    Args:
        names: of tasks, those of ``text8`` by default.
        root: as for :class:`RealTextTask`.

    Raises:
        ConfigurationError: there is no such task.

    Examples:
        >>> list(real_tasks(["bbc_news", "mail"]))
        ['bbc_news', 'mail']
    """
    return {name: RealTextTask(name, root) for name in names}
