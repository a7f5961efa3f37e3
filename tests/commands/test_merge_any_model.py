"""``merge`` of any model's weights: lazily differenced, sharded or not, into files that are whole or absent."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import resource
import shutil
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lit_merge.models.merging.plan
from lit_merge.commands.main import main
from lit_merge.commands.merge import merge
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, NonFiniteError, StructureMismatchError
from lit_merge.files.shards import open_tensors, plan_shards, write_shards
from lit_merge.models import full_clip_model
from lit_merge.models.merging.merge import Merge
from lit_merge.params import fingerprint
from lit_merge.transforms import Chain, Mean, Override, Scale, Sum, WithOverrides, ties
from lit_merge.vectors import LazyTensors, TaskVector

TASKS = ("code", "maths")
SHAPES = {f"layers.{i}.{part}": (6, 6) for i in range(3) for part in ("attn.weight", "mlp.weight")}
SHAPES |= {"embed.weight": (9, 6), "norm.weight": (6,)}


def random(seed, size=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * size).to(dtype) for name, shape in SHAPES.items()}


def shard(folder, tensors, size="500"):
    folder.mkdir()
    write_shards(folder, tensors, {}, plan_shards(tensors, int(size), "model"), "model")
    return str(folder)


@pytest.fixture
def theta():
    """θ0 in bfloat16, as language models are published, with positions that are no weights and a scalar."""
    return {**random(0, dtype=torch.bfloat16), "positions": torch.arange(9), "scale": torch.tensor(0.5).bfloat16()}


@pytest.fixture
def tuned(theta):
    """Task -> θ."""
    moved = [random(seed, 0.1) for seed in (1, 2)]
    return {
        task: {**theta, **{name: (theta[name].float() + by[name]).bfloat16() for name in by}}
        for task, by in zip(TASKS, moved, strict=True)
    }


@pytest.fixture
def files(theta, tuned, tmp_path):
    """The settings of a merge: the base and one model sharded, the other model in a file."""
    place = tmp_path / "in"
    place.mkdir()
    save_file(tuned["maths"], place / "maths.safetensors")
    base = shard(place / "tiny-lm", theta)
    return {"base": base, "vectors": [shard(place / "code", tuned["code"]), str(place / "maths.safetensors")]}


def exact(theta, tuned, coefficient):
    """θ0 + α Σ (θ_t − θ0) in float64."""
    taus = [{name: tuned[task][name].double() - theta[name].double() for name in SHAPES} for task in TASKS]
    return {name: theta[name].double() + coefficient * sum(tau[name] for tau in taus) for name in SHAPES}


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(error_class, line, **settings):
    with pytest.raises(error_class, match=line) as error:
        merge(**settings)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)


# Weights in, weights out


@pytest.mark.parametrize(
    ("dtype", "stored"), [(None, torch.bfloat16), ("as_base", torch.bfloat16), ("float32", torch.float32)]
)
def test_the_sum_is_rounded_once(dtype, stored, files, theta, tuned, tmp_path):
    output = tmp_path / "m.safetensors"
    merge(**files, output=str(output), recipe="task_arithmetic", settings={"coefficient": 0.7}, dtype=dtype)
    merged = load_file(output)
    assert set(merged) == set(theta)
    for name, value in exact(theta, tuned, 0.7).items():
        assert merged[name].dtype == stored
        step = 2**-8 if stored == torch.bfloat16 else 1e-6
        assert ((merged[name].double() - value).abs() <= step * value.abs() + 1e-6).all(), name
        if stored == torch.float32:  # nothing went through bfloat16 on the way
            torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-6)
    for name in ("positions", "scale"):
        assert merged[name].dtype == theta[name].dtype
        assert torch.equal(merged[name], theta[name])


def test_what_no_vector_has_passes_through(theta, files, tmp_path):
    path = tmp_path / "partial.safetensors"
    TaskVector({"norm.weight": torch.ones(6)}, "partial").save(path)
    output = tmp_path / "m.safetensors"
    merge([str(path)], str(output), "weight_average", base=files["base"])
    merged = load_file(output)
    assert torch.equal(merged.pop("norm.weight"), (theta.pop("norm.weight").float() + 1).bfloat16())
    assert all(torch.equal(merged[name], theta[name]) for name in theta)
    assert set(merged) == set(theta)


def test_a_task_vector_of_weights_fits_the_base(files, theta, tuned, tmp_path):
    output = tmp_path / "tau.safetensors"
    merge(**files, output=str(output), recipe="weight_average", kind="task_vector")
    vector = TaskVector.load(output, verify=True)
    assert (vector.task, {str(vector.dtype(name)) for name in vector}) == ("code+maths", {"torch.float32"})
    for name, value in exact(theta, tuned, 0.5).items():
        torch.testing.assert_close(vector[name].double(), value - theta[name].double(), rtol=0, atol=1e-6)
    floating = {name: value for name, value in theta.items() if value.is_floating_point()}
    assert vector.base_fingerprint == fingerprint(floating)
    assert json.loads(vector.metadata["storage"])["dtype"] == "float32"
    merge([str(output)], str(tmp_path / "m.safetensors"), "weight_average", base=files["base"])  # and is known by it
    other = tmp_path / "other.safetensors"
    save_file({**theta, "scale": theta["scale"] + 1}, other)
    line = r"expected the base model tiny-lm \(fingerprint [0-9a-f]{16}\), got other \(fingerprint"
    again = {"vectors": [str(output)], "output": str(tmp_path / "no.safetensors"), "recipe": "weight_average"}
    refused(StructureMismatchError, line, **again, base=str(other))
    as_base = merge(**files, output=str(tmp_path / "h.safetensors"), recipe="weight_average", kind="task_vector",
                    dtype="as_base")  # fmt: skip
    half = TaskVector.load(as_base.output)
    assert {half.dtype(name) for name in half} == {torch.bfloat16}
    assert 0 < json.loads(half.metadata["storage"])["relative_error"] < 2**-8


def test_a_fine_tuned_clip_is_a_task_vector_of_its_image_tower(clip_config, clip_weights, tmp_path):
    weights = load_file(clip_weights)
    for name in weights:
        if name.startswith("visual."):
            weights[name] = weights[name] + 0.25
    place = tmp_path / "flowers" / "model.safetensors"
    place.parent.mkdir()
    save_file(weights, place)
    settings = {"recipe": "weight_average", "model": clip_config, "pretrained": clip_weights}
    result = merge([str(place)], str(tmp_path / "tau.safetensors"), kind="task_vector", **settings)
    vector = TaskVector.load(result.output)
    assert vector.task == "flowers"  # the folder's name: "model" says nothing
    assert {name for name in weights if name.startswith("visual.")} == {f"visual.{name}" for name in vector}
    assert all(torch.allclose(vector[name], torch.tensor(0.25)) for name in vector)
    save_file({"w": torch.ones(1)}, place)
    line = r"flowers/model.safetensors: expected a task vector, or the weights of a whole CLIP .* for 32 of 32 param"
    refused(StructureMismatchError, line, vectors=[str(place)], output=str(tmp_path / "no.safetensors"), **settings)


def test_open_clip_is_not_needed(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # importing it is an error; no module does so when imported
    with pytest.raises(ImportError):
        full_clip_model("lit-tiny")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    merge(**files, output=str(first), recipe="ties")
    arguments = ["merge", f"--vectors={json.dumps(files['vectors'])}", f"--base={files['base']}", "--recipe=ties"]
    assert main([*arguments, f"--output={second}"]) == 0
    assert first.read_bytes() == second.read_bytes()


# Parts and overrides


def test_parts_and_overrides(files, theta, tuned, tmp_path):
    parts = ["Sum", {"Scale": {"coefficient": 0.5}}]
    overrides = [
        {"names": "norm", "parts": ["weight_average"]},
        {"blocks": [0, 1], "parts": [{"task_arithmetic": {"coefficient": 0.1}}]},
    ]
    output = tmp_path / "m.safetensors"
    result = merge(**files, output=str(output), parts=parts, overrides=overrides, dtype="float32")
    assert result.transform == WithOverrides(
        Chain((Sum(), Scale(0.5))),
        (Override(Chain((Mean(),)), "norm"), Override(Chain((Sum(), Scale(0.1))), blocks=(0, 1))),
    )
    merged = load_file(output)
    for name in SHAPES:
        coefficient = 0.1 if name.startswith(("layers.0.", "layers.1.")) else 0.5
        torch.testing.assert_close(merged[name].double(), exact(theta, tuned, coefficient)[name], rtol=0, atol=1e-6)
    same = merge(**files, output=str(tmp_path / "n.safetensors"), recipe="task_arithmetic",
                 settings={"coefficient": 0.5}, overrides=overrides, dtype="float32")  # fmt: skip
    assert same.output.read_bytes() == output.read_bytes()


def test_parts_from_a_file_and_from_the_command_line(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--vectors", json.dumps(files["vectors"]), "--base", files["base"]]
    parts = "[{ties: {density: 0.1}}, {Scale: {coefficient: 0.5}}, {DisjointMean: null}]"
    assert main(["merge", *given, "--parts", parts, "--overrides", "[{names: norm, parts: [Mean]}]", "--output=a"]) == 0
    config = f"parts: {parts}\noverrides:\n  - names: norm\n    parts: [Mean]\n"
    Path("b.yaml").write_text(config, encoding="utf-8")
    assert main(["merge", *given, "--config", "b.yaml", "--output=b"]) == 0
    assert main(["merge", *given, "--config", "a/merge.yaml", "--output=c"]) == 0
    first, *others = (Path(name, "model.safetensors").read_bytes() for name in "abc")
    assert others == [first, first]
    with safe_open("a/model.safetensors", "pt") as file:
        assert file.metadata()["transform"].startswith("WithOverrides(transform=chain(Trim(density=0.1, ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--parts=[Sum, Scail]"], "Did you mean Scale?"),
        (["--parts=[{Trim: {densty: 0.1}}, Sum]"], "Did you mean density?"),
        (["--parts=[{Trim: {density: 1.5}}, Sum]"], "Trim.density: expected a"),
        (["--parts=[Sum]", "--overrides=[{blocks: [7], parts: [Sum]}]"], "below the number of blocks (3), got 7"),
        (["--parts=[Sum]", "--overrides=[{nmes: a, parts: [Sum]}]"], "Did you mean names?"),
        (["--parts=[Sum]", "--recipe=ties"], "exactly one of them, got recipe and parts"),
        (["--parts=[Sum]", "--settings.density=1"], "settings: expected none beside parts"),
        (
            ["--parts=[{ConsensusMask: {k: 3}}]"],
            "ConsensusMask.k: expected at most the number of task vectors (2), got 3",
        ),
        (["--parts=[Sum]", "--device=cuda:77"], "device: expected one that is there, got 'cuda:77' ("),
        (["--parts=[Sum]", "--device=toaster"], "device: expected one that is there, got 'toaster' ("),
        (["--parts=[Sum]", "--shard_size=2GB"], "shard_size: expected a folder as output, got the file m.safetensors"),
        (["--parts=[Sum]", "--output=f", "--shard_size=2GBB"], "shard_size: expected a size such as 2GB"),
        (["--parts=[Sum]", "--pretrained=openai"], "base and pretrained: expected at most one of them, got both"),
        (["--parts=[Sum]", "--search.values=[1]"], "search: expected a CLIP, which can be evaluated, got base."),
        (["--parts=[Sum]", "--tasks=[a]"], "tasks: expected a name for each of the 2 vectors, got 1."),
        (["--parts=[Sum]", "--dtype=int8"], "got 'int8'"),
    ],
)
def test_one_line_for_what_is_wrong(options, line, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = left(tmp_path)
    given = ["--vectors", json.dumps(files["vectors"]), "--base", files["base"], "--output=m.safetensors"]
    assert main(["merge", *given, *options]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert len(said) < 500
    assert left(tmp_path) == before


# Inputs that do not fit


def test_models_that_do_not_fit(files, theta, tuned, tmp_path):
    path = tmp_path / "odd.safetensors"
    before = sorted([*left(tmp_path), path.name])
    settings = {"output": str(tmp_path / "m.safetensors"), "recipe": "weight_average", "base": files["base"]}
    lacking = {name: value for name, value in tuned["code"].items() if "attn" not in name}
    wide = {name: value.repeat(2, 1) if value.ndim == 2 else value for name, value in theta.items()}
    whole = {**theta, "positions": theta["positions"].float()}
    for tensors, line in (
        (
            {**lacking, "more": torch.ones(1)},
            r"odd.safetensors: .*the same 9 parameters, got 3 missing \(layers\.0\.attn\.weight, layers\.1",
        ),
        ({**theta, "extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
        (wide, r"7 of another shape \(.*\(18, 6\) instead of \(9, 6\).* and 4 more\)\."),
        (whole, r"real floating-point values in both, got positions \(torch.int64 and torch.float32\)"),
    ):
        save_file(tensors, path)
        refused(StructureMismatchError, line, vectors=[files["vectors"][0], str(path)], **settings)
    for tensors, line in (
        ({"norm.weight": torch.ones(2)}, r"got 1 of another shape \(norm.weight \(6,\) instead of \(2,\)"),
        ({"extra": torch.ones(2)}, r"every parameter of the task vectors, got 1 missing \(extra\)"),
        ({"positions": torch.ones(9)}, r"expected a floating-point base, got positions \(torch.int64\)"),
    ):
        TaskVector(tensors, "odd").save(path)
        refused(StructureMismatchError, line, vectors=[str(path)], **settings)
    broken = {name: value.clone() for name, value in tuned["code"].items()}
    broken["layers.1.mlp.weight"][2, 3] = torch.nan
    save_file(broken, path)
    line = r"(task vector|fine-tuned|difference).*got NaN or infinity in layers\.1\.mlp\.weight"
    refused(NonFiniteError, line, vectors=[files["vectors"][0], str(path)], **settings)
    save_file({name: value * 1e4 if value.is_floating_point() else value for name, value in theta.items()}, path)
    line = r"expected values that fit into torch.float16, got [\d.e+]+ in \S+\. Store"
    refused(NonFiniteError, line, vectors=[str(path)], **{**settings, "dtype": "float16", "recipe": "task_arithmetic",
                                                          "settings": {"coefficient": 10}})  # fmt: skip
    assert left(tmp_path) == before


def test_what_is_not_finite_is_told_from_what_does_not_fit(tmp_path):
    """A damaged base is no fine-tune's fault, nor is a sum that the stored type cannot hold: that one has a way out."""
    good = {"w": torch.full((4,), 6e4).half(), "v": torch.ones(4).half()}
    larger = {"w": torch.full((4,), 6.2e4).half(), "v": torch.ones(4).half()}
    damaged = {**good, "w": torch.tensor([1.0, math.nan, 1.0, 1.0]).half()}
    for name, tensors in (("good", good), ("larger", larger), ("damaged", damaged)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("good", "larger", "damaged")}

    def merged(base, recipe="task_arithmetic", **settings):
        settings = {"settings": {"coefficient": 3}, "output": str(tmp_path / "m.safetensors"), **settings}
        return merge([paths["larger"], paths["good"]], base=paths[base], recipe=recipe, **settings)

    for recipe, settings in (("task_arithmetic", {"coefficient": 3}), ("ties", {}), ("iso_c", {})):
        with pytest.raises(
            NonFiniteError, match=r"^base model: expected finite values, got NaN or infinity in w\. Use"
        ):
            merged("damaged", recipe, settings=settings)
    with pytest.raises(
        NonFiniteError, match=r"fit into torch\.float16, got 6\.6e\+04 in w\. Store them as bfloat16 or f"
    ):
        merged("good")
    merged("good", dtype="bfloat16")
    assert float(load_file(tmp_path / "m.safetensors")["w"][0]) == 66048  # 66,000 to the nearest


def test_of_two_merges_at_once_the_later_one_finds_what_the_other_wrote(files, tmp_path, monkeypatch):
    card, out, mean = Merge._card, tmp_path / "out", tmp_path / "mean.safetensors"

    def meanwhile(job, planned, warnings):
        monkeypatch.setattr(Merge, "_card", card)
        merge(**files, output=str(out), recipe="weight_average", shard_size="300B", overwrite=True)
        return card(job, planned, warnings)

    def slower(overwrite):
        monkeypatch.setattr(Merge, "_card", meanwhile)
        merge(**files, output=str(out), recipe="task_arithmetic", overwrite=overwrite)

    with pytest.raises(ConfigurationError, match=r"expected a new file, got .*, which exists\. Set overwrite"):
        slower(overwrite=False)
    merge(**files, output=str(mean), recipe="weight_average")
    assert all(torch.equal(open_tensors(out)[name], value) for name, value in load_file(mean).items())
    slower(overwrite=True)
    assert [path.name for path in out.glob("*safetensors*")] == ["model.safetensors"]  # no shard of the other's


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "folder"])
def test_an_input_is_never_replaced(link, files, tmp_path):
    maths = Path(files["vectors"][1])
    output = {"same": maths, "folder": Path(files["base"])}.get(link, tmp_path / "m.safetensors")
    if link == "symlink":
        output.symlink_to(maths)
    if link == "hardlink":
        os.link(maths, output)
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()}
    line = r"output: expected another file than the inputs, got .*Choose another name"
    refused(ConfigurationError, line, **files, output=str(output), recipe="weight_average", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()} == before


# Shards out


def test_shards_out(files, theta, tmp_path):
    whole = merge(**files, output=str(tmp_path / "m.safetensors"), recipe="ties").output
    result = merge(**files, output=str(tmp_path / "new" / "llm-1.5"), recipe="ties", shard_size="300B")
    names = left(tmp_path / "new" / "llm-1.5")
    assert names[0] == "README.md"
    assert names[1:] == [path for path, _ in sorted((Path(path).name, 0) for path, _ in result.plan.files)]
    opened, expected = open_tensors(result.output, verify=True), load_file(whole)
    assert set(opened) == set(theta)
    assert all(torch.equal(opened[name], expected[name]) for name in theta)
    sizes = [sum(value.nbytes for value in load_file(path).values()) for path in result.output.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 300
    assert opened.metadata["transform"] == repr(ties())
    again = {**files, "output": str(result.output), "recipe": "weight_average"}
    refused(ConfigurationError, r"a new file, got .*index.json, which exists\. Set overwrite", **again)
    (result.output / "config.json").write_text("{}")  # the user's own
    merge(**again, overwrite=True)
    assert left(result.output) == ["README.md", "config.json", "model.safetensors"]


def test_shards_say_how_the_whole_was_rounded(files, tmp_path):
    settings = {**files, "recipe": "ties", "kind": "task_vector", "dtype": "bfloat16"}
    whole = merge(**settings, output=str(tmp_path / "v.safetensors")).output
    shards = merge(**settings, output=str(tmp_path / "v"), shard_size="300B").output
    expected = TaskVector.load(whole).metadata["storage"]
    assert json.loads(expected)["relative_error"] > 0
    assert TaskVector.load(shards, verify=True).metadata["storage"] == expected


def test_a_folder_takes_one_file_as_well(files, tmp_path):
    merge(**files, output=str(tmp_path / "m"), recipe="ties", shard_size="1GB")
    assert left(tmp_path / "m") == ["README.md", "model.safetensors"]
    merge(**files, output=str(tmp_path / "v"), recipe="ties", kind="task_vector")
    assert left(tmp_path / "v") == ["README.md", "task_vector.safetensors"]


@pytest.mark.parametrize("fault", ["disk", "limit", "interrupt", "card"])
@pytest.mark.parametrize("sharded", [True, False])
def test_nothing_is_left_of_a_merge_that_fails(fault, sharded, files, tmp_path, monkeypatch):
    output = tmp_path / "new" / "place" / ("m" if sharded else "m.safetensors")
    settings = {**files, "output": str(output), "recipe": "ties", "shard_size": "300" if sharded else None}
    existing = merge(**{**settings, "output": str(tmp_path / ("old" if sharded else "old.safetensors"))}).output
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    count = [0]

    def fail(*_, **__):
        count[0] += 1
        if count[0] > 1 or not sharded:
            raise {"disk": OSError(errno.ENOSPC, "No space left on device")}.get(fault, KeyboardInterrupt())
        return real(*_, **__)

    real = os.fsync
    if fault == "card":
        monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    elif fault != "limit":
        monkeypatch.setattr(os, "fsync", fail)
    for again in (settings, {**settings, "output": str(existing), "overwrite": True}):
        count[0] = 0
        if fault == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises((OSError, KeyboardInterrupt)):
                merge(**again)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert not (tmp_path / "new").exists()


def test_a_full_disk_is_noticed_before_the_work(files, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(lit_merge.models.merging.plan.shutil, "disk_usage", lambda place: usage(10**6, 10**6, 100))
    line = r"output: expected 0\.0 MiB of free space in .*, got 0\.0 MiB\. Free some"
    refused(ConfigurationError, line, **files, output=str(tmp_path / "a" / "m.safetensors"), recipe="ties")
    assert not (tmp_path / "a").exists()


# Several vectors


@pytest.mark.parametrize("kind", ["weights", "task_vector"])
def test_a_vector_per_task(kind, files, theta, tuned, tmp_path):
    output = tmp_path / "masked"
    settings = {**files, "recipe": "tall_masks", "kind": kind, "dtype": "float32"}
    merge(**settings, output=str(output))
    assert left(output) == ["README.md", "code.safetensors", "maths.safetensors"]
    taus = {task: {n: tuned[task][n].double() - theta[n].double() for n in SHAPES} for task in TASKS}
    for task in TASKS:
        stored = load_file(output / f"{task}.safetensors")
        for name in SHAPES:
            total = taus["code"][name] + taus["maths"][name]
            masked = total * (taus[task][name].abs() > 0.4 * (total - taus[task][name]).abs())
            expected = masked + (theta[name].double() if kind == "weights" else 0)
            torch.testing.assert_close(stored[name].double(), expected, rtol=0, atol=1e-6)
        if kind == "task_vector":
            assert TaskVector.load(output / f"{task}.safetensors").task == task
    line = r"output: expected one vector, got 2 \(code, maths\) for one file\. Reduce them"
    refused(ConfigurationError, line, **settings, output=str(tmp_path / "m.safetensors"))
    for tasks in (["a/b", "c"], ["..", "c"], ["a", "a"]):
        line = rf"output: expected tasks that can name a file each, got '{re.escape(tasks[0])}' among"
        refused(ConfigurationError, line, **settings, output=str(tmp_path / "no"), tasks=tasks)
    assert not (tmp_path / "no").exists()
    merge(**settings, output=str(tmp_path / "named"), tasks=["a b", "c"], shard_size="1000B")
    assert open_tensors(tmp_path / "named" / "a b.safetensors.index.json")["norm.weight"].shape == (6,)


# What is read, and what is known without


def test_verification_reads_and_hashes(files, tmp_path):
    vector = tmp_path / "v.safetensors"
    TaskVector({**random(5), "scale": torch.tensor(1.0)}, "v").save(vector)
    settings = {"vectors": [*files["vectors"], str(vector)], "base": files["base"], "recipe": "ties"}
    for verify in (False, True):
        output = merge(**settings, output=str(tmp_path / f"{verify}.safetensors"), verify=verify).output
        with safe_open(output, "pt") as file:
            header = file.metadata()
        inputs = json.loads(header["inputs"])
        content = {"content_blake3": LazyTensors(vector).content_digest}
        assert inputs[2] == {"tasks": "v", **content}
        assert inputs[0]["content_blake3"] == open_tensors(files["vectors"][0]).content_digest
        assert ("sha256" in inputs[1]) == verify  # written by another program, without a digest of its own
        assert json.loads(header["base"]) == {"content_blake3": open_tensors(files["base"]).content_digest}
    vector.write_bytes(vector.read_bytes()[:-1] + b"\x01")
    merge(**settings, output=str(tmp_path / "unnoticed.safetensors"))
    line = "the file has changed since it was written"
    refused(FileFormatError, line, **settings, output=str(tmp_path / "no.safetensors"), verify=True)


def test_a_dry_run_reads_no_parameter_and_writes_nothing(files, tmp_path, monkeypatch, capsys):
    def refuse(self, original, name):
        assert name == "positions", f"{name} was read"  # an integer buffer, which is compared
        return original(self, name)

    before = left(tmp_path)
    monkeypatch.setattr(LazyTensors, "__getitem__", partialmethod(refuse, LazyTensors.__getitem__))
    settings = {**files, "output": str(tmp_path / "out"), "parts": [{"Trim": {"density": 0.5}}, "ElectSign",
                "DisjointMean", {"LiNeS": {"alpha": "norm_ratio", "beta": 0.5}}], "shard_size": "500B"}  # fmt: skip
    result = merge(**settings, dry_run=True, verify=True, kind="task_vector")
    assert not result.written
    plan = result.plan
    assert [(one[0], one[2], one[3]) for one in plan.inputs] == [
        ("code", "weights", "bfloat16, int64"),
        ("maths", "weights", "bfloat16, int64"),
    ]
    assert [what.split(":")[0] for what, _, _ in plan.statistics] == ["Trim", "ElectSign", "LiNeS"]
    assert plan.largest_stack == 2 * 54 * 4
    assert plan.by_chunks
    assert plan.passes == plan.walks + sum(reads for _, reads, _ in plan.statistics)
    parameters = 6 * 36 + 54 + 6
    assert plan.written == (parameters + 1) * 4
    # every pass reads both models and, to difference them, the base once; the fingerprint reads all of the base
    one_pass = 3 * (parameters + 1) * 2
    assert plan.read == one_pass * plan.passes + (parameters + 1) * 2 + 9 * 8
    weights = merge(**settings, dry_run=True).plan
    assert weights.written == (parameters + 1) * 2 + 9 * 8
    arguments = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    ]
    assert main(["merge", *arguments, "--dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{weights}\n"
    lines = printed.splitlines()
    assert lines[0].split() == ["inputs", "code", files["vectors"][0], "weights", "bfloat16,", "int64", "0.0", "MiB"]
    assert lines[3].startswith("chain          1. Trim(density=0.5, ")
    assert all(len(line) > 15 and (line[:15].strip() == "" or line[14] == " ") for line in lines)
    assert any(line.startswith("passes ") and "over the inputs" in line for line in lines)
    assert left(tmp_path) == before


def test_the_plan_of_several_files_counts_each(files, tmp_path):
    plan = merge(**files, output=str(tmp_path / "m"), recipe="tall_masks", dry_run=True).plan
    single = merge(**files, output=str(tmp_path / "m"), parts=[{"TallMask": {}}, "Sum"], dry_run=True).plan
    assert plan.walks == 2 * single.walks
    assert [Path(name).name for name, _ in plan.files] == ["code.safetensors", "maths.safetensors"]
    stacks = merge(**files, output=str(tmp_path / "m"), parts=["TSVMerge"], dry_run=True).plan
    assert not stacks.by_chunks
    assert "as a whole" in str(stacks)
    assert "none" in str(stacks)


def test_the_plan_counts_what_matrices_take(tmp_path):
    for name in ("base", "one", "two"):
        save_file({"wide": torch.rand(16, 9000), "bias": torch.rand(16)}, tmp_path / f"{name}.safetensors")
    models = {
        "base": str(tmp_path / "base.safetensors"),
        "vectors": [str(tmp_path / f"{name}.safetensors") for name in ("one", "two")],
    }
    plan = merge(**models, output=str(tmp_path / "m.safetensors"), recipe="wudi", dry_run=True).plan
    assert plan.matrices is not None
    assert plan.matrices[0] == (16, 9000)
    assert plan.matrices[1] > 300 * 2 * 2 * 16 * 9000
    assert plan.largest_stack < plan.memory < 64 << 20  # not the 324 MB of a matrix of 9,000 x 9,000
    assert "matrices       the largest 16 x 9000; " in str(plan)
    sums = merge(**models, output=str(tmp_path / "m.safetensors"), recipe="task_arithmetic", dry_run=True).plan
    assert sums.matrices is None


def test_the_plan_counts_the_chunks_of_every_thread(files, tmp_path):
    threads, memory = torch.get_num_threads(), []
    for count in (1, 2, 40, 80):
        torch.set_num_threads(count)
        plan = merge(**files, output=str(tmp_path / "m.safetensors"), recipe="ties", dry_run=True).plan
        memory.append(plan.memory >> 20)
    torch.set_num_threads(threads)
    assert [one - memory[0] for one in memory] == [0, 32, 15 * 32, 15 * 32]  # measured: 1.9 GiB for 64, if all computed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_the_progress_bar(terminal, progress, shown, files, tmp_path, monkeypatch):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    merge(**files, output=str(tmp_path / "m.safetensors"), recipe="ties", progress=progress)
    assert bool(stream.getvalue()) == shown
    if shown:
        assert "Trim" in stream.getvalue()
        assert "100%" in stream.getvalue() or "bytes" in stream.getvalue()


# The model card


def blocks(card, kind):
    return re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("kind", ["weights", "task_vector"])
@pytest.mark.parametrize("output", ["m.safetensors", "m"])
@pytest.mark.parametrize("source", ["files", "clip"])
def test_the_card_says_how_to_do_it_again(
    source, output, kind, files, clip_config, clip_weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = {**files, "overrides": [{"names": "norm", "parts": ["Mean"]}]}
    if source == "clip":
        settings = {"model": clip_config, "pretrained": clip_weights, "vectors": ["v.safetensors"]}
        tensors = load_file(clip_weights)
        zeros = {name[7:]: torch.ones_like(t) for name, t in tensors.items() if name.startswith("visual.")}
        TaskVector(zeros, "v").save("v.safetensors")
    settings |= {
        "shard_size": "5KB" if output == "m" else None,
        "kind": kind,
        "parts": ["Sum", {"Scale": {"coefficient": 2}}],
    }
    result = merge(**settings, output=output)
    card = Path("m.md" if output != "m" else "m/README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    head = yaml.safe_load(front)
    assert "base_model" not in head  # which the Hub allows for models that lie there
    assert f"of the base model `{'tiny-lm' if source == 'files' else 'tiny-clip'}`" in text
    assert head["library_name"] == ("open_clip" if source == "clip" and kind == "weights" else "lit-merge")
    assert "merge" in head["tags"]
    for task in TASKS if source == "files" else ("v",):
        assert f"| {task} | " in text
    chain, loading = blocks(text, "python")
    scope: dict = {}
    exec(chain, scope)
    assert scope["transform"] == result.transform

    monkeypatch.chdir(result.output if output == "m" else tmp_path)
    exec(loading, scope)
    found = scope["vector" if kind == "task_vector" else "weights"]
    stored = open_tensors(result.output.absolute() if output != "m" else ".")
    assert set(found) == set(stored)
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    if source == "clip" and kind == "weights":
        assert torch.equal(scope["clip"].visual.proj, stored["visual.proj"])

    monkeypatch.chdir(tmp_path)
    (config,) = blocks(text, "yaml")
    Path("again.yaml").write_text(config, encoding="utf-8")
    assert main(["merge", "--config=again.yaml", f"--output=again/{output}"]) == 0
    one, other = (sorted(path.glob("*.safetensors")) for path in (
        (Path("m"), Path("again/m")) if output == "m" else (Path(), Path("again"))
    ))  # fmt: skip
    names = [path.name for path in other]
    assert [path.read_bytes() for path in one if path.name in names] == [path.read_bytes() for path in other]


def test_the_card_is_not_replaced_unasked(files, tmp_path):
    (tmp_path / "m.md").write_text("mine")
    settings = {**files, "output": str(tmp_path / "m.safetensors"), "recipe": "ties"}
    refused(ConfigurationError, r"a new file, got .*m\.md, which exists", **settings)
    assert (tmp_path / "m.md").read_text() == "mine"
    merge(**settings, overwrite=True)
    assert (tmp_path / "m.md").read_text() != "mine"


def test_whoever_sees_the_merge_sees_its_settings(files, tmp_path, monkeypatch, capsys):
    """An interrupt right after the tensors have their name leaves everything that goes with them."""
    real = Path.replace

    def replace(self, target):
        moved = real(self, target)
        if Path(target) == tmp_path / "m.safetensors":
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    vectors = "[" + ", ".join(files["vectors"]) + "]"
    arguments = ["--base", files["base"], "--vectors", vectors, "--recipe", "weight_average"]
    assert main(["merge", *arguments, "--output", str(tmp_path / "m.safetensors")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {"m.safetensors", "m.md", "m-merge.yaml"} <= set(left(tmp_path))


def test_indices_are_moved_last_and_the_card_first(files, tmp_path, monkeypatch):
    moved = []
    real = Path.replace

    def replace(self, target):
        moved.append(Path(target))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    result = merge(**files, output=str(tmp_path / "m"), tasks=["A", "Z"], recipe="tall_masks", shard_size="600B")
    final = [path.name for path in moved if path.parent == result.output]
    assert sorted(final) == left(result.output)
    assert final[0] == "README.md"
    assert final[-2:] == ["A.safetensors.index.json", "Z.safetensors.index.json"]
