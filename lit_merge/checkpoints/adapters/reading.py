"""LoRA adapters as the peft library saves them: the task vector they stand for, under the base model's names.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``). An adapted weight is
W0 + s · B A with s = α / r, or α / √r for rank-stabilised LoRA (Hu et al. 2022, Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoints.adapters.changes import AdapterParts, Update, adapter_difference
from lit_merge.checkpoints.adapters.settings import fitting_values, read_settings
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pickles.torch_files import open_torch_file
from lit_merge.errors import FileFormatError, StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.store import LazyTensors

__all__ = ["Adapter", "open_adapter"]

_FACTORS = {  # ending of a name in the file -> which part of an update it is
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_B.bias": "bias",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; made by :func:`open_adapter`.

    Attributes:
        path: the folder.
        files: the configuration and the tensors.
        settings: the entries of ``adapter_config.json``.
        tensors: the tensors of the file, under its own names.
    """

    path: Path
    files: tuple[Path, ...]
    settings: Mapping[str, Any]
    tensors: LazyMapping
    _parts: AdapterParts = field(repr=False)

    def placement(self, base: Mapping[str, Tensor]) -> tuple[str, str]:
        """What must be removed from and put before the adapter's names to get the base's.

        Args:
            base: name -> tensor of the base model; nothing is read.

        Returns:
            Both ``""`` if all names are the base's own; at most one is not ``""``, e.g. ``("", "vision_model.")`` for
            an adapter of a vision model on the checkpoint of the whole model.

        Raises:
            StructureMismatchError: the base lacks a parameter that the adapter changes, or names and shapes fit in more
                than one position.
        """
        lazy = as_lazy(base)
        if not self._missing(lazy, "", ""):
            return "", ""
        by_name = [one for one in dict.fromkeys(self._placements(lazy)) if not self._missing(lazy, *one)]
        fitting = [one for one in by_name if self._fits(lazy, *one)] if len(by_name) > 1 else by_name
        if not fitting:
            raise StructureMismatchError(
                f"{self.path}: expected a base with every parameter that the adapter changes, got none named "
                f"{first_few(self._missing(lazy, '', ''))}. Use the base model that it was trained on, with its names."
            )
        if len(fitting) > 1:
            starts = [repr(added or f"without {removed}") for removed, added in fitting]
            raise StructureMismatchError(
                f"{self.path}: expected one position in the base where the adapter fits, got {len(fitting)} "
                f"({first_few(starts)}). Use the part of the base that it was trained on."
            )
        return fitting[0]

    def difference(self, base: Mapping[str, Tensor]) -> LazyMapping:
        """The task vector τ: s · B A for adapted weights, saved minus base for what was saved whole, zero elsewhere.

        Args:
            base: name -> tensor of the base model θ0.

        Returns:
            Lazy, under all names that have floating-point values in the base, in float32, or float64 where the base or
            the adapter is.

        Raises:
            StructureMismatchError: the base lacks a parameter that the adapter changes, it fits in more than one
                position, shapes differ, a changed parameter is quantised, or it cannot be told whether a square weight
                is transposed.
            NonFiniteError: a difference is NaN or infinite (when that tensor is read).
        """
        lazy = as_lazy(base)
        return adapter_difference(self._parts, lazy, self._parts.changes(lazy, *self.placement(lazy)))

    def _missing(self, base: LazyMapping, removed: str, added: str) -> list[str]:
        return [
            name
            for name in self._parts.names()
            if not name.startswith(removed) or added + name.removeprefix(removed) not in base
        ]

    def _placements(self, base: LazyMapping) -> Iterator[tuple[str, str]]:
        """Where the first name could be; not checked for the others."""
        first = self._parts.names()[0]
        for name in base:
            if name.endswith("." + first):
                yield "", name[: -len(first)]
            if first.endswith("." + name):
                yield first[: -len(name)], ""

    def _fits(self, base: LazyMapping, removed: str, added: str) -> bool:
        try:
            self._parts.changes(base, removed, added)
        except StructureMismatchError:
            return False
        return True


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Open a LoRA adapter that was saved by peft.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.

    Returns:
        The adapter; its tensors are read when they are asked for.

    Raises:
        FileFormatError: a file is missing or malformed; the adapter is none of LoRA; a setting changes the weights in a
            way that is not known here (DoRA, PiSSA, …); or the tensors do not belong to the configuration.
    """
    path = Path(folder)
    settings = read_settings(path / "adapter_config.json")
    files = [path / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileFormatError(
            f"{path}: expected adapter_model.safetensors or adapter_model.bin with its configuration, got neither. "
            "Copy the adapter again, all of its files."
        )
    tensors: LazyMapping = LazyTensors(file) if file.suffix == ".safetensors" else open_torch_file(file)
    factors: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in tensors:
        inner = name.removeprefix("base_model.model.")
        ending = next((ending for ending in _FACTORS if inner.endswith(ending)), None)
        if ending is not None:
            factors.setdefault(inner.removesuffix(ending), {})[_FACTORS[ending]] = name
        elif ".lora_" in inner or "token_adapter" in inner:
            raise FileFormatError(
                f"{file}: expected factors A and B of LoRA, got {name}. Merge this adapter with peft."
            )
        elif ".original_module." not in inner:  # a copy of the base
            saved[inner.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
    inside = [module for module in factors if ".base_layer." in module]
    if inside:  # torch's attention, wrapped within what is wrapped
        raise FileFormatError(
            f"{file}: expected layers that are adapted once, got the output projection inside an adapted attention "
            f"({first_few(inside)}), which versions of peft count once or twice. "
            "Merge this adapter with the version that trained it, and use the merged model."
        )
    updates = {module: _update(path, settings, tensors, module, parts) for module, parts in factors.items()}
    if not updates and not saved:
        raise FileFormatError(f"{file}: expected the tensors of an adapter, got none. Save it again.")
    parts = AdapterParts(path, tensors, updates, saved, settings.get("fan_in_fan_out") is True)
    return Adapter(path, (path / "adapter_config.json", file), settings, tensors, parts)


def _update(
    path: Path, settings: Mapping[str, Any], tensors: LazyMapping, module: str, parts: Mapping[str, str]
) -> Update:
    """A module's factors and their scale, checked against the configuration."""
    shapes = [tensors.shape(parts[which]) for which in "ab" if which in parts]
    whole = len(shapes) == 2 and min(map(len, shapes)) > 1 and 0 not in shapes[0]
    if not whole or shapes[0][0] != shapes[1][1] or any(length != 1 for length in shapes[1][2:]):
        got = ", ".join(f"{which} {tuple(tensors.shape(name))}" for which, name in parts.items())
        raise FileFormatError(
            f"{path}: expected factors A [r, …] and B [d, r] of {module}, got {got}. Save the adapter again."
        )
    rank = shapes[0][0]
    ranks = fitting_values(path, settings, "rank_pattern", module) or [settings.get("r", 8)]
    if rank not in ranks:
        raise FileFormatError(
            f"{path}: expected factors of rank {ranks[0]} for {module} by the configuration, got rank {rank}. "
            "Use the configuration that was saved with them."
        )
    alphas = fitting_values(path, settings, "alpha_pattern", module) or [settings.get("lora_alpha", 8)]
    if len(set(alphas)) > 1:
        raise FileFormatError(
            f"{path}: expected one entry of alpha_pattern for {module}, got {len(alphas)} with different values, whose "
            "order was not saved. Merge this adapter with peft, and use the merged model."
        )
    scale = float(alphas[0]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Update(scale, **parts, embedding=parts["a"].endswith("lora_embedding_A"))
