"""What parameter names say, on the names of real towers."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers

from lit_merge.errors import StructureMismatchError
from lit_merge.naming import (
    Depth,
    block_of,
    depth_labels,
    is_after_blocks,
    is_attention,
    is_bias,
    is_mlp,
    number_of_blocks,
)

TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def names_of(vision):
    with torch.device("meta"):
        visual = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=TEXT).visual
    return [name for name, _ in visual.named_parameters()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.resblocks.3.attn.in_proj_weight", 3),
        ("visual.transformer.resblocks.11.ln_1.bias", 11),
        ("trunk.blocks.3.attn.qkv.weight", 3),
        ("blocks.0.norm1.weight", 0),
        ("encoder.layers.3.self_attn.q_proj.weight", 3),
        ("vision_model.encoder.layers.23.mlp.fc1.bias", 23),
        ("encoder.layer.7.attention.attention.query.weight", 7),
        ("encoder.layers.encoder_layer_5.self_attention.in_proj_weight", 5),
        ("trunk.stages.2.blocks.7.mlp.fc1.weight", 2),
        ("trunk.stages.1.downsample.0.weight", 1),
        ("layer1.0.conv1.weight", 0),
        ("layer4.2.downsample.1.bias", 3),
        ("h.4.attn.weight", 4),
        ("encoder.block.11.layer.1.DenseReluDense.wi_0.weight", 11),
        ("decoder.block.3.layer.0.SelfAttention.q.weight", 3),
        ("segformer.encoder.block.2.5.attention.self.query.weight", 2),
        ("model.decoder.layers.2.encoder_attn.k_proj.weight", 2),
        # outside the blocks, or only looking as if inside
        ("conv1.weight", None),
        ("class_embedding", None),
        ("ln_post.weight", None),
        ("proj", None),
        ("attnpool.q_proj.weight", None),
        ("trunk.head.norm.weight", None),
        ("trunk.stem.0.weight", None),
        ("trunk.patch_embed.backbone.stages.1.blocks.0.conv.weight", None),
        ("vit.embeddings.patch_embeddings.backbone.bit.encoder.stages.0.layers.0.conv1.weight", None),
        ("myblocks.3.weight", None),
        ("blocks.weight", None),
        ("features.1.0.block.0.weight", None),
        ("blocks", None),
        ("blocks.-1.weight", None),
        ("blocks.3a.weight", None),
        ("layer10x.weight", None),
        ("", None),
    ],
)
def test_block_of(name, expected):
    assert block_of(name) == expected


def test_indices_are_compared_as_numbers_not_as_text():
    assert {block_of(f"blocks.{index}.weight") for index in range(12)} == set(range(12))
    assert block_of("layers.11.weight") == 11


def test_number_of_blocks():
    assert number_of_blocks(["blocks.0.w", "blocks.10.w", "head.weight"]) == 11
    assert number_of_blocks(["head.weight"]) == 0
    assert number_of_blocks([]) == 0


@pytest.mark.parametrize(
    ("vision", "blocks", "attention", "mlp"),
    [
        ({"image_size": 32, "layers": 12, "width": 16, "head_width": 8, "patch_size": 16}, 12, 48, 48),
        ({"image_size": 32, "layers": [3, 4, 6, 3], "width": 8, "head_width": 8}, 4, 0, 0),
        ({"image_size": 32, "timm_model_name": "convnext_atto"}, 4, 0, None),
        ({"image_size": 32, "timm_model_name": "vit_tiny_patch16_224"}, 12, 48, 48),
    ],
    ids=["open_clip ViT", "open_clip ResNet", "timm ConvNeXt", "timm ViT"],
)
def test_real_towers(vision, blocks, attention, mlp):
    names = names_of(vision)
    assert number_of_blocks(names) == blocks
    assert {block_of(name) for name in names} == {None, *range(blocks)}
    assert sum(map(is_attention, names)) == attention
    if mlp is not None:
        assert sum(map(is_mlp, names)) == mlp
    assert not any(is_attention(name) and is_mlp(name) for name in names)


def test_the_four_sets_of_linear_parameters_of_a_vit():
    names = names_of({"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16})
    first = [name for name in names if block_of(name) == 0]
    weights = {name.split("resblocks.0.")[1] for name in first if is_attention(name) and not is_bias(name)}
    biases = {name.split("resblocks.0.")[1] for name in first if is_attention(name) and is_bias(name)}
    feed_forward = {name.split("resblocks.0.")[1] for name in first if is_mlp(name)}
    assert weights == {"attn.in_proj_weight", "attn.out_proj.weight"}
    assert biases == {"attn.in_proj_bias", "attn.out_proj.bias"}
    assert feed_forward == {"mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.q_norm.weight",
        "transformer.resblocks.0.attn.ln_k.weight",
        "transformer.resblocks.0.attn.logit_scale",
        "blocks.0.attn.relative_position_bias_table",
        "blocks.0.pattn.proj.weight",
        "blocks.0.attn_drop.weight",
        "blocks.0.attn",
        "attn_pool.attn.in_proj_weight",
        "attn.in_proj_weight",
        "encoder.layer.0.attention.output.LayerNorm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0.weight",
        "encoder.layer.0.attention.self.distance_embedding.weight",
    ],
)
def test_what_is_no_attention_projection(name):
    assert not is_attention(name)


def test_is_bias():
    assert [is_bias(f"blocks.0.attn.{leaf}") for leaf in ("in_proj_bias", "out_proj.bias", "q_bias")] == [True] * 3
    assert not is_bias("blocks.0.attn.bias_table.weight")


# What lies outside the blocks of open_clip's towers, in the order of named_parameters: before them, then behind them.
OUTSIDE = {
    "ViT-B-32 ViT-L-14": (
        "class_embedding positional_embedding conv1.weight ln_pre.weight ln_pre.bias",
        "proj ln_post.weight ln_post.bias",
    ),
    "RN50": (
        "conv1.weight bn1.weight bn1.bias conv2.weight bn2.weight bn2.bias conv3.weight bn3.weight bn3.bias",
        "attnpool.positional_embedding attnpool.k_proj.weight attnpool.k_proj.bias attnpool.q_proj.weight "
        "attnpool.q_proj.bias attnpool.v_proj.weight attnpool.v_proj.bias attnpool.c_proj.weight attnpool.c_proj.bias",
    ),
    "convnext_base": (
        "trunk.stem.0.weight trunk.stem.0.bias trunk.stem.1.weight trunk.stem.1.bias",
        "trunk.head.norm.weight trunk.head.norm.bias head.proj.weight",
    ),
    "ViT-B-16-SigLIP": (
        "trunk.pos_embed trunk.patch_embed.proj.weight trunk.patch_embed.proj.bias",
        "trunk.norm.weight trunk.norm.bias trunk.attn_pool.latent trunk.attn_pool.q.weight trunk.attn_pool.q.bias "
        "trunk.attn_pool.kv.weight trunk.attn_pool.kv.bias trunk.attn_pool.proj.weight trunk.attn_pool.proj.bias "
        "trunk.attn_pool.norm.weight trunk.attn_pool.norm.bias trunk.attn_pool.mlp.fc1.weight "
        "trunk.attn_pool.mlp.fc1.bias trunk.attn_pool.mlp.fc2.weight trunk.attn_pool.mlp.fc2.bias",
    ),
    "coca_ViT-B-32": (
        "class_embedding positional_embedding conv1.weight ln_pre.weight ln_pre.bias",
        "proj attn_pool.query attn_pool.attn.q_proj_weight attn_pool.attn.in_proj_bias attn_pool.attn.out_proj.weight "
        "attn_pool.ln_q.weight attn_pool.ln_k.bias ln_post.weight ln_post.bias",
    ),
    "PE-Core-B-16": (
        "trunk.cls_token trunk.pos_embed trunk.patch_embed.proj.weight trunk.norm_pre.weight trunk.norm_pre.bias",
        "trunk.norm.weight trunk.norm.bias trunk.attn_pool.latent trunk.head.weight trunk.head.bias",
    ),
    "swin_base_patch4_window7_224": (
        "trunk.patch_embed.proj.weight trunk.patch_embed.norm.weight trunk.patch_embed.norm.bias",
        "trunk.norm.weight trunk.norm.bias head.proj.weight",
    ),
    "ViTamin-B": (
        "trunk.pos_embed trunk.patch_embed.backbone.stem.norm1.weight trunk.patch_embed.backbone.pool.proj.weight "
        "trunk.patch_embed.backbone.pool.norm.bias trunk.patch_embed.backbone.stages.1.3.pre_norm.weight",
        "trunk.fc_norm.weight trunk.fc_norm.bias head.proj.weight",
    ),
    "MobileCLIP-S1": (
        "trunk.stem.0.conv_kxk.0.bn.weight trunk.stem.2.identity.bias",
        "trunk.final_conv.se.fc1.weight trunk.final_conv.conv_kxk.0.bn.weight trunk.head.fc.weight",
    ),
    "Hugging Face": (
        "embeddings.LayerNorm.weight swin.embeddings.norm.weight vit.embeddings.patch_embeddings.projection.weight "
        "vision_model.embeddings.patch_embedding.weight vision_model.pre_layrnorm.weight",
        "vit.layernorm.weight pooler.dense.weight classifier.weight vision_model.post_layernorm.weight "
        "vision_model.head.attention.in_proj_weight visual_projection.weight text_model.final_layer_norm.weight "
        "text_projection.weight logit_scale logit_bias transformer.ln_f.weight lm_head.weight",
    ),
    "torchvision": (
        "class_token conv_proj.weight encoder.pos_embedding",
        "encoder.ln.weight heads.head.weight heads.pre_logits.weight fc.weight",
    ),
    "timm, text, CoCa": (
        "cls_token reg_token dist_token token_embedding.weight",
        "head_dist.weight ln_final.weight attn_pool_contrastive.query",
    ),
    "transformers' language models": (
        "gpt_neox.embed_in.weight model.decoder.project_in.weight model.embed_tokens.weight",
        "model.final_layernorm.weight transformer.norm_f.weight model.decoder.project_out.weight embed_out.weight "
        "score.weight pre_classifier.bias qa_outputs.weight cls.predictions.bias vocab_transform.weight",
    ),
    "before, whatever follows": (
        "stem.norm.weight patch_embed.proj.weight patch_embedding.norm.weight patch_embeddings.ln.weight "
        "embeddings.head.weight stem.blocks.0.norm.weight patch_embedding.layers.1.weight",
        "",
    ),
    "only looking like it": (
        "reproj.weight normal.weight head_of_stem.weight headless my_ln_post.weight x.proj_in",
        "",
    ),
    "inside": (
        "transformer.resblocks.11.ln_2.weight trunk.blocks.3.attn.proj.weight trunk.blocks.11.norm.weight "
        "trunk.stages.3.head.fc.weight layer4.2.fc.bias encoder.layers.encoder_layer_5.ln.weight",
        "",
    ),
}


@pytest.mark.parametrize(("before", "behind"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_lies_behind_the_blocks(before, behind):
    assert [name for name in f"{before} {behind}".split() if is_after_blocks(name)] == behind.split()


def test_a_prefix_changes_nothing():
    for prefix in ("visual.", "encoder.visual.", "module.trunk."):
        assert is_after_blocks(f"{prefix}proj")
        assert not is_after_blocks(f"{prefix}ln_pre.weight")
        assert not is_after_blocks(f"{prefix}patch_embed.norm.weight")


def encoder_decoder(kind):
    """The parameters of a network with 3 encoder blocks and 2 decoder blocks, in the order of the modules."""
    if kind == "T5":
        config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=2, vocab_size=8)
        network = transformers.T5ForConditionalGeneration
    elif kind == "Whisper":
        config = transformers.WhisperConfig(d_model=12, encoder_layers=3, decoder_layers=2)
        network = transformers.WhisperForConditionalGeneration
    else:
        config = getattr(transformers, f"{kind}Config")(d_model=16, encoder_layers=3, decoder_layers=2)
        network = getattr(transformers, f"{kind}ForSequenceClassification")
    with torch.device("meta"):
        return [name for name, _ in network(config).named_parameters()]


@pytest.mark.parametrize("kind", ["T5", "Bart", "MBart", "Whisper"])
def test_the_blocks_of_a_decoder_come_after_those_of_the_encoder(kind):
    names = encoder_decoder(kind)
    depth = Depth(names)
    assert depth.blocks == number_of_blocks(names) == 5
    for name in names:
        number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if number is not None:
            assert depth.block(name) == depth.position(name) == number + (3 if ".decoder." in f".{name}" else 0)
            assert depth.label(name) == f"block {depth.block(name)}"
        elif "encoder.final_layer_norm" in name or "encoder.layer_norm" in name:
            assert depth.label(name) == "block 2"
        elif "head" in name or "decoder.final_layer_norm" in name or "decoder.layer_norm" in name:
            assert depth.label(name) == "head"
        else:
            assert any(word in name for word in ("embed", "shared", "conv"))
            assert depth.label(name) == "embedding"
    # Four projections of self-attention in every block, and four of cross-attention in the decoder's; two of the MLP.
    assert sum(is_attention(name) and not is_bias(name) for name in names) == 4 * 3 + 8 * 2
    assert sum(is_mlp(name) and not is_bias(name) for name in names) == 2 * 5
    assert not any(is_attention(name) and is_mlp(name) for name in names)


def test_two_encoders_share_their_depths_and_a_decoder_alone_starts_at_0():
    names = ["vision_model.encoder.layers.11.w", "text_model.encoder.layers.11.w", "text_model.final_layer_norm.w"]
    assert [Depth(names).position(name) for name in names] == [11, 11, 12]
    names = ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.1.w", "model.decoder.embed_tokens.weight"]
    assert [Depth(names).position(name) for name in names] == [0, 1, -1]
    names = [
        "encoder.encoder.layer.1.w",
        "encoder.pooler.dense.weight",
        "decoder.transformer.h.1.w",
        "decoder.lm_head.w",
    ]
    assert [Depth(names).position(name) for name in names] == [1, 1, 3, 4]


def test_depth_without_blocks_and_of_unknown_names():
    depth = Depth(["a.weight", "head.weight"])
    assert depth.blocks == 0
    assert depth.block("head.weight") is None
    assert [depth.label(name) for name in ("a.weight", "head.weight")] == ["embedding", "head"]
    assert depth_labels(2) == ("embedding", "block 0", "block 1", "head")
    with pytest.raises(StructureMismatchError, match=r"b\.weight: expected one of the 2 parameters whose"):
        depth.position("b.weight")
