"""What a parameter's name says: the block it belongs to, precedes or follows, and whether it projects attention.

Names are read component by component, never by substring: ``layers.1`` is not ``layers.11``, and ``pattn`` is no
``attn``. They may carry any prefix (``visual.``, ``trunk.``, ``vision_model.``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lit_merge.errors import StructureMismatchError

__all__ = [
    *(
        "Depth",
        "block_of",
        "block_path",
        "depth_labels",
        "is_after_blocks",
        "is_attention",
        "is_bias",
        "is_buffer",
        "is_head",
    ),
    *("is_mlp", "is_running_statistic", "is_vocabulary", "number_of_blocks"),
]

# `blocks.3`: a list of blocks or stages, then the index.
_LISTS = frozenset({"blocks", "h", "layer", "layers", "resblocks", "stages"})
# `encoder.block.3` of T5, whose blocks have numbered layers; `block` alone is the inside of torchvision's blocks.
_STACKS = frozenset({"encoder", "decoder"})
# `layer1` … `layer4` of residual networks, counted from one.
_RESNET_STAGE = re.compile(r"layer([1-9])\Z")
# `encoder_layer_3` of torchvision's vision transformers.
_TORCHVISION_LAYER = re.compile(r"encoder_layer_(\d+)\Z")
# Whatever comes before the blocks may have numbered stages of its own.
_BEFORE_BLOCKS = frozenset({"embeddings", "patch_embed", "patch_embedding", "patch_embeddings", "stem"})
_AFTER_BLOCKS = frozenset(
    {
        *("attn_pool", "attn_pool_contrastive", "attnpool", "pooler"),
        *("fc_norm", "final_layer_norm", "final_layernorm", "final_norm", "layernorm", "norm", "norm_f"),
        *("ln", "ln_f", "ln_final", "ln_post", "post_layernorm"),
        *("proj", "project_out", "text_projection", "visual_projection", "logit_bias", "logit_scale"),
        *("embed_out", "final_conv"),
    }
)
# The last normalisation of mBART's and Whisper's stacks.
_STACK_NORM = re.compile(r"(\A|\.)(encoder|decoder)\.layer_norm\.")
_ATTENTION = frozenset(
    {
        *("attn", "attention", "self_attn", "self_attention", "SelfAttention"),
        *("cross_attn", "crossattention", "encoder_attn", "EncDecAttention", "multihead_attn"),
    }
)
_MLP = frozenset({"feed_forward", "ffn", "mlp", "DenseReluDense"})
# Of the feed-forward part without a component of its own: BART's and BERT's layers.
_MLP_OF_BLOCK = frozenset({"fc1", "fc2", "intermediate", "output"})
# Normalisations and tables of positions within an attention or a feed-forward part.
_NO_PROJECTION = re.compile(r"(\A|_)((ln|norm|layernorm)(\d|_|\Z)|(relative|position|distance)_)")
_WEIGHT_OR_BIAS = re.compile(r"(\A|_)(weight|bias)\Z")
_RUNNING = frozenset({"running_mean", "running_var"})
# What networks compute when they are built, whether or not a version of a library stores it.
_BUFFERS = frozenset(
    {
        *("position_ids", "token_type_ids", "bbox_position_ids", "inv_freq", "original_inv_freq", "masked_bias"),
        *("attn_mask", "relative_position_index", "relative_coords_table", "rel_pos_index", "cos_cached", "sin_cached"),
        *("num_batches_tracked", "input_resolution", "context_length", "vocab_size"),
    }
)
_CAUSAL_MASK = re.compile(r"(\A|\.)h\.\d+\.(attn|attention|attn\.attention)\.bias\Z")  # GPT-2's, GPT-Neo's, GPT-J's
_TASK_HEAD = frozenset(
    {
        *("classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "cls", "lm_head", "v_head"),
        *("head", "heads", "head_dist", "fc", "final_layer", "sequence_summary", "summary", "span_classifier"),
        *(
            "vocab_transform",
            "vocab_layer_norm",
            "vocab_projector",
            "multi_modal_predictor",
            "discriminator_predictions",
        ),
        *("generator_predictions", "generator_lm_head", "multiple_choice_head", "regression_head", "reward_head"),
    }
)
_ENDS = _AFTER_BLOCKS | _TASK_HEAD
_VOCABULARY = frozenset(
    {
        *("embed_tokens", "word_embeddings", "wte", "shared", "token_embedding", "tok_embeddings", "lm_head"),
        *("embed_in", "embed_out", "token_embd", "output_embeddings"),
    }
)
_VOCABULARY_BIAS = re.compile(r"(\A|\.)(cls\.predictions\.(decoder\.)?(weight|bias)|final_logits_bias)\Z")


class Depth:
    """The parameters of a network from its input to its output: before the blocks, block 0 … L − 1, after the blocks.

    A network of an encoder and a decoder (T5, BART, Whisper) has one running depth: of L_e and L_d blocks, encoder
    block i is block i and decoder block i is block L_e + i, L = L_e + L_d. What follows the encoder's blocks (its last
    normalisation, its pooling) counts to the last of them, what precedes the decoder's (its embeddings) to what is
    before the blocks. Two encoders beside each other, as a CLIP has, share the depths.

    The program published with LiNeS has vision transformers only. Its rule, the smallest i for which ``.i.`` is in the
    name, takes the layers within a T5's blocks for blocks: 0, 1 and 2 for all of them.

    Args:
        names: of all parameters of the network, in any order.

    Attributes:
        blocks: their number L.

    Examples:
        >>> names = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"]
        >>> names += ["encoder.final_layer_norm.weight", "decoder.block.0.layer.1.EncDecAttention.q.weight"]
        >>> names += ["lm_head.weight"]
        >>> depth = Depth(names)
        >>> [depth.label(name) for name in names]
        ['embedding', 'block 0', 'block 0', 'block 1', 'head']
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = tuple(names)
        counts = {False: 0, True: 0}  # of the encoder, or the only stack, and of the decoder
        for name in names:
            if (block := block_of(name)) is not None:
                counts[_in_decoder(name)] = max(counts[_in_decoder(name)], block + 1)
        self.blocks = sum(counts.values())
        self._encoder = counts[False] if counts[True] else 0
        self._positions = {name: self._position(name) for name in names}

    def position(self, name: str) -> int:
        """Return -1 for a parameter before the blocks, its block's index, 0 … L − 1, or L for one after the blocks.

        Raises:
            StructureMismatchError: it was not among the names.
        """
        if name not in self._positions:
            raise StructureMismatchError(
                f"{name}: expected one of the {len(self._positions)} parameters whose depth is known, got another. "
                "Use the names of the whole network."
            )
        return self._positions[name]

    def block(self, name: str) -> int | None:
        """Return the index of the block of a parameter; None outside the blocks.

        Raises:
            StructureMismatchError: it was not among the names.
        """
        position = self.position(name)
        return position if 0 <= position < self.blocks else None

    def label(self, name: str) -> str:
        """Return ``embedding`` before the blocks, ``block 0`` …, and ``head`` after them.

        Raises:
            StructureMismatchError: it was not among the names.
        """
        return depth_labels(self.blocks)[self.position(name) + 1]

    def _position(self, name: str) -> int:
        block, decoder = block_of(name), _in_decoder(name)
        if block is not None:
            return block + (self._encoder if decoder else 0)
        if not is_after_blocks(name):
            return -1
        ends_encoder = self._encoder and not decoder and "encoder" in name.split(".")
        return self._encoder - 1 if ends_encoder else self.blocks


def depth_labels(blocks: int) -> tuple[str, ...]:
    """Return the labels of the positions -1 … L of a network with L blocks: ``embedding``, ``block 0``, …, ``head``."""
    return ("embedding", *(f"block {block}" for block in range(blocks)), "head")


def number_of_blocks(names: Iterable[str]) -> int:
    """Return the number of blocks L of a model, those of its encoder and its decoder together; 0 without any block."""
    return Depth(names).blocks


def block_of(name: str) -> int | None:
    """Return the index, from 0, of the transformer block or stage that a parameter belongs to in its own stack.

    The outermost numbered list counts: the stage of a ConvNeXt or ResNet, not the block within it; the block of a T5,
    not the layer within it. The index over an encoder and a decoder is that of :class:`Depth`.

    Args:
        name: a parameter's name.

    Returns:
        The index, or None for what is outside the blocks (embeddings, last normalisation, projection).

    Examples:
        >>> block_of("transformer.resblocks.3.attn.in_proj_weight")
        3
        >>> block_of("trunk.stages.2.blocks.7.mlp.fc1.weight")
        2
        >>> block_of("layer4.0.conv1.weight")
        3
        >>> block_of("encoder.block.11.layer.1.DenseReluDense.wi.weight")
        11
        >>> block_of("ln_post.weight") is None
        True
    """
    found = _find_block(name.split("."))
    return None if found is None else found[0]


def block_path(name: str) -> str | None:
    """Return the path of the module that is a parameter's block, as :func:`block_of` counts them.

    Examples:
        >>> block_path("transformer.resblocks.3.attn.in_proj_weight"), block_path("layer4.0.conv1.weight")
        ('transformer.resblocks.3', 'layer4')
        >>> block_path("ln_post.weight") is None
        True
    """
    parts = name.split(".")
    found = _find_block(parts)
    return None if found is None else ".".join(parts[: found[1]])


def is_after_blocks(name: str) -> bool:
    """Whether a parameter outside the blocks acts on their output: last normalisation, pooling, projection, head.

    A name without such a component is taken to be before them (embeddings, stem). The order of a network's parameters
    is no guide: open_clip registers ``proj`` first.

    Examples:
        >>> is_after_blocks("ln_post.weight"), is_after_blocks("attnpool.positional_embedding")
        (True, True)
        >>> is_after_blocks("ln_pre.weight"), is_after_blocks("trunk.patch_embed.proj.weight")
        (False, False)
        >>> is_after_blocks("trunk.blocks.11.norm.weight")
        False
    """
    first = next((part for part in name.split(".") if part in _BEFORE_BLOCKS or part in _ENDS), None)
    after = first in _ENDS or (first is None and _STACK_NORM.search(name) is not None)
    return after and block_of(name) is None


def is_attention(name: str) -> bool:
    """Whether a parameter is a weight or bias of a query, key, value or output projection inside a block.

    Normalisations, scales and position tables within the attention are not, nor is a pooling attention after the
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
    return _is_linear_of(name, _MLP, _MLP_OF_BLOCK)


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias: ``out_proj.bias`` and ``in_proj_bias`` alike."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is a batch normalisation's running mean or variance: a measurement, no parameter.

    Examples:
        >>> is_running_statistic("layer1.0.bn1.running_var"), is_running_statistic("layer1.0.bn1.weight")
        (True, False)
    """
    return name.rpartition(".")[2] in _RUNNING


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that networks compute when they are built, and libraries store or not.

    Examples:
        >>> is_buffer("embeddings.position_ids"), is_buffer("h.0.attn.bias"), is_buffer("h.0.attn.c_attn.bias")
        (True, True, False)
    """
    return name.rpartition(".")[2] in _BUFFERS or _CAUSAL_MASK.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a parameter outside the blocks belongs to a head that tasks have of their own.

    Examples:
        >>> is_head("classifier.weight"), is_head("fc.bias"), is_head("cls.predictions.bias")
        (True, True, True)
        >>> is_head("encoder.layer.0.output.dense.weight"), is_head("embeddings.word_embeddings.weight")
        (False, False)
    """
    return block_of(name) is None and any(part in _TASK_HEAD for part in name.split(".")[:-1])


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a parameter are those of a vocabulary: a table of tokens, or the head that predicts them.

    Examples:
        >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("lm_head.weight"), is_vocabulary("wpe.weight")
        (True, True, False)
    """
    parts = name.split(".")
    of_table = len(parts) > 1 and parts[-2] in _VOCABULARY
    return block_of(name) is None and (of_table or _VOCABULARY_BIAS.search(name) is not None)


def _find_block(parts: list[str]) -> tuple[int, int] | None:
    """The block's index, and the position of the first component inside the block."""
    for position, part in enumerate(parts):
        if part in _BEFORE_BLOCKS:
            return None
        of_stack = part == "block" and position > 0 and parts[position - 1] in _STACKS
        if (part in _LISTS or of_stack) and position + 1 < len(parts) and parts[position + 1].isdecimal():
            return int(parts[position + 1]), position + 2
        if stage := _RESNET_STAGE.match(part):
            return int(stage[1]) - 1, position + 1
        if layer := _TORCHVISION_LAYER.match(part):
            return int(layer[1]), position + 1
    return None


def _in_decoder(name: str) -> bool:
    parts = name.split(".")
    found = _find_block(parts)
    return "decoder" in (parts if found is None else parts[: found[1]])


def _is_linear_of(name: str, owners: frozenset[str], of_block: frozenset[str] = frozenset()) -> bool:
    parts = name.split(".")
    found = _find_block(parts)
    if found is None:
        return False
    inside = parts[found[1] :]
    if inside and inside[0] in of_block:
        owner: int | None = 0
    else:
        owner = next((position for position, part in enumerate(inside) if part in owners), None)
    if owner is None:
        return False
    rest = inside[owner + 1 :]
    return (
        bool(rest)
        and _WEIGHT_OR_BIAS.search(rest[-1]) is not None
        and not any(_NO_PROJECTION.search(part.lower()) for part in rest)
    )
