"""Models that transformers, sentence-transformers, timm and open_clip have saved: merged, and opened by them again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders.tiny_architectures import ARCHITECTURES, COEFFICIENT, silent, trial
from safetensors.torch import load_file, save_file

from lit_merge.commands.merge import merge

pytest.importorskip("transformers")

BERT, LLAMA, VIT = (ARCHITECTURES[name] for name in ("bert", "llama", "vit"))
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "##ish", "sky"]


def tokenizer(folder):
    from transformers import BertTokenizerFast

    (folder.parent / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    made = BertTokenizerFast(str(folder.parent / "words.txt"))
    made.chat_template = CHAT
    made.save_pretrained(str(folder))


def models(architecture, place, dtype=torch.float32, **more):
    """Folders of a base and two fine-tunes, and the base's model."""
    base = architecture.build(0)
    with silent():
        for name, model in (("base", base), ("one", architecture.tuned(base, 1)), ("two", architecture.tuned(base, 2))):
            model.to(dtype).save_pretrained(str(place / name), **more)
    return {"base": str(place / "base"), "vectors": [str(place / name) for name in ("one", "two")],
            "recipe": "task_arithmetic", "settings": {"coefficient": COEFFICIENT}}  # fmt: skip


def exact(settings, stem="model"):
    """θ0 + α Σ (θ_t − θ0) of the files, in float64."""
    base, *tuned = (load_file(Path(one) / f"{stem}.safetensors") for one in (settings["base"], *settings["vectors"]))
    taus = {name: sum(one[name].double() - base[name].double() for one in tuned) for name in base}
    return {name: base[name].double() + COEFFICIENT * tau for name, tau in taus.items()}


def assert_close(state, expected):
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-6)


def same_files(settings, out, *names):
    for name in names:
        assert (Path(out) / name).read_bytes() == (Path(settings["base"]) / name).read_bytes()


def left(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama", "mixtral"])
def test_architectures(name, tmp_path):
    """A few of those of benchmarks/architectures.py, in two dtypes, whole and sharded."""
    found = trial(ARCHITECTURES[name], tmp_path, merge)
    assert found["float32"]["outputs"] < 1e-5
    assert found["bfloat16, sharded, to float32"]["outputs"] < 1e-5
    assert found["bfloat16, sharded"]["roundings"] <= 1 + 2**-10
    file = "bfloat16-sharded-to-float32/config.json"
    assert json.loads((tmp_path / file).read_text(encoding="utf-8"))["dtype"] == "float32"
    names = set(load_file(tmp_path / "models-float32/base/model.safetensors"))
    assert set(load_file(tmp_path / "float32/model.safetensors")) == names  # ties stay ties
    assert ("lm_head.weight" in names) == (name in ("llama", "mixtral"))


def test_an_encoder_with_its_tokenizer(tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    settings = models(BERT, tmp_path)
    tokenizer(Path(settings["base"]))
    with silent():
        result = merge(**settings, output=str(tmp_path / "out"), dtype="bfloat16")
        model, info = AutoModelForMaskedLM.from_pretrained(str(result.output), output_loading_info=True)
        words = AutoTokenizer.from_pretrained(str(result.output))
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert words("reddish blueish sky").input_ids == [2, 1, 6, 7, 8, 3]
    assert words.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False) == "<user>red"
    same_files(settings, result.output, *(name for name in left(settings["base"]) if name.startswith("token")))
    state = model.state_dict()
    for name, value in exact(settings).items():
        step = torch.ldexp(torch.ones_like(value), torch.frexp(value)[1] - 9)  # half a unit in bfloat16's last place
        assert ((state[name].double() - value).abs() <= step * (1 + 2**-10)).all(), name


def test_a_decoder_with_chat_template_and_generation_settings(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    settings = models(LLAMA, tmp_path, max_shard_size="10KB")
    tokenizer(Path(settings["base"]))
    with silent():
        GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=5).save_pretrained(settings["base"])
        result = merge(**settings, output=str(tmp_path / "out"), shard_size="10KB")
        model = AutoModelForCausalLM.from_pretrained(str(result.output))
        words = AutoTokenizer.from_pretrained(str(result.output))
        given = torch.tensor([[5, 6, 7]])
        assert model.generate(given, max_new_tokens=2, do_sample=False).shape[1] <= 5
    assert "model.safetensors.index.json" in left(result.output)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, 5)
    assert words.chat_template == CHAT
    same_files(settings, result.output, "config.json", "generation_config.json", "chat_template.jinja")


def test_an_image_classifier_with_its_preprocessing(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

    settings = models(VIT, tmp_path)
    with silent():
        ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4, 0.4, 0.4]).save_pretrained(
            settings["base"]
        )
        result = merge(**settings, output=str(tmp_path / "out"))
        model, info = AutoModelForImageClassification.from_pretrained(str(result.output), output_loading_info=True)
        seen = AutoImageProcessor.from_pretrained(str(result.output))
    assert list(seen.image_mean) == [0.4, 0.4, 0.4]
    assert not any(info.values())  # whose modules have other names than its files
    assert_close(load_file(result.output / "model.safetensors"), exact(settings))
    assert model.num_labels == 2


def sentence_encoder(place):
    """A base in sentence-transformers' layout, with a pooling and a dense module, and two fine-tunes without."""
    settings = models(BERT, place)
    base = Path(settings["base"])
    tokenizer(base)
    kind = "sentence_transformers.models"
    listed = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{kind}.{name}"}
        for index, (path, name) in enumerate(listed)
    ]
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    dense = {
        "in_features": 16,
        "out_features": 4,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "1_Pooling/config.json": pooling,
        "2_Dense/config.json": dense,
    }
    for name, content in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(json.dumps(content), encoding="utf-8")
    torch.manual_seed(3)
    save_file({"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}, base / "2_Dense/model.safetensors")
    return settings, [*files, "2_Dense/model.safetensors"]


def test_a_sentence_encoder(tmp_path):
    settings, files = sentence_encoder(tmp_path)
    with silent():
        result = merge(**settings, output=str(tmp_path / "out"))
    same_files(settings, result.output, *files)
    card = (result.output / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers\n" in card
    assert "SentenceTransformer('.')" in card


def test_sentence_transformers_opens_it(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from transformers import BertModel

    settings, _ = sentence_encoder(tmp_path)
    with silent():
        result = merge(**settings, output=str(tmp_path / "out"))
        found = library.SentenceTransformer(str(result.output), device="cpu").encode(
            ["red sky"], convert_to_tensor=True
        )
        expected = BertModel.from_pretrained(settings["base"], add_pooling_layer=False).double()
    merged = {name.removeprefix("bert."): value for name, value in exact(settings).items() if name.startswith("bert.")}
    expected.load_state_dict({name: merged[name] for name in expected.state_dict() if name in merged}, strict=False)
    features = expected.eval()(torch.tensor([[2, 5, 8, 3]])).last_hidden_state.mean(1)
    dense = load_file(Path(settings["base"]) / "2_Dense/model.safetensors")
    wanted = features @ dense["linear.weight"].double().T + dense["linear.bias"].double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def moved(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.items()
    }


def written(place, state, stem, **files):
    """Folders of a base with files beside its weights and of two fine-tunes."""
    for number, name in enumerate(("base", "one", "two")):
        (place / name).mkdir()
        own = moved(state, number) if number else state
        save_file({key: value.contiguous() for key, value in own.items()}, place / name / f"{stem}.safetensors",
                  {"format": "pt"})  # fmt: skip
        for file, content in files.items():
            (place / name / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    return {"base": str(place / "base"), "vectors": [str(place / name) for name in ("one", "two")],
            "recipe": "task_arithmetic", "settings": {"coefficient": COEFFICIENT}}  # fmt: skip


def test_timm_opens_its_folder(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    given = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    state = timm.create_model("vit_tiny_patch16_224", **given).state_dict()
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": given,
              "pretrained_cfg": {"input_size": [3, 16, 16], "num_classes": 3, "classifier": "head"}}  # fmt: skip
    settings = written(tmp_path, state, "model", config=config)
    result = merge(**settings, output=str(tmp_path / "out"))
    assert left(result.output) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{result.output}", pretrained=True)
    assert_close(model.state_dict(), exact(settings))
    assert "library_name: timm\n" in (result.output / "README.md").read_text(encoding="utf-8")


CLIP = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}
SEEN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture
def clip(tmp_path):
    """The settings of a merge of a folder of open_clip, and the model with what the merge has to be."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP)
    settings = written(tmp_path, model.state_dict(), "open_clip_model",
                       open_clip_config={"model_cfg": CLIP, "preprocess_cfg": SEEN})  # fmt: skip
    model.load_state_dict(exact(settings, "open_clip_model"))
    return settings, model.double().eval()


TOKENS = torch.tensor([[1, 5, 9, 63, 0, 0, 0, 0], [1, 7, 63, 0, 0, 0, 0, 0]])
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def test_open_clip_opens_its_folder(clip, tmp_path):
    import open_clip

    settings, expected = clip
    result = merge(**settings, output=str(tmp_path / "out"))
    assert left(result.output) == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{result.output}")
    assert_close(model.state_dict(), expected.state_dict())
    assert preprocess.transforms[-1].mean == SEEN["mean"]
    card = (result.output / "README.md").read_text(encoding="utf-8")
    assert "library_name: open_clip\n" in card
    assert "open_clip.create_model_and_transforms('local-dir:.')" in card


@torch.no_grad()
def test_a_clip_of_open_clip_in_transformers(clip, tmp_path):
    from transformers import AutoImageProcessor, CLIPModel

    settings, expected = clip
    result = merge(**settings, output=str(tmp_path / "out"), write_as="transformers")
    assert left(result.output) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    with silent():
        model, info = CLIPModel.from_pretrained(str(result.output), output_loading_info=True)
        seen = AutoImageProcessor.from_pretrained(str(result.output))
    assert not any(info.values())
    assert "CLIPModel.from_pretrained('.')" in (result.output / "README.md").read_text(encoding="utf-8")
    found = model.eval().double()(input_ids=TOKENS, pixel_values=IMAGES)
    torch.testing.assert_close(found.image_embeds, expected.encode_image(IMAGES, True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.text_embeds, expected.encode_text(TOKENS, True), rtol=1e-5, atol=1e-6)
    assert (list(seen.image_mean), seen.crop_size["height"]) == (SEEN["mean"], 16)
    # And back: what transformers has been given, open_clip opens with the same outputs.
    import open_clip

    again = merge([str(result.output)], str(tmp_path / "back"), "weight_average", base=str(result.output),
                  write_as="open_clip")  # fmt: skip
    assert left(again.output) == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    back, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{again.output}")
    features = back.double().eval().encode_image(IMAGES, True)
    torch.testing.assert_close(features, expected.encode_image(IMAGES, True), rtol=1e-5, atol=1e-6)
    assert list(preprocess.transforms[-1].mean) == SEEN["mean"]


@torch.no_grad()
def test_an_image_tower_in_transformers_and_timm(clip_config, clip_weights, tmp_path):
    """Of a base that is named by model and pretrained."""
    from transformers import CLIPVisionModelWithProjection

    from lit_merge.models import load_clip
    from lit_merge.vectors import TaskVector

    tower = load_clip(clip_config, clip_weights).visual.eval()
    tau = moved({name: torch.zeros_like(value) for name, value in tower.named_parameters()}, 1)
    TaskVector(tau, "one").save(tmp_path / "one.safetensors")
    settings = {"vectors": [str(tmp_path / "one.safetensors")], "recipe": "weight_average", "model": clip_config,
                "pretrained": clip_weights}  # fmt: skip
    whole = merge(**settings, output=str(tmp_path / "whole"), write_as="transformers")
    assert json.loads((whole.output / "config.json").read_text())["architectures"] == ["CLIPModel"]
    with silent():
        model = CLIPVisionModelWithProjection.from_pretrained(str(whole.output))
    tower.load_state_dict({name: value.detach() + tau[name] for name, value in tower.named_parameters()})
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.eval()(images).image_embeds, tower(images), rtol=1e-4, atol=1e-5)
    timm = merge(**settings, output=str(tmp_path / "timm"), write_as="timm")
    assert left(timm.output) == ["README.md", "model.safetensors"]
    assert "the text side (" in timm.describe()
    assert "no config.json is written: give timm.create_model the architecture" in timm.describe()
    file = merge(**settings, output=str(tmp_path / "tower.safetensors"), write_as="image_tower")
    assert_close(load_file(file.output), {name: value.double() for name, value in tower.state_dict().items()})


def test_a_file_tells_no_heads(clip, tmp_path):
    settings, _ = clip
    base = str(Path(settings["base"]) / "open_clip_model.safetensors")
    result = merge(**{**settings, "base": base}, output=str(tmp_path / "out"), write_as="transformers")
    assert left(result.output) == ["README.md", "model.safetensors"]
    assert "is not there, and weights tell no heads and no activation" in result.describe()
