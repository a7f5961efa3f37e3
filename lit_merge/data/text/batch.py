"""Batches of texts, of which each is as long as its longest text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from lit_merge.data.batch import PADDING, Batch
from lit_merge.errors import DataError

__all__ = ["TextBatch"]


class TextBatch(Batch):
    """B texts with what is to be known of them.

    The inputs are those of :class:`lit_merge.models.language.Tokenization`: token numbers and mask, then the decoder's
    tokens or the positions that predict, then, where answers are ranked, the answers' tokens.

    Args:
        inputs: int64, ``[B, L]`` and ``[B, M]``, or with C answers ``[B, C, …]``.
        targets: int64 ``[B]`` (classes, or the right answers) or ``[B, M]`` (tokens, -1 where none counts); float32
            ``[B]`` of numbers.
        indices: int64, ``[B]``, the texts' positions in their split, or -1 of padding.
        fills: what each of the inputs is padded with.
    """

    def __init__(self, inputs: tuple[Tensor, ...], targets: Tensor, indices: Tensor, fills: Sequence[int]) -> None:
        super().__init__(inputs, targets, indices)
        self.fills = tuple(fills)

    @property
    def ranked(self) -> bool:
        """Whether every text comes with answers to choose from."""
        return len(self.inputs) == 4

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Self:
        """Several batches one after the other, padded to the longest; targets of other lengths are padded with -1.

        The first batch says how; others may be :class:`~lit_merge.data.OtherBatch`.

        Raises:
            DataError: some have answers to choose from, and some have not.
        """
        first: Any = batches[0]
        shapes = {tuple(one.ndim for one in batch.inputs) for batch in batches}
        if len(shapes) > 1:
            raise DataError(
                "batches: expected texts with answers to choose from in all tasks or in none, got both. Set answers_as "
                "of all tasks to the same."
            )
        joined = object.__new__(cls)
        joined.fills = first.fills
        joined.inputs = tuple(
            _joined(parts, fill)
            for parts, fill in zip(zip(*(batch.inputs for batch in batches), strict=True), first.fills, strict=False)
        )
        most = max(batch.targets.ndim for batch in batches)
        joined.targets = _joined(
            [one if one.ndim == most else one[:, None] for one in (batch.targets for batch in batches)], PADDING
        )
        joined.indices = torch.cat([batch.indices for batch in batches])
        return joined

    def own_outputs(self, outputs: Tensor) -> Tensor:
        """See :meth:`Batch.own_outputs`: predicted tokens and answers as many as here, also where others had more."""
        predicted = self.inputs[2:]
        if predicted and outputs.ndim > predicted[0].ndim:
            for axis, size in enumerate(predicted[0].shape[1:], start=1):
                outputs = outputs.narrow(axis, 0, size)
        return outputs

    def unpadded(self, in_order: bool = True) -> Iterator[Self]:
        """The same texts without padding, those of the same length together; of several answers each with its own text.

        Args:
            in_order: whether the order is kept, so that neighbours alone come together.
        """
        if self.ranked:
            yield from self._answers_apart().unpadded(in_order)
            return
        own, predicted = self.inputs[:2], self.inputs[2:]
        lengths = [_lengths(own[1] > 0), *(_lengths(one >= 0) for one in predicted)]
        found = torch.stack(lengths, 1)
        order = torch.arange(len(self), device=found.device)
        if not in_order:
            for column in reversed(range(found.shape[1])):
                order = order[found[order, column].argsort(stable=True)]
        ends, counts = torch.unique_consecutive(found[order], dim=0, return_counts=True)
        start = 0
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
            part = self.select(order[start : start + count])
            part.inputs = (
                *(one[:, : end[0]] for one in part.inputs[:2]),
                *(one[:, : end[-1]] for one in part.inputs[2:]),
            )
            part.targets = part.targets[:, : end[-1]] if part.targets.ndim > 1 else part.targets
            start += count
            yield part

    def _answers_apart(self) -> Self:
        """Every answer as the target of a text of its own, those that a text has fewer than others left out."""
        *own, predicted, answers = self.inputs
        number = answers.shape[1]
        present = (answers >= 0).any(-1).flatten()
        apart = self._changed(lambda one: one.repeat_interleave(number, 0)[present])
        apart.inputs = tuple(
            (one.flatten(0, 1) if one.ndim == 3 else one.repeat_interleave(number, 0))[present]
            for one in (*own, predicted)
        )
        return apart

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = super()._changed(change)
        changed.fills = self.fills
        return changed


def _lengths(used: Tensor) -> Tensor:
    """Where the last used place of every example is, ``[B, L]`` to ``[B]``; at least 1."""
    places = torch.arange(1, used.shape[-1] + 1, device=used.device)
    return (used * places).amax(1).clamp(min=1)


def _joined(parts: Sequence[Tensor], fill: int) -> Tensor:
    """Along the first axis; the others are padded at their ends to the longest."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    padded = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(F.pad(part, pads, value=fill) if any(missing) else part)
    return torch.cat(padded)
