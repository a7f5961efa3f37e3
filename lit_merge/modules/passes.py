"""Which tasks' batches go through the network together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["passes"]

_WASTE = 0.2
"""The most padding that joining may add, per token of the texts: a pass of its own costs less from there on."""


def passes(batches: Mapping[str, Any], limit: int | None = None) -> list[list[str]]:
    """Groups of tasks whose batches are joined for one pass, in the order of the tasks where lengths are the same.

    Batches of images are as large as each other. Texts of a batch are padded to the longest: tasks go together, the
    shortest texts first, as long as that adds little padding, and only if their inputs are of the same kind.

    Args:
        batches: task -> :class:`lit_merge.data.Batch`.
        limit: most examples of a pass; a task's batch is not divided. None for no limit.
    """
    # The axes after the batch: none of images differs, of texts their number, lengths and answers.
    sizes = {task: [tuple(one.shape[1:]) for one in part.inputs] for task, part in batches.items()}
    if all(one == other for one in sizes.values() for other in sizes.values()):
        return _limited(list(batches), batches, limit)
    kinds: dict[tuple[int, ...], list[str]] = {}
    for task, shapes in sizes.items():
        kinds.setdefault(tuple(map(len, shapes)), []).append(task)
    groups: list[list[str]] = []
    for tasks in kinds.values():
        tokens = {task: batches[task].inputs[0].numel() for task in tasks}
        length = {task: batches[task].inputs[0].shape[1:].numel() for task in tasks}
        group: list[str] = []
        for task in sorted(tasks, key=length.__getitem__):
            examples = sum(len(batches[one]) for one in [*group, task])
            padded = examples * length[task]
            if group and padded > (1 + _WASTE) * sum(tokens[one] for one in [*group, task]):
                groups.append(group)
                group = []
            group.append(task)
        groups.append(group)
    order = list(batches)
    return [part for group in groups for part in _limited(sorted(group, key=order.index), batches, limit)]


def _limited(tasks: list[str], batches: Mapping[str, Any], limit: int | None) -> list[list[str]]:
    if limit is None:
        return [tasks]
    found: list[list[str]] = [[]]
    count = 0
    for task in tasks:
        if found[-1] and count + len(batches[task]) > limit:
            found.append([])
            count = 0
        found[-1].append(task)
        count += len(batches[task])
    return found
