"""The difference of two checkpoints, lazily for files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pairing.differences import Rules
from lit_merge.checkpoints.pairing.ties import differing
from lit_merge.checkpoints.pairs import Checkpoint, Names, Pair, pair_of
from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Slicer, Structure, zeros
from lit_merge.params import dtype_of, fingerprint, is_finite, shape_of, working_dtype

__all__ = ["Checkpoint", "DifferenceSlicer", "check_base_part", "checkpoint_difference", "difference_of"]

_ENTRIES = 1 << 20  # differenced at a time when a whole vector is read


def checkpoint_difference(
    pretrained: Checkpoint,
    finetuned: Checkpoint,
    base_fingerprint: str | None = None,
    names: Names = "auto",
    rules: Rules | None = None,
) -> tuple[Mapping[str, Tensor], str, Pair]:
    """τ = θ − θ0 over the parameters; see :meth:`TaskVector.from_checkpoints`.

    Returns:
        The difference, lazy if both checkpoints are files or lazy mappings; the fingerprint of the floating-point
        tensors of θ0, unless it was given: of an image tower in float32, as encoders are loaded; and the pair.

    Raises:
        ConfigurationError: a checkpoint is neither a mapping of tensors, a module nor a path, or a pattern of
            ``leave_out`` fits no name.
        StructureMismatchError: the two differ in what no rule covers, or the fine-tuned file says that it started from
            another θ0.
        FileFormatError: a path does not lead to a checkpoint.
        NonFiniteError: the difference is NaN or infinite (for files: when that tensor is read).
    """
    pair = pair_of(pretrained, finetuned, names, rules)
    if unused := sorted(set(rules.leave_out if rules else ()) - pair.used):
        raise ConfigurationError(
            f"leave_out: expected patterns that fit a name of one of the checkpoints, got {first_few(unused)}. "
            "Use names as they are in the file, e.g. 'classifier.*'."
        )
    if pair.own_base is not None and (others := differing(as_lazy(pair.base), pair.own_base)):
        raise StructureMismatchError(
            f"fine-tuned checkpoint: expected the θ0 of pretrained inside it, got another one: {len(others)} tensors "
            f"differ ({first_few(others)}). Give the model that it was linearised at."
        )
    difference = difference_of(pair)
    identity = _identity(pair) if base_fingerprint is None else base_fingerprint
    if pair.image_tower and identity and pair.started_from not in ("", identity):
        raise StructureMismatchError(
            f"fine-tuned checkpoint: expected one that started from pretrained (fingerprint {identity}), got one that "
            f"says it started from fingerprint {pair.started_from}. Give the model that it started from."
        )
    return difference, identity, pair


def difference_of(pair: Pair) -> Mapping[str, Tensor]:
    """τ of two checkpoints that have been brought under the same names; zero for the parameters that θ has not.

    Raises:
        NonFiniteError: it is NaN or infinite (for files: when that tensor is read).
    """
    return pair.tuned if pair.is_difference else _difference_of(pair.own_base or pair.base, pair.tuned, pair.absent)


def _identity(pair: Pair) -> str:
    """Of an image tower as :func:`lit_merge.models.load_clip` has it, otherwise of the tensors as they are stored."""
    dtypes = {name: dtype_of(pair.base, name) for name in pair.base}
    structure = {name: (shape_of(pair.base, name), dtype) for name, dtype in dtypes.items() if dtype.is_floating_point}
    read = partial(_in_float32, pair.base) if pair.image_tower else pair.base.__getitem__
    return fingerprint(Computed(structure, read))


def _in_float32(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name].float()


def _difference_of(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], absent: tuple[str, ...]
) -> Mapping[str, Tensor]:
    unchanged = frozenset(absent)
    structure = {
        name: (
            shape_of(base, name),
            working_dtype(dtype_of(base, name), *([dtype_of(tuned, name)] if name in tuned else [])),
        )
        for name in base
        if name in tuned or name in unchanged
    }
    compute = partial(_difference, base, tuned, structure)
    if isinstance(base, LazyMapping) and isinstance(tuned, LazyMapping):
        return _Difference(structure, compute, base, tuned)
    return dict(Computed(structure, compute))


class _Difference(Computed):
    """A computed difference that can also be read in parts; zero where θ has nothing."""

    def __init__(self, structure: Structure, compute: Any, base: LazyMapping, tuned: LazyMapping) -> None:
        super().__init__(structure, compute)
        self._base, self._tuned = base, tuned

    def slicer(self, name: str) -> Slicer:
        """Differences part by part; whoever reads them checks that they are finite."""
        if name not in self._tuned:
            return zeros
        return DifferenceSlicer(self._tuned.slicer(name), name, self._base)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened differences, each in chunks of four MiB at most."""
        for name in names:
            read, count, dtype = self.slicer(name), self.shape(name).numel(), self.dtype(name)
            for start in range(0, max(count, 1), _ENTRIES):
                chunk = torch.empty(min(_ENTRIES, count - start), dtype=dtype)
                read(start, start + len(chunk), chunk)
                if isinstance(read, DifferenceSlicer) and not is_finite(chunk):
                    check_base_part(read.base_part(start, start + len(chunk), chunk), name)
                yield name, _finite(chunk, name)


@dataclass(frozen=True)
class DifferenceSlicer:
    """Reads parts of θ − θ0; several vectors of one base can use the part of θ0 together.

    Attributes:
        tuned: reads θ.
        name: of the parameter.
        origin: the mapping that θ0 belongs to.
    """

    tuned: Slicer
    name: str
    origin: LazyMapping

    @cached_property
    def base(self) -> Slicer:
        """Reads θ0; made when it is first needed, as of several vectors only the first one's is."""
        return self.origin.slicer(self.name)

    def __call__(self, start: int, stop: int, out: Tensor) -> None:
        """Write those entries of the flattened difference into ``out``."""
        self.tuned(start, stop, out)
        out.sub_(self.base_part(start, stop, out))

    def base_part(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Those entries of the flattened θ0, as ``like`` is."""
        part = torch.empty(stop - start, dtype=like.dtype, device=like.device)
        self.base(start, stop, part)
        return part


def _difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], structure: Structure, name: str) -> Tensor:
    shape, dtype = structure[name]
    if name not in tuned:
        return torch.zeros(shape, dtype=dtype, device=base[name].device)
    first, second = base[name].detach(), tuned[name].detach()
    difference = second.to(dtype) - first.to(second.device, dtype)
    if not is_finite(difference):
        check_base_part(first, name)
    return _finite(difference, name)


def check_base_part(part: Tensor, name: str) -> None:
    """Say of a difference that is not finite when it is the base's fault.

    Raises:
        NonFiniteError: the base is not finite either.
    """
    if not is_finite(part):
        raise NonFiniteError(
            f"base model: expected finite values, got NaN or infinity in {name}. Use an undamaged copy of the model "
            "that was fine-tuned."
        )


def _finite(difference: Tensor, name: str) -> Tensor:
    if not is_finite(difference):
        raise NonFiniteError(
            f"task vector: expected a finite difference, got NaN or infinity in {name}. "
            "Train again with a lower learning rate, or remove this checkpoint."
        )
    return difference
