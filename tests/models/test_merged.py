"""A network with merged weights: gradients in every storage, the same weights as a merge, and what is refused."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from builders.learned_merge import BlockEncoder
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lit_merge import MergedModel
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.models.merged import swapped
from lit_merge.transforms import ElectSign, LearnedScale, Scale, Sum, Trim, chain
from lit_merge.vectors import Coefficients, TaskVector, TaskVectors, merged_parameters
from lit_merge.vectors import storage as stored
from lit_merge.vectors.groups import group_names

TASKS = ["x", "y", "z"]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return BlockEncoder().to(dtype).eval()


def vectors(module, tasks=TASKS, scale=0.4):
    generator = torch.Generator().manual_seed(1)
    own = dict(module.named_parameters())
    return TaskVectors(
        [
            TaskVector({n: scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in own.items()}, t)
            for t in tasks
        ]
    )


def plain_loss(module, task_vectors, coefficients, columns, clamp, images):
    """The naive sum under autograd."""
    applied = coefficients
    if clamp is not None:
        inside = (coefficients >= clamp[0]) & (coefficients <= clamp[1])
        applied = torch.where(inside, coefficients, coefficients.detach().clamp(*clamp))
    weights = {
        name: own.detach() + sum(applied[task, column] * task_vectors[name][task] for task in range(len(TASKS)))
        for (name, own), column in zip(module.named_parameters(), columns, strict=True)
    }
    return functional_call(module, weights, (images,)).square().sum()


@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
@pytest.mark.parametrize("granularity", ["task", "block", "tensor", "group"])
@pytest.mark.parametrize("clamp", [None, (0.0, 1.0), (0.2, 0.4)])
def test_gradients_are_those_of_the_naive_sum(storage, granularity, clamp):
    module = network()
    given = vectors(module)
    model = MergedModel(module, given, granularity, 0.3, clamp, storage)
    start = torch.rand(model.coefficients.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start.view(-1)[:6] = torch.tensor([0.0, 1.0, 0.2, 0.4, -0.5, 1.5])[: start.numel()][:6]  # at the ends, and beyond
    model.coefficients.data = start.clone()
    names = group_names(list(given.names), granularity)
    columns = [model.groups.index(name) for name in names]
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    expected = start.clone().requires_grad_()
    loss = model(images).square().sum()
    plain = plain_loss(module, given, expected, columns, clamp, images)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    loss.backward()
    plain.backward()
    largest = expected.grad.abs().max()
    assert (model.coefficients.grad - expected.grad).abs().max() <= 1e-12 * largest
    if clamp == (0.0, 1.0):
        grad = model.coefficients.grad.view(-1)
        assert grad[:2].all()  # a coefficient may start on the border
        assert start.numel() < 6 or (grad[4] == 0 and grad[5] == 0)


def test_vectors_in_bfloat16_are_rounded_and_nothing_else():
    module = network(torch.float32)
    given = vectors(module)
    rounded = TaskVectors(
        [
            TaskVector({n: v.bfloat16().float() for n, v in row.items()}, row.task)
            for row in (given.vector(index) for index in range(3))
        ]
    )
    images = torch.randn(4, 3, 4, 4)
    found, expected = (
        MergedModel(module, one, storage=storage) for one, storage in ((given, "bfloat16"), (rounded, "device"))
    )
    for model in (found, expected):
        model(images).square().sum().backward()
    assert torch.equal(found(images), expected(images))
    assert torch.equal(found.coefficients.grad, expected.coefficients.grad)
    assert found.vector_storage().bytes_held * 2 == expected.vector_storage().bytes_held


@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
@pytest.mark.parametrize("before", [None, chain(Trim(0.3), ElectSign())])
@pytest.mark.parametrize("elements", [1 << 19, 24])
def test_weights_are_those_of_a_merge_but_for_the_last_bits(storage, before, elements, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_ELEMENTS", elements)
    module = network(torch.float32)
    given = vectors(module)
    changed = before(given) if before else given
    factors = [0.31, 0.127, 0.93]
    base = {name: own.detach() for name, own in module.named_parameters()}
    found = MergedModel(module, changed, "task", factors, storage=storage).merged_parameters()
    expected = dict(merged_parameters(base, chain(Scale(factors), Sum())(changed)))
    for name in expected:  # a product of matrices rounds once where multiplying and adding rounds twice
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=2e-7)
    model = MergedModel(module, changed, "tensor", storage=storage)
    model.coefficients.data.copy_(torch.rand(model.coefficients.shape))
    model.to_coefficients().save(tmp_path / "c.safetensors")
    chosen = chain(LearnedScale(str(tmp_path / "c.safetensors")), Sum())(changed)
    expected = dict(merged_parameters(base, chosen))
    merged = model.merged_parameters()
    again = model.merged_parameters(out=merged)
    for name in expected:
        torch.testing.assert_close(again[name], expected[name], rtol=1e-6, atol=2e-7)
        assert again[name].data_ptr() == merged[name].data_ptr()  # its memory was used again


def test_only_the_coefficients_train_and_are_saved():
    module = network()
    model = MergedModel(module, vectors(module), "block")
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == ["coefficients"]
    assert not any(own.requires_grad for own in module.parameters())
    assert model.groups == ("head", "embedding", "block 0", "block 1", "block 2")  # in the module's order
    assert list(model.members) == [name for name, _ in module.named_parameters()]
    before = {name: own.clone() for name, own in module.named_parameters()}
    model(torch.randn(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(own, before[name]) for name, own in module.named_parameters())


def test_buffers_come_from_the_module_and_lacking_parameters_stay():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    module[1].running_mean.fill_(0.5)
    given = TaskVectors([TaskVector({"0.weight": torch.ones(4, 3)}, task) for task in "ab"])
    model = MergedModel(module, given, init=0.25)
    images = torch.randn(5, 3)
    expected = module[1](nn.functional.linear(images, module[0].weight + 0.5, module[0].bias))
    torch.testing.assert_close(model(images), expected)


def test_coefficients_keep_their_precision():
    module = network(torch.float32)
    model = MergedModel(module, vectors(module), init=0.3001)
    model.to(torch.bfloat16)
    assert model.coefficients.dtype == torch.float32
    assert model.coefficients.detach().flatten()[0].item() == pytest.approx(0.3001, abs=1e-7)
    assert next(module.parameters()).dtype == torch.bfloat16
    assert model(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.to(torch.float64)
    assert model.coefficients.dtype == torch.float64


def test_starting_values():
    module = network()
    given = vectors(module)
    assert MergedModel(module, given, "block", [0.1, 0.2, 0.3]).coefficients[:, 4].tolist() == [0.1, 0.2, 0.3]
    by_name = MergedModel(module, given, "task", {"z": 0.3, "x": 0.1, "y": 0.2})
    assert by_name.coefficients.flatten().tolist() == [0.1, 0.2, 0.3]
    coarse = by_name.to_coefficients({"note": "n"})
    assert isinstance(coarse, Coefficients)
    assert coarse.metadata == {"note": "n"}
    fine = MergedModel(module, given, "tensor", coarse)
    assert torch.equal(fine.coefficients, by_name.coefficients.expand_as(fine.coefficients))
    turned = given.select(["z", "x", "y"])  # rows are found by name
    assert MergedModel(module, turned, "task", coarse).coefficients.flatten().tolist() == [0.3, 0.1, 0.2]
    fine.coefficients.data[0, 0] = 0.9
    with pytest.raises(
        ConfigurationError,
        match=r"equal within each group of granularity task, got others for \w+.*Use granularity tensor",
    ):
        MergedModel(module, given, "task", fine.to_coefficients())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clamp": (1.0, 0.0)}, r"clamp: expected the lower number first, got \[1, 0\]\. Swap them\."),
        ({"clamp": (0.0, 1.0, 2.0)}, "clamp: expected two numbers or null, got"),
        ({"clamp": (float("nan"), 1.0)}, "clamp: expected two numbers or null, got"),
        ({"init": 1.5}, r"init: expected numbers within clamp, \[0, 1\], got some from 1.5 to 1.5, which could never"),
        ({"init": float("nan"), "clamp": None}, "init: expected a finite number, or one for each of 3 tasks, got nan"),
        ({"init": [0.1, 0.2]}, r"init: expected a finite number, or one for each of 3 tasks, got \[0.1, 0.2\]"),
        ({"init": {"x": 0.1, "q": 0.2}}, "init: expected a number for each of x, y, z, got x, q. Name every task once"),
        ({"granularity": "layer"}, "granularity: expected task, block, tensor, group, got 'layer'"),
    ],
)
def test_refused(settings, said):
    module = network()
    with pytest.raises(ConfigurationError, match=said) as refusal:
        MergedModel(module, vectors(module), **settings)
    assert "\n" not in str(refusal.value)


def test_an_unknown_storage_is_refused_when_the_weights_are_merged():
    module = network()
    with pytest.raises(ConfigurationError, match="storage: expected device, bfloat16, host, mapped, got 'disk'"):
        MergedModel(module, vectors(module), storage="disk").merged_parameters()


def test_vectors_of_another_network_are_refused():
    module = network()
    with pytest.raises(StructureMismatchError, match=r"expected parameters of the module, got 2 unexpected \(0.weight"):
        MergedModel(module, vectors(nn.Sequential(nn.Linear(2, 2)).double()))
    with pytest.raises(
        StructureMismatchError, match=r"task vectors: .* got 1 of another shape \(conv1.weight \(5, 108"
    ):
        MergedModel(module, vectors(BlockEncoder(6).double()))


def test_too_little_memory_names_what_would_fit(monkeypatch):
    monkeypatch.setattr(stored, "_free_on_host", lambda: 3000 * 4 + 1)
    module = nn.Linear(40, 50, bias=False)
    given = TaskVectors([TaskVector({"weight": torch.zeros(50, 40)}, task) for task in TASKS])
    with pytest.raises(
        ConfigurationError,
        match=re.escape("storage device: expected 0.0 GiB of free memory for 3 task vectors (x, y, z) on the host, got")
        + r".*Needed per process: device 0\.0 GiB, bfloat16 .*; of these bfloat16, mapped would fit, or shard",
    ):
        MergedModel(module, given).merged_parameters()
    MergedModel(module, given, storage="bfloat16").merged_parameters()
    MergedModel(module, given, storage="mapped").merged_parameters()


def test_mapped_vectors_are_read_from_their_own_files(tmp_path):
    module = network(torch.float32)
    for vector in (vectors(module).vector(index) for index in range(3)):
        vector.save(tmp_path / f"{vector.task}.safetensors")
    given = TaskVectors([TaskVector.load(tmp_path / f"{task}.safetensors") for task in TASKS])
    model = MergedModel(module, given, storage="mapped")
    assert model.vector_storage().bytes_held == 0
    assert model.vector_storage()._folder is None  # nothing is written: the files are there
    trimmed = MergedModel(module, Trim(0.5)(given), storage="mapped").vector_storage()
    assert trimmed._folder is not None  # and here once, instead of trimming at every step
    folder = trimmed._folder.name
    del trimmed
    gc.collect()
    assert not Path(folder).exists()


def test_swapped_weights_stay_through_the_way_back_and_are_put_back():
    shared = nn.Linear(3, 3)
    module = nn.Sequential(shared, nn.Tanh(), shared)
    own = dict(module.named_parameters())
    leaves = {name: torch.randn_like(value).requires_grad_() for name, value in own.items()}
    inputs = torch.randn(2, 3)
    with swapped(module, leaves):
        found = module(inputs)
        assert module[2].weight is module[0].weight is leaves["0.weight"]
        torch.utils.checkpoint.checkpoint(module, inputs, use_reentrant=False).sum().backward()
    assert dict(module.named_parameters())["0.weight"] is own["0.weight"]
    again = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    weight, bias = again["0.weight"], again["0.bias"]
    expected = nn.functional.linear(torch.tanh(nn.functional.linear(inputs, weight, bias)), weight, bias)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    assert all(torch.allclose(leaves[name].grad, again[name].grad) for name in leaves)
    with pytest.raises(ZeroDivisionError), swapped(module, leaves):
        raise ZeroDivisionError
    assert module[0].weight is own["0.weight"]


class Recomputing(nn.Module):
    """Its middle layer is not kept for the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, inputs):
        hidden = self.first(inputs)
        if self.reentrant is None:
            hidden = self.middle(hidden).tanh()
        else:
            hidden = checkpoint(lambda x: self.middle(x).tanh(), hidden, use_reentrant=self.reentrant)
        return {"logits": self.last(hidden)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused_or_right(reentrant):
    """It would compute gradients at θ0: 8.3 for 67.6 in one network."""
    torch.manual_seed(0)
    module, inputs = Recomputing(None).double(), torch.randn(5, 3, dtype=torch.float64)
    model = MergedModel(module, vectors(module), "task", 0.3)
    model(inputs)["logits"].square().sum().backward()
    expected, model.coefficients.grad = model.coefficients.grad, None
    module.reentrant = reentrant
    with pytest.raises(ConfigurationError, match=r"^MergedModel: expected a module without activation.*swapped\("):
        model(inputs)
    assert all(isinstance(own, nn.Parameter) for own in module.parameters())
    with torch.no_grad():  # nothing is recomputed
        assert torch.isfinite(model(inputs)["logits"]).all()
    with swapped(model.module, model.merged_parameters()):  # the way out that the refusal names
        module.reentrant = False
        module(inputs)["logits"].square().sum().backward()
    torch.testing.assert_close(model.coefficients.grad, expected, rtol=1e-12, atol=0)


def test_hooks_around_a_merged_model_are_left_to_their_owner():
    module = network()
    model, images = MergedModel(module, vectors(module), "task"), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model(images).square().sum().backward()
    expected, model.coefficients.grad = model.coefficients.grad, None
    with torch.autograd.graph.save_on_cpu():
        loss = model(images).square().sum()
    loss.backward()
    assert torch.equal(model.coefficients.grad, expected)


@pytest.mark.parametrize("storage", ["device", "mapped"])
def test_a_compiled_merged_model_reads_its_files_outside_of_the_graph(storage, tmp_path):
    module = Recomputing(None)
    for vector in (vectors(module).vector(task) for task in TASKS):
        vector.save(tmp_path / vector.task)
    given = TaskVectors([TaskVector.load(tmp_path / task) for task in TASKS])
    inputs = torch.randn(5, 3)
    plain, compiled = (MergedModel(module, given, "tensor", 0.3, storage=storage) for _ in range(2))
    plain(inputs)["logits"].square().sum().backward()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # then files are read by plain code, which a graph would take up
    try:
        torch.compile(compiled, backend="aot_eager")(inputs)["logits"].square().sum().backward()
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(compiled.coefficients.grad, plain.coefficients.grad)
