"""Vectors that are known to ruin merges: no recipe without data explodes, and what is wrong is said with its number."""

from __future__ import annotations

import inspect

import pytest
import torch

from lit_merge import TaskVector, TaskVectors
from lit_merge.transforms import RECIPES, recipe

SHAPES = {"blocks.0.attn.weight": (24, 16), "blocks.0.mlp.weight": (12, 20), "blocks.1.mlp.bias": (12,)}
FEWER = {"slerp", "analogy", "rewarded_soup", "nearswap", "negation"}  # for one, two or three vectors
DATA_FREE = [
    name
    for name, function in RECIPES.items()
    if name not in FEWER
    and not any(one.default is one.empty for one in inspect.signature(function).parameters.values())
]
SHORT = {"wudi": {"steps": 20}, "optmerge": {"steps": 20}, "doge": {"steps": 20}}
MULTIPLE = 5.0  # of the sum of all vectors' norms, which the plain sum stays below; of ESM by its squares 3.7


def gaussian(shape, draw, rank):
    if len(shape) < 2:
        return 0.01 * torch.randn(shape, generator=draw)
    factors = torch.randn(shape[0], rank, generator=draw), torch.randn(rank, shape[1], generator=draw)
    return 0.01 * (factors[0] @ factors[1]) / rank**0.5


def case(name):
    """Six vectors of rank 4, in which one thing is wrong."""
    draw = torch.Generator().manual_seed(8)
    tasks = 30 if name == "more tasks than ranks" else 6
    rank = 1 if name == "more tasks than ranks" else 4
    rows = [{n: gaussian(shape, draw, rank) for n, shape in SHAPES.items()} for _ in range(tasks)]
    if name == "five times as long":
        rows[2] = {n: 5 * one for n, one in rows[2].items()}
    if name == "rounded to bfloat16":
        rows = [{n: one.bfloat16() for n, one in row.items()} for row in rows]
    if name == "rounded weights":  # θ0 + τ was stored in bfloat16, τ is what is left
        base = {n: torch.randn(shape, generator=draw) for n, shape in SHAPES.items()}
        rows = [{n: (base[n] + one).bfloat16().float() - base[n] for n, one in row.items()} for row in rows]
    base = {n: torch.randn(shape, generator=draw) for n, shape in SHAPES.items()}
    vectors = [TaskVector(row, f"task {place}") for place, row in enumerate(rows)]
    return TaskVectors(vectors, base=base)


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize(
    "wrong", ["five times as long", "rounded to bfloat16", "rounded weights", "more tasks than ranks"]
)
def test_no_merge_explodes(name, wrong):
    vectors = case(wrong)
    merged = recipe(name, **SHORT.get(name, {}))(vectors)
    lengths = sum(vectors.vector(place).norm() for place in range(len(vectors.tasks)))
    for row in range(len(merged.tasks)):
        vector = merged.vector(row)
        assert all(bool(torch.isfinite(vector[n]).all()) for n in SHAPES)
        assert vector.norm() <= MULTIPLE * lengths


def test_every_recipe_is_looked_at():
    assert set(RECIPES) - set(DATA_FREE) - FEWER == {"fisher", "regmean", "adamerging"} & set(RECIPES)
