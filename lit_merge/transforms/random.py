"""Random numbers that belong to an entry of a task vector, not to the order in which entries are visited."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import torch
from torch import Tensor

from lit_merge.vectors import TaskVectors

__all__ = ["Uniform", "labels_of"]


Label = tuple[str, int]


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
        bits = self._bits(self.labels[row : row + 1], name, 0, vector.unsqueeze(0))[0]
        return ((bits >> 8) & 0xFFFFFF).float().mul_(2.0**-24)

    def less_than(self, p: float, name: str, start: int, piece: Tensor) -> Tensor:
        """A mask of the piece's shape that is true with probability p, to 32 bits."""
        limit = round(p * 2**32) - 2**31  # the bits are signed
        bits = self._bits(self.labels, name, start, piece)
        return bits < limit if limit < 2**31 else torch.ones_like(bits, dtype=torch.bool)

    def _bits(self, labels: tuple[Label, ...], name: str, start: int, piece: Tensor) -> Tensor:
        positions = torch.arange(start, start + piece.shape[1], device=piece.device).to(torch.int32)  # wraps at 2^32
        bits = torch.empty(piece.shape, dtype=torch.int32, device=piece.device)
        for row, label in enumerate(labels):
            digest = hashlib.sha256(json.dumps([self.seed, *label, name]).encode()).digest()
            factor, offset = (int.from_bytes(part, "little", signed=True) for part in (digest[:4], digest[4:8]))
            torch.mul(positions, factor | 1, out=bits[row]).add_(offset)
        return _mix(bits)


def _mix(bits: Tensor) -> Tensor:
    """lowbias32, in place; ``>>`` keeps the sign, so that what it brings in from above is masked out."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - (1 << 32)
    bits ^= (bits >> 16) & 0xFFFF
    return bits
