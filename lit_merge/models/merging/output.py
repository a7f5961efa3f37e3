"""What ``lit-merge merge`` writes: which files, the tensors in them one at a time, and all of them or none."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, LitMergeError, NonFiniteError
from lit_merge.files.lazy import LazyMapping, Slicer
from lit_merge.files.rounding import Rounded
from lit_merge.files.shards import INDEX_ENDING, bytes_of, open_tensors, plan_shards
from lit_merge.models.merging.companions import STEMS, Companions, earlier_companions
from lit_merge.models.merging.rounding_loss import RoundingLoss, is_narrow, rounding_caution
from lit_merge.models.network import Base
from lit_merge.params import add_scaled, dtype_of, is_finite, shape_of, working_dtype
from lit_merge.vectors import TaskVectors, merged_parameters

__all__ = ["MergedWeights", "Output", "RoundedVector", "Target", "beside", "card_of", "check_file_names"]

_OTHER_KINDS = {
    *(".bin", ".ckpt", ".csv", ".gguf", ".h5", ".json", ".md", ".msgpack", ".npy", ".npz", ".onnx", ".pickle", ".pkl"),
    *(".pt", ".pth", ".tar", ".txt", ".yaml", ".yml", ".zip"),
}


@dataclass(frozen=True)
class Target:
    """Where a merge writes to: one file, or a folder.

    Args:
        path: a file that ends in .safetensors, or a folder.

    Raises:
        ConfigurationError: it is another kind of file, or exists as one.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.is_file and (self.path.suffix in _OTHER_KINDS or self.path.is_file()):
            raise ConfigurationError(
                f"output: expected a file ending in .safetensors, got {self.path}. Rename it, or name a folder."
            )
        if self.is_file and self.path.is_dir():
            raise ConfigurationError(f"output: expected a file, got {self.path}, which is a folder. Rename it.")

    @property
    def is_file(self) -> bool:
        """Whether it is one file; otherwise a folder, of shards or of several files."""
        return self.path.suffix == ".safetensors"

    @property
    def folder(self) -> Path:
        """The folder that everything is written into."""
        return self.path.parent if self.is_file else self.path

    def stems(self, kind: str, tasks: Sequence[str]) -> list[str]:
        """What the names of the files begin with, one for each of the merged vectors.

        Raises:
            ConfigurationError: there are several, and the output is one file, or the tasks cannot name files.
        """
        if len(tasks) == 1:
            return [self.path.stem if self.is_file else {"weights": "model"}.get(kind, kind)]
        if self.is_file:
            raise ConfigurationError(
                f"output: expected one vector, got {len(tasks)} ({', '.join(tasks)}) for one file. Reduce them first, "
                "e.g. with Sum() or Mean(), or name a folder as output."
            )
        check_file_names(tasks)
        return list(tasks)


def check_file_names(tasks: Sequence[str]) -> None:
    """Refuse tasks whose files would be one, or would lie elsewhere.

    Raises:
        ConfigurationError: a task is there twice, or has a slash or the like in its name.
    """
    wrong = [task for task in tasks if not re.fullmatch(r"[\w+\-][\w+\-. ]*", task) or tasks.count(task) > 1]
    if wrong:
        raise ConfigurationError(
            f"output: expected tasks that can name a file each, got {wrong[0]!r} among {', '.join(tasks)}. "
            "Set tasks to names of their own."
        )


def beside(output: Path, ending: str) -> Path:
    """The file that goes with a merge's output, e.g. ``m-search.json`` with ``m.safetensors``; or in its folder."""
    return output.with_name(f"{output.stem}-{ending}") if output.suffix == ".safetensors" else output / ending


def card_of(output: Path) -> Path:
    """The model card: ``m.md`` with ``m.safetensors``, ``README.md`` in a folder."""
    return output.with_suffix(".md") if output.suffix == ".safetensors" else output / "README.md"


class MergedWeights(LazyMapping):
    """θ0 + τ within the whole model, computed one parameter at a time and rounded once.

    Args:
        base: the whole model; what τ does not have passes through.
        merged: τ, T = 1.
        dtype: of floating-point tensors other than scalars; None keeps those of the base.
        replaced: what is written instead of tensors of the base that are no parameters, under the whole model's names.

    Raises:
        StructureMismatchError: τ has other names, shapes or kinds of dtype than the base.
        NonFiniteError: on reading, a value is NaN or infinite, or does not fit into ``dtype``.
    """

    def __init__(
        self,
        base: Base,
        merged: TaskVectors,
        dtype: torch.dtype | None,
        replaced: Mapping[str, Tensor] | None = None,
    ) -> None:
        merged_parameters(base.parameters, merged)  # checks, and computes nothing yet
        self._whole, self._prefix, self._merged, self._dtype = base.whole(), base.prefix, merged, dtype
        self._base, self._ties, self._replaced = base.parameters, base.ties, replaced or {}
        self._losses: dict[str, RoundingLoss] = {}

    def __getitem__(self, name: str) -> Tensor:
        if not self._is_merged(name):
            if name in self._ties:  # one tensor, written under both of its names
                return self[self._ties[name]].to(self.dtype(name))
            unchanged = self._replaced if name in self._replaced else self._whole
            return self._stored(name, unchanged[name].detach())
        parameter = self._parameter(name)
        base, merged = self._base[parameter].detach(), self._merged[parameter][0]
        stored = self._stored(name, self._sum(parameter, base, merged))
        if is_narrow(stored.dtype):
            self._losses[name] = RoundingLoss.of(base, merged, stored)
        return stored

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened tensors one after the other; merged ones in pieces, computed ahead on several threads."""
        asked = list(names)
        full = {self._parameter(name): name for name in asked if self._is_merged(name)}
        starts = {parameter: self._base.slicer(parameter) for parameter in full}
        pieces = self._merged.over_chunks(partial(self._piece, starts), list(full))
        ready = next(pieces, None)
        for name in asked:
            if not self._is_merged(name):
                yield name, self[name].reshape(-1)
            total = RoundingLoss()
            while ready is not None and full[ready[0]] == name:
                _, piece, loss = ready
                total += loss  # in the order of the elements, whichever thread was first
                yield name, piece
                ready = next(pieces, None)
            self._losses[name] = total

    @property
    def tasks(self) -> tuple[str, ...]:
        """What was merged."""
        return self._merged.merged_tasks

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """From now on write these instead of tensors that are no parameters, under the whole model's names."""
        self._replaced = ChainMap(dict(values), self._replaced)  # type: ignore[arg-type]

    @property
    def narrow(self) -> list[torch.dtype]:
        """The dtypes narrower than float32 in which merged tensors are stored."""
        names = [f"{self._prefix}{parameter}" for parameter in self._merged]
        return sorted({self.dtype(name) for name in names if is_narrow(self.dtype(name))}, key=str)

    def late_entries(self) -> dict[str, str]:
        """The header's entry about what rounding has taken, if there is any."""
        return {"rounding": self.loss.entry()} if self.narrow else {}

    @property
    def loss(self) -> RoundingLoss:
        """What rounding has taken from τ in the tensors that were read so far, each of them counted once."""
        return sum((self._losses[name] for name in sorted(self._losses)), RoundingLoss())

    def _is_merged(self, name: str) -> bool:
        return name.startswith(self._prefix) and self._parameter(name) in self._merged

    def _parameter(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _piece(
        self, starts: Mapping[str, Slicer], name: str, start: int, piece: Tensor
    ) -> tuple[str, Tensor, RoundingLoss]:
        base = torch.empty(piece.shape[1], dtype=dtype_of(self._base, name), device=piece.device)
        starts[name](start, start + piece.shape[1], base)
        stored = self._stored(self._prefix + name, self._sum(name, base, piece[0]))
        narrow = is_narrow(stored.dtype)
        return name, stored, RoundingLoss.of(base, piece[0], stored) if narrow else RoundingLoss()

    def _sum(self, parameter: str, base: Tensor, merged: Tensor) -> Tensor:
        """θ0 + τ in float32 or better, to be rounded once."""
        total = add_scaled(base.to(working_dtype(base.dtype, merged.dtype)), merged)
        if not is_finite(total):
            raise NonFiniteError(
                f"merged parameters: expected finite values, got NaN or infinity in {parameter}. "
                "Use a smaller coefficient, or remove the damaged input."
            )
        return total

    def _stored(self, name: str, value: Tensor) -> Tensor:
        stored = value.to(self.dtype(name))
        if stored.dtype != value.dtype and not is_finite(stored) and is_finite(value):
            raise NonFiniteError(
                f"merged weights: expected values that fit into {stored.dtype}, got "
                f"{float(value.abs().max()):.3g} in {name}. Store them as bfloat16 or float32."
            )
        return stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, as in the base."""
        return shape_of(self._whole, name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, as it is stored."""
        dtype = dtype_of(self._whole, name)
        keep = self._dtype is None or not dtype.is_floating_point or not self.shape(name)
        return dtype if keep else self._dtype or dtype


class RoundedVector(Rounded):
    """A merged τ in the dtype to store; with None in that of each parameter of the base."""

    def __init__(self, vector: LazyMapping, dtype: torch.dtype | None, base: Mapping[str, Tensor]) -> None:
        super().__init__(vector, dtype, "merged task vector")
        self._base = base

    def late_entries(self) -> dict[str, str]:
        """The header's entry about how it is stored, with the rounding error."""
        return {"storage": self.storage()}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype to store, without reading the tensor."""
        return self._dtype or dtype_of(self._base, name)


@dataclass(frozen=True)
class Output:
    """One of the models or vectors that a merge writes.

    Attributes:
        stem: what its files' names begin with.
        tensors: what is in them.
        metadata: the headers' entries.
        shards: file name -> names of tensors.
        place: the folder inside the output that it has to itself; empty if none.
        companions: what lies beside the weights.
        measured: what counts, while it is read, what rounding does to the tensors; None if nothing does.
    """

    stem: str
    tensors: LazyMapping
    metadata: Mapping[str, str]
    shards: Mapping[str, list[str]]
    place: str = ""
    companions: Companions = field(default_factory=Companions)
    measured: MergedWeights | RoundedVector | None = None

    @classmethod
    def plan(
        cls,
        stem: str,
        tensors: LazyMapping,
        metadata: Mapping[str, str],
        shard_size: int | None,
        place: str = "",
        companions: Companions | None = None,
        measured: MergedWeights | RoundedVector | None = None,
    ) -> Output:
        """Decide which tensors go into which file."""
        total = sum(bytes_of(tensors, name) for name in tensors)
        shards = plan_shards(tensors, shard_size or max(total, 1), stem)
        return cls(stem, tensors, metadata, shards, place, companions or Companions(), measured)

    def late_entries(self) -> dict[str, str]:
        """Entries of the header that are known when all tensors were read, always of the same length."""
        return self.measured.late_entries() if self.measured is not None else {}

    def caution(self) -> str:
        """What rounding has taken from τ, in words, when all tensors were read; empty if it is little."""
        one = self.measured
        return rounding_caution(self.model, one.narrow, one.loss) if isinstance(one, MergedWeights) else ""

    @property
    def model(self) -> str:
        """The file to open: that of the weights, or the index of its shards."""
        return self._inside(f"{self.stem}{'.safetensors' if len(self.shards) == 1 else INDEX_ENDING}")

    @property
    def files(self) -> dict[str, int]:
        """Every file with its bytes, headers and index left out."""
        sizes = {file: sum(bytes_of(self.tensors, name) for name in names) for file, names in self.shards.items()}
        index = {} if len(sizes) == 1 else {f"{self.stem}{INDEX_ENDING}": 0}
        return {self._inside(name): size for name, size in {**sizes, **index, **self.companions.sizes}.items()}

    def in_the_way(self, folder: Path) -> list[Path]:
        """What an earlier output in this place has left; the index first, so that half a model is never read.

        What lay beside its weights counts as long as nobody has changed it. Where this output has companions, so do
        weights that an earlier merge for another library has written there.
        """
        place = folder / self.place
        found = sorted(place.iterdir()) if place.is_dir() else []
        models = [path for path in found if _is_of(self.stem, path)]
        if self.companions:
            models += [path for path in found if any(_is_of(stem, path) for stem in STEMS) and _is_merged(path)]
        models = sorted(dict.fromkeys(models), key=lambda path: not path.name.endswith(INDEX_ENDING))
        return models + earlier_companions(place, models)

    def _inside(self, name: str) -> str:
        return f"{self.place}/{name}" if self.place else name


def _is_of(stem: str, path: Path) -> bool:
    endings = r"(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_ENDING)
    return re.fullmatch(f"{re.escape(stem)}({endings})", path.name) is not None


def _is_merged(path: Path) -> bool:
    """Whether a file of weights, or an index, says that a merge with companions has written it."""
    try:
        return "companions" in open_tensors(path).metadata
    except (LitMergeError, OSError):
        return False
