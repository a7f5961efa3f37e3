"""From texts to what a language model takes: token numbers, masks, and which tokens are to be predicted.

Three kinds of network take three kinds of inputs, all int64 and padded at the end:

=================== ============================================== =====================================
kind                inputs                                         targets
=================== ============================================== =====================================
``encoder``         token numbers and mask ``[B, L]``              classes ``[B]``
``encoder_decoder`` the same, decoder's tokens ``[B, M]``          the answer's tokens ``[B, M]``
``causal``          the same, positions ``[B, M]`` that predict    the tokens after them ``[B, M]``
=================== ============================================== =====================================

With C answers to choose from, inputs have ``[B, C, M]`` and a fourth one holds the answers' tokens; targets are the
right answers ``[B]``. Whatever is padding is -1, of the mask 0, and token numbers the tokenizer's own padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, DataError, first_few

__all__ = ["Encoded", "Kind", "Tokenization"]

Kind = Literal["encoder", "encoder_decoder", "causal"]
_IGNORED = -1


@dataclass(frozen=True)
class Encoded:
    """Texts as token numbers.

    Attributes:
        input_ids: of every text, int64 ``[length]``.
        target_ids: of every target text, int64 ``[length]``; None if there were none.
        truncated: how many texts and target texts were too long, and cut.
    """

    input_ids: list[np.ndarray]
    target_ids: list[np.ndarray] | None = None
    truncated: int = 0


class Tokenization:
    """How texts become the inputs of a language model: the ``preprocessing`` of its network.

    Args:
        tokenizer: a fast tokenizer of transformers.
        kind: ``encoder``, ``encoder_decoder`` or ``causal``.
        max_length: most tokens of a text; of a causal model of a text and its target together. Special tokens count.
        max_target_length: most tokens of a target, its end included.
        start_id: the token that a decoder begins with; an encoder-decoder needs it.

    Attributes:
        pad_id: the tokenizer's padding, or 0 where it has none: what is padding is masked.
        end_id: the token that ends a target; None if the tokenizer has none.
        digest: 16 hexadecimal digits that tell its vocabulary and rules from others.

    Raises:
        ConfigurationError: the tokenizer is no fast one, or a setting is out of its range.
    """

    def __init__(
        self, tokenizer: Any, kind: Kind, max_length: int, max_target_length: int = 128, start_id: int | None = None
    ) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigurationError(
                f"tokenizer: expected a fast one, with a tokenizer.json, got {type(tokenizer).__name__}. Save the "
                "model with its fast tokenizer."
            )
        if kind not in get_args(Kind):
            raise ConfigurationError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}.")
        for name, value in (("max_length", max_length), ("max_target_length", max_target_length)):
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"{name}: expected an integer of at least 1, got {value!r}.")
        if kind == "encoder_decoder" and start_id is None:
            raise ConfigurationError(
                "start_id: expected the token that the decoder begins with, got none. Set decoder_start_token_id in "
                "the model's config."
            )
        self.tokenizer, self.kind = tokenizer, kind
        self.max_length, self.max_target_length, self.start_id = max_length, max_target_length, start_id
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.end_id: int | None = tokenizer.eos_token_id
        backend = tokenizer.backend_tokenizer
        backend.no_truncation(), backend.no_padding()  # its text holds what was used last
        self.digest = hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]

    def encode(self, sources: Sequence[str], targets: Sequence[str] | None = None, ended: bool = True) -> Encoded:
        """Texts to token numbers, too long ones cut and counted.

        A text has the special tokens that the tokenizer adds. A causal model's text is followed by its target: cut is
        its beginning, so that both fit; of a text without target, the end.

        Args:
            sources: N texts.
            targets: N texts that are to be predicted.
            ended: whether a target ends with the tokenizer's end of text; answers of a causal model that are only
                compared with each other do not.

        Raises:
            DataError: a target has no tokens, or a text that a target is to follow has none.
        """
        if targets is None:
            cut, truncated = self._cut(sources)
            return Encoded(cut, None, truncated)
        answers, truncated = self._targets(targets, ended)
        if self.kind != "causal":
            cut, more = self._cut(sources)
            return Encoded(cut, answers, truncated + more)
        rows = []
        for index, (ids, answer) in enumerate(zip(self._whole(sources, True), answers, strict=True)):
            room = self.max_length - len(answer)
            if not ids and (first := self.tokenizer.bos_token_id) is not None:
                ids = [first]
            if not ids or room < 1:
                raise DataError(
                    f"text {index}: expected at least one token before its target, got "
                    + ("an empty text." if not ids else f"a target of {len(answer)} for max_length {self.max_length}.")
                )
            truncated += len(ids) > room
            begins = ids[:1] if ids[0] == self.tokenizer.bos_token_id and room > 1 else []
            kept = ids if len(ids) <= room else [*begins, *ids[len(ids) - room + len(begins) :]]
            rows.append(np.asarray(kept, np.int64))
        return Encoded(rows, answers, truncated)

    def padded(
        self, input_ids: Sequence[np.ndarray], target_ids: Sequence[np.ndarray] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The batch of some texts: inputs and, unless it is an encoder's, the tokens to predict.

        Args:
            input_ids: of B texts.
            target_ids: of their targets. None: a causal model predicts every next token of the texts, a decoder has its
                first token only.

        Returns:
            Inputs and targets as the table at the head of this module has them; targets -1 where nothing is known.
        """
        if self.kind == "encoder":
            return _rows(input_ids, self.pad_id), None
        if self.kind == "encoder_decoder":
            assert self.start_id is not None
            answers = [np.full(1, _IGNORED)] * len(input_ids) if target_ids is None else target_ids
            begun = [np.concatenate([[self.start_id], one[:-1]]) for one in answers]
            return (*_rows(input_ids, self.pad_id), _stacked(begun)), _stacked(answers)
        if target_ids is None:
            places = [np.arange(len(one) - 1) for one in input_ids]
            return (*_rows(input_ids, self.pad_id), _stacked(places)), _stacked([one[1:] for one in input_ids])
        whole, places = _followed(input_ids, target_ids)
        return (*_rows(whole, self.pad_id), _stacked(places)), _stacked(target_ids)

    def padded_answers(
        self, input_ids: Sequence[np.ndarray], answers: Sequence[Sequence[np.ndarray]]
    ) -> tuple[Tensor, ...]:
        """The inputs of texts whose answers are to be ranked; texts may have different numbers of them.

        Args:
            input_ids: of B texts.
            answers: token numbers of every text's answers.

        Returns:
            Of an encoder-decoder: token numbers and mask ``[B, L]``, the decoder's tokens and the answers'
            ``[B, C, M]``. Of a causal model: token numbers and mask ``[B, C, L]`` of the text with every answer,
            positions and answers' tokens ``[B, C, M]``.

        Raises:
            ConfigurationError: the network is an encoder, which ranks no answers.
        """
        if self.kind == "encoder":
            raise ConfigurationError("answers: expected a network that predicts tokens, got an encoder.")
        most = max(map(len, answers))
        empty = np.empty(0, np.int64)
        flat = [one for own in answers for one in (*own, *[empty] * (most - len(own)))]

        def ranked(*parts: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.view(len(input_ids), most, -1) for part in parts)

        if self.kind == "encoder_decoder":
            begun = [np.concatenate([[self.start_id], one[:-1]]) if len(one) else one for one in flat]
            return (*_rows(input_ids, self.pad_id), *ranked(_stacked(begun), _stacked(flat)))
        whole, places = _followed([one for one in input_ids for _ in range(most)], flat)
        return ranked(*_rows(whole, self.pad_id), _stacked(places), _stacked(flat))

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before a text, and those that it puts after it."""
        (plain,), (whole,) = self._whole(["a"], False), self._whole(["a"], True)
        starts = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
        return (whole[: starts[0]], whole[starts[0] + len(plain) :]) if starts else ([], [])

    def text(self, ids: Sequence[int]) -> str:
        """The text of token numbers, without what the tokenizer adds; special tokens in it are written out."""
        before, after = self.added
        rest = list(ids)
        rest = rest[len(before) :] if rest[: len(before)] == before else rest
        rest = rest[: len(rest) - len(after)] if after and rest[-len(after) :] == after else rest
        text: str = self.tokenizer.decode(rest, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @property
    def fills(self) -> tuple[int, int, int, int]:
        """What the inputs are padded with, in their order."""
        return self.pad_id, 0, _IGNORED, _IGNORED

    def _targets(self, targets: Sequence[str], ended: bool) -> tuple[list[np.ndarray], int]:
        """Token numbers of targets, and how many were too long."""
        end = [] if not ended or self.end_id is None else [self.end_id]
        begin = self.added[0] if self.kind == "encoder_decoder" else []  # a BART's decoder writes it first
        whole = self._whole(targets, False)
        empty = [index for index, ids in enumerate(whole) if not ids]
        if empty:
            raise DataError(f"targets: expected texts with tokens, got none in {len(empty)}: {first_few(empty)}.")
        room = self.max_target_length - len(begin) - len(end)
        cut = [np.asarray([*begin, *ids[:room], *end], np.int64) for ids in whole]
        return cut, sum(len(ids) > room for ids in whole)

    def _whole(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not len(texts):
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return found

    def _cut(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Token numbers of texts, the end of long ones cut before the special tokens; and how many were."""
        whole = self._whole(texts, True)
        long = [index for index, ids in enumerate(whole) if len(ids) > self.max_length]
        if long:
            again = self.tokenizer([texts[index] for index in long], truncation=True, max_length=self.max_length)
            for index, ids in zip(long, again["input_ids"], strict=True):
                whole[index] = ids
        return [np.asarray(ids, np.int64) for ids in whole], len(long)

    def __repr__(self) -> str:
        starts = "" if self.start_id is None else f", start_id={self.start_id}"
        return (
            f"Tokenization({self.digest}, {self.kind}, max_length={self.max_length}, "
            f"max_target_length={self.max_target_length}{starts})"
        )


def _rows(rows: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Token numbers and their mask."""
    mask = _stacked([np.ones(len(row)) for row in rows], 0)
    return _stacked(rows, pad), mask


def _stacked(rows: Sequence[np.ndarray], fill: int = _IGNORED) -> Tensor:
    stacked = np.full((len(rows), max(1, *map(len, rows)) if len(rows) else 1), fill, np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(stacked)


def _followed(texts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Texts with their targets, and the positions that predict these; the last one of a text without target."""
    whole = [np.concatenate([text, target[:-1]]) for text, target in zip(texts, targets, strict=True)]
    places = [
        np.arange(len(text) - 1, len(text) - 1 + max(1, len(target)))
        for text, target in zip(texts, targets, strict=True)
    ]
    return whole, places
