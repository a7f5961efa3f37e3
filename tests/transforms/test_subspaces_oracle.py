"""KnOTS and Core Space against their definitions, and what they must not change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    CoreSpace,
    DisjointMean,
    Drop,
    ElectSign,
    IsoC,
    KnOTS,
    LiNeS,
    Mean,
    Negate,
    Override,
    Scale,
    Slerp,
    Sum,
    Transform,
    Trim,
    TSVMerge,
    WithOverrides,
    chain,
    task_arithmetic,
    ties,
)

LINEAR = [Sum(), Mean(), chain(Scale((0.5, -1.0, 2.0)), Sum()), Negate(), task_arithmetic(0.3)]
TIES = chain(Trim(0.3), ElectSign(), DisjointMean())


def adapters(ranks: tuple[int, ...], rows: int = 12, columns: int = 10, seed: int = 0) -> Tensor:
    """Task vectors ``(T, m, n)`` of given ranks."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        for rank in ranks
    ]
    return torch.stack(parts)


def vectors_of(given: dict[str, Tensor]) -> TaskVectors:
    count = len(next(iter(given.values())))
    return TaskVectors([TaskVector({name: one[t] for name, one in given.items()}, f"task {t}") for t in range(count)])


def elected(stack: Tensor, density: float) -> Tensor:
    """TIES of stacks ``(T, n)``, written plainly."""
    kept = stack * (stack.abs() >= stack.abs().sort(dim=1).values[:, -int(density * stack.shape[1])].unsqueeze(1))
    sign = kept.sum(0).sign()
    agree = kept * (kept * sign > 0)
    return agree.sum(0) / (agree != 0).sum(0).clamp(min=1)


@pytest.mark.parametrize("space", [KnOTS, CoreSpace])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (7, 7, 7), (0, 2, 1), (10, 10, 10)], ids=str)
def test_linear_rules_lose_nothing(space: type[KnOTS] | type[CoreSpace], ranks: tuple[int, ...]) -> None:
    """Also of different ranks, and where their sum is above the smaller side."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        stack = adapters(ranks).to(dtype)
        given = vectors_of({"weight": stack, "bias": torch.ones(3, 4, dtype=dtype)})
        for rule in LINEAR:
            inside, outside = space(rule)(given), rule(given)
            assert inside.tasks == outside.tasks
            assert inside.merged_tasks == outside.merged_tasks
            scale = float(stack.abs().max())
            torch.testing.assert_close(inside["weight"], outside["weight"], rtol=0, atol=tolerance * scale)
            torch.testing.assert_close(inside["bias"], outside["bias"])


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (6, 6, 6)], ids=str)
def test_knots_elects_among_the_right_factors_of_all_matrices(ranks: tuple[int, ...]) -> None:
    given = {"b": adapters(ranks), "a": adapters(ranks, 9, 14, seed=1), "bias": adapters((1,) * 3, 1, 5)[:, 0]}
    result = KnOTS(TIES)(vectors_of(given))
    coordinates, lefts = {"bias": given["bias"]}, {}
    for name in ("a", "b"):
        left, values, right = torch.linalg.svd(torch.cat(list(given[name]), 1), full_matrices=False)
        kept = values > 1e-9 * values[0]
        lefts[name] = left[:, kept]
        scaled = values[kept].unsqueeze(1) * right[kept]
        coordinates[name] = torch.stack(scaled.split(given[name].shape[2], dim=1))
    names = sorted(coordinates)
    merged = elected(torch.cat([coordinates[name].flatten(1) for name in names], 1), 0.3)
    places = [0, *torch.tensor([coordinates[name][0].numel() for name in names]).cumsum(0).tolist()]
    for name, (start, stop) in zip(names, pairwise(places), strict=True):
        inside = merged[start:stop].view(coordinates[name].shape[1:])
        expected = lefts[name] @ inside if name in lefts else inside
        torch.testing.assert_close(result[name][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (7, 6, 5)], ids=str)
def test_core_space_merges_the_cores(ranks: tuple[int, ...]) -> None:
    stack = adapters(ranks)
    result = CoreSpace(TIES)(vectors_of({"a": stack}))["a"][0]
    factors = []
    for matrix, rank in zip(stack, ranks, strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = values[:rank].sqrt()
        factors.append((left[:, :rank] * root, root.unsqueeze(1) * right[:rank]))
    outputs = torch.linalg.svd(torch.cat([one for one, _ in factors], 1), full_matrices=False)[0]
    inputs = torch.linalg.svd(torch.cat([one for _, one in factors], 0), full_matrices=False)[2]
    cores = torch.stack([outputs.T @ b @ a @ inputs.T for b, a in factors])
    merged = elected(cores.flatten(1), 0.3).view(cores.shape[1:])
    torch.testing.assert_close(result, outputs @ merged @ inputs, rtol=1e-9, atol=1e-9)


def test_rules_of_singular_values_see_the_same_in_the_core() -> None:
    given = vectors_of({"a": adapters((2, 2, 2))})
    torch.testing.assert_close(CoreSpace(IsoC())(given)["a"], IsoC()(given)["a"])
    torch.testing.assert_close(CoreSpace(TSVMerge())(given)["a"], TSVMerge(0.2)(given)["a"])


@pytest.mark.parametrize("space", [KnOTS, CoreSpace])
def test_rounding_is_no_direction_and_the_result_has_low_rank(space: type[KnOTS] | type[CoreSpace]) -> None:
    """Of float32 vectors of rank 2, the coordinates are as few as those of the exact ones."""
    exact = adapters((2, 2, 2), 40, 30)
    seen = []

    class Watch(Transform):
        def __call__(self, vectors: TaskVectors) -> TaskVectors:
            seen.append(vectors.shape("a"))
            return ties(0.5)(vectors)

    for dtype in (torch.float32, torch.float64):
        result = space(Watch())(vectors_of({"a": exact.to(dtype)}))["a"][0]
        assert torch.linalg.matrix_rank(result) <= 6
    inside = [shape for shape in seen if shape[1] == 6]
    assert inside == [(3, 6, 30 if space is KnOTS else 6)] * 2


def test_zero_vectors_excluded_names_and_nested_spaces() -> None:
    given = {"a": adapters((2, 2, 2)), "b": torch.zeros(3, 4, 5, dtype=torch.float64), "empty": torch.zeros(3, 0, 2)}
    vectors = vectors_of(given)
    for space in (KnOTS, CoreSpace):
        result = space(TIES, exclude="^a$")(vectors)
        assert not result["b"].any()
        assert result["empty"].shape == (1, 0, 2)
        plain = TIES(vectors_of({"a": given["a"], "b": torch.zeros(3, 0, 5 if space is KnOTS else 0)}))
        torch.testing.assert_close(result["a"], plain["a"])
    nested = KnOTS(CoreSpace(Sum()))(vectors)["a"]
    torch.testing.assert_close(nested[0], given["a"].sum(0))


def test_they_come_after_and_before_other_parts() -> None:
    vectors = vectors_of({f"blocks.{index}.weight": adapters((2, 2), seed=index) for index in range(3)})
    chained = chain(Drop(0.3), KnOTS(TIES), LiNeS(0.5))(vectors)
    dropped = Drop(0.3)(vectors)
    step = KnOTS(TIES)(vectors_of({name: dropped[name] for name in dropped}))
    expected = LiNeS(0.5)(vectors_of({name: step[name] for name in step}))
    for name in vectors:
        torch.testing.assert_close(chained[name], expected[name])


def test_the_plan_knows_the_passes_and_the_decompositions() -> None:
    vectors = vectors_of({"a": adapters((2, 2, 2)).float(), "c": torch.ones(3, 5)})
    result = KnOTS(ties(0.2))(vectors)
    assert [repr(one) for one in result.statistics] == ["KnOTS: shared spaces (at most 6 reads)"]
    assert result.work("a").operations < CoreSpace()(vectors).work("a").operations
    assert result.work("c").operations == 0


@pytest.mark.parametrize("subspace", [KnOTS, CoreSpace])
def test_an_override_of_some_blocks_knows_the_depth_of_the_network(subspace: type[KnOTS | CoreSpace]) -> None:
    vectors = vectors_of({f"blocks.{block}.weight": adapters((2, 2), seed=block) for block in range(12)})
    scaled = chain(Sum(), LiNeS(0.0, 1.0))
    found = WithOverrides(Sum(), [Override(subspace(scaled), blocks=[0, 1])])(vectors)
    for block in (0, 1):
        name = f"blocks.{block}.weight"
        torch.testing.assert_close(found[name], block / 11 * Sum()(vectors)[name])


@pytest.mark.parametrize("subspace", [KnOTS, CoreSpace])
def test_a_merge_that_needs_the_base_is_refused_before_anything_is_computed(subspace: type[KnOTS | CoreSpace]) -> None:
    stacks = {"w": adapters((2, 2))}
    vectors = [TaskVector({"w": stacks["w"][task]}, f"task {task}") for task in range(2)]
    with pytest.raises(ConfigurationError, match=r"merge: expected a transform that needs no pre-trained parameters"):
        _ = subspace(Slerp())(TaskVectors(vectors, base={"w": stacks["w"][0]}))["w"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KnOTS(Sum), r"KnOTS.merge: expected a transform, got <class"),
        (lambda: CoreSpace(None), r"CoreSpace.merge: expected a transform, got None"),
        (lambda: CoreSpace(exclude="("), r"CoreSpace.exclude: expected a regular expression"),
    ],
)
def test_refusals(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_a_decomposition_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **settings: object) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(ConfigurationError, match="KnOTS: expected a singular value decomposition of a, got none"):
        KnOTS()(vectors_of({"a": adapters((2, 2))}))["a"]
