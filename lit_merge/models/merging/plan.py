"""What a merge is going to do, before any tensor is read: ``lit-merge merge --dry_run true`` prints it."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.shards import bytes_of
from lit_merge.models.merging.inputs import Input
from lit_merge.models.merging.output import Output
from lit_merge.models.network import Base
from lit_merge.transforms import Chain, Transform, WithOverrides
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.threads import chunk_threads

__all__ = ["MergePlan", "check_space", "plan_merge"]

_WAITING = 48 << 20  # chunks that wait to be written, and what is read ahead
_CHUNKS = 32 << 20  # of one thread: those of a few stacks, and what is computed from them
_STACKS = 6  # a stack, and what the singular value decompositions of its matrices keep beside it


@dataclass(frozen=True)
class MergePlan:
    """A merge in numbers; printed, it is a table.

    Attributes:
        inputs: per input its task, path, kind, dtypes and bytes.
        base: name and dtypes of the base model.
        steps: the transforms in order.
        statistics: what has to be known beforehand, and how often finding it out reads every input; at most, if so.
        walks: how often writing reads every input.
        by_chunks: whether stacks are computed chunk by chunk instead of as a whole.
        largest_stack: bytes of the largest parameter of all inputs together.
        matrices: shape of the one that takes the most operations, operations of all of them, and about how many
            seconds those take; None without any.
        memory: bytes of memory that are needed beside the program itself, about.
        device: where stacks are computed.
        read: bytes that are read in all, at most.
        files: what is written, with bytes of tensors.
        notes: differences between the base and the inputs, and what is done about them.
        warnings: what is legal in it and dangerous, with numbers.
    """

    inputs: tuple[tuple[str, str, str, str, int], ...]
    base: tuple[str, str]
    steps: tuple[str, ...]
    statistics: tuple[tuple[str, int, bool], ...]
    walks: int
    by_chunks: bool
    largest_stack: int
    matrices: tuple[tuple[int, ...], float, float] | None
    memory: int
    device: str
    read: int
    files: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """How often every input is read, at most."""
        return self.walks + sum(reads for _, reads, _ in self.statistics)

    @property
    def written(self) -> int:
        """Bytes of tensors that are written."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        def times(count: int, at_most: bool = False) -> str:
            return f"{'at most ' if at_most else ''}{count} {'pass' if count == 1 else 'passes'}"

        at_most = any(bound for _, _, bound in self.statistics)
        stacks = "chunk by chunk" if self.by_chunks else "as a whole"
        inputs = _columns([[task, path, kind, dtype, _mib(size)] for task, path, kind, dtype, size in self.inputs])
        statistics = _columns([[what, times(reads, bound)] for what, reads, bound in self.statistics])
        rows = [
            ("inputs", inputs),
            ("base", ["  ".join(self.base)]),
            *([("differences", list(self.notes))] if self.notes else []),
            *([("warnings", list(self.warnings))] if self.warnings else []),
            ("chain", [f"{number}. {step}" for number, step in enumerate(self.steps, start=1)]),
            ("statistics", statistics or ["none"]),
            ("passes", [f"{times(self.passes, at_most)} over the inputs, {self.walks} of them to write"]),
            ("largest stack", [f"{_mib(self.largest_stack)}, computed {stacks} on {self.device}"]),
            *([("matrices", [_operations(*self.matrices)])] if self.matrices else []),
            ("memory", [f"about {_mib(self.memory)} beside the program itself"]),
            ("to read", [f"{'at most ' if at_most else ''}{_mib(self.read)}"]),
            ("to write", [_mib(self.written)]),
            ("output", _columns([[name, _mib(size)] for name, size in self.files])),
        ]
        return "\n".join(
            f"{'' if number else what:<15}{line}" for what, lines in rows for number, line in enumerate(lines)
        )


def plan_merge(
    inputs: Sequence[Input],
    base: Base,
    transform: Transform,
    merged: TaskVectors,
    outputs: Sequence[Output],
    folder: Path,
    device: str,
    writes_weights: bool,
    fingerprinted: bool,
    notes: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
) -> MergePlan:
    """Count what a merge costs; reads nothing.

    Args:
        inputs: what is merged.
        base: θ0.
        transform: the chain.
        merged: what it makes of the inputs.
        outputs: what is written.
        folder: where to.
        device: where stacks are computed.
        writes_weights: whether the outputs hold whole models.
        fingerprinted: whether the fingerprint of the base is needed.
        notes: differences that are normal.
        warnings: what is legal and dangerous.
    """
    names = merged.names
    stacks = {name: bytes_of(merged.inputs, name) for name in names}
    largest, parameter = max(stacks.values()), max(stacks.values()) // len(inputs)
    theta = _total(base.parameters, names) if base.files else 0  # differences read it as well
    one_pass = sum(_total(one.source, names) for one in inputs) + (theta if any(one.weights for one in inputs) else 0)
    statistics = tuple((found.what, found.reads, found.at_most) for found in merged.statistics)
    walks = merged.walk * len(outputs)
    whole = _total(base.parameters, base.parameters) if base.files else 0
    base_reads = (1 if fingerprinted else 0) + (len(outputs) if writes_weights else 0)
    works = {name: merged.work(name) for name in names}
    heaviest = max(names, key=lambda name: works[name].operations)
    operations = sum(work.operations for work in works.values())
    total = operations * len(outputs)
    matrices = (tuple(merged.inputs.shape(heaviest)[1:]), total, _seconds(total)) if total else None
    temporary = max(work.memory for work in works.values())
    computing = (
        _WAITING + chunk_threads() * _CHUNKS if merged.by_chunks else max(_STACKS * largest, 3 * largest + temporary)
    )
    return MergePlan(
        inputs=tuple(
            (one.vector.task, one.path, "weights" if one.weights else "task vector", _dtypes(one.source), one.size)
            for one in inputs
        ),
        base=(base.name, _dtypes(base.parameters)),
        steps=tuple(_steps(transform)),
        statistics=statistics,
        walks=walks,
        by_chunks=merged.by_chunks,
        largest_stack=largest,
        matrices=matrices,
        memory=base.memory + computing + (1 if merged.by_chunks else 3) * parameter,
        device=device,
        read=one_pass * (walks + sum(reads for _, reads, _ in statistics)) + whole * base_reads,
        files=tuple((str(folder / name), size) for output in outputs for name, size in output.files.items()),
        notes=notes,
        warnings=warnings,
    )


def check_space(plan: MergePlan, folder: Path) -> None:
    """Refuse what the disk has no room for, or where nothing may be written, before the work is done.

    Raises:
        ConfigurationError: less is free than is to be written, or the folder is not writable.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES if existing.is_dir() else errno.ENOTDIR)
        raise ConfigurationError(
            f"output: expected a folder that can be created or written to, got {folder} ({reason}). Choose another one."
        )
    free = shutil.disk_usage(existing).free
    if free < plan.written:
        raise ConfigurationError(
            f"output: expected {_mib(plan.written)} of free space in {existing}, got {_mib(free)}. "
            "Free some, choose another folder, or a smaller dtype."
        )


def _operations(shape: tuple[int, ...], operations: float, seconds: float) -> str:
    sizes = " x ".join(map(str, shape))
    return f"the largest {sizes}; {operations / 1e9:,.1f} billion operations, about {seconds:,.1f} s on this processor"


def _seconds(operations: float) -> float:
    """How long operations take at the speed of a product of matrices on this machine."""
    example = torch.ones(512, 512)
    example @ example  # starts the threads
    start = time.perf_counter()
    for _ in range(4):
        example @ example
    return operations * (time.perf_counter() - start) / (4 * 2 * 512**3)


def _steps(transform: Transform) -> list[str]:
    if isinstance(transform, WithOverrides):
        inside = [
            f"{override.transform!r} for "
            + " and ".join(
                [f"names {override.names!r}"] * (override.names is not None)
                + [f"blocks {', '.join(map(str, override.blocks or ()))}"] * (override.blocks is not None)
            )
            for override in transform.overrides
        ]
        return [*inside, f"{transform.transform!r} for all others"]
    return [repr(step) for step in transform.steps] if isinstance(transform, Chain) else [repr(transform)]


def _total(tensors: LazyMapping, names: Iterable[str]) -> int:
    return sum(bytes_of(tensors, name) for name in names)


def _dtypes(tensors: LazyMapping) -> str:
    found = {str(tensors.dtype(name)).removeprefix("torch.") for name in tensors}
    return first_few(sorted(found))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
