"""What is dangerous in a merge is said with numbers, in the plan, on the standard error, in the card and the header."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_merge import TaskVector
from lit_merge.commands.inspect import inspect
from lit_merge.commands.main import main
from lit_merge.commands.merge import merge
from lit_merge.data import MultiTaskDataModule, Task, TensorExamples
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.evaluation.recalibration import Recalibration, recalibrate
from lit_merge.files.shards import open_tensors
from lit_merge.models import ModuleNetwork
from lit_merge.params import fingerprint
from lit_merge.vectors.statistics import write_statistics


def gaussian(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folders(tmp_path):
    """A bfloat16 base and two fine-tunes, b moved ten times as far as a."""
    shapes = {f"layers.{number}.weight": (80, 90) for number in range(3)} | {"norm.weight": (90,)}
    base = {name: gaussian(shape, number).bfloat16() for number, (name, shape) in enumerate(shapes.items())}
    tuned = {
        task: {
            name: base[name].float() + gaussian(shape, 10 + number, scale)
            for number, (name, shape) in enumerate(shapes.items())
        }
        for task, scale in (("a", 1e-3), ("b", 1e-2))
    }
    for name, tensors in {"base": base, **tuned}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path, base, tuned


def test_rounding_is_estimated_before_and_measured_while_writing(folders, capsys):
    folder, base, tuned = folders
    given = {"base": str(folder / "base"), "vectors": [str(folder / "a")], "recipe": "weight_average"}
    target = folder / "merged.safetensors"
    plan = merge(**given, output=str(target), dry_run=True).describe()
    (line,) = [one for one in plan.splitlines() if one.startswith("warnings ")]
    assert line.startswith("warnings       a: rounding to bfloat16 takes about ")
    assert float(line.split("about ")[1].split(" %")[0]) == pytest.approx(80, abs=3)
    assert capsys.readouterr().err == f"lit-merge: warning: {line[15:]}\n"

    merge(**given, output=str(target))
    update = torch.cat([(tuned["a"][name].double() - base[name].double()).flatten() for name in base])
    stored = load_file(target)
    left = torch.cat([(stored[name].double() - base[name].double()).flatten() for name in base])
    lost = float((left - update).norm() / update.norm())
    unchanged = float((left[update != 0] == 0).double().mean())
    header = open_tensors(target).metadata
    assert json.loads(header["rounding"]) == pytest.approx({"lost": lost, "unchanged": unchanged}, rel=1e-4)
    assert 0.75 < lost < 0.85
    said = (
        f"merged.safetensors: rounding to bfloat16 takes {100 * lost:.1f} % of ‖τ‖, and {100 * unchanged:.1f} % of the "
        "elements with τ ≠ 0 stay as they are without it. Set dtype to float32 to keep all of it."
    )
    assert capsys.readouterr().err == f"lit-merge: warning: {said}\n"
    assert f"## Warnings\n\n- {said}\n" in target.with_suffix(".md").read_text()
    found = inspect(str(target))
    assert found.warnings == [said.replace(" to bfloat16", "")]
    shown = " ".join(capsys.readouterr().out.split())
    assert f"warning: {found.warnings[0]}" in shown

    sharded = folder / "sharded"
    merge(**given, output=str(sharded), shard_size="20KB")
    assert open_tensors(sharded).metadata["rounding"] == header["rounding"]
    wide = folder / "wide.safetensors"
    merge(**given, output=str(wide), dtype="float32")
    assert "rounding" not in open_tensors(wide).metadata
    assert inspect(str(wide), as_json=True).warnings == []


def test_norms_and_repeated_vectors(folders, capsys):
    folder, *_ = folders
    shutil.copytree(folder / "a", folder / "again")
    target = folder / "merged.safetensors"
    given = [str(folder / name) for name in ("a", "b", "again")]
    result = merge(given, str(target), base=str(folder / "base"), recipe="weight_average", dtype="float32")
    repeated, norms = result.plan.warnings
    assert repeated.startswith("a and again are the same vector, all of 6,234 elements that were compared are equal")
    assert "times that of a" in norms
    assert float(norms.split(", ")[1].split(" times")[0]) == pytest.approx(10, rel=0.1)
    assert capsys.readouterr().err == f"lit-merge: warning: {repeated}\nlit-merge: warning: {norms}\n"
    assert json.loads(open_tensors(target).metadata["warnings"]) == [repeated, norms]
    assert inspect(str(target)).warnings == [repeated, norms]
    capsys.readouterr()
    vector = folder / "vector.safetensors"
    merge(given[1:], str(vector), base=str(folder / "base"), recipe="weight_average", kind="task_vector")
    assert json.loads(TaskVector.load(vector).metadata["warnings"]) == [norms.replace("of a,", "of again,")]


def test_tokenizers_and_activations_of_folders(folders, capsys):
    folder, *_ = folders
    for name, tokens, activation in (("base", "abc", "gelu"), ("a", "acb", "gelu_python"), ("b", "abc", "relu")):
        (folder / name / "vocab.txt").write_text("\n".join(tokens))
        (folder / name / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": activation}))
    given = {"base": str(folder / "base"), "recipe": "weight_average", "dtype": "float32"}
    plan = merge([str(folder / "a")], str(folder / "out.safetensors"), **given, dry_run=True).plan
    assert plan.warnings == (
        "the tokenizer of a differs from that of the base in 2 tokens ('b', 'c') of 3: their embeddings are merged "
        "with those of other tokens. Merge models of one tokenizer.",
    )
    with pytest.raises(StructureMismatchError) as refused:
        merge([str(folder / "b")], str(folder / "out.safetensors"), **given)
    assert str(refused.value) == (
        f"{folder / 'b'}: expected weights for the activation gelu, which base computes, got ones trained with relu. "
        "Use a base model with relu."
    )


def test_statistics_of_an_unknown_base(folders, capsys):
    folder, base, _ = folders
    ones = {name: torch.ones(value.shape) for name, value in base.items()}
    write_statistics(folder / "a-fisher.safetensors", "fisher", ones, "a")
    given = {"base": str(folder / "base"), "dtype": "float32", "recipe": "fisher"}
    given |= {"settings": {"statistics": {"a": str(folder / "a-fisher.safetensors")}}}
    (line,) = merge([str(folder / "a")], str(folder / "out.safetensors"), **given).plan.warnings
    assert line.startswith(
        "a-fisher.safetensors: whether these statistics of a are of the same base model is not known"
    )


# CLIPs


def test_a_clip_of_another_activation_is_refused(clip_config, clip_weights, tmp_path, capsys):
    content = json.loads(Path(clip_config).read_text(encoding="utf-8"))
    quick = tmp_path / "tiny-clip-quickgelu.json"
    quick.write_text(json.dumps({**content, "quick_gelu": True}))
    state = load_file(clip_weights)
    visual = {name[7:]: value.float() for name, value in state.items() if name.startswith("visual.")}
    known = {"base_fingerprint": fingerprint(visual), "base_model": "tiny-clip", "activation": "gelu"}
    path = tmp_path / "v.safetensors"
    TaskVector({name: 0.1 * torch.ones_like(value) for name, value in visual.items()}, "v", metadata=known).save(path)
    given = [f"--vectors=[{path}]", "--recipe=weight_average", f"--pretrained={clip_weights}"]
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", *given, f"--model={clip_config}", f"--output={merged}"]) == 0
    assert open_tensors(merged).metadata["activation"] == "gelu"
    assert main(["merge", *given, f"--model={quick}", f"--output={tmp_path / 'no.safetensors'}"]) == 1
    assert capsys.readouterr().err == (
        "lit-merge: error: task vectors (v): expected weights for the activation quick_gelu, which tiny-clip-quickgelu "
        "computes, got ones trained with gelu. Use model tiny-clip, or a configuration with quick_gelu: false.\n"
    )
    again = ["merge", f"--vectors=[{merged}]", "--recipe=weight_average", f"--pretrained={clip_weights}"]
    assert main([*again, f"--model={quick}", f"--output={tmp_path / 'no.safetensors'}"]) == 1
    assert f"{merged}: expected weights for the activation quick_gelu" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


# Running statistics


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, images):
        return self.linear(torch.relu(self.bn(self.conv(images))).mean((2, 3)))


class Blurred(Task):
    classes, templates = ("a", "b"), ("{}",)

    def __init__(self, mean):
        self.name, self.mean = "", mean

    def split(self, split, preprocessing, augmentation_seed=None):
        return TensorExamples([self.mean + gaussian((30, 3, 5, 5), len(split))], torch.zeros(30, dtype=torch.int64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_running_statistics_are_measured_in_the_merged_network(dtype, tmp_path, capsys):
    torch.manual_seed(0)
    network = ModuleNetwork(Normalised(), preprocessing=object(), name="small")
    start = {name: value.clone() for name, value in network.module.state_dict().items()}
    paths = []
    for seed, task in enumerate("ab"):
        moved = {name: gaussian(value.shape, seed, 0.3) for name, value in network.module.named_parameters()}
        paths.append(str(tmp_path / f"{task}.safetensors"))
        TaskVector(moved, task).save(paths[-1])
    data = MultiTaskDataModule(sources={"a": Blurred(-1.0), "b": Blurred(2.0)})
    settings = Recalibration(images=20, batch_size=10)
    target = tmp_path / "merged.safetensors"
    given = {"network": network, "recipe": "task_arithmetic", "dtype": dtype}
    result = merge(paths, str(target), **given, recalibrate=settings, data=data)
    line = "2 running statistics: measured again on 20 train images (recalibrate)"
    assert line in result.describe()
    assert "recalibrate:" in (card := target.with_suffix(".md").read_text())
    assert line in card
    stored = load_file(target)
    plain = Normalised()
    plain.load_state_dict(stored)
    expected = recalibrate(plain, settings.batches(network, ["a", "b"], data))
    for name, value in expected.items():
        assert not torch.equal(stored[name], start[name])
        torch.testing.assert_close(stored[name], value.to(stored[name].dtype), rtol=0, atol=0)
    assert stored["bn.num_batches_tracked"] == start["bn.num_batches_tracked"]
    assert all(torch.equal(start[name], value) for name, value in network.module.state_dict().items())
    merge(paths, str(tmp_path / "plain.safetensors"), **given)
    plain = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in stored.items() if name not in expected)


def test_what_cannot_be_recalibrated_is_refused(folders, tmp_path):
    folder, *_ = folders
    target = str(tmp_path / "no.safetensors")
    with pytest.raises(ConfigurationError, match="base: expected a network, which can be evaluated, got the weights"):
        merge([str(folder / "a")], target, "weight_average", base=str(folder / "base"), recalibrate=Recalibration())
    path = tmp_path / "v.safetensors"
    for module, more, message in (
        (nn.Linear(2, 2), {}, "expected a network with running statistics, .* got Linear without. Remove recalibrate"),
        (Normalised(), {"kind": "task_vector"}, "expected merged weights, got kind task_vector. Remove one of them"),
        (Normalised(), {"linearized": True}, "expected merged weights, got a linearised merge, whose normalisations"),
    ):
        TaskVector({name: value.detach() for name, value in module.named_parameters()}, "v").save(path)
        with pytest.raises(ConfigurationError, match=message):
            merge(
                [str(path)],
                target,
                "weight_average",
                network=ModuleNetwork(module),
                recalibrate=Recalibration(),
                **more,
            )
