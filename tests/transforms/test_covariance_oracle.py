"""ACE-Merging against the paper's equations, restated with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import ACE
from lit_merge.vectors import TaskVector, TaskVectors

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def drawn(sizes: tuple[float, ...], rows: int, columns: int) -> list[np.ndarray]:
    generator = np.random.default_rng([len(sizes), rows, columns])
    return [size * (generator.standard_normal((rows, columns)) + 0.3) for size in sizes]


def merge(transform: ACE, matrices, dtype: torch.dtype = torch.float64, name: str = "w") -> np.ndarray:
    vectors = [TaskVector({name: torch.tensor(matrix, dtype=dtype)}, str(i)) for i, matrix in enumerate(matrices)]
    return transform(TaskVectors(vectors))[name][0].double().numpy()


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-8) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


def definition(taus, ridge: float, threshold: float, fraction: float) -> np.ndarray:
    energies = np.array([(tau**2).sum() for tau in taus])
    logarithms = np.log(energies)
    differ = np.var(logarithms, ddof=1) / np.mean(logarithms) ** 2 > threshold  # 7
    centred = [tau - tau.mean(0) for tau in taus]
    raw = [one.T @ one for one in centred]
    scales = [np.trace(one) if differ else 1.0 for one in raw]
    estimates = [one / scale for one, scale in zip(raw, scales, strict=True)]  # 8 and 15
    identity = np.eye(len(raw[0]))
    regular = [one + ridge / scale * identity for one, scale in zip(estimates, scales, strict=True)]  # 9 and 10
    prior = np.outer(np.ones(len(identity)), np.ones(len(identity)) @ sum(estimates) / len(identity))  # 11
    if differ:
        prior = prior / energies.mean()  # 12 and 13
    first = sum(one @ cov for one, cov in zip(centred, regular, strict=True)) @ np.linalg.inv(
        sum(regular) + prior
    )  # 14
    if not differ:
        return first
    mean = sum(regular) / len(regular)
    u, s, v = np.linalg.svd(first + sum(tau @ (one - mean) for tau, one in zip(taus, estimates, strict=True)))
    kept = max(int(fraction * len(s)), 1)
    return first + s[:kept].mean() * u[:, :kept] @ v[:kept]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(8, 6), (6, 9), (7, 7), (2, 12)])
@pytest.mark.parametrize(
    ("sizes", "differ"), [((0.1, 0.12, 0.11), False), ((0.02, 3.0, 0.1), True), ((3.0, 0.01), True)]
)
def test_ace(shape, sizes, differ, dtype):
    taus = drawn(sizes, *shape)
    close(merge(ACE(), taus, dtype), definition(taus, 1e-2, 0.3, 0.3), TOLERANCE[dtype])
    threshold, other = (0.0, 1e9)[differ], definition(taus, 0.1, (0.0, 1e9)[differ], 0.5)
    close(merge(ACE(0.1, threshold, 0.5), taus, dtype), other, TOLERANCE[dtype])


def test_one_task_zero_vectors_single_rows_and_what_is_no_matrix():
    taus = drawn((0.2, 0.3), 6, 5)
    close(merge(ACE(1e-9), taus[:1]), merge(ACE(1e-9, 1e9), taus[:1]))
    close(merge(ACE(), [*taus, np.zeros((6, 5))]), merge(ACE(), taus))
    assert not merge(ACE(), [np.zeros((3, 4))] * 2).any()
    rows = drawn((0.2, 0.3), 1, 5)
    for given in (rows, [one[0] for one in rows], [one.reshape(1, 5, 1) for one in rows]):
        close(merge(ACE(), given), sum(given) / 2)
    close(merge(ACE(exclude="^w$"), taus), sum(taus) / 2)


def test_long_rounded_and_many_vectors_do_not_explode():
    generator = np.random.default_rng(0)
    low = [0.01 * generator.standard_normal((20, 4)) @ generator.standard_normal((4, 30)) for _ in range(3)]
    rounded = [torch.tensor(one).bfloat16().double().numpy() for one in low]
    for taus in (rounded, [5 * rounded[0], *rounded[1:]], drawn((0.1,) * 8, 3, 9), drawn((0.5, *(0.1,) * 7), 3, 9)):
        assert np.linalg.norm(merge(ACE(), taus)) < 2 * sum(np.linalg.norm(one) for one in taus)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ACE(0), r"ACE\.ridge: expected a fraction above 0 and at most 1, got 0"),
        (lambda: ACE(heterogeneity=-1), r"ACE\.heterogeneity: expected a finite number at least 0, got -1"),
        (lambda: ACE(rank_fraction=2), r"ACE\.rank_fraction: expected a finite number .*, got 2"),
        (lambda: ACE(exclude="("), r"ACE\.exclude: expected a regular expression, got '\('"),
    ],
)
def test_wrong_fields(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
