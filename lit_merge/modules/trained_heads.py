"""Heads of tasks' own that runs have trained, found beside the task vectors that these runs wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.hub import parse_address
from lit_merge.models.language.classifiers import TaskHead, head_file, stored_head
from lit_merge.models.network import TaskWords

__all__ = ["VectorFile", "trained_head"]

VectorFile = tuple[str, Sequence[str] | None]
"""A task vector's file and its tasks; None where its head counts for whatever task is evaluated."""


def trained_head(task: TaskWords, vectors: Sequence[VectorFile]) -> TaskHead:
    """The head of a task that a run wrote beside one of several vectors.

    A file of the task's name, as joint training writes them, counts first, then that of a vector of this task alone.

    Args:
        task: has a ``name`` and ``classes``.
        vectors: where to look. Beside an address on the Hub nothing is looked for.

    Raises:
        ConfigurationError: there is none.
        StructureMismatchError: it is one of other classes.
    """
    name = task.name or ""
    named = [head_file(path, name) for path, tasks in vectors if name]
    alone = [head_file(path) for path, tasks in vectors if tasks is not None and list(tasks) == [name]]
    any_task = [head_file(path) for path, tasks in vectors if tasks is None]
    for path in (*named, *alone, *any_task):
        if parse_address(path) is None and Path(path).is_file():
            return stored_head(path, name, task.classes, getattr(task, "regression", False))
    beside = f"none beside {first_few([path for path, _ in vectors])}" if vectors else "no task vector that has one"
    raise ConfigurationError(
        f"head of {name or 'the task'}: expected a trained classifier, got {beside}. Set heads of the network: "
        f"--model.network.heads '{{{name or 'task'}: path}}' (of merge, soup, analyze and statistics --network.heads), "
        "to the run's task_vector.head.safetensors or the folder of a published fine-tune."
    )
