"""Tensors that are one tensor under several names: an embedding that is the head as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pickles.torch_files import TorchFile
from lit_merge.files.lazy import LazyMapping
from lit_merge.naming import is_vocabulary
from lit_merge.params import dtype_of, shape_of

__all__ = ["differing", "equal_tensors", "tied_names"]

_ELEMENTS = 1 << 20  # compared at a time


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that are other names' tensors again: of shared storage, or equal copies of a vocabulary's table.

    Args:
        tensors: a state dict, or a checkpoint; what libraries store twice (``lm_head.weight`` beside
            ``embed_tokens.weight``) is read and compared, nothing else.

    Returns:
        Name -> the first name with the same tensor; empty if every tensor has one name.

    Examples:
        >>> table = torch.ones(4, 2)
        >>> tied_names({"wte.weight": table, "lm_head.weight": table, "ln.weight": torch.ones(2)})
        {'lm_head.weight': 'wte.weight'}
    """
    found: dict[str, str] = {}
    first: dict[object, str] = {}
    for name in tensors:
        storage = _storage(tensors, name)
        if storage is not None:
            found.update({name: first[storage]} if storage in first else {})
            first.setdefault(storage, name)
    tables = [name for name in tensors if name not in found and _is_table(tensors, name)]
    for one, other in combinations(tables, 2):
        same = shape_of(tensors, one) == shape_of(tensors, other) and dtype_of(tensors, one) == dtype_of(tensors, other)
        if same and other not in found and equal_tensors(tensors, one, tensors, other):
            found[other] = found.get(one, one)
    return found


def equal_tensors(first: Mapping[str, Tensor], one: str, second: Mapping[str, Tensor], other: str) -> bool:
    """Whether two tensors have the same shape and values; read in chunks, up to the first that differ."""
    first, second = as_lazy(first), as_lazy(second)
    if first.shape(one) != second.shape(other):
        return False
    return all(torch.equal(*chunks) for chunks in _chunks(first, one, second, other))


def differing(first: LazyMapping, second: LazyMapping) -> list[str]:
    """Names that both have, and whose shapes or values differ; both are read in chunks."""
    return [name for name in first if name in second and not equal_tensors(first, name, second, name)]


def _chunks(first: LazyMapping, one: str, second: LazyMapping, other: str) -> Iterator[list[Tensor]]:
    count, dtype = first.shape(one).numel(), torch.promote_types(first.dtype(one), second.dtype(other))
    readers = first.slicer(one), second.slicer(other)
    for start in range(0, count, _ELEMENTS):
        stop = min(start + _ELEMENTS, count)
        chunks = [torch.empty(stop - start, dtype=dtype) for _ in readers]
        for read, chunk in zip(readers, chunks, strict=True):
            read(start, stop, chunk)
        yield chunks


def _is_table(tensors: Mapping[str, Tensor], name: str) -> bool:
    return is_vocabulary(name) and len(shape_of(tensors, name)) == 2


def _storage(tensors: Mapping[str, Tensor], name: str) -> object:
    """What two names of one tensor have in common; None if that cannot be told without reading."""
    inner = getattr(tensors, "tensors", tensors)
    if isinstance(inner, TorchFile):
        return inner.storage(name)
    if isinstance(inner, LazyMapping):
        return None
    value = inner[name]
    if not isinstance(value, Tensor) or value.is_meta or not value.numel():
        return None
    return value.data_ptr(), value.dtype, value.shape, value.stride()
