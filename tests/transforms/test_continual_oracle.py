"""Merging one vector after another: against the definition step by step, and laws of going on."""

from __future__ import annotations

import pytest
import torch

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError
from lit_merge.transforms import Mean, ProjectedSum, Rescale, RunningMean, chain, continual, recipe

TASKS = ("a", "b", "c", "d")
SHAPES = {"wide.weight": (4, 7), "tall.weight": (8, 5), "skipped": (5, 5), "bias": (6,), "conv": (2, 2, 2), "one": ()}


def rows(dtype=torch.float64):
    draw = torch.Generator().manual_seed(5)
    return [
        TaskVector({n: torch.randn(s, generator=draw, dtype=dtype) for n, s in SHAPES.items()}, task) for task in TASKS
    ]


def step_by_step(vectors, alpha, exclude=()):
    """As published: rescaled after every vector, with full bases."""
    merged, factor, norms = None, 1.0, []
    for vector in vectors:
        norms.append(sum(float(one.double().square().sum()) for one in vector.values()) ** 0.5)
        if merged is None:
            merged = {name: one.clone() for name, one in vector.items()}
            continue
        for name, new in vector.items():
            added = new
            if new.ndim == 2 and name not in exclude:
                u, s, v = torch.linalg.svd(merged[name], full_matrices=True)
                inside = u.T @ new @ v.T
                for place in range(len(s)):
                    inside[place, place] = 0
                taken = 0
                while s[: taken + 1].sum() / s.sum() <= alpha:
                    taken += 1
                inside[:taken, :taken] = 0
                added = u @ inside @ v
            merged[name] = factor * merged[name] + added
        length = sum(float(one.square().sum()) for one in merged.values()) ** 0.5
        wanted = sum(norms) / len(norms)
        merged = {name: one * wanted / length for name, one in merged.items()}
        factor = length / wanted
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_opcm_is_the_definition_and_the_order_counts(alpha):
    given = rows()
    found = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        expected = step_by_step([given[place] for place in order], alpha)
        merged = continual(alpha, [TASKS[place] for place in order])(TaskVectors(given)).single()
        for name in SHAPES:
            torch.testing.assert_close(merged[name], expected[name], rtol=1e-9, atol=1e-11)
        found.append(merged["tall.weight"])
    assert not torch.allclose(*found)


def test_what_is_excluded_is_summed_up():
    given = rows()
    merged = chain(ProjectedSum(0.5, exclude="skip"), Rescale())(TaskVectors(given)).single()
    expected = step_by_step(given, 0.5, ("skipped",))
    torch.testing.assert_close(merged["skipped"], expected["skipped"], rtol=1e-9, atol=1e-11)
    summed = ProjectedSum(0.5, exclude=".*")(TaskVectors(given)).single()
    torch.testing.assert_close(summed["wide.weight"], sum(row["wide.weight"] for row in given))


@pytest.mark.parametrize("transform", [ProjectedSum(), RunningMean()], ids=repr)
def test_going_on_from_what_was_merged_is_merging_all(transform, tmp_path):
    """Three vectors are merged and written; the fourth one comes later."""
    given = rows()
    transform(TaskVectors(given[:3])).single().save(tmp_path / "three.safetensors")
    later = transform(TaskVectors([TaskVector.load(tmp_path / "three.safetensors"), given[3]])).single()
    whole = transform(TaskVectors(given)).single()
    assert later.tasks == TASKS
    for name in SHAPES:
        torch.testing.assert_close(later[name], whole[name], rtol=1e-9, atol=1e-11)


def test_the_running_mean_is_the_mean_and_one_vector_itself():
    given = rows(torch.float32)
    mean, running = Mean()(TaskVectors(given)).single(), recipe("continual_average")(TaskVectors(given)).single()
    alone = continual()(TaskVectors(given[:1])).single()
    for name in SHAPES:
        torch.testing.assert_close(running[name], mean[name])
        torch.testing.assert_close(alone[name], given[0][name])


def test_vectors_without_a_name_count_once():
    one, three = torch.ones(3), torch.full((3,), 3.0)
    for tasks in (("", ""), ("a", "")):
        rows = [TaskVector({"w": value}, task) for value, task in zip((one, three), tasks, strict=True)]
        torch.testing.assert_close(RunningMean()(TaskVectors(rows)).single()["w"], 2 * one)


def test_a_vector_along_the_merge_is_left_out_and_beside_a_low_rank_one_kept():
    one = torch.outer(torch.tensor([1.0, 2, 0, 0]), torch.tensor([0.0, 1, 1])).double()
    beside = torch.outer(torch.tensor([2.0, -1, 0, 0]), torch.tensor([0.0, 1, -1])).double()
    for other, expected in ((3 * one, one), (beside, one + beside), (0 * one, one)):
        pair = [TaskVector({"weight": one}, "a"), TaskVector({"weight": other}, "b")]
        torch.testing.assert_close(ProjectedSum(0.0)(TaskVectors(pair)).single()["weight"], expected)
    zero = [TaskVector({"weight": 0 * one}, "a"), TaskVector({"weight": one}, "b")]
    torch.testing.assert_close(ProjectedSum()(TaskVectors(zero)).single()["weight"], one)


def test_refused():
    for make, said in (
        (lambda: ProjectedSum(1.0), "ProjectedSum.alpha: expected a finite number at least 0 and below 1, got 1.0"),
        (lambda: ProjectedSum(order="abcd"), "ProjectedSum.order: expected a list of tasks, got 'abcd'. Name all"),
        (lambda: ProjectedSum(exclude="("), "ProjectedSum.exclude: expected a regular expression"),
        (
            lambda: ProjectedSum(order=["a", "b", "c", "e"])(TaskVectors(rows())),
            "ProjectedSum.order: expected every task once, a, b, c, d, got a, b, c, e. Change it.",
        ),
        (
            lambda: ProjectedSum(order=["a", "a"])(TaskVectors([TaskVector({"w": torch.ones(2)}, "a")] * 2)),
            "ProjectedSum.order: expected every task once, a, a, got a, a. Change it.",
        ),
    ):
        with pytest.raises(ConfigurationError) as refused:
            make()
        assert said in str(refused.value)
