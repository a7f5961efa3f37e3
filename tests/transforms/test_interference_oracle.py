"""WUDI and its family against their definitions: losses by autograd and torch's Adam, filters in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders.live_memory import LiveTensorBytes
from torch import Tensor

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    ACE,
    CART,
    ESM,
    WUDI,
    Calibrate,
    DCMerge,
    IsoC,
    IsoCTS,
    OptMerge,
    OrthoMerge,
    Scale,
    SpectralWUDI,
    Transform,
    TSVMerge,
    actmerge,
    aswudi,
    chain,
    iwudi,
    swudi,
)
from lit_merge.transforms.interference import _filtered


def plainly(matrices: Tensor, steps: int, rate: float) -> Tensor:
    """Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² lowered from the sum."""
    merged = matrices.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = sum(((merged - one) @ one.T).square().sum() / one.square().sum() for one in matrices)
        loss.backward()
        optimiser.step()
    return merged.detach()


def merge(transform: Transform, stack: Tensor, name: str = "mlp.c_fc.weight") -> Tensor:
    vectors = [TaskVector({name: one}, f"task {index}") for index, one in enumerate(stack)]
    return transform(TaskVectors(vectors))[name][0]


def matrices(tasks: int, rows: int, columns: int) -> Tensor:
    return torch.randn(tasks, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks + rows))


@pytest.mark.parametrize(
    ("tasks", "rows", "columns"), [(2, 5, 7), (3, 9, 4), (5, 6, 6), (4, 1, 8), (2, 8, 1), (2, 3, 40)]
)
@pytest.mark.parametrize(("steps", "rate"), [(1, 1e-2), (30, 1e-3), (300, 1e-5)])
def test_it_is_the_definition(tasks: int, rows: int, columns: int, steps: int, rate: float) -> None:
    stack = matrices(tasks, rows, columns)
    torch.testing.assert_close(
        merge(WUDI(steps, rate), stack), plainly(stack, steps, rate), rtol=0, atol=1e-9 * max(1, steps * rate * 100)
    )


def test_many_long_steps_reach_the_weighted_least_squares() -> None:
    stack = matrices(3, 4, 5)
    squares = [one.T @ one / one.square().sum() for one in stack]
    best = sum(one @ square for one, square in zip(stack, squares, strict=True)) @ torch.linalg.pinv(sum(squares))
    torch.testing.assert_close(merge(WUDI(20_000, 1e-3), stack), best, rtol=0, atol=1e-3)


def test_one_task_no_step_and_tasks_that_do_not_meet_give_the_sum() -> None:
    one = matrices(1, 4, 6)
    assert torch.equal(merge(WUDI(), one), one[0])
    several = matrices(3, 4, 6)
    assert torch.equal(merge(WUDI(steps=0), several), several.sum(0))
    apart = torch.zeros(2, 4, 6, dtype=torch.float64)
    apart[0, :, :3], apart[1, :, 3:] = several[0, :, :3], several[1, :, 3:]
    torch.testing.assert_close(merge(WUDI(), apart), apart.sum(0), rtol=0, atol=1e-12)


def test_a_zero_vector_has_no_say_and_other_parameters_are_averaged() -> None:
    stack = matrices(3, 4, 6)
    with_zero = torch.cat([stack, torch.zeros(1, 4, 6, dtype=torch.float64)])
    torch.testing.assert_close(merge(WUDI(50, 1e-3), with_zero), merge(WUDI(50, 1e-3), stack), rtol=0, atol=1e-12)
    assert not merge(WUDI(), torch.zeros(2, 3, 3, dtype=torch.float64)).any()
    torch.testing.assert_close(merge(WUDI(), stack[:, 0]), stack[:, 0].mean(0))
    torch.testing.assert_close(merge(WUDI(exclude="c_fc"), stack), stack.mean(0))


@pytest.mark.parametrize("shape", [(2, 16, 9000), (2, 9000, 16), (3, 40, 160), (4, 64, 64)])
def test_memory_stays_near_a_few_times_the_matrices(shape: tuple[int, int, int]) -> None:
    """An ``n × n`` product of 9,000 columns would take 324 MB."""
    stack = matrices(*shape).float()
    view = WUDI(2)(TaskVectors([TaskVector({"w": one}, f"{index}") for index, one in enumerate(stack)]))
    with LiveTensorBytes() as live:
        view["w"]
    assert live.peak < 12 * stack.nbytes
    assert live.peak - stack.nbytes <= view.work("w").memory < 2 * live.peak


@pytest.mark.parametrize("scale", [2.0**-18, 2.0**-30, 2.0**-60])
@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 3, 40)])
def test_tiny_vectors_are_merged_as_those_that_are_as_long_as_a_step(shape: tuple[int, int, int], scale: float) -> None:
    """Steps of 1e-5 on elements of 1e-8 are noise: its norm was 31 times the sum's."""
    stack = matrices(*shape).float()
    largest = max(float(one.norm()) for one in stack) / stack[0].numel() ** 0.5
    stack *= 1.5e-5 / largest  # the least that no factor is needed for, as the next power of two is below 1e-5
    tiny = merge(WUDI(), stack * scale)
    assert torch.equal(tiny, merge(WUDI(), stack) * scale)
    one = torch.stack([stack[0], torch.zeros_like(stack[0])])
    assert torch.equal(merge(WUDI(), one * scale), stack[0] * scale)


def test_elements_of_ordinary_length_are_treated_as_by_plain_adam() -> None:
    stack = matrices(3, 8, 12).float() * 1e-4
    products = sum(one.T @ one / torch.linalg.vector_norm(one) ** 2 for one in stack)
    wanted = sum(one @ (one.T @ one / torch.linalg.vector_norm(one) ** 2) for one in stack)
    merged = stack.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(300):
        merged.grad = 2 * (merged.detach() @ products - wanted)
        optimiser.step()
    assert torch.equal(merge(WUDI(), stack), merged.detach())


def low_rank(matrix: Tensor, count: int) -> Tensor:
    """The best approximation of a rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return sum(values[i] * torch.outer(left[:, i], right[i]) for i in range(count))


@pytest.mark.parametrize(("tasks", "rows", "columns"), [(2, 5, 7), (3, 9, 4), (2, 3, 40), (6, 4, 5)])
@pytest.mark.parametrize(("steps", "rate", "fraction"), [(1, 1e-2, None), (30, 1e-3, None), (30, 1e-3, 0.5)])
def test_optmerge_is_its_definition(tasks, rows, columns, steps, rate, fraction) -> None:
    stack = matrices(tasks, rows, columns)
    rank = min(rows, columns)
    count = max(rank // tasks if fraction is None else math.floor(fraction * rank), 1)
    mean = stack.mean(0)
    targets = [mean + low_rank(one - mean, count) for one in stack]
    projectors = [low_rank(one, count) for one in stack]  # S_K V_Kᵀ up to a rotation, which no norm sees
    merged = stack.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        parts = zip(stack, targets, projectors, strict=True)
        sum(((merged - target) @ p.T).square().sum() / one.square().sum() for one, target, p in parts).backward()
        optimiser.step()
    found = merge(OptMerge(steps, rate, fraction), stack)
    torch.testing.assert_close(found, merged.detach(), rtol=0, atol=1e-9)


def filtered(stack: Tensor, time: float | None, kept: int, weights: np.ndarray) -> np.ndarray:
    """θ0 − θ0 V f Vᵀ + D V (f / λ) Vᵀ, an eigenvector at a time."""
    taus = [one.double().numpy() for one in stack]
    c = sum(w * one.T @ one for w, one in zip(weights, taus, strict=True))
    d = sum(w * one @ one.T @ one for w, one in zip(weights, taus, strict=True))
    start = sum(taus)
    values, vectors = np.linalg.eigh(c)
    merged = start.copy()
    for k in np.argsort(values)[::-1][:kept]:
        if values[k] <= 1e-8 * values.max():
            continue
        f = 1.0 if time is None else 1 - np.exp(-time * values[k])
        v = vectors[:, k]
        merged += f * np.outer(d @ v / values[k] - start @ v, v)
    return merged


SHAPES = [(2, 5, 7), (3, 9, 4), (5, 6, 6), (2, 3, 40), (4, 1, 8), (3, 8, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("time", "fraction"), [(300.0, 1.0), (13.0, 0.65), (None, 0.3), (None, 1.0)])
@pytest.mark.parametrize("normalise", [True, False])
def test_spectral_wudi_is_its_definition(shape, time, fraction, normalise) -> None:
    stack = matrices(*shape) * torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0])[: shape[0]].view(-1, 1, 1)
    squares = stack.square().sum((1, 2)).numpy()
    weights = 1 / squares if normalise else np.full(len(stack), 1 / squares.max())  # which t is in units of
    expected = filtered(stack, time, math.ceil(fraction * shape[2]), weights)
    found = merge(SpectralWUDI(time, fraction, normalise), stack)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-9)
    single = merge(SpectralWUDI(time, fraction, normalise), stack.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_aswudi_counts_directions_by_the_roots_of_their_eigenvalues(shape) -> None:
    stack = matrices(*shape) * torch.linspace(1, 4, shape[2]) ** 2
    weights = 1 / stack.square().sum((1, 2)).numpy()
    c = sum(w * one.T @ one for w, one in zip(weights, stack.numpy(), strict=True))
    roots = np.sqrt(np.linalg.eigvalsh(c).clip(0))
    kept = math.ceil(roots.sum() ** 2 / (roots**2).sum() - 1e-9)
    found = merge(aswudi(), stack)
    torch.testing.assert_close(found, torch.tensor(filtered(stack, None, kept, weights)), rtol=0, atol=1e-9)


def test_the_minimum_is_regression_on_the_vectors_themselves() -> None:
    stack = matrices(3, 4, 5)
    squares = [one.T @ one for one in stack]
    expected = sum(one @ square for one, square in zip(stack, squares, strict=True)) @ torch.linalg.pinv(sum(squares))
    torch.testing.assert_close(merge(actmerge(), stack), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(merge(SpectralWUDI(1e9), stack), merge(SpectralWUDI(None), stack), rtol=0, atol=1e-9)
    torch.testing.assert_close(merge(SpectralWUDI(1e-9), stack), stack.sum(0), rtol=0, atol=1e-6)
    assert merge(iwudi(), stack).equal(merge(SpectralWUDI(300.0), stack))
    assert merge(swudi(), stack).equal(merge(SpectralWUDI(1300.0, 0.65), stack))


@pytest.mark.parametrize("transform", [OptMerge(20, 1e-3), SpectralWUDI(), SpectralWUDI(None, 0.5), aswudi()], ids=repr)
def test_one_task_zero_vectors_and_what_is_no_matrix(transform: Transform) -> None:
    stack = matrices(3, 4, 6)
    nothing = torch.zeros(1, 4, 6, dtype=torch.float64)
    assert torch.equal(merge(transform, stack[:1]), stack[0])
    assert torch.equal(merge(transform, torch.cat([nothing, stack[:1], nothing])), stack[0])
    assert not merge(transform, torch.zeros(2, 3, 3, dtype=torch.float64)).any()
    torch.testing.assert_close(merge(transform, stack[:, 0]), stack[:, 0].mean(0))
    if isinstance(transform, SpectralWUDI):
        found = merge(transform, torch.cat([stack, nothing]))
        torch.testing.assert_close(found, merge(transform, stack), rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", [iwudi(), swudi(), aswudi(), SpectralWUDI(None)], ids=repr)
def test_the_spectral_family_does_not_see_the_unit_of_the_vectors_nor_follow_the_longest(transform: Transform) -> None:
    stack = matrices(4, 8, 12)
    for unit in (1e-30, 1e20):
        torch.testing.assert_close(merge(transform, stack * unit) / unit, merge(transform, stack), rtol=0, atol=1e-9)
    longer = stack * torch.tensor([5.0, 1, 1, 1]).view(-1, 1, 1)
    assert merge(transform, longer).norm() < longer.norm(dim=(1, 2)).sum()


@pytest.mark.parametrize(
    ("transform", "limit"),
    [(iwudi(), 1.0), (swudi(), 1.0), (aswudi(), 1.0), (actmerge(1e-5), 1.0), (OptMerge(), 1.0), (WUDI(), 1.0)],
    ids=lambda one: repr(one),
)
@pytest.mark.parametrize("shape", [(4, 40, 60), (8, 6, 60)])
def test_rounded_vectors_of_low_rank_and_more_tasks_than_rank_do_not_explode(transform, limit, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    tasks, rows, columns = shape
    left, right = torch.randn(tasks, rows, 4, generator=generator), torch.randn(tasks, 4, columns, generator=generator)
    stack = 1e-2 * (left @ right).bfloat16().float()
    stack[0] *= 5
    assert merge(transform, stack).norm() <= limit * stack.norm(dim=(1, 2)).sum()


@pytest.mark.parametrize("shape", [(2, 16, 4000), (2, 4000, 16), (3, 40, 100)])
def test_the_spectral_family_builds_no_more_than_the_smaller_products(shape: tuple[int, int, int]) -> None:
    stack = matrices(*shape).float()
    view = SpectralWUDI()(TaskVectors([TaskVector({"w": one}, f"{index}") for index, one in enumerate(stack)]))
    with LiveTensorBytes() as live:
        view["w"]
    assert live.peak < 20 * stack.nbytes
    assert live.peak - stack.nbytes <= view.work("w").memory < 3 * live.peak


@pytest.mark.parametrize(
    "transform",
    [
        *(TSVMerge(), IsoC(), IsoCTS(0.5), WUDI(), WUDI(exclude="w"), OptMerge(), SpectralWUDI(), CART(), DCMerge()),
        *(ESM(), ACE()),
    ],
    ids=repr,
)
def test_a_plan_can_ask_what_a_matrix_takes(transform) -> None:
    names = {"w": (8, 6), "b": (6,), "c": (2, 3, 3, 3)}
    vectors = TaskVectors([TaskVector({n: torch.ones(shape) for n, shape in names.items()}, t) for t in "ab"])
    for view in (transform(vectors), chain(transform, Scale(0.3))(vectors), transform(vectors).restrict(["w"])):
        work = view.work("w")
        assert (work.memory > 8 * 6 * 4) == (work.operations > 8 * 6 * 6) == (transform != WUDI(exclude="w"))
    assert all(transform(vectors).work(name).memory == 0 for name in "bc")
    assert vectors.work("w").operations == 0


@pytest.mark.parametrize("shape", [(4, 40, 120), (4, 120, 40)])
@pytest.mark.parametrize(
    "transform",
    [*(OptMerge(2), SpectralWUDI(), CART(), DCMerge(), ESM(), ACE(), OrthoMerge()), chain(CART(), Calibrate())],
    ids=lambda one: repr(one)[:20],
)
def test_a_plan_says_at_least_what_is_held(transform: Transform, shape: tuple[int, int, int]) -> None:
    stack = matrices(*shape).float()
    rows = [TaskVector({"w": one}, f"{index}") for index, one in enumerate(stack)]
    view = transform(TaskVectors(rows, base={"w": stack[0] + 1}))
    with LiveTensorBytes() as live:
        view["w"]
    assert live.peak - stack.nbytes <= view.work("w").memory < 6 * live.peak


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: WUDI(steps=-1), r"WUDI\.steps: expected a whole number of at least 0, got -1"),
        (lambda: WUDI(steps=1.5), r"WUDI\.steps: expected a whole number of at least 0, got 1\.5"),
        (lambda: WUDI(learning_rate=-1.0), r"WUDI\.learning_rate: expected .*got -1\.0"),
        (lambda: WUDI(exclude="("), r"WUDI\.exclude: expected a regular expression, got '\('"),
        (lambda: OptMerge(steps=-1), r"OptMerge\.steps: expected a whole number of at least 0, got -1"),
        (lambda: OptMerge(learning_rate=-1.0), r"OptMerge\.learning_rate: expected .*got -1\.0"),
        (lambda: OptMerge(rank_fraction=0), r"OptMerge\.rank_fraction: expected a fraction above 0 .*, got 0"),
        (lambda: OptMerge(exclude="("), r"OptMerge\.exclude: expected a regular expression, got '\('"),
        (lambda: SpectralWUDI(0), r"SpectralWUDI\.time: expected a number above 0 or null, got 0"),
        (lambda: SpectralWUDI(-1), r"SpectralWUDI\.time: expected a finite number at least 0, got -1"),
        (lambda: SpectralWUDI(rank="all"), r"SpectralWUDI\.rank: expected a fraction .* or participation, got 'all'"),
        (lambda: SpectralWUDI(rank=1.5), r"SpectralWUDI\.rank: expected .* at most 1, got 1\.5"),
        (lambda: SpectralWUDI(normalise=1), r"SpectralWUDI\.normalise: expected true or false, got 1"),
        (lambda: SpectralWUDI(floor=1), r"SpectralWUDI\.floor: expected .* below 1, got 1"),
        (lambda: SpectralWUDI(exclude="("), r"SpectralWUDI\.exclude: expected a regular expression, got '\('"),
    ],
)
def test_what_is_refused(build, line: str) -> None:
    with pytest.raises(ConfigurationError, match=line):
        build()


def test_spectral_wudi_has_one_task_at_a_time_in_float64():
    """Beyond the stack, memory does not grow with T."""
    beyond = []
    for tasks in (4, 16):
        stack = torch.randn(tasks, 96, 64, generator=torch.Generator().manual_seed(0))
        with LiveTensorBytes() as live:
            _filtered(None, "participation", True, 1e-8, stack)
        beyond.append(live.peak - stack.nbytes)
    assert beyond[1] <= beyond[0] + 96 * 64 * 8
