"""The images that statistics are collected on, whatever form their batches have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, DataError

__all__ = ["images_and_labels"]


def images_and_labels(loader: Iterable[Any], module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the module's device, without what fills a batch up.

    Args:
        loader: gives :class:`lit_merge.data.ImageBatch`, pairs ``(images, labels)``, or images alone.
        module: has at least one parameter.

    Yields:
        Images ``[B, …]``, at least one, and labels ``[B]``, -1 where they are not known.

    Raises:
        ConfigurationError: a batch is something else, or the module has no parameters.
        DataError: there is no image at all.
    """
    device = next((value.device for value in module.parameters()), None)
    if device is None:
        raise ConfigurationError(
            f"statistics: expected a module with parameters, got {type(module).__name__} without. Give the encoder."
        )
    empty = True
    for batch in loader:
        images, labels = _parts(batch)
        if len(images):
            empty = False
            yield images.to(device), labels.to(device)
    if empty:
        raise DataError("statistics: expected at least one image, got none. Choose another split or more images.")


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    if hasattr(batch, "images"):
        present = batch.indices >= 0  # a full copy only where some are padding
        complete = bool(present.all())
        return (batch.images, batch.labels) if complete else (batch.images[present], batch.labels[present])
    if isinstance(batch, Tensor):
        return batch, torch.full((len(batch),), -1)
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise ConfigurationError(
        f"statistics: expected batches of images, or of images and labels, got {type(batch).__name__}. "
        "Use a loader of one task."
    )
