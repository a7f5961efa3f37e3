"""Merging with learned coefficients: the transform, the recipe, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lit_merge
from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, StructureMismatchError
from lit_merge.params import fingerprint
from lit_merge.transforms import (
    ElectSign,
    LearnedScale,
    Override,
    Scale,
    Sum,
    Trim,
    WithOverrides,
    adamerging,
    chain,
    recipe,
)
from lit_merge.transforms.parts import from_parts
from lit_merge.vectors import Coefficients, TaskVector, TaskVectors, file_digest, group_names

TASKS = ("digits", "letters", "signs")
SHAPES = {
    "conv1.weight": (4, 3),
    "blocks.0.attn.in_proj_weight": (6, 2),
    "blocks.0.mlp.fc1.bias": (5,),
    "blocks.1.ln_1.weight": (3,),
    "blocks.1.scale": (),
    "norm.weight": (3,),
}


def random(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def theta():
    return random(0)


@pytest.fixture
def taus(theta):
    metadata = {"base_fingerprint": fingerprint(theta)}
    return {task: TaskVector(random(seed), task, metadata=metadata) for seed, task in enumerate(TASKS, start=1)}


def coefficients(granularity="tensor", tasks=TASKS, **metadata):
    members = dict(zip(SHAPES, group_names(list(SHAPES), granularity), strict=True))
    groups = tuple(dict.fromkeys(members.values()))
    values = torch.rand(len(tasks), len(groups), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Coefficients(values * 2 - 0.5, tasks, groups, members, granularity, metadata)


@pytest.fixture
def learned(tmp_path, theta):
    """``learned(granularity, tasks, ending, **metadata)``: the path of a file."""

    def write(granularity="tensor", tasks=TASKS, ending="safetensors", **metadata):
        path = tmp_path / f"coefficients.{ending}"
        coefficients(granularity, tasks, base_fingerprint=fingerprint(theta), **metadata).save(path)
        return str(path)

    return write


def exact(theta, taus, found):
    """θ0 + Σ_t λ[t, group of p] τ_t[p], number by number in float64."""
    merged = {}
    for name in SHAPES:
        column = found.groups.index(found.members[name])
        total = theta[name].double().clone().reshape(-1)
        for row, task in enumerate(found.tasks):
            for entry in range(total.numel()):
                total[entry] += float(found.values[row, column]) * float(taus[task][name].reshape(-1)[entry])
        merged[name] = total.reshape(SHAPES[name])
    return merged


def refused(error_class, line, call, *arguments, **fields):
    with pytest.raises(error_class, match=line) as error:
        call(*arguments, **fields)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)


# The transform


@pytest.mark.parametrize("granularity", ["task", "block", "tensor", "group"])
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_every_parameter_is_scaled_by_its_group(granularity, ending, learned, taus):
    found = coefficients(granularity)
    scaled = LearnedScale(learned(granularity, ending=ending))(TaskVectors(list(taus.values())))
    assert scaled.tasks == TASKS
    assert scaled.by_chunks
    for name in SHAPES:
        column = found.groups.index(found.members[name])
        for row, task in enumerate(TASKS):
            expected = float(found.values[row, column]) * taus[task][name].double()
            torch.testing.assert_close(scaled[name][row].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_coefficient_per_task_is_scale_bit_for_bit(dtype, learned):
    rows = [TaskVector(random(seed, dtype), task) for seed, task in enumerate(TASKS, start=1)]
    found = coefficients("task")
    by_task = {task: float(found.values[row, 0]) for row, task in enumerate(TASKS)}
    first = chain(LearnedScale(learned("task")), Sum())(TaskVectors(rows))
    second = chain(Scale(by_task), Sum())(TaskVectors(rows))
    for name in SHAPES:
        assert torch.equal(first[name], second[name])


def test_rows_are_matched_by_name(learned, taus):
    scale = LearnedScale(learned())
    first = scale(TaskVectors([taus[task] for task in TASKS]))
    second = scale(TaskVectors([taus[task] for task in reversed(TASKS)]))
    for name in SHAPES:
        assert torch.equal(first[name], second[name].flip(0))
        assert not torch.equal(first[name], second[name])


def test_it_may_be_a_part_for_some_of_the_parameters(learned, taus):
    scale = LearnedScale(learned())
    vectors = TaskVectors(list(taus.values()))
    mixed, whole = WithOverrides(scale, [Override(Scale(2.0), blocks=[0])])(vectors), scale(vectors)
    for name in SHAPES:
        assert torch.equal(mixed[name], 2 * vectors[name] if name.startswith("blocks.0") else whole[name])


def test_the_transform_tells_what_was_in_the_file(learned, taus):
    path = learned()
    content = f"sha256:{file_digest(path)[:16]}"
    scale = LearnedScale(Path(path))
    assert repr(scale) == f"LearnedScale(path={path!r}, content={content!r})"
    assert scale == LearnedScale(path, content)
    assert scale != LearnedScale(path, "sha256:0123456789abcdef")
    assert from_parts([{"LearnedScale": {"path": path}}]).steps == (scale,)
    vectors = TaskVectors(list(taus.values()))
    assert scale(vectors).provenance[-1] == repr(scale)
    learned("task")
    assert LearnedScale(path) != scale
    line = (
        rf"coefficients\.safetensors: expected coefficients with the content {content}, got sha256:[0-9a-f]{{16}}: the "
        r"file is another one\. Use the file of that time, or leave content out\.$"
    )
    refused(FileFormatError, line, scale, vectors)


@pytest.mark.parametrize(
    ("fields", "error", "line"),
    [
        (
            {"path": 3},
            ConfigurationError,
            r"^LearnedScale\.path: expected a string, got 3\. Name a file of coefficients",
        ),
        ({"path": None}, ConfigurationError, r"^LearnedScale\.path: expected a string, got None"),
        ({"path": "a.json", "content": 3}, ConfigurationError, r"^LearnedScale\.content: expected a string, got 3"),
        ({"path": "a.pt"}, ConfigurationError, r"a\.pt: expected a file of coefficients ending in \.safetensors or"),
        ({"path": "a.json"}, FileFormatError, r"a\.json: expected a file of coefficients, got No such file"),
        ({"path": "a.safetensors"}, FileFormatError, r"a\.safetensors: expected a safetensors file, got No such file"),
    ],
)
def test_what_is_no_file_of_coefficients_is_refused(fields, error, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(error, line, LearnedScale, **fields)


def test_vectors_that_the_coefficients_are_not_for_are_refused(learned, taus):
    scale = LearnedScale(learned())
    vectors = TaskVectors(list(taus.values()))

    def check(line, others):
        refused(StructureMismatchError, rf"^/.*coefficients\.safetensors: coefficients: expected {line}", scale, others)

    check("one row for each of the tasks digits, letters, got unknown 'signs'", vectors.select([0, 1]))
    check(r"one row .*, got nothing for 'digits\+letters\+signs'", Sum()(vectors))
    others = [TaskVector(dict(vector), task, metadata={"base_fingerprint": "0" * 16}) for task, vector in taus.items()]
    check("those of the task vectors' base model", TaskVectors(others))
    shorter = [TaskVector({"norm.weight": vector["norm.weight"]}, task) for task, vector in taus.items()]
    check("the 1 parameters of the task vectors, got 5 unexpected", TaskVectors(shorter))


# The recipe


def before(transform):
    return {"transform_config": json.dumps(transform.to_config())}


@pytest.mark.parametrize(
    "transform",
    [
        Trim(0.5),
        chain(Trim(0.2, "tensor"), ElectSign("count"), Scale({"digits": 1.0, "letters": 2.0, "signs": 3.0})),
        Scale((1.0, 2.0, 0.5)),
        WithOverrides(Trim(0.5), [Override(chain(Scale(2.0)), names="norm"), Override(Scale(0.5), blocks=(0, 1))]),
    ],
    ids=repr,
)
def test_the_recipe_applies_what_was_applied_before(transform, learned, taus):
    path = learned(**before(transform))
    assert recipe("adamerging", coefficients=path) == adamerging(path) == chain(transform, LearnedScale(path), Sum())
    vectors = TaskVectors(list(taus.values()))
    merged, processed, found = adamerging(path)(vectors), transform(vectors), coefficients()
    for name in SHAPES:
        rows = processed[name].double()
        expected = sum(found.of(name)[row] * rows[row] for row in range(3))
        torch.testing.assert_close(merged[name][0].double(), expected, rtol=1e-6, atol=1e-6)


def test_without_a_transform_it_is_two_steps(learned):
    for metadata in ({}, {"transform_config": ""}, before(chain())):
        path = learned(**metadata)
        assert adamerging(path) == chain(LearnedScale(path), Sum())


@pytest.mark.parametrize(
    "config",
    [
        {"class_path": "os.system", "init_args": {"command": "false"}},
        {"class_path": "lit_merge.transforms.recipe", "init_args": {"name": "ties"}},
        {"class_path": "lit_merge.transforms.base.Transform", "init_args": {}},
        {"class_path": "lit_merge.transforms.Transform", "init_args": {}},
        {"class_path": "lit_merge.transforms.annotations", "init_args": {}},
        {"class_path": "lit_merge.transforms.Trim", "init_args": {"densty": 0.5}},
        {"class_path": "lit_merge.transforms.Trim"},
        {"class_path": 3, "init_args": {}},
        {"class_path": "lit_merge.transforms.Chain", "init_args": {"steps": [{"class_path": "os.system"}]}},
        {"class_path": "lit_merge.transforms.WithOverrides", "init_args": {"overrides": [3]}},
        [],
        3,
    ],
    ids=str,
)
def test_only_transforms_of_this_package_are_built(config, learned):
    path = learned(transform_config=json.dumps(config))
    line = r"coefficients\.safetensors: expected a transform_config of transforms in lit_merge\.transforms, got "
    refused(FileFormatError, line, adamerging, path)


def test_a_header_that_is_no_json_is_refused(learned):
    path = learned(transform_config="{" + "x" * 100)
    line = r"got \{x{79}…\. Write the chain out: chain\(…, LearnedScale\(path\), Sum\(\)\)\.$"
    refused(FileFormatError, line, adamerging, path)
    path = learned(**{"transform_config": json.dumps(Trim(0.5).to_config()).replace("0.5", "5")})
    refused(ConfigurationError, r"Trim\.density: expected", adamerging, path)
    line = r"^recipe adamerging: expected a value for coefficients, got none\. It is: file of coefficients, from .*\.$"
    refused(ConfigurationError, line, recipe, "adamerging")


# The command


@pytest.fixture
def files(theta, taus, tmp_path):
    save_file({**theta, "positions": torch.arange(3)}, tmp_path / "base.safetensors")
    for task, vector in taus.items():
        vector.save(tmp_path / f"{task}.safetensors")
    return {task: str(tmp_path / f"{task}.safetensors") for task in TASKS}


@pytest.fixture
def merge(files, tmp_path):
    """``merge(tasks, *more)``: the command's exit code; the output is ``merged.safetensors``."""

    def run(tasks, *more):
        listed = ", ".join(files[task] for task in tasks)
        return main(
            [
                *("merge", "--vectors", f"[{listed}]", "--base", str(tmp_path / "base.safetensors")),
                *("--output", str(tmp_path / "merged.safetensors"), *more),
            ]
        )

    return run


def by_recipe(path):
    return ("--recipe", "adamerging", "--settings", f"{{coefficients: {path}}}")


@pytest.mark.parametrize("granularity", ["task", "block", "tensor", "group"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["same order", "another order"])
@pytest.mark.parametrize("form", ["recipe", "parts", "transform"])
def test_the_command_merges_with_the_file(granularity, order, form, learned, merge, theta, taus, tmp_path):
    path = learned(granularity, ending="json" if granularity == "task" else "safetensors")
    ways = {
        "recipe": by_recipe(path),
        "parts": ("--parts", f"[{{LearnedScale: {{path: {path}}}}}, Sum]"),
        "transform": ("--transform", json.dumps(adamerging(path).to_config())),
    }
    assert merge([TASKS[index] for index in order], *ways[form]) == 0
    merged = load_file(tmp_path / "merged.safetensors")
    assert torch.equal(merged.pop("positions"), torch.arange(3))
    expected = exact(theta, taus, coefficients(granularity))
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as file:
        assert f"sha256:{file_digest(path)[:16]}" in file.metadata()["transform"]


def test_a_dry_run_reads_and_writes_nothing_but_tells_the_steps(learned, merge, tmp_path, capsys):
    path = learned(**before(chain(Trim(0.5), ElectSign())))
    existing = sorted(tmp_path.iterdir())
    assert merge(TASKS, *by_recipe(path), "--dry_run", "true") == 0
    printed = capsys.readouterr().out
    for number, step in enumerate(("Trim(", "ElectSign(", f"LearnedScale(path={path!r}, ", "Sum()"), start=1):
        assert f"{number}. {step}" in printed
    assert sorted(tmp_path.iterdir()) == existing


def test_the_command_refuses_other_tasks(learned, merge, tmp_path, capsys):
    path = learned(tasks=("digits", "letters", "land"))
    for more in ((), ("--dry_run", "true")):
        assert merge(TASKS, *by_recipe(path), *more) == 1
        assert (
            capsys.readouterr()
            .err.strip()
            .endswith(
                f"{path}: coefficients: expected one row for each of the tasks digits, letters, signs, got nothing for "
                "'signs' and unknown 'land'. Name the task vectors as they were when the coefficients were learned: "
                "digits, letters, land."
            )
        )
    assert not (tmp_path / "merged.safetensors").exists()
    assert merge(TASKS, *by_recipe(path), "--tasks", "[digits, letters, land]") == 0


def test_the_command_refuses_a_missing_file(merge, tmp_path, capsys):
    assert merge(TASKS, *by_recipe(tmp_path / "none.json")) == 1
    assert "none.json: expected a file of coefficients, got No such file or directory." in capsys.readouterr().err


def test_coefficients_are_at_hand():
    assert lit_merge.Coefficients is Coefficients
