"""Bare numbers as other programs publish merging coefficients: files of them, and the layouts in which they come."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.files.hub import local_path
from lit_merge.files.store import LazyTensors

__all__ = ["Published", "in_rows", "read_published"]

Published: TypeAlias = Tensor | Sequence[float] | Sequence[Sequence[float]]
"""A tensor, or lists of numbers."""

_ENDINGS = (".json", ".txt", ".npy", ".np", ".pt", ".pth", ".safetensors")
# Printed tensors have `1.` where JSON has `1.0`.
_BARE_POINT = re.compile(r"(?<=\d)\.(?=\D|\Z)")


def read_published(values: Published | str | os.PathLike[str]) -> Tensor:
    """The numbers of a tensor, of nested lists, or of a file, in float64; nothing in a file is executed.

    Raises:
        ConfigurationError: these are no numbers in rows of one length, or the file has an unknown ending.
        FileFormatError: the file is missing or damaged, or does not hold exactly one array of numbers.
    """
    if not isinstance(values, (str, os.PathLike)):
        return _numbers("coefficients", values, ConfigurationError)
    path = local_path(values)
    if path.suffix not in _ENDINGS:
        raise ConfigurationError(
            f"{path}: expected a file ending in {', '.join(_ENDINGS)}, got {path.suffix or 'none'}. Convert it first."
        )
    try:
        found = _read(path)
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected a file of coefficients, got {error.strerror or 'something else'}. Check the path."
        ) from error
    except FileFormatError:
        raise
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise FileFormatError(
            f"{path}: expected an array of numbers that can be read without running code, got something else. "
            "Save the numbers alone, e.g. as nested lists in JSON."
        ) from error
    if isinstance(found, Mapping):
        if len(found) != 1:
            raise FileFormatError(f"{path}: expected one tensor, got {len(found)}. Save the coefficients alone.")
        (found,) = found.values()
    return _numbers(str(path), found, FileFormatError)


def in_rows(found: Tensor, tasks: int, widths: Sequence[int]) -> Tensor:
    """Bring published numbers to ``(T, L)``, whichever layout fits.

    Args:
        found: ``(L, T + 1)`` or ``(T + 1,)`` with a leading 1 for θ0, ``(L, T)``, ``(T, L)`` or ``(T,)``.
        tasks: T.
        widths: what L may be.

    Raises:
        ConfigurationError: no layout fits, or several do and disagree.
    """
    table = found.unsqueeze(0) if found.ndim == 1 else found
    readings: dict[str, Tensor] = {}
    for width in widths if found.ndim == 2 else [one for one in widths if one == 1]:
        shape = tuple(table.shape)
        if shape == (width, tasks + 1) and bool((table[:, 0] == 1).all()):
            readings[f"{width} rows with a leading 1"] = table[:, 1:].T
        if shape == (width, tasks):
            readings[f"{width} rows, one column per task"] = table.T
        if shape == (tasks, width) and found.ndim == 2:
            readings[f"one row per task, {width} columns"] = table
    if not readings:
        several = " or ".join(map(str, sorted(widths)))
        raise ConfigurationError(
            f"coefficients: expected the shape (L, {tasks + 1}) with a first column of 1, (L, {tasks}) or "
            f"({tasks}, L) for {tasks} tasks and L = {several}, got {tuple(found.shape)}. "
            "Leave out the rows of parameters that the task vectors lack, or name the tasks and parameters as there."
        )
    first, *others = readings.values()
    if any(one.shape != first.shape or not torch.equal(one, first) for one in others):
        raise ConfigurationError(
            f"coefficients: expected a shape with one meaning for {tasks} tasks, got {tuple(found.shape)}, which is "
            f"{' or '.join(readings)}. Give one row per group of parameters with a leading 1, {tasks + 1} columns."
        )
    return first


def _read(path: Path) -> Any:
    if path.suffix in (".json", ".txt"):
        return json.loads(_BARE_POINT.sub(".0", path.read_text(encoding="utf-8")))
    if path.suffix in (".npy", ".np"):
        import numpy  # here, so that importing this room costs torch and safetensors only

        with path.open("rb") as file:
            return torch.from_numpy(numpy.lib.format.read_array(file, allow_pickle=False).astype("float64"))
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, map_location="cpu", weights_only=True)
    stored = LazyTensors(path)
    if stored.metadata.get("format", "").startswith("lit-merge/"):
        raise FileFormatError(
            f"{path}: expected bare numbers, got a file of lit-merge, {stored.metadata['format']}. "
            "Use Coefficients.load for coefficients."
        )
    return dict(stored)


def _numbers(what: str, found: object, error: type[ConfigurationError] | type[FileFormatError]) -> Tensor:
    try:
        values = torch.as_tensor(cast(Any, found), dtype=torch.float64, device="cpu").detach()
    except (ValueError, TypeError, RuntimeError):
        values = torch.empty(())
    if values.ndim not in (1, 2) or not values.numel():
        raise error(
            f"{what}: expected one row of numbers or several of one length, got something else. "
            "Give nested lists, or a tensor with one or two dimensions."
        )
    return values
