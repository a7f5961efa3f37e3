"""The tasks of the embedded suite and of the finer one: what they are, how they are drawn, their cached splits."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_merge.data.embedded.canvas import Brush
from lit_merge.data.embedded.characters import DIGIT_WORDS, LETTERS, draw_clutter, draw_letter
from lit_merge.data.embedded.fine.table import FINE_TASKS
from lit_merge.data.embedded.land import LAND_COVER, draw_land
from lit_merge.data.embedded.scenes import SCENES, draw_scene
from lit_merge.data.embedded.signs import SIGN_CLASSES, draw_sign
from lit_merge.data.embedded.task import SPLITS, EmbeddedTask
from lit_merge.data.embedded.textures import TEXTURES, draw_texture
from lit_merge.data.embedded.vehicles import VEHICLES, draw_vehicle
from lit_merge.errors import DataError
from lit_merge.files.cache import Cache

__all__ = [
    "DRAWN_TASKS",
    "EMBEDDED_TASKS",
    "FINE_SUITE",
    "FINE_TASKS",
    "GENERATOR_VERSION",
    "SPLITS",
    "EmbeddedTask",
    "cache_key",
    "generate_split",
    "load_split",
    "sized_task",
    "split_digest",
]

GENERATOR_VERSION = 1
"""Part of the cache key: raise it with every change of what is drawn."""

_DIGIT_SPLITS = {"train": 1000, "val": 250, "test": 547}


_TABLE = (
    EmbeddedTask(
        "digits",
        "MNIST",
        DIGIT_WORDS,
        ("a photo of the number {}.", "the digit {}.", "a handwritten digit {}."),
        None,
        tuple(_DIGIT_SPLITS.items()),
    ),
    EmbeddedTask(
        "clutter",
        "SVHN",
        DIGIT_WORDS,
        ("a photo of the number {}.", "the digit {}.", "a street number {}."),
        draw_clutter,
    ),
    EmbeddedTask(
        "letters",
        "characters in the wild",
        LETTERS,
        ("the letter {}.", "a photo of the letter {}.", "capital letter {}."),
        draw_letter,
    ),
    EmbeddedTask(
        "signs",
        "GTSRB",
        SIGN_CLASSES,
        ("a traffic sign showing {}.", "a photo of {}.", "a sign with {}."),
        draw_sign,
    ),
    EmbeddedTask(
        "textures",
        "DTD",
        TEXTURES,
        ("a {} texture.", "a photo of a {} pattern.", "a {} surface."),
        draw_texture,
    ),
    EmbeddedTask(
        "land",
        "EuroSAT and RESISC45",
        LAND_COVER,
        ("a satellite photo of {}.", "an aerial view of {}.", "{} seen from above."),
        draw_land,
    ),
    EmbeddedTask(
        "vehicles",
        "Cars",
        VEHICLES,
        ("a photo of a {}.", "a drawing of a {}.", "a {}."),
        draw_vehicle,
    ),
    EmbeddedTask(
        "scenes",
        "SUN397",
        SCENES,
        ("a photo of a {}.", "a landscape of a {}.", "a view of a {}."),
        draw_scene,
    ),
)

EMBEDDED_TASKS: dict[str, EmbeddedTask] = {task.name: task for task in _TABLE}
"""Every task of the suite by name, in the order of the tables."""

DRAWN_TASKS: dict[str, EmbeddedTask] = {**EMBEDDED_TASKS, **FINE_TASKS}
"""The suite's tasks and the twenty of the finer suite."""

FINE_SUITE: dict[str, tuple[str, ...]] = {"embedded20": tuple(FINE_TASKS)}
"""The finer suite's name, and its tasks."""


def sized_task(name: str, sizes: Mapping[str, int] | None = None) -> EmbeddedTask:
    """A task of :data:`DRAWN_TASKS`, perhaps with another number of images.

    Args:
        name: of the task.
        sizes: split -> images, for the splits that are to have another number; other numbers are other drawings.

    Raises:
        DataError: there is no such task or split, a number is below 1, or the images are real ones, which are as many
            as they are.
    """
    if name not in DRAWN_TASKS:
        raise DataError(f"embedded task: expected one of {', '.join(DRAWN_TASKS)}, got {name!r}.")
    task = DRAWN_TASKS[name]
    given = dict(sizes or {})
    if not given:
        return task
    wrong = [split for split in given if split not in SPLITS]
    if wrong or any(not isinstance(count, int) or count < 1 for count in given.values()):
        raise DataError(
            f"sizes of {name}: expected numbers of at least 1 for {', '.join(SPLITS)}, got {given}. Correct them."
        )
    if task.draw is None:
        raise DataError(
            f"sizes of {name}: expected none, because its {sum(dict(task.sizes).values()):,} images are real ones, "
            f"got {given}. Remove sizes."
        )
    return replace(task, sizes=tuple({**dict(task.sizes), **given}.items()))


def _asset(name: str) -> bytes:
    return resources.files("lit_merge.data.embedded").joinpath("assets").joinpath(name).read_bytes()


def _handwritten(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The UCI optical digits: 8 x 8 scans with 17 grey levels, enlarged to 28 x 28 and framed in black."""
    with np.load(io.BytesIO(_asset("digits.npz")), allow_pickle=False) as archive:
        scans, labels = archive["images"], archive["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    start = 0
    for name, size in _DIGIT_SPLITS.items():
        if name == split:
            order = order[start : start + size]
        start += size
    images = np.zeros((len(order), 32, 32, 3), np.uint8)
    for row, source in enumerate(order):
        scan = Image.fromarray((scans[source].astype(np.float32) * (255 / 16)).astype(np.uint8))
        enlarged = np.asarray(scan.resize((28, 28), Image.Resampling.BICUBIC))
        images[row, 2:30, 2:30] = enlarged[..., None]
    return images, labels[order].astype(np.int64)


def generate_split(task: EmbeddedTask, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a split: uint8 images ``[N, 32, 32, 3]`` and int64 labels ``[N]``; a pure function of its arguments."""
    if task.draw is None:
        return _handwritten(split)
    count = task.size(split)
    key = (zlib.crc32(task.name.encode()), zlib.crc32(split.encode()))
    labels = np.arange(count) % len(task.classes)
    np.random.default_rng(key).shuffle(labels)
    images = np.stack([task.draw(Brush((*key, index), split), int(label)) for index, label in enumerate(labels)])
    return images, labels.astype(np.int64)


def split_digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 over a split's pixels and labels, 16 hexadecimal digits."""
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]


def cache_key(name: str, split: str, sizes: Mapping[str, int] | None = None) -> str:
    """What a split is stored under in :class:`lit_merge.files.cache.Cache`."""
    content = hashlib.sha256(_asset("glyphs.png") + _asset("digits.npz")).hexdigest()
    known = [GENERATOR_VERSION, content, name, split]
    count = sized_task(name, sizes).size(split)
    usual = name in EMBEDDED_TASKS and count == EMBEDDED_TASKS[name].size(split)
    return Cache.key(known if usual else [*known, count])


def load_split(
    name: str, split: str, directory: Path | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """A split of a task, from the cache or drawn now and cached.

    Args:
        name: one of :data:`DRAWN_TASKS`.
        split: ``"train"``, ``"val"`` or ``"test"``.
        directory: where splits are cached; by default the user's cache directory.
        sizes: other numbers of images, see :func:`sized_task`.

    Returns:
        images, uint8 ``[N, 3, 32, 32]``, and labels, int64 ``[N]``.

    Raises:
        DataError: the task or the split does not exist, or the sizes are none.
    """
    task = sized_task(name, sizes)
    if split not in SPLITS:
        raise DataError(f"split of {name}: expected one of {', '.join(SPLITS)}, got {split!r}.")
    cache, key = Cache("embedded", directory), cache_key(name, split, sizes)
    stored = cache.tensors(key)
    if stored is None:
        pixels, targets = generate_split(task, split)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        stored = {"images": images, "labels": torch.from_numpy(targets)}
        cache.write_tensors(key, stored)
    return stored["images"], stored["labels"]
