"""By what points are chosen, against hand-written cases and brute force; and what a search refuses to be."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from lit_merge.errors import ConfigurationError, DataError
from lit_merge.evaluation.search import (
    CoefficientSearch,
    OptunaStudy,
    SearchPoint,
    SearchResult,
    negation_score,
    normalised_accuracy,
    pareto_front,
    target_control_score,
)
from lit_merge.metrics.scores import best_point, mean_accuracy
from lit_merge.suite.recipe import Recipe
from lit_merge.transforms import LiNeS, Sum, chain, task_arithmetic, ties


def test_mean_accuracy_by_hand():
    assert mean_accuracy({"a": 0.2, "b": 0.6, "c": 1.0}, ["a", "b"]) == pytest.approx(0.4)


def test_normalised_accuracy_by_hand():
    assert normalised_accuracy({"a": 0.45, "b": 0.6}, {"a": 0.9, "b": 0.8}) == pytest.approx((0.5 + 0.75) / 2)
    assert normalised_accuracy({"a": 0.9}, {"a": 0.6, "b": 0.0}) == pytest.approx(1.5)
    with pytest.raises(DataError, match="got 0 for b"):
        normalised_accuracy({"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.0})


def test_target_and_control_by_hand():
    accuracy = {"a": 0.8, "b": 0.3, "c": 0.6}
    found = target_control_score(accuracy, individual={"a": 1.0}, zero_shot={"b": 0.6, "c": 0.5})
    assert found == pytest.approx((2 * 0.8 + (0.5 + 1.2) / 2) / 3)
    found = target_control_score(accuracy, {"a": 0.5, "b": 0.6}, {"c": 0.5}, target_weight=0.5)
    assert found == pytest.approx((0.5 * (1.6 + 0.5) / 2 + 1.2) / 1.5)
    with pytest.raises(DataError, match=r"pre-trained model, got 0 for b\. Leave this task out of control\."):
        target_control_score(accuracy, {"a": 1.0}, {"b": 0.0, "c": 0.5})


@pytest.mark.parametrize(
    ("target", "control", "score"),
    [
        (0.1, 0.6, -0.1),
        (1.0, 0.57, -1.0),  # 0.95 * 0.6 exactly
        (0.0, 0.56, -1.01),
        (1.0, 0.0, -1.57),
        (0.1, 0.9, -0.1),
    ],
)
def test_negation_by_hand(target, control, score):
    assert negation_score(target, control, pretrained_control=0.6) == pytest.approx(score)


@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_the_highest_negation_score_is_the_papers_rule(share):
    """The lowest target accuracy among the points that keep enough; the nearest miss if none does."""
    numbers = random.Random(0)
    for _ in range(200):
        points = [(numbers.randrange(5) / 4, numbers.randrange(11) / 10) for _ in range(6)]
        scores = [negation_score(*point, 0.8, share) for point in points]
        best = points[scores.index(max(scores))]
        kept = [point for point in points if point[1] >= share * 0.8]
        if kept:
            assert best in kept
            assert best[0] == min(target for target, _ in kept)
            assert max(scores) >= -1
        else:
            assert best[1] == max(control for _, control in points)
            assert max(scores) < -1


def quotient(right: int, count: int) -> float:
    """An accuracy as a metric gives it."""
    return float(torch.tensor(float(right)) / torch.tensor(float(count)))


@pytest.mark.parametrize("count", [20, 100, 460, 1000])
def test_exactly_the_share_is_kept_however_accuracies_are_rounded(count: int) -> None:
    for right in range(20, count + 1, 20):
        kept, before = quotient(right * 95 // 100, count), quotient(right, count)
        assert negation_score(0.1, kept, before) == -0.1
        assert negation_score(0.1, quotient(right * 95 // 100 - 1, count), before) < -1


def test_the_pretrained_model_always_keeps_its_control_accuracy():
    for control in (0.0, 0.1, 1 / 3, 0.7, 1.0):
        assert negation_score(1.0, control, control, 1.0) == -1.0


def test_the_pareto_front_is_that_of_the_definition():
    numbers = random.Random(1)
    for tasks, count in itertools.product((1, 2, 3), (1, 2, 7, 12)):
        points = [[numbers.randrange(4) / 4 for _ in range(tasks)] for _ in range(count)]
        front = []
        for index in range(count):
            dominated = False
            for other in range(count):
                no_worse = all(points[other][task] >= points[index][task] for task in range(tasks))
                better = any(points[other][task] > points[index][task] for task in range(tasks))
                dominated |= no_worse and better
            if not dominated:
                front.append(index)
        assert pareto_front(points) == front
    assert pareto_front([(0.5, 0.2), (0.5, 0.2), (0.4, 0.2), (0.1, 0.9)]) == [0, 1, 3]


def test_among_equals_the_smallest_values_are_taken():
    assert best_point([0.5, 0.7, 0.7], [[0.1], [0.6], [0.3]]) == 2
    assert best_point([0.7, 0.7, 0.7], [[0.3, 0.1], [0.2, 0.9], [0.2, 0.8]]) == 2
    assert best_point([-1.0], [[4.0]]) == 0
    assert best_point([math.nan, 0.5, math.nan], [[0.1], [0.2], [0.0]]) == 1


def test_means_that_are_equal_but_for_rounding_are_equals():
    numbers = random.Random(2)
    for _ in range(200):
        rights = [numbers.randrange(100, 200) for _ in range(8)]
        others = [right + (index == 1) - (index == 6) for index, right in enumerate(rights)]
        better = [right + (index == 1) for index, right in enumerate(rights)]
        first, second, third = (
            mean_accuracy(dict(enumerate(quotient(right, 250) for right in own)), range(8))
            for own in (rights, others, better)
        )
        assert best_point([second, first], [[0.2], [0.1]]) == 1
        assert best_point([first, second], [[0.2], [0.1]]) == 1
        assert best_point([first, third], [[0.1], [0.2]]) == 1


# Settings


def test_the_default_grid_is_the_papers():
    assert CoefficientSearch().values == [round(number / 20, 2) for number in range(21)]
    assert list(CoefficientSearch([0.3, 0.1]).grid()) == [{"coefficient": 0.3}, {"coefficient": 0.1}]


def test_a_grid_of_several_fields_is_every_combination():
    search = CoefficientSearch(fields={"Trim.density": [0.1, 0.2], "coefficient": [1.0, 2.0, 3.0]})
    pairs = list(itertools.product([0.1, 0.2], [1.0, 2.0, 3.0]))
    assert [tuple(point.values()) for point in search.grid()] == pairs
    assert search.varied == ["Trim.density", "coefficient"]
    first = list(search.grid(last="Trim.density"))
    assert [list(point) for point in first] == [["Trim.density", "coefficient"]] * 6
    assert [tuple(point.values()) for point in first] == sorted(pairs, key=lambda pair: pair[1])
    search.check(ties())
    with pytest.raises(ConfigurationError, match=r"Trim\.density: expected exactly one step"):
        search.check(task_arithmetic())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": []}, "search.values: expected at least one value, got none. Use e.g."),
        ({"fields": {}}, "search.fields: expected values of at least one field, got no field. Use"),
        ({"fields": {"density": []}}, "search.fields: expected values of at least one field, got none for density."),
        (
            {"criterion": "normalized"},
            "search.criterion: expected normalised, absolute, target_control or negation, got 'normalized'.",
        ),
        ({"target": []}, "search.target: expected at least one task, got none."),
        ({"target_weight": -1}, "search.target_weight: expected a finite number at least 0, got -1."),
        ({"control_share": 0.0}, "search.control_share: expected a share above 0 and at most 1, got 0."),
        ({"control_share": 95}, "search.control_share: expected a finite number at least 0 and at most 1, got 95."),
        (
            {"precision": "bf16"},
            "search.precision: expected 32-true, bf16-mixed or 16-mixed, got 'bf16'. Use one of them.",
        ),
        (
            {"fields": {"p": [0.1]}, "values": [0.2]},
            "search: expected one of values with field, fields, and optuna, got fields and values or field.",
        ),
        (
            {"fields": {"p": [0.1]}, "optuna": OptunaStudy({"p": (0, 1)})},
            "search: expected one of values with field, fields, and optuna, got fields and optuna. Remove one.",
        ),
        (
            {"field": "density", "optuna": OptunaStudy({"p": (0, 1)})},
            "search: expected one of values with field, fields, and optuna, got optuna and values or field.",
        ),
    ],
    ids=str,
)
def test_searches_that_make_no_sense(settings, message):
    with pytest.raises(ConfigurationError) as error:
        CoefficientSearch(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranges": {}}, "search.optuna.ranges: expected at least one field, got none."),
        ({"ranges": {"p": (0.5, 0.5)}}, "ranges of p: expected the lower bound first, got [0.5, 0.5]."),
        ({"ranges": {"p": (0.5, math.inf)}}, "ranges of p: expected a finite number, got inf."),
        ({"ranges": {"p": (0, 1)}, "trials": 0}, "trials: expected a whole number of at least 1, got 0."),
        ({"ranges": {"p": (0, 1)}, "seed": -1}, "seed: expected a whole number of at least 0, got -1."),
    ],
    ids=str,
)
def test_studies_that_make_no_sense(settings, message):
    with pytest.raises(ConfigurationError) as error:
        OptunaStudy(**settings)
    assert message in str(error.value)


def test_a_search_as_plain_data():
    assert CoefficientSearch([0.1]).to_config() == {"values": [0.1], "field": "coefficient", "criterion": "normalised"}
    several = CoefficientSearch(fields={"k": [1.0]}, criterion="negation", control=["b"])
    assert several.to_config() == {"criterion": "negation", "fields": {"k": [1.0]}, "control": ["b"]}
    study = CoefficientSearch(optuna=OptunaStudy({"k": (1.0, 2.0)}, trials=3))
    assert study.to_config()["optuna"] == {"ranges": {"k": [1.0, 2.0]}, "trials": 3, "seed": 0}
    for search in (several, CoefficientSearch([0.1])):
        assert CoefficientSearch(**search.to_config()) == search


def test_a_suites_recipe_refuses_what_its_search_would():
    recipe = Recipe("consensus_ta", search=CoefficientSearch(fields={"k": [1, 2], "coefficient": [0.1]}))
    recipe.check()
    assert recipe.description()["search"] == {"criterion": "normalised", "fields": {"k": [1, 2], "coefficient": [0.1]}}
    with pytest.raises(ConfigurationError, match=r"ConsensusMask\.k: expected a whole number"):
        Recipe("consensus_ta", search=CoefficientSearch(fields={"k": [1.5]})).check()
    with pytest.raises(ConfigurationError, match=r"alpha: expected exactly one step"):
        Recipe("task_arithmetic", search=CoefficientSearch(field="alpha")).check()
    with pytest.raises(ConfigurationError, match=r"Trim\.density: expected a fraction above 0"):
        Recipe("ties", search=CoefficientSearch(optuna=OptunaStudy({"density": (0.0, 0.5)}))).check()


# Results


def found(*fields: dict[str, float]) -> SearchResult:
    points = [SearchPoint(field, {"a": 0.5}, 0.5, None, None, 0.5) for field in fields]
    return SearchResult(points, 0, [0], chain(Sum(), LiNeS(0.2)), "absolute", "val", ["a"], [])


def test_columns_belong_to_one_field():
    result = found({"alpha": 0.2}, {"alpha": 0.1})
    assert (result.field, result.best, result.values) == ("alpha", 0.2, [0.2, 0.1])
    assert (result.absolute, result.normalised, result.accuracy) == ([0.5, 0.5], [], [{"a": 0.5}] * 2)
    assert result.describe() == "alpha 0.2 chosen on validation data, the largest tried"
    assert found({"alpha": 0.2}, {"alpha": 0.1}, {"alpha": 0.3}).ends == {}
    both = found({"alpha": 0.2, "beta": 1}, {"alpha": 0.2, "beta": 2}, {"alpha": 0.2, "beta": 3})
    assert both.describe() == "alpha 0.2, beta 1 chosen on validation data, the smallest tried of beta"
    assert both.plain()["ends"] == {"beta": "smallest"}
    plain = result.plain()
    assert (plain["field"], plain["best"], plain["values"], plain["normalised"]) == ("alpha", 0.2, [0.2, 0.1], None)
    several = found({"alpha": 0.2, "0.k": 3})
    assert several.describe() == "alpha 0.2, 0.k 3 chosen on validation data"
    assert several.fields == several.plain()["fields"] == {"alpha": 0.2, "0.k": 3}
    assert not {"field", "best", "values"} & set(several.plain())
    for name in ("field", "best", "values"):
        with pytest.raises(ConfigurationError, match=r"expected one field, got 2 \(alpha, 0\.k\)"):
            getattr(several, name)
