"""Tables of different vocabularies brought to the same rows: by token where tokenizers are there, else by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.checkpoints.pairing.differences import RowRule
from lit_merge.checkpoints.vocabulary import Vocabulary
from lit_merge.errors import StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping, Slicer
from lit_merge.naming import is_vocabulary
from lit_merge.params import working_dtype

__all__ = ["RowPlan", "WithRows", "plan_rows", "vocabulary_names"]


@dataclass(frozen=True)
class RowPlan:
    """Which row of each checkpoint is which row of the merge.

    Attributes:
        rows: R of the merge.
        base: rows of the base, int64 ``[R]``; -1 where it has none.
        inputs: the same of each input.
        tokens: token -> row of the merge, where tokenizers say it; otherwise None.
        note: what was done, in words.
    """

    rows: int
    base: Tensor
    inputs: tuple[Tensor, ...]
    tokens: Vocabulary | None
    note: str


def vocabulary_names(tensors: LazyMapping) -> list[str]:
    """The tables and biases of a vocabulary among a model's tensors; all have one row, or element, per token."""
    return [name for name in tensors if is_vocabulary(name) and len(tensors.shape(name)) in (1, 2)]


def plan_rows(
    rule: RowRule,
    base_rows: int,
    counts: Sequence[int],
    base_tokens: Vocabulary | None = None,
    tokens: Sequence[Vocabulary | None] = (),
) -> RowPlan:
    """Decide about the rows.

    ``base`` has those of the base, ``common`` the first ones that all have, ``union`` those of the base and one for
    every token, or without tokenizers every row, that only inputs have. A token is found by its text if all tokenizers
    are known. A new token has its number in the input if that is free, otherwise the next one; the largest vocabulary
    comes first, so that one with the tokens of all others keeps its numbers.

    Args:
        rule: which rows.
        base_rows: number of rows of the base.
        counts: of each input.
        base_tokens: the base's tokenizer, if there is one.
        tokens: of each input.

    Raises:
        StructureMismatchError: ``common``, and a token has another number in an input.

    Examples:
        >>> plan_rows("union", 2, [3]).base.tolist()
        [0, 1, -1]
        >>> plan_rows("base", 2, [3], {"a": 0, "b": 1}, [{"b": 0, "a": 1, "c": 2}]).inputs[0].tolist()
        [1, 0]
    """
    known = [one for one in tokens if one is not None]
    by_token = base_tokens is not None and len(known) == len(counts)
    if rule == "common":
        rows = min(base_rows, *counts)
        if by_token and base_tokens is not None:
            _refuse_moved(base_tokens, known, rows)
        same = torch.arange(rows)
        return RowPlan(rows, same, (same,) * len(counts), base_tokens, f"the first {rows} rows, which all have")
    if not by_token or base_tokens is None:
        rows = base_rows if rule == "base" else max(base_rows, *counts)
        found = tuple(_numbers(count, rows) for count in counts)
        return RowPlan(
            rows, _numbers(base_rows, rows), found, None, f"{rows} rows, by number, as a tokenizer is missing"
        )
    merged = {token: row for token, row in base_tokens.items() if row < base_rows}
    if rule == "union":
        merged = _with_new(merged, base_rows, known)
    rows = max(base_rows, *(row + 1 for row in merged.values()), 0)
    found = tuple(_of_tokens(merged, one, count, rows) for one, count in zip(known, counts, strict=True))
    new = [token for token in merged if token not in base_tokens]
    moved = f", {len(new)} of them new ({first_few(map(repr, new), 3)})" if new else ""
    base = _of_tokens(merged, base_tokens, base_rows, rows)
    return RowPlan(rows, base, found, merged, f"{rows} rows, by the tokenizers' tokens{moved}")


def _numbers(count: int, rows: int) -> Tensor:
    numbers = torch.arange(rows)
    numbers[count:] = -1
    return numbers


def _refuse_moved(base: Vocabulary, others: Sequence[Vocabulary], rows: int) -> None:
    for one in others:
        moved = [token for token, row in base.items() if row < rows and one.get(token, row) != row]
        if moved:
            raise StructureMismatchError(
                f"rows common: expected every token to have the same number in all vocabularies, got {len(moved)} with "
                f"another ({first_few(map(repr, moved))}). Set rows to base or union, which go by token."
            )


def _with_new(base: Vocabulary, base_rows: int, others: Sequence[Vocabulary]) -> dict[str, int]:
    merged = dict(base)
    taken = set(merged.values())
    following = base_rows
    for one in sorted(others, key=len, reverse=True):
        for token, number in sorted(one.items(), key=lambda item: item[1]):
            if token in merged:
                continue
            while following in taken:
                following += 1
            merged[token] = number if number not in taken else following
            taken.add(merged[token])
    return merged


def _of_tokens(merged: Vocabulary, own: Vocabulary, count: int, rows: int) -> Tensor:
    """Of each row of the merge the row of one checkpoint; rows without a token, which fill a table up, by number."""
    found = torch.full((rows,), -1)
    named = torch.zeros(rows, dtype=torch.bool)
    for token, row in merged.items():
        named[row] = True
        if own.get(token, count) < count:
            found[row] = own[token]
    spare = torch.ones(count, dtype=torch.bool)
    spare[[row for row in own.values() if row < count]] = False
    filling = torch.nonzero(~named[:count] & spare[: min(count, rows)]).flatten() if count else torch.empty(0).long()
    found[filling] = filling
    return found


class WithRows(LazyMapping):
    """A checkpoint whose tables have other rows.

    Args:
        tensors: the checkpoint.
        names: the tables; all others are as they are.
        index: for every row here the row there, int64 ``[R]``; -1 where it is taken from elsewhere.
        fill: where those rows come from: the mean over the mappings that have the row; pairs of a mapping with the
            same names and its own index.
    """

    def __init__(
        self,
        tensors: LazyMapping,
        names: Sequence[str],
        index: Tensor,
        fill: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    ) -> None:
        self._tensors, self._names, self._index, self._fill = tensors, frozenset(names), index, tuple(fill)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        if name not in self._names:
            return stored
        table = stored.new_zeros(len(self._index), *stored.shape[1:])
        own = self._index >= 0
        table[own] = stored[self._index[own]]
        open_rows = ~own
        dtype = working_dtype(stored.dtype)
        total = torch.zeros(table.shape, dtype=dtype)
        count = torch.zeros(len(table), dtype=dtype)
        for other, index in self._fill:
            rows = open_rows & (index >= 0)
            if rows.any():
                total[rows] += other[name][index[rows]].to(dtype)
                count[rows] += 1
        filled = count > 0
        shape = (-1, *(1,) * (table.ndim - 1))
        table[filled] = (total[filled] / count[filled].view(shape)).to(table.dtype)
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        shape = self._tensors.shape(name)
        return torch.Size((len(self._index), *shape[1:])) if name in self._names else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""
        return self._tensors.dtype(name)

    def slicer(self, name: str) -> Slicer:
        """As the checkpoint reads parts; a table is read as a whole, once."""
        return super().slicer(name) if name in self._names else self._tensors.slicer(name)
