"""The batches that the data modules of lit-merge hand out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

__all__ = ["PADDING", "Batch", "ImageBatch", "OtherBatch"]

PADDING = -1
"""The target and the index of an example that fills a batch up, and the target of one whose class is not known."""


@dataclass
class Batch:
    """B examples with their targets; a subclass may name its inputs, or join them in another way.

    An example with index -1 is padding: it is there because every process needs the same number of batches, and its
    target is -1. A loss or metric with ``ignore_index=-1`` counts every example exactly once; a batch may consist of
    padding alone.

    Attributes:
        inputs: what the network takes, tensors ``[B, …]``.
        targets: int64, ``[B]`` or ``[B, L]``: of classification in [0, C), or -1 where the class is not known.
        indices: int64, ``[B]``, the examples' positions in their split, or -1.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """The targets, of classification."""
        return self.targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on a device."""
        return self._changed(lambda one: one.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which copies to an accelerator are fast."""
        return self._changed(Tensor.pin_memory)

    def select(self, rows: Tensor) -> Self:
        """Some of the examples.

        Args:
            rows: a mask, bool ``[B]``, or positions, int64.
        """
        return self._changed(lambda one: one[rows])

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Self:
        """Several batches one after the other, for one pass through the network; override it where lengths differ."""
        joined = object.__new__(cls)
        joined.inputs = tuple(torch.cat(parts) for parts in zip(*(batch.inputs for batch in batches), strict=True))
        joined.targets = torch.cat([batch.targets for batch in batches])
        joined.indices = torch.cat([batch.indices for batch in batches])
        return joined

    def own_outputs(self, outputs: Tensor) -> Tensor:
        """Of what a network gave for these examples among joined ones, what it gives for them alone.

        Args:
            outputs: ``[B, …]``; returned as it is, unless :meth:`join` is overridden and has padded these examples.
        """
        return outputs

    def unpadded(self, in_order: bool = True) -> Iterator[Self]:
        """The same examples in batches whose examples all have the length of the inputs.

        Args:
            in_order: whether the order is kept; otherwise there are as few batches as possible.
        """
        yield self

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = object.__new__(type(self))
        for field in fields(self):
            value: Any = getattr(self, field.name)
            own = tuple(change(one) for one in value) if isinstance(value, tuple) else change(value)
            setattr(changed, field.name, own)
        return changed


class ImageBatch(Batch):
    """B images with their labels.

    Args:
        images: float32, ``[B, 3, S, S]``, normalised as the model asks; of padding, zeros.
        labels: int64, ``[B]``, in [0, C), or -1 where the class is not known.
        indices: int64, ``[B]``, the images' positions in their split, or -1.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        super().__init__((images,), labels, indices)

    @property
    def images(self) -> Tensor:
        """The images, ``[B, 3, S, S]``."""
        return self.inputs[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Images, labels and indices."""
        return iter((self.images, self.targets, self.indices))


@dataclass(init=False)
class OtherBatch(Batch):
    """B examples of other tasks, without their targets.

    Args:
        inputs: what the network takes, tensors ``[B, …]``; of images they alone will do.
        tasks: int64, ``[B]``, positions of the examples' tasks in the data module's ``other_task_names``.
        indices: int64, ``[B]``, the examples' positions in their tasks' split.
    """

    tasks: Tensor

    def __init__(self, inputs: Tensor | tuple[Tensor, ...], tasks: Tensor, indices: Tensor) -> None:
        given = (inputs,) if isinstance(inputs, Tensor) else inputs
        super().__init__(given, torch.full_like(indices, PADDING), indices)
        self.tasks = tasks

    @property
    def images(self) -> Tensor:
        """The first of the inputs, of images ``[B, 3, S, S]``."""
        return self.inputs[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Images, tasks and indices."""
        return iter((self.images, self.tasks, self.indices))
