"""ESM against its definition, restated with NumPy in float64 from inputs, not from their Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.transforms import ESM, Polarise, Scale, esm
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.statistics import write_statistics

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}


def drawn(tasks: int, rows: int, columns: int, count: int = 25) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Task vectors, and inputs of the layer."""
    generator = np.random.default_rng([tasks, rows, columns])
    taus = [generator.standard_normal((rows, columns)) * (task + 1) for task in range(tasks)]
    return taus, [generator.standard_normal((count, columns)) + 0.5 for _ in range(tasks)]


def written(folder, inputs: list[np.ndarray], key: str = "w") -> dict[str, str]:
    files = {str(task): f"{folder}/{task}.safetensors" for task in range(len(inputs))}
    for task, x in enumerate(inputs):
        write_statistics(files[str(task)], "gram", {key: torch.tensor(x.T @ x / len(x))}, str(task))
    return files


def merge(transform, matrices, dtype: torch.dtype = torch.float64, name: str = "w") -> np.ndarray:
    vectors = [TaskVector({name: torch.tensor(matrix, dtype=dtype)}, str(i)) for i, matrix in enumerate(matrices)]
    return transform(TaskVectors(vectors))[name][0].double().numpy()


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


def whitened(matrix: np.ndarray) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = [i for i in range(len(s)) if s[i] > 1e-10 * s[0]]
    return np.mean(s[kept]) * sum(np.outer(u[:, i], v[i]) for i in kept)


def definition(taus, inputs, kept: int, polarised: bool = True, power: float = 0.0) -> np.ndarray:
    bases, coordinates, norms = [], [], []
    for tau, x in zip(taus, inputs, strict=True):
        norms.append(0.0)
        if not tau.any():
            continue
        _, s, v = np.linalg.svd(x @ tau.T, full_matrices=False)  # of what the task adds to the outputs
        values = [value**2 for value in s[:kept] if value > 1e-7 * s[0]]
        basis = v[: len(values)].T
        weights = (np.array(values) / np.mean(values)) ** power
        weights /= weights.mean()
        bases.append(basis * weights)
        coordinates.append(weights[:, None] * (basis.T @ tau))
        norms[-1] = np.linalg.norm(basis.T @ tau)
    if polarised:
        coordinates = [
            one * (norm / np.mean(norms)) ** 2 for one, norm in zip(coordinates, filter(None, norms), strict=True)
        ]
    joined = np.concatenate(coordinates)
    if polarised:
        columns = np.linalg.norm(joined, axis=0)
        joined = joined * (columns / columns.mean()) ** 2
    return whitened(np.concatenate(bases, 1)) @ whitened(joined)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "kept"), [((1, 5, 4), 5), ((2, 6, 9), 3), ((3, 7, 7), 2), ((3, 12, 5), 4), ((4, 3, 8), 1)]
)
@pytest.mark.parametrize(("polarised", "power"), [(True, 0.0), (False, 0.0), (True, 0.15)])
def test_esm(shape, kept, polarised, power, dtype, tmp_path):
    taus, inputs = drawn(*shape)
    files = written(tmp_path, inputs)
    expected = definition(taus, inputs, kept, polarised, power)
    close(merge(ESM(files, polarised, power), taus, dtype), expected, TOLERANCE[dtype])


def test_inputs_of_few_dimensions_and_vectors_of_low_rank(tmp_path):
    taus, inputs = drawn(2, 8, 6)
    few = [x[:2] for x in inputs]  # two rows: the outputs move in two directions
    close(merge(ESM(written(tmp_path, few)), taus), definition(taus, few, 4))
    low = [np.outer(tau[:, 0], tau[0]) for tau in taus]
    close(merge(ESM(written(tmp_path, inputs)), low), definition(low, inputs, 4))
    close(merge(ESM(written(tmp_path, inputs), rank_fraction=0.26), taus), definition(taus, inputs, 2))


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6)])
def test_a_layer_that_saw_only_zeros_is_not_changed(shape, tmp_path):
    taus, inputs = drawn(*shape)
    assert not merge(ESM(written(tmp_path, [0 * x for x in inputs])), taus).any()


def test_without_data_inputs_are_white(tmp_path):
    taus, _ = drawn(3, 7, 6)
    white = [np.eye(6)] * 3
    close(merge(ESM(), taus), definition(taus, white, 2))
    assert esm().steps == (ESM(), Polarise("layers"), Scale(1.0))


def test_a_matrix_without_a_gram_matrix_and_a_weight_that_is_used_transposed(tmp_path):
    taus, inputs = drawn(2, 6, 4)
    files = written(tmp_path, inputs, "w.T")
    turned = [tau.T.copy() for tau in taus]
    vectors = [
        TaskVector({"w": torch.tensor(one), "other": torch.tensor(tau), "b": torch.tensor(tau[0])}, str(i))
        for i, (one, tau) in enumerate(zip(turned, taus, strict=True))
    ]
    result = ESM(files)(TaskVectors(vectors))
    close(result["w"][0].numpy(), definition(taus, inputs, 3).T)
    close(result["other"][0].numpy(), definition(taus, [np.eye(4)] * 2, 3))
    close(result["b"][0].numpy(), (taus[0][0] + taus[1][0]) / 2)
    close(ESM(files, exclude="other")(TaskVectors(vectors))["other"][0].numpy(), (taus[0] + taus[1]) / 2)


def test_zeros_long_and_rounded_vectors_and_more_tasks_than_dimensions(tmp_path):
    taus, inputs = drawn(3, 5, 6)
    files = written(tmp_path, inputs)
    assert not merge(ESM(files), [np.zeros((5, 6))] * 3).any()
    with_zero = [taus[0], taus[1], np.zeros((5, 6))]
    close(merge(ESM(files), with_zero), definition(with_zero, inputs, 1))
    for matrices in (drawn(8, 3, 6)[0], [5 * taus[0], *taus[1:]]):
        found = merge(ESM(polarised=False), matrices, torch.float32)
        assert np.linalg.norm(found) < sum(np.linalg.norm(one) for one in matrices)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ESM({}), r"ESM\.statistics: expected a mapping from tasks to files, got \{\}"),
        (lambda: ESM(polarised=1), r"ESM\.polarised: expected true or false, got 1"),
        (lambda: ESM(weighting=-1), r"ESM\.weighting: expected a finite number at least 0, got -1"),
        (lambda: ESM(rank_fraction=0), r"ESM\.rank_fraction: expected a fraction above 0 and at most 1, got 0"),
        (lambda: ESM(exclude="("), r"ESM\.exclude: expected a regular expression, got '\('"),
    ],
)
def test_wrong_fields(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_statistics_of_another_network_or_of_some_tasks_are_refused(tmp_path):
    taus, inputs = drawn(2, 6, 4)
    files = written(tmp_path, inputs)
    with pytest.raises(
        ConfigurationError, match=r"ESM\.statistics: expected one file for each of the tasks 0, 1, got n"
    ):
        merge(ESM({"0": files["0"]}), taus)
    with pytest.raises(
        StructureMismatchError, match="expected Gram matrices, those of the vectors' parameters, got oth"
    ):
        merge(ESM(files), taus, name="v")
    with pytest.raises(StructureMismatchError, match=r"expected the shape \(5, 5\) for w, got \(4, 4\)"):
        merge(ESM(files), [np.ones((6, 5))] * 2)
