"""Files of merging coefficients: safetensors for programs, JSON for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.files.content_digest import CONTENT_KEYS
from lit_merge.files.file_parts import printable
from lit_merge.files.hub import local_path
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.files.text import read_json, write_text

if TYPE_CHECKING:
    from lit_merge.vectors.coefficients import Coefficients

__all__ = ["FORMAT", "OWN_ENTRIES", "read_coefficients", "write_coefficients"]

FORMAT = "lit-merge/coefficients/1"
MASKED_FORMAT = "lit-merge/coefficients/2"
"""With masks, which programs that know only the former must not pass over."""

OWN_ENTRIES = frozenset({"format", "granularity", "members", "tasks", *CONTENT_KEYS})
"""Entries of the header that are not metadata."""

_TENSOR = "coefficients"
_MASK = "mask:"


def write_coefficients(path: str | os.PathLike[str], coefficients: Coefficients) -> None:
    """Write coefficients atomically; see :meth:`Coefficients.save`."""
    target = Path(path)
    as_json = _is_json(target)
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: expected an existing folder to write into, got none. Create it first.")
    masks = coefficients.masks
    form = MASKED_FORMAT if masks else FORMAT
    if not as_json:
        header = {
            "format": form,
            "granularity": coefficients.granularity,
            "tasks": json.dumps(coefficients.tasks),
            "members": json.dumps(coefficients.members),
        }
        tensors = {_TENSOR: coefficients.values, **{f"{_MASK}{name}": mask.byte() for name, mask in masks.items()}}
        write_tensors(target, tensors, {**coefficients.metadata, **header})
        return
    rows = (dict(zip(coefficients.groups, row, strict=True)) for row in coefficients.values.tolist())
    bits = {
        name: {task: "".join(map(str, row)) for task, row in zip(coefficients.tasks, mask.int().tolist(), strict=True)}
        for name, mask in masks.items()
    }
    plain = {
        "format": form,
        "granularity": coefficients.granularity,
        "coefficients": dict(zip(coefficients.tasks, rows, strict=True)),
        "members": coefficients.members,
        "metadata": coefficients.metadata,
        **({"masks": bits} if masks else {}),
    }
    write_text(target, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def read_coefficients(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :class:`Coefficients` is built from, of the right types; that it fits together is checked there.

    Raises:
        ConfigurationError: the file ends in something else than ``.safetensors`` or ``.json``.
        FileFormatError: it is missing, damaged, or of another kind.
    """
    source = local_path(path)
    return _read_json(source) if _is_json(source) else _read_safetensors(source)


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".safetensors"):
        raise ConfigurationError(
            f"{path}: expected a file of coefficients ending in .safetensors or .json, got {path.suffix or 'none'}. "
            "Rename it; for published tables use Coefficients.from_published."
        )
    return path.suffix == ".json"


def _read_safetensors(path: Path) -> dict[str, Any]:
    stored = LazyTensors(path)
    _check_format(path, stored.metadata.get("format"), any(name.startswith(_MASK) for name in stored))
    stored.verify()
    try:
        tasks, members = (json.loads(stored.metadata[key]) for key in ("tasks", "members"))
        values, granularity = stored[_TENSOR], stored.metadata["granularity"]
        masks = {name.removeprefix(_MASK): stored[name].bool() for name in stored if name.startswith(_MASK)}
    except (KeyError, ValueError, RecursionError) as error:
        raise _malformed(path) from error
    metadata = {key: value for key, value in stored.metadata.items() if key not in OWN_ENTRIES}
    return {**_arguments(path, values, tasks, members, granularity, metadata), "masks": masks}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = read_json(path)
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected a file of coefficients, got {error.strerror or 'no file'}. Check the path."
        ) from error
    except ValueError as error:
        raise FileFormatError(f"{path}: expected JSON, got something else. Copy or write it again.") from error
    _check_format(path, *((plain.get("format"), "masks" in plain) if isinstance(plain, dict) else (None, False)))
    try:
        rows, members = plain["coefficients"], plain["members"]
        groups = list(dict.fromkeys(members.values()))
        if any(set(row) != set(groups) for row in rows.values()):
            raise _malformed(path)
        numbers = [[float(row[group]) for group in groups] for row in rows.values()]
        values = torch.tensor(numbers, dtype=torch.float64)
        masks = {name: _mask(given, list(rows)) for name, given in plain.get("masks", {}).items()}
        return {
            **_arguments(path, values, list(rows), members, plain["granularity"], plain["metadata"]),
            "masks": masks,
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _malformed(path) from error


def _mask(given: Any, tasks: list[str]) -> Tensor:
    """From a string of 0 and 1 per task to booleans ``(T, r)``; anything else raises one of Python's errors."""
    rows = [given[task] for task in tasks]
    if len(given) != len(rows) or any(set(row) - {"0", "1"} for row in rows):
        raise ValueError
    return torch.tensor([[one == "1" for one in row] for row in rows])


def _arguments(
    path: Path, values: Tensor, tasks: Any, members: Any, granularity: object, metadata: Any
) -> dict[str, Any]:
    if not (isinstance(tasks, list) and isinstance(members, dict) and isinstance(metadata, dict)):
        raise _malformed(path)
    strings = [granularity, *tasks, *members.values(), *metadata.values()]
    if not all(isinstance(one, str) for one in strings) or not values.is_floating_point():
        raise _malformed(path)
    return {
        "values": values,
        "tasks": tuple(tasks),
        "groups": tuple(dict.fromkeys(members.values())),
        "members": members,
        "granularity": granularity,
        "metadata": metadata,
    }


def _check_format(path: Path, found: object, masked: bool) -> None:
    expected = MASKED_FORMAT if masked else FORMAT
    if found != expected:
        got = printable(found) if isinstance(found, str) and found else "none"
        raise FileFormatError(
            f"{path}: expected format {expected}, got {got}. "
            "Use a file that Coefficients.save wrote, or Coefficients.from_published for bare numbers."
        )


def _malformed(path: Path) -> FileFormatError:
    return FileFormatError(
        f"{path}: expected coefficients of every task and group, and the groups' members, got an incomplete or "
        "malformed file. Copy or write it again."
    )
