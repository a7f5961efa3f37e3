"""Slerp, Karcher mean and Model Stock against their definitions, restated with NumPy in float64."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.transforms import KarcherMean, ModelStock, Slerp, geometry
from lit_merge.vectors import TaskVector, TaskVectors

NAME = "block.0.weight"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def arrays(count: int, shape: tuple[int, ...] = (4, 3), seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng([seed, count])
    return [generator.standard_normal(shape) for _ in range(count)]


def merge(transform, taus, base=None, dtype=torch.float64, base_dtype=None) -> np.ndarray:
    vectors = [TaskVector({NAME: torch.tensor(tau, dtype=dtype)}, str(i)) for i, tau in enumerate(taus)]
    parameters = None if base is None else {NAME: torch.tensor(base, dtype=base_dtype or dtype)}
    merged = transform(TaskVectors(vectors, base=parameters))[NAME]
    assert merged.dtype == dtype
    return merged[0].double().numpy()


def close(got, expected, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


def slerp_definition(fraction: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = math.acos((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
    return (math.sin((1 - fraction) * angle) * x + math.sin(fraction * angle) * y) / math.sin(angle)


def karcher_definition(points, steps: int = 1000) -> np.ndarray:
    norms = [math.sqrt((point * point).sum()) for point in points]
    units = [point / norm for point, norm in zip(points, norms, strict=True)]
    mean = sum(units) / len(units)
    mean = mean / math.sqrt((mean * mean).sum())
    for _ in range(steps):
        step = np.zeros_like(mean)
        for unit in units:
            angle = math.acos(max(-1.0, min(1.0, (mean * unit).sum())))
            if angle > 1e-9:
                step += angle / math.sin(angle) * (unit - math.cos(angle) * mean) / len(units)
        size = math.sqrt((step * step).sum())
        if size < 1e-14:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
    return mean * sum(norms) / len(norms)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(geometry, "_LENGTH", 5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 1.0, 1.5])
def test_slerp(fraction, dtype):
    base, first, second = arrays(3)
    x, y = base + first, base + second
    merged = merge(Slerp(fraction), [first, second], base, dtype)
    close(merged, slerp_definition(fraction, x, y) - base, TOLERANCE[dtype])
    merged = merge(Slerp(fraction, "task_vectors"), [first, second], dtype=dtype)
    close(merged, slerp_definition(fraction, first, second), TOLERANCE[dtype])


@pytest.mark.parametrize("space", ["weights", "task_vectors"])
def test_slerp_has_its_ends_to_the_last_bit_and_a_constant_speed(space):
    base, first, second = arrays(3)
    assert (merge(Slerp(0.0, space), [first, second], base) == first).all()
    assert (merge(Slerp(1.0, space), [first, second], base) == second).all()
    close(merge(Slerp(0.3, space), [first, second], base), merge(Slerp(0.7, space), [second, first], base))
    quarter, half = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for fraction in (0.2, 0.9):
        angle = fraction * math.pi / 2
        close(merge(Slerp(fraction, "task_vectors"), [quarter, half]), np.array([math.cos(angle), math.sin(angle)]))


@pytest.mark.parametrize(("cosine", "linear"), [(0.9996, True), (0.9994, False), (-0.9996, True), (-0.9994, False)])
def test_slerp_is_linear_near_parallel_and_opposite_directions(cosine, linear):
    first, second = np.array([2.0, 0.0]), np.array([cosine, math.sqrt(1 - cosine**2)])
    expected = 0.7 * first + 0.3 * second if linear else slerp_definition(0.3, first, second)
    close(merge(Slerp(0.3, "task_vectors"), [first, second]), expected)
    other = slerp_definition(0.3, first, second) if linear else 0.7 * first + 0.3 * second
    threshold = 0.99999 if linear else 0.9
    close(merge(Slerp(0.3, "task_vectors", threshold), [first, second]), other, 1e-10)


def test_slerp_of_nothing():
    some = arrays(1)[0]
    for pair in ([some, 0 * some], [0 * some, some], [0 * some, 0 * some]):
        close(merge(Slerp(0.25, "task_vectors"), pair), 0.75 * pair[0] + 0.25 * pair[1])
        close(merge(Slerp(0.25), pair, 0 * some), 0.75 * pair[0] + 0.25 * pair[1])
    assert merge(Slerp(0.25), [np.zeros((0, 3))] * 2, np.zeros((0, 3))).shape == (0, 3)
    close(merge(Slerp(0.25), [np.array(2.0), np.array(-3.0)], np.array(1.0)), np.array(0.75))  # 3 and −2: opposite


@pytest.mark.parametrize("transform", [Slerp(0.3, threshold=0.999999999), KarcherMean()], ids=repr)
def test_small_changes_of_large_weights_keep_their_precision(transform):
    base, first, second = (array.astype(np.float32) for array in arrays(3, (50, 40)))
    base, first, second = 1024 * base, first / 64, second / 64  # the arc is 1e-5 long, and float32 has 24 bits
    x, y = base.astype(float) + first, base.astype(float) + second
    if isinstance(transform, Slerp):
        expected = 0.7 * first.astype(float) + 0.3 * second
    else:
        middle = (x + y) / 2
        norms = [math.sqrt((z * z).sum()) for z in (x, y, middle)]
        expected = middle * (norms[0] + norms[1]) / 2 / norms[2] - base
    close(merge(transform, [first, second], base, torch.float32), expected, 1e-4)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_base_may_have_another_dtype(base_dtype):
    base, first, second = arrays(3)
    base = torch.tensor(base).to(base_dtype).double().numpy()
    merged = merge(Slerp(0.4), [first, second], base, torch.float32, base_dtype)
    close(merged, slerp_definition(0.4, base + first, base + second) - base, 1e-6)
    merged = merge(KarcherMean(), [first, second], base, torch.float32, base_dtype)
    close(merged, karcher_definition([base + first, base + second]) - base, 1e-6)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_karcher_mean(count, dtype):
    base, *taus = arrays(count + 1)
    merged = merge(KarcherMean(tolerance=1e-14), taus, base, dtype)
    close(merged, karcher_definition([base + tau for tau in taus]) - base, 10 * TOLERANCE[dtype])
    leaning = [tau + 1.0 for tau in taus]  # within one half of the sphere, where the mean is unique
    merged = merge(KarcherMean("task_vectors", tolerance=1e-14), leaning, dtype=dtype)
    close(merged, karcher_definition(leaning), 10 * TOLERANCE[dtype])


def test_karcher_mean_on_a_circle_is_the_mean_angle():
    angles, norms = (0.0, 0.3, 1.2), (1.0, 2.0, 6.0)
    points = [norm * np.array([math.cos(a), math.sin(a)]) for a, norm in zip(angles, norms, strict=True)]
    close(merge(KarcherMean("task_vectors"), points), 3.0 * np.array([math.cos(0.5), math.sin(0.5)]), 1e-9)


def test_karcher_mean_of_the_axes_is_the_diagonal_and_of_two_the_middle_of_the_arc():
    axes = [np.eye(4)[i] * (i + 1) for i in range(4)]
    close(merge(KarcherMean("task_vectors"), axes), np.full(4, 0.5 * 2.5))
    x, y = arrays(2)
    middle = slerp_definition(0.5, x / np.linalg.norm(x), y / np.linalg.norm(y))
    expected = middle * (np.linalg.norm(x) + np.linalg.norm(y)) / 2
    close(merge(KarcherMean("task_vectors"), [x, y]), expected)
    y = y / np.linalg.norm(y) * np.linalg.norm(x)
    close(merge(KarcherMean("task_vectors"), [x, y]), merge(Slerp(0.5, "task_vectors"), [x, y]))


def test_karcher_mean_of_equal_directions_has_the_mean_norm():
    some = arrays(1)[0]
    close(merge(KarcherMean("task_vectors"), [some, 2 * some, 6 * some]), 3 * some)
    assert (merge(KarcherMean(), [some], arrays(2)[1]) == some).all()


def test_karcher_mean_stops_after_so_many_steps_or_when_they_are_short():
    points = [point + 0.5 for point in arrays(3)]
    chordal = sum(point / np.linalg.norm(point) for point in points)
    chordal *= sum(np.linalg.norm(point) for point in points) / 3 / np.linalg.norm(chordal)
    close(merge(KarcherMean("task_vectors", tolerance=10.0), points), chordal)
    close(merge(KarcherMean("task_vectors", iterations=1), points), karcher_definition(points, steps=1))
    assert np.abs(karcher_definition(points, 1) - karcher_definition(points)).max() > 1e-6
    assert np.abs(karcher_definition(points, 1) - chordal).max() > 1e-6


def test_karcher_mean_of_tensors_without_a_mean_direction():
    some, zero = arrays(1)[0], np.zeros((4, 3))
    mean = KarcherMean("task_vectors")
    close(merge(mean, [some, zero]), some / 2)  # no direction, but a norm of 0
    assert not merge(mean, [zero, zero]).any()
    close(merge(mean, [some, -3 * some]), -some)  # opposite: the plain mean
    close(merge(mean, [np.array(1.0), np.array(2.0), np.array(-3.0)]), np.array(2.0))
    assert merge(mean, [np.zeros((0, 2))] * 3).shape == (0, 2)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(count, dtype):
    taus = [tau + 1.0 for tau in arrays(count)]
    cosines = [
        (taus[i] * taus[j]).sum() / math.sqrt((taus[i] ** 2).sum() * (taus[j] ** 2).sum())
        for i in range(count)
        for j in range(i)
    ]
    cosine = sum(cosines) / len(cosines)
    assert cosine > 0.1
    ratio = count * cosine / (1 + (count - 1) * cosine)
    expected = ratio * sum(taus) / count
    close(merge(ModelStock(), taus, dtype=dtype), expected, TOLERANCE[dtype])
    close(merge(ModelStock(clamp=False), taus, dtype=dtype), expected, TOLERANCE[dtype])


def test_model_stock_at_known_angles():
    some = arrays(1)[0]
    close(merge(ModelStock(), [some, some, some]), some)
    sixty = [np.array([1.0, 0.0]), np.array([0.5, math.sqrt(0.75)])]  # t = 2 · 0.5 / 1.5
    close(merge(ModelStock(), sixty), (sixty[0] + sixty[1]) / 3)
    assert not merge(ModelStock(), list(np.eye(3))).any()
    assert not merge(ModelStock(), [some, 0 * some]).any()
    assert not merge(ModelStock(), [0 * some, 0 * some, 0 * some]).any()
    three = [some, some, 0 * some]  # the cosines 1, 0, 0: t = 1 / (1 + 2/3), of two thirds
    close(merge(ModelStock(), three), 0.6 * 2 / 3 * some)


def test_model_stock_of_opposing_vectors():
    wide = [np.array([1.0, 0.0]), np.array([-0.5, math.sqrt(0.75)])]  # cos θ = −1/2: t = −1 / (1/2)
    assert not merge(ModelStock(), wide).any()
    close(merge(ModelStock(clamp=False), wide), -(wide[0] + wide[1]))
    assert not merge(ModelStock(clamp=False), [wide[0], -2 * wide[0]]).any()  # 1 + cos θ = 0


@pytest.mark.parametrize("transform", [KarcherMean("task_vectors"), ModelStock(), Slerp(0.3, "task_vectors")], ids=repr)
def test_order_and_scale(transform):
    taus = [tau + 0.5 for tau in arrays(2 if isinstance(transform, Slerp) else 4)]
    merged = merge(transform, taus)
    close(merge(transform, [1e-30 * tau for tau in taus]), 1e-30 * merged)
    close(merge(transform, [-3 * tau for tau in taus]), -3 * merged)
    if not isinstance(transform, Slerp):
        close(merge(transform, [taus[i] for i in (2, 0, 3, 1)]), merged)


@pytest.mark.parametrize("transform", [Slerp(), KarcherMean()], ids=repr)
def test_the_space_of_weights_needs_the_base_in_the_same_shapes(transform):
    taus = arrays(2)
    with pytest.raises(ConfigurationError, match=r"base: expected the pre-trained parameters, got none"):
        merge(transform, taus)
    with pytest.raises(
        StructureMismatchError, match=r"base: expected every parameter of the .* got 1 of another shape"
    ):
        merge(transform, taus, np.zeros(12))


@pytest.mark.parametrize("transform", [Slerp(0.3), KarcherMean()], ids=repr)
def test_the_base_is_read_and_nothing_else(transform):
    first, second, base = (torch.tensor(array) for array in arrays(3))
    vectors = TaskVectors([TaskVector({NAME: first}, "a"), TaskVector({NAME: second}, "b")], base={NAME: base})
    result = transform(vectors)
    merged = result[NAME].clone()
    result[NAME].zero_()
    assert torch.equal(torch.stack([first, second, base]), torch.tensor(np.stack(arrays(3))))
    assert torch.equal(pickle.loads(pickle.dumps(result))[NAME], merged)
    assert result.tasks == ("a+b",)
    assert result.provenance[-1] == repr(transform)


def test_the_number_of_vectors():
    with pytest.raises(ConfigurationError, match=r"Slerp: expected two vectors, got 3 \(0, 1, 2\)\. Select two"):
        merge(Slerp(), arrays(3), arrays(1)[0])
    with pytest.raises(ConfigurationError, match=r"Slerp: expected two vectors, got 1 \(0\)"):
        merge(Slerp(), arrays(1), arrays(1)[0])
    with pytest.raises(ConfigurationError, match=r"ModelStock: expected at least two vectors, got 1, which has no ang"):
        merge(ModelStock(), arrays(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Slerp(math.nan), r"Slerp\.fraction: expected a finite number, got nan"),
        (lambda: Slerp(space="tasks"), r"Slerp\.space: expected weights or task_vectors, got 'tasks'"),
        (lambda: Slerp(threshold=1.0), r"Slerp\.threshold: expected a finite number at least 0 and below 1, got 1\.0"),
        (lambda: KarcherMean("x"), r"KarcherMean\.space: expected weights or task_vectors, got 'x'"),
        (lambda: KarcherMean(iterations=0), r"KarcherMean\.iterations: expected a whole number of at least 1, got 0"),
        (lambda: KarcherMean(tolerance=-1), r"KarcherMean\.tolerance: expected a finite number at least 0, got -1"),
        (lambda: ModelStock(clamp=1), r"ModelStock\.clamp: expected true or false, got 1"),
    ],
)
def test_wrong_fields(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
