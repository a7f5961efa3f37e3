"""The activation function that weights were trained with, as what lies beside them says it."""

from __future__ import annotations

import json

import pytest
import torch

from lit_merge.checkpoints.activation import activations_of, check_activation, check_activations
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.errors import StructureMismatchError
from lit_merge.files.store import write_tensors
from lit_merge.vectors import TaskVector


def weights(folder, name="model.safetensors", header=None, **files):
    folder.mkdir(exist_ok=True)
    write_tensors(folder / name, {"w": torch.ones(2)}, header or {})
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return open_checkpoint(folder if name == "model.safetensors" else folder / name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert", "hidden_act": "gelu"}, {"": "gelu"}),
        ({"model_type": "t5", "feed_forward_proj": "gated-gelu"}, {"": "gated-gelu"}),
        ({"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh"}, {"": "gelu_new"}),
        ({"model_type": "llama", "hidden_act": "swish"}, {"": "silu"}),
        ({"model_type": "gemma", "hidden_act": "gelu"}, {}),
        ({"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {"": "gelu_new"}),
        (
            {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}},
            {"vision_config": "gelu", "text_config": "quick_gelu"},
        ),
        ({"model_type": "clip_vision_model"}, {"vision_config": "quick_gelu"}),
        ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, {"vision_config": "gelu"}),
        ({"hidden_act": None}, {}),
        ("{", {}),
        ("[]", {}),
    ],
)
def test_configurations_of_transformers(config, expected, tmp_path):
    assert activations_of(weights(tmp_path, config=config)) == expected


def test_a_header_an_open_clip_folder_and_a_file_among_others(tmp_path):
    own = weights(tmp_path / "own", header={"activation": "gelu"}, config={"hidden_act": "relu"})
    assert activations_of(own) == {"vision_config": "gelu"}
    for quick, name in ((True, "quick_gelu"), (False, "gelu")):
        config = {"model_cfg": {"quick_gelu": quick, "vision_cfg": {"layers": 2}}}
        folder = weights(tmp_path / name, open_clip_config=config)
        assert activations_of(folder) == {"vision_config": name, "text_config": name}
    timm = {"model_cfg": {"vision_cfg": {"timm_model_name": "x"}}}
    assert activations_of(weights(tmp_path / "timm", open_clip_config=timm)) == {}
    another = weights(tmp_path / "files", "digits.safetensors", config={"hidden_act": "relu"})
    assert activations_of(another) == {}


def test_a_difference_takes_both_to_be_of_one_activation(tmp_path):
    config = {"model_type": "bert", "hidden_act": "gelu"}
    base = weights(tmp_path / "base", config=config)
    weights(tmp_path / "same", config={"model_type": "bert", "hidden_act": "gelu_python"})
    weights(tmp_path / "other", config={"model_type": "bert", "hidden_act": "relu"})
    assert float(TaskVector.from_checkpoints(tmp_path / "base", tmp_path / "same")["w"].sum()) == 0
    with pytest.raises(StructureMismatchError) as refused:
        TaskVector.from_checkpoints(tmp_path / "base", tmp_path / "other")
    assert str(refused.value) == (
        f"{tmp_path / 'other'}: expected weights for the activation gelu, which {base.path} computes, got ones trained "
        "with relu. Use a base model with relu."
    )


def test_another_activation_is_refused_with_the_model_that_fits():
    check_activations({"": "gelu"}, {}, "a", "b")
    check_activations({"": "gelu"}, {"vision_config": "relu"}, "a", "b")
    check_activation("", "gelu", "a", "b")
    check_activation("gelu", "", "a", "b")
    with pytest.raises(StructureMismatchError) as refused:
        check_activations({"": "gelu"}, {"": "relu"}, "tuned", "bert")
    assert str(refused.value) == (
        "tuned: expected weights for the activation gelu, which bert computes, got ones trained with relu. "
        "Use a base model with relu."
    )
    cases = {
        ("gelu", "quick_gelu", "ViT-B-32", ""): "ViT-B-32-quickgelu",
        ("quick_gelu", "gelu", "ViT-B-32-quickgelu", ""): "ViT-B-32",
        ("quick_gelu", "gelu", "ViT-B-32", "ViT-B-32-256"): "ViT-B-32-256",
    }
    for (wanted, known, base, made_from), right in cases.items():
        with pytest.raises(StructureMismatchError, match=f"Use model {right}, or a configuration with quick_gelu: "):
            check_activation(wanted, known, "tuned", base, made_from)
    with pytest.raises(StructureMismatchError, match="Use a configuration with quick_gelu: false"):
        check_activation("quick_gelu", "gelu", "tuned", "ViT-B-32")
