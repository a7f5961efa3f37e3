"""What a parameter's name says: the block it belongs to or lies behind, and whether it projects attention.

Names are read component by component, never by substring: ``layers.1`` is not ``layers.11``, and ``pattn`` is no
``attn``. They may carry any prefix (``visual.``, ``trunk.``, ``vision_model.``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["block_of", "is_after_blocks", "is_attention", "is_bias", "is_mlp", "number_of_blocks"]

# `blocks.3`: a list of blocks or stages, then the index.
_LISTS = frozenset({"blocks", "h", "layer", "layers", "resblocks", "stages"})
# `layer1` … `layer4` of residual networks, counted from one.
_RESNET_STAGE = re.compile(r"layer([1-9])\Z")
# `encoder_layer_3` of torchvision's vision transformers.
_TORCHVISION_LAYER = re.compile(r"encoder_layer_(\d+)\Z")
# Whatever comes before the blocks may have numbered stages of its own.
_BEFORE_BLOCKS = frozenset({"embeddings", "patch_embed", "patch_embedding", "patch_embeddings", "stem"})
_BEHIND_BLOCKS = frozenset(
    {
        *("attn_pool", "attn_pool_contrastive", "attnpool", "pooler"),
        *("fc_norm", "final_layer_norm", "layernorm", "ln", "ln_f", "ln_final", "ln_post", "norm", "post_layernorm"),
        *("proj", "text_projection", "visual_projection", "logit_bias", "logit_scale"),
        *("classifier", "fc", "final_conv", "head", "head_dist", "heads", "lm_head"),
    }
)
_ATTENTION = frozenset({"attn", "attention", "self_attn", "self_attention"})
_MLP = frozenset({"feed_forward", "ffn", "mlp"})
_NORM = re.compile(r"(\A|_)(ln|norm|layernorm)(\d|_|\Z)")
_WEIGHT_OR_BIAS = re.compile(r"(\A|_)(weight|bias)\Z")


def block_of(name: str) -> int | None:
    """Return the index, from 0, of the transformer block or stage that a parameter belongs to.

    The outermost numbered list counts: the stage of a ConvNeXt or ResNet, not the block within it.

    Args:
        name: a parameter's name.

    Returns:
        The index, or None for what lies outside the blocks (embeddings, last normalisation, projection).

    Examples:
        >>> block_of("transformer.resblocks.3.attn.in_proj_weight")
        3
        >>> block_of("trunk.stages.2.blocks.7.mlp.fc1.weight")
        2
        >>> block_of("layer4.0.conv1.weight")
        3
        >>> block_of("ln_post.weight") is None
        True
    """
    found = _find_block(name.split("."))
    return None if found is None else found[0]


def number_of_blocks(names: Iterable[str]) -> int:
    """Return the number of blocks L of a model: one more than the largest index, 0 without any block."""
    return 1 + max((index for index in map(block_of, names) if index is not None), default=-1)


def is_after_blocks(name: str) -> bool:
    """Whether a parameter outside the blocks acts on their output: last normalisation, pooling, projection, head.

    A name without such a component is taken to lie before them (embeddings, stem). The order of a network's parameters
    is no guide: open_clip registers ``proj`` first.

    Examples:
        >>> is_after_blocks("ln_post.weight"), is_after_blocks("attnpool.positional_embedding")
        (True, True)
        >>> is_after_blocks("ln_pre.weight"), is_after_blocks("trunk.patch_embed.proj.weight")
        (False, False)
        >>> is_after_blocks("trunk.blocks.11.norm.weight")
        False
    """
    first = next((part for part in name.split(".") if part in _BEFORE_BLOCKS or part in _BEHIND_BLOCKS), None)
    return first in _BEHIND_BLOCKS and block_of(name) is None


def is_attention(name: str) -> bool:
    """Whether a parameter is a weight or bias of a query, key, value or output projection inside a block.

    Normalisations, scales and position tables within the attention are not, nor is a pooling attention behind the
    blocks.

    Examples:
        >>> is_attention("transformer.resblocks.0.attn.out_proj.bias")
        True
        >>> is_attention("blocks.0.attn.q_norm.weight"), is_attention("attnpool.q_proj.weight")
        (False, False)
    """
    return _is_linear_of(name, _ATTENTION)


def is_mlp(name: str) -> bool:
    """Whether a parameter is a weight or bias of the feed-forward part of a block, e.g. ``…3.mlp.c_fc.weight``."""
    return _is_linear_of(name, _MLP)


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias: ``out_proj.bias`` and ``in_proj_bias`` alike."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def _find_block(parts: list[str]) -> tuple[int, int] | None:
    """The block's index, and the position of the first component inside the block."""
    for position, part in enumerate(parts):
        if part in _BEFORE_BLOCKS:
            return None
        if part in _LISTS and position + 1 < len(parts) and parts[position + 1].isdecimal():
            return int(parts[position + 1]), position + 2
        if stage := _RESNET_STAGE.match(part):
            return int(stage[1]) - 1, position + 1
        if layer := _TORCHVISION_LAYER.match(part):
            return int(layer[1]), position + 1
    return None


def _is_linear_of(name: str, owners: frozenset[str]) -> bool:
    parts = name.split(".")
    found = _find_block(parts)
    if found is None:
        return False
    inside = parts[found[1] :]
    owner = next((position for position, part in enumerate(inside) if part in owners), None)
    if owner is None:
        return False
    rest = inside[owner + 1 :]
    return (
        bool(rest)
        and _WEIGHT_OR_BIAS.search(rest[-1]) is not None
        and not any(_NORM.search(part.lower()) for part in rest)
    )
