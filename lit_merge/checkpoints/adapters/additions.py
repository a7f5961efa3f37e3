"""What an adapter asks for that its base's file has not: an output head of its own, biases.

A causal language model whose head is its embedding has no head in its file. peft adapts the two modules, not the one
tensor, so that an adapter of one of them leaves a model whose head and embedding differ: a base with one more tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.files.lazy import LazyMapping, Slicer
from lit_merge.files.text import read_json

__all__ = ["Additions", "Extended", "bias_additions", "is_embedding", "is_head", "model_settings", "tied_head"]

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out")
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_OTHERS = ("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
# Where transformers' networks have biases once the entry of the configuration is true: parts of a module's name.
_BIASES = {
    "attention_bias": (".self_attn.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mlp_bias": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
}


@dataclass(frozen=True)
class Additions:
    """Tensors that a base is extended by, without changing what it computes.

    Attributes:
        copies: new name -> the tensor that it equals in the base.
        zeros: new name -> the weight whose rows it has as many elements as, zero.
        settings: what the model's ``config.json`` has to say then.
        reasons: why, in words.
    """

    copies: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.copies or self.zeros or self.settings)

    def __or__(self, other: Additions) -> Additions:
        return Additions(
            {**self.copies, **other.copies},
            {**self.zeros, **other.zeros},
            {**self.settings, **other.settings},
            tuple(dict.fromkeys((*self.reasons, *other.reasons))),
        )


class Extended(LazyMapping):
    """A model's tensors, or a difference of them, with what is added; what is already there stays.

    Args:
        tensors: the others.
        additions: what is added; the embedding's difference is that of a head that was tied to it, too, and the
            reverse where the one tensor goes by the head's name.
    """

    def __init__(self, tensors: LazyMapping, additions: Additions) -> None:
        self._tensors = tensors
        pairs = [pair for name, of in additions.copies.items() for pair in ((name, of), (of, name))]
        self._copies = {name: of for name, of in pairs if name not in tensors and of in tensors}
        self._zeros = {name: of for name, of in additions.zeros.items() if name not in tensors and of in tensors}

    def _of(self, name: str) -> str:
        return self._copies.get(name) or self._zeros.get(name) or name

    def __getitem__(self, name: str) -> Tensor:
        if name in self._zeros:
            return torch.zeros(self.shape(name), dtype=self.dtype(name))
        return self._tensors[self._of(name)]

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._copies
        yield from self._zeros

    def __len__(self) -> int:
        return len(self._tensors) + len(self._copies) + len(self._zeros)

    def __contains__(self, name: object) -> bool:
        return name in self._copies or name in self._zeros or name in self._tensors

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        shape = self._tensors.shape(self._of(name))
        return shape[:1] if name in self._zeros else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""
        return self._tensors.dtype(self._of(name))

    def slicer(self, name: str) -> Slicer:
        """As the other mapping reads parts."""
        return super().slicer(name) if name in self._zeros else self._tensors.slicer(self._of(name))

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As the other mapping streams what it has; what is added comes as a whole."""
        for name in names:
            if name in self._copies or name in self._zeros:
                yield name, self[name].reshape(-1)
            else:
                yield from self._tensors.stream([name])


def model_settings(files: Iterable[Path]) -> dict[str, Any]:
    """The ``config.json`` beside a model's files; empty if there is none, or it is no mapping."""
    folder = next((file.parent for file in files), None)
    if folder is None or not (folder / "config.json").is_file():
        return {}
    try:
        found = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of a language model's output head."""
    return _leaf(name) in _HEADS


def is_embedding(name: str) -> bool:
    """Whether a tensor's name is that of a language model's input embedding."""
    return _leaf(name) in _EMBEDDINGS


def tied_head(base: LazyMapping, config: Mapping[str, Any], adapter: Mapping[str, Any]) -> tuple[str, str] | None:
    """The embedding of a language model that is its head as well, and the name that the head has or would have.

    Args:
        base: the model's tensors.
        config: the model's ``config.json``; empty if unknown.
        adapter: the adapter's configuration, which may say what model it is of.

    Returns:
        Both names, the second one "" if it is not known; None if the model is none, or they are not tied.
    """
    classes = config.get("architectures") or []
    mapping = adapter.get("auto_mapping")
    own = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    named = [str(one) for one in (*(classes if isinstance(classes, list) else []), own)]
    causal = any(one.endswith(_CAUSAL) for one in named) or adapter.get("task_type") == "CAUSAL_LM"
    if config.get("tie_word_embeddings") is False or not (causal or any(one.endswith(_OTHERS) for one in named)):
        return None
    found = [name for name in base if is_embedding(name) and len(base.shape(name)) == 2]
    if len(found) != 1:
        return None
    heads = [name for name in base if is_head(name)]
    if heads:  # a copy of the embedding in the file, if the configuration says that they are tied
        return (found[0], heads[0]) if config.get("tie_word_embeddings") is True else None
    if not causal:
        alike = [name for name in base if base.shape(name) == base.shape(found[0])]
        return (found[0], "") if len(alike) == 1 else None
    # What comes before the network's own prefix, such as module., comes before the head as well.
    start = re.match(r"(?:module\.|_orig_mod\.)*", found[0])
    leaf = "embed_out" if config.get("model_type") == "gpt_neox" else "lm_head"
    return found[0], f"{start.group() if start else ''}{leaf}.weight"


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else ""


def bias_additions(base: LazyMapping, config: Mapping[str, Any], biases: Iterable[str]) -> Additions:
    """Zero biases in all places where the network has them together with those that an adapter needs.

    Args:
        base: the model's tensors.
        config: its ``config.json``.
        biases: those that the adapter changes and the base lacks.

    Returns:
        Nothing if the network cannot have them, as far as the configuration tells.
    """
    total = Additions()
    for bias in biases:
        entry = next((key for key, (part, leaves) in _BIASES.items() if _is_of(bias, part, leaves)), "")
        if entry not in config:
            return Additions()
        if entry in total.settings:
            continue
        part, leaves = _BIASES[entry]
        weights = [name for name in base if name.endswith(".weight") and _is_of(name, part, leaves)]
        zeros = {f"{name.removesuffix('weight')}bias": name for name in weights}
        missing = {name: weight for name, weight in zeros.items() if name not in base}
        why = f"{len(missing)} biases were added to the base, zero before ({entry} in config.json), for lora_bias"
        total |= Additions(zeros=missing, settings={entry: True}, reasons=(why,))
    return total


def _is_of(name: str, part: str, leaves: tuple[str, ...]) -> bool:
    return part in f".{name}" and name.rpartition(".")[0].rpartition(".")[2] in leaves
