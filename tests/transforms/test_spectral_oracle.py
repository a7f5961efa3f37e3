"""TSV-M, Iso-C, Iso-CTS, CART and DC-Merge against their definitions, restated with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import CART, DCMerge, IsoC, IsoCTS, TSVMerge
from lit_merge.transforms.matrices import decomposition, left_vectors, polar, triplets
from lit_merge.vectors import TaskVector, TaskVectors

ALL = [TSVMerge(), IsoC(), IsoCTS(0.5)]
ALL_AND_MORE = [*ALL, CART(0.5, 1.5), DCMerge(0.1), DCMerge(0.1, "linear")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def random_matrices(tasks: int, shape: tuple[int, int], rank: int | None = None) -> list[np.ndarray]:
    generator = np.random.default_rng([tasks, *shape])
    if rank is None:
        return [generator.standard_normal(shape) for _ in range(tasks)]
    left, right = (generator.standard_normal((tasks, size, rank)) for size in shape)
    return [a @ b.T for a, b in zip(left, right, strict=True)]


def merge(transform, matrices, dtype: torch.dtype = torch.float64, name: str = "block.0.weight") -> np.ndarray:
    vectors = [TaskVector({name: torch.tensor(matrix, dtype=dtype)}, str(i)) for i, matrix in enumerate(matrices)]
    merged = transform(TaskVectors(vectors))[name]
    assert merged.dtype == dtype
    return merged[0].double().numpy()


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


def orthogonalised(columns: np.ndarray) -> np.ndarray:
    """P Qᵀ over the singular values that are not zero."""
    p, values, q = np.linalg.svd(columns, full_matrices=False)
    return sum(np.outer(p[:, i], q[i]) for i in range(len(values)) if values[i] > 1e-10 * values[0])


def first_triplets(matrix: np.ndarray, count: int) -> list[tuple[np.ndarray, float, np.ndarray]]:
    u, s, v = np.linalg.svd(matrix)
    return [(u[:, i], s[i], v[i]) for i in range(count)]


def combined(triplets, values) -> np.ndarray:
    left = orthogonalised(np.stack([u for u, _, _ in triplets], 1))
    right = orthogonalised(np.stack([v for _, _, v in triplets], 1))
    return sum(values[i] * np.outer(left[:, i], right[:, i]) for i in range(len(triplets)))


def tsv_definition(matrices, kept: int) -> np.ndarray:
    triplets = [one for matrix in matrices for one in first_triplets(matrix, kept)]
    return combined(triplets, [s for _, s, _ in triplets])


def iso_cts_definition(matrices, common: int, share: int) -> np.ndarray:
    space = first_triplets(sum(matrices), common)
    triplets = list(space)
    for matrix in matrices:
        rest = matrix - sum(np.outer(u, u) @ matrix for u, _, _ in space) if space else matrix
        triplets += first_triplets(rest, share)
    return combined(triplets, [sum(s for _, s, _ in triplets) / len(triplets)] * len(triplets))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tasks", "shape", "kept"),
    [
        *((1, (6, 5), 5), (2, (6, 5), 2), (2, (5, 6), 2), (3, (7, 7), 2), (4, (9, 13), 2)),
        *((3, (4, 1), 1), (3, (1, 4), 1), (8, (2, 2), 1), (3, (2, 6), 1)),  # more tasks than the rank: one each
    ],
)
def test_tsv_merge(tasks, shape, kept, dtype):
    matrices = random_matrices(tasks, shape)
    close(merge(TSVMerge(), matrices, dtype), tsv_definition(matrices, kept), TOLERANCE[dtype])


@pytest.mark.parametrize(("fraction", "kept"), [(0.01, 1), (0.29, 2), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_tsv_merge_with_another_share_of_the_rank(fraction, kept):
    matrices = random_matrices(3, (10, 12))
    close(merge(TSVMerge(fraction), matrices), tsv_definition(matrices, kept), 1e-11)


def test_tsv_merge_has_the_singular_values_that_the_tasks_kept():
    matrices = random_matrices(3, (8, 6))
    kept = sorted((s for matrix in matrices for s in np.linalg.svd(matrix)[1][:2]), reverse=True)
    close(np.linalg.svd(merge(TSVMerge(), matrices))[1], np.array(kept))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tsv_merge_of_orthogonal_subspaces_is_their_sum(dtype):
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((size, size)))[0] for size in (12, 9))
    values = ((5.0, 4.0), (3.0, 2.5), (2.0, 0.5))  # three tasks of rank 2, of 9 // 3 = 3 allowed
    matrices = [
        sum(s * np.outer(left[:, 2 * t + i], right[:, 2 * t + i]) for i, s in enumerate(pair))
        for t, pair in enumerate(values)
    ]
    close(merge(TSVMerge(), matrices, dtype), sum(matrices), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tsv_merge_of_low_rank_vectors_uses_their_own_directions_only(dtype):
    matrices = random_matrices(2, (12, 10), rank=2)  # up to 5 directions are allowed
    close(merge(TSVMerge(), matrices, dtype), tsv_definition(matrices, 2), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tsv_merge_of_equal_vectors_is_their_share_of_that_vector(dtype):
    matrix = random_matrices(1, (9, 8))[0]
    expected = sum(s * np.outer(u, v) for u, s, v in first_triplets(matrix, 8 // 3))
    close(merge(TSVMerge(), [matrix] * 3, dtype), expected, TOLERANCE[dtype])


def test_tsv_merge_of_one_vector_is_that_vector_and_of_numbers_their_mean():
    matrix = random_matrices(1, (7, 4))[0]
    close(merge(TSVMerge(), [matrix]), matrix)
    close(merge(TSVMerge(), [np.array([[x]]) for x in (1.0, -5.0, 2.5)]), np.array([[-0.5]]))


def test_a_zero_vector_takes_its_share_of_the_rank_and_adds_nothing():
    matrix = random_matrices(1, (8, 6))[0]
    close(merge(TSVMerge(), [matrix, np.zeros((8, 6))]), tsv_definition([matrix], 3))
    close(merge(IsoC(), [matrix, np.zeros((8, 6))]), merge(IsoC(), [matrix]))
    close(merge(IsoCTS(0.5), [matrix, np.zeros((8, 6))]), iso_cts_definition([matrix], 2, 2))


@pytest.mark.parametrize("transform", ALL_AND_MORE, ids=repr)
def test_zero_and_empty_matrices_stay_what_they_are(transform):
    assert not merge(transform, [np.zeros((4, 3))] * 3).any()
    assert merge(transform, [np.zeros((0, 3))] * 3).shape == (0, 3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tasks", "shape"), [(1, (5, 4)), (2, (4, 7)), (3, (6, 6)), (5, (1, 3))])
def test_iso_c(tasks, shape, dtype):
    matrices = random_matrices(tasks, shape)
    u, s, v = np.linalg.svd(sum(matrices), full_matrices=False)
    mean = sum(s) / len(s)
    merged = merge(IsoC(), matrices, dtype)
    close(merged, sum(mean * np.outer(u[:, i], v[i]) for i in range(len(s))), TOLERANCE[dtype])
    close(np.linalg.svd(merged)[1], np.full(len(s), mean), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_iso_c_of_low_rank_vectors_keeps_their_rank_and_the_nuclear_norm(dtype):
    matrices = random_matrices(2, (12, 10), rank=2)
    before = np.linalg.svd(sum(matrices))[1]
    after = np.linalg.svd(merge(IsoC(), matrices, dtype))[1]
    close(after, np.array([sum(before) / 4] * 4 + [0.0] * 6), TOLERANCE[dtype])
    difference = random_matrices(1, (5, 5))[0]
    assert not merge(IsoC(), [difference, -difference]).any()


ISO_CTS = [  # tasks, shape, fraction, common directions, directions of each task
    (2, (10, 12), 0.8, 8, 1),
    (2, (12, 10), 0.29, 2, 4),  # ⌊0.29 · 10⌋ = 2, 8 / 2
    (3, (10, 10), 0.5, 4, 2),  # ⌊5⌋, 5 / 3 rounds to 2, 4 are left
    (2, (11, 12), 0.8, 7, 2),  # ⌊8.8⌋ = 8, 3 / 2 rounds to 2, 7 are left
    (3, (5, 9), 0.0, 2, 1),  # 5 / 3 would round to 2 each, of which there are not enough
    (4, (2, 3), 0.0, 2, 0),
    (1, (6, 7), 0.5, 3, 3),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tasks", "shape", "fraction", "common", "share"), ISO_CTS)
def test_iso_cts(tasks, shape, fraction, common, share, dtype):
    matrices = random_matrices(tasks, shape)
    merged = merge(IsoCTS(fraction), matrices, dtype)
    close(merged, iso_cts_definition(matrices, common, share), TOLERANCE[dtype])
    values = np.linalg.svd(merged)[1]
    close(values, np.full(min(shape), values.mean()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_iso_cts_is_iso_c_where_the_sum_says_everything(dtype):
    matrices = random_matrices(3, (8, 9))
    close(merge(IsoCTS(1.0), matrices, dtype), merge(IsoC(), matrices, dtype), TOLERANCE[dtype])
    low = random_matrices(1, (12, 10), rank=2)  # nothing but rounding is left beside the common space
    close(merge(IsoCTS(0.5), low, dtype), merge(IsoC(), low, dtype), TOLERANCE[dtype])
    one = random_matrices(1, (8, 9))
    close(merge(IsoCTS(0.25), one), merge(IsoC(), one))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tasks", "shape", "fraction", "kept"),
    [(2, (6, 5), 0.4, 2), (3, (5, 8), 0.01, 1), (6, (3, 9), 0.67, 2), (3, (4, 1), 1.0, 1), (2, (7, 7), 1.0, 7)],
)
def test_cart(tasks, shape, fraction, kept, dtype):
    matrices = random_matrices(tasks, shape)
    mean = sum(matrices) / tasks
    departures = [one for matrix in matrices for one in first_triplets(matrix - mean, kept)]
    expected = mean + 1.7 * sum(s * np.outer(u, v) for u, s, v in departures)
    close(merge(CART(fraction, 1.7), matrices, dtype), expected, TOLERANCE[dtype])


def test_cart_is_the_mean_where_nothing_departs_or_nothing_is_cut():
    matrices = random_matrices(3, (6, 5))
    close(merge(CART(1.0, 5.0), matrices), sum(matrices) / 3)
    close(merge(CART(0.5, 5.0), [matrices[0]] * 3), matrices[0])
    close(merge(CART(0.5, 5.0), matrices[:1], torch.float32), matrices[0], 1e-6)
    close(merge(CART(0.5, 0.0), matrices), sum(matrices) / 3)


def dc_definition(matrices, kept: int, keep: float, spectrum=lambda values: values) -> np.ndarray:
    """In the cover space element by element; directions belong to tasks in turn."""
    parts = []
    for matrix in matrices:
        found = [one for one in first_triplets(matrix, kept) if one[1] > 1e-10]
        values = spectrum(np.array([s for _, s, _ in found]))
        parts.append([(u, s, v) for (u, _, v), s in zip(found, values, strict=True)])
    left = orthogonalised(np.stack([u for part in parts for u, _, _ in part], 1))
    right = orthogonalised(np.stack([v for part in parts for _, _, v in part], 1))
    owner = [task for task, part in enumerate(parts) for _ in part]
    small = [left.T @ sum(s * np.outer(u, v) for u, s, v in part) @ right for part in parts]
    number = max(int(keep * small[0].size), 1)
    small = [np.where(np.abs(m) >= np.sort(np.abs(m).ravel())[-number], m, 0) for m in small]
    merged = np.zeros_like(small[0])
    for i, j in np.ndindex(merged.shape):
        elements = [m[i, j] for m in small if m[i, j] * sum(n[i, j] for n in small) > 0]
        if elements and owner[i] == owner[j]:
            merged[i, j] = sum(elements) / len(elements)
    return left @ merged @ right.T


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tasks", "shape", "rank", "kept", "keep"),
    [(2, (8, 6), None, 3, 0.25), (3, (7, 10), None, 2, 0.5), (2, (9, 9), None, 4, 1e-3), (3, (12, 9), 2, 2, 1.0)],
)
def test_dc_merge(tasks, shape, rank, kept, keep, dtype):
    matrices = random_matrices(tasks, shape, rank)
    close(merge(DCMerge(keep), matrices, dtype), dc_definition(matrices, kept, keep), 10 * TOLERANCE[dtype])


def test_dc_merge_with_smoothed_singular_values():
    matrices = random_matrices(2, (10, 9))

    def linear(values):
        falling = np.linspace(min(1.5, values[0] / values[-1]), 1, len(values))
        return values.sum() * falling / falling.sum()

    mean = dc_definition(matrices, 4, 0.3, lambda values: np.full(len(values), values.mean()))
    close(merge(DCMerge(0.3, "mean"), matrices), mean, 1e-11)
    close(merge(DCMerge(0.3, "linear", 1.5), matrices), dc_definition(matrices, 4, 0.3, linear), 1e-11)
    close(merge(DCMerge(0.3, "linear", 1.0), matrices), mean, 1e-11)
    close(merge(DCMerge(0.3, rank_fraction=0.2), matrices), dc_definition(matrices, 1, 0.3), 1e-11)


@pytest.mark.parametrize("transform", [DCMerge(1.0), DCMerge(0.1, "mean"), TSVMerge(), CART(0.16)], ids=repr)
def test_more_tasks_than_the_rank_long_and_rounded_vectors_do_not_explode(transform):
    rounded = [torch.tensor(one).bfloat16().double().numpy() for one in random_matrices(3, (20, 30), 4)]
    for matrices in (random_matrices(8, (3, 9)), rounded, [5 * rounded[0], *rounded[1:]]):
        limit = sum(np.linalg.norm(one) for one in matrices)
        assert np.linalg.norm(merge(transform, matrices, torch.float32)) < limit


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_order_scale_and_rotation(transform):
    matrices = random_matrices(3, (9, 7))
    merged = merge(transform, matrices)
    rotation, other = (np.linalg.qr(random_matrices(1, (size, size))[0])[0] for size in (9, 7))
    close(merge(transform, [matrices[i] for i in (2, 0, 1)]), merged)
    close(merge(transform, [-1e-20 * matrix for matrix in matrices]), -1e-20 * merged)
    if not isinstance(transform, IsoCTS):  # which takes the rest beside the left vectors alone
        close(merge(transform, [matrix.T for matrix in matrices]).T, merged)
    close(merge(transform, [rotation @ matrix @ other for matrix in matrices]), rotation @ merged @ other)


@pytest.mark.parametrize("transform", ALL_AND_MORE, ids=repr)
def test_what_is_no_matrix_is_averaged(transform):
    generator = torch.Generator().manual_seed(0)
    for shape in ((), (5,), (4, 3, 2), (4, 3, 2, 2)):
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        vectors = TaskVectors([TaskVector({"conv1.weight": tensor}, str(i)) for i, tensor in enumerate(tensors)])
        torch.testing.assert_close(transform(vectors)["conv1.weight"][0], sum(tensors) / 3)


@pytest.mark.parametrize("kind", [TSVMerge, IsoC, IsoCTS, CART, DCMerge])
def test_what_is_excluded_by_name_is_averaged(kind):
    matrices = random_matrices(2, (4, 4))
    close(merge(kind(exclude=r"text_proj|embed\w+$"), matrices, name="positional_embedding"), sum(matrices) / 2)
    close(merge(kind(exclude=r"text_proj|embed\w+$"), matrices, name="embed.weight"), merge(kind(), matrices))


@pytest.mark.parametrize("transform", ALL_AND_MORE, ids=repr)
def test_a_decomposition_that_fails_names_the_parameter(transform, monkeypatch):
    def fail(*args, **keywords):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    who = type(transform).__name__
    with pytest.raises(ConfigurationError, match=rf"^{who}: expected a singular value decomposition of b\.1\.w, got n"):
        merge(transform, random_matrices(2, (3, 3)), name="b.1.w")


@pytest.mark.parametrize(
    ("transform", "more"), [(TSVMerge(), 2), (DCMerge(0.1), 2), (IsoCTS(0.5), 3), (CART(0.5, 1.5), 0)], ids=repr
)
def test_the_plan_counts_the_decompositions(transform, more, monkeypatch):
    tasks, size = 3, 12
    made = []
    compute = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *given, **settings: made.append(1) or compute(*given, **settings))
    vectors = TaskVectors(
        [TaskVector({"w": torch.tensor(one)}, str(i)) for i, one in enumerate(random_matrices(tasks, (size, size)))]
    )
    view = transform(vectors)
    view["w"]
    assert len(made) == tasks + more
    assert view.work("w").operations // decomposition(size, size, 8).operations == tasks + more


def test_a_sum_that_overflows_is_refused():
    huge = np.full((2, 2), 3e38)  # some libraries decompose it into NaN, others do not at all
    with pytest.raises(ConfigurationError, match=r"^IsoC: expected a singular value decomposition of block\.0\.weight"):
        merge(IsoC(), [huge, huge], torch.float32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TSVMerge(0), r"TSVMerge\.rank_fraction: expected a fraction above 0 and at most 1, got 0"),
        (lambda: TSVMerge(1.5), r"TSVMerge\.rank_fraction: expected a finite number .*, got 1\.5"),
        (
            lambda: IsoCTS(-0.1),
            r"IsoCTS\.common_fraction: expected a finite number at least 0 and at most 1, got -0",
        ),
        (lambda: CART(0), r"CART\.rank_fraction: expected a fraction above 0 and at most 1, got 0"),
        (lambda: CART(coefficient=float("nan")), r"CART\.coefficient: expected a finite number, got nan"),
        (lambda: CART(exclude="("), r"CART\.exclude: expected a regular expression"),
        (lambda: DCMerge(0), r"DCMerge\.keep: expected a fraction above 0 and at most 1, got 0"),
        (lambda: DCMerge(smoothing="sum"), r"DCMerge\.smoothing: expected mean or linear, got 'sum'"),
        (lambda: DCMerge(ratio=0.5), r"DCMerge\.ratio: expected a finite number at least 1, got 0\.5"),
        (lambda: DCMerge(rank_fraction=2), r"DCMerge\.rank_fraction: expected .*, got 2"),
        (lambda: DCMerge(exclude="("), r"DCMerge\.exclude: expected a regular expression"),
        (lambda: IsoC("("), r"IsoC\.exclude: expected a regular expression, got '\(' \(.*\)\."),
        (lambda: TSVMerge(exclude="["), r"TSVMerge\.exclude: expected a regular expression"),
        (lambda: IsoCTS(exclude=3), r"IsoCTS\.exclude: expected a regular expression, got 3"),
    ],
)
def test_wrong_fields(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


# Decompositions of float32, from squares in float64


def spectrum_of(shape: tuple[int, int], smallest: float) -> torch.Tensor:
    """A float64 matrix whose singular values fall evenly from 1 to the smallest, rounded to float32."""
    generator = torch.Generator().manual_seed(0)
    rank = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q for size in shape
    )
    values = torch.logspace(0, float(np.log10(smallest)), rank, dtype=torch.float64)
    return ((left * values) @ right.mT).float().double()


@pytest.mark.parametrize("shape", [(40, 40), (40, 120), (120, 40)])
@pytest.mark.parametrize("smallest", [0.1, 1e-3])
def test_triplets_of_float32_are_those_of_float64(shape: tuple[int, int], smallest: float) -> None:
    exact = spectrum_of(shape, smallest)
    left, values, right = triplets(exact.float(), min(shape))
    assert left.dtype == values.dtype == right.dtype == torch.float32
    wanted = torch.linalg.svdvals(exact)
    assert (values.double() / wanted - 1).abs().max() <= 1e-6
    identity = torch.eye(len(values), dtype=torch.float64)
    for side in (left.double().mT @ left.double(), right.double() @ right.double().mT):
        assert (side - identity).abs().max() <= 1e-6
    for count in (1, 10):
        cut = triplets(exact.float(), count)
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        best = (u[:, :count] * s[:count]) @ v[:count]
        assert ((cut[0] * cut[1]) @ cut[2] - best).abs().max() <= 1e-6 * best.abs().max()


@pytest.mark.parametrize("shape", [(40, 40), (40, 120), (120, 40)])
def test_the_polar_factor_of_float32_is_that_of_float64(shape: tuple[int, int]) -> None:
    exact = spectrum_of(shape, 1e-2)
    (got, values), (wanted, own) = polar(exact.float()), polar(exact)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() <= 1e-6
    assert (values / own - 1).abs().max() <= 1e-6


def test_what_float32_cannot_tell_from_zero_has_no_direction() -> None:
    exact = spectrum_of((30, 50), 1e-2)
    rows = exact[:20]
    doubled = torch.cat([rows, rows[:10]])  # rank 20
    assert [len(one.mT) for one in triplets(doubled.float(), 30)[:1]] == [20]
    assert len(triplets(torch.zeros(3, 5), 3)[1]) == 0


@pytest.mark.parametrize("shape", [(40, 40), (40, 120), (120, 40)])
def test_left_vectors_span_the_same_space_from_squares(shape: tuple[int, int]) -> None:
    exact = spectrum_of(shape, 1e-3)
    projections = [one @ one.mT @ exact for one in (left_vectors(exact, True), left_vectors(exact, False))]
    assert all((one - exact).abs().max() <= 1e-10 for one in projections)
    signs = (left_vectors(exact, True) * left_vectors(exact, False)).sum(0).abs()
    assert (signs - 1).abs().max() <= 1e-8


def test_a_float32_matrix_that_overflows_has_none() -> None:
    with pytest.raises((torch.linalg.LinAlgError, RuntimeError)):
        triplets(torch.full((3, 4), float("inf")), 3)
