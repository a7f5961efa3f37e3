"""Data sets that give a whole batch at a time, of examples of any kind."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_merge.data.batch import PADDING, Batch

__all__ = ["Examples", "TensorExamples"]


class Examples(Dataset[Batch], ABC):
    """N examples of a split, indexed by what the samplers yield: ``epoch * N + index``, or -1 for padding.

    Args:
        labels: the targets: int64, ``[N]``, or ``[N, L]``.
        names: of the examples, N of them.
        preprocessing: what the network needs of its data.
        augmentation_seed: seed of the augmentation, None for none.
    """

    def __init__(
        self, labels: Tensor, names: Sequence[str], preprocessing: Any = None, augmentation_seed: int | None = None
    ) -> None:
        self.labels, self.names = labels, names
        self.preprocessing, self.augmentation_seed = preprocessing, augmentation_seed

    @abstractmethod
    def inputs(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, ...]:
        """The network's inputs for some examples.

        Args:
            indices: int64 ``[B]``, in [0, N).
            epochs: int64 ``[B]``, with which an augmentation may change.

        Returns:
            Tensors ``[B, …]``.
        """

    @abstractmethod
    def content(self) -> Iterator[bytes | memoryview]:
        """What tells the N examples, before any preprocessing, from others."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> Examples:
        """Some of the examples, in the order given."""

    def batch(self, inputs: tuple[Tensor, ...], targets: Tensor, indices: Tensor) -> Batch:
        """The batch of these inputs; override it for a kind of its own."""
        return Batch(inputs, targets, indices)

    def blank(self, count: int) -> tuple[Tensor, ...]:
        """The inputs of so many examples of padding: zeros."""
        first = self.inputs(np.zeros(1, np.int64), np.zeros(1, np.int64))
        return tuple(one.new_zeros(count, *one.shape[1:]) for one in first)

    def digest(self) -> str:
        """SHA-256 of all that a batch depends on: examples, targets, preprocessing (by its ``repr``), augmentation.

        Returns:
            64 hexadecimal digits.
        """
        settings = [type(self).__name__, len(self), repr(self.preprocessing), self.augmentation_seed]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.labels.numpy().tobytes())
        for buffer in self.content():
            digest.update(buffer)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """The batch of B draws; torch's loader calls it with all of a batch's."""
        drawn = np.asarray(draws, np.int64)
        present = drawn >= 0
        epochs, indices = np.divmod(drawn[present], len(self))
        positions = torch.from_numpy(indices)
        if present.all():
            return self.batch(self.inputs(indices, epochs), self.labels[positions], positions)
        where = torch.from_numpy(present)
        inputs = self.blank(len(drawn))
        if len(indices):
            for whole, part in zip(inputs, self.inputs(indices, epochs), strict=True):
                whole[where] = part
        targets = torch.full((len(drawn), *self.labels.shape[1:]), PADDING)
        places = torch.full((len(drawn),), PADDING)
        targets[where], places[where] = self.labels[positions], positions
        return self.batch(inputs, targets, places)


class TensorExamples(Examples):
    """Examples that are tensors in memory already, such as token numbers with their mask.

    Args:
        inputs: of the network, N of each: tensors ``[N, …]``.
        labels: the targets: int64, ``[N]``.
        names: of the examples; their numbers by default.
    """

    def __init__(self, inputs: Sequence[Tensor], labels: Tensor, names: Sequence[str] | None = None) -> None:
        super().__init__(labels, list(map(str, range(len(labels)))) if names is None else names)
        self._inputs = tuple(inputs)

    def inputs(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, ...]:
        """See :meth:`Examples.inputs`."""
        positions = torch.from_numpy(indices)
        return tuple(one[positions] for one in self._inputs)

    def content(self) -> Iterator[bytes | memoryview]:
        """Dtypes, sizes and values."""
        for one in self._inputs:
            yield f"{one.dtype}{list(one.shape)}".encode()
            yield one.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def subset(self, indices: Sequence[int]) -> TensorExamples:
        """See :meth:`Examples.subset`."""
        chosen = list(indices)
        return TensorExamples(
            [one[chosen] for one in self._inputs], self.labels[chosen], [self.names[index] for index in chosen]
        )
