"""A picture of the embedded suite: some images of every task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_merge.data.embedded.tasks import EMBEDDED_TASKS, load_split
from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.writing import new_file

__all__ = ["contact_sheet"]

_CELL, _GAP, _MARGIN, _TEXT = 32, 2, 8, 72


def contact_sheet(
    output: str | os.PathLike[str],
    tasks: Sequence[str] | None = None,
    split: str = "test",
    columns: int = 16,
    rows: int = 2,
) -> Path:
    """Draw the first images of tasks of the embedded suite, class after class, with the tasks' names at the left.

    Args:
        output: the PNG to write, in an existing folder; it is the old one or the complete new one, whatever happens.
        tasks: names of tasks, from top to bottom; None for all.
        split: ``"train"``, ``"val"`` or ``"test"``.
        columns: images side by side, positive.
        rows: rows of images per task, positive.

    Returns:
        The path of the PNG: ``86 + 34 columns`` pixels wide, ``8 + T (34 rows + 6)`` high for T tasks.

    Raises:
        ConfigurationError: an unknown task, no task, a number below 1, or no such folder.
        DataError: there is no such split.
        WriteError: the PNG cannot be written.
    """
    names = list(EMBEDDED_TASKS) if tasks is None else list(tasks)
    unknown = [name for name in names if name not in EMBEDDED_TASKS]
    if unknown or not names:
        raise ConfigurationError(
            f"tasks: expected some of {', '.join(EMBEDDED_TASKS)}, got {first_few(unknown) or 'none'}. Correct them."
        )
    if columns < 1 or rows < 1:
        raise ConfigurationError(f"columns and rows: expected at least 1 each, got {columns} and {rows}. Raise them.")
    path = Path(output)
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path}: expected an existing folder to write into, got none. Create it first.")
    pitch = _CELL + _GAP
    block = rows * pitch - _GAP + _MARGIN
    size = (_MARGIN + _TEXT + columns * pitch - _GAP + _MARGIN, _MARGIN + len(names) * block)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for position, name in enumerate(names):
        images, labels = load_split(name, split)
        top = _MARGIN + position * block
        draw.text((_MARGIN, top + (rows * pitch - _GAP) // 2), name, fill="black", font=font, anchor="lm")
        for number, index in enumerate(_class_after_class(labels)[: columns * rows]):
            row, column = divmod(number, columns)
            picture = Image.fromarray(images[index].permute(1, 2, 0).numpy())
            sheet.paste(picture, (_MARGIN + _TEXT + column * pitch, top + row * pitch))
    with new_file(path) as file:
        sheet.save(file, format="PNG")
    return path


def _class_after_class(labels: Tensor) -> list[int]:
    """Indices such that every class has its turn before one comes again."""
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        where = labels == label
        turn[where] = torch.arange(int(where.sum()))
    return sorted(range(len(labels)), key=lambda index: (int(turn[index]), int(labels[index])))
