"""Storage of task vectors that are merged again and again with other coefficients, and one pass over them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch import distributed as processes

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.params import Params, add_scaled, working_dtype
from lit_merge.vectors.sources import Reader
from lit_merge.vectors.task_vector import TaskVector
from lit_merge.vectors.task_vectors import TaskVectors
from lit_merge.vectors.threads import ordered_map

__all__ = ["Storage", "VectorStorage", "bytes_needed"]

Storage = Literal["device", "bfloat16", "host", "mapped"]
"""Where vectors are stored: on the device, there in bfloat16, in the host's memory, or in files that are read anew."""

_Result = TypeVar("_Result")
_ELEMENTS = 1 << 20  # of all vectors together in one chunk that is read or converted: four MiB of float32
_COLUMNS = 1 << 20  # in one product: the sums of longer ones lose digits in float32


@dataclass(frozen=True)
class _Segment:
    """A part of one parameter that this process holds.

    Attributes:
        name: the parameter.
        column: its position among the parameters.
        start: first element of the flattened parameter.
        stop: the element after the last one.
        offset: of the first element in what this process holds of all parameters, concatenated.
    """

    name: str
    column: int
    start: int
    stop: int
    offset: int


class VectorStorage:
    """T task vectors of N parameters, as :class:`lit_merge.functional.Directions` are read.

    What is in memory in the dtype to compute in goes through one matrix–vector product per parameter, at the speed of
    the memory. What has to be read or converted first does so in chunks that stay in the processor's cache, on several
    threads. Products and sums are those of the library that torch multiplies matrices with: the results differ from
    ``chain(Scale([…]), Sum())`` in the last bits.

    Args:
        vectors: what is merged, after any transforms.
        storage: ``device`` holds all in float32 (float64 if a vector is), ``bfloat16`` at half the size, ``host`` in
            the host's memory, pinned if there is an accelerator, and ``mapped`` nothing: files are read at every pass.
            Transformed vectors are first written to a temporary folder for that.
        device: where the merged weights are needed.
        sharded: each of the W processes of the default group holds 1/W of every vector and computes that part of the
            merged weights, which are then gathered; gradients are averaged over the processes on the way back, and all
            processes get the same gradient of the coefficients. All have to merge at the same time.

    Raises:
        ConfigurationError: the storage is unknown, or there is too little memory for it.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        storage: Storage = "device",
        device: torch.device | str = "cpu",
        sharded: bool = False,
    ) -> None:
        if storage not in get_args(Storage):
            raise ConfigurationError(f"storage: expected {', '.join(get_args(Storage))}, got {storage!r}.")
        self._device, self._storage = torch.device(device), storage
        self._shapes = {name: vectors.shape(name)[1:] for name in vectors.names}
        self._dtype = working_dtype(*(vectors.dtype(name) for name in vectors.names))
        self.tasks = vectors.tasks
        self._group = sharded and processes.is_available() and processes.is_initialized()
        count, rank = (processes.get_world_size(), processes.get_rank()) if self._group else (1, 0)
        total = sum(shape.numel() for shape in self._shapes.values())
        self._length = -(-total // count)
        self._segments = list(self._held(rank * self._length, min((rank + 1) * self._length, total)))
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._flat: Tensor | None = None
        self._vectors: TaskVectors | None = None
        _check_memory(vectors, storage, self._device, count)
        if storage == "mapped":
            self._vectors = self._on_disk(vectors)
        else:
            self._flat = self._filled(vectors)

    @property
    def device(self) -> torch.device:
        """Where the weights are merged."""
        return self._device

    @property
    def names(self) -> Sequence[str]:
        """The N parameters."""
        return tuple(self._shapes)

    @property
    def bytes_held(self) -> int:
        """What the vectors take in this process's memory, on the device or the host."""
        return 0 if self._flat is None else self._flat.nbytes

    @torch.no_grad()
    def add_weighted(
        self, weights: Tensor, base: Mapping[str, Tensor] | None, out: Mapping[str, Tensor] | None = None
    ) -> Params:
        """``base[n] + Σ_t weights[t, n] τ_t[n]``; see :class:`lit_merge.functional.Directions`."""
        weights = weights.detach().to(self._device, self._dtype)
        with torch.autocast(self._device.type, enabled=False):
            return self._gathered(weights, base) if self._group else self._added(weights, base, out)

    @torch.no_grad()
    def add_one(self, row: int, base: Mapping[str, Tensor] | None, out: Mapping[str, Tensor] | None = None) -> Params:
        """``base[n] + τ_row[n]``, of one vector alone, which is all that is read; otherwise as :meth:`add_weighted`."""
        weights = torch.ones(1, len(self._shapes), dtype=self._dtype, device=self._device)
        with torch.autocast(self._device.type, enabled=False):
            return self._gathered(weights, base, row) if self._group else self._added(weights, base, out, row)

    def _added(
        self,
        weights: Tensor,
        base: Mapping[str, Tensor] | None,
        out: Mapping[str, Tensor] | None,
        row: int | None = None,
    ) -> Params:
        merged = {name: self._empty(name, base) if out is None else out[name].detach() for name in self._shapes}
        targets = {name: value.view(-1) for name, value in merged.items()}
        self._run(partial(_weighted, weights, base, targets, {}), row)
        return merged

    def _gathered(self, weights: Tensor, base: Mapping[str, Tensor] | None, row: int | None = None) -> Params:
        own = torch.zeros(self._length, dtype=self._dtype, device=self._device)
        offsets = {segment.name: segment.offset - segment.start for segment in self._segments}
        self._run(partial(_weighted, weights, base, dict.fromkeys(offsets, own), offsets), row)
        whole = torch.empty(self._length * processes.get_world_size(), dtype=self._dtype, device=self._device)
        processes.all_gather_into_tensor(whole, own)
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = whole[: sum(sizes)].split(sizes)
        return {
            name: part.view(shape).to(self._empty_dtype(name, base))
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    @torch.no_grad()
    def inner_products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``⟨τ_t[n], gradients[n]⟩``, ``(T, N)`` in float64; see :class:`lit_merge.functional.Directions`."""
        flat = {name: value.detach().reshape(-1) for name, value in gradients.items()}
        if self._group:
            flat = self._averaged(flat)
        products = torch.zeros(len(self.tasks), len(self._shapes), dtype=torch.float64, device=self._device)
        with torch.autocast(self._device.type, enabled=False):
            for column, part in self._run(partial(_products, flat)):
                if part is not None:
                    products[:, column] += torch.as_tensor(part, dtype=torch.float64, device=self._device)
        if self._group:
            processes.all_reduce(products)
        return products

    def _held(self, first: int, last: int) -> Iterator[_Segment]:
        before = 0
        for column, (name, shape) in enumerate(self._shapes.items()):
            start, stop = max(first - before, 0), min(last - before, shape.numel())
            if start < stop:
                yield _Segment(name, column, start, stop, before + start - first)
            before += shape.numel()

    def _filled(self, vectors: TaskVectors) -> Tensor:
        """Everything that this process holds, ``(T, elements)``: read once, stack by stack."""
        dtype = torch.bfloat16 if self._storage == "bfloat16" else self._dtype
        where = torch.device("cpu") if self._storage == "host" else self._device
        pinned = self._storage == "host" and self._device.type == "cuda"
        length = sum(segment.stop - segment.start for segment in self._segments)
        flat = torch.empty(len(self.tasks), length, dtype=dtype, device=where, pin_memory=pinned)
        held = {segment.name: segment for segment in self._segments}

        def fill(name: str, start: int, chunk: Tensor) -> None:
            segment = held[name]
            first, last = max(start, segment.start), min(start + chunk.shape[1], segment.stop)
            if first < last:
                position = segment.offset + first - segment.start
                flat[:, position : position + last - first] = chunk[:, first - start : last - start]

        for _ in vectors.over_chunks(fill, list(held)):
            pass
        return flat

    def _on_disk(self, vectors: TaskVectors) -> TaskVectors:
        """The same vectors, from files alone."""
        if vectors.from_files:
            return vectors
        self._folder = tempfile.TemporaryDirectory(prefix="lit-merge-", dir=os.environ.get("TMPDIR"))
        paths = [Path(self._folder.name) / f"{index}.safetensors" for index in range(len(self.tasks))]
        for index, path in enumerate(paths):
            vectors.vector(index).save(path)
        return TaskVectors([TaskVector.load(path) for path in paths])

    def _run(self, function: Callable[[_Segment, int, Tensor], _Result], row: int | None = None) -> list[_Result]:
        """``function(segment, start, chunk)`` of everything that this process holds, in order; of all rows or one."""
        on_cpu = self._device.type == "cpu"
        as_it_is = self._flat is not None and self._flat.dtype == self._dtype
        length = _COLUMNS if as_it_is else max(_ELEMENTS // len(self.tasks), 1 << 12)

        def jobs() -> Iterator[tuple[_Segment, int, int, Reader]]:
            for segment in self._segments:
                read = self._reader(segment)
                step = length if on_cpu else segment.stop - segment.start
                for start in range(segment.start, segment.stop, step):
                    yield segment, start, min(start + step, segment.stop), read

        def apply(segment: _Segment, start: int, stop: int, read: Reader) -> _Result:
            chunk = read(start, stop)[slice(None) if row is None else slice(row, row + 1)]
            chunk = chunk.to(self._device, non_blocking=True)
            return function(segment, start, chunk.to(self._dtype))

        if on_cpu and not as_it_is:
            return list(ordered_map(apply, jobs()))
        return [apply(*job) for job in jobs()]

    def _reader(self, segment: _Segment) -> Reader:
        if self._vectors is not None:
            return self._vectors.reader(segment.name)
        assert self._flat is not None
        flat, offset = self._flat, segment.offset - segment.start
        return lambda start, stop: flat[:, offset + start : offset + stop]

    def _empty_dtype(self, name: str, base: Mapping[str, Tensor] | None) -> torch.dtype:
        return self._dtype if base is None else base[name].dtype

    def _empty(self, name: str, base: Mapping[str, Tensor] | None) -> Tensor:
        return torch.empty(self._shapes[name], dtype=self._empty_dtype(name, base), device=self._device)

    def _averaged(self, gradients: Mapping[str, Tensor]) -> Params:
        """The mean over the processes of what this one holds, as parts of whole gradients."""
        count = processes.get_world_size()
        whole = torch.zeros(self._length * count, dtype=self._dtype, device=self._device)
        position = 0
        for name, shape in self._shapes.items():
            if name in gradients:
                whole[position : position + shape.numel()] = gradients[name]
            position += shape.numel()
        # By addition to zeros everywhere, as not every process need have a gradient of every parameter.
        processes.all_reduce(whole)
        whole /= count
        parts, position = {}, 0
        for name, shape in self._shapes.items():
            parts[name] = whole[position : position + shape.numel()]
            position += shape.numel()
        return parts


def bytes_needed(vectors: TaskVectors, storage: Storage, parts: int = 1) -> int:
    """What storing task vectors takes, in bytes per process, on the device (or, for ``host``, in the host's memory)."""
    if storage == "mapped":
        return 0
    dtype = working_dtype(*(vectors.dtype(name) for name in vectors.names))
    size = 2 if storage == "bfloat16" else dtype.itemsize
    return len(vectors.tasks) * size * -(-sum(vectors.shape(name)[1:].numel() for name in vectors.names) // parts)


def _check_memory(vectors: TaskVectors, storage: Storage, device: torch.device, parts: int) -> None:
    on_host = storage == "host" or device.type == "cpu"
    free = _free_on_host() if on_host else _free_on_device(device)
    needed = bytes_needed(vectors, storage, parts)
    if free is None or needed <= free:
        return
    others = ", ".join(f"{one} {_gib(bytes_needed(vectors, one, parts))}" for one in get_args(Storage))
    fitting = [one for one in get_args(Storage) if bytes_needed(vectors, one, parts) <= free and one != storage]
    raise ConfigurationError(
        f"storage {storage}: expected {_gib(needed)} of free memory for {len(vectors.tasks)} task vectors "
        f"({first_few(vectors.tasks)}) on {'the host' if on_host else device}, got {_gib(free)}. Needed per process: "
        f"{others}; of these {', '.join(fitting)} would fit, or shard them over more processes (sharded)."
    )


def _free_on_device(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _free_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _weighted(
    weights: Tensor,
    base: Mapping[str, Tensor] | None,
    targets: Mapping[str, Tensor],
    offsets: Mapping[str, int],
    segment: _Segment,
    start: int,
    chunk: Tensor,
) -> None:
    """Write one chunk of the merged weights."""
    stop, offset = start + chunk.shape[1], offsets.get(segment.name, 0)
    column, target = weights[:, segment.column], targets[segment.name][start + offset : stop + offset]
    first = None if base is None else base[segment.name].detach().reshape(-1)[start:stop]
    if first is None and target.dtype == chunk.dtype:
        torch.mv(chunk.T, column, out=target)
    elif first is not None and first.dtype == target.dtype == chunk.dtype:
        torch.addmv(first, chunk.T, column, out=target)
    else:
        total = torch.mv(chunk.T, column)
        target.copy_(total if first is None else add_scaled(first, total))


def _products(
    gradients: Mapping[str, Tensor], segment: _Segment, start: int, chunk: Tensor
) -> tuple[int, Tensor | list[float] | None]:
    """One chunk's part of ⟨τ_t, g⟩, summed up in float64 over the chunks."""
    if segment.name not in gradients:
        return segment.column, None
    found = torch.mv(chunk, gradients[segment.name][start : start + chunk.shape[1]].to(chunk)).double()
    # As plain numbers: thousands of small tensors would keep freed memory from being used again.
    return segment.column, found.tolist() if chunk.device.type == "cpu" else found
