"""Each task's part of a merge: the sum is the merge, and coefficients that are learned on the parts are written."""

from __future__ import annotations

import json

import pytest
import torch

from lit_merge import Coefficients, TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    CART,
    Calibrate,
    CalibratedDirections,
    CARTDirections,
    Departures,
    IsoC,
    Scale,
    Sum,
    TSVDirections,
    TSVMerge,
    adamerging,
    chain,
    ties,
)

TASKS = ("a", "b", "c")
SHAPES = {"blocks.0.weight": (9, 6), "blocks.1.weight": (4, 7), "skipped": (5, 5), "bias": (6,), "conv": (2, 2, 2)}
SAME = [
    (TSVDirections(exclude="skip"), TSVMerge(exclude="skip")),
    (TSVDirections(0.5), TSVMerge(0.5)),
    (CARTDirections(0.4, 2.3, "skip"), CART(0.4, 2.3, "skip")),
    (CalibratedDirections(exclude="skip"), chain(Sum(), Scale(0.3), Calibrate(exclude="skip"))),
    (CalibratedDirections(1.0, 1.0), chain(Sum(), Calibrate(1.0))),
    (Departures(ties(0.3)), ties(0.3)),
    (Departures(IsoC(), 0.4), IsoC()),
]


def vectors():
    draw = torch.Generator().manual_seed(2)
    rows = [{n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in SHAPES.items()} for _ in TASKS]
    return TaskVectors([TaskVector(row, task) for row, task in zip(rows, TASKS, strict=True)])


@pytest.mark.parametrize(("parts", "merge"), SAME, ids=lambda one: repr(one))
def test_the_parts_sum_to_the_merge(parts, merge):
    found, expected = chain(parts, Sum())(vectors()).single(), merge(vectors()).single()
    assert parts(vectors()).tasks == TASKS
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)


def test_a_part_is_its_tasks_own():
    """Of TSV-M within its share of the rank; of SVC what the projection makes of its vector; of CART a departure."""
    given = vectors()["blocks.0.weight"]
    part = TSVDirections()(vectors())["blocks.0.weight"]
    values = torch.linalg.svdvals(part)
    torch.testing.assert_close(values[:, :2], torch.linalg.svdvals(given)[:, :2])
    assert values[:, 2:].abs().max() < 1e-12
    torch.testing.assert_close(part[0].mT @ part[1], torch.zeros(6, 6, dtype=torch.float64))
    turned = CalibratedDirections()(vectors())["blocks.0.weight"]
    left = torch.linalg.svd(given.sum(0), full_matrices=False).U
    torch.testing.assert_close(turned[0] - left @ left.mT @ turned[0], 0.3 * (given[0] - left @ left.mT @ given[0]))
    departure = CARTDirections(0.4)(vectors())["blocks.0.weight"][2] - given.mean(0) / 3
    assert torch.linalg.matrix_rank(departure) == 2
    own = Departures(TSVMerge(), 0.3)(vectors())["blocks.0.weight"][1]
    merged = TSVMerge()(vectors())["blocks.0.weight"][0]
    torch.testing.assert_close(own, merged / 3 + 0.3 * (given[1] - given.mean(0)))


@pytest.mark.parametrize("parts", [TSVDirections(), CARTDirections(0.4, 2.3), Departures(ties(0.3))], ids=repr)
def test_coefficients_that_were_learned_on_the_parts_find_them_again(parts, tmp_path):
    values = torch.tensor([[0.5, 1.0, 2.0, 1.0, 1.0], [1.0] * 5, [0.0, 1.0, 1.5, 1.0, 0.2]], dtype=torch.float64)
    metadata = {"transform_config": json.dumps(parts.to_config())}
    Coefficients(values, TASKS, tuple(SHAPES), {n: n for n in SHAPES}, "tensor", metadata).save(tmp_path / "c.json")
    found = adamerging(str(tmp_path / "c.json"))(vectors()).single()
    rows = parts(vectors())
    for column, name in enumerate(SHAPES):
        torch.testing.assert_close(found[name], torch.einsum("t,t...->...", values[:, column], rows[name]))


def test_refused():
    for make, said in (
        (lambda: TSVDirections(0.0), "TSVDirections.rank_fraction: expected"),
        (lambda: CARTDirections(2.0), "CARTDirections.rank_fraction: expected"),
        (lambda: Departures(merge=Sum), "Departures.merge: expected a transform"),
        (lambda: Departures(coefficient="a"), "Departures.coefficient: expected"),
        (lambda: Departures(Scale(1.0))(vectors()), "Departures.merge: expected a transform that leaves one vector"),
        (lambda: CARTDirections(coefficient="a"), "CARTDirections.coefficient: expected"),
        (lambda: CalibratedDirections(0.0), "CalibratedDirections.alpha: expected"),
        (lambda: CalibratedDirections(exclude="("), r"CalibratedDirections\.exclude: expected a regular expression"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            make()
