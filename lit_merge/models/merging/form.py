"""The form that a merged model is written in: under which library's names, and with what beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.clip_config import open_clip_config, preprocessor_config, transformers_config
from lit_merge.checkpoints.layouts.towers import check_layout, rewritten
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.text import read_json
from lit_merge.models.merging.companions import OPEN_CLIP_CONFIG, Companions, companions_of
from lit_merge.models.merging.vocabularies import FittingTokenizer
from lit_merge.models.network import Base, ClipNetwork, FileBase
from lit_merge.params import dtype_of, shape_of

__all__ = ["OWN_FORMAT", "Form", "form_of"]

OWN_FORMAT = "lit_merge_format"
"""The header entry that says what a file of weights is where ``format`` is ``pt``, as transformers 4 asks for."""

_FORMAT = "lit-merge/weights/1"
_WHOLE_FILES = ("timm", "open_clip")  # libraries that read no shards


@dataclass(frozen=True)
class Form:
    """How merged weights are written.

    Attributes:
        companions: what lies beside them; empty if the output is a file, or no folder of a library.
        write_as: the layout of names; None for the base's own.
        notes: what there is to say about it, in words.
    """

    companions: Companions = field(default_factory=Companions)
    write_as: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """Which library opens the output; empty if that is not known."""
        if self.companions:
            return self.companions.library
        return "" if self.write_as in (None, "image_tower") else str(self.write_as)

    @property
    def configured(self) -> bool:
        """Whether the output is a folder with its library's configuration."""
        return any(name in self.companions.files for name in ("config.json", OPEN_CLIP_CONFIG))

    @property
    def header(self) -> dict[str, str]:
        """The header's entries that say what the file is."""
        if self.companions or self.write_as:
            return {"format": "pt", OWN_FORMAT: _FORMAT}
        return {"format": _FORMAT}

    def tensors(self, weights: LazyMapping) -> LazyMapping:
        """The merged weights under the names to write."""
        return weights if self.write_as is None else rewritten(weights, self.write_as)[0]

    def places(self, stems: Sequence[str]) -> list[tuple[str, str]]:
        """A folder inside the output, or none, and what the weights' names begin with, for each of the models.

        Args:
            stems: of the files, as they are without companions.
        """
        if not self.companions:
            return [("", stem) for stem in stems]
        return [("" if len(stems) == 1 else stem, self.companions.stem) for stem in stems]

    def with_entries(self, entries: Mapping[str, Any]) -> Form:
        """The same with other entries in the configuration, see :meth:`Companions.with_entries`."""
        found = self.companions.with_entries(entries)
        return replace(self, companions=found, notes=(*self.notes, *found.notes[len(self.companions.notes) :]))

    def with_tokenizer(self, fitting: FittingTokenizer | None) -> Form:
        """The same with the tokenizer that fits the rows of the merge; as it is where no tokenizer is written.

        Raises:
            ConfigurationError: no model has such a tokenizer, or the configuration names a token without a row.
        """
        if fitting is None or not self.companions.tokenizer:
            return self
        if fitting.refusal:
            raise ConfigurationError(
                "rows: expected a tokenizer with exactly the tokens of the rows that are written, as tokens without a "
                f"row break the model and rows without their token are lost, got none: {fitting.refusal}. Give one of "
                "these models a tokenizer with all of them, choose other rows (base fits always), or name a file "
                "ending in .safetensors as output, which has no tokenizer."
            )
        if fitting.folder is None:
            return self
        config = self.companions.config
        for part in [one for one in (config, config.get("text_config")) if isinstance(one, Mapping)]:
            rows = part.get("vocab_size")
            for name, number in part.items():
                known = isinstance(rows, int) and isinstance(number, int) and name.endswith("_token_id")
                if known and number >= rows:
                    raise ConfigurationError(
                        f"rows: expected special tokens below {rows}, the rows that are written, got {name} {number} "
                        "in the base's config.json. Choose rows that have it (base or union)."
                    )
        found = self.companions.with_tokenizer(fitting.folder, fitting.name)
        return replace(self, companions=found, notes=(*self.notes, *found.notes[len(self.companions.notes) :]))

    def check_shards(self, files: int) -> None:
        """Refuse several files of weights where the library reads one.

        Raises:
            ConfigurationError: there are several.
        """
        if files > 1 and self.companions.library in _WHOLE_FILES:
            raise ConfigurationError(
                f"shard_size: expected one file of weights for {self.companions.library}, which opens no shards, got "
                f"{files}. Remove shard_size, or make it larger."
            )


def form_of(
    base: Base, path: str | None, is_file: bool, weights: bool, dtype: torch.dtype | None, write_as: str | None
) -> Form:
    """The form of a merge's output, from headers and configurations alone.

    Args:
        base: θ0 and the model that it is a part of.
        path: of the base's weights, as it was given; None for a network.
        is_file: whether the output is one file, which has nothing beside it.
        weights: whether whole models are written, not τ.
        dtype: that is asked for; None keeps the base's.
        write_as: the layout that is asked for.

    Raises:
        ConfigurationError: ``write_as`` is unknown, or has no place for what is written.
        StructureMismatchError: the base has no such layout.
        FileFormatError: the base's configuration is damaged.
    """
    if write_as is not None:
        check_layout(write_as)
        if not weights:
            raise ConfigurationError(
                "write_as: expected kind weights, as a library opens whole models, got a task vector. Remove one."
            )
    if not weights:
        return Form()
    own = getattr(base, "folder", None)  # of a language network
    files, path = base.files if own or isinstance(base, FileBase) else (), path or (own and str(own))
    found = companions_of(path, [one.name for one in files]) if files and path and not is_file else Companions()
    if write_as is None:
        found = found.with_dtype(dtype)
        return Form(found, None, found.notes)
    try:
        _, whole, lost = rewritten(as_lazy(base.whole()), write_as)
    except StructureMismatchError as error:
        raise StructureMismatchError(f"write_as {write_as}: {error}") from error
    notes = [f"written as {write_as}: {lost}"] if lost else []
    if is_file:
        return Form(write_as=write_as, notes=tuple(notes))
    if found and found.library == write_as:
        found = found.with_dtype(dtype)
    else:
        found, why = _in_words_of(write_as, found, base, whole, dtype)
        notes += [why] if why else []
    return Form(found, write_as, (*found.notes, *notes))


def _in_words_of(
    library: str, found: Companions, base: Base, whole: bool, dtype: torch.dtype | None
) -> tuple[Companions, str]:
    """The folder of another library, and why it has no configuration, if it has none."""
    config: Mapping[str, Any] = base.config if isinstance(base, ClipNetwork) else found.config
    try:
        made = _configurations(library, config, found, base, whole, dtype)
        why = "" if made else _unknown(library, whole, bool(config))
    except StructureMismatchError as error:
        made, why = {}, f"no configuration is written: {error}"
    keep = library in ("transformers", "open_clip")
    return found.replaced(library if library != "image_tower" else "", made, keep), why


def _unknown(library: str, whole: bool, configured: bool) -> str:
    if library == "image_tower":
        return ""
    if library == "timm":
        return "no config.json is written: give timm.create_model the architecture, whose names these are"
    if library == "open_clip" and not whole:
        return f"no {OPEN_CLIP_CONFIG} is written, as open_clip builds no image tower alone"
    reason = "is of another kind" if configured else "is not there, and weights tell no heads and no activation"
    return f"no configuration is written, as that of the base {reason}"


def _configurations(
    library: str, config: Mapping[str, Any], found: Companions, base: Base, whole: bool, dtype: torch.dtype | None
) -> dict[str, bytes]:
    if library == "transformers" and "model_cfg" in config:
        model, seen = config["model_cfg"], config.get("preprocess_cfg") or {}
        made: dict[str, Any] = {"config.json": transformers_config(model, whole, _stored(base.whole(), dtype))}
        made["preprocessor_config.json"] = preprocessor_config(_size(model), seen)
        return _as_json(made)
    if library == "open_clip" and whole and "model_cfg" in config:
        return _as_json({OPEN_CLIP_CONFIG: config})
    if library == "open_clip" and whole and config.get("model_type") == "clip":
        own = found.files.get("preprocessor_config.json")
        try:
            seen = read_json(own) if isinstance(own, Path) else None
        except ValueError:
            seen = None
        return _as_json({OPEN_CLIP_CONFIG: open_clip_config(config, seen if isinstance(seen, dict) else None)})
    return {}


def _as_json(files: Mapping[str, Any]) -> dict[str, bytes]:
    written = {name: content for name, content in files.items() if content is not None}
    return {name: (json.dumps(one, indent=2, ensure_ascii=False) + "\n").encode() for name, one in written.items()}


def _size(model: Mapping[str, Any]) -> int:
    size = model["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        raise StructureMismatchError(
            f"expected square images, got image_size {first_few(size)}. Write it as open_clip."
        )
    return size


def _stored(whole: Mapping[str, Tensor], dtype: torch.dtype | None) -> str | None:
    """The dtype of all weights but scalars, if it is one."""
    own = {dtype_of(whole, name) for name in whole if shape_of(whole, name)}
    dtypes = {dtype} if dtype else {one for one in own if one.is_floating_point}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
