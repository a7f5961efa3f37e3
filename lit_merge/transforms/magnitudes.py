"""Exact selection by magnitude in streamed passes: where to cut so that exactly k entries of every row are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lit_merge.vectors import TaskVectors

__all__ = ["Cut", "Walk", "below", "common_dtype", "count_of", "find_cuts", "walk_all", "walk_stack"]

Walk = Callable[[], Iterator[tuple[str, int, Tensor]]]
"""Starts a pass: parameter names in sorted order, positions in them, pieces ``(T, n)``."""

_LENGTH = 1 << 18  # entries per row and piece: a histogram of 2^16 counters should cost little beside them
_DIGITS: dict[torch.dtype, tuple[torch.dtype, list[tuple[int, int]]]] = {  # shift and number of bits, the highest first
    torch.float32: (torch.int32, [(15, 16), (0, 15)]),
    torch.float64: (torch.int64, [(47, 16), (31, 16), (15, 16), (0, 15)]),
}


@dataclass(frozen=True)
class Cut:
    """What is kept of one row: what is larger than a threshold, and what equals it up to a place.

    Attributes:
        threshold: the smallest magnitude that is kept.
        name: the parameter, in sorted order, up to which entries of just this magnitude are kept.
        position: the last such entry in that parameter's flattened order.
    """

    threshold: float
    name: str
    position: int


def count_of(fraction: float, size: int) -> int:
    """⌊fraction · size⌋ with the fraction read as it is written: 0.29 of 100 is 29, although 0.29 * 100 < 29."""
    return math.floor(Fraction(repr(fraction)) * size)


def common_dtype(vectors: TaskVectors) -> torch.dtype:
    """float64 if any parameter is, otherwise float32."""
    return torch.float64 if any(vectors.dtype(name) == torch.float64 for name in vectors) else torch.float32


def walk_all(vectors: TaskVectors) -> Iterator[tuple[str, int, Tensor]]:
    """One pass over all parameters, in the sorted order of their names."""
    for name in sorted(vectors):
        for start, piece in vectors.pieces(name, max(vectors.piece_length(name), _LENGTH)):
            yield name, start, piece


def walk_stack(name: str, stack: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """One pass over one parameter's stack ``(T, *shape)``."""
    yield name, 0, stack.reshape(len(stack), -1)


def find_cuts(walk: Walk, kept: int, dtype: torch.dtype) -> tuple[Cut, ...]:
    """The cuts that keep exactly ``kept`` entries of every row, in memory that does not depend on their number.

    The threshold's bit pattern is found digit by digit, each by a histogram over one pass: two passes for float32, four
    for float64. Only if several entries have just that magnitude, and not all of them are kept, one more looks for the
    place up to which they are: in the sorted order of the names, so that the order of the parameters does not matter.

    Args:
        walk: starts a pass.
        kept: how many, from 1 to the number of entries.
        dtype: float32, or float64 if any piece is.

    Returns:
        One cut per row.
    """
    integer, digits = _DIGITS[dtype]
    prefixes: list[int] = []  # of each row's threshold, as far as it is known
    missing: list[int] = []  # how many of the entries with that prefix are kept
    for shift, bits in digits:
        counts: Tensor | None = None
        for _, _, piece in walk():
            keys = piece.to(dtype).abs_().view(integer)
            missing = missing or [kept] * len(keys)
            if counts is None:
                counts = torch.zeros(len(keys), 1 << bits, dtype=torch.int64, device=keys.device)
            for row, row_keys in enumerate(keys):
                if prefixes:
                    row_keys = row_keys[(row_keys >> (shift + bits)) == prefixes[row]]
                counts[row] += torch.bincount((row_keys >> shift) & ((1 << bits) - 1), minlength=1 << bits)
        assert counts is not None
        found = [_digit(row, rest) for row, rest in zip(counts.cpu(), missing, strict=True)]
        prefixes = [
            (prefix << bits) | digit for prefix, (digit, _, _) in zip(prefixes or [0] * len(found), found, strict=True)
        ]
        missing = [rest - above for rest, (_, above, _) in zip(missing, found, strict=True)]
    thresholds = torch.tensor(prefixes, dtype=integer).view(dtype).tolist()
    equal = [count for _, _, count in found]
    places = _places(walk, thresholds, missing, equal, dtype)
    return tuple(Cut(value, *place) for value, place in zip(thresholds, places, strict=True))


def below(cuts: tuple[Cut, ...], name: str, start: int, piece: Tensor) -> Tensor:
    """Which entries of a piece ``(T, n)`` the cuts leave out: a mask of its shape."""
    compared = piece.abs()
    limits = torch.tensor([cut.threshold for cut in cuts], dtype=piece.dtype, device=piece.device)
    behind = torch.tensor([name > cut.name for cut in cuts], device=piece.device)
    # Behind the place, what equals the threshold is left out as well.
    limits = torch.where(behind, torch.nextafter(limits, torch.full_like(limits, math.inf)), limits)
    left_out = compared < limits.unsqueeze(1)
    for row, cut in enumerate(cuts):
        first = max(cut.position + 1 - start, 0)
        if name == cut.name and first < piece.shape[1]:
            left_out[row, first:] |= compared[row, first:] == cut.threshold
    return left_out


def _digit(counts: Tensor, kept: int) -> tuple[int, int, int]:
    """The digit of the kept-th largest, how many have a larger one, and how many have just this one."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, kept))
    digit = len(counts) - 1 - place
    count = int(counts[digit])
    return digit, int(from_above[place]) - count, count


def _places(
    walk: Walk, thresholds: Sequence[float], missing: Sequence[int], equal: Sequence[int], dtype: torch.dtype
) -> list[tuple[str, int]]:
    """Up to where the entries that equal the threshold are kept."""
    places: list[tuple[str, int] | None] = [
        _EVERYWHERE if rest == count else None for rest, count in zip(missing, equal, strict=True)
    ]
    if None not in places:
        return [_EVERYWHERE] * len(places)
    left = list(missing)
    for name, start, piece in walk():
        keys = piece.to(dtype).abs_()
        for row, place in enumerate(places):
            if place is None:
                positions = (keys[row] == thresholds[row]).nonzero().flatten()
                if len(positions) >= left[row]:
                    places[row] = (name, start + int(positions[left[row] - 1]))
                left[row] -= len(positions)
        if None not in places:
            break
    return [place or _EVERYWHERE for place in places]


_EVERYWHERE = (chr(0x10FFFF), 0)  # behind every name
