"""``lit_merge.merge``: what goes in comes out."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lit_merge
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.vectors import TaskVector


class Tied(nn.Module):
    """A tied head, batch normalisation and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 3)
        self.norm = nn.BatchNorm1d(3)
        self.lm_head = nn.Linear(3, 6, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("position_ids", torch.arange(4))


def shifted(module, amount):
    tuned = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(amount)
    tuned.norm.running_var.mul_(amount + 1)
    return tuned


@pytest.fixture
def models():
    torch.manual_seed(0)
    base = Tied()
    return base, shifted(base, 0.5), shifted(base, -0.25)


def quietly(*arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lit_merge.merge(*arguments, **settings)


def test_modules_give_a_module_and_are_left_as_they_are(models):
    base, first, second = models
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.warns(UserWarning, match=r"2 running statistics \(norm\.running_mean .*: the mean of 2 of 2 inputs"):
        merged = lit_merge.merge(base, [first, second], recipe="task_arithmetic", coefficient=2.0)
    assert isinstance(merged, Tied)
    assert merged.lm_head.weight is merged.embed_tokens.weight
    torch.testing.assert_close(merged.embed_tokens.weight, before["embed_tokens.weight"] + 2 * (0.5 - 0.25))
    torch.testing.assert_close(merged.norm.running_var, torch.full((3,), (1.5 + 0.75) / 2))
    assert torch.equal(merged.position_ids, base.position_ids)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    kept = quietly(base, [first, second], recipe="ties", density=0.5, running_statistics="base")
    assert torch.equal(kept.norm.running_var, base.norm.running_var)


def test_state_dicts_paths_and_vectors_give_the_same(models, tmp_path):
    base, first, second = (dict(one.state_dict()) for one in models)
    expected = quietly(base, [first, second], recipe="ties", density=0.5)
    assert list(expected) == list(base)
    for name, state in (("base", base), ("first", first), ("second", second)):
        stored = {key: value.clone() for key, value in state.items()}
        save_file(stored, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("first", "second")]
    vectors = [TaskVector.from_checkpoints(base, state) for state in (first, second)]
    for start, given in ((tmp_path / "base.safetensors", paths), (base, paths), (base, [paths[0], second])):
        merged = quietly(start, given, recipe="ties", density=0.5)
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    of_vectors = quietly(base, vectors, recipe="ties", density=0.5, running_statistics="base")
    assert torch.equal(of_vectors["norm.weight"], expected["norm.weight"])
    alone = quietly(None, vectors, recipe="ties", density=0.5)
    assert isinstance(alone, TaskVector)
    torch.testing.assert_close(base["norm.weight"] + alone["norm.weight"], expected["norm.weight"])


def test_several_outcomes_are_named_after_their_tasks(models):
    base, first, second = models
    found = quietly(base, [first, second], parts=[{"Scale": {"coefficient": 1.0}}], tasks=["one", "two"])
    assert list(found) == ["one", "two"]
    torch.testing.assert_close(found["two"].norm.weight, second.norm.weight)


@pytest.mark.parametrize("base", [None, {"w": torch.zeros(2)}], ids=["vectors", "weights"])
def test_task_vectors_take_the_names_that_are_given_and_none_of_several_outcomes_is_lost(base):
    vectors = [TaskVector({"w": torch.tensor([1.0, -4.0])}), TaskVector({"w": torch.tensor([3.0, 2.0])})]
    found = quietly(base, vectors, parts=["Negate"], tasks=["a", "b"])
    assert {task: one["w"].tolist() for task, one in found.items()} == {"a": [-1.0, 4.0], "b": [-3.0, -2.0]}
    weighted = quietly(base, vectors, recipe="task_arithmetic", coefficient={"b": 2.0, "a": 1.0}, tasks=["a", "b"])
    assert weighted["w"].tolist() == [7.0, 0.0]
    assert [vector.task for vector in vectors] == ["", ""]
    for tasks, got in ((None, "''"), (["a", "a"], "'a'")):
        with pytest.raises(ConfigurationError, match=f"names of their own for the 2 vectors .*, got {got} more than"):
            quietly(base, vectors, parts=["Negate"], tasks=tasks)
        assert quietly(base, vectors, parts=["Sum"], tasks=tasks)["w"].tolist() == [4.0, -2.0]


def test_a_narrower_dtype_is_warned_of_with_numbers(models):
    base, _, _ = models
    tuned = shifted(base, 1e-4)
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 .*‖τ‖"):
        merged = lit_merge.merge(base, [tuned], recipe="task_arithmetic", coefficient=1.0, dtype=torch.bfloat16)
    assert merged.norm.weight.dtype == torch.bfloat16


def test_what_is_refused(models):
    base, first, _ = models
    cases = [
        ((base, first), {}, r"vectors: expected a list of at least one, got Tied\. Use \[a, b\]\."),
        ((base, []), {}, r"vectors: expected a list of at least one, got none"),
        ((base, [first]), {"tasks": ["a", "b"]}, r"tasks: expected a name for each of the 1 vectors, got 2\."),
        ((None, [first]), {}, r"vectors: expected task vectors, as there is no base, got Tied\. Pass base"),
        ((base, [first]), {"running_statistics": "sum"}, r"running_statistics: expected average or base, got 'sum'\."),
        (
            (base, [3]),
            {},
            r"finetuned: expected a mapping name -> tensor, a module or the path of a checkpoint, got int",
        ),
        (({"state_dict": {}}, [first]), {}, r"base: expected a mapping name -> tensor, got state_dict \(dict\)\."),
    ]
    for arguments, settings, line in cases:
        with pytest.raises(ConfigurationError, match=line):
            lit_merge.merge(*arguments, recipe="weight_average", **settings)
    with pytest.raises(ConfigurationError, match="densty"):
        lit_merge.merge(base, [first], recipe="ties", densty=0.1)
    with pytest.raises(StructureMismatchError, match=r"vector 0: fine-tuned checkpoint: expected the same"):
        lit_merge.merge(base, [nn.Linear(2, 2)], recipe="ties")
