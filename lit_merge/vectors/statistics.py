"""Files of what merging with a little data has to know about a task: one per task, written once, read lazily."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError, first_few
from lit_merge.files.hub import pinned
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.params import check_finite
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = [
    "EIGENVALUES",
    "FORMATS",
    "INPUT_BASIS",
    "INPUT_FACTOR",
    "OUTPUT_BASIS",
    "OUTPUT_FACTOR",
    "WHOLE_FACTOR",
    "Kind",
    "StatisticsFiles",
    "bias_of",
    "open_one",
    "open_statistics",
    "row_blocks",
    "write_statistics",
]

Kind = Literal["fisher", "gram", "gradients", "kfac"]

FORMATS = {
    "fisher": "lit-merge/fisher/1",
    "gram": "lit-merge/gram/1",
    "gradients": "lit-merge/gradients/1",
    "kfac": "lit-merge/kfac/1",
}
"""Kind -> the header's ``format``."""

INPUT_FACTOR, OUTPUT_FACTOR, WHOLE_FACTOR = "A.", "G.", "F."
"""What a name in a file of Kronecker factors begins with; after it comes a parameter's, and ``.T`` of ``x @ W``."""

INPUT_BASIS, OUTPUT_BASIS, EIGENVALUES = "U.", "V.", "D."
"""The same of a file with corrected eigenvalues: eigenvectors of A and of G, and the curvature along their products."""


def bias_of(weight: str) -> str:
    """The name of the bias that belongs to a weight, if it has one; "" for one that does not end in ``weight``."""
    plain = weight.removesuffix(".T")
    return plain.removesuffix("weight") + "bias" if plain.endswith("weight") else ""


def row_blocks(weight: str) -> int:
    """Into how many blocks of rows, with a factor each, a weight is divided: 3 of a packed query, key and value."""
    return 3 if weight.endswith("in_proj_weight") else 1


class StatisticsFiles(dict[str, str]):
    """Task -> path of its file. It is not changed any more, so that a transform which holds it can be hashed.

    Args:
        files: task -> path, at least one; of an address on the Hub the commit is kept with it.
        what: how a message calls them, e.g. ``"RegMean.statistics"``.

    Raises:
        ConfigurationError: this is no such mapping.
    """

    def __init__(self, files: Mapping[str, str | os.PathLike[str]], what: str = "statistics") -> None:
        if not isinstance(files, Mapping) or not files:
            raise ConfigurationError(
                f"{what}: expected a mapping from tasks to files, got {files!r}. "
                "Use e.g. {digits: digits-fisher.safetensors}."
            )
        wrong = [item for item in files.items() if not (isinstance(item[0], str) and isinstance(item[1], str | Path))]
        if wrong:
            raise ConfigurationError(f"{what}: expected names of tasks and paths, got {wrong[0]!r}. Give strings.")
        super().__init__({task: pinned(path) for task, path in files.items()})

    def _refuse(self, *args: Any, **keywords: Any) -> NoReturn:
        raise TypeError("the files of a transform cannot be changed; build another transform")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self),))


def write_statistics(
    path: str | os.PathLike[str],
    kind: Kind,
    tensors: Mapping[str, Tensor],
    task: str,
    base_fingerprint: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what :func:`lit_merge.evaluation.statistics.collect_fisher` or ``collect_gram`` returned, atomically.

    Args:
        path: the safetensors file, in an existing folder.
        kind: which of the two it is.
        tensors: name -> tensor.
        task: whose statistics these are.
        base_fingerprint: of the base model that the task's vector starts from; empty if it is not known.
        metadata: more string entries of the header, such as the number of images.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        ConfigurationError: the folder is missing, or an entry is not a string.
        OSError: the disk is full or not writable; ``path`` is as it was before.
    """
    check_finite(tensors, f"{kind} of {task!r}")
    known = {"format": FORMATS[kind], "task": task, "base_fingerprint": base_fingerprint}
    write_tensors(path, tensors, {**(metadata or {}), **known})


def open_statistics(kind: Kind, files: Mapping[str, str], vectors: TaskVectors, what: str) -> list[LazyTensors]:
    """Open the files of all tasks of some vectors; every byte is verified once, tensors are read when asked for.

    Args:
        kind: what they hold.
        files: task -> path, of exactly the vectors' tasks.
        vectors: what is merged with them.
        what: how a message calls ``files``.

    Returns:
        The files, in the order of the vectors' tasks.

    Raises:
        ConfigurationError: a task has no file, a file no task, or two vectors are of one task.
        FileFormatError: a file is missing, damaged, or of another format.
        StructureMismatchError: a file belongs to another task or another base model.
    """
    tasks = vectors.tasks
    repeated = [task for index, task in enumerate(tasks) if task in tasks[:index]]
    if repeated:
        raise ConfigurationError(
            f"{what}: expected vectors of different tasks, got {repeated[0]!r} more than once. "
            "Give every vector a task name of its own, to which its statistics belong."
        )
    missing = [task for task in tasks if task not in files]
    unknown = [task for task in files if task not in tasks]
    if missing or unknown:
        got = [f"nothing for {first_few(map(repr, missing))}"] if missing else []
        got += [f"unknown {first_few(map(repr, unknown))}"] if unknown else []
        raise ConfigurationError(
            f"{what}: expected one file for each of the tasks {', '.join(tasks)}, got {' and '.join(got)}. "
            "Collect what is missing with lit-merge statistics, and name every task once."
        )
    return [open_one(kind, task, files[task], vectors.base_fingerprint, "task vectors") for task in tasks]


def open_one(kind: Kind, task: str, path: str, base_fingerprint: str, of: str) -> LazyTensors:
    """Open the file of one task; every byte is verified once, tensors are read when asked for.

    Args:
        kind: what it holds.
        task: whose it has to be.
        path: where it is.
        base_fingerprint: of the base model that it has to belong to, if both are known.
        of: what a message calls that base model's own, e.g. ``"task vectors"``.

    Raises:
        FileFormatError: the file is missing, damaged, or of another format.
        StructureMismatchError: it belongs to another task or another base model.
    """
    stored = LazyTensors(path)
    found = stored.metadata.get("format") or "none"
    if found != FORMATS[kind]:
        raise FileFormatError(
            f"{path}: expected format {FORMATS[kind]}, got {found}. "
            f"Write it with lit-merge statistics --kind {kind}, of this version."
        )
    if stored.metadata.get("task") != task:
        raise StructureMismatchError(
            f"{path}: expected statistics of the task {task!r}, got those of {stored.metadata.get('task', '')!r}. "
            "Name the file of this task."
        )
    known = stored.metadata.get("base_fingerprint", "")
    if known and base_fingerprint and known != base_fingerprint:
        raise StructureMismatchError(
            f"{path}: expected statistics for the base model of the {of} (fingerprint "
            f"{base_fingerprint}), got fingerprint {known}. Collect them from a model of this base."
        )
    stored.verify()
    return stored
