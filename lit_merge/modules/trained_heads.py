"""Heads of tasks' own that runs have trained, found beside the task vectors that these runs wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lit_merge.errors import ConfigurationError, FileFormatError, first_few
from lit_merge.files.hub import beside, parse_address
from lit_merge.files.shards import model_file
from lit_merge.models.language.classifiers import TaskHead, head_file, stored_head
from lit_merge.models.network import TaskWords

__all__ = ["Listings", "VectorFile", "trained_head"]

Listings = dict[tuple[str, str | None], Sequence[str]]
"""Repository on the Hub and revision -> its files."""

VectorFile = tuple[str, Sequence[str] | None]
"""A task vector's file and its tasks; None where its head counts for whatever task is evaluated."""


def trained_head(task: TaskWords, vectors: Sequence[VectorFile], listings: Listings | None = None) -> TaskHead:
    """The head of a task that a run wrote beside one of several vectors.

    A file of the task's name, as joint training writes them, counts first, then that of a vector of this task alone.

    Args:
        task: has a ``name`` and ``classes``.
        vectors: where to look: files, folders with one vector, and addresses of either on the Hub.
        listings: what repositories have, kept from one task to the next, so that each is asked once.

    Raises:
        ConfigurationError: there is none.
        HubError: a repository on the Hub cannot be reached or read.
        StructureMismatchError: it is one of other classes.
    """
    name = task.name or ""
    named = [(path, name) for path, tasks in vectors if name]
    alone = [(path, "") for path, tasks in vectors if tasks is not None and list(tasks) == [name]]
    any_task = [(path, "") for path, tasks in vectors if tasks is None]
    listings = {} if listings is None else listings
    for path, own in (*named, *alone, *any_task):
        if (found := _head_beside(path, own, listings)) is not None:
            return stored_head(found, name, task.classes, getattr(task, "regression", False))
    beside = f"none beside {first_few([path for path, _ in vectors])}" if vectors else "no task vector that has one"
    raise ConfigurationError(
        f"head of {name or 'the task'}: expected a trained classifier, got {beside}. Set heads of the network: "
        f"--model.network.heads '{{{name or 'task'}: path}}' (of merge, soup, analyze and statistics --network.heads), "
        "to the run's task_vector.head.safetensors or the folder of a published fine-tune."
    )


def _head_beside(path: str, task: str, listings: Listings) -> str | None:
    """Where the head beside a task vector is; None where there is none."""
    address = parse_address(path)
    if address is not None:
        found = beside(address, partial(head_file, task=task), listings)
        return None if found is None else str(found)
    try:
        file = head_file(model_file(Path(path)) if Path(path).is_dir() else path, task)
    except FileFormatError:  # an adapter's folder, for example
        return None
    return file if Path(file).is_file() else None
