"""What lies beside a model's weights: what is copied, what stays, what is changed, and what a merge replaces later."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_merge.checkpoints.opening import open_model
from lit_merge.commands.inspect import inspect
from lit_merge.commands.merge import merge
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, NonFiniteError
from lit_merge.files.store import write_tensors
from lit_merge.models.merging import companions
from lit_merge.models.merging.companions import companions_of, earlier_companions, is_companion
from lit_merge.models.merging.output import Output

CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "torch_dtype": "float32", "vocab_size": 9}
SHAPES = {"embed.weight": (9, 4), "layers.0.weight": (4, 4), "layers.1.weight": (4, 4)}


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def folder(path, seed=0, config=CONFIG, dtype=torch.float32, **files):
    """The folder of a model; ``a__b`` in a file's name is ``a.b``."""
    path.mkdir(parents=True)
    save_file(weights(seed, dtype), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def write(root, *names, content=b"x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture
def models(tmp_path):
    """The settings of a merge of two models with their base, a folder with tokenizer and code."""
    base = folder(tmp_path / "base", vocab__txt=b"a\r\nb\n", modeling_mine__py=b"raise SystemExit('it was run')\n")
    tuned = [str(folder(tmp_path / name, seed)) for name, seed in (("one", 1), ("two", 2))]
    return {"base": str(base), "vectors": tuned, "recipe": "weight_average"}


def left(place):
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def refused(error_class, line, function, *arguments, **settings):
    with pytest.raises(error_class, match=line) as error:
        function(*arguments, **settings)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)


def test_what_belongs_to_the_model_is_copied_and_the_rest_is_named(tmp_path, monkeypatch):
    root = folder(tmp_path / "encoder")
    kept = ["tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
            "LICENSE", "generation_config.json", "sentence_bert_config.json", "modeling_new.py",
            "additional_chat_templates/tools.jinja", "1_Pooling/config.json", "2_Dense/config.json",
            "2_Dense/model.safetensors"]  # fmt: skip
    stays = {"pytorch_model.bin": "other weights", "model.onnx": "other weights", "optimizer.pt": "a training's",
             "training_args.bin": "a training's", "rng_state_0.pth": "a training's",
             "trainer_state.json": "a training's",
             "events.out.tfevents.1": "a training's", "old.tar.gz": "an archive or a pickle",
             "onnx/model.onnx": "a folder", "3_Other/config.json": "a folder"}  # fmt: skip
    silent = [".gitattributes", ".cache/x", "README.md", "merge.yaml", "search.json"]
    write(root, *kept, *stays, *silent)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../base"}, {"path": "/etc"}]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "odd\nname.txt").write_bytes(b"x")
    monkeypatch.setattr(companions, "LARGEST", 1000)
    write(root, "movie.mp4", content=bytes(1001))
    write(root, "2_Dense/large.bin", content=bytes(1001))  # of a module, which is part of the base
    found = companions_of(root, ["model.safetensors"])
    assert set(found.files) == {*kept, "2_Dense/large.bin", "config.json", "modules.json"}
    assert (found.library, found.stem, found.code) == ("sentence-transformers", "model", ("modeling_new.py",))
    assert all("\n" not in note for note in found.notes)
    said = found.notes[-1]
    assert "and 9 more" in said
    out = tmp_path / "out"
    out.mkdir()
    digests = found.write(out)
    assert left(out) == sorted(found.files)
    for name, digest in digests.items():
        assert digest == hashlib.sha256((root / name).read_bytes()).hexdigest()
    monkeypatch.setattr(companions, "first_few", lambda items, *limit: "; ".join(items))
    said = companions_of(root, ["model.safetensors"]).notes[-1]
    for name, why in stays.items():
        assert f"{name.partition('/')[0]}{'/' if '/' in name else ''} ({why})" in said
    assert "movie.mp4 (larger than 0 MiB)" in said
    assert r"'odd\nname.txt' (its name)" in said
    assert not any(name in said for name in silent)


def test_links_are_followed_to_regular_files_alone(tmp_path):
    root = folder(tmp_path / "snapshot")
    write(tmp_path, "blobs/1", content=b"from the cache")
    (root / "vocab.txt").symlink_to(tmp_path / "blobs/1")
    (root / "gone.json").symlink_to(tmp_path / "blobs/2")
    (root / "device.json").symlink_to("/dev/zero")
    (root / "more").symlink_to(tmp_path / "blobs")
    os.mkfifo(root / "pipe.txt")
    found = companions_of(root, ["model.safetensors"])
    assert set(found.files) == {"config.json", "vocab.txt"}
    for line in ("gone.json (a broken link)", "device.json (no regular file)", "more/ (a folder)", "and 1 more"):
        assert line in found.notes[-1]
    out = tmp_path / "out"
    out.mkdir()
    found.write(out)
    assert not (out / "vocab.txt").is_symlink()
    assert (out / "vocab.txt").read_bytes() == b"from the cache"


@pytest.mark.parametrize(
    ("files", "main", "library", "stem"),
    [
        ({"config.json": {"model_type": "t5"}}, "pytorch_model.bin", "transformers", "model"),
        ({"config.json": {"architecture": "vit"}}, "pytorch_model.bin", "timm", "model"),
        ({"config.json": {"_diffusers_version": "1"}}, "own.safetensors", "diffusers", "own"),
        ({"config.json": {"width": 3}}, "own.safetensors", "", "own"),
        ({"open_clip_config.json": {"model_cfg": {}}}, "open_clip_pytorch_model.bin", "open_clip", "open_clip_model"),
        ({"config.json": {"model_type": "clip"}, "open_clip_config.json": {"model_cfg": {}}},
         "open_clip_model.safetensors", "open_clip", "open_clip_model"),
        ({"config.json": {"model_type": "clip"}, "open_clip_config.json": {"model_cfg": {}}}, "model.safetensors",
         "transformers", "model"),
    ],
)  # fmt: skip
def test_which_library_opens_a_folder(files, main, library, stem, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = companions_of(tmp_path, [main])
    assert (found.library, found.stem) == (library, stem)
    assert ("open_clip_config.json" in found.files) == (library == "open_clip")


def test_no_folder_of_a_library_has_no_companions(tmp_path):
    write(tmp_path, "vocab.txt")
    assert not companions_of(tmp_path, ["model.safetensors"])
    assert not companions_of(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("config.json", b"{", r"config\.json: expected a model's configuration as JSON, got"),
        ("config.json", b"[]", r"config\.json: expected a JSON object, got list"),
        ("modules.json", b"[1]", r"modules\.json: expected a list of modules with a path each"),
    ],
)
def test_damaged_configurations(name, content, line, models):
    (Path(models["base"]) / name).write_bytes(content)
    refused(FileFormatError, line, merge, **models, output=f"{models['base']}/../out")
    assert merge(**models, output=f"{models['base']}/../out.safetensors").written  # which has nothing beside it


def test_names_that_are_companions():
    assert all(map(is_companion, ("config.json", "merges.txt", "1_Pooling/config.json", "2_Dense/model.safetensors")))
    others = ("model.safetensors", "README.md", ".gitattributes", "onnx/model.onnx", "onnx/config.json", "optimizer.pt")
    assert not any(map(is_companion, others))


def entries(config, tmp_path, changes=None, dtype=None):
    root = folder(tmp_path / "model", config=config)
    found = companions_of(root, ["model.safetensors"])
    changed = found.with_entries(changes) if changes else found.with_dtype(dtype)
    content = changed.files["config.json"]
    return json.loads(content) if isinstance(content, bytes) else content


def test_entries_of_the_configuration(tmp_path):
    config = {"model_type": "clip", "text_config": {"vocab_size": 9, "a": 1}, "vision_config": {"image_size": 8}}
    expected = json.loads(json.dumps(config))
    expected["text_config"]["vocab_size"], expected["vision_config"]["image_size"] = 11, 16
    changed = entries(config, tmp_path, {"vocab_size": 11, "vision_config.image_size": 16})
    assert changed == expected
    assert list(changed) == list(config)
    both = {"model_type": "x", "vocab_size": 9, "text_config": {"vocab_size": 9}}
    found = entries(both, tmp_path / "both", {"vocab_size": 10})
    assert (found["vocab_size"], found["text_config"]["vocab_size"]) == (10, 10)
    assert entries({"model_type": "x", "text_config": {}}, tmp_path / "none", {"vocab_size": 10}) == {
        "model_type": "x",
        "text_config": {"vocab_size": 10},
    }
    assert isinstance(entries(CONFIG, tmp_path / "same", {"vocab_size": 9}), Path)  # the base's own file


def test_the_vocabulary_of_open_clip(tmp_path):
    for config in ({"model_cfg": {"embed_dim": 4, "text_cfg": {"vocab_size": 9}}}, {"model_cfg": {"text_cfg": {}}}):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        changed = companions_of(tmp_path, ["open_clip_model.safetensors"]).with_entries({"vocab_size": 11})
        content = changed.files["open_clip_config.json"]
        assert isinstance(content, bytes)
        config["model_cfg"]["text_cfg"]["vocab_size"] = 11
        assert json.loads(content) == config


def test_dtypes_of_the_configuration(tmp_path):
    config = {
        **{
            "model_type": "llava",
            "dtype": "float32",
            "text_config": {"torch_dtype": "float32", "deep": {"dtype": "x"}},
        },
        **{"vision_config": {"dtype": None}, "quantization_config": {"dtype": "int8"}},
    }
    changed = entries(config, tmp_path, dtype=torch.bfloat16)
    assert changed["dtype"] == changed["text_config"]["torch_dtype"] == "bfloat16"
    assert (changed["vision_config"]["dtype"], changed["quantization_config"]["dtype"]) == (None, "int8")
    assert isinstance(entries(CONFIG, tmp_path / "same", dtype=torch.float32), Path)
    assert isinstance(entries(CONFIG, tmp_path / "none", dtype=None), Path)
    absent = {"model_type": "bert"}
    assert entries(absent, tmp_path / "absent", dtype=torch.float16) == {**absent, "torch_dtype": "float16"}
    assert isinstance(entries({"architecture": "vit"}, tmp_path / "timm", dtype=torch.float16), Path)


def test_a_merge_writes_the_whole_folder(models, tmp_path, capsys):
    out = tmp_path / "out"
    result = merge(**models, output=str(out))
    assert left(out) == ["README.md", "config.json", "model.safetensors", "modeling_mine.py", "vocab.txt"]
    for name in ("config.json", "modeling_mine.py", "vocab.txt"):
        assert (out / name).read_bytes() == (Path(models["base"]) / name).read_bytes()
    known = header(out / "model.safetensors")
    assert (known["format"], known["lit_merge_format"]) == ("pt", "lit-merge/weights/1")
    digests = json.loads(known["companions"])
    assert digests["vocab.txt"] == hashlib.sha256(b"a\r\nb\n").hexdigest()
    assert "custom code is copied and was not run: modeling_mine.py" in result.describe().splitlines()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers\n" in card
    assert "from transformers import BertModel\n\nmodel = BertModel.from_pretrained('.')" in card
    assert "- custom code is copied and was not run: modeling_mine.py" in card
    opened = open_model(out)
    opened.verify()
    assert "weights" in str(inspect(str(out)).header["lit_merge_format"])
    again = merge(**{**models, "base": str(out)}, output=str(tmp_path / "again"))  # and as base and fine-tune
    assert left(again.output) == left(out)
    merge([str(out)], str(tmp_path / "third"), "weight_average", base=models["base"])
    third, second = (load_file(tmp_path / name / "model.safetensors") for name in ("third", "out"))
    assert all(torch.equal(third[name], second[name]) for name in second)


def test_custom_code_of_the_folder_and_of_others(models, tmp_path):
    config = {**CONFIG, "auto_map": {"AutoConfig": "own/repository--configuration.Mine", "AutoModelForCausalLM": "m.M"}}
    (Path(models["base"]) / "config.json").write_text(json.dumps(config))
    result = merge(**models, output=str(tmp_path / "out"))
    assert "custom code is copied and was not run: modeling_mine.py, own/repository" in result.describe()
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)" in card


def test_a_plan_names_the_files_and_writes_none(models, tmp_path):
    result = merge(**models, output=str(tmp_path / "out"), dry_run=True)
    assert not (tmp_path / "out").exists()
    names = [Path(name).name for name, _ in result.plan.files]
    assert names == ["model.safetensors", "config.json", "modeling_mine.py", "vocab.txt"]
    assert "custom code is copied and was not run" in str(result.plan)


def test_a_file_and_a_task_vector_have_nothing_beside_them(models, tmp_path):
    merge(**models, output=str(tmp_path / "m.safetensors"))
    assert header(tmp_path / "m.safetensors")["format"] == "lit-merge/weights/1"
    merge(**models, output=str(tmp_path / "vector"), kind="task_vector")
    assert left(tmp_path / "vector") == ["README.md", "task_vector.safetensors"]


def test_several_models_have_a_folder_each(models, tmp_path):
    out = tmp_path / "out"
    merge(**{**models, "recipe": "tall_masks"}, output=str(out), shard_size="100B")
    inner = ["config.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
             "model.safetensors.index.json", "modeling_mine.py", "vocab.txt"]  # fmt: skip
    assert left(out) == ["README.md", *(f"{task}/{name}" for task in ("one", "two") for name in inner)]
    assert "BertModel.from_pretrained('two')  # two" in (out / "README.md").read_text(encoding="utf-8")
    assert open_model(out / "one").metadata["format"] == "pt"


def test_what_is_replaced(models, tmp_path):
    base, out = Path(models["base"]), tmp_path / "out"
    write(base, "spiece.model", "edited.json", "1_Pooling/config.json")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    merge(**models, output=str(out), shard_size="100B")
    assert (out / "1_Pooling/config.json").is_file()
    (out / "edited.json").write_text("by somebody")
    write(out, "notes.txt", "plots/a.png", content=b"foreign")
    refused(ConfigurationError, r"expected a new file, got .*model\.safetensors\.index\.json, which", merge, **models,
            output=str(out))  # fmt: skip
    for name in ("spiece.model", "edited.json", "modules.json", "1_Pooling/config.json"):
        (base / name).unlink()
    (base / "1_Pooling").rmdir()
    merge(**models, output=str(out), overwrite=True)
    expected = ["README.md", "config.json", "edited.json", "model.safetensors", "modeling_mine.py", "notes.txt"]
    assert left(out) == sorted([*expected, "plots/a.png", "vocab.txt"])
    assert not (out / "1_Pooling").exists()
    assert (out / "edited.json").read_text() == "by somebody"
    (out / "model.safetensors").unlink()
    for name in left(out):
        if name != "config.json":
            (out / name).unlink()
    refused(ConfigurationError, r"expected a new file, got .*config\.json, which exists", merge, **models,
            output=str(out))  # fmt: skip


def test_weights_of_another_library_do_not_stay(models, tmp_path):
    out = tmp_path / "out"
    merge(**models, output=str(out))
    base = Path(models["base"])
    (base / "config.json").unlink()
    (base / "model.safetensors").rename(base / "open_clip_model.safetensors")
    (base / "open_clip_config.json").write_text('{"model_cfg": {}}')
    refused(ConfigurationError, r"expected a new file, got .*/model\.safetensors, which", merge, **models,
            output=str(out))  # fmt: skip
    merge(**models, output=str(out), overwrite=True)
    names = ["README.md", "modeling_mine.py", "open_clip_config.json", "open_clip_model.safetensors", "vocab.txt"]
    assert left(out) == names


def test_headers_lead_to_no_file_outside(tmp_path):
    place, secret = tmp_path / "out", tmp_path / "secret.txt"
    place.mkdir()
    write(tmp_path, "secret.txt", "elsewhere/a.txt")
    write(place, "mine.txt")
    (place / "link").symlink_to(tmp_path / "elsewhere")
    (place / "linked.txt").symlink_to(secret)
    digest = hashlib.sha256(b"x").hexdigest()
    names = ["../secret.txt", str(secret), "link/a.txt", "linked.txt", "", ".", "a//b", "mine.txt\0", "gone.txt"]
    names = {**dict.fromkeys(names, digest), "mine.txt": digest}
    model = place / "model.safetensors"
    write_tensors(model, {"w": torch.ones(1)}, {"format": "pt", "companions": json.dumps(names)})
    assert earlier_companions(place, [model]) == [place / "mine.txt"]
    for damaged in ("[1]", "{", "[" * 100_000, '{"mine.txt": 3}'):
        write_tensors(model, {"w": torch.ones(1)}, {"companions": damaged})
        assert earlier_companions(place, [model]) == []
    model.write_bytes(b"nothing")
    assert earlier_companions(place, [model, place / "absent.safetensors"]) == []


def test_the_bases_own_files_are_never_replaced(models, tmp_path):
    refused(ConfigurationError, r"expected another file than the inputs", merge, **models, output=models["base"],
            overwrite=True)  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.txt").hardlink_to(Path(models["base"]) / "vocab.txt")
    refused(ConfigurationError, r"than the inputs, got .*vocab\.txt", merge, **models, output=str(out), overwrite=True)


def test_nothing_is_left_of_what_fails(models, tmp_path):
    large = {name: value * 1e5 for name, value in weights(1).items()}
    save_file(large, Path(models["vectors"][0]) / "model.safetensors")
    line = r"expected values that fit into torch.float16, got [\d.e+]+ in \S+\. Store them as bfloat16"
    refused(NonFiniteError, line, merge, **models, output=str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_libraries_that_read_no_shards(models, tmp_path):
    (Path(models["base"]) / "config.json").write_text('{"architecture": "vit_tiny"}')
    refused(ConfigurationError, "shard_size: expected one file of weights for timm, which opens no shards, got 3",
            merge, **models, output=str(tmp_path / "out"), shard_size="100B")  # fmt: skip
    merge(**models, output=str(tmp_path / "out"), shard_size="1MB")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "library_name: timm\n" in card
    assert "timm.create_model('local-dir:.', pretrained=True)" in card


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"write_as": "transformer"}, r"write_as: expected open_clip, image_tower, transformers, timm, got "
                                      r"'transformer'\. Did you mean transformers\?"),
        ({"write_as": "pytorch"}, "got 'pytorch', a container, not a layout: weights are written as safetensors"),
        ({"write_as": "linearised"}, "got 'linearised', a form that holds θ0 beside θ"),
        ({"write_as": "own"}, "got 'own', which is what is written without it. Remove it"),
        ({"write_as": "peft"}, "got 'peft', the layout of adapters"),
        ({"write_as": "timm", "kind": "task_vector"}, "write_as: expected kind weights"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(settings, line, models, tmp_path):
    refused(ConfigurationError, line, merge, **models, **settings, output=str(tmp_path / "out"))


def test_a_model_that_is_no_clip_has_no_other_layout(models, tmp_path):
    line = r"write_as transformers: .*'own': expected a CLIP with an image tower, got none that is known"
    refused(LitMergeError, line, merge, **models, write_as="transformers", output=str(tmp_path / "out"))


def test_an_output_without_companions_is_as_before(tmp_path):
    one = Output.plan("m", open_model(folder(tmp_path / "base")), {}, None)
    assert (one.model, list(one.files)) == ("m.safetensors", ["m.safetensors"])
