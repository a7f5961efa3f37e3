"""Laws that every transform obeys. A new transform is one more line in CASES."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
import torch

from lit_merge import transforms
from lit_merge.errors import LitMergeError
from lit_merge.transforms import (
    Chain,
    Mean,
    Negate,
    Scale,
    Sum,
    Transform,
    analogy,
    chain,
    negation,
    task_arithmetic,
    weight_average,
)
from lit_merge.vectors import TaskVector, TaskVectors

TASKS = ("digits", "letters", "signs")
SHAPES = {"block.0.weight": (4, 3), "block.0.bias": (4,), "scalar": (), "empty": (0, 3), "single": (1, 1)}


@dataclass(frozen=True)
class Case:
    transform: Transform
    reduces: bool = False  # T vectors become one
    order_free: bool = True  # permuting the tasks permutes the rows (or changes nothing, for a reducer)
    single: bool = True  # accepts T = 1
    identity_at_one: bool = False  # T = 1 gives the input back
    label: str = field(default="", compare=False)


CASES = [
    Case(Sum(), reduces=True, identity_at_one=True),
    Case(Mean(), reduces=True, identity_at_one=True),
    Case(Negate()),
    Case(Scale(0.3)),
    Case(Scale(1.0), identity_at_one=True),
    Case(Scale((1.0, -2.0, 0.5)), order_free=False, single=False),
    Case(Scale({"digits": 1.0, "signs": -2.0, "letters": 0.5}), single=False),
    Case(chain(), identity_at_one=True),
    Case(chain(Scale(0.5), Mean(), Negate()), reduces=True),
    Case(task_arithmetic(), reduces=True),
    Case(weight_average(), reduces=True, identity_at_one=True),
    Case(negation(0.7)),
    Case(analogy(), reduces=True, order_free=False, single=False),
]
NEUTRAL = [chain(), Scale(1.0), Scale((1, 1, 1)), Scale(dict.fromkeys(TASKS, 1)), chain(Negate(), Negate())]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.transform))


def make_vectors(dtype: torch.dtype = torch.float32, tasks: tuple[str, ...] = TASKS) -> list[TaskVector]:
    vectors = []
    for task in tasks:
        generator = torch.Generator().manual_seed(sum(task.encode()))
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in SHAPES.items()
        }
        vectors.append(TaskVector(tensors, task, metadata={"base_fingerprint": "0123456789abcdef"}))
    return vectors


def assert_same(first: TaskVectors, second: TaskVectors) -> None:
    assert sorted(first.names) == sorted(second.names)  # a file has its names sorted
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_every_public_transform_has_a_case() -> None:
    public = [getattr(transforms, name) for name in transforms.__all__]
    classes = {item for item in public if isinstance(item, type) and issubclass(item, Transform)} - {Transform}
    steps = {type(step) for case in CASES for step in getattr(case.transform, "steps", ())}
    assert classes <= steps | {type(case.transform) for case in CASES}


@every_case
def test_names_shapes_and_tasks(case: Case) -> None:
    vectors = TaskVectors(make_vectors())
    result = case.transform(vectors)
    assert result.names == vectors.names == tuple(SHAPES)
    rows = 1 if case.reduces else len(TASKS)
    assert result.tasks == (("digits+letters+signs",) if case.reduces else TASKS)
    assert result.base_fingerprint == vectors.base_fingerprint
    for name, shape in SHAPES.items():
        assert result.shape(name) == result[name].shape == (rows, *shape)
        assert torch.isfinite(result[name]).all()


@every_case
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtype_is_at_least_float32(case: Case, given: torch.dtype, expected: torch.dtype) -> None:
    result = case.transform(TaskVectors(make_vectors(given)))
    assert {result[name].dtype for name in result} == {result.dtype(name) for name in result} == {expected}


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_is_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    half = make_vectors(dtype)
    full = [TaskVector({name: vector[name].float() for name in vector}, vector.task) for vector in half]
    assert_same(case.transform(TaskVectors(half)), case.transform(TaskVectors(full)))


@every_case
def test_input_is_not_mutated(case: Case) -> None:
    inputs, untouched = make_vectors(), make_vectors()
    vectors = TaskVectors(inputs)
    result = case.transform(vectors)
    for name in result:
        result[name].fill_(7.0)
    for vector, reference in zip(inputs, untouched, strict=True):
        for name in reference:
            assert torch.equal(vector[name], reference[name])
    assert vectors.tasks == TASKS
    assert_same(vectors, TaskVectors(untouched))


@every_case
def test_every_access_gives_the_same_values(case: Case) -> None:
    result = case.transform(TaskVectors(make_vectors()))
    first = {name: result[name].clone() for name in result}
    for name in reversed(result.names):
        result[name].zero_()
        assert torch.equal(result[name], first[name])


@every_case
def test_task_order_does_not_matter(case: Case) -> None:
    if not case.order_free:
        pytest.skip("declared to depend on the order")
    order = [2, 0, 1]
    vectors = make_vectors()
    result = case.transform(TaskVectors(vectors))
    permuted = case.transform(TaskVectors([vectors[index] for index in order]))
    for name in result:
        expected = result[name] if case.reduces else result[name][order]
        torch.testing.assert_close(permuted[name], expected, rtol=1e-6, atol=1e-6)


@every_case
def test_one_task(case: Case) -> None:
    one = TaskVectors(make_vectors(tasks=TASKS[:1]))
    if not case.single:
        with pytest.raises(LitMergeError, match="expected"):
            case.transform(one)
        return
    result = case.transform(one)
    assert result.tasks == TASKS[:1]
    assert {name: tuple(result.single()[name].shape) for name in result} == SHAPES
    if case.identity_at_one:
        assert_same(result, one)


@pytest.mark.parametrize("transform", NEUTRAL, ids=repr)
def test_neutral_settings_are_the_identity(transform: Transform) -> None:
    vectors = TaskVectors(make_vectors())
    assert_same(transform(vectors), vectors)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_disk_equals_in_memory_bit_for_bit(case: Case, dtype: torch.dtype, tmp_path) -> None:
    vectors = make_vectors(dtype)
    for vector in vectors:
        vector.save(tmp_path / f"{vector.task}.safetensors")
    stored = [TaskVector.load(tmp_path / f"{task}.safetensors", verify=True) for task in TASKS]
    assert_same(case.transform(TaskVectors(stored)), case.transform(TaskVectors(vectors)))


@every_case
def test_prints_compares_hashes_and_pickles(case: Case) -> None:
    transform = case.transform
    rebuilt = eval(repr(transform), {name: getattr(transforms, name) for name in transforms.__all__})
    copied = pickle.loads(pickle.dumps(transform))
    for other in (rebuilt, copied):
        assert other == transform
        assert type(other) is type(transform)
        assert hash(other) == hash(transform)
        assert repr(other) == repr(transform)
    assert sum(transform == other.transform for other in CASES) == 1


@every_case
def test_the_result_pickles(case: Case) -> None:
    result = case.transform(TaskVectors(make_vectors()))
    assert_same(pickle.loads(pickle.dumps(result)), result)


@every_case
def test_config_round_trip(case: Case) -> None:
    import jsonargparse
    import yaml

    config = yaml.safe_load(yaml.safe_dump(case.transform.to_config()))
    assert config["class_path"].startswith("lit_merge.transforms.")
    assert config["class_path"].count(".") == 2
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=Transform)
    built = parser.instantiate_classes(parser.parse_object({"transform": config})).transform
    assert built == case.transform


@every_case
def test_provenance_names_inputs_and_every_step(case: Case) -> None:
    result = case.transform(TaskVectors(make_vectors()))
    steps = case.transform.steps if isinstance(case.transform, Chain) else (case.transform,)
    assert result.provenance == (*(f"TaskVector(task={task!r})" for task in TASKS), *map(repr, steps))
