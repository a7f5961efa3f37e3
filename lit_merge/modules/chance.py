"""Whether the heads of a merge say anything yet: learning without labels makes them confident in whatever they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lit_merge.functional.evaluation import evaluating
from lit_merge.metrics.hits import UNLABELLED, hits

if TYPE_CHECKING:
    from lit_merge.modules.merge import MergeModule

__all__ = ["chance_warnings"]

_BETTER = 1.5  # times chance, below which a head is warned of
_FEWEST = 10  # examples that say anything


def chance_warnings(module: MergeModule, data: Any, examples: int) -> list[str]:
    """Compare every task's accuracy at the start with chance, 1/C, on labelled validation examples.

    Entropy minimisation makes predictions confident whether or not they are right: from a task whose head is at chance
    it learns coefficients that ruin that task. Nothing about the module, the data or any random state has changed
    afterwards. With several processes each of them looks at its own examples, and all get the same lines.

    Args:
        module: about to be fitted, on its device.
        data: whose ``val_dataloader`` has a loader for each of the module's tasks.
        examples: of each task at most, over all processes.

    Returns:
        A line for each task whose accuracy is below 1.5/C. Tasks with fewer than ten labelled validation examples, and
        heads that have an accuracy of their own, are passed over.
    """
    trainer = module.trainer
    if examples == 0 or trainer.limit_val_batches == 0 or not is_overridden("val_dataloader", data):
        return []
    learned = getattr(data, "adapted_tasks", None) or module.merged_tasks
    share = math.ceil(examples / trainer.world_size)
    found: list[str] = []
    with isolate_rng(include_cuda=module.device.type == "cuda"), module.merged_once():
        given = data.val_dataloader()
        loaders = given if isinstance(given, list | tuple) else [given]
        for task, loader in zip(module.tasks, loaders, strict=False):
            if task not in learned or hasattr(module.head_of(task), "hits"):
                continue
            right, counted, classes = _counts(module, task, loader, share)
            if counted >= _FEWEST and right / counted < _BETTER / classes:
                found.append(
                    f"{task}: the merge starts with {right:.0f} of {counted:.0f} validation examples right "
                    f"({100 * right / counted:.1f} %), chance is {100 / classes:.1f} %: what is learned without labels "
                    "from a head that is hardly better makes the task worse. Leave the task out of data.adapted, give "
                    "it another head or better class names, or use objective cross_entropy with labels."
                )
    return found


def _counts(module: MergeModule, task: str, loader: Iterable[Any], most: int) -> tuple[float, float, float]:
    """Right and labelled examples over all processes, and the number of classes."""
    trainer: Any = module.trainer
    sums, classes = torch.zeros(2, dtype=torch.float64, device=module.device), torch.ones(1, device=module.device)
    with torch.no_grad(), evaluating(module):
        for batch in _labelled(loader, most):
            placed = trainer.precision_plugin.convert_input(batch.to(module.device))
            with trainer.precision_plugin.val_step_context():
                logits = module.classify(module.features(placed), task)
            right, counted = hits(logits, placed.targets)
            sums += torch.stack([(right * counted).sum(), counted.sum()])
            classes.fill_(logits.shape[-1])
    if trainer.world_size > 1:
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        classes = trainer.strategy.reduce(classes, reduce_op="max")  # a process may have had no example
    return float(sums[0]), float(sums[1]), float(classes)


def _labelled(loader: Iterable[Any], most: int) -> Iterator[Any]:
    """The first labelled examples of a loader."""
    for batch in loader:
        if batch.targets.ndim != 1:  # tokens, of which chance is no matter
            return
        chosen = (batch.targets != UNLABELLED).nonzero().flatten()[:most]
        most -= len(chosen)
        if len(chosen):
            yield batch.select(chosen)
        if most <= 0:
            return
