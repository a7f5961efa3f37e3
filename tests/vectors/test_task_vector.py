"""One task vector and several: arithmetic, files, application, and everything that is refused."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from builders.live_memory import LiveTensorBytes
from safetensors.torch import save_file
from torch import nn

from lit_merge.errors import ConfigurationError, FileFormatError, NonFiniteError, StructureMismatchError
from lit_merge.files.lazy import Computed
from lit_merge.naming import is_running_statistic
from lit_merge.params import fingerprint
from lit_merge.transforms import IsoC, Mean, Scale, Sum, task_arithmetic
from lit_merge.vectors import TaskVector, TaskVectors, check_base, merged_parameters, write_tensors

SHAPES = {"weight": (3, 4), "bias": (3,), "scale": ()}


def random_params(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def make_vector(seed: int, task: str = "", dtype: torch.dtype = torch.float32, **metadata: str) -> TaskVector:
    return TaskVector(random_params(seed, dtype), task, metadata=metadata)


class Network(nn.Module):
    """A parameter that is tied, batch normalisation (floating and integer buffers), and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


# One vector: construction and the mapping


def test_mapping_access():
    tensors = random_params(0)
    vector = TaskVector(tensors, "digits")
    assert list(vector) == list(SHAPES)
    assert len(vector) == 3
    assert "bias" in vector
    assert "nothing" not in vector
    assert torch.equal(vector["weight"], tensors["weight"])
    assert vector.shape("weight") == (3, 4)
    assert vector.dtype("weight") == torch.float32
    assert repr(vector) == "TaskVector(task='digits', tensors=3, parameters=16)"
    del tensors["bias"]
    assert "bias" in vector
    assert vector == vector
    assert vector != TaskVector(vector, "digits")  # by identity: contents would have to be read
    assert len({vector, vector}) == 1


def test_parameters_are_detached():
    vector = TaskVector(dict(nn.Linear(2, 2).named_parameters()))
    assert not any(vector[name].requires_grad for name in vector)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(1)], r"expected a mapping name -> tensor, got list\. Use dict\(model\.named_parameters"),
        ({}, "expected a mapping name -> tensor, got an empty one"),
        (nn.Linear(1, 1), "got Linear"),
    ],
)
def test_what_is_no_mapping_is_refused(tensors, message):
    with pytest.raises(ConfigurationError, match=message):
        TaskVector(tensors)


def test_what_is_not_floating_point_is_refused():
    tensors = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.int64), "c": [1.0]}
    with pytest.raises(StructureMismatchError, match=r"got 2 others: b \(torch\.int64\), c \(list\)\. Leave integer"):
        TaskVector(tensors)
    with pytest.raises(ConfigurationError, match="metadata 'step': expected strings, got int"):
        TaskVector(random_params(0), metadata={"step": 3})
    with pytest.raises(ConfigurationError, match="task: expected a string, got int"):
        TaskVector(random_params(0), 3)


# Arithmetic


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic(dtype):
    first, second = make_vector(1, "a", dtype), make_vector(2, "b", dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    results = {
        "+": (first + second, lambda x, y: x + y, "a+b"),
        "-": (first - second, lambda x, y: x - y, "a-b"),
        "*": (first * 0.3, lambda x, y: x * 0.3, "a"),
        "r*": (2 * first, lambda x, y: 2 * x, "a"),
        "/": (first / 4, lambda x, y: x / 4, "a"),
        "neg": (-first, lambda x, y: -x, "-a"),
        "sum": (sum([first, second]), lambda x, y: x + y, "a+b"),
    }
    for result, definition, task in results.values():
        assert result.task == task
        for name in SHAPES:
            assert result[name].dtype == working
            assert torch.equal(result[name], definition(first[name].to(working), second[name].to(working)))


def test_inner_products():
    first, second = make_vector(1), make_vector(2)
    flat = [torch.cat([vector[name].flatten().double() for name in SHAPES]) for vector in (first, second)]
    assert first.dot(second) == pytest.approx(float(flat[0] @ flat[1]), rel=1e-12)
    assert first.norm() == pytest.approx(float(flat[0].norm()), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert first.cosine_similarity(second) == pytest.approx(float(cosine), rel=1e-12)
    assert first.cosine_similarity(first) == pytest.approx(1.0, abs=1e-15)
    assert -1.0 <= first.cosine_similarity(-first) <= -1.0 + 1e-12
    assert first.cosine_similarity(first * 0) == 0.0


def test_arithmetic_keeps_what_is_shared_and_refuses_another_base():
    first = make_vector(1, "a", base_fingerprint="aaaa", base_model="ViT", regime="full", step="7")
    second = make_vector(2, "b", base_model="ViT", regime="linearised")
    assert (first + second).metadata == {
        "format": "lit-merge/task-vector/1",
        "task": "a+b",
        "tasks": '["a", "b"]',
        "base_fingerprint": "aaaa",
        "base_model": "ViT",
    }
    assert (2 * first).base_fingerprint == "aaaa"
    other = make_vector(3, "c", base_fingerprint="cccc")
    with pytest.raises(StructureMismatchError, match=r"one base model, got 2: a from aaaa; c from cccc\. Merge only"):
        first + other


def test_arithmetic_refuses_other_structures_and_types():
    vector = make_vector(1, "a")
    with pytest.raises(StructureMismatchError, match=r"task vector 'b': .*2 missing \(bias, scale\)"):
        vector + TaskVector({"weight": torch.zeros(3, 4)}, "b")
    for operation in (lambda: vector + 1, lambda: vector * vector, lambda: vector - "a", lambda: vector / "b"):
        with pytest.raises(TypeError):
            operation()
    with pytest.raises(ConfigurationError, match="expected a finite number, got nan"):
        vector * math.nan
    with pytest.raises(ZeroDivisionError):
        vector / 0


# From checkpoints


def test_from_checkpoints():
    base, tuned = random_params(0), random_params(1)
    for params in (base, tuned):
        params["num_batches_tracked"] = torch.tensor(3)
        params["mask"] = torch.tensor([True])
    vector = TaskVector.from_checkpoints(base, tuned, "digits")
    assert list(vector) == list(SHAPES)
    for name in SHAPES:
        assert torch.equal(vector[name], tuned[name] - base[name])
    assert vector.base_fingerprint == fingerprint({name: base[name] for name in SHAPES})
    assert TaskVector.from_checkpoints(base, tuned, base_fingerprint="known").base_fingerprint == "known"


def test_from_checkpoints_in_half_precision_is_differenced_in_float32():
    base, tuned = random_params(0, torch.float16), random_params(1, torch.bfloat16)
    vector = TaskVector.from_checkpoints(base, tuned)
    assert torch.equal(vector["weight"], tuned["weight"].float() - base["weight"].float())


def test_from_checkpoints_of_a_live_model_does_not_follow_it():
    model = nn.Linear(2, 2)
    base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    vector = TaskVector.from_checkpoints(base, dict(model.named_parameters()))
    with torch.no_grad():
        model.weight.add_(1.0)
    assert not vector["weight"].any()


def test_from_files_is_lazy(tmp_path):
    base, tuned = random_params(0), random_params(1)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    vector = TaskVector.from_checkpoints(tmp_path / "base.safetensors", str(tmp_path / "tuned.safetensors"), "a")
    expected = TaskVector.from_checkpoints(base, tuned)
    assert vector.base_fingerprint == expected.base_fingerprint
    assert vector["weight"] is not vector["weight"]
    for item in (
        vector,
        pickle.loads(pickle.dumps(vector)),
        TaskVector.from_checkpoints(base, tmp_path / "tuned.safetensors"),
    ):
        for name in SHAPES:
            assert torch.equal(item[name], expected[name])


def test_from_checkpoints_refuses_mismatches(tmp_path):
    base = random_params(0)
    with pytest.raises(
        StructureMismatchError, match=r"fine-tuned checkpoint: .*1 missing \(bias\) and 1 unexpected \(b\)"
    ):
        TaskVector.from_checkpoints(base, {"weight": base["weight"], "b": base["bias"], "scale": base["scale"]})
    with pytest.raises(StructureMismatchError, match=r"another shape \(bias \(1,\) instead of \(3,\)"):
        TaskVector.from_checkpoints(base, {**base, "bias": torch.zeros(1)})
    with pytest.raises(StructureMismatchError, match=r"got bias \(torch\.float32 and torch\.int8\)\. Convert both"):
        TaskVector.from_checkpoints(base, {**base, "bias": torch.zeros(3, dtype=torch.int8)})
    with pytest.raises(StructureMismatchError, match=r"got c \(torch\.complex64 and torch\.complex64\)"):
        TaskVector.from_checkpoints(*[{"c": torch.zeros(1, dtype=torch.complex64)}] * 2)
    with pytest.raises(
        NonFiniteError, match=r"expected a finite difference, got NaN or infinity in scale\. Train again"
    ):
        TaskVector.from_checkpoints(base, {**base, "scale": torch.tensor(math.nan)})
    with pytest.raises(ConfigurationError, match=r"pretrained: .*got list\. Use dict\(model\.named_parameters"):
        TaskVector.from_checkpoints([nn.Linear(1, 1)], base)
    with pytest.raises(ConfigurationError, match=r"finetuned: .*got state_dict \(dict\)\. Pass the state dict inside"):
        TaskVector.from_checkpoints(base, {"state_dict": base})
    with pytest.raises(FileFormatError, match="No such file"):
        TaskVector.from_checkpoints(base, tmp_path / "none.safetensors")


# Files


def test_save_and_load(tmp_path):
    file = tmp_path / "digits.safetensors"
    vector = make_vector(1, "digits", base_fingerprint="aaaa", classes=json.dumps(["0", "1"]))
    assert vector.save(file) == 0.0
    loaded = TaskVector.load(file, verify=True)
    assert loaded.task == "digits"
    assert loaded.base_fingerprint == "aaaa"
    assert json.loads(loaded.metadata["classes"]) == ["0", "1"]
    assert json.loads(loaded.metadata["storage"]) == {"dtype": "float32", "relative_error": 0.0}
    assert loaded.content_digest in file.read_bytes().decode("latin-1")
    assert f"content='{loaded.content_digest[:16]}'" in repr(loaded)
    for name in SHAPES:
        assert torch.equal(loaded[name], vector[name])
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_rounding_is_measured_and_recorded(tmp_path, dtype, bound):
    vector = make_vector(1, "digits")
    error = vector.save(tmp_path / "half.safetensors", dtype=dtype)
    loaded = TaskVector.load(tmp_path / "half.safetensors", verify=True)
    rounded = TaskVector({name: vector[name].to(dtype) for name in SHAPES})
    assert all(torch.equal(loaded[name], rounded[name]) for name in SHAPES)
    assert error == pytest.approx((rounded - vector).norm() / vector.norm(), rel=1e-6)
    assert 0 < error < bound
    storage = json.loads(loaded.metadata["storage"])
    assert storage == {"dtype": str(dtype).removeprefix("torch."), "relative_error": pytest.approx(error, rel=1e-6)}
    assert (0.5 * loaded)["weight"].dtype == torch.float32
    assert TaskVectors([loaded])["weight"].dtype == torch.float32


def test_zeros_have_no_rounding_error(tmp_path):
    assert (make_vector(1) * 0).save(tmp_path / "zero.safetensors", dtype=torch.bfloat16) == 0.0


def test_save_refuses(tmp_path):
    file = tmp_path / "bad.safetensors"
    for value in (math.nan, math.inf, -math.inf):
        bad = TaskVector({"good": torch.zeros(2), "weight": torch.tensor([0.0, value])}, "digits")
        with pytest.raises(
            NonFiniteError, match="task vector 'digits': expected finite values, got NaN or infinity in weight"
        ):
            bad.save(file)
    large = TaskVector({"weight": torch.tensor([1e6])}, "digits")
    with pytest.raises(NonFiniteError, match=r"fit into torch\.float16, got 1e\+06 in weight\. Store it as bfloat16"):
        large.save(file, dtype=torch.float16)
    with pytest.raises(ConfigurationError, match=r"dtype: expected a floating-point dtype, got torch\.int8"):
        large.save(file, dtype=torch.int8)
    with pytest.raises(ConfigurationError, match="expected an existing folder"):
        large.save(tmp_path / "none" / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_other_files(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match=r"expected format lit-merge/task-vector/1, got none\. Whole weights are"):
        TaskVector.load(tmp_path / "model.safetensors")
    write_tensors(tmp_path / "new.safetensors", random_params(0), {"format": "lit-merge/task-vector/2"})
    with pytest.raises(
        FileFormatError, match=r"got lit-merge/task-vector/2\. Install the version of lit-merge that wrote"
    ):
        TaskVector.load(tmp_path / "new.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    make_vector(0).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    with pytest.raises(FileFormatError, match="the file has changed since it was written"):
        TaskVector.load(damaged, verify=True)


# Application


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_apply_to_a_mapping(dtype):
    base = random_params(0, dtype)
    base["position_ids"] = torch.arange(3)
    before = {name: tensor.clone() for name, tensor in base.items()}
    vector = make_vector(1)
    result = vector.apply_to(base, 0.3)
    assert list(result) == list(base)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for name in SHAPES:
        expected = torch.add(base[name].to(working), vector[name].to(working), alpha=0.3).to(dtype)
        assert torch.equal(result[name], expected)
        assert torch.equal(base[name], before[name])
    assert result["position_ids"] is base["position_ids"]


def test_apply_to_a_module_in_place():
    torch.manual_seed(0)
    network = Network()
    vector = TaskVector({name: torch.ones_like(tensor) for name, tensor in network.named_parameters()})
    identities = {name: id(tensor) for name, tensor in network.named_parameters()}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert vector.apply_to(network, 0.5) is network
    assert {name: id(tensor) for name, tensor in network.named_parameters()} == identities
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.5 if name in parameters else before[name])
    assert network.first.weight.requires_grad
    assert not network.frozen.requires_grad


def test_apply_to_a_module_by_the_names_of_its_state_dict():
    """Tied parameters appear twice and are changed once; running statistics are measured, not changed."""
    network = Network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tuned = {name: tensor + 1 for name, tensor in before.items()}
    TaskVector.from_checkpoints(before, tuned).apply_to(network)
    for name, tensor in network.state_dict().items():
        measured = is_running_statistic(name) or not tensor.is_floating_point()
        torch.testing.assert_close(tensor, before[name] + (0 if measured else 1))


def test_apply_to_keeps_the_dtype_of_a_module():
    network = nn.Linear(2, 2).bfloat16()
    TaskVector({name: torch.ones_like(tensor).float() for name, tensor in network.named_parameters()}).apply_to(network)
    assert network.weight.dtype == torch.bfloat16


def test_apply_to_refuses_and_changes_nothing():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    full = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    partial = {name: tensor for name, tensor in full.items() if name != "1.bias"}
    with pytest.raises(
        StructureMismatchError, match=r"target's parameters, got 1 missing \(1\.bias\)\. Use the architecture"
    ):
        TaskVector(partial).apply_to(network)
    with pytest.raises(StructureMismatchError, match=r"1 missing \(1\.bias\).*pass the module instead"):
        TaskVector(partial).apply_to(before)
    with pytest.raises(StructureMismatchError, match=r"target's parameters, got 1 unexpected \(2\.bias\)"):
        TaskVector({**full, "2.bias": torch.ones(3)}).apply_to(network)
    with pytest.raises(StructureMismatchError, match=r"got 1 of another shape \(1\.bias \(1,\) instead of \(3,\)\)"):
        TaskVector({**full, "1.bias": torch.ones(1)}).apply_to(network)
    with pytest.raises(ConfigurationError, match="coefficient: expected a finite number, got inf"):
        TaskVector(full).apply_to(network, math.inf)
    with pytest.raises(ConfigurationError, match="target: expected a mapping name -> tensor or a module, got list"):
        TaskVector(full).apply_to([])
    integer = nn.BatchNorm1d(3)
    names = {name: torch.ones(tensor.shape) for name, tensor in integer.state_dict().items()}
    with pytest.raises(StructureMismatchError, match="got integer elements num_batches_tracked"):
        TaskVector(names).apply_to(integer)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


# Several vectors


def test_stacks():
    vectors = [make_vector(seed, task) for seed, task in enumerate("abc")]
    several = TaskVectors(vectors)
    assert several.tasks == ("a", "b", "c")
    assert several.names == tuple(several) == tuple(SHAPES)
    assert len(several) == 3
    for name, shape in SHAPES.items():
        assert several.shape(name) == several[name].shape == (3, *shape)
        assert torch.equal(several[name], torch.stack([vector[name] for vector in vectors]))
    assert repr(several) == "TaskVectors(tasks=('a', 'b', 'c'), tensors=3)"
    with pytest.raises(KeyError):
        several["nothing"]


def test_mixed_dtypes_and_orders_are_stacked_by_name():
    first = make_vector(0, "a", torch.bfloat16)
    second = TaskVector(dict(reversed(random_params(1, torch.float64).items())), "b")
    several = TaskVectors([first, second])
    assert several["weight"].dtype == several.dtype("weight") == torch.float64
    assert torch.equal(several["weight"][0], first["weight"].double())
    assert torch.equal(several["weight"][1], second["weight"])


def test_only_one_stack_is_read_at_a_time(tmp_path):
    read = []
    structure = {name: (torch.Size(shape), torch.float32) for name, shape in SHAPES.items()}

    def reading(name):
        read.append(name)
        return torch.ones(SHAPES[name])

    several = task_arithmetic()(TaskVectors([TaskVector(Computed(structure, reading), task) for task in "ab"]))
    assert several.shape("weight") == (1, 3, 4)
    assert several.single().shape("weight") == (3, 4)
    assert read == []
    next(iter(merged_parameters(random_params(0), several)))
    assert read == ["weight", "weight"]


def test_reduce():
    several = TaskVectors([make_vector(seed, task, torch.bfloat16) for seed, task in enumerate("abc")])
    expected = [several["weight"], 2 * several["weight"]]
    for view, stack in zip((several, Scale(2)(several)), expected, strict=True):
        reduced = view.reduce_elements(lambda name, start, chunk: chunk.amax(0, keepdim=True), note="maximum")
        assert reduced.tasks == ("a+b+c",)
        assert reduced.provenance[-1] == "maximum"
        assert torch.equal(reduced["weight"], stack.amax(dim=0, keepdim=True))
        assert reduced.shape("weight") == (1, 3, 4)
    with pytest.raises(StructureMismatchError, match=r"function: expected torch\.float32 \(1, 12\) for weight, got"):
        several.reduce_elements(lambda name, start, chunk: chunk[:1].half())["weight"]


def test_select_vector_and_single():
    vectors = [make_vector(seed, task) for seed, task in enumerate("abc")]
    several = TaskVectors(vectors)
    scaled = Scale(2.0)(several)
    for view, factor in ((several, 1), (scaled, 2)):
        chosen = view.select(["c", 0])
        assert chosen.tasks == ("c", "a")
        assert torch.equal(chosen["weight"], factor * torch.stack([vectors[2]["weight"], vectors[0]["weight"]]))
        assert chosen.shape("weight") == (2, 3, 4)
        for task in ("b", 1):
            row = view.vector(task)
            assert row.task == "b"
            assert torch.equal(row["weight"], factor * vectors[1]["weight"])
        with pytest.raises(ConfigurationError, match=r"expected one vector, got 3 \(a, b, c\)\. Reduce .*Sum\(\)"):
            view.single()
    assert several.vector("b") is vectors[1]
    assert scaled.select(["b"]).provenance[-1] == "select(['b'])"
    assert TaskVectors(vectors[:1]).single() is vectors[0]
    row = scaled.vector("a")["weight"]
    assert row.untyped_storage().nbytes() == row.numel() * 4  # does not keep the whole stack


def test_selection_refuses(tmp_path):
    several = TaskVectors([make_vector(seed, task) for seed, task in enumerate(["digits", "letters", "letters"])])
    with pytest.raises(ConfigurationError, match=r"one of digits, letters, letters, got 'digit'\. Did you mean digits"):
        several.vector("digit")
    with pytest.raises(ConfigurationError, match=r"unique name, got 'letters' at \[1, 2\]\. Use a position instead"):
        several.select(["letters"])
    with pytest.raises(ConfigurationError, match="position from 0 to 2, got 3"):
        several.vector(3)
    for nothing in ([], "digits"):
        with pytest.raises(ConfigurationError, match="expected a list of at least one task"):
            several.select(nothing)


def test_the_merged_vector_carries_its_provenance(tmp_path):
    for seed, task in enumerate("ab"):
        make_vector(seed, task, base_fingerprint="aaaa", base_model="ViT").save(tmp_path / f"{task}.safetensors")
    stored = [TaskVector.load(tmp_path / f"{task}.safetensors") for task in "ab"]
    merged = Mean()(TaskVectors(stored)).single()
    merged.save(tmp_path / "merged.safetensors")
    loaded = TaskVector.load(tmp_path / "merged.safetensors", verify=True)
    assert loaded.task == "a+b"
    assert (loaded.base_fingerprint, loaded.metadata["base_model"]) == ("aaaa", "ViT")
    assert json.loads(loaded.metadata["provenance"]) == [
        f"TaskVector(task='{vector.task}', content='{vector.content_digest[:16]}')" for vector in stored
    ] + ["Mean()"]
    assert str(tmp_path) not in (tmp_path / "merged.safetensors").read_bytes().decode("latin-1")


def test_several_vectors_refuse_mismatches():
    first = make_vector(0, "a", base_fingerprint="aaaa")
    with pytest.raises(ConfigurationError, match="at least one TaskVector, got an empty sequence"):
        TaskVectors([])
    with pytest.raises(ConfigurationError, match=r"got one TaskVector\. Use TaskVectors\(\[vector\]\)"):
        TaskVectors(first)
    with pytest.raises(ConfigurationError, match=r"got dict\. Wrap parameters as TaskVector\(tensors, task\)"):
        TaskVectors([first, random_params(0)])
    with pytest.raises(
        StructureMismatchError, match=r"expected b to have the 3 tensors of a, got 2 missing \(bias, scale\) and"
    ):
        TaskVectors([first, TaskVector({"weight": torch.zeros(3, 4), "more": torch.zeros(1)}, "b")])
    with pytest.raises(
        StructureMismatchError, match=r"number 1 .*1 of another shape \(bias \(4,\) instead of \(3,\)\)"
    ):
        TaskVectors([first, TaskVector({**random_params(1), "bias": torch.zeros(4)})])
    with pytest.raises(
        StructureMismatchError, match=r"one base model, got 2: a, d from aaaa; c from cccc\. Merge only"
    ):
        TaskVectors(
            [
                first,
                make_vector(1, "b"),
                make_vector(2, "c", base_fingerprint="cccc"),
                make_vector(3, "d", base_fingerprint="aaaa"),
            ]
        )
    assert TaskVectors([make_vector(1, "b"), first]).base_fingerprint == "aaaa"
    assert TaskVectors([make_vector(1, "b")]).base_fingerprint == ""


# The merged model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_parameters(dtype):
    base = {"class_embedding": torch.zeros(2, dtype=dtype), **random_params(0, dtype), "ids": torch.arange(2)}
    vectors = [make_vector(seed, task) for seed, task in ((1, "a"), (2, "b"))]
    merged = dict(merged_parameters(base, Sum()(TaskVectors(vectors))))
    assert list(merged) == list(base)
    assert merged["ids"] is base["ids"]
    assert merged["class_embedding"] is base["class_embedding"]
    for name in SHAPES:
        assert merged[name].dtype == dtype
        expected = base[name].double() + vectors[0][name].double() + vectors[1][name].double()
        torch.testing.assert_close(
            merged[name].double(), expected, rtol=1e-2, atol=3e-2 if dtype == torch.bfloat16 else 1e-6
        )
    one = dict(merged_parameters(base, vectors[0]))
    assert torch.equal(one["weight"], vectors[0].apply_to({name: base[name] for name in SHAPES})["weight"])


def test_merged_parameters_refuse_at_once():
    base, vector = random_params(0), make_vector(1, "a")
    with pytest.raises(ConfigurationError, match="expected one vector, got 2"):
        merged_parameters(base, TaskVectors([vector, vector]))
    with pytest.raises(StructureMismatchError, match=r"parameters of the base model, got 2 unexpected \(bias, scale\)"):
        merged_parameters({"weight": base["weight"]}, vector)
    with pytest.raises(StructureMismatchError, match=r"got 1 of another shape \(bias \(3,\) instead of \(1,\)\)"):
        merged_parameters({**base, "bias": torch.zeros(1)}, vector)
    with pytest.raises(StructureMismatchError, match=r"expected a floating-point base, got bias \(torch\.int8\)"):
        merged_parameters({**base, "bias": torch.zeros(3, dtype=torch.int8)}, vector)
    with pytest.raises(NonFiniteError, match="got NaN or infinity in scale"):
        dict(merged_parameters({**base, "scale": torch.tensor(math.nan)}, vector))
    with pytest.raises(NonFiniteError, match=r"infinity in weight\. Use a smaller coefficient"):
        dict(merged_parameters({"weight": torch.ones(1).half()}, TaskVector({"weight": torch.tensor([1e6])})))


def test_check_base():
    known = make_vector(1, "a", base_fingerprint="aaaa", base_model="ViT-B-32")
    for vectors in (known, TaskVectors([known])):
        check_base(vectors, "aaaa")
        check_base(vectors, "")
        with pytest.raises(
            StructureMismatchError,
            match=r"\(a\): expected the base model ViT-B-32 \(fingerprint aaaa\), got other\.pt \(fingerprint bbbb\)",
        ):
            check_base(vectors, "bbbb", "other.pt")
    check_base(make_vector(1), "bbbb")


def test_merging_from_disk_holds_one_stack_in_memory(tmp_path: Path):
    """Sixteen vectors of four tensors of 1 MiB: a stack is 16 MiB, all of them are 64 MiB."""
    structure = {f"block.{index}": (torch.Size([1 << 18]), torch.float32) for index in range(4)}
    paths = [tmp_path / f"{task}.safetensors" for task in range(16)]
    for seed, file in enumerate(paths):
        TaskVector(Computed(structure, lambda name, seed=seed: torch.full((1 << 18,), float(seed))), file.stem).save(
            file
        )
    vectors = TaskVectors([TaskVector.load(file) for file in paths])
    with LiveTensorBytes() as everything:
        stacks = [vectors[name] for name in vectors]
    assert everything.peak >= sum(stack.nbytes for stack in stacks) == 64 * 2**20
    with LiveTensorBytes() as live:
        Scale(range(16))(vectors)["block.0"]
    assert live.peak <= (16 + 3 * 8) * 2**20  # a stack, and chunks of eight MiB
    with LiveTensorBytes() as live:  # what goes entry by entry holds a row and a few chunks, not a stack
        task_arithmetic(0.1)(vectors).single().save(tmp_path / "merged.safetensors")
    assert live.peak < 16 * 2**20
    assert TaskVector.load(tmp_path / "merged.safetensors")["block.3"][0].item() == pytest.approx(12.0)


def test_a_merged_vector_knows_its_tasks_whatever_their_names(tmp_path):
    """A task may be called ``a+b``; the common name is for people."""
    one, other, third = (TaskVector({"w": torch.ones(2)}, task) for task in ("a+b", "c", ""))
    assert (one.tasks, third.tasks) == (("a+b",), ())
    assert "tasks" not in one.metadata
    merged = {
        "sum": Sum()(TaskVectors([one, other, third])).single(),
        "matrices": IsoC()(TaskVectors([one, other])).single(),
        "model": Sum()(TaskVectors([Sum()(TaskVectors([one, other])).single()])).single(),
        "addition": one + other,
        "several": 2 * sum([one, third, other]) / 3,
        "given": TaskVector({"w": torch.ones(2)}, ("a+b", "c")),
    }
    for name, vector in merged.items():
        assert (vector.task, vector.tasks) == ("a+b+c", ("a+b", "c")), name
        vector.save(tmp_path / "merged.safetensors")
        loaded = TaskVector.load(tmp_path / "merged.safetensors")
        assert (loaded.task, loaded.tasks) == ("a+b+c", ("a+b", "c"))
        assert json.loads(loaded.metadata["tasks"]) == ["a+b", "c"]
        again = TaskVector(loaded, loaded.task, metadata=loaded.metadata)
        assert again.tasks == loaded.tasks
        view = Scale(2)(TaskVectors([loaded, TaskVector({"w": torch.ones(2)}, "d")]))
        assert view.tasks == ("a+b+c", "d")
        assert view.merged_tasks == ("a+b", "c", "d")
        assert view.select(["d", "a+b+c"]).merged_tasks == ("d", "a+b", "c")
        assert view.restrict(["w"]).merged_tasks == view.merged_tasks
        assert Sum()(view).single().tasks == ("a+b", "c", "d")


@pytest.mark.parametrize("listed", [None, "", "[", "3", '["a"]', '["b", "a"]', "[1, 2]", '["a", ["b"]]', "[" * 9999])
def test_a_name_without_a_list_of_its_own_is_one_task(listed):
    """As in files of version 0.1.0, of whatever others wrote there, and of a vector with a new name."""
    vector = TaskVector({"w": torch.ones(2)}, "a+b", metadata={} if listed is None else {"tasks": listed})
    assert vector.tasks == ("a+b",)
    merged = TaskVector({"w": torch.ones(2)}, ("a", "b"))
    assert merged.tasks == ("a", "b")
    merged.task = "both"
    assert merged.tasks == ("both",)
    with pytest.raises(ConfigurationError, match="task: expected a string, got tuple"):
        TaskVector({"w": torch.ones(2)}, ("a", 3))


def test_vectors_of_models_with_different_activations_do_not_mix():
    one, other, unknown = (
        TaskVector({"w": torch.ones(2)}, task, metadata={"activation": known} if known else {})
        for task, known in (("a", "gelu"), ("b", "quick_gelu"), ("c", ""))
    )
    assert (one + unknown).metadata["activation"] == (2 * one).metadata["activation"] == "gelu"
    message = (
        "task vectors: expected one activation function, got gelu (a) and quick_gelu (b). Merge only vectors that were "
        "fine-tuned from the same model, e.g. all from ViT-B-32-quickgelu, or all from ViT-B-32."
    )
    for attempt in (lambda: one + other, lambda: TaskVectors([one, unknown, other])):
        with pytest.raises(StructureMismatchError) as refused:
            attempt()
        assert str(refused.value) == message
    check_base(TaskVectors([one, unknown]), "", "ViT-B-32", "gelu")
    with pytest.raises(StructureMismatchError, match=r"task vectors \(a, c\): expected weights for the act"):
        check_base(TaskVectors([one, unknown]), "", "ViT-B-32-quickgelu", "quick_gelu")
