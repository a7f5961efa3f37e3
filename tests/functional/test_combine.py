"""θ0 + Σ λ τ and its hand-written gradient, against plain autograd."""

from __future__ import annotations

import pytest
import torch

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.functional import combine, shannon_entropy
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.storage import VectorStorage

SHAPES = {"a": (3, 4), "scalar": (), "empty": (0, 2), "b": (5,), "one": (1,)}


def drawn(tasks=3, dtype=torch.float64):
    torch.manual_seed(0)
    base = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    stacks = {name: torch.randn(tasks, *shape, dtype=dtype) for name, shape in SHAPES.items()}
    return base, stacks


def stored(stacks, kind=VectorStorage):
    count = len(next(iter(stacks.values())))
    return kind(TaskVectors([TaskVector({n: stack[t] for n, stack in stacks.items()}, f"{t}") for t in range(count)]))


@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]])
def test_values_and_gradients_are_those_of_the_plain_sum(columns):
    base, stacks = drawn()
    weights = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in base.items()}
    found = torch.randn(3, max(columns) + 1, dtype=torch.float64, requires_grad=True)
    expected = found.detach().clone().requires_grad_()
    merged = combine(base, stored(stacks), found, columns)
    assert list(merged) == list(SHAPES)
    total = sum((merged[name] * weights[name]).sum() for name in SHAPES)
    plain = 0.0
    for column, name in zip(columns, SHAPES, strict=True):
        tensor = base[name] + sum(expected[task, column] * stacks[name][task] for task in range(3))
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-14)
        plain = plain + (tensor * weights[name]).sum()
    total.backward()
    plain.backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-13)


def test_gradcheck():
    base, stacks = drawn(2)
    coefficients = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: tuple(combine(base, stored(stacks), value).values()), (coefficients,))


def test_without_a_base_it_is_the_merged_task_vector_and_what_is_not_used_has_no_gradient():
    base, stacks = drawn()
    coefficients = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    merged = combine(None, stored(stacks), coefficients)
    torch.testing.assert_close(merged["a"], stacks["a"].sum(0))
    merged["b"].sum().backward()
    assert coefficients.grad[:, [0, 1, 2, 4]].eq(0).all()
    torch.testing.assert_close(coefficients.grad[:, 3], stacks["b"].sum(1))
    assert not base["a"].requires_grad


def test_every_vector_is_read_once_on_the_way_there_and_once_on_the_way_back():
    class Counted(VectorStorage):
        forth = back = 0

        def add_weighted(self, weights, base, out=None):
            self.forth += 1
            return super().add_weighted(weights, base, out)

        def inner_products(self, gradients):
            self.back += 1
            assert "one" not in gradients  # what has no gradient is not given as zeros
            return super().inner_products(gradients)

    base, stacks = drawn()
    directions = stored(stacks, Counted)
    coefficients = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    merged = combine(base, directions, coefficients)
    sum(merged[name].square().sum() for name in ("a", "b", "scalar")).backward()
    assert (directions.forth, directions.back) == (1, 1)


def test_the_base_decides_the_dtype():
    base, stacks = drawn(dtype=torch.float32)
    merged = combine({name: value.bfloat16() for name, value in base.items()}, stored(stacks), torch.ones(3, 5))
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    expected = (base["a"].bfloat16().float() + stacks["a"].sum(0)).bfloat16()
    assert (merged["a"] - expected).abs().max() <= 0.02


def test_what_does_not_fit_is_refused():
    base, stacks = drawn()
    with pytest.raises(
        ConfigurationError, match=r"expected a matrix with a column for each of 5 parameters, got shape"
    ):
        combine(base, stored(stacks), torch.ones(3, 4))
    with pytest.raises(ConfigurationError, match=r"got shape \(3, 5\) and 4 columns\."):
        combine(base, stored(stacks), torch.ones(3, 5), [0, 1, 2, 3])
    with pytest.raises(
        StructureMismatchError, match=r"expected every parameter of the task vectors, got no b \(1 miss"
    ):
        combine({name: value for name, value in base.items() if name != "b"}, stored(stacks), torch.ones(3, 5))
    coefficients = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    loss = combine(base, stored(stacks), coefficients)["a"].square().sum()
    (gradient,) = torch.autograd.grad(loss, coefficients, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_entropy():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    p = logits.detach().exp() / logits.detach().exp().sum(-1, keepdim=True)
    torch.testing.assert_close(shannon_entropy(logits), -(p * p.log()).sum(-1))
    assert torch.autograd.gradcheck(shannon_entropy, (logits,))
    assert shannon_entropy(torch.tensor([1000.0, 0.0])).item() == 0.0  # no NaN from 0 · log 0
    assert shannon_entropy(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32
