"""OrthoMerge against its definition, restated with NumPy in float64, and the laws of what needs θ0."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import Mean, OrthoMerge, Scale, Sum, Transform, TSVMerge, chain, orthomerge
from lit_merge.vectors import TaskVector, TaskVectors

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def drawn(tasks: int, rows: int, columns: int, size: float = 0.2) -> tuple[np.ndarray, list[np.ndarray]]:
    generator = np.random.default_rng([tasks, rows, columns])
    return generator.standard_normal((rows, columns)), [
        size * generator.standard_normal((rows, columns)) for _ in range(tasks)
    ]


def merge(transform: Transform, origin, matrices, dtype: torch.dtype = torch.float64) -> np.ndarray:
    vectors = [TaskVector({"w": torch.tensor(matrix, dtype=dtype)}, str(i)) for i, matrix in enumerate(matrices)]
    merged = transform(TaskVectors(vectors, base={"w": torch.tensor(origin, dtype=dtype)}))["w"]
    assert merged.dtype == dtype
    return merged[0].double().numpy()


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


def rotation(origin: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Procrustes; a little of the identity decides what the matrices leave open."""
    product = origin.T @ target
    nudge = 1e-9 * np.linalg.norm(product) if len(origin) < len(product) else 0.0
    u, _, v = np.linalg.svd(product + nudge * np.eye(len(product)))
    u[:, -1] *= np.sign(np.linalg.det(u @ v))  # a reflection is no rotation (Kabsch 1976)
    return u @ v


def definition(origin, matrices, coefficient: float = 0.2, conflicts: bool = False) -> np.ndarray:
    identity, mean = np.eye(origin.shape[1]), sum(matrices) / len(matrices)
    rotations = []
    for tau in matrices:
        against = (tau * mean).sum(1) < 0
        chosen = tau * against[:, None] if conflicts else tau
        rotations.append(rotation(origin, origin + chosen))
    skew = [np.linalg.inv(one + identity) @ (one - identity) for one in rotations]
    total = sum(skew)
    if np.linalg.norm(total) > 1e-12:
        total = total / np.linalg.norm(total) * np.mean([np.linalg.norm(one) for one in skew])
    turned = origin @ np.linalg.inv(identity - total) @ (identity + total)
    rest = sum(origin + tau - origin @ one for tau, one in zip(matrices, rotations, strict=True))
    return turned - origin + coefficient * rest


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 8, 5), (3, 5, 5), (4, 9, 3), (3, 5, 1)])
@pytest.mark.parametrize("conflicts", [False, True])
def test_orthomerge(shape, conflicts, dtype):
    origin, matrices = drawn(*shape)
    expected = definition(origin, matrices, 0.2, conflicts)
    close(merge(orthomerge(0.2, conflicts), origin, matrices, dtype), expected, TOLERANCE[dtype])


def test_what_the_matrices_leave_open_is_not_turned():
    origin, matrices = drawn(3, 3, 7)
    close(merge(orthomerge(), origin, matrices), definition(origin, matrices), 1e-5)
    apart = np.zeros((4, 6))
    apart[:, :4] = np.eye(4)
    still = merge(OrthoMerge(chain(Sum(), Scale(0.0))), apart, [0.1 * apart, 0.2 * apart])
    close(still + 1, np.ones_like(still))


@pytest.mark.parametrize("shape", [(6, 6), (1, 1), (12, 12), (9, 4), (4, 9)])
def test_one_task_comes_back_also_where_procrustes_finds_a_reflection(shape):
    reflections = 0
    for seed in range(12):
        generator = np.random.default_rng([seed, *shape])
        origin, tau = generator.standard_normal(shape), 1.5 * generator.standard_normal(shape)
        u, _, v = np.linalg.svd(origin.T @ (origin + tau))
        reflections += np.linalg.det(u @ v) < 0
        close(merge(orthomerge(1.0), origin, [tau]), tau, 1e-7)
        nudged = merge(orthomerge(1.0), origin, [tau * (1 + 1e-12)])
        close(nudged, tau, 1e-6)
    assert shape[0] != shape[1] or reflections > 1


def test_rotated_models_are_merged_as_rotations():
    origin, (one,) = drawn(1, 8, 5)
    skew = 0.1 * (one[:5] - one[:5].T)
    identity = np.eye(5)
    turned = [np.linalg.inv(identity - c * skew) @ (identity + c * skew) for c in (1.0, 3.0)]
    half = np.linalg.inv(identity - 2 * skew) @ (identity + 2 * skew)
    close(merge(OrthoMerge(), origin, [origin @ one - origin for one in turned]), origin @ half - origin)


def test_the_rest_is_merged_by_any_rule_and_what_is_excluded_by_it_alone():
    origin, matrices = drawn(3, 7, 5)
    rotations = [rotation(origin, origin + tau) for tau in matrices]
    rest = [origin + tau - origin @ one for tau, one in zip(matrices, rotations, strict=True)]
    turned = definition(origin, matrices, 0.0)
    close(merge(OrthoMerge(TSVMerge()), origin, matrices), turned + merge(TSVMerge(), origin, rest), 1e-9)
    close(merge(OrthoMerge(Mean(), exclude="^w$"), origin, matrices), sum(matrices) / 3)
    close(merge(OrthoMerge(Mean()), origin[0], [one[0] for one in matrices]), sum(one[0] for one in matrices) / 3)
    assert not merge(OrthoMerge(), origin, [np.zeros((7, 5))] * 2).any()


def test_long_and_many_vectors_do_not_explode():
    for origin, matrices in (drawn(8, 3, 9, 5.0), drawn(3, 9, 6, 0.0), drawn(2, 6, 6, 5.0)):
        limit = 2 * np.linalg.norm(origin) + 0.2 * sum(
            np.linalg.norm(one) + 2 * np.linalg.norm(origin) for one in matrices
        )
        assert np.linalg.norm(merge(OrthoMerge(), origin, matrices)) < limit


def test_laws():
    origin, matrices = drawn(3, 6, 4)
    tensors = [{"w": torch.tensor(one), "b": torch.tensor(one[0]), "s": torch.tensor(1.0)} for one in matrices]
    base = {"w": torch.tensor(origin), "b": torch.tensor(origin[0]), "s": torch.tensor(0.0)}
    vectors = TaskVectors([TaskVector(one, task) for one, task in zip(tensors, "abc", strict=True)], base=base)
    transform = OrthoMerge()
    result = transform(vectors)
    assert result.tasks == ("a+b+c",)
    assert result.provenance == (*(f"TaskVector(task={task!r})" for task in "abc"), repr(transform))
    assert {name: tuple(result[name].shape) for name in result} == {"w": (1, 6, 4), "b": (1, 4), "s": (1,)}
    before = [one["w"].clone() for one in tensors]
    again = result["w"].clone()
    result["w"].zero_()
    assert torch.equal(result["w"], again)
    assert all(torch.equal(one["w"], other) for one, other in zip(tensors, before, strict=True))
    torch.testing.assert_close(transform(vectors.select([2, 0, 1]))["w"], again)
    assert pickle.loads(pickle.dumps(transform)) == transform == eval(repr(transform))
    assert torch.equal(pickle.loads(pickle.dumps(result))["w"], again)
    assert result.work("w").operations > 6 * 4**3 > result.work("b").operations == 0
    assert transform.to_config()["class_path"] == "lit_merge.transforms.OrthoMerge"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OrthoMerge(Sum), r"OrthoMerge\.merge: expected a transform, got .*Sum"),
        (lambda: OrthoMerge(conflicts=1), r"OrthoMerge\.conflicts: expected true or false, got 1"),
        (lambda: OrthoMerge(exclude="("), r"OrthoMerge\.exclude: expected a regular expression, got '\('"),
        (
            lambda: merge(OrthoMerge(Scale(1.0)), *drawn(2, 3, 3)),
            r"OrthoMerge\.merge: expected .* which leaves 2\. Use",
        ),
        (lambda: OrthoMerge()(TaskVectors([TaskVector({"w": torch.ones(2, 2)}, "a")])), r"base: expected the pre-tr"),
    ],
)
def test_what_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
