"""The examples that statistics are collected on, whatever form their batches have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, DataError

__all__ = ["examples"]


def examples(
    loader: Iterable[Any],
    module: nn.Module,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
    padded: bool = True,
    in_order: bool = True,
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Batches on the module's device, without what fills a batch up.

    Args:
        loader: gives :class:`lit_merge.data.Batch`, pairs ``(images, labels)``, or images alone.
        module: has at least one parameter.
        inputs: the module's arguments of a batch; by default its ``inputs``.
        padded: whether examples may be padded to the longest of a batch; otherwise there are more batches, of examples
            of the same length.
        in_order: whether these keep the order of the examples.

    Yields:
        The module's arguments for B examples, at least one, and labels ``[B]``, -1 where they are not known.

    Raises:
        ConfigurationError: a batch is something else, or the module has no parameters.
        DataError: there is no example at all.
    """
    device = next((value.device for value in module.parameters()), None)
    if device is None:
        raise ConfigurationError(
            f"statistics: expected a module with parameters, got {type(module).__name__} without. Give the encoder."
        )
    empty = True
    for batch in loader:
        for given, labels in _parts(batch, device, inputs, padded, in_order):
            if len(labels):
                empty = False
                yield given, labels.to(device)
    if empty:
        raise DataError("statistics: expected at least one image, got none. Choose another split or more images.")


def _parts(
    batch: Any,
    device: torch.device,
    inputs: Callable[[Any], tuple[Any, ...]] | None,
    padded: bool,
    in_order: bool,
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if hasattr(batch, "inputs"):
        present = batch.indices >= 0  # a full copy only where some are padding
        placed = (batch if bool(present.all()) else batch.select(present)).to(device)
        for part in (placed,) if padded or not len(placed) else placed.unpadded(in_order):
            yield part.inputs if inputs is None else inputs(part), part.targets
    elif isinstance(batch, Tensor):
        yield (batch.to(device),), torch.full((len(batch),), -1)
    elif isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        yield (batch[0].to(device),), batch[1]
    else:
        raise ConfigurationError(
            f"statistics: expected batches of images, or of images and labels, got {type(batch).__name__}. "
            "Use a loader of one task."
        )
