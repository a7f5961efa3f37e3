"""Texts of a split as a network's tokens: tokenised once, padded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lit_merge.data.batch import PADDING
from lit_merge.data.examples import Examples
from lit_merge.data.text.batch import TextBatch

__all__ = ["TextExamples", "TextPreprocessing"]


class TextPreprocessing(Protocol):
    """What a task needs of a network's ``preprocessing``; :class:`lit_merge.models.language.Tokenization` has it."""

    tokenizer: Any
    kind: Any
    max_length: int
    max_target_length: int
    pad_id: int
    end_id: int | None
    digest: str

    @property
    def fills(self) -> Sequence[int]:
        """What each of the inputs is padded with."""

    def encode(self, sources: Sequence[Any], targets: Sequence[str] | None = None, ended: bool = True) -> Any:
        """Token numbers of texts, and of what is to follow them."""

    def padded(
        self, input_ids: Sequence[np.ndarray], target_ids: Sequence[np.ndarray] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The batch of some texts."""

    def padded_answers(
        self, input_ids: Sequence[np.ndarray], answers: Sequence[Sequence[np.ndarray]]
    ) -> tuple[Tensor, ...]:
        """The batch of some texts with answers to choose from."""


class TextExamples(Examples):
    """N texts of a split.

    Of a text the network predicts its class, its target, which of its answers is right, or (with none of them) every
    next token. A text whose label is -1 is one of which nothing is known: its targets are -1, and no input tells them.

    Args:
        input_ids: tokens of the texts, N of them, int64 ``[length]``.
        labels: ``[N]``: int64 classes, float32 numbers, or 0 where there is a target; -1 where nothing is known.
        names: of the texts.
        preprocessing: of the network, which pads.
        target_ids: tokens of the targets, N of them.
        answer_ids: tokens of every text's answers; the label is the right one.
        content: what tells the texts, with targets and answers, from others: N texts.
        length_groups: among how many batches of training those of similar length are put together; 0 for random ones.
        texts: N prompts as they were before the tokenizer, for who generates or shows them.
        targets: N targets as texts, of those that have one.
        answers: the answers of every text as texts.
    """

    def __init__(
        self,
        input_ids: Sequence[np.ndarray],
        labels: Tensor,
        names: Sequence[str],
        preprocessing: TextPreprocessing,
        target_ids: Sequence[np.ndarray] | None = None,
        answer_ids: Sequence[Sequence[np.ndarray]] | None = None,
        content: Sequence[str] = (),
        length_groups: int = 0,
        texts: Sequence[Any] = (),
        targets: Sequence[str] = (),
        answers: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__(labels, names, preprocessing)
        self.input_ids, self.target_ids, self.answer_ids = input_ids, target_ids, answer_ids
        self.texts, self.targets, self.answers = texts, targets, answers
        self.length_groups = length_groups
        self._content = content

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text, int64 ``[N]``."""
        return np.fromiter(map(len, self.input_ids), np.int64, len(self.input_ids))

    def inputs(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, ...]:
        """See :meth:`Examples.inputs`."""
        return self._padded(indices, self.labels[torch.from_numpy(indices)])[0]

    def content(self) -> Iterator[bytes | memoryview]:
        """The texts with their targets and answers, each behind its length."""
        for one in self._content:
            raw = one.encode("utf-8", "surrogatepass")
            yield f"{len(raw)}:".encode() + raw

    def subset(self, indices: Sequence[int]) -> TextExamples:
        """See :meth:`Examples.subset`."""
        chosen = list(indices)

        def some(values: Any) -> Any:
            return [values[index] for index in chosen] if values else values

        return TextExamples(
            some(self.input_ids),
            self.labels[chosen],
            some(self.names),
            self.preprocessing,
            some(self.target_ids),
            some(self.answer_ids),
            some(self._content),
            self.length_groups,
            some(self.texts),
            some(self.targets),
            some(self.answers),
        )

    def __getitems__(self, draws: Sequence[int]) -> TextBatch:
        """The batch of B draws, as long as its longest text; padding is a text of one token."""
        drawn = np.asarray(draws, np.int64)
        rows = np.where(drawn < 0, PADDING, drawn % max(1, len(self)))
        places = torch.from_numpy(rows)
        labels = torch.full(places.shape, PADDING, dtype=self.labels.dtype)
        labels[places >= 0] = self.labels[places[places >= 0]]
        inputs, targets = self._padded(rows, labels)
        return TextBatch(inputs, targets, places, self.preprocessing.fills)

    def _padded(self, rows: np.ndarray, labels: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        preprocessing = self.preprocessing
        blank, nothing = np.full(1, preprocessing.pad_id), np.full(1, PADDING)
        ids = [blank if row < 0 else self.input_ids[row] for row in rows]
        if self.answer_ids is not None:
            answers = [(blank,) if row < 0 else self.answer_ids[row] for row in rows]
            return preprocessing.padded_answers(ids, answers), labels
        known = (labels != PADDING).tolist()
        if self.target_ids is not None:
            own = [self.target_ids[row] if one else nothing for row, one in zip(rows, known, strict=True)]
            inputs, targets = preprocessing.padded(ids, own)
        else:
            inputs, targets = preprocessing.padded(ids)
        if targets is None:  # an encoder's
            return inputs, labels
        targets[~torch.tensor(known)] = PADDING
        return inputs, targets
