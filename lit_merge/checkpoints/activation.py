"""Which activation function weights were trained with, as far as what lies beside them says so.

No tensor tells QuickGELU from GELU, but a network that computes the other one is another network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_merge.checkpoints.opening import OpenedCheckpoint
from lit_merge.errors import StructureMismatchError

__all__ = ["IMAGE_TOWER", "Activations", "activations_of", "check_activation", "check_activations"]

Activations = Mapping[str, str]
"""Part of the network -> its activation function; the part is "" where the file does not say of which."""

_KEYS = ("hidden_activation", "hidden_act", "activation_function", "activation", "feed_forward_proj")
_MODEL_FILES = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")  # what configurations are of
_SAME = {  # spellings of one function
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "swish": "silu",
}
_CLIP_TYPES = {"clip": ("text_config", "vision_config"), "clip_vision_model": ("",), "clip_text_model": ("",)}
_QUICK = "quick_gelu"  # of transformers' CLIP, unless its configuration says something else
_DEEPEST = 4  # objects within objects in a configuration
IMAGE_TOWER = "vision_config"
"""The part that is fine-tuned and merged of a CLIP."""


def activations_of(opened: OpenedCheckpoint) -> Activations:
    """What the header, a Lightning checkpoint's entry or the configuration beside the weights says; may be empty."""
    known = str(opened.metadata.get("activation") or opened.other.get("activation") or "")
    if known:
        return {IMAGE_TOWER: known}
    # Beside a file of another name a configuration may be another model's.
    if not opened.path.is_dir() and opened.path.name.partition(".")[0] not in _MODEL_FILES:
        return {}
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    own = _read(folder / "open_clip_config.json").get("model_cfg")
    if isinstance(own, dict) and "timm_model_name" not in (own.get("vision_cfg") or {}):
        return dict.fromkeys((IMAGE_TOWER, "text_config"), _QUICK if own.get("quick_gelu") else "gelu")
    return _configured(_read(folder / "config.json"))


def check_activations(base: Activations, got: Activations, what: str, base_name: str) -> None:
    """Refuse weights that were trained with another activation function than the base computes.

    Raises:
        StructureMismatchError: both are known of a part, and differ.
    """
    for part, wanted in base.items():
        known = got.get(part, wanted)
        if known != wanted:
            raise StructureMismatchError(_refusal(what, wanted, known, base_name, f"Use a base model with {known}."))


def check_activation(wanted: str, known: str, what: str, base_name: str, made_from: str = "") -> None:
    """The same of an open_clip model, whose name says what it computes.

    Args:
        wanted: what the model computes; empty if it is not known.
        known: what the weights were trained with; empty if it is not known.
        what: how the message calls the weights.
        base_name: how it calls the model.
        made_from: the model that the weights say they were made from.

    Raises:
        StructureMismatchError: both are known, and differ.
    """
    if not wanted or not known or wanted == known:
        return
    plain = base_name.removesuffix("-quickgelu")
    right = f"{plain}-quickgelu" if known == _QUICK else plain
    right = made_from if made_from not in ("", base_name) else right
    model = f"model {right}, or " if right != base_name else ""
    advice = f"Use {model}a configuration with quick_gelu: {str(known == _QUICK).lower()}."
    raise StructureMismatchError(_refusal(what, wanted, known, base_name, advice))


def _refusal(what: str, wanted: str, known: str, base_name: str, advice: str) -> str:
    return (
        f"{what}: expected weights for the activation {wanted}, which {base_name or 'the base model'} computes, got "
        f"ones trained with {known}. {advice}"
    )


def _configured(config: Mapping[str, Any]) -> dict[str, str]:
    found = dict(_named(config, "", 0))
    if len(found) == 1 and "" in found and config.get("model_type") in _CLIP_TYPES:
        found = {_part(config): found[""]}
    for part in _CLIP_TYPES.get(str(config.get("model_type")), ()):
        found.setdefault(part or _part(config), _QUICK)
    return found


def _part(config: Mapping[str, Any]) -> str:
    """Which part of a CLIP it is whose configuration stands alone."""
    return str(config.get("model_type")).removeprefix("clip_").replace("_model", "_config")


def _named(config: Mapping[str, Any], part: str, depth: int) -> list[tuple[str, str]]:
    own = [config[key] for key in _KEYS if isinstance(config.get(key), str)]
    if str(config.get("model_type")).startswith("gemma") and not isinstance(config.get("hidden_activation"), str):
        own = []  # an older version's hidden_act, which the library does not follow
    found = [(part, _SAME.get(own[0], own[0]))] if own else []
    for key, value in config.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            found += _named(value, f"{part}.{key}" if part else key, depth + 1)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    """An object in a JSON file; empty if there is none. What only describes refuses nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
