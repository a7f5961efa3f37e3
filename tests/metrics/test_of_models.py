"""Disentanglement, advantage, accuracies and correlation, against plain restatements in float64."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.metrics import (
    DisentanglementError,
    EntropyLossSpearman,
    NonlinearAdvantage,
    NormalisedAccuracy,
    TargetControlTradeOff,
    TauJp,
    disagreement,
    nonlinear_advantage,
    representation_divergence,
    spearman,
)

FIRST, SECOND = [-1.0, 0.0, 0.5], [0.0, 2.0]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row):
    highest = max(row)
    powers = [math.exp(value - highest) for value in row]
    return [power / math.fsum(powers) for power in powers]


def divergence(single, joint):
    return math.fsum(p * math.log(p / q) for p, q in zip(softmax(single), softmax(joint), strict=True))


def test_distances_are_the_definitions():
    single, joint = draw(5, 4, seed=1), draw(3, 5, 4, seed=2)
    expected = [[divergence(s, j) for s, j in zip(single.tolist(), rows, strict=True)] for rows in joint.tolist()]
    found = representation_divergence(single, joint)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-14
    assert representation_divergence(single, single).tolist() == [0.0] * 5
    assert representation_divergence(single.bfloat16(), joint.bfloat16()).dtype == torch.float64
    classes = [[max(range(4), key=row.__getitem__) for row in rows] for rows in joint.tolist()]
    own = [max(range(4), key=row.__getitem__) for row in single.tolist()]
    assert disagreement(single, joint).tolist() == [
        [float(a != b) for a, b in zip(own, row, strict=True)] for row in classes
    ]


@pytest.mark.parametrize("form", ["prediction", "representation"])
def test_error_is_the_sum_of_both_tasks_means_however_images_come(form):
    singles = draw(3, 6, 4, seed=3), draw(2, 9, 4, seed=4)  # a line of models each
    joints = draw(3, 2, 6, 4, seed=5), draw(3, 2, 9, 4, seed=6)
    distance = {"prediction": lambda a, b: float(a.argmax() != b.argmax()), "representation": None}[form]
    distance = distance or (lambda a, b: divergence(a.tolist(), b.tolist()))
    expected = [
        [
            sum(distance(singles[0][i, n], joints[0][i, j, n]) for n in range(6)) / 6
            + sum(distance(singles[1][j, n], joints[1][i, j, n]) for n in range(9)) / 9
            for j in range(2)
        ]
        for i in range(3)
    ]
    rows, points = DisentanglementError(FIRST, SECOND, form), DisentanglementError(FIRST, SECOND, form)
    for i in range(3):
        rows.update(0, i, slice(None), singles[0][i], joints[0][i])
        rows.update(1, i, slice(None), singles[1], joints[1][i])
        rows = pickle.loads(pickle.dumps(rows))
        for j in range(2):
            for part in (slice(4, None), slice(0, 4)):
                points.update(0, i, j, singles[0][i, part], joints[0][i, j, part])
                points.update(1, i, j, singles[1][j, part], joints[1][i, j, part])
    for metric in (rows, points):
        assert (metric.compute() - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-13
    half = DisentanglementError(FIRST, SECOND, form)
    half.update(0, 0, 0, singles[0][0], joints[0][0, 0])
    assert half.compute().isnan().all()  # the other task has no images


def linear_model(columns, images, alphas):
    """Features of ``(W0 + Σ α_t V_t) x``, where V_t is zero outside of its columns."""
    start = draw(4, 6, seed=7)
    moved = sum(alpha * draw(4, 6, seed=8 + t) * columns[t] for t, alpha in enumerate(alphas))
    return images @ (start + moved).T


@pytest.mark.parametrize("form", ["prediction", "representation"])
def test_error_is_zero_for_a_linear_model_on_orthogonal_supports(form):
    """Ortiz-Jimenez et al. 2023, section 3: V_2 x = 0 for the first task's x, and V_1 x = 0 for the second's."""
    supports = torch.tensor([[1.0] * 3 + [0.0] * 3, [0.0] * 3 + [1.0] * 3], dtype=torch.float64)
    images = [draw(20, 6, seed=20 + t) * supports[t] for t in range(2)]
    alphas = [-2.0, -0.5, 0.0, 1.0, 3.0]

    def error(columns):
        metric = DisentanglementError(alphas, alphas, form)
        for i, one in enumerate(alphas):
            for j, other in enumerate(alphas):
                for task, alone in enumerate(((one, 0.0), (0.0, other))):
                    single = linear_model(columns, images[task], alone)
                    metric.update(task, i, j, single, linear_model(columns, images[task], (one, other)))
        return metric.compute()

    assert error(supports).abs().max() < 1e-15
    overlapping = error(torch.ones_like(supports))
    assert overlapping[2, 2] == 0  # α1 = α2 = 0
    assert (overlapping[[0, 4]][:, [0, 4]] > 0.05).all()


def test_advantage_is_the_formula():
    labels = torch.tensor([0, 1, 2, 0, -1])
    linear = torch.eye(3)[[0, 0, 0, 0, 2]]  # two of four wrong
    nonlinear = torch.eye(3)[[0, 1, 2, 1, 0]]  # one of four wrong
    metric = NonlinearAdvantage(3)
    metric.update(linear[:3], nonlinear[:3], labels[:3])
    metric = pickle.loads(pickle.dumps(metric))
    metric.update(linear[3:], nonlinear[3:], labels[3:])
    assert float(metric.compute()) == pytest.approx((2 / 4 - 1 / 4) * 3 / 2, abs=1e-15)
    assert float(nonlinear_advantage(1 - 1 / 10, 0.0, 10)) == pytest.approx(1, abs=1e-15)
    assert NonlinearAdvantage(3).compute().isnan()
    for build in (lambda: NonlinearAdvantage(1), lambda: nonlinear_advantage(0.5, 0.2, 1)):
        with pytest.raises(ConfigurationError, match=r"classes: expected at least 2, got 1\. Leave this task out"):
            build()


def test_normalised_accuracy_counts_every_task_alike():
    metric = NormalisedAccuracy({"a": 0.8, "b": 0.5})
    right, wrong = torch.eye(2), torch.eye(2).flip(0)
    labels = torch.tensor([0, 1])
    for task, logits in (("a", right), ("a", wrong), ("b", right), ("a", right), ("b", wrong)):
        metric.update(task, logits, labels)
    metric.update("b", right, torch.tensor([-1, -1]))  # padding
    found = pickle.loads(pickle.dumps(metric)).compute()
    assert found["tasks"].tolist() == pytest.approx([4 / 6 / 0.8, 2 / 4 / 0.5], abs=1e-15)
    assert float(found["mean"]) == pytest.approx((4 / 6 / 0.8 + 1) / 2, abs=1e-15)
    with pytest.raises(ConfigurationError, match=r"task: expected one of a, b, got 'c'\. Use one of these\."):
        metric.update("c", right, labels)
    message = r"individual: expected accuracies in \(0, 1\] of at least one task, got 0 for b\. Fine-tune longer"
    with pytest.raises(ConfigurationError, match=message):
        NormalisedAccuracy({"a": 1.0, "b": 0.0})
    with pytest.raises(ConfigurationError, match="of at least one task, got none"):
        NormalisedAccuracy({})
    _, axes = metric.plot()
    assert [bar.get_height() for bar in axes.containers[0]] == pytest.approx([100 * 4 / 6 / 0.8, 100.0])


def test_trade_off_has_the_front_that_no_point_dominates():
    accuracy = {"p": (0.5, 0.75), "q": (0.75, 0.5), "r": (0.5, 0.5), "s": (0.75, 0.5), "t": (0.25, 1.0)}
    metric = TargetControlTradeOff(list(accuracy), ["a"], ["b", "c"])
    labels = torch.zeros(4, dtype=torch.long)
    for model, (target, control) in accuracy.items():
        for task, share in (("a", target), ("b", control), ("c", control)):
            logits = torch.eye(2)[[0] * round(4 * share) + [1] * round(4 * (1 - share))]
            metric.update(model, task, logits, labels)
    found = pickle.loads(pickle.dumps(metric)).compute()
    assert found["points"].tolist() == [list(point) for point in accuracy.values()]
    assert found["front"].tolist() == [True, True, False, True, True]
    _, axes = metric.plot()
    circles = axes.lines[1]
    assert list(zip(circles.get_xdata(), circles.get_ydata(), strict=True)) == [(25, 100), (50, 75), (75, 50), (75, 50)]
    assert [text.get_text() for text in axes.texts] == list(accuracy)
    empty = TargetControlTradeOff(["p", "q"], ["a"], ["b"])
    empty.update("p", "a", torch.eye(2), torch.tensor([0, 1]))
    empty.update("p", "b", torch.eye(2), torch.tensor([0, 0]))
    assert empty.compute()["front"].tolist() == [True, False]
    with pytest.raises(ConfigurationError, match=r"model: expected one of p, q, got 'x'\. Use one of these\."):
        empty.update("x", "a", torch.eye(2), torch.tensor([0, 1]))
    message = "TargetControlTradeOff: expected models, target tasks and other control tasks, got "
    with pytest.raises(ConfigurationError, match=f"{message}a as both. Name at least one of each."):
        TargetControlTradeOff(["p"], ["a"], ["a", "b"])
    with pytest.raises(ConfigurationError, match=f"{message}1, 1 and 0"):
        TargetControlTradeOff(["p"], ["a"], [])


def test_entropy_and_loss_are_ranked_together():
    logits, labels = draw(30, 5, seed=11), torch.randint(5, (30,), generator=torch.Generator().manual_seed(12))
    labels[7] = -1
    metric = EntropyLossSpearman()
    metric.update(logits[:11], labels[:11])
    metric = pickle.loads(pickle.dumps(metric))
    metric.update(logits[11:], labels[11:])
    probabilities = [softmax(row) for row in logits.tolist()]
    entropies = [-math.fsum(p * math.log(p) for p in row) for row in probabilities]
    losses = [-math.log(row[label]) for row, label in zip(probabilities, labels.tolist(), strict=True)]
    kept = [index for index in range(30) if index != 7]
    expected = spearman(*(torch.tensor([values[index] for index in kept]) for values in (entropies, losses)))
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-15)
    _, axes = metric.plot()
    assert list(axes.lines[0].get_xdata()) == pytest.approx([entropies[index] for index in kept])
    assert axes.get_title(loc="left") == f"Spearman {float(expected):.3f}"


def test_what_a_grid_refuses():
    message = "DisentanglementError: expected at least one coefficient of each vector, got 0 and 2. Use e.g. 20"
    with pytest.raises(ConfigurationError, match=message):
        DisentanglementError([], [1.0, 2.0])
    with pytest.raises(ConfigurationError, match=r"form: expected prediction or representation, got 'logits'\. Use"):
        DisentanglementError([1.0], [1.0], "logits")
    with pytest.raises(ConfigurationError, match=r"task: expected 0 or 1, got 2\. Two tasks make a grid\."):
        DisentanglementError([1.0], [1.0]).update(2, 0, 0, torch.eye(2), torch.eye(2))


def test_planes_and_single_values_are_drawn():
    metric = DisentanglementError(FIRST, SECOND)
    for row in range(3):
        metric.update(0, row, slice(None), torch.eye(2), torch.eye(2)[[0, row % 2]].expand(2, 2, 2))
        metric.update(1, row, slice(None), torch.eye(2), torch.eye(2).expand(2, 2, 2))
    figure, axes = metric.plot()
    mesh = axes.collections[0]
    assert mesh.get_array().T.flatten().tolist() == metric.compute().flatten().tolist()
    assert axes.get_xlim()[0] < -1 < 0.5 < axes.get_xlim()[1]
    assert axes.get_ylim()[0] < 0 < 2 < axes.get_ylim()[1]
    assert len(figure.axes) == 2
    for one, value in ((TauJp(), torch.ones(1, 4)), (NonlinearAdvantage(2), None)):
        if value is None:
            one.update(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
        else:
            one.update(value)
        figure, axes = one.plot()
        assert float(axes.lines[0].get_ydata()[0]) == float(one.compute())
        assert axes.get_figure() is figure


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")
