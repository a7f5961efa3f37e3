"""Tensors as PyTorch's files describe them: which elements of which storage, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lit_merge.checkpoints.pickles.machine import Malformed, Named
from lit_merge.files.file_parts import printable

__all__ = ["Storage", "StoredTensor", "Unsupported", "rebuild_tensor", "storage_of"]

_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_STORAGE_MODULES = frozenset({"torch", "torch.cuda", "torch.storage"})
_DTYPES = {
    f"torch.{name}": dtype
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("uint64", "uint32", "uint16", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if (dtype := getattr(torch, name, None)) is not None
}
_SMALL = 1 << 20  # bytes up to which a tensor may have more entries than its storage, as an expanded one has
_MOST_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Storage:
    """Consecutive elements in a file.

    Attributes:
        key: how the file calls them.
        dtype: of the elements.
        count: how many there are.
        first: the first one that belongs to this view of the storage.
    """

    key: str
    dtype: torch.dtype
    count: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a storage.

    Attributes:
        storage: where its elements are.
        dtype: of its elements.
        offset: bytes of the storage before its first element.
        shape: its shape.
        stride: elements of the storage from one index to the next, for each dimension.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the elements are contiguous."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return self.shape.numel() == 0
            expected *= size
        return True

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one that is used."""
        if not self.shape.numel():
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor that is no dense one; it matters only if it is asked for."""

    kind: str


def storage_of(identifier: Any) -> Any:
    """What a persistent identifier stands for: a :class:`Storage`, or the class in front of its source code.

    Raises:
        Malformed: it is no identifier of PyTorch's.
    """
    if type(identifier) is tuple and len(identifier) == 4 and identifier[0] == "module":
        return identifier[1]  # older files carry the source code of modules' classes; it is not looked at
    if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise Malformed("an identifier of something else than a storage. Copy or write it again.")
    _, kind, key, _, count, *view = identifier
    named = type(kind) is Named and kind.module in _STORAGE_MODULES and kind.name in _TYPES
    if not named or type(key) is not str or not _counts(count):
        got = printable(kind.dotted) if type(kind) is Named else "something else"
        raise Malformed(f"a storage of unknown kind ({got}). Convert the tensors, or ask for a safetensors file.")
    dtype = _TYPES[kind.name]
    if not view or view[0] is None:
        return Storage(key, dtype, count)
    _, first, length = view[0]
    if not _counts(first, length) or first + length > count:
        raise Malformed("a view outside its storage. Copy or write it again.")
    return Storage(key, dtype, count, first)


def rebuild_tensor(function: Named, arguments: tuple[Any, ...]) -> Any:
    """The tensor that a call would build; ``NotImplemented`` if it would build no tensor.

    Raises:
        Malformed: the tensor is not inside its storage, or is much larger than it.
    """
    name = function.dotted
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
        function, _, arguments, _ = arguments
        if type(function) is not Named or type(arguments) is not tuple:
            raise TypeError("tensor")
        name = function.dotted
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0] if type(arguments[0]) in (StoredTensor, Unsupported) else Unsupported("parameter")
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        storage, offset, shape, stride = arguments[:4]
        metadata = arguments[6] if len(arguments) > 6 else None
        return _tensor(storage, storage.dtype, offset, shape, stride, metadata)
    if name == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, stride, _, _, kind, *metadata = arguments
        dtype = _DTYPES.get(kind.dotted)
        if dtype is None:
            return Unsupported(printable(kind.dotted))
        return _tensor(storage, dtype, offset, shape, stride, metadata[0] if metadata else None)
    if name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
        return Unsupported(printable(function.name.removeprefix("_rebuild_").replace("_", " ")))
    return NotImplemented


def _tensor(storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any, metadata: Any) -> Any:
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise TypeError("tensor")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS or not _counts(offset, *shape, *stride):
        raise ValueError("tensor")
    if metadata:  # conjugated or negated: its bytes are not its values
        return Unsupported("conjugated or negated tensor")
    size, length = dtype.itemsize, storage.count * storage.dtype.itemsize
    begin, entries = (storage.first + offset) * size, math.prod(shape)
    last = sum((count - 1) * step for count, step in zip(shape, stride, strict=True)) if entries else -1
    if begin + (last + 1) * size > length or (entries and entries * size > max(length, _SMALL)):
        raise Malformed(
            f"a tensor of shape {printable(shape)} that is not inside its storage of {length:,} bytes. "
            "Copy or write it again."
        )
    return StoredTensor(storage, dtype, begin, torch.Size(shape), stride)


def _counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)
