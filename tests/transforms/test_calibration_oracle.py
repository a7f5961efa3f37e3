"""Singular value calibration and polarised scaling against their definitions, restated with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    CART,
    Calibrate,
    IsoCTS,
    KnOTS,
    Override,
    Polarise,
    Scale,
    SpectralWUDI,
    Sum,
    Transform,
    TSVDirections,
    TSVMerge,
    WithOverrides,
    chain,
    core_space,
    iso_c,
    iso_cts,
    svc,
    ties,
    tsv_m,
    wudi,
)
from lit_merge.vectors import TaskVector, TaskVectors

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def random_matrices(tasks: int, rows: int, columns: int) -> list[np.ndarray]:
    generator = np.random.default_rng([tasks, rows, columns])
    common = generator.standard_normal((rows, columns))
    return [generator.standard_normal((rows, columns)) + 0.5 * common for _ in range(tasks)]


def merge(transform: Transform, matrices, dtype: torch.dtype = torch.float64, name: str = "w") -> np.ndarray:
    vectors = [TaskVector({name: torch.tensor(matrix, dtype=dtype)}, str(i)) for i, matrix in enumerate(matrices)]
    merged = transform(TaskVectors(vectors))[name]
    assert merged.dtype == dtype
    return merged[0].double().numpy()


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


def calibrated(merged: np.ndarray, matrices: list[np.ndarray], alpha: float) -> np.ndarray:
    """Algorithm 1: every singular value times T / Σ_t max(α, ⟨a, a_t⟩ / ‖a_t‖²)."""
    u, s, v = np.linalg.svd(merged, full_matrices=False)
    total = np.zeros_like(merged)
    for r in range(len(s)):
        mine = u[:, r] @ merged
        projections = [mine @ (u[:, r] @ one) / np.sum((u[:, r] @ one) ** 2) for one in matrices]
        gamma = len(matrices) / sum(max(alpha, one) for one in projections)
        total += gamma * s[r] * np.outer(u[:, r], v[r])
    return total


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(1, 5, 4), (2, 4, 7), (3, 7, 4), (4, 6, 6), (3, 1, 5), (3, 5, 1)])
def test_calibrate(shape, alpha, dtype):
    matrices = random_matrices(*shape)
    expected = calibrated(0.3 * sum(matrices), matrices, alpha)
    close(merge(chain(Sum(), Scale(0.3), Calibrate(alpha)), matrices, dtype), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("before", [TSVMerge(), CART(0.5, 1.5), SpectralWUDI(), ties(0.5, 0.3)], ids=repr)
def test_calibrate_follows_any_merge_and_looks_at_the_vectors_before_it(before):
    matrices = random_matrices(3, 8, 6)
    close(merge(chain(before, Calibrate(0.2)), matrices), calibrated(merge(before, matrices), matrices, 0.2), 1e-10)
    later = chain(Scale((1.0, 2.0, 3.0)), Sum(), Calibrate(0.2))
    weighted = matrices[0] + 2 * matrices[1] + 3 * matrices[2]
    close(merge(later, matrices), calibrated(weighted, matrices, 0.2))


def test_calibrate_undoes_a_direction_that_was_counted_several_times():
    matrix = random_matrices(1, 6, 5)[0]
    close(merge(chain(Sum(), Calibrate()), [matrix] * 4), matrix)
    close(merge(chain(Sum(), Scale(0.5), Calibrate(1.0)), [matrix]), 0.5 * matrix)


def test_a_task_with_nothing_along_a_direction_counts_as_alpha():
    first, second = np.zeros((4, 3)), np.zeros((4, 3))
    first[0, 0], second[1, 1] = 3.0, 2.0
    close(merge(chain(Sum(), Calibrate(0.1)), [first, second]), (first + second) * 2 / 1.1)
    noise = 1e-9 * np.ones((4, 3))  # as large as the rounding of float32
    close(merge(chain(Sum(), Calibrate(0.1)), [first, second + noise], torch.float32), (first + second) * 2 / 1.1, 1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_no_direction_grows_by_more_than_the_inverse_of_alpha(alpha):
    generator = np.random.default_rng(0)
    low = [generator.standard_normal((12, 2)) @ generator.standard_normal((2, 10)) for _ in range(3)]
    rounded = [torch.tensor(one).bfloat16().double().numpy() for one in low]
    for matrices in (random_matrices(8, 4, 9), rounded, [5 * low[0], *low[1:]], [low[0], np.zeros((12, 10))]):
        before = np.linalg.svd(sum(matrices))[1]
        after = np.linalg.svd(merge(chain(Sum(), Calibrate(alpha)), matrices))[1]
        assert (after <= before[0] / alpha * (1 + 1e-9)).all()


def test_what_is_no_matrix_or_excluded_stays_and_zeros_stay_zero():
    matrices = random_matrices(2, 4, 3)
    close(merge(chain(Sum(), Calibrate(exclude="^w$")), matrices), sum(matrices))
    for shape in ((), (3,), (2, 3, 2)):
        tensors = [np.random.default_rng(i).standard_normal(shape) for i in range(2)]
        close(merge(chain(Sum(), Calibrate()), tensors), sum(tensors))
    assert not merge(chain(Sum(), Calibrate()), [np.zeros((3, 2))] * 2).any()


def test_the_recipe_takes_the_authors_alpha_for_each_merge():
    found = {
        build: svc(merge).steps[-1]
        for build, merge in (("ta", None), ("ties", ties()), ("iso_c", iso_c()), ("cts", iso_cts()), ("tsv", tsv_m()))
    }
    assert {name: one.alpha for name, one in found.items()} == {
        "ta": 0.1,
        "ties": 0.1,
        "iso_c": 0.1,
        "cts": 0.2,
        "tsv": 1,
    }
    assert svc(wudi()).steps[-1] == Calibrate(1.0)
    within = (KnOTS(tsv_m()), core_space(), WithOverrides(tsv_m(), []), chain(TSVDirections(), Sum()))
    assert [svc(merge).steps[-1] for merge in within] == [Calibrate(1.0)] * 4
    assert svc(WithOverrides(Sum(), [Override(IsoCTS(0.5), blocks=[0])])).steps[-1] == Calibrate(0.2)
    assert svc(IsoCTS(0.5), 0.7).steps == (IsoCTS(0.5), Calibrate(0.7))


def test_polarised_tasks_and_dimensions():
    matrices = random_matrices(3, 5, 4)
    norms = np.array([np.sqrt((one**2).sum()) for one in matrices])
    scaled = [one * (norm / norms.mean()) ** 2 for one, norm in zip(matrices, norms, strict=True)]
    close(merge(chain(Polarise("tasks"), Sum()), matrices), sum(scaled))
    columns = np.sqrt(sum((one**2).sum(0) for one in matrices))
    close(merge(chain(Polarise("dimensions", 3), Sum()), matrices), sum(matrices) * (columns / columns.mean()) ** 3)
    close(merge(chain(Polarise("tasks"), TSVMerge()), matrices), merge(TSVMerge(), scaled), 1e-11)


def test_polarised_layers_are_compared_with_the_same_matrix_of_other_blocks():
    shapes = {f"blocks.{i}.{kind}.weight": (3 + (kind == "mlp"), 4) for i in range(3) for kind in ("mlp", "attn")}
    shapes |= {"head.weight": (2, 4), "blocks.0.attn.bias": (3,), "layer1.0.weight": (2, 3), "layer2.0.weight": (2, 3)}
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    vector = TaskVector({name: torch.tensor(one) for name, one in tensors.items()}, "t")
    result = Polarise("layers")(TaskVectors([vector]))
    groups = [[f"blocks.{i}.{kind}.weight" for i in range(3)] for kind in ("mlp", "attn")]
    groups += [["layer1.0.weight", "layer2.0.weight"], ["head.weight"]]
    expected = {"blocks.0.attn.bias": tensors["blocks.0.attn.bias"]}
    for group in groups:
        norms = [np.linalg.norm(tensors[name]) for name in group]
        expected |= {
            name: tensors[name] * (norm / np.mean(norms)) ** 2 for name, norm in zip(group, norms, strict=True)
        }
    for name, one in expected.items():
        close(result[name][0].numpy(), one)
    assert result.reads == 2
    zero = TaskVectors([TaskVector({name: torch.zeros(shape) for name, shape in shapes.items()}, "t")])
    assert not any(Polarise("layers")(zero)[name].any() for name in zero)


def test_plans_know_what_calibration_takes():
    vectors = TaskVectors([TaskVector({"w": torch.ones(8, 6), "b": torch.ones(8)}, one) for one in "ab"])
    for view in (chain(Sum(), Calibrate())(vectors), chain(TSVMerge(), Scale(2.0), Calibrate())(vectors)):
        assert view.work("w").memory > 8 * 8 * 6
        assert view.work("w").operations > 8 * 6 * 6
        assert view.work("b").operations == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Calibrate(0), r"Calibrate\.alpha: expected a fraction above 0 and at most 1, got 0"),
        (lambda: Calibrate(1.1), r"Calibrate\.alpha: expected a finite number .*, got 1\.1"),
        (lambda: Calibrate(exclude="("), r"Calibrate\.exclude: expected a regular expression, got '\('"),
        (lambda: Polarise("rows"), r"Polarise\.level: expected tasks or dimensions or layers, got 'rows'"),
        (lambda: Polarise(power=-1), r"Polarise\.power: expected a finite number at least 0, got -1"),
        (
            lambda: merge(Calibrate(), random_matrices(2, 3, 3)),
            r"Calibrate: expected one merged vector, got 2\. Put it",
        ),
    ],
)
def test_what_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_a_decomposition_that_fails_names_the_parameter():
    huge = np.full((2, 2), np.nan)

    class Broken(Transform):
        def __call__(self, vectors):
            return vectors.map(lambda name, stack: torch.tensor(huge)[None], [vectors.merged_tasks])

    with pytest.raises(
        ConfigurationError, match=r"^Calibrate: expected a singular value decomposition of b\.1\.w, got n"
    ):
        merge(chain(Broken(), Calibrate()), random_matrices(2, 2, 2), name="b.1.w")
