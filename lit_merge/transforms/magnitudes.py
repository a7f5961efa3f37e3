"""Exact selection by magnitude in streamed passes: where to cut so that exactly k elements of every row are kept."""

from __future__ import annotations

import math
import mmap
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lit_merge.params import count_nonzero
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.threads import NeededInMainThread, begin, chunk_threads, in_worker, ordered_map

__all__ = [
    "Cut",
    "CutsByParameter",
    "Walk",
    "common_dtype",
    "count_of",
    "cuts_by_parameter",
    "cuts_over_all",
    "find_cuts",
    "find_cuts_of_stack",
    "find_global_cuts",
    "keep_largest",
    "keep_largest_of_row",
    "sampled",
    "size_of",
    "walk_all",
    "walk_stack",
]

Walk = Callable[[], Iterator[tuple[str, int, Tensor]]]
"""Starts a pass: parameter names in sorted order, positions in them, chunks ``(T, n)``."""

_FEWEST = 1 << 18  # elements, from which on a sample of them pays
_SAMPLE = 1 << 21  # elements of a sample, at most
_BLOCK, _CHUNK = 1 << 6, 1 << 10  # that lie side by side, at least and at most
_EQUAL = 1 << 20  # of one parameter that may be in a bracket: differences of bfloat16 have few values, many of each
_HELD = 1 << 23  # elements of a stack, up to which reading all costs less than reading a sample piece by piece
_LENGTH = 1 << 18  # elements per row and chunk: a histogram of 2^16 counters should cost little beside them
_DIGITS: dict[torch.dtype, tuple[torch.dtype, list[tuple[int, int]]]] = {  # shift and number of bits, the highest first
    torch.float32: (torch.int32, [(15, 16), (0, 15)]),
    torch.float64: (torch.int64, [(47, 16), (31, 16), (15, 16), (0, 15)]),
}


@dataclass(frozen=True)
class Cut:
    """What is kept of one row: what is larger than a threshold, and what equals it up to a place.

    Attributes:
        threshold: the smallest magnitude that is kept.
        name: the parameter, in sorted order, up to which elements of just this magnitude are kept; None for all.
        position: the last such element in that parameter's flattened order.
    """

    threshold: float
    name: str | None = None
    position: int = 0


def count_of(fraction: float, size: int) -> int:
    """⌊fraction · size⌋ with the fraction read as it is written: 0.29 of 100 is 29, although 0.29 * 100 < 29."""
    return math.floor(Fraction(repr(fraction)) * size)


def common_dtype(vectors: TaskVectors) -> torch.dtype:
    """float64 if any parameter is, otherwise float32."""
    return torch.float64 if any(vectors.dtype(name) == torch.float64 for name in vectors) else torch.float32


def walk_all(vectors: TaskVectors) -> Iterator[tuple[str, int, Tensor]]:
    """One pass over all parameters, in the sorted order of their names."""
    for name in sorted(vectors):
        for start, chunk in vectors.chunks(name, max(vectors.chunk_length(name), _LENGTH)):
            yield name, start, chunk


def walk_stack(name: str, stack: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """One pass over one parameter's stack ``(T, *shape)``, in chunks that are views of it."""
    flat = stack.reshape(len(stack), -1)
    length = _LENGTH if flat.device.type == "cpu" else flat.shape[1]
    for start in range(0, flat.shape[1], length):
        yield name, start, flat[:, start : start + length]


def find_cuts(walk: Walk, kept: int, dtype: torch.dtype) -> tuple[Cut, ...]:
    """The cuts that keep exactly ``kept`` elements of every row, in memory that does not depend on their number.

    The threshold's bit pattern is found digit by digit, each by a histogram over one pass: two passes for float32, four
    for float64. Only if several elements have just that magnitude (not zero), and not all of them are kept, one more
    looks for the place up to which they are: in the sorted order of the names, so that the order of the parameters
    does not matter.

    Args:
        walk: starts a pass; the chunks are read only.
        kept: how many, from 1 to the number of elements.
        dtype: float32, or float64 if any chunk is.

    Returns:
        One cut per row.
    """
    integer, digits = _DIGITS[dtype]
    prefixes: list[int] = []  # of each row's threshold, as far as it is known
    missing: list[int] = []  # how many of the elements with that prefix are kept
    for shift, bits in digits:
        counts: Tensor | None = None
        for _, _, chunk in walk():
            missing = missing or [kept] * len(chunk)
            if counts is None:
                counts = torch.zeros(len(chunk), 1 << bits, dtype=torch.int64, device=chunk.device)
            for row, values in enumerate(chunk):
                keys = values.to(dtype).abs().view(integer)
                if prefixes:
                    keys = keys[(keys >> (shift + bits)) == prefixes[row]]
                counts[row] += torch.bincount((keys >> shift) & ((1 << bits) - 1), minlength=1 << bits)
        assert counts is not None
        found = [_digit(row, rest) for row, rest in zip(counts.cpu(), missing, strict=True)]
        prefixes = [
            (prefix << bits) | digit for prefix, (digit, _, _) in zip(prefixes or [0] * len(found), found, strict=True)
        ]
        missing = [rest - above for rest, (_, above, _) in zip(missing, found, strict=True)]
    thresholds = torch.tensor(prefixes, dtype=integer).view(dtype).tolist()
    every = [
        rest == count or value == 0  # whether zeros are kept makes no difference
        for value, rest, (_, _, count) in zip(thresholds, missing, found, strict=True)
    ]
    cuts = [Cut(value) if all_of_them else None for value, all_of_them in zip(thresholds, every, strict=True)]
    return _placed(cuts, walk, thresholds, missing, dtype)


def find_cuts_of_stack(name: str, stack: Tensor, kept: int) -> tuple[Cut, ...]:
    """The cuts that keep exactly ``kept`` elements of every row of one parameter's stack ``(T, *shape)``."""
    flat = stack.reshape(len(stack), -1)
    size = flat.shape[1]
    if size > _LENGTH:
        pays = flat.device.type == "cpu" and size >= _FEWEST
        found = _cuts_within_stack(name, flat, kept) if pays else None
        return found or find_cuts(partial(walk_stack, name, flat), kept, flat.dtype)
    magnitudes = flat.abs()  # few enough to be selected from directly
    thresholds = magnitudes.kthvalue(size - kept + 1, dim=1, keepdim=True).values
    missing = (kept - (magnitudes > thresholds).sum(1)).tolist()
    cuts = []
    for row, left in enumerate(missing):
        equal = (magnitudes[row] == thresholds[row]).nonzero().flatten()
        cuts.append(Cut(float(thresholds[row]), name, int(equal[left - 1])))
    return tuple(cuts)


def keep_largest(cuts: tuple[Cut, ...], name: str, start: int, chunk: Tensor) -> Tensor:
    """What the cuts keep of a chunk ``(T, n)`` that begins at a position; the rest is 0. The chunk is written into."""
    for row, cut in zip(chunk, cuts, strict=True):
        keep_largest_of_row(cut, name, start, row)
    return chunk


def keep_largest_of_row(cut: Cut, name: str, start: int, values: Tensor) -> Tensor:
    """What a row's cut keeps of elements ``(n,)`` that begin at a position; the rest is 0. They are written into."""
    # Up to the place what equals the threshold is kept, behind it is not: hardshrink keeps what is above a number.
    place = len(values) if cut.name is None or name < cut.name else 0
    if name == cut.name:
        place = min(max(cut.position + 1 - start, 0), len(values))
    for part, equal_too in ((values[:place], True), (values[place:], False)):
        if len(part):
            torch.hardshrink(part, _limit(cut.threshold, equal_too, values.dtype), out=part)
    return values


@lru_cache(maxsize=1 << 12)
def _limit(threshold: float, equal_too: bool, dtype: torch.dtype) -> float:
    """The number of a dtype that what is above the threshold, or equals it too, is above, and nothing else is."""
    wanted = math.nextafter(threshold, -math.inf) if equal_too else threshold
    limit = torch.tensor(wanted, dtype=dtype)
    if float(limit) > wanted:  # float32 elements, and a threshold that is not
        limit = torch.nextafter(limit, torch.tensor(-math.inf, dtype=dtype))
    return float(limit)


def find_global_cuts(vectors: TaskVectors, kept: int, room: int = 0) -> tuple[Cut, ...]:
    """The cuts that keep exactly ``kept`` elements of every row, of all parameters together.

    For large models a sample tells between which two magnitudes the threshold lies; one pass counts what is above and
    collects what is between, well below one percent. Should the sample have misled, the digits decide.

    Args:
        vectors: what is cut.
        kept: how many, from 1 to the number of elements.
        room: for how many elements between them there is memory, at least.
    """
    if not sampled(vectors):
        return find_cuts(partial(walk_all, vectors), kept, common_dtype(vectors))
    brackets = _brackets(vectors, kept)
    found = _cuts_within(vectors, kept, brackets, room)
    return found or find_cuts(partial(walk_all, vectors), kept, common_dtype(vectors))


def cuts_over_all(what: str, vectors: TaskVectors, kept: int) -> Statistic[tuple[Cut, ...]]:
    """What :func:`find_global_cuts` finds, when it is first needed."""
    compute = partial(find_global_cuts, vectors, kept)
    return Statistic(what, _reads(vectors, sampled(vectors)), compute, at_most=True)


def _reads(vectors: TaskVectors, sampled: bool) -> int:
    """At most, if a sample misleads."""
    digits = 5 if common_dtype(vectors) == torch.float64 else 3
    return vectors.walk * (digits + 2 if sampled else digits)


class CutsByParameter:
    """The cuts that keep so many elements of every parameter by itself, each found when it is first needed.

    In memory that does not depend on the parameters' sizes. Small stacks are read once and held while their cuts are
    found, each by one of the threads that compute chunks, ahead of these; large ones are read once, besides a sample,
    by all threads together, and more often should that mislead.

    Args:
        vectors: what is cut.
        kept: from the number of a parameter's elements to how many of them are kept.
    """

    def __init__(self, vectors: TaskVectors, kept: Callable[[int], int]) -> None:
        self._vectors, self._kept = vectors, kept
        self._found: dict[str, tuple[Cut, ...]] = {}
        self._begun: dict[str, Future[tuple[Cut, ...] | NeededInMainThread]] = {}

    def __call__(self, name: str) -> tuple[Cut, ...]:
        """Of one parameter; in a thread that computes chunks what is not begun is asked of the main one."""
        if name not in self._found:
            begun = self._begun.get(name)
            found = begun.result() if begun else None
            if not isinstance(found, tuple):
                self._begun.pop(name, None)
                if in_worker():
                    raise NeededInMainThread(partial(self, name))
                found = self._of_held(name) if self._is_held(name) else self._of_large(name)
            self._found[name] = found
        return self._found[name]

    def prepare(self, name: str) -> None:
        """Find the cuts of a parameter, or begin to, and begin with those that come next."""
        if not self._is_held(name):
            self(name)
        names = self._vectors.names
        place = names.index(name)
        for one in names[place : place + 1 + chunk_threads()]:
            if one not in self._found and one not in self._begun and self._is_held(one):
                begun = begin(self._of_held, one)
                if begun is None:
                    break
                self._begun[one] = begun

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": {}}  # what runs stays here

    def _is_held(self, name: str) -> bool:
        return self._vectors.shape(name).numel() <= _HELD

    def _of_held(self, name: str) -> tuple[Cut, ...]:
        size = self._vectors.shape(name)[1:].numel()
        return find_cuts_of_stack(name, self._vectors.reader(name)(0, size), self._kept(size))

    def _of_large(self, name: str) -> tuple[Cut, ...]:
        one = self._vectors.restrict([name])
        return find_global_cuts(one, self._kept(size_of(one)), _EQUAL)


def cuts_by_parameter(what: str, vectors: TaskVectors, kept: Callable[[int], int]) -> Statistic[CutsByParameter]:
    """For a plan, :class:`CutsByParameter` and how often they read every input."""
    return Statistic(what, _reads(vectors, sampled=True), partial(CutsByParameter, vectors, kept), at_most=True)


def sampled(vectors: TaskVectors) -> bool:
    """Whether there are so many elements that a sample of them pays."""
    return size_of(vectors) >= _FEWEST


def size_of(vectors: TaskVectors) -> int:
    """The number of elements of each vector."""
    return sum(vectors.shape(name)[1:].numel() for name in vectors)


def _brackets(vectors: TaskVectors, kept: int) -> list[tuple[float, float]]:
    """Two magnitudes per row between which the kept-th largest lies, all but certainly."""
    block = _block_size(size_of(vectors))
    stride = size_of(vectors) * block // _sample_size(size_of(vectors))
    generator = random.Random(0)  # a regular grid could meet the same columns of every matrix
    parts, before = [], 0
    wanted = generator.randrange(stride)
    for name in sorted(vectors):
        size = vectors.shape(name)[1:].numel()
        read = None
        while wanted < before + size:
            read = read or vectors.reader(name)
            start = min(wanted - before, max(size - block, 0))
            parts.append(read(start, min(start + block, size)).abs_().cpu())
            wanted = wanted // stride * stride + stride + generator.randrange(stride)
        before += size
    sample = torch.cat([part.to(common_dtype(vectors)) for part in parts], dim=1)
    return _brackets_of(sample, [part.shape[1] for part in parts], kept / before)


def _sample_size(size: int) -> int:
    return min(_SAMPLE, max(size >> 5, min(size >> 3, 1 << 15)))


def _block_size(size: int) -> int:
    """A hundred blocks at least, as neighbours are alike; not many more, as each is read by itself."""
    return max(min(_sample_size(size) >> 7, _CHUNK), _BLOCK)


def _sample_of_stack(flat: Tensor) -> tuple[Tensor, list[int]]:
    """Magnitudes of blocks at random places, ``(T, n)``, and the blocks' lengths."""
    size = flat.shape[1]
    block = _block_size(size)
    count = _sample_size(size) // block
    starts = torch.randint(size - block + 1, (count, 1), generator=torch.Generator().manual_seed(0))
    return flat[:, (starts + torch.arange(block)).flatten()].abs_(), [block] * count


def _brackets_of(sample: Tensor, lengths: Sequence[int], fraction: float) -> list[tuple[float, float]]:
    """From magnitudes of blocks ``(T, n)``, whose lengths add up to n, where the threshold of this fraction is.

    As wide as chance asks for among single elements and then some; wider where blocks differ by more than that, as rows
    of a matrix may.
    """
    found = []
    for values in sample.numpy():
        count = len(values)
        place = min(max(math.floor(count * (1 - fraction)), 0), count - 1)
        ordered = np.partition(values, place)
        above = np.add.reduceat(values > ordered[place], [0, *accumulate(lengths[:-1])], dtype=np.int64)
        by_block = math.sqrt(np.square(above - above.sum() / count * np.asarray(lengths)).sum())
        margin = max(9 * math.sqrt(count * fraction * (1 - fraction)), 6 * by_block) + 1
        low = max(math.floor(count * (1 - fraction) - margin), 0)
        high = min(math.ceil(count * (1 - fraction) + margin), count - 1)
        ordered.partition([low, high])
        found.append((float(ordered[low]), float(ordered[high])))
    return found


def _cuts_within(
    vectors: TaskVectors, kept: int, brackets: Sequence[tuple[float, float]], room: int = 0
) -> tuple[Cut, ...] | None:
    """As :func:`_cuts_between`, of all parameters together."""
    dtype = common_dtype(vectors)
    compared = vectors.over_chunks(partial(_compared, _limits(brackets, dtype), dtype), sorted(vectors), _LENGTH)

    def again(name: str, start: int, stop: int, row: int) -> Tensor:
        return next(vectors.rows(name, [row])(start, stop))

    return _cuts_between(brackets, compared, again, size_of(vectors), kept, dtype, room)


def _cuts_within_stack(name: str, flat: Tensor, kept: int) -> tuple[Cut, ...] | None:
    """As :func:`_cuts_between`, of a stack ``(T, n)`` in memory."""
    size = flat.shape[1]
    brackets = _brackets_of(*_sample_of_stack(flat), kept / size)
    compared = ordered_map(partial(_compared, _limits(brackets, flat.dtype), flat.dtype), walk_stack(name, flat))

    def again(name: str, start: int, stop: int, row: int) -> Tensor:
        return flat[row, start:stop]

    return _cuts_between(brackets, compared, again, size, kept, flat.dtype, _EQUAL)


def _cuts_between(
    brackets: Sequence[tuple[float, float]],
    compared: Iterator[_Compared],
    again: Callable[[str, int, int, int], Tensor],
    size: int,
    kept: int,
    dtype: torch.dtype,
    room: int,
) -> tuple[Cut, ...] | None:
    """The cuts, if every row's threshold is within its bracket; None if one is not, is 0, or is too wide.

    Magnitudes between the brackets are kept, and not where they are: differences of bfloat16 equal the threshold so
    often that this was most of it. The part with the last of those that are kept is read again instead.
    """
    if min(low for low, _ in brackets) == 0:
        return None
    most = max(_sample_size(size) + size // 32, min(size, room))
    magnitudes = _room(len(brackets), most, dtype)
    chunks: list[tuple[str, int, int]] = []
    ends: list[list[int]] = [[0] for _ in brackets]  # where each chunk's part ends
    above = [0] * len(brackets)
    for chunk, rows in compared:
        chunks.append(chunk)
        for row, (count, values) in enumerate(rows):
            above[row] += count
            begin, end = ends[row][-1], ends[row][-1] + len(values)
            if end > most:  # many equal magnitudes: memory has to stay bounded
                return None
            magnitudes[row, begin:end] = values
            ends[row].append(end)
    cuts = []
    for row, counted in enumerate(above):
        values, missing = magnitudes[row, : ends[row][-1]], kept - counted
        if not 1 <= missing <= len(values):
            return None
        ordered = _room(1, len(values), dtype)[0].copy_(values).numpy()
        ordered.partition(len(ordered) - missing)
        threshold = float(ordered[len(ordered) - missing])
        left = missing - count_nonzero(torch.hardshrink(values, threshold))
        equal = [int((values[begin:end] == threshold).sum()) for begin, end in pairwise(ends[row])]
        cuts.append(Cut(threshold))
        if left != sum(equal):
            before = list(accumulate(equal, initial=0))
            place = bisect_left(before, left) - 1  # the chunk of the last one that is kept
            name, start, stop = chunks[place]
            positions = (again(name, start, stop, row).abs() == threshold).nonzero().flatten()
            cuts[row] = Cut(threshold, name, start + int(positions[left - before[place] - 1]))
    return tuple(cuts)


def _limits(brackets: Sequence[tuple[float, float]], dtype: torch.dtype) -> list[tuple[float, float]]:
    """What is above the first number and not above the second is within a bracket."""
    return [(_limit(low, True, dtype), high) for low, high in brackets]


def _room(rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Memory that is there when it is written to, and goes back to the system at once, unlike that of chunks."""
    return torch.frombuffer(mmap.mmap(-1, rows * length * dtype.itemsize), dtype=dtype).view(rows, length)


_Compared: TypeAlias = tuple[tuple[str, int, int], list[tuple[int, Tensor]]]
"""Which chunk it is; of every row how many elements are above its bracket, and the magnitudes within it, in order."""


def _compared(
    limits: Sequence[tuple[float, float]], dtype: torch.dtype, name: str, start: int, chunk: Tensor
) -> _Compared:
    rows = []
    for row, (low, high) in zip(chunk, limits, strict=True):
        magnitudes = row.to(dtype).abs()
        if magnitudes.device.type == "cpu":  # NumPy compares several times as fast there
            values = magnitudes.numpy()
            above = values > high
            between = torch.from_numpy(values[(values > low) ^ above])
            rows.append((int(np.count_nonzero(above)), between))
        else:
            top = magnitudes > high
            rows.append((int(top.sum()), magnitudes[(magnitudes > low) ^ top]))
    return (name, start, start + chunk.shape[1]), rows


def _digit(counts: Tensor, kept: int) -> tuple[int, int, int]:
    """The digit of the kept-th largest, how many have a larger one, and how many have just this one."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, kept))
    digit = len(counts) - 1 - place
    count = int(counts[digit])
    return digit, int(from_above[place]) - count, count


def _placed(
    cuts: list[Cut | None], walk: Walk, thresholds: Sequence[float], missing: Sequence[int], dtype: torch.dtype
) -> tuple[Cut, ...]:
    """The cuts, with those that are None replaced by one with the place up to which equal elements are kept."""
    left = list(missing)
    for name, start, chunk in walk() if None in cuts else ():
        for row, threshold in enumerate(thresholds):
            if cuts[row] is None:
                positions = (chunk[row].to(dtype).abs() == threshold).nonzero().flatten()
                if len(positions) >= left[row]:
                    cuts[row] = Cut(threshold, name, start + int(positions[left[row] - 1]))
                left[row] -= len(positions)
        if None not in cuts:
            break
    return tuple(cut for cut in cuts if cut is not None)
