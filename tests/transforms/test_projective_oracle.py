"""DOGE against its definition: the loss written plainly, differentiated by autograd, projected, torch's Adam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import DOGE, Scale, chain, doge


def plainly(stack: Tensor, steps: int, rate: float, strength: float, divisor: int) -> tuple[Tensor, Tensor]:
    """λ_t and Δ."""
    tasks, rank = len(stack), min(stack.shape[1:])
    scales = torch.stack([strength / one.square().sum().sqrt() for one in stack])
    leading = [torch.linalg.svd(one, full_matrices=False)[0][:, : rank // tasks] for one in stack]
    shared = torch.linalg.svd(torch.cat(leading, 1), full_matrices=False)[0][:, : rank // divisor]
    change = torch.zeros_like(stack[0]).requires_grad_()
    optimiser = torch.optim.Adam([change], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        merged = sum(scale * (one + change) for scale, one in zip(scales, stack, strict=True))
        loss = sum(((one * (one - merged)).sum(1) ** 2).sum() for one in stack)
        loss.backward()
        change.grad -= shared @ shared.T @ change.grad
        optimiser.step()
    return scales, change.detach()


def vectors_of(given: dict[str, Tensor]) -> TaskVectors:
    count = len(next(iter(given.values())))
    return TaskVectors([TaskVector({name: one[t] for name, one in given.items()}, f"task {t}") for t in range(count)])


def random(tasks: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(tasks, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tasks", "divisor"), [(1, 2), (2, 3), (3, 1)])
def test_it_is_the_definition(tasks: int, divisor: int) -> None:
    given = {"b": random(tasks, 7, 9), "a": random(tasks, 9, 6, seed=1), "bias": random(tasks, 5, seed=2)}
    result = DOGE(20, 1e-2, 0.5, 0.4, divisor)(vectors_of(given))
    together = torch.cat([given["a"].flatten(1), given["b"].flatten(1)], 1)
    threshold = together.abs().sort(dim=1).values[:, -int(0.4 * together.shape[1])]
    for name in ("a", "b"):
        scales, change = plainly(given[name], 20, 1e-2, 0.5, divisor)
        masks = given[name].abs() >= threshold.view(-1, 1, 1)
        expected = (scales.view(-1, 1, 1) * masks * (given[name] + change)).sum(0)
        torch.testing.assert_close(result[name][0], expected, rtol=1e-9, atol=1e-9)
    assert not result["bias"].any()  # what is no matrix stays at θ0
    assert doge(20, 0.5, 0.4, 0.7) == chain(DOGE(20, 1e-4, 0.5, 0.4), Scale(0.7))


def test_without_a_step_it_is_a_sum_of_vectors_of_one_norm() -> None:
    stack = random(2, 8, 8)
    still = DOGE(0, density=1.0, strength=0.5)(vectors_of({"a": stack}))["a"][0]
    norms = torch.linalg.matrix_norm(stack)
    torch.testing.assert_close(still, (0.5 * stack / norms.view(-1, 1, 1)).sum(0))


def test_zero_vectors_and_low_ranks_have_no_say() -> None:
    stack = random(3, 6, 5)
    stack[1] = 0
    result = DOGE(5)(vectors_of({"a": stack}))["a"]
    assert torch.isfinite(result).all()
    without = DOGE(0)(vectors_of({"a": stack[[0, 2]]}))["a"]
    torch.testing.assert_close(DOGE(0)(vectors_of({"a": stack}))["a"], without)
    zeros = vectors_of({"a": torch.zeros(2, 4, 4), "bias": torch.ones(2, 4)})
    assert not DOGE(5)(zeros)["a"].any()
    outer = torch.einsum("ti,tj->tij", random(2, 6), random(2, 5, seed=3))
    assert torch.isfinite(DOGE(5)(vectors_of({"a": outer}))["a"]).all()
    excluded = DOGE(1, exclude="^a$")(vectors_of({"a": stack}))
    assert not excluded["a"].any()
    assert excluded.statistics == ()


def test_its_plan() -> None:
    result = DOGE(100)(vectors_of({"a": random(2, 6, 5).float(), "c": random(2, 4).float()}))
    assert [repr(one) for one in result.statistics] == ["DOGE: threshold of the masks (at most 3 reads)"]
    assert result.work("a").operations > DOGE(1)(vectors_of({"a": random(2, 6, 5).float()})).work("a").operations
    assert result.work("c").operations == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DOGE(-1), r"DOGE.steps: expected a whole number of at least 0, got -1"),
        (lambda: DOGE(divisor=0), r"DOGE.divisor: expected a whole number of at least 1, got 0"),
        (lambda: DOGE(density=0), r"DOGE.density: expected a fraction above 0 and at most 1, got 0"),
        (lambda: DOGE(strength=-1), r"DOGE.strength: expected a finite number at least 0, got -1"),
        (lambda: DOGE(exclude="("), r"DOGE.exclude: expected a regular expression, got '\('"),
    ],
)
def test_refusals(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()
