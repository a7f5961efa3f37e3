"""The task that a path stands for: texts in a table, or images in folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_merge.data.images.folders import FolderSource
from lit_merge.data.sources import Task
from lit_merge.data.text.tables import is_table
from lit_merge.data.text.task import TextTask

__all__ = ["named_path"]


def named_path(
    path: str,
    class_names: Mapping[str, str] | None = None,
    templates: Sequence[str] | str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    skip_incomplete: bool = False,
) -> Task:
    """A :class:`~lit_merge.data.text.task.TextTask` or a :class:`~lit_merge.data.images.folders.FolderSource`.

    Args:
        path: a file of texts, with the columns text and label; a folder with such files for train, val and test; or a
            folder of images.
        class_names: label, or name of a folder -> class name.
        templates: of the class-name head.
        fractions: of train, val and test.
        seed: of the division.
        skip_incomplete: whether damaged images, or rows without a text or label, are left out.

    Raises:
        ConfigurationError: the templates or fractions are unusable.
    """
    if not is_table(Path(path).expanduser()):
        return FolderSource(path, class_names, templates, fractions, seed, skip_incomplete)
    return TextTask(
        path,
        classes=None if class_names is None else dict(class_names),
        templates=templates if templates is None or isinstance(templates, str) else list(templates),
        fractions=(fractions[0], fractions[1], fractions[2]),
        seed=seed,
        skip_incomplete=skip_incomplete,
    )
