"""Choosing a coefficient: on validation data alone, by what the curve says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

import lit_merge.linear_features
import lit_merge.search
from lit_merge.data import MultiTaskDataModule
from lit_merge.data.datasets import FileImages
from lit_merge.errors import ConfigurationError, DataError, StructureMismatchError
from lit_merge.functional import linearize
from lit_merge.merging import merge
from lit_merge.models import load_clip, zero_shot_weights
from lit_merge.modules import MultiTaskModule
from lit_merge.search import CoefficientSearch, direction_of, normalised_accuracy, search_coefficient
from lit_merge.transforms import Chain, Mean, Negate, Scale, Sum, Transform, negation, task_arithmetic
from lit_merge.vectors import TaskVector, TaskVectors

GRID = [0.6, 0.0, 1.0, 0.3, 0.8]


@pytest.fixture
def base(clip_config, clip_weights, own_cache):
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
CURVE = {0.2: {"shapes": 0.5, "things": 0.6}, 0.4: {"shapes": 0.3, "things": 0.9}, 0.6: {"shapes": 0.1, "things": 0.2}}


@pytest.fixture
def scripted(monkeypatch):
    """Validation gives :data:`INDIVIDUAL`, then :data:`CURVE`."""
    answers = [*({task: value} for task, value in INDIVIDUAL.items()), *CURVE.values()]
    asked = []

    def validate(module, data):
        asked.append(data.task_names)
        return answers[len(asked) - 1]

    monkeypatch.setattr(lit_merge.search, "_validate", validate)
    return asked


@pytest.mark.parametrize(("criterion", "best"), [("normalised", 0.2), ("absolute", 0.4)])
def test_the_criterion_decides(criterion, best, scripted, vectors, data, clip_config, clip_weights):
    search = CoefficientSearch(list(CURVE), criterion=criterion)
    result = search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, data)
    assert result.normalised == pytest.approx([0.8, 0.75, 0.2])
    assert result.absolute == pytest.approx([0.55, 0.6, 0.15])
    assert (result.best, result.criterion) == (best, criterion)
    assert scripted == [("shapes",), ("things",), *[("shapes", "things")] * 3]


def test_normalised_accuracy_by_hand():
    assert normalised_accuracy({"a": 0.45, "b": 0.6}, {"a": 0.9, "b": 0.8}) == pytest.approx((0.5 + 0.75) / 2)
    assert normalised_accuracy({"a": 0.9}, {"a": 0.6, "b": 0.0}) == pytest.approx(1.5)
    with pytest.raises(DataError, match="got 0 for b"):
        normalised_accuracy({"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.0})


def test_the_default_grid_is_the_papers():
    assert CoefficientSearch().values == [round(number / 20, 2) for number in range(21)]


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
    assert curve["accuracy"] == list(CURVE.values())
    assert curve["normalised"] == result.search.normalised
    with safe_open(result.output, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["search"]) == curve
    assert header["transform"] == repr(task_arithmetic(0.2))


def test_searches_that_make_no_sense_are_refused(vectors, data, clip_config, clip_weights):
    for settings, part in (
        ({"values": []}, "search.values: expected at least one value, got none"),
        ({"criterion": "normalized"}, "search.criterion: expected normalised or absolute, got 'normalized'"),
    ):
        with pytest.raises(ConfigurationError) as error:
            CoefficientSearch(**settings)
        assert part in str(error.value)
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

    monkeypatch.setattr(lit_merge.linear_features, "linearize", counting)
    monkeypatch.setattr(FileImages, "read", reading)
    return counts


@pytest.fixture
def evaluated(clip_config, clip_weights, silent_trainer):
    """``evaluated(vector, data)``: accuracies of the linearised module itself."""
    module = MultiTaskModule(clip_config, clip_weights, linearized=True)

    def evaluate(vector, data):
        module.load_task_vector(vector)
        trainer = silent_trainer()
        trainer.validate(module, datamodule=data, verbose=False)
        return {task: float(trainer.callback_metrics[f"val/{task}/accuracy"]) for task in data.task_names}

    return evaluate


def test_a_linearised_curve_is_that_of_single_evaluations(vectors, many, counted, evaluated, clip_config, clip_weights):
    search = CoefficientSearch()
    result = search_coefficient(vectors, task_arithmetic(), search, clip_config, clip_weights, many, linearized=True)
    sizes = {task: len(part.datasets["val"]) for task, part in many.tasks.items()}
    assert sizes == {"shapes": 90, "things": 60}
    assert counted == {"read": 150, "passes": 300}  # the direction, and the task's own vector
    points = [evaluated(task_arithmetic(value)(vectors).single(), many) for value in search.values]
    assert result.accuracy == points
    assert len({json.dumps(point) for point in points}) > 10
    individual = {task: evaluated(vectors.vector(task), many.subset([task]))[task] for task in vectors.tasks}
    assert result.normalised == [normalised_accuracy(point, individual) for point in points]
    counted.clear()
    finer = CoefficientSearch([0.31, 0.32, 0.3])
    again = search_coefficient(vectors, task_arithmetic(1.0), finer, clip_config, clip_weights, many, linearized=True)
    assert not counted  # everything is kept
    assert again.accuracy[2] == points[6]
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
    assert direction_of(Chain((Sum(),)), "coefficient") is None
