"""The header of a safetensors file, believed only after it has been checked against the format and the file.

A header is eight bytes with its length, and JSON: name -> dtype, shape and the two offsets of its bytes, relative to
the header's end (https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from lit_merge.errors import FileFormatError
from lit_merge.files.file_parts import COPY_AGAIN, Parts, check_no_pointer, printable
from lit_merge.files.text import unique_items

__all__ = ["DTYPES", "LONGEST_HEADER", "TensorHeader", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read and written, by their names in the format."""

LONGEST_HEADER = 16 << 20
"""Bytes of a header, at most: room for 100,000 tensors. The format allows 100 MB, which could take 2 GB to parse."""

_MOST_BRACKETS = 1_000_000  # three for each tensor, and those in names and metadata
_MOST_DIMENSIONS = 64
_OF_TEXT = frozenset(b"\t\n\r") | frozenset(range(0x20, 0x7F))  # bytes of ASCII


@dataclass(frozen=True)
class TensorHeader:
    """What a header says.

    Attributes:
        entries: name -> dtype and shape, in the file's order.
        starts: name -> first byte in the file.
        metadata: the header's strings.
    """

    entries: dict[str, tuple[torch.dtype, torch.Size]]
    starts: dict[str, int]
    metadata: dict[str, str]


def read_header(parts: Parts) -> TensorHeader:
    """Read the header of a safetensors file.

    Raises:
        FileFormatError: the file is truncated, text, or no safetensors file; a name is there twice or is not
            printable; an entry's dtype is not among ``DTYPES``, its shape and its offsets disagree; tensors overlap,
            leave bytes between them or do not end with the file; or the header is longer than 16 MiB.
    """
    check_no_pointer(parts, "a safetensors file")
    first = parts.bytes(0, 8) if parts.size >= 8 else b""
    length = int.from_bytes(first, "little")
    if first and all(byte in _OF_TEXT for byte in first):  # such a length would be petabytes at least
        raise FileFormatError(f"{parts.path}: expected a safetensors file, got text. Check the path.")
    if parts.size < 8 or length > min(parts.size - 8, LONGEST_HEADER):
        raise FileFormatError(
            f"{parts.path}: expected a safetensors file with its header inside, of at most {LONGEST_HEADER:,} bytes, "
            f"got a header of {length:,} bytes in a file of {parts.size:,} bytes (truncated, or another format). "
            f"{COPY_AGAIN}"
        )
    try:
        content = _parse(parts.bytes(8, length))
        metadata = content.pop("__metadata__", {})
        if not all(type(value) is str for value in metadata.values()):
            raise ValueError("metadata")
        offsets = {name: _offsets(entry["data_offsets"]) for name, entry in content.items()}
        shapes = {name: _shape(entry["shape"]) for name, entry in content.items()}
        kinds = {name: str(entry["dtype"]) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{parts.path}: expected a safetensors header, got something else. {COPY_AGAIN}"
        ) from error
    begin = 8 + length
    expected = begin + max((stop for _, stop in offsets.values()), default=0)
    if expected != parts.size:
        raise FileFormatError(
            f"{parts.path}: expected {expected:,} bytes according to the header, got {parts.size:,}. {COPY_AGAIN}"
        )
    _check_order(parts, offsets)
    entries = {name: (_dtype(parts, name, kinds[name]), shape) for name, shape in shapes.items()}
    for name, (dtype, shape) in entries.items():
        start, stop = offsets[name]
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise FileFormatError(
                f"{parts.path}: expected {math.prod(shape) * dtype.itemsize:,} bytes for {printable(name)}, "
                f"{kinds[name]} {printable(list(shape))}, got {stop - start:,}. {COPY_AGAIN}"
            )
    return TensorHeader(
        {name: (dtype, torch.Size(shape)) for name, (dtype, shape) in entries.items()},
        {name: begin + start for name, (start, _) in offsets.items()},
        metadata,
    )


def _parse(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{" or raw.count(b"{") + raw.count(b"[") > _MOST_BRACKETS:
        raise ValueError("no header")
    content = json.loads(raw.decode(), object_pairs_hook=unique_items, parse_constant=_refuse, parse_float=_refuse)
    if type(content) is not dict or not all(name.isprintable() for name in content):
        raise ValueError("names")
    return content


def _refuse(number: str) -> None:
    raise ValueError("no number of a header")


def _offsets(value: Any) -> tuple[int, int]:
    start, stop = value
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise ValueError("offsets")
    return start, stop


def _shape(value: Any) -> tuple[int, ...]:
    counts = type(value) is list and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
    if not counts or len(value) > _MOST_DIMENSIONS:
        raise ValueError("shape")
    return tuple(value)


def _check_order(parts: Parts, offsets: dict[str, tuple[int, int]]) -> None:
    """Every byte of the data belongs to one tensor."""
    end = 0
    for name, (start, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        if start != end:
            raise FileFormatError(
                f"{parts.path}: expected {printable(name)} from byte {end:,} of the data on, got {start:,} "
                f"({'overlapping' if start < end else 'a hole'}). {COPY_AGAIN}"
            )
        end = stop


def _dtype(parts: Parts, name: str, kind: str) -> torch.dtype:
    if kind not in DTYPES:
        raise FileFormatError(
            f"{parts.path}: expected one of the dtypes {', '.join(DTYPES)}, got {printable(kind)} for "
            f"{printable(name)}. Convert that tensor first."
        )
    return DTYPES[kind]
