"""The twenty tasks of the finer suite, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lit_merge.data.embedded.canvas import Brush
from lit_merge.data.embedded.fine import forms, marks, views
from lit_merge.data.embedded.task import EmbeddedTask

__all__ = ["FINE_SIZES", "FINE_TASKS"]

FINE_SIZES = {"train": 10_000, "val": 2_000, "test": 5_000}
"""Images per split unless a task is made with others: standard errors of an accuracy are below 0.7 points."""

_A = ("a photo of a {}.", "a drawing of a {}.", "a {}.")


def _task(
    name: str,
    classes: tuple[str, ...],
    draw: Callable[[Brush, int], np.ndarray],
    templates: tuple[str, ...] = _A,
) -> EmbeddedTask:
    return EmbeddedTask(name, "", classes, templates, draw, tuple(FINE_SIZES.items()))


_TABLE = (
    _task(
        "numbers",
        marks.NUMBERS,
        marks.draw_number,
        ("a photo of the number {}.", "the digits {}.", "a house number {}."),
    ),
    _task(
        "monograms",
        marks.MONOGRAMS,
        marks.draw_monogram,
        ("the letters {}.", "a photo of the letters {}.", "the monogram {}."),
    ),
    _task("coloured_letters", marks.COLOURED_LETTERS, marks.draw_coloured_letter),
    _task("plates", marks.PLATES, marks.draw_plate, ("a photo of a {}.", "a plate that is a {}.", "a {}.")),
    _task("arrows", marks.ARROWS, marks.draw_arrow),
    _task("clocks", marks.CLOCKS, marks.draw_clock, ("a clock showing {}.", "a photo of a clock at {}.", "it is {}.")),
    _task("flags", marks.FLAGS, marks.draw_flag, ("a {} flag.", "a photo of a {} flag.", "a flag of {} stripes.")),
    _task("cards", marks.CARDS, marks.draw_card, ("the {}.", "a photo of the {}.", "a playing card, the {}.")),
    _task(
        "dominoes", marks.DOMINOES, marks.draw_domino, ("a domino, {}.", "a photo of the domino {}.", "{} on a domino.")
    ),
    _task("coloured_shapes", forms.COLOURED_SHAPES, forms.draw_coloured_shape),
    _task(
        "counted_shapes", forms.COUNTED_SHAPES, forms.draw_counted_shapes, ("{}.", "a photo of {}.", "a drawing of {}.")
    ),
    _task("nested_shapes", forms.NESTED_SHAPES, forms.draw_nested_shapes),
    _task("paired_shapes", forms.PAIRED_SHAPES, forms.draw_paired_shapes),
    _task("placed_shapes", forms.PLACED_SHAPES, forms.draw_placed_shape),
    _task(
        "coloured_textures",
        forms.COLOURED_TEXTURES,
        forms.draw_coloured_texture,
        ("a {} texture.", "a photo of a {} pattern.", "a {} surface."),
    ),
    _task("textured_shapes", forms.TEXTURED_SHAPES, forms.draw_textured_shape),
    _task("painted_vehicles", views.PAINTED_VEHICLES, views.draw_painted_vehicle),
    _task("journeys", views.JOURNEYS, views.draw_journey),
    _task(
        "seasons",
        views.SEASONS,
        views.draw_season,
        ("a satellite photo of {}.", "an aerial view of {}.", "{} seen from above."),
    ),
    _task(
        "weather",
        views.WEATHER,
        views.draw_weather,
        ("a photo of a {}.", "a landscape of a {}.", "a view of a {}."),
    ),
)

FINE_TASKS: dict[str, EmbeddedTask] = {task.name: task for task in _TABLE}
"""Every task of the finer suite by name, in the order of the tables."""
