"""Choosing a coefficient: on validation data alone, by what the curve says."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

import lit_merge.models.linear_features
from lit_merge.commands.merge import merge
from lit_merge.data import MultiTaskDataModule
from lit_merge.data.embedded.tasks import EMBEDDED_TASKS
from lit_merge.data.images.datasets import FileImages
from lit_merge.errors import ConfigurationError, DataError, StructureMismatchError
from lit_merge.evaluation.search import (
    CoefficientSearch,
    Evaluation,
    OptunaStudy,
    direction_of,
    normalised_accuracy,
    search_coefficient,
)
from lit_merge.functional import linearize
from lit_merge.models import load_clip, zero_shot_weights
from lit_merge.models.linear_features import LinearFeatureCache
from lit_merge.modules import MultiTaskModule
from lit_merge.transforms import (
    Chain,
    Mean,
    Negate,
    Scale,
    ScaleBlocks,
    Sum,
    Transform,
    chain,
    consensus_ta,
    negation,
    replace_field,
    rewarded_soup,
    task_arithmetic,
    ties,
)
from lit_merge.vectors import TaskVector, TaskVectors

GRID = [0.6, 0.0, 1.0, 0.3, 0.8]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return tmp_path_factory.mktemp("heads")


@pytest.fixture
def base(clip_config, clip_weights, own_cache, heads):
    """A cache of the test's own, but for the heads, which take long to build."""
    own_cache.mkdir()
    (own_cache / "heads").symlink_to(heads)
    return load_clip(clip_config, clip_weights)


@pytest.fixture
def vectors(base):
    """Two vectors that are large enough to change predictions."""
    generator = torch.Generator().manual_seed(0)
    header = {"base_fingerprint": base.fingerprint, "base_model": base.name}
    parameters = dict(base.visual.named_parameters())
    return TaskVectors(
        [
            TaskVector(
                {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in parameters.items()},
                task,
                metadata=header,
            )
            for task in ("shapes", "things")
        ]
    )


class ValidationOnly(MultiTaskDataModule):
    """Other splits than val are out of bounds."""

    def train_dataloader(self):
        raise AssertionError("training images")

    def test_dataloader(self):
        raise AssertionError("test images")

    def setup(self, stage):
        assert stage == "validate"
        super().setup(stage)


@pytest.fixture
def data(image_folder):
    """Two tasks of three classes; an attempt to read another image than those for validation fails."""
    paths = {"shapes": image_folder(5, 32), "things": image_folder(7, 32)}
    for path in paths.values():
        for image in Path(path).rglob("*.png"):
            if image.parts[-3] != "val":
                image.write_bytes(b"not to be looked at")
    return ValidationOnly(paths=paths)


def accuracies(base, parameters, data):
    """Counted image by image, on the files themselves."""
    transform = base.preprocessing.transform()
    found = {}
    for task, part in data.tasks.items():
        weights = zero_shot_weights(base, part.classes, part.templates)
        right = []
        for label, name in enumerate(("disc", "ring", "star")):
            for path in sorted((Path(part.source.path) / "val" / name).glob("*.png")):
                image = transform(Image.open(path))[None]
                with torch.no_grad():
                    features = torch.func.functional_call(base.visual, parameters, (image,))
                right.append(int((F.normalize(features) @ weights.T).argmax()) == label)
        found[task] = sum(right) / len(right)
    return found


def moved(base, tensors, coefficient):
    return {name: value.detach() + coefficient * tensors[name] for name, value in base.visual.named_parameters()}


def test_the_curve_is_that_of_independent_evaluations(base, vectors, data, clip_config, clip_weights):
    search = CoefficientSearch(GRID)
    result = search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, data)
    individual = {}
    for task in vectors.tasks:
        individual[task] = accuracies(base, moved(base, vectors.vector(task), 1.0), data)[task]
    total = {name: vectors[name].sum(0) for name in vectors}
    points = [accuracies(base, moved(base, total, value), data) for value in GRID]
    assert min(individual.values()) > 0
    assert result.accuracy == [pytest.approx(point) for point in points]
    absolute = [sum(point.values()) / 2 for point in points]
    normalised = [sum(point[task] / individual[task] for task in point) / 2 for point in points]
    assert result.absolute == pytest.approx(absolute)
    assert result.normalised == pytest.approx(normalised)
    assert len(set(normalised)) > 2
    highest = max(result.normalised)
    assert result.best == min(v for v, s in zip(GRID, result.normalised, strict=True) if s == highest)
    assert (result.values, result.split, result.criterion) == (GRID, "val", "normalised")
    assert search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, data) == result


def test_among_equals_the_smallest_is_chosen(vectors, data, clip_config, clip_weights):
    nothing = Chain((Scale(0.0), Sum(), Scale(1.0)))  # every point is θ0
    with pytest.raises(ConfigurationError, match="expected exactly one step"):
        search_coefficient(vectors, nothing, CoefficientSearch([0.5, 0.2]), clip_config, clip_weights, data)
    zero = TaskVectors([TaskVector({n: v.zero_() for n, v in dict(vectors.vector(0)).items()}, t) for t in data.tasks])
    result = search_coefficient(zero, task_arithmetic(), CoefficientSearch(GRID), clip_config, clip_weights, data)
    assert len(set(result.absolute)) == 1
    assert result.normalised == [1.0] * 5
    assert result.best == 0.0


INDIVIDUAL = {"shapes": 0.5, "things": 1.0}
ZERO_SHOT = {"shapes": 0.4, "things": 0.5}
CURVE = {0.2: {"shapes": 0.5, "things": 0.6}, 0.4: {"shapes": 0.3, "things": 0.9}, 0.6: {"shapes": 0.1, "things": 0.2}}


@pytest.fixture
def scripted(monkeypatch):
    """Validation gives :data:`CURVE` at a coefficient, :data:`INDIVIDUAL` and :data:`ZERO_SHOT`."""
    asked = []

    def accuracy(self, vector, coefficient=1.0, tasks=None):
        asked.append((None if vector is None else vector.task, coefficient, tasks))
        if vector is None:
            return dict(ZERO_SHOT)
        return dict(CURVE[coefficient]) if tasks is None else {task: INDIVIDUAL[task] for task in tasks}

    monkeypatch.setattr(Evaluation, "accuracy", accuracy)
    return asked


@pytest.mark.parametrize(("criterion", "best"), [("normalised", 0.2), ("absolute", 0.4)])
def test_the_criterion_decides(criterion, best, scripted, vectors, data, clip_config, clip_weights):
    search = CoefficientSearch(list(CURVE), criterion=criterion)
    result = search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, data)
    assert result.normalised == pytest.approx([0.8, 0.75, 0.2])
    assert result.absolute == pytest.approx([0.55, 0.6, 0.15])
    assert (result.best, result.criterion) == (best, criterion)
    assert [point.score for point in result.points] == (
        result.normalised if criterion == "normalised" else result.absolute
    )
    assert result.transform == task_arithmetic(best)
    assert result.describe().startswith(f"coefficient {best} chosen on validation data")
    assert result.pareto == [0, 1]
    assert (result.target, result.control) == (["shapes", "things"], [])
    assert (result.individual, result.zero_shot) == (INDIVIDUAL, None)
    merged = [("shapes+things", value, None) for value in CURVE]
    own = [("shapes", 1.0, ["shapes"]), ("things", 1.0, ["things"])]
    assert scripted == [merged[0], *own, *merged[1:]]


def test_a_merge_with_a_search_is_the_merge_at_its_best(scripted, vectors, data, clip_config, clip_weights, tmp_path):
    files = []
    for task in vectors.tasks:
        files.append(str(tmp_path / f"{task}.safetensors"))
        vectors.vector(task).save(files[-1])
    model = {"model": clip_config, "pretrained": clip_weights}
    search = CoefficientSearch(list(CURVE))
    result = merge(files, str(tmp_path / "found.safetensors"), "task_arithmetic", search=search, data=data, **model)
    assert result.transform == task_arithmetic(0.2)
    plain = merge(files, str(tmp_path / "plain.safetensors"), "task_arithmetic", {"coefficient": 0.2}, **model)
    found, expected = load_file(result.output), load_file(plain.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    curve = json.loads((tmp_path / "found-search.json").read_text(encoding="utf-8"))
    assert curve["values"] == [0.2, 0.4, 0.6]
    assert curve["best"] == 0.2
    assert [point["accuracy"] for point in curve["points"]] == list(CURVE.values())
    assert curve["normalised"] == [point["normalised"] for point in curve["points"]] == result.search.normalised
    with safe_open(result.output, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["search"]) == curve
    assert header["transform"] == repr(task_arithmetic(0.2))


def test_searches_that_make_no_sense_are_refused(vectors, data, clip_config, clip_weights):
    model = (clip_config, clip_weights)
    for transform, search, other, part in (
        (task_arithmetic(), CoefficientSearch(), data.subset(["shapes"]), "got none of 'things' (data: shapes)"),
        (Chain((Mean(),)), CoefficientSearch(), data, "coefficient: expected exactly one step"),
        (task_arithmetic(), CoefficientSearch(field="density"), data, "density: expected exactly one step"),
        (task_arithmetic(), CoefficientSearch([float("nan")]), data, "expected a finite number, got nan"),
        (Scale(0.5), CoefficientSearch([0.5]), data, "expected one vector, got 2"),
    ):
        with pytest.raises(ConfigurationError) as error:
            search_coefficient(vectors, transform, search, *model, other)
        assert part in str(error.value)
        assert "\n" not in str(error.value)


# Target and control tasks


@pytest.mark.parametrize(
    ("settings", "best", "scores", "front"),
    [
        ({"criterion": "negation"}, 0.4, [-0.5, -0.3, -1 - (0.95 * 0.5 - 0.2)], [1, 2]),
        ({"criterion": "negation", "control_share": 0.3}, 0.6, [-0.5, -0.3, -0.1], [1, 2]),
        ({"criterion": "target_control"}, 0.2, [(2 * 1 + 1.2) / 3, (2 * 0.6 + 1.8) / 3, (2 * 0.2 + 0.4) / 3], [0, 1]),
        (
            {"criterion": "target_control", "target_weight": 1.0},
            0.4,
            [(1 + 1.2) / 2, (0.6 + 1.8) / 2, (0.2 + 0.4) / 2],
            [0, 1],
        ),
        ({"criterion": "normalised"}, 0.2, [1.0, 0.6, 0.2], [0, 1]),
        ({"criterion": "absolute", "target": ["things"]}, 0.4, [0.6, 0.9, 0.2], [0, 1]),
    ],
    ids=str,
)
def test_one_tasks_vector_and_the_others(
    settings, best, scores, front, scripted, vectors, data, clip_config, clip_weights
):
    search, one = CoefficientSearch(list(CURVE), **settings), vectors.select(["shapes"])
    result = search_coefficient(one, task_arithmetic(), search, clip_config, clip_weights, data)
    assert result.best == best
    assert [point.score for point in result.points] == pytest.approx(scores)
    assert result.pareto == front
    needed = result.criterion in ("target_control", "negation")
    assert result.zero_shot == (ZERO_SHOT if needed else None)
    if "target" not in settings:
        assert (result.target, result.control) == (["shapes"], ["things"])
        assert [point.control for point in result.points] == [0.6, 0.9, 0.2]
        assert result.individual == (None if result.criterion == "negation" else {"shapes": 0.5})
    else:
        assert (result.target, result.control) == (["things"], ["shapes"])
        assert result.individual is None  # no vector is called things
        assert result.normalised == []


def test_nothing_keeps_the_control_accuracy(scripted, vectors, data, clip_config, clip_weights):
    one, search = vectors.select(["shapes"]), CoefficientSearch([0.6], criterion="negation")
    with pytest.raises(ConfigurationError) as error:
        search_coefficient(one, negation(), search, clip_config, clip_weights, data)
    assert str(error.value) == (
        "search: expected a point that keeps 0.95 of the control accuracy 0.5, got at most 0.2 (coefficient 0.6). "
        "Add smaller values; 0 keeps all of it."
    )


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("criterion", ["negation", "target_control"])
def test_control_criteria_are_measured(criterion, linearized, vectors, many, evaluated, clip_config, clip_weights):
    """From the accuracies of single evaluations, whichever way they were measured."""
    one, grid = vectors.select(["shapes"]), [0.0, 0.4, 1.0]
    search = CoefficientSearch(grid, criterion=criterion, control_share=0.5)
    settings = {"model": clip_config, "pretrained": clip_weights, "data": many, "linearized": linearized}
    result = search_coefficient(one, negation(), search, **settings)
    points = [evaluated(negation(value)(one).single(), many, linearized) for value in grid]
    assert result.accuracy == points
    assert result.zero_shot == points[0]
    assert points[0] != points[1] != points[2]
    own = evaluated(one.vector(0), many, linearized)["shapes"]
    if criterion == "negation":
        kept = [index for index in range(3) if points[index]["things"] >= 0.5 * points[0]["things"]]
        expected = min(kept, key=lambda index: (points[index]["shapes"], grid[index]))
        assert result.individual is None
    else:
        scores = [(2 * point["shapes"] / own + point["things"] / points[0]["things"]) / 3 for point in points]
        assert [point.score for point in result.points] == pytest.approx(scores)
        expected = max(range(3), key=lambda index: (scores[index], -grid[index]))
        assert result.individual == {"shapes": own}
    assert result.chosen == expected


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["shapes", "things"], {"criterion": "negation"}, "expected control tasks for negation, got none. Give data"),
        (["shapes"], {"criterion": "target_control", "control": []}, "expected control tasks for target_control, got"),
        (["shapes"], {"control": ["signs"]}, "of every task, got none of 'signs' (data: shapes, things). Name"),
        (["shapes"], {"target": ["signs"]}, "expected data of every task, got none of 'signs'"),
        (["shapes"], {"control": ["shapes"]}, "search.control: expected other tasks than the targets, got shapes."),
        (["shapes", "shapes"], {}, "expected one vector of every target task for normalised, got 2 of shapes. Use"),
        (["shapes"], {"target": ["things"]}, "expected one vector of every target task for normalised, got 0 of thi"),
    ],
    ids=str,
)
def test_roles_that_make_no_sense(tasks, settings, message, vectors, data, clip_config, clip_weights):
    chosen = vectors.select([vectors.tasks.index(task) for task in tasks])
    search = CoefficientSearch([0.5], **settings)
    with pytest.raises(ConfigurationError) as error:
        search_coefficient(chosen, task_arithmetic(), search, clip_config, clip_weights, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_vectors_of_one_task_are_judged_by_accuracy(vectors, data, clip_config, clip_weights, base):
    """A rewarded soup between them, with its front over the tasks of the data."""
    rows = [vectors.vector(0), TaskVector(vectors.vector(1), "shapes")]
    both, search = TaskVectors(rows), CoefficientSearch([0.0, 0.5, 1.0], "fraction", "absolute")
    result = search_coefficient(both, rewarded_soup(), search, clip_config, clip_weights, data)
    first, second = dict(rows[0]), dict(rows[1])
    for fraction, found in zip([0.0, 0.5, 1.0], result.accuracy, strict=True):
        between = {name: (1 - fraction) * first[name] + fraction * second[name] for name in first}
        assert found == pytest.approx(accuracies(base, moved(base, between, 1.0), data))
    assert (result.target, result.control, result.normalised) == (["shapes"], ["things"], [])
    points = [tuple(point.values()) for point in result.accuracy]
    assert result.pareto == [
        index
        for index, (a, b) in enumerate(points)
        if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in points)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["digits", "signs"]),
        ({"control": ["land"]}, ["digits", "signs", "land"]),
        ({"target": ["scenes"]}, ["scenes"]),
        ({"criterion": "negation", "target": ["scenes"], "control": ["land"]}, ["scenes", "land"]),
        (
            {"criterion": "target_control"},
            ["digits", "signs", *(task for task in EMBEDDED_TASKS if task not in ("digits", "signs"))],
        ),
    ],
    ids=str,
)
def test_without_data_the_embedded_tasks_are_meant(settings, expected, vectors, monkeypatch):
    named = TaskVectors([TaskVector(vectors.vector(row), task) for row, task in enumerate(("digits", "signs"))])
    asked = []

    class Noted(MultiTaskDataModule):
        def __init__(self, tasks):
            asked.append(tasks)
            raise DataError("enough")

    monkeypatch.setattr("lit_merge.data.multitask.MultiTaskDataModule", Noted)
    with pytest.raises(DataError, match="enough"):
        search_coefficient(named, task_arithmetic(), CoefficientSearch(**settings))
    assert asked == [expected]


# Several fields, and what is merged


@dataclass(frozen=True)
class Counted(Transform):
    """Adds a number; says how often it was read."""

    offset: float = 0.0
    seen: ClassVar[Counter[float]] = Counter()

    def __call__(self, vectors):
        self.seen[self.offset] += 1
        return vectors.map(lambda name, stack: stack.add_(self.offset), note=self)


def test_a_factor_among_other_fields_is_merged_once(base, vectors, data, clip_config, clip_weights):
    Counted.seen.clear()
    transform = chain(Counted(), Sum(), Scale(0.3))
    search = CoefficientSearch(fields={"coefficient": [0.2, 0.7, 0.9], "Counted.offset": [0.0, 0.05]})
    result = search_coefficient(vectors, transform, search, clip_config, clip_weights, data)
    assert Counted.seen == {0.0: 1, 0.05: 1}
    assert len(result.points) == 6
    for point in result.points:
        factor, offset = point.fields["coefficient"], point.fields["Counted.offset"]
        total = {name: (vectors[name] + offset).sum(0) for name in vectors}
        assert point.accuracy == pytest.approx(accuracies(base, moved(base, total, factor), data))
    scores = [point.score for point in result.points]
    tied = [tuple(p.fields.values()) for p in result.points if p.score == max(scores)]
    assert tuple(result.fields.values()) == min(tied)
    factor, offset = result.fields.values()
    assert result.transform == chain(Counted(offset), Sum(), Scale(factor))
    assert list(result.fields) == ["coefficient", "Counted.offset"]


@pytest.mark.parametrize(
    "transform", [task_arithmetic(), negation(), chain(Mean(), Scale(2.0), ScaleBlocks([0.5, 2.0]))], ids=repr
)
def test_the_scaled_direction_is_the_merge(transform, vectors, data, clip_config, clip_weights, monkeypatch):
    asked = []

    def accuracy(self, vector, coefficient=1.0, tasks=None):
        if tasks is None:
            asked.append((vector, coefficient))
        return dict.fromkeys(self.loaders, 0.5)

    monkeypatch.setattr(Evaluation, "accuracy", accuracy)
    chosen = vectors.select([0]) if transform == negation() else vectors
    search_coefficient(chosen, transform, CoefficientSearch(GRID), clip_config, clip_weights, data)
    assert [coefficient for _, coefficient in asked] == GRID
    assert len({id(direction) for direction, _ in asked}) == 1
    for direction, value in asked:
        anew = replace_field(transform, "coefficient", value)(chosen).single()
        for name in anew:
            torch.testing.assert_close(direction[name] * value, anew[name], rtol=1e-6, atol=1e-7)
    asked.clear()
    search_coefficient(vectors, ties(), CoefficientSearch([0.1, 0.2], "density"), clip_config, clip_weights, data)
    for (merged, coefficient), density in zip(asked, [0.1, 0.2], strict=True):
        assert coefficient == 1.0
        assert all(torch.equal(merged[name], value) for name, value in ties(density)(vectors).single().items())


# What was measured before


def test_a_repeated_search_reads_no_image(vectors, data, counted, clip_config, clip_weights):
    settings = {"model": clip_config, "pretrained": clip_weights, "data": data}
    first = search_coefficient(vectors, task_arithmetic(), CoefficientSearch([0.2, 0.4]), **settings)
    assert counted["read"] == 2 * (15 + 21) + 15 + 21
    counted.clear()
    assert search_coefficient(vectors, task_arithmetic(0.9), CoefficientSearch([0.2, 0.4]), **settings) == first
    assert not counted
    more = search_coefficient(vectors, task_arithmetic(), CoefficientSearch([0.4, 0.5]), **settings)
    assert counted["read"] == 15 + 21
    assert more.points[0] == first.points[1]
    counted.clear()
    twice_the_mean, finer = chain(Scale(2.0), Mean(), Scale(1.0)), CoefficientSearch([0.5], "2.coefficient")
    assert search_coefficient(vectors, twice_the_mean, finer, **settings).accuracy == more.accuracy[1:]
    assert not counted  # another way to the same model
    linear = search_coefficient(vectors, Chain((Clip(), Sum())), CoefficientSearch([0.2]), **settings, linearized=True)
    direct = search_coefficient(vectors, Chain((Clip(), Sum())), CoefficientSearch([0.2]), **settings)
    assert counted["read"] == 3 * (15 + 21)  # two points, and the linearised models of one task each
    assert linear.accuracy != direct.accuracy


@pytest.mark.parametrize("linearized", [False, True])
def test_another_precision_is_measured_anew(linearized, vectors, data, counted, clip_config, clip_weights, monkeypatch):
    settings = {"model": clip_config, "pretrained": clip_weights, "data": data, "linearized": linearized}
    kinds = []
    features = MultiTaskModule.features

    def spied(self, batch):
        kinds.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return features(self, batch)

    monkeypatch.setattr(MultiTaskModule, "features", spied)
    search_coefficient(vectors, task_arithmetic(), CoefficientSearch([0.2]), **settings)
    seen = counted["read"]
    search_coefficient(vectors, task_arithmetic(), CoefficientSearch([0.2], precision="bf16-mixed"), **settings)
    assert counted["read"] == 2 * seen
    if not linearized:
        assert set(kinds) == {None, torch.bfloat16}


def test_an_interrupted_search_goes_on(vectors, data, counted, clip_config, clip_weights, monkeypatch):
    settings = {"model": clip_config, "pretrained": clip_weights, "data": data}
    measure, left = Evaluation._measure, [7]

    def interrupted(self, task):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(self, task)

    monkeypatch.setattr(Evaluation, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_coefficient(vectors, task_arithmetic(), CoefficientSearch(GRID), **settings)
    assert counted["read"] == 2 * (15 + 21) + 15 + 21 + 15  # a point, single models, a point, and half a point
    counted.clear()
    left[0] = 100
    whole = search_coefficient(vectors, task_arithmetic(), CoefficientSearch(GRID), **settings)
    assert counted["read"] == 3 * (15 + 21)
    assert len(whole.points) == 5


def test_a_record_that_cannot_be_trusted_is_measured_again(
    vectors, data, counted, own_cache, clip_config, clip_weights
):
    settings = {"model": clip_config, "pretrained": clip_weights, "data": data}
    search = CoefficientSearch([0.4], criterion="absolute", target=["shapes"], control=[])
    first = search_coefficient(vectors.select([1]), task_arithmetic(), search, **settings)
    (file,) = (own_cache / "accuracies").iterdir()
    sound = file.read_text(encoding="utf-8")
    record = {"key": file.stem, "value": first.accuracy[0]}
    assert json.loads(sound) == record
    for damage in (
        "",
        "[]",
        sound[:-3],
        json.dumps({**record, "key": "0" * 64}),
        json.dumps({**record, "value": {"shapes": 1.5}}),
        json.dumps({**record, "value": {"shapes": "much"}}),
        json.dumps({**record, "value": [0.5]}),
        json.dumps({**record, "value": {}}),
    ):
        file.write_text(damage, encoding="utf-8")
        counted.clear()
        assert search_coefficient(vectors.select([1]), task_arithmetic(), search, **settings) == first
        assert counted["read"] == 15
        assert file.read_text(encoding="utf-8") == sound


def test_other_images_models_or_heads_are_measured_anew(vectors, data, counted, clip_config, clip_weights):
    settings = {"model": clip_config, "pretrained": clip_weights}
    search = CoefficientSearch([0.4], criterion="absolute")
    first = search_coefficient(vectors, task_arithmetic(), search, **settings, data=data)
    paths = {task: str(part.source.path) for task, part in data.tasks.items()}
    counted.clear()
    other = ValidationOnly(paths=paths, templates={"shapes": ["no {}, or?"]})
    second = search_coefficient(vectors, task_arithmetic(), search, **settings, data=other)
    assert counted["read"] == 15 + 21 + 15 + 21
    assert second.accuracy != first.accuracy
    counted.clear()
    image = next(Path(paths["things"]).glob("val/*/0.png"))
    Image.new("RGB", (32, 32)).save(image)
    search_coefficient(vectors, task_arithmetic(), search, **settings, data=ValidationOnly(paths=paths))
    assert counted["read"] == 15 + 21 + 21  # the model of shapes has seen other images


def test_images_that_do_not_tell_what_they_are_are_not_recorded(
    vectors, tiny_data, tiny_tasks, own_cache, clip_config, clip_weights
):
    data = tiny_tasks({task: tiny_data(name=task, side=32, seed=len(task)) for task in vectors.tasks})
    search_coefficient(vectors, task_arithmetic(), CoefficientSearch([0.2]), clip_config, clip_weights, data)
    assert not (own_cache / "accuracies").exists()


# Only validation images


def test_data_without_validation_images_are_refused(vectors, tiny_data, tiny_tasks, clip_config, clip_weights):
    class Without(tiny_tasks):
        val_dataloader = L.LightningDataModule.val_dataloader

    class Fewer(tiny_tasks):
        def val_dataloader(self):
            return [self.tasks["shapes"].loader()]

    class Empty(tiny_tasks):
        def val_dataloader(self):
            return [self.tasks["shapes"].loader(), []]

    parts = {task: tiny_data(name=task, side=32) for task in vectors.tasks}
    for kind, message in (
        (Without, "search: expected validation data, got a Without without val_dataloader. Add a validation split"),
        (Fewer, "search: expected validation images of every task, got none of things. Add a validation split; test"),
        (Empty, "search: expected validation images of every task, got none of things. Add a validation split; test"),
    ):
        data = kind(parts)
        with pytest.raises(DataError) as error:
            search_coefficient(vectors, task_arithmetic(), CoefficientSearch([0.2]), clip_config, clip_weights, data)
        assert message in str(error.value)
    with pytest.raises(ConfigurationError, match=r"expected a data module of several tasks, got TinyData\. Use Multi"):
        search_coefficient(
            vectors, task_arithmetic(), CoefficientSearch([0.2]), clip_config, clip_weights, parts["shapes"]
        )


# Optuna


def test_a_study_is_reproducible(vectors, data, counted, clip_config, clip_weights, base):
    pytest.importorskip("optuna")
    settings = {"model": clip_config, "pretrained": clip_weights, "data": data}
    study = OptunaStudy({"coefficient": (0.1, 0.9), "Counted.offset": (0.0, 0.1)}, trials=12, seed=3)
    transform, search = chain(Counted(), Sum(), Scale(0.3)), CoefficientSearch(optuna=study)
    result = search_coefficient(vectors, transform, search, **settings)
    assert len(result.points) == 12
    assert len({tuple(point.fields.values()) for point in result.points}) == 12
    for point in result.points:
        assert 0.1 <= point.fields["coefficient"] <= 0.9
        assert 0.0 <= point.fields["Counted.offset"] <= 0.1
    scores = [point.score for point in result.points]
    assert result.points[result.chosen].score == max(scores)
    last = result.points[-1]
    total = {name: (vectors[name] + last.fields["Counted.offset"]).sum(0) for name in vectors}
    assert last.accuracy == pytest.approx(accuracies(base, moved(base, total, last.fields["coefficient"]), data))
    counted.clear()
    assert search_coefficient(vectors, transform, search, **settings) == result
    assert not counted
    other = CoefficientSearch(optuna=dataclasses.replace(study, seed=4, trials=1))
    assert search_coefficient(vectors, transform, other, **settings).points[0].fields != result.points[0].fields


def test_a_study_learns_from_the_scores(monkeypatch, vectors, data, clip_config, clip_weights):
    """The more the further up: most trials after the first ten lie in the upper half."""
    pytest.importorskip("optuna")

    def accuracy(self, vector, coefficient=1.0, tasks=None):
        return dict.fromkeys(self.loaders, coefficient / 10)

    monkeypatch.setattr(Evaluation, "accuracy", accuracy)
    search = CoefficientSearch(optuna=OptunaStudy({"coefficient": (0.0, 10.0)}, trials=40), criterion="absolute")
    result = search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, data)
    values = result.values
    assert sum(values[10:]) / 30 > 7
    assert result.best == max(values)


def test_a_whole_number_is_suggested_whole(monkeypatch, vectors, data, clip_config, clip_weights):
    pytest.importorskip("optuna")
    monkeypatch.setattr(Evaluation, "accuracy", lambda self, *settings, **more: dict.fromkeys(self.loaders, 0.5))
    search = CoefficientSearch(optuna=OptunaStudy({"k": (1, 2)}, trials=6), criterion="absolute")
    result = search_coefficient(vectors, consensus_ta(), search, clip_config, clip_weights, data)
    assert set(result.values) == {1, 2}
    assert result.best == 1  # all are equal
    assert result.transform == consensus_ta(k=1)


def test_without_optuna_it_is_said_how_to_get_it(monkeypatch, vectors, data, clip_config, clip_weights):
    monkeypatch.setitem(sys.modules, "optuna", None)
    search = CoefficientSearch(optuna=OptunaStudy({"coefficient": (0.0, 1.0)}))
    with pytest.raises(ConfigurationError) as error:
        search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, data)
    assert str(error.value) == (
        "search.optuna: expected the package optuna, got none installed. Run pip install lit-merge[optuna]."
    )


# Linearised


@dataclass(frozen=True)
class Clip(Transform):
    """Not homogeneous: what is clipped is not only scaled."""

    coefficient: float = 1.0

    def __call__(self, vectors):
        return vectors.map(self.clip, note=self)

    def clip(self, name, stack):
        return stack.clamp_(-self.coefficient, self.coefficient)


class Louder(Scale):
    """Not a scale to be relied on."""


@pytest.fixture
def many(image_folder):
    """Enough images for curves with many steps."""
    paths = {"shapes": image_folder(30, 32), "things": image_folder(20, 32)}
    return ValidationOnly(paths=paths, evaluation_batch_size=64)


@pytest.fixture
def counted(monkeypatch):
    """How many images were ``read``, and how many went through the network along a direction (``passes``)."""
    counts, read = Counter(), FileImages.read

    def counting(network, parameters, tangents, images):
        counts["passes"] += len(images)
        return linearize(network, parameters, tangents, images)

    def reading(self, indices, seeds):
        counts["read"] += len(indices)
        return read(self, indices, seeds)

    monkeypatch.setattr(lit_merge.models.linear_features, "linearize", counting)
    monkeypatch.setattr(FileImages, "read", reading)
    return counts


@pytest.fixture
def evaluated(clip_config, clip_weights, silent_trainer):
    """``evaluated(vector, data, linearized=True)``: accuracies of the module itself."""
    modules = {}

    def evaluate(vector, data, linearized=True):
        if linearized not in modules:
            modules[linearized] = MultiTaskModule(clip_config, clip_weights, linearized=linearized)
        module = modules[linearized]
        module.load_task_vector(vector)
        trainer = silent_trainer()
        trainer.validate(module, datamodule=data, verbose=False)
        return {task: float(trainer.callback_metrics[f"val/{task}/accuracy"]) for task in data.task_names}

    return evaluate


def test_a_linearised_curve_is_that_of_single_evaluations(vectors, many, counted, evaluated, clip_config, clip_weights):
    search = CoefficientSearch(values=[0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
    result = search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, many, linearized=True)
    sizes = {task: len(part.datasets["val"]) for task, part in many.tasks.items()}
    assert sizes == {"shapes": 90, "things": 60}
    assert counted == {"read": 150, "passes": 300}  # the direction, and the task's own vector
    points = [evaluated(task_arithmetic(value)(vectors).single(), many) for value in search.values]
    assert result.accuracy == points
    assert len({json.dumps(point) for point in points}) > 5
    individual = {task: evaluated(vectors.vector(task), many.subset([task]))[task] for task in vectors.tasks}
    assert result.normalised == [normalised_accuracy(point, individual) for point in points]
    counted.clear()
    finer = CoefficientSearch([0.31, 0.32, 0.3])
    again = search_coefficient(vectors, task_arithmetic(1.0), finer, clip_config, clip_weights, many, linearized=True)
    assert not counted  # everything is kept
    assert again.accuracy[2] == points[3]
    plain = search_coefficient(vectors, task_arithmetic(1.0), finer, clip_config, clip_weights, many)
    assert plain.accuracy != again.accuracy


def test_a_field_that_is_more_than_a_factor_is_evaluated_point_by_point(
    vectors, data, counted, evaluated, clip_config, clip_weights
):
    search = CoefficientSearch([0.05, 0.3, 1.0], field="coefficient")
    chain = Chain((Clip(), Sum()))
    result = search_coefficient(vectors, chain, search, clip_config, clip_weights, data, linearized=True)
    assert counted["passes"] == 0
    assert counted["read"] == 3 * (15 + 21) + 15 + 21
    points = [evaluated(Chain((Clip(value), Sum()))(vectors).single(), data) for value in search.values]
    assert result.accuracy == points
    assert len({json.dumps(point) for point in points}) == 3


def test_what_comes_before_the_factor_may_be_anything(vectors, data, counted, evaluated, clip_config, clip_weights):
    """And after it what keeps factors."""

    @dataclass(frozen=True)
    class Shifted(Transform):
        def __call__(self, vectors):
            return vectors.map(lambda name, stack: stack.add_(0.1))

    def chain(value):
        return Chain((Shifted(), Scale(value), Negate(), Mean()))

    search = CoefficientSearch([0.2, 0.9])
    result = search_coefficient(vectors, chain(0.3), search, clip_config, clip_weights, data, linearized=True)
    assert counted["read"] == 15 + 21
    points = [evaluated(chain(value)(vectors).single(), data) for value in search.values]
    assert result.accuracy == points
    assert points[0] != points[1]


def test_a_factor_among_other_fields_is_linear_too(
    vectors, data, counted, evaluated, monkeypatch, clip_config, clip_weights
):
    made = []

    class Noted(LinearFeatureCache):
        def __init__(self, network, directions, folder=None, **settings):
            made.append(list(directions))
            super().__init__(network, directions, folder, **settings)

    monkeypatch.setattr(lit_merge.models.linear_features, "LinearFeatureCache", Noted)
    transform = chain(Counted(), Sum(), Scale(0.3))
    search = CoefficientSearch(fields={"coefficient": [0.05, 0.7], "Counted.offset": [0.0, 0.2]})
    result = search_coefficient(vectors, transform, search, clip_config, clip_weights, data, linearized=True)
    assert made == [["merged", "task shapes", "task things"]] * 2  # one for every offset
    assert counted == {"read": 2 * (15 + 21), "passes": 3 * (15 + 21)}  # the single models' tangents are kept
    for point in result.points:
        factor, offset = point.fields.values()
        merged = chain(Counted(offset), Sum(), Scale(factor))(vectors).single()
        assert point.accuracy == evaluated(merged, data)
    assert len({json.dumps(point.accuracy) for point in result.points}) > 2


def test_data_that_do_not_tell_what_they_are_are_evaluated_point_by_point(
    vectors, tiny_data, tiny_tasks, evaluated, clip_config, clip_weights
):
    data = tiny_tasks({task: tiny_data(name=task, side=32, seed=len(task)) for task in vectors.tasks})
    search = CoefficientSearch([0.2, 0.9])
    settings = {"model": clip_config, "pretrained": clip_weights, "data": data, "linearized": True}
    result = search_coefficient(vectors, task_arithmetic(), search, **settings)
    assert result.accuracy == [evaluated(task_arithmetic(value)(vectors).single(), data) for value in search.values]


def test_a_task_without_a_vector_is_evaluated_as_well(vectors, data, evaluated, clip_config, clip_weights):
    one = vectors.select(["things"])
    search = CoefficientSearch([0.2, 0.9])
    result = search_coefficient(one, task_arithmetic(), search, clip_config, clip_weights, data, linearized=True)
    assert result.accuracy == [evaluated(task_arithmetic(value)(one).single(), data) for value in search.values]
    assert [list(point) for point in result.accuracy] == [["shapes", "things"]] * 2
    assert result.absolute == [point["things"] for point in result.accuracy]


def test_a_linearised_search_refuses_what_any_search_refuses(vectors, data, clip_config, clip_weights):
    header = {"base_fingerprint": "0" * 16}
    foreign = TaskVectors([TaskVector(vectors.vector(task), task, metadata=header) for task in data.tasks])
    small = TaskVectors([TaskVector({"proj": torch.zeros(2, 2)}, task) for task in data.tasks])
    for wrong, transform, values, error in (
        (foreign, task_arithmetic(), [0.5], StructureMismatchError),
        (small, task_arithmetic(), [0.5], StructureMismatchError),
        (vectors, Scale(0.5), [0.5], ConfigurationError),
        (vectors, task_arithmetic(), [float("nan")], ConfigurationError),
    ):
        search = CoefficientSearch(values)
        with pytest.raises(error):
            search_coefficient(wrong, transform, search, clip_config, clip_weights, data, linearized=True)
        with pytest.raises(error):
            search_coefficient(wrong, transform, search, clip_config, clip_weights, data)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (task_arithmetic(0.3), Chain((Sum(), Scale(1.0)))),
        (negation(0.3), Chain((Negate(), Scale(1.0)))),
        (Scale(0.3), Scale(1.0)),
        (Chain((Scale(0.3), Negate(), Mean())), Chain((Scale(1.0), Negate(), Mean()))),
        (Scale((0.3, 0.2)), None),
        (Scale({"a": 0.3}), None),
        (Clip(0.3), None),
        (Louder(0.3), None),
    ],
    ids=repr,
)
def test_which_fields_are_factors(transform, expected):
    assert direction_of(transform, "coefficient") == expected


def test_fields_beside_others():
    @dataclass(frozen=True)
    class Trim(Transform):
        density: float = 0.2

        def __call__(self, vectors):
            return vectors

    before, after = Chain((Trim(), Sum(), Scale(0.3))), Chain((Scale(0.3), Trim(), Sum()))
    assert direction_of(before, "coefficient") == Chain((Trim(), Sum(), Scale(1.0)))
    assert direction_of(before, "density") is None
    assert direction_of(after, "coefficient") is None  # a trim need not commute with a factor
    with pytest.raises(ConfigurationError, match=r"coefficient: expected exactly one step of chain\(Sum\(\)\)"):
        direction_of(Chain((Sum(),)), "coefficient")
