"""Say what a file of vectors, weights or coefficients holds.

Examples:
  lit-merge inspect runs/digits/task_vector.safetensors
  lit-merge inspect merged.safetensors --verify true
  lit-merge inspect checkpoint.pt --as_json true
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.files.content_digest import CONTENT_KEYS
from lit_merge.files.lazy import LazyMapping
from lit_merge.naming import Depth
from lit_merge.vectors.coefficient_files import FORMAT as COEFFICIENTS
from lit_merge.vectors.coefficients import Coefficients
from lit_merge.vectors.task_vector import FORMAT as TASK_VECTOR

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["BlockSummary", "Inspection", "inspect", "summarise_blocks"]

POSITIONAL = ("path",)

_BEFORE, _AFTER = "before the blocks", "after the blocks"
_NARROWEST = 72
_PART = 1 << 20  # elements that are in memory at a time: a tensor of a file is mapped
_SHOWN = 240  # characters of a header entry in the table


@dataclass(frozen=True)
class BlockSummary:
    """The tensors of one block, or of what is before or after the blocks.

    Attributes:
        block: ``"0"``, ``"1"`` …, or where it is.
        tensors: how many.
        entries: of all of them.
        floating: how many of these are floating-point numbers, which the following are about.
        norm: ‖·‖₂, accumulated in float64.
        largest: the largest magnitude.
        zeros: how many are exactly zero.
        not_finite: how many are NaN or infinite; norm and largest leave them out.
    """

    block: str
    tensors: int
    entries: int
    floating: int
    norm: float
    largest: float
    zeros: int
    not_finite: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return self.zeros / self.floating if self.floating else 0.0


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        path: as it was given.
        kind: ``task vector``, ``coefficients``, or how the file of weights was recognised.
        header: the entries of its header; JSON in them is read.
        dtypes: dtype -> number of entries.
        blocks: from the input to the output; empty for coefficients.
        coefficients: task -> mean, least and largest coefficient, and the shares of zeros and of ones; empty for
            anything else.
        warnings: what is known to be dangerous about a merge, or about merging a vector, in words with numbers.
    """

    path: str
    kind: str
    header: dict[str, Any]
    dtypes: dict[str, int]
    blocks: list[BlockSummary]
    coefficients: dict[str, dict[str, float]]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def whole(self) -> BlockSummary:
        """All blocks together."""
        counts = {
            key: sum(getattr(one, key) for one in self.blocks)
            for key in ("tensors", "entries", "floating", "zeros", "not_finite")
        }
        norm = math.sqrt(sum(one.norm**2 for one in self.blocks))
        return BlockSummary("all", norm=norm, largest=max((one.largest for one in self.blocks), default=0.0), **counts)


def inspect(path: str, as_json: bool = False, verify: bool = False) -> Inspection:
    """Print what a task vector, merged weights, a checkpoint or coefficients hold; everything is read once.

    Args:
        path: the file, or the folder or index of a sharded model.
        as_json: print JSON rather than tables.
        verify: also compare the content with the digest in the header.

    Returns:
        What was printed.

    Raises:
        FileFormatError: the file is missing, damaged or of an unknown kind; with ``verify``, its content differs.
    """
    found = _inspected(path, verify)
    if as_json:
        sys.stdout.write(json.dumps(_finite(found.to_dict()), indent=2, ensure_ascii=False) + "\n")
        return found
    from rich.console import Console

    console = Console()
    console.width = max(console.width, _NARROWEST)  # a narrower terminal wraps lines, but no number is cut
    for part in _tables(found):
        console.print(part)
    return found


def summarise_blocks(tensors: LazyMapping) -> list[BlockSummary]:
    """Norm, largest magnitude and zeros of every block, each tensor read once and in chunks.

    Args:
        tensors: name -> tensor, lazy. Entries that are no floating-point numbers are counted, nothing more.

    Returns:
        One summary per block in order, those outside the blocks first and last.
    """
    depth = Depth(tensors)
    labels = {-1: _BEFORE, depth.blocks: _AFTER}
    found: dict[int, BlockSummary] = {}
    for name in tensors:
        position = depth.position(name)
        one = found.get(position) or BlockSummary(labels.get(position, str(position)), 0, 0, 0, 0.0, 0.0, 0, 0)
        found[position] = replace(one, tensors=one.tensors + 1, entries=one.entries + tensors.shape(name).numel())
    for name, chunk in tensors.stream([name for name in tensors if tensors.dtype(name).is_floating_point]):
        for part in chunk.split(_PART):
            found[depth.position(name)] = _with_chunk(found[depth.position(name)], part)
    return [found[position] for position in sorted(found)]


def _with_chunk(one: BlockSummary, chunk: Tensor) -> BlockSummary:
    values = chunk if chunk.dtype == torch.float64 else chunk.float()
    values = values[torch.isfinite(values)]
    count = values.numel()
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return replace(
        one,
        floating=one.floating + chunk.numel(),
        norm=math.hypot(one.norm, norm),
        largest=max(one.largest, float(values.abs().max()) if count else 0.0),
        zeros=one.zeros + count - int(torch.count_nonzero(values)),
        not_finite=one.not_finite + chunk.numel() - count,
    )


def _inspected(path: str | os.PathLike[str], verify: bool) -> Inspection:
    from lit_merge.checkpoints.opening import open_checkpoint
    from lit_merge.files.hub import local_path

    file = local_path(path)
    if file.suffix == ".json" and _says_coefficients(file):
        return _of_coefficients(str(path), file)
    tensors = open_checkpoint(file)
    header = dict(tensors.metadata)
    if digest := tensors.content_digest:
        header[tensors.content_key] = digest
    if header.get("format") == COEFFICIENTS:
        return _of_coefficients(str(path), file)
    if verify:
        tensors.verify()
    vector = header.get("format") == TASK_VECTOR
    dtypes: dict[str, int] = {}
    for name in tensors:
        key = str(tensors.dtype(name)).removeprefix("torch.")
        dtypes[key] = dtypes.get(key, 0) + tensors.shape(name).numel()
    kind = f"task vector ({tensors.container})" if vector else tensors.describe()
    blocks = summarise_blocks(tensors)
    return Inspection(str(path), kind, _read(header), dtypes, blocks, {}, _warnings(header, file.name))


def _warnings(header: Mapping[str, str], name: str) -> list[str]:
    found: list[str] = []
    if {"label_smoothing", "confidence"} & header.keys():
        from lit_merge.models.merging.cautions import training_cautions

        found += training_cautions(header, header.get("task") or name)
    if {"warnings", "rounding"} & header.keys():
        from lit_merge.models.merging.rounding_loss import written_cautions

        found += written_cautions(header, name)
    return found


def _says_coefficients(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return COEFFICIENTS in file.read(4096)
    except (OSError, ValueError):
        return False


def _of_coefficients(given: str, path: Path) -> Inspection:
    loaded = Coefficients.load(path)
    rows = {
        task: {
            "mean": float(row.mean()),
            "least": float(row.min()),
            "largest": float(row.max()),
            "zeros": float((row == 0).double().mean()),
            "ones": float((row == 1).double().mean()),
        }
        for task, row in zip(loaded.tasks, loaded.values, strict=True)
    }
    header = {"granularity": loaded.granularity, "groups": len(loaded.groups), "parameters": len(loaded.members)}
    return Inspection(
        given, "coefficients", {**header, **_read(loaded.metadata)}, {"float64": loaded.values.numel()}, [], rows
    )


def _read(header: Mapping[str, str]) -> dict[str, Any]:
    """The header, with JSON objects and lists in it as such."""
    found: dict[str, Any] = {}
    for key, value in header.items():
        try:
            content = json.loads(value) if value[:1] in ("{", "[") else value
        except (ValueError, RecursionError):
            content = value
        found[key] = content
    return found


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tables(found: Inspection) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    entries = {"file": found.path, "kind": found.kind}
    entries |= {"entries": ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items())}
    for key, value in {**entries, **found.header}.items():
        if key == "warnings":  # below, whole
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= _SHOWN or key in CONTENT_KEYS else f"{text[:_SHOWN]}… ({len(text):,} characters)"
        head.add_row(Text(key, style="dim"), Text(text, overflow="fold"))
    parts: list[RenderableType] = [head]
    parts += [Text(f"warning: {line}", style="bold") for line in found.warnings]
    if found.blocks:
        odd = ["not finite"] if found.whole.not_finite else []
        table = _table("block", "tensors", "entries", "norm", "largest", "zeros (%)", *odd)
        for one in [*found.blocks, found.whole]:
            if one.block == "all":
                table.add_section()
            cells = [f"{one.tensors}", f"{one.entries:,}", f"{one.norm:.6g}", f"{one.largest:.4g}"]
            cells += [f"{100 * one.sparsity:.2f}", *([f"{one.not_finite or ''}"] if odd else [])]
            table.add_row(one.block.removesuffix(" the blocks"), *cells)
        parts.append(table)
    if found.coefficients:
        table = _table("task", "mean", "least", "largest", "zeros (%)", "ones (%)")
        for task, row in found.coefficients.items():
            shares = [f"{100 * row[key]:.1f}" for key in ("zeros", "ones")]
            table.add_row(Text(task), *(f"{row[key]:.4f}" for key in ("mean", "least", "largest")), *shares)
        parts.append(table)
    return parts


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
