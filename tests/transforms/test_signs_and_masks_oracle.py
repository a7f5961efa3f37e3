"""TIES, TALL masks, consensus and rescaling against their definitions, restated in NumPy and plain loops."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from builders.oracle_arrays import Arrays, arrays, random_vectors, window

from lit_merge.transforms import (
    ConsensusMask,
    DisjointMean,
    DisjointSum,
    ElectSign,
    Mean,
    Rescale,
    Scale,
    Sum,
    TallMask,
    Trim,
    chain,
    consensus_ta,
    consensus_ties,
    dare_ties,
    tall_masks,
    ties,
)
from lit_merge.vectors import TaskVector, TaskVectors

KINDS = ("float64", "float32", "mixed", "equal", "denormal", "zero", "sparse")


def sign(number: Fraction | float) -> int:
    return int(number > 0) - int(number < 0)


def elected(vectors: list[Arrays], weighting: str = "mass") -> list[Arrays]:
    """The sign of the exact sum, where it is 0 the sign that was elected most often; what disagrees is 0."""
    signs = {}
    for name, values in vectors[0].items():
        for place in range(values.size):
            entries = [Fraction(float(vector[name].flat[place])) for vector in vectors]
            signs[name, place] = sign(sum(map(sign, entries)) if weighting == "count" else sum(entries))
    majority = sign(sum(signs.values()))
    result = [{name: np.zeros(values.shape) for name, values in vector.items()} for vector in vectors]
    for (name, place), one in signs.items():
        for vector, kept in zip(vectors, result, strict=True):
            if sign(vector[name].flat[place]) == (one or majority):
                kept[name].flat[place] = vector[name].flat[place]
    return result


def disjoint_mean(vectors: list[Arrays]) -> Arrays:
    result = {name: np.zeros(values.shape) for name, values in vectors[0].items()}
    for name, values in result.items():
        for place in range(values.size):
            entries = [vector[name].flat[place] for vector in vectors if vector[name].flat[place] != 0]
            values.flat[place] = math.fsum(entries) / len(entries) if entries else 0.0
    return result


def ties_of(vectors: list[Arrays], density: float, scope: str = "global") -> Arrays:
    return disjoint_mean(elected([window(vector, density, scope=scope) for vector in vectors]))


def total(vectors: list[Arrays]) -> Arrays:
    return {name: sum(vector[name] for vector in vectors) for name in vectors[0]}


def masks(vectors: list[Arrays], merged: Arrays, thresholds: list[float]) -> list[Arrays]:
    return [
        {name: np.abs(vector[name]) > factor * np.abs(merged[name] - vector[name]) for name in merged}
        for vector, factor in zip(vectors, thresholds, strict=True)
    ]


def assert_close(found: list[Arrays], expected: list[Arrays], tolerance: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=1e-45)


def votes(*rows: list[float], dtype: torch.dtype = torch.float32) -> TaskVectors:
    return TaskVectors([TaskVector({"w": torch.tensor(row, dtype=dtype)}, str(at)) for at, row in enumerate(rows)])


@pytest.mark.parametrize("weighting", ["mass", "count"])
@pytest.mark.parametrize("kind", KINDS)
def test_elect_sign(kind, weighting):
    vectors = random_vectors(kind)
    for view in (vectors, vectors.select(["one", "two"]), Trim(0.4)(vectors)):
        assert_close(arrays(ElectSign(weighting)(view)), elected(arrays(view), weighting), tolerance=0)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_ties(kind, scope):
    vectors = random_vectors(kind)
    for density in (0.2, 0.5, 1.0):
        expected = ties_of(arrays(vectors), density, scope)
        assert_close(arrays(ties(density, scope=scope)(vectors)), [expected])
        half = {name: values * 0.5 for name, values in expected.items()}
        assert_close(arrays(ties(density, 0.5, scope)(vectors)), [half])


def test_even_votes_follow_the_majority_of_all_parameters():
    """Two entries elect plus, one minus; where the sum is 0 the minority disappears, not both."""
    vectors = TaskVectors(
        [
            TaskVector({"z": torch.tensor([2.0, 1.0, 0.0]), "a": torch.tensor([3.0, -3.0])}, "a"),
            TaskVector({"z": torch.tensor([-2.0, 1.0, 0.0]), "a": torch.tensor([-1.0, 1.0])}, "b"),
            TaskVector({"z": torch.tensor([0.0, 1.0, 0.0]), "a": torch.tensor([0.0, 4.0])}, "c"),
        ]
    )
    result = ElectSign()(vectors)
    assert result["z"].tolist() == [[2, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert result["a"].tolist() == [[3, 0], [0, 1], [0, 4]]
    negative = ElectSign()(Scale(-1)(vectors))
    assert negative["z"].tolist() == [[-2, -1, 0], [0, -1, 0], [0, -1, 0]]


def test_without_any_majority_even_votes_elect_nothing():
    assert ElectSign()(votes([2.0, 1.0, -1.0], [-2.0, 1.0, -1.0]))["w"].tolist() == [[0, 1, -1], [0, 1, -1]]
    assert DisjointMean()(ElectSign()(votes([2.0], [-2.0])))["w"].tolist() == [[0.0]]


def test_mass_and_count_differ():
    vectors = votes([3.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [-1.0, 1.0, 1.0])
    assert ElectSign("mass")(vectors)["w"][:, 0].tolist() == [3, 0, 0]
    assert ElectSign("count")(vectors)["w"][:, 0].tolist() == [0, -1, -1]


def test_rounding_elects_no_sign():
    """0.1 + 0.2 − 0.3 in float32, whose exact sum is negative, in any order and at every place of a chunk."""
    numbers = [0.1, 0.2, -0.3, 1e-3, 5.0, -5.0, -1e-3]
    exact = sign(sum(Fraction(float(np.float32(number))) for number in numbers))
    assert exact == -1
    assert torch.tensor([0.1, 0.2, -0.3]).sum() == 0
    for order in itertools.islice(itertools.permutations(numbers), 0, None, 37):
        column = torch.tensor(order)
        vectors = votes(*([float(number)] * 67 for number in column))
        result = ElectSign()(vectors)["w"]
        assert torch.equal(result, column.clamp(max=0).unsqueeze(1).expand(-1, 67))


def test_disjoint_mean_and_sum_leave_zeros_out():
    vectors = votes([1.0, 0.0, -2.0, 0.0], [3.0, 0.0, 0.0, -0.0], [5.0, 7.0, -3.0, 0.0])
    assert DisjointMean()(vectors)["w"].tolist() == [[3, 7, -2.5, 0]]
    assert DisjointSum()(vectors)["w"].tolist() == [[9, 7, -5, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_tall_masks(kind):
    vectors = random_vectors(kind)
    given = arrays(vectors)
    settings = (
        (0.4, [0.4] * 3),
        ((0.2, 0.0, 0.6), [0.2, 0.0, 0.6]),
        ({"three": 0.6, "one": 1.0, "two": 2.0}, [1.0, 2.0, 0.6]),
    )
    for threshold, numbers in settings:
        for merge, merged in ((Sum(), total(given)), (ties(0.5), ties_of(given, 0.5))):
            expected = [{name: merged[name] * mask[name] for name in merged} for mask in masks(given, merged, numbers)]
            assert_close(arrays(TallMask(threshold, merge)(vectors)), expected)
    assert_close(arrays(tall_masks(0.4)(vectors)), arrays(TallMask(0.4)(vectors)), tolerance=0)
    assert_close(arrays(tall_masks(0.4, 0.5)(vectors)), arrays(TallMask(0.4, ties(0.5))(vectors)), tolerance=0)


def test_what_equals_the_threshold_is_not_in_the_mask():
    """|τ| > ½ |τ_MTL − τ| for τ = (1, 2) and (2, 4): 1 > 1, 2 > ½; 2 > 2, 4 > 1."""
    assert TallMask(0.5)(votes([1.0, 2.0], [2.0, 4.0]))["w"].tolist() == [[0, 0], [3, 6]]
    assert TallMask(0.4)(votes([1.0, 2.0], [2.0, 4.0]))["w"].tolist() == [[3, 6], [3, 6]]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_consensus(kind, k):
    vectors = random_vectors(kind)
    given = arrays(vectors)
    for threshold in (0.2, 0.6):
        for merge, merged in ((Sum(), total(given)), (ties(0.5), ties_of(given, 0.5))):
            found = masks(given, merged, [threshold] * 3)
            expected = {
                name: np.where(sum(mask[name].astype(int) for mask in found) >= k, merged[name], 0) for name in merged
            }
            assert_close(arrays(ConsensusMask(k, threshold, merge)(vectors)), [expected])
            scaled = {name: values * 0.3 for name, values in expected.items()}
            method = consensus_ties(k, threshold, 0.5, 0.3) if merge != Sum() else consensus_ta(k, threshold, 0.3)
            assert_close(arrays(method(vectors)), [scaled])


def test_dare_ties_trims_what_is_left():
    """density counts all entries, those that were dropped too."""
    vectors = random_vectors("float64")
    dropped = dare_ties(0.5, coefficient=1.0)(vectors)
    assert_close(arrays(dropped), arrays(dare_ties(0.5, density=0.99)(vectors)), tolerance=0)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("kind", KINDS)
def test_rescale(kind, norm, scope):
    vectors = random_vectors(kind)
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]

    def size(vector: Arrays, name: str) -> float:
        parts = [vector[name]] if scope == "tensor" else list(vector.values())
        flat = np.concatenate([part.ravel() for part in parts])
        return float(np.linalg.norm(flat, order)) if flat.size else 0.0

    before = arrays(vectors)
    for step in (Trim(0.3), Mean(), chain(Sum(), Scale(-3))):
        after = arrays(step(vectors))
        expected = []
        for row, vector in enumerate(after):
            result = {}
            for name, values in vector.items():
                wanted = [size(one, name) for one in ([before[row]] if len(after) > 1 else before)]
                now = size(vector, name)
                result[name] = values * (np.mean(wanted) / now) if now else values
            expected.append(result)
        tolerance = 1e-2 if kind == "denormal" else 2e-6  # a denormal number has few digits
        found = arrays(chain(step, Rescale(norm, scope))(vectors))
        for one, other in zip(found, expected, strict=True):
            for name in one:
                np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=2e-45)
