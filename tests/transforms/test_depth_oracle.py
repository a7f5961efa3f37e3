"""Scaling by depth against its definition, restated in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_merge.naming import block_of
from lit_merge.transforms import (
    DisjointMean,
    LiNeS,
    Override,
    Scale,
    ScaleBlocks,
    Sum,
    Trim,
    WithOverrides,
    chain,
    lines,
    ties,
)
from lit_merge.vectors import TaskVector, TaskVectors

SHAPES = {
    "proj": (2, 3),
    "blocks.2.weight": (3, 3),
    "blocks.0.weight": (3, 3),
    "blocks.0.bias": (),
    "blocks.11.weight": (4,),
    "blocks.1.empty": (0,),
    "ln_post.bias": (5,),
}
BLOCKS = 12


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def vectors(request):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for task in "abc":
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(request.param)
            for name, shape in SHAPES.items()
        }
        rows.append(TaskVector(tensors, task))
    return TaskVectors(rows)


def check(result, before, factor):
    assert result.tasks == before.tasks
    for name in SHAPES:
        expected = before[name].double().numpy() * factor(block_of(name))
        np.testing.assert_allclose(result[name].double().numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("outside", [None, 0.0, -2.0])
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, None), (0.0, None), (1.5, None), (0.3, 0.4), (-0.5, 0.0)])
@pytest.mark.parametrize(
    ("schedule", "growth"), [("linear", lambda x: x), ("sqrt", math.sqrt), ("quadratic", lambda x: x * x)]
)
def test_lines(vectors, schedule, growth, alpha, beta, outside):
    slope = 1 - alpha if beta is None else beta
    transform = LiNeS(alpha, beta, schedule, outside)

    def factor(block):
        if block is None:
            return alpha if outside is None else outside
        return alpha + slope * growth(block / (BLOCKS - 1))

    for view in (vectors, Sum()(vectors)):
        check(transform(view), view, factor)
    assert transform.factors(BLOCKS, alpha) == pytest.approx([factor(block) for block in range(BLOCKS)], abs=1e-15)


def l1(rows) -> float:
    return math.fsum(abs(float(entry)) for tensor in rows.values() for entry in np.ravel(tensor))


@pytest.mark.parametrize(
    "merge", [Sum(), chain(Sum(), Scale(-0.3)), ties(0.4), chain(Trim(0.5), DisjointMean())], ids=repr
)
def test_norm_ratio(vectors, merge):
    """α = (‖Σ_t τ_t‖₁ / ‖τ‖₁) / T over all parameters, those outside the blocks too."""
    merged = merge(vectors)
    total = l1({name: vectors[name].double().numpy().sum(0) for name in SHAPES})
    alpha = total / l1({name: merged[name].double().numpy() for name in SHAPES}) / 3
    check(
        lines(merge, beta=0.7)(vectors),
        merged,
        lambda block: alpha if block is None else alpha + 0.7 * block / (BLOCKS - 1),
    )


def test_norm_ratio_is_one_over_the_number_of_tasks_for_task_arithmetic(vectors):
    merged = Sum()(vectors)
    check(lines(beta=0.0)(vectors), merged, lambda block: 1 / 3)
    # any coefficient before it cancels
    check(lines(chain(Sum(), Scale(0.3)), beta=0.0)(vectors), merged, lambda block: 1 / 3)
    check(lines(beta=None)(vectors), merged, lambda block: 1 / 3 + (2 / 3) * ((block or 0) / (BLOCKS - 1)))


def test_norm_ratio_of_zeros_is_zero():
    zeros = TaskVectors([TaskVector({"blocks.0.weight": torch.zeros(3), "blocks.1.bias": torch.zeros(())}, "a")] * 2)
    assert lines()(zeros)["blocks.0.weight"].tolist() == [[0, 0, 0]]
    opposite = TaskVectors([TaskVector({"blocks.0.weight": torch.tensor([value])}, "a") for value in (2.0, -2.0)])
    assert lines(chain(Trim(1.0), Scale([1, 0]), Sum()), beta=0.0)(opposite)["blocks.0.weight"].tolist() == [[0.0]]


def test_one_block_is_the_last_one():
    vectors = TaskVectors([TaskVector({"blocks.0.weight": torch.ones(2), "proj": torch.ones(1)}, "a")])
    result = LiNeS(0.25, 0.5)(vectors)
    assert result["blocks.0.weight"].tolist() == [[0.75, 0.75]]
    assert result["proj"].tolist() == [[0.25]]


@pytest.mark.parametrize("outside", [1.0, 0.0, -0.5])
def test_scale_blocks(vectors, outside):
    coefficients = [0.1 * (index - 3) for index in range(BLOCKS)]
    for view in (vectors, Sum()(vectors)):
        check(
            ScaleBlocks(coefficients, outside)(view),
            view,
            lambda block: outside if block is None else coefficients[block],
        )


def test_the_number_of_blocks_is_that_of_the_whole_network(vectors):
    part = vectors.restrict(["blocks.2.weight", "proj"])
    result = LiNeS(0.0, 1.0)(part)
    torch.testing.assert_close(result["blocks.2.weight"], vectors["blocks.2.weight"] * (2 / 11))
    assert result["proj"].count_nonzero() == 0


def test_the_decoder_of_a_t5_follows_its_encoder():
    """L_e = 2 and L_d = 3: depths 0, 1, then 2, 3, 4."""
    expected = {f"encoder.block.{i}.layer.1.DenseReluDense.wi.weight": i / 4 for i in (0, 1)}
    expected |= {f"decoder.block.{i}.layer.2.DenseReluDense.wi.weight": (2 + i) / 4 for i in (0, 1, 2)}
    expected |= {"encoder.final_layer_norm.weight": 1 / 4, "decoder.final_layer_norm.weight": 9.0, "shared.weight": 9.0}
    vectors = TaskVectors([TaskVector({name: torch.ones(2) for name in expected}, "a")])
    scaled = LiNeS(0.0, 1.0, outside=9.0)(vectors)
    assert {name: scaled[name][0, 0].item() for name in expected} == expected
    only = WithOverrides(Scale(1), [Override(Scale(5), blocks=[2, 4])])(vectors)
    assert [name for name in expected if only[name][0, 0] == 5] == [
        f"decoder.block.{i}.layer.2.DenseReluDense.wi.weight" for i in (0, 2)
    ]


def test_what_was_done_without_a_word_before_the_sum_counts_for_the_ratio_of_norms():
    names = [f"blocks.{block}.weight" for block in range(3)]
    vectors = TaskVectors([TaskVector({name: torch.full((2,), 1.0 + t) for name in names}, f"t{t}") for t in range(2)])
    silent = vectors.map_elements(lambda name, start, chunk: chunk * 0.5)
    named = vectors.map_elements(lambda name, start, chunk: chunk * 0.5, note="half")
    first, second = (chain(Sum(), LiNeS("norm_ratio", 0.0))(one) for one in (silent, named))
    for name in names:  # ‖Σ τ_t‖₁ / ‖τ‖₁ is 2, of two tasks
        torch.testing.assert_close(first[name], torch.full((1, 2), 1.5))
        assert torch.equal(first[name], second[name])
    plain = chain(Sum(), LiNeS("norm_ratio", 0.0))(vectors)
    assert not plain.statistics
    torch.testing.assert_close(plain[names[0]], torch.full((1, 2), 1.5))
