"""``merge``: task vector files in, a file out that open_clip opens, or a refusal."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lit_merge.evaluation.search
from lit_merge.commands.merge import merge
from lit_merge.errors import (
    ConfigurationError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.evaluation.search import CoefficientSearch, SearchPoint, SearchResult
from lit_merge.models import load_clip
from lit_merge.modules import MultiTaskModule
from lit_merge.transforms import Chain, Mean, Negate, Scale, Sum, replace_field
from lit_merge.vectors import TaskVector, file_digest

TASKS = ("digits", "letters", "signs")


@pytest.fixture(scope="module")
def clip(clip_config, clip_weights):
    return load_clip(clip_config, clip_weights)


@pytest.fixture
def base(clip):
    return {name: tensor.detach() for name, tensor in clip.visual.named_parameters()}


@pytest.fixture
def model(clip_config, clip_weights):
    return {"model": clip_config, "pretrained": clip_weights}


@pytest.fixture
def write_vector(clip, base, tmp_path):
    """``write_vector(task)``: a random vector's file; other settings replace its header or its dtype."""

    def write(task, dtype=torch.float32, size=0.02, **header):
        generator = torch.Generator().manual_seed(len(list(tmp_path.iterdir())))
        tensors = {
            name: (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * size).to(dtype)
            for name, tensor in base.items()
        }
        path = tmp_path / f"{task}.safetensors"
        TaskVector(
            tensors, task, metadata={"base_fingerprint": clip.fingerprint, "base_model": clip.name, **header}
        ).save(path)
        return str(path)

    return write


@pytest.fixture
def files(write_vector):
    return [write_vector(task) for task in TASKS]


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def expected_weights(base, files, coefficient):
    vectors = [TaskVector.load(path) for path in files]
    return {f"visual.{name}": base[name] + coefficient * sum(vector[name] for vector in vectors) for name in base}


def assert_same(first, second, rtol=0.0, atol=0.0):
    assert set(first) == set(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=atol, msg=name)


def refused(error_class, *parts, **settings):
    with pytest.raises(error_class) as error:
        merge(**settings)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# What is written


def test_the_whole_model_is_written_exactly(files, base, model, clip_weights, tmp_path):
    result = merge(
        files, str(tmp_path / "new" / "merged.safetensors"), "task_arithmetic", {"coefficient": 0.3}, **model
    )
    assert result.output == tmp_path / "new" / "merged.safetensors"
    assert result.transform == Chain((Sum(), Scale(0.3)))
    assert result.search is None
    merged, start = load_file(result.output), load_file(clip_weights)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in merged.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in start.items()
    }
    vectors = [TaskVector.load(path) for path in files]
    for name in base:  # in float32: the sum in the order of the files, then the factor, then θ0
        total = (vectors[0][name] + vectors[1][name] + vectors[2][name]) * 0.3
        assert torch.equal(merged[f"visual.{name}"], base[name] + total), name
    exact = expected_weights({name: tensor.double() for name, tensor in base.items()}, files, 0.3)
    assert_same({name: merged[name].double() for name in exact}, exact, atol=1e-6)
    others = {name for name in merged if not name.startswith("visual.")}
    assert "logit_scale" in others
    assert "token_embedding.weight" in others
    assert all(torch.equal(merged[name], start[name]) for name in others)


def test_open_clip_loads_what_was_written(files, base, model, clip_config, tmp_path):
    output = merge(files, str(tmp_path / "merged.safetensors"), "weight_average", **model).output
    images, texts = torch.randn(4, 3, 32, 32), ["a photo of a 7.", "x"]
    open_clip.add_model_config(clip_config)
    theirs = open_clip.create_model("tiny-clip", pretrained=str(output)).eval()
    ours = load_clip(clip_config, str(output))
    expected = expected_weights(base, files, 1 / 3)
    with torch.no_grad():
        assert_same({f"visual.{n}": t for n, t in theirs.visual.named_parameters()}, expected, atol=1e-6)
        assert torch.equal(theirs.encode_image(images), ours.visual.eval()(images))
        tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
        torch.testing.assert_close(theirs.encode_text(tokens, normalize=True), ours.encode_text(texts))
        assert ours.logit_scale == pytest.approx(float(theirs.logit_scale.exp()))
    module = MultiTaskModule(**model, weights=str(output))
    assert torch.equal(module.encoder.eval()(images), ours.visual(images))
    assert module.base_fingerprint != ours.fingerprint  # θ0 is still the base


def test_the_merged_vector_is_written(files, base, model, clip, tmp_path):
    settings = {"coefficient": 0.7}
    result = merge(files, str(tmp_path / "tau.safetensors"), "task_arithmetic", settings, kind="task_vector", **model)
    vector = TaskVector.load(result.output, verify=True)
    assert vector.task == "digits+letters+signs"
    assert vector.base_fingerprint == clip.fingerprint
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    assert_same({f"visual.{name}": vector[name] for name in vector}, expected_weights(zero, files, 0.7), atol=1e-7)
    whole = merge(files, str(tmp_path / "weights.safetensors"), "task_arithmetic", settings, **model).output
    added = {f"visual.{name}": tensor for name, tensor in vector.apply_to(base).items()}
    stored = load_file(whole)
    assert_same({name: stored[name] for name in added}, added)


@pytest.mark.parametrize("kind", ["weights", "task_vector"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_is_the_one_asked_for(kind, dtype, source, write_vector, model, tmp_path):
    files = [write_vector(task, source) for task in TASKS]
    merge(files, str(tmp_path / "full.safetensors"), "weight_average", kind=kind, **model)
    full = load_file(tmp_path / "full.safetensors")
    merge(files, str(tmp_path / "stored.safetensors"), "weight_average", kind=kind, dtype=dtype, **model)
    stored = load_file(tmp_path / "stored.safetensors")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 0 else getattr(torch, dtype)), name
        torch.testing.assert_close(tensor.float(), full[name], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["weights", "task_vector"])
def test_the_header_tells_where_it_comes_from(kind, files, model, clip, tmp_path):
    output = merge(files, str(tmp_path / "merged.safetensors"), "task_arithmetic", kind=kind, **model).output
    header = header_of(output)
    assert header["format"] == ("lit-merge/weights/1" if kind == "weights" else "lit-merge/task-vector/1")
    assert header["base_fingerprint"] == clip.fingerprint
    assert header["base_model"] == "tiny-clip"
    assert header["transform"] == "chain(Sum(), Scale(coefficient=0.3))"
    steps = json.loads(header["transform_config"])["init_args"]["steps"]
    assert [step["class_path"] for step in steps] == ["lit_merge.transforms.Sum", "lit_merge.transforms.Scale"]
    assert json.loads(header["inputs"]) == [
        {"tasks": task, "content_blake3": TaskVector.load(path).content_digest}
        for task, path in zip(TASKS, files, strict=True)
    ]
    assert "search" not in header
    assert "linearized" not in header
    output = merge(files, str(tmp_path / "tangent.safetensors"), "weight_average", kind=kind, linearized=True, **model)
    assert header_of(output.output)["linearized"] == "true"


@pytest.mark.parametrize("linearized", [False, True])
def test_the_search_evaluates_what_the_vectors_are_merged_for(linearized, files, model, tmp_path, monkeypatch):
    asked = []

    def search(vectors, transform, search, data, linearized, network, vector_files):
        asked.append(linearized)
        assert vector_files == files
        point = SearchPoint({"coefficient": 0.2}, {"digits": 1.0}, 1.0, 1.0, None, 1.0)
        return SearchResult([point], 0, [0], replace_field(transform, "coefficient", 0.2), "normalised", "val", [], [])

    monkeypatch.setattr(lit_merge.evaluation.search, "search_coefficient", search)
    settings = {"search": CoefficientSearch([0.1, 0.2]), "linearized": linearized, **model}
    planned = merge(files, str(tmp_path / "found.safetensors"), "task_arithmetic", dry_run=True, **settings)
    assert asked == []  # a dry run only asks whether there is such a field
    assert planned.search is None
    result = merge(files, str(tmp_path / "found.safetensors"), "task_arithmetic", **settings)
    assert asked == [linearized]
    assert result.transform == Chain((Sum(), Scale(0.2)))
    header = header_of(result.output)
    assert ("linearized" in header) == linearized
    assert json.loads(header["search"])["fields"] == {"coefficient": 0.2}
    assert json.loads((tmp_path / "found-search.json").read_text())["best"] == 0.2
    assert "A search has coefficient 0.2 chosen on validation data." in (tmp_path / "found.md").read_text()
    again = {"vectors": files, "output": str(result.output), "recipe": "task_arithmetic", **settings}
    refused(ConfigurationError, "found.safetensors, which exists", **again)
    assert len(asked) == 1  # what is refused is refused before a search
    refused(
        ConfigurationError,
        "field",
        vectors=files,
        output=str(tmp_path / "none.safetensors"),
        recipe="weight_average",
        dry_run=True,
        **settings,
    )


@pytest.mark.parametrize(
    ("recipe", "settings", "transform"),
    [
        ("task_arithmetic", {"coefficient": 0.4}, Chain((Sum(), Scale(0.4)))),
        ("task_arithmetic", None, Chain((Sum(), Scale(0.3)))),
        ("weight_average", {}, Chain((Mean(),))),
        ("analogy", {"coefficient": 2}, Chain((Scale((-2.0, 2.0, 2.0)), Sum()))),
    ],
)
def test_a_recipe_is_its_chain(recipe, settings, transform, files, model, tmp_path):
    for kind in ("weights", "task_vector"):
        merge(files, str(tmp_path / f"{kind}-recipe.safetensors"), recipe, settings, kind=kind, **model)
        merge(files, str(tmp_path / f"{kind}-chain.safetensors"), transform=transform, kind=kind, **model)
        first, second = (tmp_path / f"{kind}-{way}.safetensors" for way in ("recipe", "chain"))
        assert first.read_bytes() == second.read_bytes()


def test_forgetting_takes_one_vector(files, base, model, tmp_path):
    output = merge(files[:1], str(tmp_path / "merged.safetensors"), "negation", {"coefficient": 0.5}, **model).output
    merged, expected = load_file(output), expected_weights(base, files[:1], -0.5)
    assert_same({name: merged[name] for name in expected}, expected, atol=1e-7)


def test_a_vector_that_does_not_know_its_base_may_be_merged(write_vector, model, tmp_path):
    files = [write_vector("digits"), write_vector("letters", base_fingerprint="", base_model="")]
    assert merge(files, str(tmp_path / "merged.safetensors"), "weight_average", **model).output.exists()


def test_an_output_may_be_replaced_on_request(files, model, tmp_path):
    output = str(tmp_path / "merged.safetensors")
    merge(files, output, "weight_average", **model)
    before = file_digest(output)
    merge(files, output, "task_arithmetic", overwrite=True, **model)
    assert file_digest(output) != before


# What is refused


@pytest.fixture
def settings(files, model, tmp_path):
    """Of a merge that works; nothing may be left in the folder by one that does not."""
    yield {
        "vectors": files,
        "output": str(tmp_path / "out" / "merged.safetensors"),
        "recipe": "weight_average",
        **model,
    }
    assert not (tmp_path / "out" / "merged.safetensors").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_paths_that_would_destroy_something_are_refused(settings, tmp_path, monkeypatch):
    old = tmp_path / "old.safetensors"
    old.write_text("precious")
    refused(ConfigurationError, "old.safetensors, which exists", "overwrite", **{**settings, "output": str(old)})
    assert old.read_text() == "precious"
    first = settings["vectors"][0]
    before = file_digest(first)
    monkeypatch.chdir(tmp_path)
    for output in (first, "digits.safetensors", f"{tmp_path}/../{tmp_path.name}/digits.safetensors"):
        refused(ConfigurationError, "another file than the inputs", **{**settings, "output": output, "overwrite": True})
    assert file_digest(first) == before
    refused(ConfigurationError, "ending in .safetensors, got out.pt", **{**settings, "output": "out.pt"})
    below = str(old / "merged.safetensors")
    refused(ConfigurationError, "a folder that can be created", **{**settings, "output": below})


def test_recipes_that_make_no_sense_are_refused(settings):
    for changed, parts in (
        ({"recipe": "task_arithmetics"}, ("got 'task_arithmetics'", "Did you mean task_arithmetic?")),
        ({"recipe": "qqq"}, ("expected the name of a method, got 'qqq'. Use one of ace", "wudi.")),
        ({"recipe": None}, ("exactly one of them, got none",)),
        ({"transform": Mean()}, ("exactly one of them, got recipe and transform",)),
        ({"parts": ["Mean"]}, ("exactly one of them, got recipe and parts",)),
        ({"recipe": None, "transform": Mean(), "settings": {"coefficient": 1}}, ("none beside transform",)),
        ({"recipe": "task_arithmetic", "settings": {"coeficient": 1}}, ("Did you mean coefficient?",)),
        ({"recipe": "task_arithmetic", "settings": {"coefficient": "a"}}, ("a finite number, got 'a'",)),
        ({"recipe": None, "transform": Negate()}, ("expected one vector, got 3", "Sum() or Mean()")),
        ({"recipe": "analogy", "vectors": settings["vectors"][:2]}, ("expected one per task (2: digits, letters)",)),
        ({"vectors": []}, ("at least one task vector file, got none",)),
    ):
        refused(ConfigurationError, *parts, **{**settings, **changed})


def test_vectors_of_another_base_are_refused(settings, write_vector, clip):
    other = write_vector("stranger", base_fingerprint="0123456789abcdef", base_model="ViT-X")
    refused(StructureMismatchError, "0123456789abcdef", "ViT-X", clip.fingerprint, **{**settings, "vectors": [other]})
    both = [settings["vectors"][0], other]
    refused(StructureMismatchError, "one base model, got 2", "stranger", **{**settings, "vectors": both})
    torch.manual_seed(3)
    refused(StructureMismatchError, "tiny-clip", **{**settings, "pretrained": "random"})


def test_vectors_of_another_architecture_are_refused(settings, tmp_path):
    path = tmp_path / "narrow.safetensors"
    vector = TaskVector.load(settings["vectors"][0])
    for tensors, part in (
        ({**vector, "proj": torch.zeros(1, 2)}, "proj (32, 12) instead of (1, 2)"),
        ({**vector, "extra": torch.zeros(2)}, "every parameter of the task vectors, got 1 missing (extra)"),
    ):
        TaskVector(tensors, "narrow").save(path)
        refused(StructureMismatchError, part, **{**settings, "vectors": [str(path)]})


def test_damaged_files_are_refused(settings, tmp_path, clip_weights):
    content = bytearray((tmp_path / "digits.safetensors").read_bytes())
    path = tmp_path / "damaged.safetensors"
    flipped = bytearray(content)
    flipped[-5] ^= 1
    several = {**settings, "vectors": [*settings["vectors"], str(path)]}
    path.write_bytes(content[:-100])
    refused(FileFormatError, "bytes according to the header", str(path), **several)
    path.write_bytes(flipped)
    refused(FileFormatError, "the file has changed", str(path), **several, verify=True)
    missing = str(tmp_path / "missing.safetensors")
    refused(FileFormatError, missing, **{**settings, "vectors": [missing]})


@pytest.mark.parametrize("kind", ["weights", "task_vector"])
def test_values_that_do_not_fit_into_the_dtype_are_refused(kind, settings, write_vector):
    large = write_vector("large", size=1e6)
    refused(NonFiniteError, "float16", **{**settings, "vectors": [large], "dtype": "float16", "kind": kind})
    chain = Chain((Scale(1e38), Sum()))
    refused(NonFiniteError, **{**settings, "vectors": [large], "recipe": None, "transform": chain, "kind": kind})
