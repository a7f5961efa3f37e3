"""A task with its examples: what all have in common, and those of the embedded suite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lit_merge.data.embedded.tasks import DRAWN_TASKS, SPLITS, load_split, sized_task
from lit_merge.data.examples import Examples
from lit_merge.data.images.datasets import ImageDataset, ImagePreprocessing, TensorImages
from lit_merge.data.templates import templates_for
from lit_merge.errors import ConfigurationError, first_few

__all__ = ["EmbeddedSource", "Task", "chosen_templates"]


class Task(ABC):
    """One task with its examples; subclass it for one of your own, and name it by its import path.

    Attributes:
        name: the task's name.
        classes: class names, in the order of the targets; empty for a task without classes.
        templates: prompt templates with one ``{}``.
        regression: whether the targets are numbers instead of classes.
    """

    name: str
    classes: tuple[str, ...] = ()
    regression: bool = False
    templates: tuple[str, ...] = ("{}",)

    def prepare(self) -> None:  # noqa: B027 - not every task has something to bring
        """Bring the examples to the disk; called on one process per machine. By default there is nothing to do."""

    @abstractmethod
    def split(self, split: str, preprocessing: Any, augmentation_seed: int | None = None) -> Examples:
        """The examples of ``"train"``, ``"val"`` or ``"test"``.

        Args:
            split: which of them; a task without validation or test examples gives none, of length 0.
            preprocessing: the network's, which makes its inputs.
            augmentation_seed: of the augmentation; None for none.
        """


class EmbeddedSource(Task):
    """A task of the embedded suite, or of the finer one.

    Args:
        name: one of :data:`~lit_merge.data.embedded.tasks.DRAWN_TASKS`.
        templates: other prompt templates, see :func:`chosen_templates`; None for the task's own.
        sizes: split -> images, for ``train``, ``val`` and ``test`` that are to have another number of them.

    Attributes:
        drawn: the name in :data:`~lit_merge.data.embedded.tasks.DRAWN_TASKS`, whatever ``name`` becomes.

    Raises:
        ConfigurationError: there is no such task, or the templates are unusable.
        DataError: the sizes are.
    """

    def __init__(
        self,
        name: str,
        templates: Sequence[str] | str | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        if name not in DRAWN_TASKS:
            raise ConfigurationError(f"task: expected one of {', '.join(DRAWN_TASKS)}, got {name!r}. Choose one.")
        task = sized_task(name, sizes)
        self.name, self.drawn, self.sizes = name, name, dict(sizes or {})
        self.classes = task.classes
        self.templates = chosen_templates(templates, task.templates)

    def prepare(self) -> None:
        """Draw the splits that are not in the cache."""
        for split in SPLITS:
            load_split(self.drawn, split, sizes=self.sizes)

    def split(
        self, split: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None = None
    ) -> ImageDataset:
        """See :meth:`Task.split`.

        Raises:
            DataError: there is no such split.
        """
        images, labels = load_split(self.drawn, split, sizes=self.sizes)
        names = [f"{self.name}/{split}/{index}" for index in range(len(labels))]
        return TensorImages(images, labels, names, preprocessing, augmentation_seed)


def chosen_templates(templates: Sequence[str] | str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The templates that a user asked for.

    Args:
        templates: a list of texts with one ``{}`` each, the name of a data set that has some
            (see :func:`~lit_merge.data.templates_for`), or None.
        default: what None stands for.

    Raises:
        ConfigurationError: the name is unknown, the list is empty, or a text has not exactly one ``{}``.
    """
    if templates is None:
        return default
    if isinstance(templates, str):
        if "{}" in templates:
            raise ConfigurationError(
                f"templates: expected a list or the name of a data set, got the text {templates!r}. Put it into a list."
            )
        return templates_for(templates)
    wrong = [text for text in templates if not isinstance(text, str) or text.count("{}") != 1]
    if wrong or not templates:
        raise ConfigurationError(
            f"templates: expected at least one text, each with exactly one {{}}, got "
            f"{first_few(map(repr, wrong)) or 'none'}. Use e.g. 'a photo of a {{}}.'."
        )
    return tuple(templates)
