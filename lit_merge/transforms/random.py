"""Random numbers that belong to an element of a task vector, not to the order in which elements are visited."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from lit_merge.vectors import TaskVectors

__all__ = ["Uniform", "labels_of"]


Label = tuple[str, int]

_MIXING = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None))  # lowbias32: a shift, then a factor
_BLOCK = 1 << 16  # elements, which stay in the processor's cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as an element


def labels_of(vectors: TaskVectors) -> tuple[Label, ...]:
    """One label per row: the task's name, and how many rows before it have the same name."""
    seen: Counter[str] = Counter()
    labels = []
    for task in vectors.tasks:
        labels.append((task, seen[task]))
        seen[task] += 1
    return tuple(labels)


class Uniform:
    """A number in [0, 1) with 24 random bits for every (seed, row label, parameter name, position).

    A hash of the position in 32-bit integer arithmetic (the mixing function "lowbias32" of Wellons' hash prospector,
    after a multiplication and an addition with numbers from SHA-256 of the rest), the same on every device.

    Args:
        seed: a whole number.
        labels: one per row.
    """

    def __init__(self, seed: int, labels: tuple[Label, ...]) -> None:
        self.seed, self.labels = seed, labels

    def values(self, row: int, name: str, vector: Tensor) -> Tensor:
        """The numbers of one row of a whole parameter, ``(n,)``, in float32."""
        positions = _positions(0, vector)
        bits = self._bits(self.labels[row], name, positions, torch.empty_like(positions), torch.empty_like(positions))
        return ((bits >> 8) & 0xFFFFFF).float().mul_(2.0**-24)

    def drop(self, p: float, row: int, name: str, start: int, values: Tensor) -> None:
        """Set elements ``(n,)`` of a row that begin at a position to zero with probability p, to 32 bits, in place."""
        limit = round(p * 2**32) - 2**31  # the bits are signed
        if limit == -(2**31):
            return
        label = self.labels[row]
        if values.device.type == "cpu" and values.is_contiguous():
            _drop_in_cache(limit, *self._line(label, name), start, values)
        else:
            positions = _positions(start, values)
            bits, shifted = torch.empty_like(positions), torch.empty_like(positions)
            _zero_below(limit, self._bits(label, name, positions, bits, shifted), values)

    def _line(self, label: Label, name: str) -> tuple[int, int]:
        """What the positions of a row are multiplied by, and what is added."""
        digest = hashlib.sha256(json.dumps([self.seed, *label, name]).encode()).digest()
        factor, offset = (int.from_bytes(part, "little", signed=True) for part in (digest[:4], digest[4:8]))
        return factor | 1, offset

    def _bits(self, label: Label, name: str, positions: Tensor, bits: Tensor, shifted: Tensor) -> Tensor:
        """Written into ``bits``; ``shifted`` is to work in."""
        factor, offset = self._line(label, name)
        return _mix(torch.mul(positions, factor, out=bits).add_(offset), shifted)


def _positions(start: int, row: Tensor) -> Tensor:
    return torch.arange(start, start + len(row), device=row.device).to(torch.int32)  # wraps at 2^32


def _drop_in_cache(limit: int, factor: int, offset: int, start: int, row: Tensor) -> None:
    """As :func:`_zero_below` of :func:`_mix`, with NumPy, which has unsigned integers and cheaper calls."""
    whole = row.detach().view(_INTEGERS[row.element_size()]).numpy()
    positions = np.multiply(np.arange(min(_BLOCK, len(whole)), dtype=np.uint32), np.uint32(factor & 0xFFFFFFFF))
    bits, shifted = np.empty_like(positions), np.empty_like(positions)
    for begin in range(0, len(whole), _BLOCK):
        part = whole[begin : begin + _BLOCK]
        mixed, work = bits[: len(part)], shifted[: len(part)]
        np.add(positions[: len(part)], np.uint32((factor * (start + begin) + offset) & 0xFFFFFFFF), out=mixed)
        for shift, mixing in _MIXING:
            np.right_shift(mixed, np.uint32(shift), out=work)
            np.bitwise_xor(mixed, work, out=mixed)
            if mixing is not None:
                np.multiply(mixed, np.uint32(mixing), out=mixed)
        np.multiply(part, mixed.view(np.int32) >= limit, out=part)  # of integers: what is kept has all its bits


def _zero_below(limit: int, bits: Tensor, row: Tensor) -> None:
    """Zero where ``bits < limit``; in integers where possible, as operators on masks take several times as long."""
    if limit >= 2**31:
        row.zero_()
    elif row.dtype == torch.float32 and row.is_contiguous():
        kept = bits.clamp_(limit - 1, limit).neg_().add_(limit - 1)  # 0 or −1, which has every bit
        row.view(torch.int32).bitwise_and_(kept)
    else:
        row.masked_fill_(bits < limit, 0)


def _mix(bits: Tensor, shifted: Tensor) -> Tensor:
    """lowbias32, in place; ``>>`` keeps the sign, so that what it brings in from above is masked out."""
    for shift, factor in _MIXING:
        torch.bitwise_right_shift(bits, shift, out=shifted).bitwise_and_((1 << (32 - shift)) - 1)
        bits.bitwise_xor_(shifted)
        if factor is not None:
            bits.mul_(factor - (1 << 32) if factor >> 31 else factor)
    return bits
