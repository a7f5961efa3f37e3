"""Where a task's images come from: what they have in common, and the embedded suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lit_merge.data.embedded.tasks import EMBEDDED_TASKS, SPLITS, load_split
from lit_merge.data.images.datasets import ImageDataset, ImagePreprocessing, TensorImages
from lit_merge.data.templates import templates_for
from lit_merge.errors import ConfigurationError, first_few

__all__ = ["EmbeddedSource", "TaskSource", "chosen_templates"]


class TaskSource(Protocol):
    """One classification task with its images.

    Attributes:
        name: the task's name.
    """

    name: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates with one ``{}``."""

    def prepare(self) -> None:
        """Bring the images to the disk; called on one process per machine."""

    def split(
        self, split: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None = None
    ) -> ImageDataset:
        """The images of ``"train"``, ``"val"`` or ``"test"``; augmented unless the seed is None."""


class EmbeddedSource:
    """A task of the embedded suite.

    Args:
        name: one of :data:`~lit_merge.data.EMBEDDED_TASKS`.
        templates: other prompt templates, see :func:`chosen_templates`; None for the task's own.

    Raises:
        ConfigurationError: there is no such task, or the templates are unusable.
    """

    def __init__(self, name: str, templates: Sequence[str] | str | None = None) -> None:
        if name not in EMBEDDED_TASKS:
            raise ConfigurationError(f"task: expected one of {', '.join(EMBEDDED_TASKS)}, got {name!r}. Choose one.")
        self.name = name
        self.classes = EMBEDDED_TASKS[name].classes
        self.templates = chosen_templates(templates, EMBEDDED_TASKS[name].templates)

    def prepare(self) -> None:
        """Draw the splits that are not in the cache."""
        for split in SPLITS:
            load_split(self.name, split)

    def split(
        self, split: str, preprocessing: ImagePreprocessing, augmentation_seed: int | None = None
    ) -> ImageDataset:
        """See :meth:`TaskSource.split`.

        Raises:
            DataError: there is no such split.
        """
        images, labels = load_split(self.name, split)
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
