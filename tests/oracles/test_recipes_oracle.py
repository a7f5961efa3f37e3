"""Every recipe against its definition, restated in float64."""

from __future__ import annotations

import pytest
import torch

from lit_merge.transforms import Mean, Scale, Sum, analogy, chain, negation, task_arithmetic, weight_average
from lit_merge.vectors import TaskVector, TaskVectors, merged_parameters

SHAPES = {"weight": (6, 5), "bias": (6,), "scale": ()}


def random_params(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def problem(request):
    """θ0, θ_1..θ_3, and the tolerance of the dtype in which they are held."""
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[request.param]
    return random_params(0, request.param), [random_params(seed, request.param) for seed in (1, 2, 3)], tolerance


def merge(base, finetuned, transform):
    vectors = TaskVectors([TaskVector.from_checkpoints(base, params, str(i)) for i, params in enumerate(finetuned)])
    return dict(merged_parameters(base, transform(vectors)))


def check(merged, base, definition, tolerance):
    assert list(merged) == list(base)
    for name in base:
        assert merged[name].dtype == base[name].dtype
        torch.testing.assert_close(merged[name].double(), definition(name), rtol=tolerance, atol=tolerance)


def test_task_arithmetic(problem):
    base, tuned, tolerance = problem
    for coefficient in (0.0, 0.3, 1.0):
        check(
            merge(base, tuned, task_arithmetic(coefficient)),
            base,
            lambda n, coefficient=coefficient: (
                base[n].double() + coefficient * sum(t[n].double() - base[n].double() for t in tuned)
            ),
            tolerance,
        )


def test_weight_average(problem):
    base, tuned, tolerance = problem
    check(merge(base, tuned, weight_average()), base, lambda n: sum(t[n].double() for t in tuned) / 3, tolerance)


def test_negation(problem):
    base, tuned, tolerance = problem
    check(
        merge(base, tuned[:1], negation(0.7)),
        base,
        lambda n: base[n].double() - 0.7 * (tuned[0][n].double() - base[n].double()),
        tolerance,
    )


def test_analogy(problem):
    base, (a, b, c), tolerance = problem
    check(
        merge(base, [a, b, c], analogy()),
        base,
        lambda n: c[n].double() + b[n].double() - a[n].double(),  # θ0 + τ_C + (τ_B − τ_A)
        tolerance,
    )
    check(
        merge(base, [a, b, c], analogy(0.4)),
        base,
        lambda n: base[n].double() + 0.4 * (c[n].double() - base[n].double() + b[n].double() - a[n].double()),
        tolerance,
    )


def test_per_task_coefficients(problem):
    base, tuned, tolerance = problem
    weights = {"0": 0.2, "2": -1.5, "1": 0.7}
    check(
        merge(base, tuned, chain(Scale(weights), Sum())),
        base,
        lambda n: (
            base[n].double() + sum(weights[str(i)] * (t[n].double() - base[n].double()) for i, t in enumerate(tuned))
        ),
        tolerance,
    )


def test_mean_is_task_arithmetic_at_one_over_t(problem):
    base, tuned, tolerance = problem
    first, second = merge(base, tuned, chain(Mean())), merge(base, tuned, task_arithmetic(1 / 3))
    for name in base:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


def test_one_task_at_coefficient_one_gives_the_fine_tuned_model(problem):
    base, tuned, tolerance = problem
    check(merge(base, tuned[:1], task_arithmetic(1.0)), base, lambda n: tuned[0][n].double(), tolerance)
