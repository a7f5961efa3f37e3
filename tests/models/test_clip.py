"""The encoder: built, loaded and saved as open_clip would, and every refusal."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from lit_merge import FineTuneModule, TaskVector
from lit_merge.errors import (
    ConfigurationError,
    DataError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.models import Preprocessing, full_clip_model, load_clip, save_clip
from lit_merge.models.encoder import _open_clip_configs, clip_activation
from lit_merge.params import fingerprint

TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture(scope="module")
def whole(config):
    torch.manual_seed(0)
    return full_clip_model(config)[0].eval()


@pytest.fixture(scope="module")
def weights(whole, tmp_path_factory):
    return str(
        save_clip(tmp_path_factory.mktemp("weights") / "tiny.safetensors", whole.state_dict(), {}, torch.float32)
    )


@pytest.fixture
def changed(whole, tmp_path):
    """Save the state dict after a change, as a PyTorch file."""

    def save(change):
        state = dict(whole.state_dict())
        change(state)
        path = tmp_path / "changed.pt"
        torch.save(state, path)
        return str(path)

    return save


def write_json(folder, content, name="model.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def one_line(error):
    assert isinstance(error.value, LitMergeError)
    text = str(error.value)
    assert "\n" not in text
    return text


# Agreement with open_clip


def test_features_and_texts_are_those_of_open_clip(config, weights, whole):
    clip = load_clip(config, weights)
    images = torch.randn(3, 3, 16, 16)
    texts = ["a photo of a cat.", "the digit 7.", "x"]
    with torch.no_grad():
        torch.testing.assert_close(clip.visual.eval()(images), whole.encode_image(images), rtol=0, atol=0)
        expected = whole.encode_text(open_clip.SimpleTokenizer(context_length=16)(texts), normalize=True)
    encoded = clip.encode_text(texts)
    torch.testing.assert_close(encoded, expected, rtol=0, atol=0)
    torch.testing.assert_close(encoded.norm(dim=1), torch.ones(3))
    assert not encoded.requires_grad
    assert clip.logit_scale == pytest.approx(float(whole.logit_scale.detach().exp()))


def test_features_are_raw(config):
    features = load_clip(config, "random").visual(torch.randn(4, 3, 16, 16))
    assert features.shape == (4, 12)
    assert (features.norm(dim=1) - 1).abs().max() > 1e-3


def test_parameters_have_the_towers_own_names_and_float32(config, whole):
    parameters = dict(load_clip(config, "random").visual.named_parameters())
    assert list(parameters) == [name for name, _ in whole.visual.named_parameters()]
    assert "transformer.resblocks.1.attn.in_proj_weight" in parameters
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    assert all(tensor.requires_grad for tensor in parameters.values())


@pytest.mark.parametrize(
    ("vision", "extra"),
    [
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, {}),
        ({"image_size": 32, "timm_model_name": "convnext_atto", "timm_pool": ""}, {}),
        (TINY["vision_cfg"], {"custom_text": True}),
        (
            {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            {"custom_text": True, "multimodal_cfg": {"context_length": 16, "width": 8, "heads": 2, "layers": 1}},
        ),
    ],
    ids=["resnet", "convnext", "custom text", "coca"],
)
def test_other_towers_load_as_well(vision, extra, tmp_path):
    text = {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True} if "multimodal_cfg" in extra else None
    path = write_json(tmp_path, {**TINY, "vision_cfg": vision, **extra, **({"text_cfg": text} if text else {})})
    whole, tokenizer = full_clip_model(path)
    file = save_clip(tmp_path / "whole.safetensors", whole.state_dict(), {}, torch.float32)
    clip = load_clip(path, str(file))
    size = vision["image_size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = clip.visual.eval()(images)
        torch.testing.assert_close(features, whole.eval().encode_image(images, normalize=False))
        torch.testing.assert_close(clip.encode_text(["a cat"]), whole.encode_text(tokenizer(["a cat"]), normalize=True))
    assert features.shape == (2, 12)


def test_the_full_model_trains(config):
    model, tokenizer = full_clip_model(config)
    images, texts, scale = model(torch.randn(2, 3, 16, 16), tokenizer(["a cat", "a dog"]))
    (scale * images @ texts.T).sum().backward()
    assert model.visual.conv1.weight.grad is not None
    assert model.training


def test_every_random_weight_is_initialised(tmp_path, monkeypatch):
    vision = {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 16, "width": 8, "heads": 2, "layers": 1}
    content = {**TINY, "vision_cfg": vision, "text_cfg": text, "custom_text": True, "multimodal_cfg": decoder}
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    model, _ = full_clip_model(write_json(tmp_path, content))
    assert [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()] == []


def test_random_weights_follow_the_seed(config):
    first, again, other = (load_clip(config, "random") for seed in (1, 1, 2) if torch.manual_seed(seed))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.text_fingerprint == again.text_fingerprint != other.text_fingerprint
    assert first.pretrained == "random"
    assert first.name == "tiny"


def test_the_shipped_architecture(tmp_path):
    clip = load_clip("lit-tiny", "random")
    assert (clip.name, clip.preprocessing) == ("lit-tiny", Preprocessing(32))
    assert clip.visual(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


def test_the_shipped_weights_are_the_default(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_merge.models.encoder._ASSETS", tmp_path)
    write_json(tmp_path, TINY, "lit-tiny.json")
    with pytest.raises(ConfigurationError) as error:
        load_clip()
    assert "lit-tiny.safetensors" in one_line(error)
    assert "'random'" in one_line(error)
    save_clip(tmp_path / "lit-tiny.safetensors", whole.state_dict(), {}, torch.float32)
    expected = fingerprint(dict(whole.visual.named_parameters()))
    assert [load_clip(*given).fingerprint for given in ((), ("lit-tiny", "shipped"))] == [expected] * 2
    assert load_clip().pretrained == "shipped"


def test_importing_the_models_does_not_import_open_clip():
    code = "import lit_merge.models, sys; assert not {'open_clip', 'lightning', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_weights_come_back_in_float32(config, whole, tmp_path, dtype):
    path = save_clip(tmp_path / "deep" / "clip.safetensors", whole.state_dict(), {"made by": "a test"}, dtype)
    clip = load_clip(config, str(path))
    for name, parameter in clip.visual.named_parameters():
        stored = whole.visual.state_dict()[name].to(dtype).float()
        torch.testing.assert_close(parameter.detach(), stored, rtol=0, atol=0)
    assert clip.logit_scale == pytest.approx(float(whole.logit_scale.detach().exp()), rel=1e-6)
    assert clip.fingerprint == fingerprint(dict(clip.visual.named_parameters()))
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.safetensors"]


def test_saved_weights_are_what_open_clip_reads(config, whole, tmp_path):
    path = save_clip(tmp_path / "clip.safetensors", whole.state_dict(), {"epoch": "3"}, torch.float32)
    other = open_clip.CLIP(**TINY)
    open_clip.load_checkpoint(other, str(path), strict=True)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_saving_refuses(whole, tmp_path):
    state = whole.state_dict()
    for arguments, expected in [
        (("clip.pt", state), "ends in .safetensors"),
        (("clip.safetensors", whole.visual.state_dict()), "whole CLIP"),
        (("clip.safetensors", {k: v for k, v in state.items() if k.startswith("visual.")}), "whole CLIP"),
        (("clip.safetensors", state, {}, torch.int8), "floating dtype"),
    ]:
        with pytest.raises(ConfigurationError) as error:
            save_clip(tmp_path / arguments[0], *arguments[1:])
        assert expected in one_line(error)
    with pytest.raises(NonFiniteError) as error:
        save_clip(tmp_path / "clip.safetensors", {**state, "text_projection": torch.full((8, 12), 1e6)})
    assert "text_projection" in one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}]
)
def test_a_pytorch_file_of_a_state_dict(config, weights, whole, tmp_path, wrap):
    path = tmp_path / "clip.pt"
    torch.save(wrap(whole.state_dict()), path)
    clip, expected = load_clip(config, str(path)), load_clip(config, weights)
    assert clip.fingerprint == expected.fingerprint
    assert clip.text_fingerprint == expected.text_fingerprint


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_hostile_pickle_is_refused_and_not_run(config, whole, tmp_path):
    mark = tmp_path / "ran"
    torch.save({**whole.state_dict(), "evil": Hostile(mark)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(FileFormatError) as error:
            load_clip(config, str(tmp_path / name))
        assert name in one_line(error)
        assert "asks for posix.mkdir" in one_line(error)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_a_truncated_file_is_refused(config, whole, weights, tmp_path, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(whole.state_dict(), path)
    else:
        path.write_bytes(Path(weights).read_bytes())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError) as error:
        load_clip(config, str(path))
    assert path.name in one_line(error)


@pytest.mark.parametrize("content", [[1, 2], {}, torch.zeros(3)])
def test_a_pytorch_file_of_anything_else_is_refused(config, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(FileFormatError, match=r"other\.pt: expected tensors, got none "):
        load_clip(config, str(tmp_path / "other.pt"))


def test_plain_values_beside_the_weights_are_no_weights(config, whole, tmp_path):
    torch.save({**whole.state_dict(), "epoch": 3, "name": "tiny"}, tmp_path / "noted.pt")
    assert load_clip(config, str(tmp_path / "noted.pt")).fingerprint == fingerprint(
        dict(whole.visual.named_parameters())
    )
    torch.save({"epoch": 3, "visual.proj": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(StructureMismatchError, match=r"31 missing \(class_embedding"):
        load_clip(config, str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        (lambda s: s.pop("visual.ln_post.bias"), StructureMismatchError, "1 missing (ln_post.bias)"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), StructureMismatchError, "1 unexpected (extra)"),
        (
            lambda s: s.update({"visual.proj": torch.zeros(16, 7)}),
            StructureMismatchError,
            "proj (16, 7) instead of (16, 12)",
        ),
        (lambda s: s.update({"visual.proj": torch.full((16, 12), torch.nan)}), NonFiniteError, "proj"),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("visual.")],
            FileFormatError,
            "names starting with 'visual.', got",
        ),
    ],
    ids=["missing", "unexpected", "shape", "not finite", "no image tower"],
)
def test_the_image_tower_must_fit(config, changed, change, kind, expected):
    with pytest.raises(kind) as error:
        load_clip(config, changed(change))
    assert expected in one_line(error)


def test_the_text_tower_must_fit_once_it_is_needed(config, changed):
    clip = load_clip(config, changed(lambda s: (s.pop("ln_final.bias"), s.pop("logit_scale"))))
    with pytest.raises(StructureMismatchError) as error:
        clip.encode_text(["a cat"])
    assert "ln_final.bias" in one_line(error)
    with pytest.raises(FileFormatError) as error:
        _ = clip.logit_scale
    assert "logit_scale" in one_line(error)


# The text tower


def test_the_text_tower_is_lazy_and_droppable(config, weights):
    clip = load_clip(config, weights)
    print_of_text, _ = clip.text_fingerprint, clip.logit_scale
    assert not clip.text.loaded
    before = clip.encode_text(["a cat"])
    assert clip.text.loaded
    assert clip.text_fingerprint == load_clip(config, weights).text_fingerprint == print_of_text
    clip.drop_text()
    assert not clip.text.loaded
    torch.testing.assert_close(clip.encode_text(["a cat"]), before, rtol=0, atol=0)


def test_a_dropped_random_text_tower_is_gone(config):
    clip, same = (load_clip(config, "random") for _ in range(2) if torch.manual_seed(0))
    scale, print_of_text = same.logit_scale, same.text_fingerprint
    clip.drop_text()
    clip.drop_text()
    assert (clip.logit_scale, clip.text_fingerprint) == (scale, print_of_text)
    with pytest.raises(ConfigurationError) as error:
        clip.encode_text(["a cat"])
    assert "before drop_text()" in one_line(error)


def test_the_text_fingerprint_sees_weights_and_config(config, weights, changed, tmp_path):
    original = load_clip(config, weights).text_fingerprint
    moved = changed(lambda s: s.update({"text_projection": s["text_projection"] + 1}))
    assert load_clip(config, moved).text_fingerprint != original
    seen = changed(lambda s: s.update({"visual.proj": s["visual.proj"] + 1}))
    assert load_clip(config, seen).text_fingerprint == original
    quick = write_json(tmp_path, {**TINY, "quick_gelu": True})
    assert load_clip(quick, weights).text_fingerprint != original


def test_loading_leaves_the_random_state_alone(config, weights):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_clip(config, weights).encode_text(["a cat"])
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    path = write_json(tmp_path, {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 100}})
    with pytest.raises(ConfigurationError) as error:
        load_clip(path, "random").encode_text(["a cat"])
    assert "vocab_size 100" in one_line(error)


def test_towers_with_other_packages_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = write_json(tmp_path, {**TINY, "text_cfg": {**TINY["text_cfg"], "hf_tokenizer_name": "nobody/nothing"}})
    with pytest.raises(ConfigurationError) as error:
        load_clip(path, "random").encode_text(["a cat"])
    assert "transformers" in one_line(error)


# Tags, with local stand-ins for what would be downloaded


@pytest.fixture
def small_vit_b_32(tmp_path, monkeypatch):
    known = _open_clip_configs()
    assert known.keys() <= set(open_clip.list_models())  # others may have been added in this process
    (tmp_path / "ViT-B-32.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(
        "lit_merge.models.encoder._open_clip_configs", lambda: {**known, "ViT-B-32": tmp_path / "ViT-B-32.json"}
    )


@pytest.mark.parametrize(
    ("model", "tag", "quick_gelu"),
    [("ViT-B-32", "openai", True), ("ViT-B/32", "laion2b_s34b_b79k", False), ("ViT-B-32", "laion2b-s34b-b79k", False)],
)
def test_a_tag_brings_its_weights_and_its_activation(small_vit_b_32, weights, monkeypatch, model, tag, quick_gelu):
    asked = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda settings: asked.append(settings) or weights)
    clip = load_clip(model, tag)
    assert len(asked) == 1
    assert asked[0]["hf_hub"]
    reference = open_clip.CLIP(**TINY, quick_gelu=quick_gelu).eval()
    open_clip.load_checkpoint(reference, weights)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(clip.visual.eval()(images), reference.encode_image(images), rtol=0, atol=0)
    assert (clip.name, clip.pretrained) == ("ViT-B-32", tag)


def test_a_tag_brings_its_preprocessing(small_vit_b_32, weights, monkeypatch):
    settings = {"hf_hub": "a/b/", "mean": (0.5, 0.5, 0.5), "std": [0.1, 0.2, 0.3], "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: settings)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda settings: weights)
    expected = Preprocessing(16, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), "bicubic", "squash")
    assert load_clip("ViT-B-32", "openai").preprocessing == expected


def test_a_failed_download_names_what_it_wanted(small_vit_b_32, monkeypatch):
    def offline(settings):
        raise OSError("Network is unreachable\nwith a long\ntrace")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ConfigurationError) as error:
        load_clip("ViT-B-32", "laion2b_s34b_b79k")
    text = one_line(error)
    for part in ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "laion2b_s34b_b79k", "Network is unreachable", "the path"):
        assert part in text


# Refusals of names and configs


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("ViT-B-33", None, ["'ViT-B-33'", "Did you mean ViT-B-32"]),
        ("vit-b-32", None, ["Did you mean ViT-B-32"]),
        ("lit-tinny", None, ["Did you mean lit-tiny"]),
        ("zzzzzzzz", None, ["Use one of lit-tiny"]),
        ("some/where.json", None, ["some/where.json", "no file"]),
        ("ViT-B-32", None, ["'random' for untrained weights, the path of a checkpoint, or one of its tags: openai, "]),
        ("ViT-B-32", "laion2b_s34b_b97k", ["a tag, a path or 'random'", "Did you mean laion2b_s34b_b79k"]),
        ("ViT-B-32", "shipped", ["'shipped'"]),
        ("ViT-B-32", "runs/clip.bin", ["runs/clip.bin", "no file"]),
        ("ViT-B-32", "clip.safetensors", ["clip.safetensors", "no file"]),
        (
            "CONFIG",
            None,
            [
                "tiny: expected pretrained",
                "no published tags",
                "'random' for untrained weights, the path of a checkpoint",
            ],
        ),
        ("CONFIG", "openai", ["'openai'", "no published tags"]),
    ],
)
def test_refused_names(config, model, pretrained, expected):
    with pytest.raises(ConfigurationError) as error:
        load_clip(config if model == "CONFIG" else model, pretrained)
    text = one_line(error)
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        ("{", FileFormatError, "JSON"),
        ("[1]", FileFormatError, "embed_dim"),
        ({"embed_dim": 3, "vision_cfg": {}}, FileFormatError, "without text_cfg"),
        ({**TINY, "vision_cfg": 3}, FileFormatError, "without vision_cfg"),
        ({**TINY, "vision_cfg": {"depth": 3}}, ConfigurationError, "'depth'"),
        ({**TINY, "colour": 3}, ConfigurationError, "'colour'"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": [16, 24]}}, ConfigurationError, "square"),
        ({"model_cfg": TINY, "preprocess_cfg": 3}, FileFormatError, "preprocess_cfg"),
    ],
)
def test_refused_configs(tmp_path, content, kind, expected):
    path = write_json(tmp_path, content)
    with pytest.raises(kind) as error:
        load_clip(path, "random")
    assert expected in one_line(error)


def test_a_config_with_preprocessing(tmp_path):
    content = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}}
    clip = load_clip(write_json(tmp_path, content), "random")
    assert clip.preprocessing == Preprocessing(16, (0.5,) * 3, (0.5,) * 3, "bilinear", "shortest")


# Preprocessing


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_arrays_of_the_right_size_need_no_transform(resize_mode):
    preprocessing = Preprocessing(16, resize_mode=resize_mode)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    transform = preprocessing.transform()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = torch.stack([transform(picture) for picture in pictures])
    before = images.clone()
    torch.testing.assert_close(preprocessing.normalise(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(images, before)


def test_the_transform_is_open_clips_for_evaluation():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70), dtype=np.uint8))
    ours = Preprocessing(16, interpolation="bilinear").transform()(picture)
    theirs = open_clip.image_transform(16, is_train=False, interpolation="bilinear")(picture)
    assert ours.shape == (3, 16, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 8, dtype=torch.uint8), torch.zeros(3, 16, 16).byte()]
)
def test_other_arrays_are_refused(images):
    with pytest.raises(DataError) as error:
        Preprocessing(16).normalise(images)
    assert "expected uint8 [N, 3, 16, 16], got" in one_line(error)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image_size": 0}, "image_size"),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"mean": (1.0,)}, "three numbers"),
        ({"interpolation": "cubic"}, "bicubic, bilinear, random"),
        ({"resize_mode": "crop"}, "shortest, longest, squash"),
    ],
)
def test_refused_preprocessing(fields, expected):
    with pytest.raises(ConfigurationError) as error:
        Preprocessing(**fields)
    assert expected in one_line(error)


# The activation function, which no weight shows


@pytest.fixture(scope="module")
def towers(config, weights, tmp_path_factory):
    """The same weights under GELU and under QuickGELU: name -> the module that trains or evaluates them."""
    folder = tmp_path_factory.mktemp("activations")
    quick = folder / "tiny-quickgelu.json"
    quick.write_text(json.dumps({**TINY, "quick_gelu": True}))
    return {"gelu": FineTuneModule(config, weights), "quick_gelu": FineTuneModule(str(quick), weights)}


def test_the_activation_is_part_of_the_base(towers, config, weights, tmp_path):
    for name, module in towers.items():
        assert module.clip.activation == module.base.activation == module.base_description()["activation"] == name
        assert module.base.activations == {"vision_config": name}
    assert towers["gelu"].base_fingerprint == towers["quick_gelu"].base_fingerprint
    for other in (
        {"timm_model_name": "resnet18"},
        {"layers": [1, 1, 1, 1], "width": 8},
    ):
        path = write_json(tmp_path, {**TINY, "vision_cfg": {**TINY["vision_cfg"], **other}})
        assert clip_activation(path, "random") == ""


def test_what_was_trained_under_one_activation_is_refused_under_the_other(towers, config, weights, tmp_path):
    gelu, quick = towers["gelu"], towers["quick_gelu"]
    metadata = {**quick.base_description(), "base_model": "ViT-B-32-quickgelu"}
    zero = {name: torch.zeros_like(one) for name, one in quick.encoder.named_parameters()}
    vector = TaskVector(zero, "digits", metadata=metadata)
    quick.load_task_vector(vector)
    line = "expected weights for the activation gelu, which tiny computes, got ones trained with quick_gelu. Use model "
    with pytest.raises(StructureMismatchError) as refused:
        gelu.load_task_vector(vector)
    assert one_line(refused).startswith(f"task vectors (digits): {line}ViT-B-32-quickgelu, or a configuration with")
    gelu.load_task_vector(TaskVector(zero, "digits", metadata={"base_fingerprint": gelu.base_fingerprint}))
    state = load_clip(config, weights).visual.state_dict()
    whole = {
        **{f"visual.{name}": one for name, one in state.items()},
        "logit_scale": torch.ones(()),
        "text": state["proj"],
    }
    path = save_clip(tmp_path / "tuned.safetensors", whole, {"activation": "quick_gelu"}, torch.float32)
    quick.load_weights(path)
    for attempt in (lambda: gelu.load_weights(path), lambda: load_clip(config, str(path))):
        with pytest.raises(StructureMismatchError) as refused:
            attempt()
        assert one_line(refused).startswith(f"{path}: {line}tiny-quickgelu, or a configuration with quick_gelu: true")
    checkpoint = {}
    quick.on_save_checkpoint(checkpoint)
    assert checkpoint["activation"] == "quick_gelu"
    with pytest.raises(StructureMismatchError) as refused:
        gelu.on_load_checkpoint(checkpoint)
    assert one_line(refused).startswith(f"checkpoint: {line}")
    del checkpoint["activation"]
    gelu.on_load_checkpoint(checkpoint)
