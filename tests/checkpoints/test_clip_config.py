"""A CLIP's configuration in open_clip's and transformers' words; that outputs are equal is tested with merges."""

from __future__ import annotations

import pytest

from lit_merge.checkpoints.layouts.clip_config import open_clip_config, preprocessor_config, transformers_config
from lit_merge.errors import StructureMismatchError

MODEL = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 8, "patch_size": 4, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 4.0},
}


def test_there_and_back():
    theirs = transformers_config(MODEL, whole=True, dtype="float32")
    assert (theirs["model_type"], theirs["architectures"], theirs["torch_dtype"]) == ("clip", ["CLIPModel"], "float32")
    assert theirs["vision_config"]["num_attention_heads"] == 4
    assert theirs["vision_config"]["intermediate_size"] == 64
    assert open_clip_config(theirs) == {"model_cfg": MODEL, "preprocess_cfg": {}}


def test_the_image_tower_alone():
    theirs = transformers_config({**MODEL, "quick_gelu": False}, whole=False)
    assert (theirs["model_type"], theirs["hidden_act"]) == ("clip_vision_model", "gelu")
    assert theirs["architectures"] == ["CLIPVisionModelWithProjection"]
    assert not {"torch_dtype", "text_config"} & set(theirs)


def test_what_is_left_out_has_each_librarys_default():
    theirs = transformers_config({"embed_dim": 512, "vision_cfg": {"patch_size": 32}, "text_cfg": {}}, whole=True)
    assert theirs["vision_config"]["num_attention_heads"] == 12
    assert (theirs["text_config"]["vocab_size"], theirs["text_config"]["hidden_act"]) == (49408, "gelu")
    ours = open_clip_config({"model_type": "clip"})["model_cfg"]
    assert (ours["quick_gelu"], ours["embed_dim"]) == (True, 512)
    assert ours["vision_cfg"]["patch_size"] == 32
    assert ours["vision_cfg"]["head_width"] == ours["text_cfg"]["width"] // ours["text_cfg"]["heads"] == 64


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({**MODEL, "multimodal_cfg": {}}, "got multimodal_cfg in model_cfg. Write it as open_clip, or its image"),
        (
            {**MODEL, "vision_cfg": {"timm_model_name": "vit", "ls_init_value": 0.1}},
            "got ls_init_value, timm_model_name",
        ),
        ({**MODEL, "text_cfg": {"pool_type": "last"}}, "got pool_type in text_cfg"),
    ],
)
def test_what_transformers_has_not(model, line):
    with pytest.raises(StructureMismatchError, match=f"writing as transformers: expected a CLIP .*{line}"):
        transformers_config(model, whole=True)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": "siglip"}, r"whole CLIP \(model_type clip\), got siglip"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "got hidden_act gelu, quick_gelu"),
        ({"model_type": "clip", "vision_config": {"num_channels": 1}}, "got num_channels"),
        ({"model_type": "clip", "text_config": {"eos_token_id": 7}}, "got eos_token_id 7"),
        ({"model_type": "clip", "text_config": [1]}, "text_config: expected an object, got list"),
    ],
)
def test_what_open_clip_has_not(config, line):
    with pytest.raises(StructureMismatchError, match=line):
        open_clip_config(config)


def test_preprocessing():
    seen = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "squash"}
    squashed = preprocessor_config(16, seen)
    assert squashed is not None
    assert (squashed["size"], squashed["do_center_crop"]) == ({"height": 16, "width": 16}, False)
    assert (squashed["resample"], squashed["image_mean"]) == (2, [0.1, 0.2, 0.3])
    shortest = preprocessor_config(16, {**seen, "resize_mode": "shortest", "interpolation": "bicubic"})
    assert shortest is not None
    assert (shortest["size"], shortest["do_center_crop"], shortest["resample"]) == ({"shortest_edge": 16}, True, 3)
    assert preprocessor_config(16, {**seen, "resize_mode": "longest"}) is None
    assert preprocessor_config(16, {}) is None
    for made, mode, interpolation in ((squashed, "squash", "bilinear"), (shortest, "shortest", "bicubic")):
        back = open_clip_config({"model_type": "clip"}, made)["preprocess_cfg"]
        assert (back["mean"], back["std"]) == ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])
        assert (back["resize_mode"], back["interpolation"]) == (mode, interpolation)
