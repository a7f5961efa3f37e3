"""Adapters as the peft library saves them: the task vector they stand for, under the base model's names.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``). A weight with LoRA is
W0 + s · B A with s = α / r, or α / √r for rank-stabilised LoRA (Hu et al. 2022, Kalajdzievski 2023).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoints.adapters.additions import (
    Additions,
    bias_additions,
    is_embedding,
    is_head,
    tied_head,
)
from lit_merge.checkpoints.adapters.changes import AdapterParts, Change, adapter_difference
from lit_merge.checkpoints.adapters.placement import misfits, place_of
from lit_merge.checkpoints.adapters.settings import Settings, read_settings
from lit_merge.checkpoints.adapters.updates import ENDINGS, LowRank, update_of
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pickles.torch_files import open_torch_file
from lit_merge.errors import FileFormatError, StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping, Selected
from lit_merge.files.remote import is_remote
from lit_merge.files.store import LazyTensors

__all__ = ["CONFIGURATION", "Adapter", "adapter_folder", "open_adapter"]

CONFIGURATION = "adapter_config.json"
_UNTIED = "the adapter changes {changed}, which the base has in one tensor with {other}"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; made by :func:`open_adapter`.

    Attributes:
        path: the folder.
        files: the configuration and the tensors.
        settings: the entries of ``adapter_config.json``.
        tensors: the tensors of the file, under its own names.
        notes: what was decided where the configuration leaves a choice, in words.
    """

    path: Path
    files: tuple[Path, ...]
    settings: Settings
    tensors: LazyMapping
    _parts: AdapterParts = field(repr=False)
    notes: tuple[str, ...] = ()

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
        return place_of(self._parts.without(self._absent_heads(lazy)), lazy)

    def misfits(self, base: Mapping[str, Tensor], patterns: Sequence[str] = ()) -> dict[str, str]:
        """Heads that were saved with the adapter, and that the base lacks or has in another shape.

        Args:
            base: name -> tensor of the base model; nothing is read.
            patterns: of names that may be missing besides those of heads.

        Returns:
            Name in the adapter -> name in the base, ``""`` where the base has none; nothing if all the rest of the
            adapter does not fit.
        """
        lazy = as_lazy(base)
        return misfits(self._parts.without(self._absent_heads(lazy)), lazy, patterns)

    def without(self, names: Iterable[str]) -> Adapter:
        """The same adapter without what it changes in some parameters."""
        return replace(self, _parts=self._parts.without(names))

    def saved(self, names: Iterable[str]) -> LazyMapping:
        """Those of the parameters that it saved as a whole, under the model's names."""
        whole = self._parts.saved
        return Selected(self.tensors, {name: whole[name] for name in names if name in whole})

    def additions(self, base: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Additions:
        """What the base must be extended by, with the same outputs, before the adapter's difference can be added.

        That is a head of its own where the adapter changes a tied embedding and not the head, or the reverse, as
        peft's modules do; and zero biases where the adapter has some (``lora_bias``) and the base has none.

        Args:
            base: name -> tensor of the base model; nothing of it is read.
            config: its ``config.json``; without, what can be told from the names and the adapter.
        """
        lazy, config = as_lazy(base), config or {}
        total = Additions()
        total |= self._broken_tie(lazy, config)
        parts = self._parts.without([*self._absent_heads(lazy), *total.copies])
        if not (biases := parts.biases()):
            return total
        removed, added = place_of(parts.without(misfits(parts, lazy)), lazy)  # heads are left to the settings
        missing = [added + name.removeprefix(removed) for name in biases]
        missing = [name for name in missing if name not in lazy]
        return total | bias_additions(lazy, config, missing) if missing else total

    def difference(self, base: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> LazyMapping:
        """The task vector τ: s · B A for weights with LoRA, saved minus base for what was saved whole, zero elsewhere.

        Args:
            base: name -> tensor of the base model θ0.
            config: its ``config.json``, if that is known.

        Returns:
            Lazy, under all names that have floating-point values in the base, in float32, or float64 where the base or
            the adapter is.

        Raises:
            StructureMismatchError: the base lacks a parameter that the adapter changes, or has it in one tensor with
                another that is not (see :meth:`additions`); it fits in more than one position, shapes differ, a changed
                parameter is quantised, or it cannot be told whether a square weight is transposed.
            NonFiniteError: a difference is NaN or infinite (when that tensor is read).
        """
        lazy = as_lazy(base)
        parts, changes = self._changes(lazy, config or {})
        return adapter_difference(parts, lazy, changes)

    def changes(self, base: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict[str, Change]:
        """Name in the base -> what happens to it; see :meth:`difference`."""
        return self._changes(as_lazy(base), config or {})[1]

    def _changes(self, base: LazyMapping, config: Mapping[str, Any]) -> tuple[AdapterParts, dict[str, Change]]:
        tie = self._broken_tie(base, config)
        if tie.settings and not any(is_head(name) for name in base):
            raise StructureMismatchError(
                f"{self.path}: expected a change that leaves embedding and head one tensor, as in the base "
                f"(tie_word_embeddings), got one where {tie.reasons[0]}. Merge a causal model by its folder (base), "
                "which is written with a head of its own; or train with ensure_weight_tying, or save the base untied."
            )
        self._check_shared(base)
        parts = self._parts.without(self._absent_heads(base))
        return parts, parts.changes(base, *place_of(parts, base))

    def _absent_heads(self, base: LazyMapping) -> list[str]:
        """Heads that change as their embedding does, for a base that has both in one tensor."""
        return [] if any(is_head(name) for name in base) else self._heads_like_embeddings

    @cached_property
    def _heads_like_embeddings(self) -> list[str]:
        names = self._parts.names()
        tables = [name for name in names if is_embedding(name)]
        return [head for head in names if is_head(head) and any(self._equal(table, head) for table in tables)]

    def _broken_tie(self, base: LazyMapping, config: Mapping[str, Any]) -> Additions:
        """A head of its own, if the adapter changes one of head and embedding, or the two in other ways."""
        tied = tied_head(base, config, self.settings)
        names = self._parts.names()
        heads = [name for name in names if is_head(name)]
        tables = [name for name in names if tied and _same_place(name, tied[0])]
        if tied is None or not (heads or tables) or (heads and tables and heads[0] in self._heads_like_embeddings):
            return Additions()
        embedding, head = tied
        # peft leaves rows tied that were trained on their own.
        if not heads and (self.settings.get("ensure_weight_tying") or self._only_tokens(tables[0])):
            return Additions()
        if tables and heads:
            changed, other = f"{tables[0]} and {heads[0]} differently", "each other"
        else:
            changed, other = (tables[0], head or "its output head") if tables else (heads[0], embedding)
        reason = _UNTIED.format(changed=changed.replace(".weight", ""), other=other.removesuffix(".weight"))
        copies = {head: embedding} if head else {}
        return Additions(copies, settings={"tie_word_embeddings": False}, reasons=(reason,))

    def _check_shared(self, base: LazyMapping) -> None:
        """Refuse what peft itself does not apply: encoders and decoders read a shared table by modules of their own."""
        shared = [name for name in self._parts.names() if name.removesuffix(".weight").rpartition(".")[2] == "shared"]
        own = any(name.endswith(".embed_tokens.weight") for name in base)
        if shared and not own and not self.settings.get("ensure_weight_tying"):
            raise StructureMismatchError(
                f"{self.path}: expected changes of modules that compute, got one of "
                f"{shared[0].removesuffix('.weight')}, whose table encoder and decoder read through modules of their "
                "own: in peft it changes nothing. Train without it, or with ensure_weight_tying."
            )

    def _only_tokens(self, table: str) -> bool:
        module = table.removesuffix(".weight")
        return module in self._parts.tokens and module not in self._parts.updates and table not in self._parts.saved

    def _equal(self, table: str, head: str) -> bool:
        """Whether a table and a head are changed alike: A and B are each other's transposes there, copies equal."""
        parts, first, second = self._parts, table.removesuffix(".weight"), head.removesuffix(".weight")
        saved = parts.saved.get(table), parts.saved.get(head)
        updates = parts.updates.get(first), parts.updates.get(second)
        tokens = parts.tokens.get(first), parts.tokens.get(second)
        if any((one is None) != (other is None) for one, other in (saved, updates, tokens)):
            return False
        if saved[0] and saved[1] and not self._same(saved[0], saved[1]):
            return False
        if tokens[0] and tokens[1] and (tokens[0][1] != tokens[1][1] or not self._same(tokens[0][0], tokens[1][0])):
            return False
        one, other = updates
        if one is None or other is None:
            return True
        both = isinstance(one, LowRank) and isinstance(other, LowRank) and not (one.magnitude or other.magnitude)
        if not both or one.scale != other.scale or one.bias or other.bias:
            return False
        assert isinstance(one, LowRank)
        assert isinstance(other, LowRank)
        return self._same(one.a, other.b, transposed=True) and self._same(one.b, other.a, transposed=True)

    def _same(self, first: str, second: str, transposed: bool = False) -> bool:
        shape = self.tensors.shape(second)
        if self.tensors.shape(first) != (shape[::-1] if transposed else shape):
            return False
        other = self.tensors[second]
        return torch.equal(self.tensors[first], other.T if transposed else other)


def adapter_folder(folder: Path) -> Path | None:
    """The folder of an adapter: this one, or the only one in it that has a name, as peft saves all but the default.

    Args:
        folder: of an adapter, or without weights of its own.

    Raises:
        FileFormatError: there are several adapters with names.
    """
    if (folder / CONFIGURATION).is_file():
        return folder
    named = sorted(one.parent for one in folder.glob(f"*/{CONFIGURATION}"))
    if len(named) > 1:
        raise FileFormatError(
            f"{folder}: expected one adapter, got {len(named)} ({first_few(one.name for one in named)}). "
            "Name the folder of one, or list several."
        )
    return named[0] if named else None


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Open an adapter that was saved by peft: LoRA with its variants, AdaLoRA, LoHa, LoKr, IA3, or trained tokens.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.

    Returns:
        The adapter; its tensors are read when they are asked for.

    Raises:
        FileFormatError: a file is missing or malformed; the adapter is of another kind; a setting changes the weights
            in a way that is not known here (PiSSA, …); or the tensors do not belong to the configuration.
    """
    path = Path(folder)
    settings = read_settings(path / CONFIGURATION)
    files = [path / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    file = next((file for file in files if file.is_file() or is_remote(file)), None)
    if file is None:
        raise FileFormatError(
            f"{path}: expected adapter_model.safetensors or adapter_model.bin with its configuration, got neither. "
            "Copy the adapter again, all of its files."
        )
    tensors: LazyMapping = LazyTensors(file) if file.suffix == ".safetensors" else open_torch_file(file)
    modules, saved = _sorted(file, tensors)
    factors = {module: parts.pop("factor") for module, parts in modules.items() if "factor" in parts}
    tokens = {module: parts.pop("tokens") for module, parts in modules.items() if "tokens" in parts}
    _check_kind(file, settings, modules, factors)
    updates = {
        module: update_of(str(path), settings, tensors, module, parts) for module, parts in modules.items() if parts
    }
    if not updates and not saved and not factors and not tokens:
        raise FileFormatError(f"{file}: expected the tensors of an adapter, got none. Save it again.")
    rows = {module: (name, _rows(path, settings, module)) for module, name in tokens.items()}
    parts = AdapterParts(path, tensors, updates, saved, factors, rows, settings.get("fan_in_fan_out") is True)
    notes = _choices(settings, [*updates])
    return Adapter(path, (path / CONFIGURATION, file), settings, tensors, parts, notes)


def _sorted(file: Path, tensors: LazyMapping) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Module -> which part of its update -> name; and parameter -> name, for what was saved whole."""
    modules: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in tensors:
        inner = name.removeprefix("base_model.model.")
        ending = next((ending for ending in ENDINGS if inner.endswith(ending)), None)
        if ending is not None:
            modules.setdefault(inner.removesuffix(ending), {})[ENDINGS[ending]] = name
        elif any(part in inner for part in (".lora_", "token_adapter", ".hada_", ".lokr_", ".ia3_")):
            raise FileFormatError(
                f"{file}: expected factors A and B of LoRA, got {name}. Merge this adapter with peft."
            )
        elif ".original_module." not in inner:  # a copy of the base
            saved[inner.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
    inside = [module for module in modules if ".base_layer." in module]
    if inside:  # torch's attention, wrapped within what is wrapped
        raise FileFormatError(
            f"{file}: expected layers that are adapted once, got the output projection inside an adapted attention "
            f"({first_few(inside)}), which versions of peft count once or twice. "
            "Merge this adapter with the version that trained it, and use the merged model."
        )
    return modules, saved


def _check_kind(
    file: Path, settings: Settings, modules: Mapping[str, Mapping[str, str]], factors: Mapping[str, str]
) -> None:
    """Factors of the kind that the configuration says, and of no other."""
    wrong = [name for name in factors.values() if settings.kind != "IA3"]
    for parts in modules.values():
        wanted = {"LOHA": ".hada_", "LOKR": ".lokr_", "IA3": ".ia3_"}.get(settings.kind, ".lora_")
        wrong += [name for name in parts.values() if wanted not in name]
    if wrong:
        raise FileFormatError(
            f"{file}: expected tensors of an adapter with peft_type {settings.kind}, got {first_few(wrong)}. "
            "Use the configuration that was saved with them."
        )


def _rows(path: Path, settings: Settings, module: str) -> tuple[int, ...]:
    """The tokens whose rows were trained in a module's table.

    Raises:
        FileFormatError: the configuration does not list them.
    """
    found = settings.get("token_indices", settings.get("trainable_token_indices"))
    if isinstance(found, dict):
        found = next((rows for key, rows in found.items() if module == key or module.endswith("." + key)), None)
    whole = isinstance(found, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in found)
    if not whole or len(set(found or [])) != len(found or []):
        raise FileFormatError(
            f"{path}: expected the trained tokens of {module} in trainable_token_indices, got none or a token twice. "
            "Save the adapter again."
        )
    return tuple(found or [])


def _choices(settings: Settings, modules: list[str]) -> tuple[str, ...]:
    """Modules for which several entries of alpha_pattern fit, and differ: the order of training is not saved."""
    if not settings.get("alpha_pattern"):
        return ()
    several = [module for module in modules if len(set(settings.fitting("alpha_pattern", module))) > 1]
    if not several:
        return ()
    return (
        f"alpha_pattern has several entries of different value for {first_few(several)}; the first in the file counts, "
        "as when peft opens it",
    )


def _same_place(name: str, embedding: str) -> bool:
    return name == embedding or embedding.endswith("." + name) or name.endswith("." + embedding)
