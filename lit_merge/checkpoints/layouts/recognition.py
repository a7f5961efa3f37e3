"""Which library's names a checkpoint is in, and what comes before them: told by the structure of the names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["NO_PARAMETERS", "OPEN_CLIP_TEXT", "Recognised", "recognise"]

_HEAD = re.compile(r"(classification_head|classifier|heads?)\..*")
_HEAD_BESIDE = re.compile(r"(.*\.)?" + _HEAD.pattern)
_LOGIT_SCALE = re.compile("logit_(scale|bias)")
NO_PARAMETERS = {
    "position indices": re.compile(r"(.*\.)?position_ids"),
    "attention mask": re.compile(r"(.*\.)?attn_mask"),
    "OpenAI's integers": re.compile(r"(.*\.)?(input_resolution|context_length|vocab_size)"),
}
OPEN_CLIP_TEXT = re.compile(
    r"((transformer|token_embedding|ln_final|text|text_decoder)\..*)|positional_embedding|text_projection|cls_emb"
)
# Layout -> rule -> names that are no part of the image tower.
_RULES: dict[str, dict[str, re.Pattern[str]]] = {
    "open_clip": {**NO_PARAMETERS, "text tower": OPEN_CLIP_TEXT, "logit scale": _LOGIT_SCALE},
    "image tower": {**NO_PARAMETERS, "logit scale": _LOGIT_SCALE},
    "transformers": {
        **NO_PARAMETERS,
        "text tower": re.compile(r"text_model\..*|text_projection\.weight"),
        "logit scale": _LOGIT_SCALE,
    },
    "timm": {},
    "linearised": {},
    "own": {},
}
# What wraps a model and says so: DataParallel and DistributedDataParallel, and torch.compile.
_WRAPPER = re.compile(r"(module\.|_orig_mod\.)+")
_RESNET = re.compile(r"(conv[123]|bn[123]|layer[1-4]|attnpool)\..*")
_DEEPEST = 12  # components of a prefix
_PARAMETER_LIST = re.compile(r"params0?\.\d+")


@dataclass(frozen=True)
class Recognised:
    """What the names of a checkpoint say about it.

    Attributes:
        layout: ``"open_clip"`` (a whole CLIP, OpenAI's names too), ``"image tower"`` (open_clip's, without
            ``visual.``), ``"transformers"``, ``"timm"`` (a ViT of CLIP's kind), ``"linearised"`` (lists of parameters
            without names), or ``"own"``: anything else.
        prefix: what the names begin with before the layout's own; ``""`` if nothing.
        left_out: rule -> names that are no part of the image tower, as they are in the checkpoint.
    """

    layout: str
    prefix: str = ""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def recognise(tensors: Mapping[str, Tensor]) -> Recognised:
    """Say which layout a checkpoint's names are in, from the names alone.

    A prefix is whatever comes before a structure that is known; only the names of a classification head may be outside
    it. It is never taken to be one if what remains does not fit.

    Args:
        tensors: name -> tensor; nothing is read.

    Returns:
        The layout, the prefix and the names left out; of an unknown structure ``"own"``, with the prefix of
        DistributedDataParallel or torch.compile at most.

    Examples:
        >>> import torch
        >>> names = ["cls_token", "norm_pre.weight", "blocks.0.attn.qkv.weight"]
        >>> recognised = recognise({f"model.{name}": torch.zeros(1) for name in names})
        >>> recognised.layout, recognised.prefix
        ('timm', 'model.')
    """
    names = list(tensors)
    for prefix in _common_prefixes(names):
        inside = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        outside = tuple(name for name in names if not name.startswith(prefix))
        layout = next((layout for layout, fits in _KINDS if fits(inside)), None)
        if layout is not None:
            return Recognised(layout, prefix, _left_out(layout, names, prefix, outside))
    wrappers = {match[0] if (match := _WRAPPER.match(name)) else "" for name in names}
    return Recognised("own", wrappers.pop() if len(wrappers) == 1 else "")


def _common_prefixes(names: Sequence[str]) -> Iterator[str]:
    """``""``, then longer and longer ones, of whole components, that all names begin with but those of heads."""
    prefix = ""
    yield prefix
    beginnings = [name.split(".", _DEEPEST)[:-1] for name in names if not _HEAD_BESIDE.fullmatch(name)]
    for components in zip(*beginnings, strict=False):
        if len(set(components)) > 1:
            return
        prefix += components[0] + "."
        yield prefix


def _is_image_tower(names: set[str]) -> bool:
    return (
        {"class_embedding", "transformer.resblocks.0.attn.in_proj_weight"} <= names
        or ("attnpool.positional_embedding" in names and all(map(_RESNET.fullmatch, names)))
        or (
            any(name.startswith("trunk.") for name in names)
            and all(name.startswith(("trunk.", "head.")) for name in names)
        )
    )


def _is_open_clip(names: set[str]) -> bool:
    tower = {name.removeprefix("visual.") for name in names if name.startswith("visual.")}
    others = [name for name in names if not name.startswith("visual.")]
    return _is_image_tower(tower) and any(map(OPEN_CLIP_TEXT.fullmatch, others))


def _is_transformers(names: set[str]) -> bool:
    anchors = {"embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight"}
    return anchors <= names or {f"vision_model.{name}" for name in anchors} <= names


def _is_timm_clip(names: set[str]) -> bool:
    return {"cls_token", "norm_pre.weight", "blocks.0.attn.qkv.weight"} <= names


def _is_timm(names: set[str]) -> bool:
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= names


def _is_linearised(names: set[str]) -> bool:
    return {"params0.0", "params.0"} <= names and all(map(_PARAMETER_LIST.fullmatch, names))


_KINDS: tuple[tuple[str, Callable[[set[str]], bool]], ...] = (
    ("open_clip", _is_open_clip),
    ("image tower", _is_image_tower),
    ("transformers", _is_transformers),
    ("timm", _is_timm_clip),
    ("linearised", _is_linearised),
    ("own", _is_timm),  # under its own names, but a prefix before these is known to be one
)


def _left_out(layout: str, names: Sequence[str], prefix: str, outside: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Rule -> names; a name belongs to the first rule that it follows."""
    rules = dict(_RULES[layout])
    inside = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    if layout in ("open_clip", "transformers") or "class_embedding" in inside.values():  # in a trunk: the projection
        rules["head"] = _HEAD
    found: dict[str, list[str]] = {rule: [] for rule in (*rules, "head")}
    for full, name in inside.items():
        rule = next((rule for rule, pattern in rules.items() if pattern.fullmatch(name)), None)
        if rule is not None:
            found[rule].append(full)
    found["head"] += outside
    return {rule: tuple(those) for rule, those in found.items() if those}
