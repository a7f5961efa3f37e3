"""``lit-merge import``: what published checkpoints become, all the way to a merged and tested model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from builders import checkpoint_files as files
from safetensors import safe_open
from safetensors.torch import load_file

from lit_merge import TaskVector
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.commands import import_ as importing
from lit_merge.commands.import_ import import_checkpoints
from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, StructureMismatchError
from lit_merge.evaluation.statistics.command import statistics
from lit_merge.models import load_clip

TASKS = ("digits", "signs")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def states(clip_weights):
    """θ0, and θ of each task."""
    state = load_file(clip_weights)
    return {"zeroshot": state, **{task: files.moved(state, seed) for seed, task in enumerate(TASKS, 1)}}


@pytest.fixture(scope="module")
def published(clip_config, states, tmp_path_factory):
    """A folder as the task-arithmetic papers published theirs: pickled encoder objects, one folder per task."""
    folder = tmp_path_factory.mktemp("checkpoints") / "ViT-tiny"
    for task in TASKS:
        (folder / task).mkdir(parents=True)
        files.whole_module(folder / task / "finetuned.pt", clip_config, states[task])
    files.whole_module(folder / "zeroshot.pt", clip_config, states["zeroshot"])
    return folder


def tau(states, task):
    return {
        name[7:]: states[task][name] - states["zeroshot"][name]
        for name in states["zeroshot"]
        if name.startswith("visual.")
    }


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def refused(error_class, line, **settings):
    with pytest.raises(error_class, match=line) as error:
        import_checkpoints(**settings)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)


def left():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# From published files to a merged model


@pytest.mark.usefixtures("few_images")
def test_published_encoders_are_imported_merged_and_tested(published, states, clip_config, clip_weights, capsys):
    tuned = [str(published / task / "finetuned.pt") for task in TASKS]
    imported = ["import", "--pretrained", str(published / "zeroshot.pt"), "--finetuned", json.dumps(tuned)]
    assert main([*imported, "--model", clip_config, "--output", "vectors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{published / 'zeroshot.pt'}: PyTorch whole module, open_clip names; prefix 'model.' removed; not in the "
        "image tower: text tower (model.positional_embedding, model.text_projection and 3 more), logit scale "
        "(model.logit_scale)"
    )
    base = load_clip(clip_config, clip_weights).fingerprint
    assert (
        lines[-1] == f"signs: 32 tensors, 42,368 entries in float32, 0.2 MB, base {base} -> vectors/signs.safetensors"
    )
    vectors = [f"vectors/{task}.safetensors" for task in TASKS]
    for path, task in zip(vectors, TASKS, strict=True):
        vector = TaskVector.load(path, verify=True)
        assert_equal(dict(vector), tau(states, task))
        assert (vector.task, vector.base_fingerprint) == (task, base)
        origin = {
            "file": "finetuned.pt",
            "container": "PyTorch whole module",
            "layout": "open_clip",
            "prefix": "model.",
        }
        assert json.loads(vector.metadata["imported_from"]) == origin
    recipe = ["--recipe", "task_arithmetic", "--settings.coefficient", "0.3", "--progress", "false"]
    whole = ["--model", clip_config, "--pretrained", clip_weights]
    assert main(["merge", "--vectors", json.dumps(vectors), *whole, *recipe, "--output", "merged.safetensors"]) == 0
    merged = load_file("merged.safetensors")
    for name, value in states["zeroshot"].items():
        added = sum(0.3 * tau(states, task)[name[7:]] for task in TASKS) if name.startswith("visual.") else 0
        torch.testing.assert_close(merged[name], value + added, rtol=0, atol=1e-6)
    # The encoders themselves are merged as well as their vectors.
    assert main(["merge", "--vectors", json.dumps(tuned), *whole, *recipe, "--output", "again.safetensors"]) == 0
    assert_equal(load_file("again.safetensors"), merged)
    several = ["--model=MultiTaskModule", "--data=MultiTaskDataModule", "--data.tasks=[digits, signs]", *QUIET]
    model = [f"--model.model={clip_config}", f"--model.pretrained={clip_weights}"]
    for weights, output in (("merged.safetensors", "a"), (tuned[0], "b")):
        assert main(["test", *several, *model, f"--model.weights={weights}", "--output", output]) == 0
        metrics = json.loads(Path(output, "test_metrics.json").read_text())
        assert {f"test/{task}/accuracy" for task in TASKS} <= set(metrics)


@pytest.mark.usefixtures("few_images")
def test_an_imported_vector_goes_with_one_of_our_own(published, states, clip_config, clip_weights):
    fit = ["fit", "--data.task=signs", "--data.batch_size=4", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    fit += [f"--model.model={clip_config}", f"--model.pretrained={clip_weights}", "--output=run", *QUIET]
    assert main(fit) == 0
    import_checkpoints(str(published / "digits" / "finetuned.pt"), str(published / "zeroshot.pt"))
    own = TaskVector.load("run/task_vector.safetensors")
    total = TaskVector.load("task_vector.safetensors") + own
    assert total.task == "digits+signs"
    assert_equal(dict(total), {name: value + own[name] for name, value in tau(states, "digits").items()})


def test_a_linearised_encoder_alone(states, clip_config):
    path = files.linearised(Path("linear_finetuned.pt"), clip_config, states["zeroshot"], states["signs"])
    result = import_checkpoints(str(path), model=clip_config, task="signs")
    vector = TaskVector.load("task_vector.safetensors")
    assert_equal(dict(vector), tau(states, "signs"))
    assert (vector.metadata["regime"], vector.metadata["base_model"]) == ("linearized", "tiny-clip")
    assert result.lines[0] == "linear_finetuned.pt: PyTorch state dict, linearised names; prefix 'model.' removed"
    refused(ConfigurationError, "linear_finetuned.pt, a linearised encoder .* Set model", finetuned=str(path))
    refused(StructureMismatchError, "Name the arch", finetuned=str(path), model="ViT-B-32", overwrite=True)


def test_weights_behind_a_name_are_a_base_too(published, states, clip_config, clip_weights, monkeypatch):
    clip = load_clip(clip_config, clip_weights)
    asked = []
    monkeypatch.setattr(importing, "load_clip", lambda *names: asked.append(names) or clip)
    text = {name: value for name, value in states["digits"].items() if not name.startswith("visual.")}
    text["ln_final.bias"] = text["ln_final.bias"] + 1
    whole = files.pytorch(Path("whole.pt"), {**states["digits"], **text})
    result = import_checkpoints(str(whole), pretrained="laion", model=clip_config)
    assert asked == [(clip_config, "laion")]
    assert_equal(dict(TaskVector.load("task_vector.safetensors")), tau(states, "digits"))
    assert result.lines[2] == (
        "whole.pt: 1 of 18 tensors besides the image tower differ from the pre-trained ones (ln_final.bias); the task "
        "vector is without this change"
    )


# What is said, and what is written


def test_a_text_tower_that_differs_is_named(published, states, clip_config):
    changed = {**states["digits"], "text_projection": states["digits"]["text_projection"] + 1}
    changed["logit_scale"] = changed["logit_scale"] + 1
    for tuned, of in (
        (files.whole_module(Path("a.pt"), clip_config, changed), 6),
        (files.transformers_folder(Path("b"), changed), 6),
    ):
        result = import_checkpoints(str(tuned), str(published / "zeroshot.pt"), overwrite=True)
        (line,) = [line for line in result.lines if "differ" in line]
        assert line == (
            f"{tuned}: 2 of {of} tensors besides the image tower differ from the pre-trained ones (text_projection, "
            "logit_scale); the task vector is without this change"
        )
        assert_equal(dict(TaskVector.load("task_vector.safetensors")), tau(states, "digits"))
    same = import_checkpoints(
        str(published / "digits" / "finetuned.pt"), str(published / "zeroshot.pt"), overwrite=True
    )
    assert not [line for line in same.lines if "differ" in line]


def test_a_missing_projection_is_said(published, states):
    tuned = files.transformers_folder(Path("vision"), states["signs"], "CLIPVisionModel")
    result = import_checkpoints(str(tuned), str(published / "zeroshot.pt"))
    assert "vision: the fine-tuned checkpoint has no projection; its difference there is zero" in result.lines
    assert not TaskVector.load("task_vector.safetensors")["proj"].any()


def test_a_dry_run_writes_nothing(published, states, capsys):
    pair = ["--pretrained", str(published / "zeroshot.pt"), "--finetuned", str(published / "digits" / "finetuned.pt")]
    assert main(["import", *pair, "--dtype", "bfloat16", "--output", "deep/v.safetensors", "--dry_run", "true"]) == 0
    expected = "digits: 32 tensors, 42,368 entries in bfloat16, 0.1 MB would be written to deep/v.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    convert = ["import", *pair[:2], "--write_as", "timm", "--dry_run", "true"]
    assert main(convert) == 0
    expected = "timm: 33 tensors, 42,380 entries in float32, 0.2 MB would be written to model.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert left() == []


def test_a_smaller_dtype_tells_its_error(published, states):
    result = import_checkpoints(
        str(published / "digits" / "finetuned.pt"), str(published / "zeroshot.pt"), "mnist", dtype="bfloat16"
    )
    vector = TaskVector.load("task_vector.safetensors")
    assert_equal(dict(vector), {name: value.bfloat16() for name, value in tau(states, "digits").items()})
    rounded = sum(float((vector[n].double() - v.double()).square().sum()) for n, v in tau(states, "digits").items())
    relative = (rounded / sum(float(v.double().square().sum()) for v in tau(states, "digits").values())) ** 0.5
    found = re.search(r"^mnist: .* \(relative rounding error (\S+)\), base", result.lines[-1])
    assert float(found[1]) == pytest.approx(relative, rel=1e-2)


def test_own_names_of_any_model():
    base = {"a.weight": torch.ones(2, 3), "steps": torch.tensor(3)}
    files.pytorch(Path("base.pt"), {f"module.{name}": value for name, value in base.items()})
    files.safetensors(Path("tuned.safetensors"), {**base, "a.weight": torch.full((2, 3), 3.0)})
    import_checkpoints("tuned.safetensors", "base.pt")
    assert_equal(dict(TaskVector.load("task_vector.safetensors")), {"a.weight": torch.full((2, 3), 2.0)})


# From one library's names to another's


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "timm", "image_tower"])
def test_there_and_back_is_the_same_to_the_bit(layout, states, published):
    state = {name: value.half() for name, value in states["digits"].items()}
    whole = str(files.pytorch(Path("whole.pt"), state))
    tower = {name[7:]: value for name, value in state.items() if name.startswith("visual.")}
    result = import_checkpoints(whole, write_as=layout, output="there.safetensors")
    assert result.outputs == [Path("there.safetensors")]
    import_checkpoints("there.safetensors", write_as="open_clip", output="back.safetensors")
    keeps_text = layout in ("open_clip", "transformers")
    assert_equal(load_file("back.safetensors"), state if keeps_text else {f"visual.{n}": v for n, v in tower.items()})
    assert any("has no place in this layout" in line for line in result.lines) != keeps_text
    with safe_open("there.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    import_checkpoints(
        pretrained="there.safetensors", write_as="image_tower", output="tower.safetensors", dtype="float32"
    )
    assert_equal(load_file("tower.safetensors"), {name: value.float() for name, value in tower.items()})


@pytest.mark.parametrize(
    ("kind", "written"), [("CLIPModel", "whole.pt"), ("CLIPVisionModelWithProjection", "tower.pt")]
)
def test_transformers_loads_what_is_written(kind, written, states):
    import transformers

    state = states["signs"]
    files.pytorch(Path("whole.pt"), state)
    files.pytorch(Path("tower.pt"), {name[7:]: value for name, value in state.items() if name.startswith("visual.")})
    folder = files.transformers_folder(Path("folder"), states["zeroshot"], kind)
    expected = files.transformers_folder(Path("expected"), state, kind)
    import_checkpoints(written, write_as="transformers", output="folder/model.safetensors", overwrite=True)
    loaded, reference = (getattr(transformers, kind).from_pretrained(one) for one in (folder, expected))
    assert_equal(loaded.state_dict(), reference.state_dict())


def test_a_text_side_that_is_not_whole_is_not_written(published, states):
    result = import_checkpoints(pretrained=str(published / "zeroshot.pt"), write_as="transformers")
    assert "is not whole, and is not written" in result.lines[1]
    assert not [name for name in load_file("model.safetensors") if name.startswith("text")]


# Refusals


def test_settings_that_are_refused(published):
    pair = {"pretrained": str(published / "zeroshot.pt"), "finetuned": str(published / "digits" / "finetuned.pt")}
    both = [str(published / task / "finetuned.pt") for task in TASKS]
    base = pair["pretrained"]
    refused(ConfigurationError, "finetuned: expected at least one checkpoint, got none. Give", pretrained=base)
    refused(ConfigurationError, "fine-tuning started from, got none", finetuned=pair["finetuned"])
    refused(ConfigurationError, "dtype: expected float32, bfloat16, float16, got 'int8'", **pair, dtype="int8")
    refused(ConfigurationError, "names: expected auto or own", **pair, names="tower")
    refused(ConfigurationError, "each of the 1 checkpoints, got 2", **pair, task=["a", "b"])
    refused(ConfigurationError, "file ending in .safetensors, got v.pt", **pair, output="v.pt")
    refused(ConfigurationError, "a folder for 2 task vectors, got none", pretrained=base, finetuned=both)
    several = {"pretrained": base, "finetuned": both, "output": "out"}
    refused(ConfigurationError, r"name a file each, got 'a/b' among a/b, c\.", **several, task=["a/b", "c"])
    refused(ConfigurationError, "name a file each, got 'a' among a, a", **several, task=["a", "a"])
    refused(ConfigurationError, "write_as: expected one checkpoint .* got 2", **pair, write_as="timm")
    refused(ConfigurationError, "write_as: expected open_clip, image_tower", pretrained=base, write_as="onnx")
    refused(FileFormatError, "none under 'ema', and no section with tensors", **pair, section="ema")
    assert left() == []


def test_outputs_are_not_overwritten_unasked(published, states):
    pair = {"pretrained": str(published / "zeroshot.pt"), "finetuned": str(published / "digits" / "finetuned.pt")}
    Path("task_vector.safetensors").write_text("mine")
    refused(ConfigurationError, "expected a new file, got task_vector.safetensors, which exists", **pair)
    assert Path("task_vector.safetensors").read_text() == "mine"
    import_checkpoints(**pair, overwrite=True)
    assert TaskVector.load("task_vector.safetensors", verify=True).task == "digits"
    files.safetensors(Path("base.safetensors"), states["zeroshot"])
    pair["pretrained"] = "base.safetensors"
    refused(ConfigurationError, "another file than the inputs", **pair, output="base.safetensors", overwrite=True)


def test_checkpoints_that_do_not_fit(published, states, clip_config):
    tuned, base = str(published / "digits" / "finetuned.pt"), str(published / "zeroshot.pt")
    head = str(files.pytorch(Path("head_digits.pt"), {"weight": torch.ones(10, 12), "bias": torch.ones(10)}))
    refused(
        StructureMismatchError, r"head_digits\.pt: .*with an image tower, got none", finetuned=head, pretrained=base
    )
    refused(FileFormatError, "gone.pt: expected a checkpoint, got nothing", finetuned="gone.pt", pretrained=base)
    refused(FileFormatError, "gone.pt: expected a checkpoint, got nothing", finetuned=tuned, pretrained="gone.pt")
    refused(ConfigurationError, "Did you mean ViT-B-32", finetuned=tuned, pretrained=base, model="Vit-B-32")
    refused(StructureMismatchError, "image tower of ViT-B-32: ", finetuned=tuned, pretrained=base, model="ViT-B-32")
    wide = str(files.safetensors(Path("wide.safetensors"), load_clip("lit-tiny", "random").visual.state_dict()))
    refused(StructureMismatchError, "of 2 blocks of width 32 as in .* got", finetuned=wide, pretrained=base)
    Path("two").mkdir()
    for name in "ab":
        files.pytorch(Path("two", f"{name}.pt"), states["digits"])
    refused(
        FileFormatError, r"two: expected one model in this folder, got a\.pt, b\.pt", finetuned="two", pretrained=base
    )
    assert not Path("task_vector.safetensors").exists()


def test_a_mistyped_setting_is_answered_with_the_nearest(published, capsys):
    assert main(["import", "--pretraned", "a", "--finetuned", "b"]) == 2
    assert "Did you mean pretrained?" in capsys.readouterr().err


def test_nothing_is_left_when_writing_fails(published, states):
    broken = {**states["digits"], "visual.conv1.weight": torch.full((32, 3, 16, 16), torch.inf)}
    files.pytorch(Path("broken.pt"), broken)
    with pytest.raises(LitMergeError, match=r"NaN or infinity in conv1\.weight"):
        import_checkpoints("broken.pt", str(published / "zeroshot.pt"), output="out/v.safetensors")
    assert left() == ["broken.pt"]


def test_the_page_shows_command_lines_that_are_right(capsys):
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith("lit-merge import")]
    assert len(lines) >= 7
    for line in lines:
        assert main([*shlex.split(line)[1:], "--print_config"]) == 0, capsys.readouterr().err


# Where else weights are read


@pytest.mark.usefixtures("few_images")
def test_statistics_of_a_folder(states, clip_config, clip_weights):
    folder = files.transformers_folder(Path("folder"), states["digits"], max_shard_size="30KB")
    settings = {"model": clip_config, "pretrained": clip_weights, "images": 2}
    from lit_merge.data import TaskDataModule

    output = statistics(
        "gram", weights=str(folder), data=TaskDataModule(task="digits"), output="g.safetensors", **settings
    )
    with safe_open(output, "pt") as file:
        inputs = json.loads(file.metadata()["inputs"])
    assert inputs["file"] == "folder"
    assert set(inputs["sha256"]) == {path.name for path in open_checkpoint(folder).files}


def test_merging_takes_what_import_takes(published, states, clip_config, clip_weights):
    linear = files.linearised(Path("linear.pt"), clip_config, states["zeroshot"], states["digits"])
    vision = files.transformers_folder(Path("signs"), states["signs"], "CLIPVisionModel")
    merge = ["merge", "--vectors", f"[{linear}, {vision}]", "--recipe", "task_arithmetic", "--progress", "false"]
    whole = ["--model", clip_config, "--pretrained", clip_weights, "--kind", "task_vector"]
    assert main([*merge, "--settings.coefficient", "1.0", *whole, "--output", "tau.safetensors"]) == 0
    expected = {name: value + tau(states, "signs")[name] for name, value in tau(states, "digits").items()}
    expected["proj"] = tau(states, "digits")["proj"]
    assert_equal(dict(TaskVector.load("tau.safetensors")), expected)


def test_merging_any_model_with_an_adapter():
    import peft

    base = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    files.pytorch(Path("base.pt"), {name: value.detach().clone() for name, value in base.state_dict().items()})
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=1, lora_alpha=3, target_modules=["1"], init_lora_weights=False)
    )
    adapted.save_pretrained("adapter")
    merge = ["merge", "--vectors", "[adapter]", "--base", "base.pt", "--recipe", "weight_average"]
    assert main([*merge, "--progress", "false", "--output", "m.safetensors"]) == 0
    merged = load_file("m.safetensors")
    expected = adapted.merge_and_unload().state_dict()
    assert torch.equal(merged["0.weight"], expected["0.weight"])
    torch.testing.assert_close(merged["1.weight"], expected["1.weight"], rtol=0, atol=1e-6)


def test_merging_any_model_from_pytorch_files(states):
    base = {"module.a.weight": torch.ones(4, 3), "module.steps": torch.tensor(3)}
    files.pytorch(Path("base.pt"), base)
    for task, value in (("x", 2.0), ("y", 4.0)):
        tensors = {**base, "module.a.weight": torch.full((4, 3), value)}
        files.pytorch(Path(f"{task}.bin"), tensors, legacy=task == "y")
    merge = ["merge", "--vectors", "[x.bin, y.bin]", "--base", "base.pt", "--recipe", "weight_average"]
    assert main([*merge, "--progress", "false", "--output", "m.safetensors"]) == 0
    assert_equal(load_file("m.safetensors"), {**base, "module.a.weight": torch.full((4, 3), 3.0)})
