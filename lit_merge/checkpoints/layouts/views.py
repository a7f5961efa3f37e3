"""Tensors made of other tensors' entries: renamed, put one after the other, cut out, transposed; only when asked for.

Every conversion between layouts of names is one of these, so that it is exact in both directions and reads no more
than what is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.files.lazy import Computed, LazyMapping, Slicer

__all__ = ["Part", "Piece", "Rearranged", "as_lazy"]


@dataclass(frozen=True)
class Piece:
    """Entries ``start`` to ``stop`` of one flattened tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One tensor made of pieces.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        pieces: its flattened entries, one piece after the other; none: it is zero.
        transposed: the one piece is a whole matrix, and this is its transpose.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    transposed: bool = False


class Rearranged(LazyMapping):
    """Tensors made of another mapping's entries.

    Args:
        tensors: the other mapping.
        parts: name here -> what it is made of.
    """

    def __init__(self, tensors: LazyMapping, parts: Mapping[str, Part]) -> None:
        self._tensors, self._parts = tensors, dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        if part.transposed:
            return self._tensors[part.pieces[0].name].t().contiguous()
        if not part.pieces:
            return torch.zeros(part.shape, dtype=part.dtype)
        flat = []
        for piece in part.pieces:
            tensor = self._tensors[piece.name]
            if len(part.pieces) == 1 and tensor.numel() == piece.stop - piece.start:
                return tensor.reshape(part.shape)
            flat.append(tensor.reshape(-1)[piece.start : piece.stop])
        return torch.cat(flat).view(part.shape)  # a copy: a view would keep all of a packed tensor in memory

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self._parts[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""
        return self._parts[name].dtype

    def slicer(self, name: str) -> Slicer:
        """Reads the pieces that the entries asked for lie in, and of these the entries alone.

        A transposed matrix is read as a whole, once.
        """
        part = self._parts[name]
        if part.transposed:
            return super().slicer(name)
        return _Slices(self._tensors, part.pieces)


class _Slices:
    """Reads parts of a tensor that is made of pieces."""

    def __init__(self, tensors: LazyMapping, pieces: tuple[Piece, ...]) -> None:
        self._pieces = [(piece, tensors.slicer(piece.name)) for piece in pieces]

    def __call__(self, start: int, stop: int, out: Tensor) -> None:
        if not self._pieces:
            out.zero_()
        begin = 0  # of the piece, among the entries of the whole
        for piece, read in self._pieces:
            end = begin + piece.stop - piece.start
            first, last = max(start, begin), min(stop, end)
            if first < last:
                shift = piece.start - begin
                read(first + shift, last + shift, out[first - start : last - start])
            begin = end


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyMapping:
    """The mapping itself if it is lazy, otherwise a lazy one of the same tensors."""
    if isinstance(tensors, LazyMapping):
        return tensors
    return Computed({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, tensors.__getitem__)
