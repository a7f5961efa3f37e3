"""The tokens of a task's texts, with a word on what was cut; all but small tasks are tokenised once for all runs."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lit_merge.data.text.examples import TextPreprocessing
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.files.cache import Cache

__all__ = ["answer_tokens", "checked_preprocessing", "encoded", "encoded_answers", "packed"]

_VERSION = 3  # part of every cache key: raise it when the computation changes
_WORTH_KEEPING = 100_000  # characters that take longer to tokenise than their tokens to read
_MOST_UNKNOWN = 0.5
_MANY_UNKNOWN = 0.1
_LOOKED_AT = 1000

Tokens = list[np.ndarray]


def checked_preprocessing(preprocessing: Any, name: str, max_length: int | None = None) -> TextPreprocessing:
    """The network's, if it is one for texts; with shorter texts, if the task has its own.

    Raises:
        ConfigurationError: it is not.
    """
    if not hasattr(preprocessing, "padded_answers"):
        raise ConfigurationError(
            f"{name}: expected a network for texts, got one whose data are prepared by {type(preprocessing).__name__}. "
            "Set network to a language model."
        )
    own: TextPreprocessing = copy.copy(preprocessing)
    own.max_length = min(own.max_length, max_length or own.max_length)
    return own


def encoded(
    preprocessing: TextPreprocessing,
    name: str,
    sources: Sequence[Any],
    targets: Sequence[str] | None = None,
    ended: bool = True,
) -> tuple[Tokens, Tokens | None]:
    """Tokens of N texts and of their targets; how many were too long is said, with numbers.

    Args:
        preprocessing: of the network.
        name: of the task and split, for messages.
        sources: texts, or pairs of them.
        targets: what is to follow them.
        ended: see :meth:`lit_merge.models.language.Tokenization.encode`.

    Raises:
        DataError: the tokenizer does not know most of the words, or a text or target has no tokens.
    """
    cache = Cache("tokens") if sum(map(_characters, sources)) >= _WORTH_KEEPING else None
    key = "" if cache is None else cache.key([_VERSION, repr(preprocessing), ended, _digest(sources), _digest(targets)])
    stored = None if cache is None else cache.tensors(key)
    if stored is None:
        unknown = _share_unknown(preprocessing, name, sources)
        found = preprocessing.encode(sources, targets, ended)
        flat = {"sources": found.input_ids, **({} if targets is None else {"targets": found.target_ids})}
        stored = {one: tensor for kind, rows in flat.items() for one, tensor in _flat(kind, rows).items()}
        stored["truncated"] = torch.tensor([found.truncated, *_longest(preprocessing, sources, found)])
        stored["unknown"] = torch.tensor(unknown, dtype=torch.float64)
        if cache is not None:
            cache.write_tensors(key, stored)
    _warn_of_unknown(name, float(stored["unknown"]), sources)
    truncated, longest = stored["truncated"].tolist()
    if truncated:
        from lightning.pytorch.utilities import rank_zero_warn

        several = f"{len(sources):,} texts" if targets is None else f"{2 * len(sources):,} texts and targets"
        rank_zero_warn(
            f"{name}: cut {truncated:,} of {several} to max_length {preprocessing.max_length:,} "
            f"(targets: {preprocessing.max_target_length:,}); the longest text has {longest:,} tokens."
        )
    return _rows("sources", stored), None if targets is None else _rows("targets", stored)


def answer_tokens(
    preprocessing: TextPreprocessing, name: str, sources: Sequence[Any], answers: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """The tokens of every answer that one of N texts has.

    Raises:
        DataError: two answers of a text have the same tokens, so that no network can tell them apart.
    """
    different = list(dict.fromkeys(answer for own in answers for answer in own))
    short = min(sources, key=lambda one: len(str(one)))
    ids = preprocessing.encode([short] * len(different), different, preprocessing.kind != "causal").target_ids
    tokens = dict(zip(different, ids, strict=True))
    for own in dict.fromkeys(map(tuple, answers)):
        first: dict[bytes, str] = {}
        for answer in own:
            other = first.setdefault(np.asarray(tokens[answer]).tobytes(), answer)
            if other != answer:
                raise DataError(
                    f"{name}: expected answers that the network's tokenizer tells apart, got {other!r} and {answer!r}, "
                    "which have the same tokens. Set answers to other words."
                )
    return tokens


def encoded_answers(
    preprocessing: TextPreprocessing, name: str, sources: Sequence[Any], answers: Sequence[Sequence[str]]
) -> tuple[Tokens, list[list[np.ndarray]]]:
    """Tokens of N texts, cut so that each of their answers fits, and of every text's answers.

    Raises:
        DataError: as :func:`encoded`.
    """
    ended = preprocessing.kind != "causal"
    tokens = answer_tokens(preprocessing, name, sources, answers)
    longest = [max(own, key=lambda answer: len(tokens[answer])) for own in answers]
    rows, _ = encoded(preprocessing, name, sources, longest, ended)
    return rows, [[tokens[answer] for answer in own] for own in answers]


def packed(preprocessing: TextPreprocessing, name: str, texts: Sequence[str]) -> Tokens:
    """Texts one after the other, each with the end of text behind it, in blocks of ``max_length`` tokens.

    What is left over at the end is no whole block, and left out.

    Raises:
        ConfigurationError: the network does not predict the next token, or its tokenizer has no end of text.
        DataError: there are fewer tokens than one block has, or the tokenizer does not know most of the words.
    """
    if preprocessing.kind != "causal" or preprocessing.end_id is None:
        got = f"the kind {preprocessing.kind}" if preprocessing.kind != "causal" else "a tokenizer without end of text"
        raise ConfigurationError(f"pack: expected a causal language model with an end of text, got {got}. Remove it.")
    _warn_of_unknown(name, _share_unknown(preprocessing, name, texts), texts)
    whole = preprocessing.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.fromiter((token for ids in whole for token in (*ids, preprocessing.end_id)), np.int64)
    count = len(stream) // preprocessing.max_length
    if not count:
        raise DataError(
            f"{name}: expected at least one block of {preprocessing.max_length:,} tokens, got {len(stream):,} in all "
            "texts together. Set pack to false, or max_length of the network lower."
        )
    return list(stream[: count * preprocessing.max_length].reshape(count, -1))


def _share_unknown(preprocessing: TextPreprocessing, name: str, sources: Sequence[Any]) -> float:
    """Of the first texts' tokens, how many are the unknown one, from 0 to 1.

    Raises:
        DataError: most of them are.
    """
    unknown = preprocessing.tokenizer.unk_token_id
    some = [one if isinstance(one, str) else " ".join(one) for one in sources[:_LOOKED_AT]]
    if unknown is None or not some:
        return 0.0
    ids = np.concatenate(
        [
            np.asarray(one, np.int64)
            for one in preprocessing.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        ]
    )
    share = float((ids == unknown).mean()) if len(ids) else 0.0
    if share > _MOST_UNKNOWN:
        raise DataError(
            f"{name}: expected texts that the network's tokenizer knows, got its unknown token for {share:.0%} of the "
            f"first {len(some):,} texts' tokens. Use the tokenizer of this network's vocabulary, or another network."
        )
    return share


def _warn_of_unknown(name: str, share: float, sources: Sequence[Any]) -> None:
    if share > _MANY_UNKNOWN:
        from lightning.pytorch.utilities import rank_zero_warn

        count = min(len(sources), _LOOKED_AT)
        rank_zero_warn(f"{name}: {share:.0%} of the first {count:,} texts' tokens are unknown to the tokenizer.")


def _characters(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _longest(preprocessing: TextPreprocessing, sources: Sequence[Any], found: Any) -> list[int]:
    """Tokens of the longest text as it was; only those that may have been cut are looked at again."""
    if not found.truncated:
        return [max(map(len, found.input_ids), default=0)]
    # Of a causal model a target takes some of the room.
    taken = found.target_ids if preprocessing.kind == "causal" and found.target_ids is not None else [()] * len(sources)
    cut = [
        source
        for source, ids, own in zip(sources, found.input_ids, taken, strict=True)
        if len(ids) + len(own) >= preprocessing.max_length
    ]
    again = preprocessing.tokenizer(cut, verbose=False)["input_ids"] if cut else found.input_ids
    return [max(map(len, again), default=0)]


def _digest(texts: Sequence[Any] | None) -> str:
    digest = hashlib.sha256()
    for text in texts or ():
        raw = (text if isinstance(text, str) else "\0".join(text)).encode("utf-8", "surrogatepass")
        digest.update(f"{len(raw)}:".encode() + raw)
    return digest.hexdigest()


def _flat(kind: str, rows: Tokens) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    return {kind: torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, np.int64)), f"{kind}.lengths": lengths}


def _rows(kind: str, stored: dict[str, torch.Tensor]) -> Tokens:
    whole, lengths = stored[kind].numpy(), stored[f"{kind}.lengths"].numpy()
    return np.split(whole, np.cumsum(lengths)[:-1]) if len(lengths) else []
