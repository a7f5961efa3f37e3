"""Scaling by coefficients that were learned, read from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError
from lit_merge.files.hub import pinned
from lit_merge.transforms.base import OWN, PACKAGE, Transform
from lit_merge.transforms.matrices import decomposed, decomposition
from lit_merge.transforms.override import Override, WithOverrides
from lit_merge.vectors import Coefficients, TaskVectors, file_digest
from lit_merge.vectors.sources import Work

__all__ = ["LearnedScale", "transform_before"]


@dataclass(frozen=True)
class LearnedScale(Transform):
    """λ[t, g(p)] τ_t[p]: one coefficient per task t and group g(p) of a parameter p (AdaMerging, Yang et al. 2024).

    Where the file has masks, τ_t[p] is the sum of the singular directions that take part (AdaRank, Lee et al. 2026).

    It follows the transforms over whose vectors the coefficients were learned: the recipe ``adamerging`` puts it there,
    and a sum after it.

    Args:
        path: a file that :meth:`~lit_merge.vectors.Coefficients.save` wrote, ending in ``.safetensors`` or ``.json``.
        content: the beginning of the file's SHA-256, so that what was merged can be told from the transform alone; by
            default that of the file as it is now. Where it is given, the file is read on application only.

    Raises:
        ConfigurationError: ``path`` or ``content`` is no string, or the file ends in something else.
        FileFormatError: the file is missing, damaged, or holds no coefficients; on application, if its content is
            another one than ``content``.
        StructureMismatchError: on application, if the tasks, the parameters or the base model are others than those of
            the coefficients. The order of the tasks does not matter: rows are found by name.
        ConfigurationError: on access, with masks, if a singular value decomposition fails.
    """

    path: str
    content: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not isinstance(self.content, str | None):
            wrong = "content" if isinstance(self.path, str | Path) else "path"
            raise ConfigurationError(
                f"LearnedScale.{wrong}: expected a string, got {getattr(self, wrong)!r}. Name a file of coefficients."
            )
        object.__setattr__(self, "path", pinned(self.path) if self.content is None else str(self.path))
        if self.content is None:
            Coefficients.load(self.path)  # which says best what is wrong with it
            object.__setattr__(self, "content", _content(self.path))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Scale every stack ``(T, *shape)``."""
        coefficients = Coefficients.load(self.path)
        found = _content(self.path)
        if found != self.content:
            raise FileFormatError(
                f"{self.path}: expected coefficients with the content {self.content}, got {found}: the file is another "
                "one. Use the file of that time, or leave content out."
            )
        try:
            coefficients.check_fits(vectors)
        except StructureMismatchError as error:
            raise StructureMismatchError(f"{self.path}: {error}") from error
        rows = coefficients.for_tasks(vectors.tasks)
        factors = {name: rows.of(name).tolist() for name in vectors}
        if rows.masks:
            vectors = vectors.map(partial(_masked, rows.masks), work=partial(_masking_work, frozenset(rows.masks)))
        return vectors.map_rows(partial(_scaled_by_parameter, factors), note=self)


def transform_before(path: str) -> Transform | None:
    """What had been applied to the task vectors before the coefficients in a file were learned, as its header says.

    Only transforms of this package are built from the header, whatever it says: nothing in a file is executed.

    Returns:
        The transform, or None if the header names none.

    Raises:
        ConfigurationError: the file has another ending, or a setting of a transform is refused.
        FileFormatError: the file is missing or damaged, or its header names something else than these transforms.
    """
    text = Coefficients.load(path).metadata.get("transform_config", "")
    if not text:
        return None
    try:
        return _built(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected a transform_config of transforms in {PACKAGE}, got {_shortened(text)}. "
            "Write the chain out: chain(…, LearnedScale(path), Sum())."
        ) from error


def _built(config: Mapping[str, Any]) -> Transform:
    """The inverse of ``to_config``; anything but a public transform of this package raises one of Python's errors."""
    package, _, name = config["class_path"].rpartition(".")
    if package != PACKAGE:
        raise KeyError(config["class_path"])
    transform = OWN[name]
    arguments = {key: _value(value) for key, value in config["init_args"].items()}
    if transform is WithOverrides:  # whose overrides are plain mappings
        arguments["overrides"] = [Override(**one) for one in arguments["overrides"]]
    return transform(**arguments)


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(one) for one in value]
    if isinstance(value, dict):
        return _built(value) if "class_path" in value else {key: _value(one) for key, one in value.items()}
    return value


def _content(path: str) -> str:
    return f"sha256:{file_digest(path)[:16]}"


def _shortened(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}…"


def _masked(masks: Mapping[str, Tensor], name: str, stack: Tensor) -> Tensor:
    if name not in masks:
        return stack
    left, values, right = decomposed("LearnedScale", name, partial(torch.linalg.svd, full_matrices=False), stack)
    kept = values * masks[name].to(values.device, values.dtype)
    return (left * kept.unsqueeze(1)) @ right


def _masking_work(masked: frozenset[str], name: str, shape: torch.Size, itemsize: int) -> Work:
    """All tasks' decompositions at once."""
    if name not in masked:
        return Work()
    one = decomposition(shape[1], shape[2], itemsize)
    return Work(one.memory * shape[0], one.operations * shape[0])


def _scaled_by_parameter(
    factors: Mapping[str, Sequence[float]], row: int, name: str, start: int, values: Tensor
) -> None:
    values.mul_(factors[name][row])
