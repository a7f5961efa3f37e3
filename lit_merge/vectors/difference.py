"""The difference of two checkpoints, lazily for files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError, first_few
from lit_merge.params import check_same_structure, dtype_of, fingerprint, is_finite, shape_of, working_dtype
from lit_merge.vectors.lazy import Computed, LazyMapping, Slicer, Structure
from lit_merge.vectors.sharded import open_tensors

__all__ = ["Checkpoint", "DifferenceSlicer", "checkpoint_difference"]

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]
"""Name -> tensor, or the path of a safetensors file, or of the folder or index of a sharded model."""


def checkpoint_difference(
    pretrained: Checkpoint, finetuned: Checkpoint, with_fingerprint: bool = True
) -> tuple[Mapping[str, Tensor], str]:
    """τ = θ − θ0 over the floating-point entries; see :meth:`TaskVector.from_checkpoints`.

    Returns:
        The difference, lazy if both checkpoints are files or lazy mappings, and the fingerprint of the floating-point
        entries of θ0 (empty without ``with_fingerprint``).

    Raises:
        ConfigurationError: a checkpoint is neither a mapping of tensors nor a path.
        StructureMismatchError: names, shapes or kinds of dtype differ.
        FileFormatError: a path does not lead to a safetensors file.
        NonFiniteError: the difference is NaN or infinite (for files: when that tensor is read).
    """
    base, tuned = _opened(pretrained, "pretrained"), _opened(finetuned, "finetuned")
    check_same_structure(base, tuned, what="fine-tuned checkpoint")
    kinds = {name: (dtype_of(base, name), dtype_of(tuned, name)) for name in base}
    offenders = [
        f"{name} ({first} and {second})"
        for name, (first, second) in kinds.items()
        if first.is_floating_point != second.is_floating_point or first.is_complex or second.is_complex
    ]
    if offenders:
        raise StructureMismatchError(
            f"fine-tuned checkpoint: expected real floating-point values in both, got {first_few(offenders)}. "
            "Convert both checkpoints to the same kind of dtype."
        )
    structure = {
        name: (shape_of(base, name), working_dtype(*dtypes))
        for name, dtypes in kinds.items()
        if dtypes[0].is_floating_point
    }
    identity = fingerprint(Computed(structure, base.__getitem__)) if with_fingerprint else ""
    compute = partial(_difference, base, tuned)
    if isinstance(base, LazyMapping) and isinstance(tuned, LazyMapping):
        return _Difference(structure, compute, base, tuned), identity
    return dict(Computed(structure, compute)), identity


class _Difference(Computed):
    """A computed difference that can also be read in parts."""

    def __init__(self, structure: Structure, compute: Any, base: LazyMapping, tuned: LazyMapping) -> None:
        super().__init__(structure, compute)
        self._base, self._tuned = base, tuned

    def slicer(self, name: str) -> Slicer:
        """Differences part by part; whoever reads them checks that they are finite."""
        return DifferenceSlicer(self._tuned.slicer(name), self._base.slicer(name), self._base, self._base.dtype(name))


@dataclass(frozen=True)
class DifferenceSlicer:
    """Reads parts of θ − θ0; several vectors of one base can share the part of θ0.

    Attributes:
        tuned: reads θ.
        base: reads θ0.
        origin: the mapping that θ0 belongs to.
        dtype: of θ0.
    """

    tuned: Slicer
    base: Slicer
    origin: LazyMapping
    dtype: torch.dtype

    def __call__(self, start: int, stop: int, out: Tensor) -> None:
        """Write those entries of the flattened difference into ``out``."""
        self.tuned(start, stop, out)
        out.sub_(self.base_part(start, stop, out))

    def base_part(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Those entries of the flattened θ0, as ``like`` is."""
        part = torch.empty(stop - start, dtype=like.dtype, device=like.device)
        self.base(start, stop, part)
        return part


def _opened(checkpoint: Checkpoint, what: str) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, (str, os.PathLike)):
        return open_tensors(checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise ConfigurationError(
            f"{what}: expected a mapping name -> tensor or the path of a safetensors file, got "
            f"{type(checkpoint).__name__}. Use dict(model.named_parameters())."
        )
    if not isinstance(checkpoint, LazyMapping):
        others = [
            f"{name} ({type(value).__name__})" for name, value in checkpoint.items() if not hasattr(value, "shape")
        ]
        if others:
            raise ConfigurationError(
                f"{what}: expected a mapping name -> tensor, got {first_few(others)}. Pass the state dict inside it."
            )
    return checkpoint


def _difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], name: str) -> Tensor:
    first, second = base[name].detach(), tuned[name].detach()
    dtype = working_dtype(first.dtype, second.dtype)
    return _finite(second.to(dtype) - first.to(second.device, dtype), name)


def _finite(difference: Tensor, name: str) -> Tensor:
    if not is_finite(difference):
        raise NonFiniteError(
            f"task vector: expected a finite difference, got NaN or infinity in {name}. "
            "Train again with a lower learning rate, or remove this checkpoint."
        )
    return difference
