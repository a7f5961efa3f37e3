"""What a drawn task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lit_merge.data.embedded.canvas import Brush

__all__ = ["SPLITS", "EmbeddedTask"]

SPLITS = {"train": 3000, "val": 500, "test": 1000}


@dataclass(frozen=True)
class EmbeddedTask:
    """One classification task of 32 x 32 RGB images.

    Attributes:
        name: the task's name.
        mirrors: which data set of the literature it stands for; empty for the finer tasks, which stand for none.
        classes: class names, in label order.
        templates: prompt templates with one ``{}``.
        draw: ``(brush, label) -> uint8 [32, 32, 3]``; ``None`` for the real handwritten digits.
        sizes: images per split.
    """

    name: str
    mirrors: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    draw: Callable[[Brush, int], np.ndarray] | None
    sizes: tuple[tuple[str, int], ...] = tuple(SPLITS.items())

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return dict(self.sizes)[split]
