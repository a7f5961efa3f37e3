"""WUDI against its definition: the loss written plainly, differentiated by autograd, and torch's Adam."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import WUDI


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


@pytest.mark.parametrize(("tasks", "rows", "columns"), [(2, 5, 7), (3, 9, 4), (5, 6, 6), (4, 1, 8), (2, 8, 1)])
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
