"""What is measured of a head beside the accuracy: the perplexity of next tokens, the rank correlation of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import Metric

from lit_merge.metrics.perplexity import Perplexity
from lit_merge.metrics.spearman import Spearman

__all__ = ["MORE", "more_metrics", "update_more"]

_METRICS: dict[str, tuple[type[Metric], str]] = {
    "perplexity": (Perplexity, "surprise"),
    "spearman": (Spearman, "numbers"),
}
"""Name -> metric, and the head's method that gives what it is made of."""
MORE = tuple(_METRICS)
"""The names of what :func:`more_metrics` measures."""


def more_metrics(head: Any) -> nn.ModuleDict:
    """Name -> metric of a head, empty if it has none."""
    return nn.ModuleDict({name: metric() for name, (metric, method) in _METRICS.items() if hasattr(head, method)})


def update_more(metrics: Any, head: Any, logits: Tensor, batch: Any) -> Iterator[tuple[str, Metric]]:
    """Add a batch to a head's metrics.

    Args:
        metrics: of :func:`more_metrics`.
        head: made the logits.
        logits: of the batch.
        batch: a :class:`lit_merge.data.Batch`.

    Yields:
        Name and metric of those that had something to add.
    """
    for name, metric in metrics.items():
        found = getattr(head, _METRICS[name][1])(logits, batch)
        if found is not None:
            cast(Metric, metric).update(*found)
            yield name, metric
