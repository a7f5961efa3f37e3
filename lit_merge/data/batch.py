"""The batches that the data modules of lit-merge hand out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["PADDING", "ImageBatch", "OtherBatch"]

PADDING = -1
"""The label and the index of an entry that fills a batch up, and the label of an image whose class is not known."""


class ImageBatch(NamedTuple):
    """B images with their labels.

    An entry with index -1 is padding: it is there because every process needs the same number of batches, its pixels
    are zeros and its label is -1. A loss or metric with ``ignore_index=-1`` counts every image exactly once; a batch
    may consist of padding alone.

    Attributes:
        images: float32, ``[B, 3, S, S]``, normalised as the model asks.
        labels: int64, ``[B]``, in [0, C), or -1 where the class is not known.
        indices: int64, ``[B]``, the images' positions in their split, or -1.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class OtherBatch(NamedTuple):
    """B images of other tasks, without their labels.

    Attributes:
        images: float32, ``[B, 3, S, S]``, normalised as the model asks.
        tasks: int64, ``[B]``, positions of the images' tasks in the data module's ``other_task_names``.
        indices: int64, ``[B]``, the images' positions in their tasks' split.
    """

    images: Tensor
    tasks: Tensor
    indices: Tensor
