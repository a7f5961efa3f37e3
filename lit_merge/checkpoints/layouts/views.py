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

__all__ = ["Part", "Rearranged", "Span", "as_lazy"]


@dataclass(frozen=True)
class Span:
    """Entries ``start`` to ``stop`` of one flattened tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One tensor made of spans.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        spans: its flattened elements, one span after the other; none: it is zero.
        transposed: the one span is a whole matrix, and this is its transpose.
    """

    shape: torch.Size
    dtype: torch.dtype
    spans: tuple[Span, ...]
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
            return self._tensors[part.spans[0].name].t().contiguous()
        if not part.spans:
            return torch.zeros(part.shape, dtype=part.dtype)
        flat = []
        for span in part.spans:
            tensor = self._tensors[span.name]
            if len(part.spans) == 1 and tensor.numel() == span.stop - span.start:
                return tensor.reshape(part.shape)
            flat.append(tensor.reshape(-1)[span.start : span.stop])
        return torch.cat(flat).view(part.shape)  # a copy: a view would hold all of a packed tensor in memory

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
        """Reads the spans that the elements asked for are in, and of these the elements alone.

        A transposed matrix is read as a whole, once.
        """
        part = self._parts[name]
        if part.transposed:
            return super().slicer(name)
        return _Slices(self._tensors, part.spans)


class _Slices:
    """Reads parts of a tensor that is made of spans."""

    def __init__(self, tensors: LazyMapping, spans: tuple[Span, ...]) -> None:
        self._spans = [(span, tensors.slicer(span.name)) for span in spans]

    def __call__(self, start: int, stop: int, out: Tensor) -> None:
        if not self._spans:
            out.zero_()
        begin = 0  # of the span, among the elements of the whole
        for span, read in self._spans:
            end = begin + span.stop - span.start
            first, last = max(start, begin), min(stop, end)
            if first < last:
                shift = span.start - begin
                read(first + shift, last + shift, out[first - start : last - start])
            begin = end


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyMapping:
    """The mapping itself if it is lazy, otherwise a lazy one of the same tensors."""
    if isinstance(tensors, LazyMapping):
        return tensors
    return Computed({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, tensors.__getitem__)
