"""WUDI against its definition: the loss written plainly, differentiated by autograd, and torch's Adam."""

from __future__ import annotations

import pytest
import torch
from builders.live_memory import LiveTensorBytes
from torch import Tensor

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import WUDI, IsoC, IsoCTS, Scale, TSVMerge, chain


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


def merge(transform: WUDI, stack: Tensor, name: str = "mlp.c_fc.weight") -> Tensor:
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


@pytest.mark.parametrize("transform", [TSVMerge(), IsoC(), IsoCTS(0.5), WUDI(), WUDI(exclude="w")], ids=repr)
def test_a_plan_can_ask_what_a_matrix_takes(transform) -> None:
    names = {"w": (8, 6), "b": (6,), "c": (2, 3, 3, 3)}
    vectors = TaskVectors([TaskVector({n: torch.ones(shape) for n, shape in names.items()}, t) for t in "ab"])
    for view in (transform(vectors), chain(transform, Scale(0.3))(vectors), transform(vectors).restrict(["w"])):
        work = view.work("w")
        assert (work.memory > 8 * 6 * 4) == (work.operations > 8 * 6 * 6) == (transform != WUDI(exclude="w"))
    assert all(transform(vectors).work(name).memory == 0 for name in "bc")
    assert vectors.work("w").operations == 0


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: WUDI(steps=-1), r"WUDI\.steps: expected a whole number of at least 0, got -1"),
        (lambda: WUDI(steps=1.5), r"WUDI\.steps: expected a whole number of at least 0, got 1\.5"),
        (lambda: WUDI(learning_rate=-1.0), r"WUDI\.learning_rate: expected .*got -1\.0"),
        (lambda: WUDI(exclude="("), r"WUDI\.exclude: expected a regular expression, got '\('"),
    ],
)
def test_what_is_refused(build, line: str) -> None:
    with pytest.raises(ConfigurationError, match=line):
        build()
