"""CLIPs of open_clip, transformers and timm: the same numbers under every library's names, and the same outputs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from lit_merge.checkpoints.layouts.towers import image_tower, linearised_pair, recognise, whole_clip, written_as
from lit_merge.errors import ConfigurationError, LitMergeError, StructureMismatchError
from lit_merge.files.lazy import LazyMapping, Slicer
from lit_merge.vectors import LazyTensors

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 4, "layers": 3}


def clip_of_open_clip(seed: int = 0, vision: Mapping[str, Any] = VISION) -> CLIP:
    torch.manual_seed(seed)
    return _random(CLIP(16, dict(vision), dict(TEXT), quick_gelu=True))


def configuration() -> CLIPConfig:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32, "num_attention_heads": 4}
    text = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 12}
    text |= {"vocab_size": 64, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 63}
    shared = {"projection_dim": 16, "hidden_act": "quick_gelu"}
    return CLIPConfig(
        vision_config={**vision, "intermediate_size": 64, **shared}, text_config={**text, **shared}, projection_dim=16
    )


def clip_of_transformers(kind: type = CLIPModel, seed: int = 1) -> nn.Module:
    config = configuration()
    torch.manual_seed(seed)
    return _random(kind(config.vision_config if kind in VISION_MODELS else config))


VISION_MODELS = (CLIPVisionModel, CLIPVisionModelWithProjection)


def clip_of_timm(seed: int = 2, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 16, "patch_size": 8, **settings}
    model = _random(timm.create_model("vit_base_patch32_clip_quickgelu_224", img_size=32, mlp_ratio=2.0, **settings))
    if model.num_classes:
        nn.init.zeros_(model.head.bias)
    return model


def _random(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew: no two are equal, as the ones and zeros of fresh normalisations are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return model.eval()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def texts() -> Tensor:
    tokens = torch.randint(2, 63, (4, 12), generator=torch.Generator().manual_seed(6))
    tokens[:, -3:] = 0
    tokens[:, -4] = 63  # the end of the text is the largest index
    return tokens


def tower_of(state: Mapping[str, Tensor]) -> LazyMapping:
    return image_tower(state, recognise(state))


def assert_identical(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def visual(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


class Counting(LazyMapping):
    """Tensors in memory; counts what is read of them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = dict(tensors), dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.read[name] += self.tensors[name].numel()
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def slicer(self, name: str) -> Slicer:
        def read(start: int, stop: int, out: Tensor) -> None:
            self.read[name] += stop - start
            out.copy_(self.tensors[name].reshape(-1)[start:stop])

        return read

    def what_was_read(self) -> dict[str, int]:
        return {name: count for name, count in self.read.items() if count}


# transformers and open_clip


def test_a_whole_clip_of_transformers_computes_the_same_in_open_clip(tmp_path: Path) -> None:
    theirs = clip_of_transformers()
    theirs.save_pretrained(tmp_path)
    stored = LazyTensors(tmp_path / "model.safetensors")
    recognised = recognise(stored)
    assert (recognised.layout, recognised.prefix) == ("transformers", "")
    assert sorted(recognised.left_out) == ["logit scale", "text tower"]
    assert recognised.left_out["logit scale"] == ("logit_scale",)
    assert sorted(recognised.left_out["text tower"]) == sorted(
        name for name in theirs.state_dict() if name.startswith(("text_model.", "text_projection."))
    )

    ours = clip_of_open_clip()
    ours.load_state_dict(dict(whole_clip(stored, recognised)))
    with torch.no_grad():
        outputs = theirs(input_ids=texts(), pixel_values=images())
        image_features = ours.encode_image(images(), normalize=True)
        text_features = ours.encode_text(texts(), normalize=True)
        logits = ours.logit_scale.exp() * image_features @ text_features.T
    torch.testing.assert_close(image_features, outputs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_features, outputs.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, outputs.logits_per_image, atol=1e-5, rtol=1e-5)

    assert_identical(written_as(whole_clip(stored, recognised), "transformers"), load_file(stored.path))


def test_a_whole_clip_of_open_clip_computes_the_same_in_transformers() -> None:
    ours, theirs = clip_of_open_clip(), clip_of_transformers()
    state = ours.state_dict()
    recognised = recognise(state)
    assert (recognised.layout, recognised.prefix) == ("open_clip", "")
    assert sorted(recognised.left_out) == ["logit scale", "text tower"]
    assert set(recognised.left_out["text tower"]) == {
        name for name in state if not name.startswith(("visual.", "logit_scale"))
    }
    written = written_as(whole_clip(state, recognised), "transformers")
    theirs.load_state_dict(dict(written))
    with torch.no_grad():
        outputs = theirs(input_ids=texts(), pixel_values=images())
        torch.testing.assert_close(ours.encode_image(images(), normalize=True), outputs.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.encode_text(texts(), normalize=True), outputs.text_embeds, atol=1e-5, rtol=0)
    assert torch.equal(theirs.logit_scale, ours.logit_scale)
    assert_identical(whole_clip(written, recognise(written)), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_image_tower_of_transformers_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = clip_of_transformers(CLIPVisionModelWithProjection).to(dtype)
    theirs.save_pretrained(tmp_path)
    stored = LazyTensors(tmp_path / "model.safetensors")
    recognised = recognise(stored)
    assert recognised.layout == "transformers"
    assert recognised.left_out == {}
    tower = image_tower(stored, recognised)
    assert {tower.dtype(name) for name in tower} == {dtype}
    ours = clip_of_open_clip().to(dtype)
    ours.visual.load_state_dict(dict(tower))
    with torch.no_grad():
        expected = theirs.double()(images().double()).image_embeds
        torch.testing.assert_close(ours.double().visual(images().double()), expected, atol=1e-5, rtol=0)
    assert_identical(written_as(tower, "transformers"), load_file(stored.path))


def test_an_image_tower_of_open_clip_computes_the_same_in_transformers() -> None:
    ours, theirs = clip_of_open_clip(), clip_of_transformers(CLIPVisionModelWithProjection)
    tower = tower_of(ours.state_dict())
    assert_identical(tower, ours.visual.state_dict())
    written = written_as(tower, "transformers")
    theirs.load_state_dict(dict(written))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images()).image_embeds, ours.visual(images()), atol=1e-5, rtol=0)
    assert_identical(tower_of(written), ours.visual.state_dict())


def test_names_that_older_versions_of_transformers_saved() -> None:
    state = clip_of_transformers().state_dict()
    old = {
        **state,
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(12)[None],
    }
    recognised = recognise(old)
    assert recognised.left_out["position indices"] == (
        "vision_model.embeddings.position_ids",
        "text_model.embeddings.position_ids",
    )
    assert not any(name.endswith("position_ids") for name in recognised.left_out["text tower"])
    assert_identical(whole_clip(old, recognised), whole_clip(state, recognise(state)))
    assert_identical(image_tower(old, recognised), tower_of(state))


@pytest.mark.parametrize("start", ["", "vision_model."])
def test_a_vision_model_without_projection_is_refused(start: str, tmp_path: Path) -> None:
    clip_of_transformers(CLIPVisionModel).save_pretrained(tmp_path)
    stored = prefixed(load_file(tmp_path / "model.safetensors"), start)
    recognised = recognise(stored)
    assert (recognised.layout, recognised.prefix) == ("transformers", "")
    with pytest.raises(
        StructureMismatchError,
        match=r"^checkpoint in the layout 'transformers': expected the image tower's projection "
        r"\(visual_projection.weight\), got a tower without it. Use a checkpoint with the projection "
        r"\(CLIPModel, CLIPVisionModelWithProjection\), or keep its own names.$",
    ):
        image_tower(stored, recognised)


def test_the_head_of_a_classifier_is_left_out_by_rule() -> None:
    state = clip_of_transformers(CLIPForImageClassification).state_dict()
    recognised = recognise(state)
    assert recognised.left_out == {"head": ("classifier.weight", "classifier.bias")}
    with pytest.raises(StructureMismatchError, match="expected the image tower's projection"):
        image_tower(state, recognised)
    with_projection = {**state, "visual_projection.weight": torch.ones(16, 32)}
    assert "proj" in tower_of(with_projection)


def test_a_text_model_alone_keeps_its_names() -> None:
    torch.manual_seed(0)
    state = CLIPTextModelWithProjection(configuration().text_config).state_dict()
    assert recognise(state).layout == "own"
    with pytest.raises(
        StructureMismatchError,
        match=r"'own': expected a CLIP with an image tower, got none that is known. Keep its own",
    ):
        tower_of(state)


def test_packed_projections_are_queries_keys_values_in_this_order() -> None:
    state = clip_of_transformers().state_dict()
    packed = tower_of(state)["transformer.resblocks.1.attn.in_proj_weight"]
    for index, which in enumerate("qkv"):
        part = packed[32 * index : 32 * (index + 1)]
        assert torch.equal(part, state[f"vision_model.encoder.layers.1.self_attn.{which}_proj.weight"])


def test_pieces_read_only_what_is_asked_for() -> None:
    start = "vision_model.encoder.layers.0.self_attn."
    theirs = Counting(clip_of_transformers().state_dict())
    tower = image_tower(theirs, recognise(theirs))
    assert tower.shape("transformer.resblocks.0.attn.in_proj_weight") == (96, 32)
    assert theirs.what_was_read() == {}
    read = tower.slicer("transformer.resblocks.0.attn.in_proj_weight")
    assert theirs.what_was_read() == {}
    whole = torch.cat([theirs.tensors[f"{start}{which}_proj.weight"] for which in "qkv"]).reshape(-1)
    for first, last, expected in [
        (1000, 1010, {"q": 10}),
        (1020, 1030, {"q": 4, "k": 6}),
        (1020, 2050, {"q": 4, "k": 1024, "v": 2}),
        (2048, 3072, {"v": 1024}),
        (7, 7, {}),
    ]:
        out = torch.full((last - first,), torch.nan)
        read(first, last, out)
        assert torch.equal(out, whole[first:last])
        assert theirs.what_was_read() == {f"{start}{which}_proj.weight": count for which, count in expected.items()}
        theirs.read = dict.fromkeys(theirs.read, 0)

    ours = Counting(clip_of_open_clip().state_dict())
    written = written_as(whole_clip(ours, recognise(ours)), "transformers")
    out = torch.empty(5, dtype=torch.float64)
    written.slicer(f"{start}k_proj.weight")(3, 8, out)
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(out.float(), ours.tensors[name].reshape(-1)[1027:1032])
    assert ours.what_was_read() == {name: 5}


def test_every_tensor_is_the_same_in_pieces_and_as_a_whole() -> None:
    theirs, ours = clip_of_transformers().state_dict(), clip_of_open_clip().state_dict()
    for tensors in (
        whole_clip(theirs, recognise(theirs)),
        tower_of(theirs),
        written_as(ours, "transformers"),
        written_as(tower_of(ours), "timm"),
    ):
        for name in tensors:
            flat = torch.full((tensors.shape(name).numel(),), torch.nan)
            read = tensors.slicer(name)
            for start in range(0, len(flat), 7):
                read(start, min(start + 7, len(flat)), flat[start : start + 7])
            assert tensors.shape(name) == tensors[name].shape
            assert torch.equal(flat.view(tensors.shape(name)), tensors[name])
        assert "nothing" not in tensors
        with pytest.raises(KeyError):
            tensors["nothing"]


def test_a_split_projection_does_not_keep_the_packed_one_in_memory() -> None:
    written = written_as(clip_of_open_clip().state_dict(), "transformers")
    part = written["vision_model.encoder.layers.0.self_attn.k_proj.weight"]
    assert part.untyped_storage().nbytes() == part.nbytes


def test_conversions_of_files_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    clip_of_transformers().save_pretrained(tmp_path)
    stored = LazyTensors(tmp_path / "model.safetensors")
    tower = image_tower(stored, recognise(stored))
    assert_identical(pickle.loads(pickle.dumps(tower)), tower)


# prefixes


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "encoder.", "image_encoder.model.", "module.image_encoder.model.", "_orig_mod."]
)
def test_prefixes_are_recognised_by_what_remains(prefix: str) -> None:
    state = clip_of_open_clip().state_dict()
    for plain, layout, start in (
        (state, "open_clip", ""),
        (visual(state), "image tower", ""),
        ({name: tensor for name, tensor in state.items() if name.startswith("visual.")}, "image tower", "visual."),
        (clip_of_transformers().state_dict(), "transformers", ""),
        (clip_of_timm().state_dict(), "timm", ""),
    ):
        under = prefixed(plain, prefix)
        recognised = recognise(under)
        assert (recognised.layout, recognised.prefix) == (layout, prefix + start)
        assert_identical(image_tower(under, recognised), tower_of(plain))
        assert all(name in under for names in recognised.left_out.values() for name in names)


def test_the_papers_encoders_and_classifiers() -> None:
    """An image encoder is an open_clip model whose text transformer was deleted; a classifier adds a head beside it."""
    ours = clip_of_open_clip()
    encoder = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("transformer.")}
    recognised = recognise(prefixed(encoder, "model."))
    assert (recognised.layout, recognised.prefix) == ("open_clip", "model.")
    assert_identical(tower_of(prefixed(encoder, "model.")), ours.visual.state_dict())

    head = {"classification_head.weight": torch.ones(5, 16), "classification_head.bias": torch.ones(5)}
    classifier = {**prefixed(encoder, "image_encoder.model."), **head}
    recognised = recognise(classifier)
    assert (recognised.layout, recognised.prefix) == ("open_clip", "image_encoder.model.")
    assert recognised.left_out["head"] == tuple(head)
    assert_identical(image_tower(classifier, recognised), ours.visual.state_dict())
    with pytest.raises(
        StructureMismatchError, match=r"'open_clip': expected blocks transformer.resblocks.0, .1, .2 …, "
    ):
        whole_clip(classifier, recognised)

    heads = {f"heads.{number}.weight": torch.ones(5, 16) for number in range(100)}  # more than the encoder has
    lightning = {**prefixed(ours.visual.state_dict(), "encoder."), **heads}
    recognised = recognise(lightning)
    assert (recognised.layout, recognised.prefix) == ("image tower", "encoder.")
    assert recognised.left_out == {"head": tuple(heads)}
    assert_identical(image_tower(lightning, recognised), ours.visual.state_dict())


def test_a_prefix_is_not_removed_if_the_rest_does_not_fit() -> None:
    tower = prefixed(clip_of_open_clip().visual.state_dict(), "model.")
    beside = {**tower, "projector.weight": torch.ones(2, 2)}  # a part of something larger
    assert recognise(beside).layout == "own"
    assert recognise(beside).prefix == ""
    other = {"model.layer.weight": torch.ones(2, 2), "model.layer.bias": torch.ones(2)}
    assert recognise(other).prefix == ""
    assert recognise(prefixed(other, "module.")).prefix == "module."
    assert recognise(prefixed(other, "module._orig_mod.")).prefix == "module._orig_mod."
    assert recognise({**prefixed(other, "module."), "x": torch.ones(1)}).prefix == ""
    assert recognise({}).layout == "own"


def test_openai_names_integers_and_dtypes() -> None:
    state = {
        name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in clip_of_open_clip().state_dict().items()
    }
    integers = {"input_resolution": 32, "context_length": 12, "vocab_size": 64}
    archive = {
        **state,
        **{name: torch.tensor(value) for name, value in integers.items()},
        "transformer.resblocks.0.attn_mask": torch.zeros(12, 12),
    }
    recognised = recognise(archive)
    assert recognised.left_out["OpenAI's integers"] == tuple(integers)
    assert recognised.left_out["attention mask"] == ("transformer.resblocks.0.attn_mask",)
    assert_identical(whole_clip(archive, recognised), state)
    assert_identical(image_tower(archive, recognised), visual(state))
    theirs = written_as(whole_clip(archive, recognised), "transformers")
    assert theirs.dtype("visual_projection.weight") == torch.float16
    assert theirs.dtype("vision_model.post_layernorm.weight") == torch.float32


# timm


def test_a_clip_of_timm_computes_the_same_in_open_clip_and_back(tmp_path: Path) -> None:
    theirs, ours = clip_of_timm(), clip_of_open_clip()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    stored = LazyTensors(tmp_path / "timm.safetensors")
    recognised = recognise(stored)
    assert (recognised.layout, recognised.prefix, recognised.left_out) == ("timm", "", {})
    tower = image_tower(stored, recognised)
    ours.visual.load_state_dict(dict(tower))
    with torch.no_grad():
        torch.testing.assert_close(ours.visual(images()), theirs(images()), atol=1e-5, rtol=0)
    assert torch.equal(tower["proj"], theirs.head.weight.T)
    assert_identical(written_as(tower, "timm"), theirs.state_dict())


def test_a_clip_of_open_clip_computes_the_same_in_timm_and_back() -> None:
    theirs, ours = clip_of_timm(), clip_of_open_clip()
    written = written_as(ours.visual.state_dict(), "timm")
    theirs.load_state_dict(dict(written))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images()), ours.visual(images()), atol=1e-5, rtol=0)
    assert_identical(tower_of(written), ours.visual.state_dict())


def test_a_timm_head_with_a_bias_is_a_classifier() -> None:
    state = clip_of_timm().state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    assert_identical(tower_of(without), tower_of(state))
    trained = prefixed({**state, "head.bias": torch.tensor([0.0] * 15 + [1e-8])}, "model.")
    with pytest.raises(
        StructureMismatchError, match=r"expected a projection without bias, got model.head.bias with other entries than"
    ):
        tower_of(trained)
    with pytest.raises(StructureMismatchError, match=r"expected the image tower's projection \(head.weight\)"):
        tower_of(clip_of_timm(num_classes=0).state_dict())


def test_other_vits_of_timm_keep_their_names() -> None:
    torch.manual_seed(0)
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 16, "img_size": 32, "patch_size": 8}
    state = timm.create_model("vit_base_patch16_224", **settings).state_dict()
    assert (recognise(state).layout, recognise(state).prefix) == ("own", "")
    lightning = prefixed(state, "model.")
    assert (recognise(lightning).layout, recognise(lightning).prefix) == ("own", "model.")
    with pytest.raises(StructureMismatchError, match="expected a CLIP with an image tower, got none that is known"):
        tower_of(state)


# open_clip's other towers


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base_w"])
def test_other_towers_of_open_clip_keep_their_names(name: str) -> None:
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        custom = config.pop("custom_text", False) or "multimodal_cfg" in config
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else CLIP
        config["text_cfg"].pop("hf_tokenizer_name", None)
        state = kind(
            **{key: value for key, value in config.items() if key not in ("init_logit_bias", "init_logit_scale")}
        )
        state = state.state_dict()
    recognised = recognise(state)
    assert recognised.layout == "open_clip"
    assert list(image_tower(state, recognised)) == [
        key.removeprefix("visual.") for key in state if key.startswith("visual.")
    ]
    assert list(whole_clip(state, recognised)) == list(state)
    bare = prefixed(visual(state), "model.visual.")
    assert (recognise(bare).layout, recognise(bare).prefix) == ("image tower", "model.visual.")
    with pytest.raises(LitMergeError, match=r"writing as transformers: expected (a CLIP and nothing else|blocks)"):
        written_as(image_tower(state, recognised), "transformers")


def test_layer_scale_and_towers_without_first_normalisation() -> None:
    for extra in ({"ls_init_value": 0.1}, {"no_ln_pre": True}):
        ours = clip_of_open_clip(vision={**VISION, **extra})
        tower = tower_of(ours.state_dict())
        assert_identical(tower, ours.visual.state_dict())
        with pytest.raises(StructureMismatchError, match="writing as transformers: expected a "):
            written_as(tower, "transformers")
        incomplete = {name: tensor for name, tensor in tower.items() if name != "ln_post.bias"}
        with pytest.raises(StructureMismatchError, match=r"got none of 1 tensors \(ln_post.bias\)"):
            tower_of(incomplete)
        with pytest.raises(StructureMismatchError, match=r"got 1 tensors besides \(adapter.weight\)"):
            tower_of({**tower, "adapter.weight": torch.ones(1)})


# refusals


def test_missing_and_surplus_tensors_are_named() -> None:
    state = clip_of_transformers().state_dict()
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    with pytest.raises(
        StructureMismatchError,
        match=rf"^checkpoint in the layout 'transformers': expected a complete CLIP, got none of 1 tensors \({name}\)",
    ):
        tower_of({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(
        StructureMismatchError,
        match=r"expected a CLIP and nothing else, got 1 tensors besides \(m.vision_model.extra\)",
    ):
        tower_of(prefixed({**state, "vision_model.extra": torch.ones(1)}, "m."))
    ours = clip_of_open_clip().state_dict()
    with pytest.raises(StructureMismatchError, match=r"nothing else, got 1 tensors besides \(queue\)"):
        tower_of({**ours, "queue": torch.ones(1)})
    for name in ("logit_scale", "ln_final.bias"):
        broken = {key: tensor for key, tensor in ours.items() if key != name}
        with pytest.raises(StructureMismatchError, match=rf"got none of 1 tensors \({name}\)"):
            whole_clip(broken, recognise(broken))


def test_blocks_must_be_numbered_without_gaps() -> None:
    state = visual(clip_of_open_clip().state_dict())
    gap = {name.replace("resblocks.1.", "resblocks.999999999."): tensor for name, tensor in state.items()}
    with pytest.raises(
        StructureMismatchError,
        match=r"expected blocks transformer.resblocks.0, .1, .2 …, got 0, 999999999. Use a complete checkpoint.",
    ):
        tower_of(gap)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("vision_model.embeddings.position_embedding.weight", (17, 31), r"\(17, 32\) .* got \(17, 31\)"),
        ("visual_projection.weight", (16, 31), r"\(32, 16\) .* got \(31, 16\)"),
        ("vision_model.encoder.layers.1.mlp.fc1.weight", (65, 32), r"\(64, 32\) .* got \(65, 32\)"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", (32, 1), r"\(32\) .* got \(32, 1\)"),
        ("text_projection.weight", (15, 24), r"\(24, 16\) .* got \(24, 15\)"),
        ("visual_projection.weight", (16,), r"\(32, .*\) .* got \(16,\)"),
    ],
)
def test_shapes_must_fit_together(name: str, shape: tuple[int, ...], expected: str) -> None:
    state = clip_of_transformers().state_dict()
    state[name] = torch.zeros(shape)
    with pytest.raises(StructureMismatchError, match=rf"expected {name} of shape {expected}"):
        whole_clip(state, recognise(state))


def test_packed_parts_must_agree() -> None:
    state = clip_of_transformers().state_dict()
    name = "vision_model.encoder.layers.0.self_attn.v_proj.weight"
    for other in (
        torch.zeros(32, 31),
        torch.zeros(33, 32),
        torch.zeros(32, 32, dtype=torch.float16),
        torch.tensor(0.0),
    ):
        with pytest.raises(
            StructureMismatchError, match=r"expected projections of one shape and dtype, got .*q_proj.weight \(32, 32\)"
        ):
            tower_of({**state, name: other})
    state = clip_of_open_clip().state_dict()
    state["visual.transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(97, 32)
    with pytest.raises(StructureMismatchError, match=r"in_proj_weight of shape \(96, 32\) .* got \(97, 32\)"):
        tower_of(state)


def test_what_cannot_be_written() -> None:
    whole, tower = clip_of_open_clip().state_dict(), clip_of_open_clip().visual.state_dict()
    with pytest.raises(
        ConfigurationError, match=r"^layout: expected one of .*transformers, timm, got 'jax'. Choose one.$"
    ):
        written_as(tower, "jax")
    with pytest.raises(ConfigurationError, match=r"^writing as timm: expected an image tower, got a whole CLIP, whose"):
        written_as(whole, "timm")
    with pytest.raises(StructureMismatchError, match=r"expected open_clip's names, got the layout 'timm'. Bring"):
        written_as(clip_of_timm().state_dict(), "transformers")
    with pytest.raises(StructureMismatchError, match="expected a whole CLIP with image tower, text tower and logit"):
        whole_clip(tower, recognise(tower))
    assert_identical(written_as(whole, "image tower"), tower)
    assert_identical(written_as(tower, "open_clip"), prefixed(tower, "visual."))
    assert_identical(written_as(whole, "open_clip"), whole)


# linearised encoders


class LinearisedModel(nn.Module):
    """As the programs of tangent task arithmetic keep it: two lists in the order of ``named_parameters()``."""

    def __init__(self, initial: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.params = nn.ParameterList([parameter for _, parameter in trained.named_parameters()])
        self.params0 = nn.ParameterList([parameter.detach().clone() for _, parameter in initial.named_parameters()])


def image_encoder(seed: int) -> nn.Module:
    encoder = nn.Module()
    encoder.model = clip_of_open_clip(seed)
    del encoder.model.transformer
    return encoder


def linearised_state(
    change: Callable[[nn.Module], None] = lambda _: None,
) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    initial, trained = image_encoder(0), image_encoder(1)
    whole = nn.Module()
    whole.model = LinearisedModel(initial, trained)
    change(whole)
    return initial, trained, whole.state_dict()


def order_of(encoder: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in encoder.model.named_parameters()]


@pytest.mark.parametrize("prefix", ["", "module.", "image_encoder."])
def test_linearised_encoders_get_their_names_back(prefix: str) -> None:
    initial, trained, state = linearised_state()
    assert {"model.params0.0", "model.params.0", "model.params.30"} < set(state)
    state = prefixed(state, prefix)
    recognised = recognise(state)
    assert (recognised.layout, recognised.prefix) == ("linearised", prefix + "model.")
    with pytest.raises(StructureMismatchError, match="Pair its parameters with names first"):
        image_tower(state, recognised)
    shuffled = dict(sorted(state.items(), key=lambda item: item[0][::-1]))
    counting = Counting(shuffled)
    base, tuned = linearised_pair(counting, order_of(initial))
    assert counting.what_was_read() == {}
    assert list(base)[:4] == ["positional_embedding", "text_projection", "logit_scale", "visual.class_embedding"]
    assert list(base)[-3:] == ["token_embedding.weight", "ln_final.weight", "ln_final.bias"]
    assert_identical(base, initial.model.state_dict())
    assert_identical(tuned, trained.model.state_dict())
    assert_identical(tower_of(tuned), trained.model.visual.state_dict())


def test_linearised_encoders_of_another_architecture_are_refused() -> None:
    initial, _, state = linearised_state()
    order = order_of(initial)
    with pytest.raises(
        StructureMismatchError,
        match=rf"^linearised encoder: expected two lists of {len(order) - 1} parameters, got {len(order)} in params0 "
        rf"and {len(order)} in params. Name the architecture that it was trained with.$",
    ):
        linearised_pair(state, order[:-1])
    lost = {name: tensor for name, tensor in state.items() if name != "model.params.4"}
    with pytest.raises(StructureMismatchError, match=rf"got {len(order)} in params0 and {len(order) - 1} in params"):
        linearised_pair(lost, order)
    with pytest.raises(StructureMismatchError, match=rf"to model.params.{len(order) - 1}, got no model.params.4. Name"):
        linearised_pair({**lost, "model.params.900": torch.ones(1)}, order)
    swapped = [order[1], order[0], *order[2:]]
    with pytest.raises(
        StructureMismatchError,
        match=r"shapes of the architecture, got model.params0.0 \(12, 24\) instead of text_projection \(24, 16\)",
    ):
        linearised_pair(state, swapped)
    with pytest.raises(ConfigurationError, match="expected an order with distinct names, got one twice"):
        linearised_pair(state, [order[0], *order[:-1]])
    with pytest.raises(
        StructureMismatchError, match=r"the parameters of one encoder, got those of 2 \(model., other.\)"
    ):
        linearised_pair({**state, "other.params.0": torch.ones(1)}, order)
    with pytest.raises(
        StructureMismatchError, match=r"expected parameters numbered params0.0, .* got 1 names \(weight\)"
    ):
        linearised_pair({"weight": torch.ones(1)}, order)
