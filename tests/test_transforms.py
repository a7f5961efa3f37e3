"""What transforms, chains and recipes refuse, and how a field is replaced."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.transforms import (
    RECIPES,
    Chain,
    Mean,
    Negate,
    Scale,
    Sum,
    Transform,
    analogy,
    chain,
    negation,
    recipe,
    replace_field,
    task_arithmetic,
    weight_average,
)
from lit_merge.vectors import TaskVector, TaskVectors


@dataclass(frozen=True)
class Clip(Transform):
    """The example of a transform in ``transforms/base.py``."""

    limit: float = 1.0

    def __post_init__(self) -> None:
        self._number("limit", minimum=0.0)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        return vectors.map(self._clip, note=self)

    def _clip(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        return stack.clamp_(-self.limit, self.limit)


@pytest.fixture
def vectors() -> TaskVectors:
    return TaskVectors(
        [TaskVector({"weight": torch.tensor([1.0, -4.0]) * (i + 1)}, task) for i, task in enumerate("ab")]
    )


def test_a_transform_of_ones_own(vectors):
    assert chain(Clip(2), Sum())(vectors)["weight"].tolist() == [[3.0, -4.0]]
    assert vectors["weight"].tolist() == [[1.0, -4.0], [2.0, -8.0]]
    assert repr(Clip(2)) == "Clip(limit=2.0)"
    assert Clip(2).to_config()["class_path"] == f"{__name__}.Clip"
    with pytest.raises(ConfigurationError, match=r"Clip\.limit: expected a finite number at least 0, got -1"):
        Clip(-1)


def test_chains_are_flat_and_frozen():
    nested = chain(chain(Sum()), Chain([Chain([Scale(2)])]))
    assert nested == chain(Sum(), Scale(2.0))
    assert repr(nested) == "chain(Sum(), Scale(coefficient=2.0))"
    with pytest.raises(FrozenInstanceError):
        nested.steps = ()
    with pytest.raises(TypeError, match="cannot be changed"):
        Scale({"a": 1.0}).coefficient["a"] = 2.0


@pytest.mark.parametrize("step", [Sum, "Sum()", None, lambda vectors: vectors])
def test_a_chain_refuses_what_is_no_transform(step):
    with pytest.raises(ConfigurationError, match=r"Chain\.steps: expected transforms, got .*Pass instances"):
        chain(Sum(), step)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.3", None, True])
def test_scale_refuses_what_is_no_number(value):
    with pytest.raises(ConfigurationError, match=r"Scale\.coefficient: expected a finite number, got"):
        Scale(value)
    with pytest.raises(ConfigurationError, match=r"Scale\.coefficient\[1\]: expected a finite number, got"):
        Scale([1.0, value])
    with pytest.raises(ConfigurationError, match=r"Scale\.coefficient\['a'\]: expected a finite number, got"):
        Scale({"a": value})


def test_scale_refuses_coefficients_that_do_not_fit_the_tasks(vectors):
    with pytest.raises(ConfigurationError, match=r"expected one per task \(2: a, b\), got 3"):
        Scale([1, 2, 3])(vectors)
    with pytest.raises(ConfigurationError, match=r"expected the tasks a, b, got nothing for 'b'\. Name every task"):
        Scale({"a": 1})(vectors)
    with pytest.raises(ConfigurationError, match=r"got unknown 'bb' and nothing for 'b'\. Did you mean 'b'\?"):
        Scale({"a": 1, "bb": 1})(vectors)


def test_map_refuses_another_shape_or_dtype_on_access(vectors):
    with pytest.raises(
        StructureMismatchError, match=r"half: expected torch.float32 \(2, 2\) for weight, got torch.float16"
    ):
        vectors.map(lambda name, stack: stack.half(), note="half")["weight"]
    with pytest.raises(StructureMismatchError, match=r"function: expected .*\(2, 2\) for weight, got .*\(1, 2\)"):
        vectors.map(lambda name, stack: stack[:1])["weight"]


def test_recipes_by_name():
    for name in ("task_arithmetic", "weight_average", "negation", "analogy"):
        assert recipe(name) == RECIPES[name]()
    assert recipe("task_arithmetic", coefficient=0.5) == task_arithmetic(0.5) == chain(Sum(), Scale(0.5))
    assert weight_average() == chain(Mean())
    assert negation(2) == chain(Negate(), Scale(2))
    assert analogy() == chain(Scale((-1, 1, 1)), Sum())


@pytest.mark.parametrize("name", ["task_arithmetic", "negation", "analogy"])
def test_recipes_are_built_from_a_config(name):
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=Transform)
    config = {"class_path": f"lit_merge.transforms.{name}", "init_args": {"coefficient": 0.4}}
    built = parser.instantiate_classes(parser.parse_object({"transform": config})).transform
    assert built == recipe(name, coefficient=0.4)


def test_recipe_suggests_the_nearest_name():
    with pytest.raises(
        ConfigurationError, match=r"expected one of .*got 'task_arithmetics'\. Did you mean 'task_arithmetic'"
    ):
        recipe("task_arithmetics")
    with pytest.raises(ConfigurationError, match=r"got 'zzz'\. Use one of these"):
        recipe("zzz")
    with pytest.raises(
        ConfigurationError, match=r"fields among coefficient, got 'coeficient'\. Did you mean 'coefficient'"
    ):
        recipe("task_arithmetic", coeficient=1.0)
    with pytest.raises(ConfigurationError, match=r"fields among none, got 'coefficient'"):
        recipe("weight_average", coefficient=1.0)


def test_replace_field():
    assert replace_field(task_arithmetic(), "coefficient", 0.5) == task_arithmetic(0.5)
    assert replace_field(negation(), "coefficient", 0.5) == negation(0.5)
    assert replace_field(Scale(1), "coefficient", 0.5) == Scale(0.5)
    two = chain(Scale(1), Sum(), Scale(2))
    assert replace_field(two, "coefficient", 3, step=2) == chain(Scale(1), Sum(), Scale(3))
    with pytest.raises(ConfigurationError, match=r"got 2 \(steps 0, 2; choose with step=…\)"):
        replace_field(two, "coefficient", 3)
    with pytest.raises(ConfigurationError, match=r"expected exactly one step of chain\(Mean\(\)\).*got none"):
        replace_field(weight_average(), "coefficient", 3)
    with pytest.raises(ConfigurationError, match=r"expected a value of the kind of \(-1.0, 1.0, 1.0\).*got 0.3"):
        replace_field(analogy(), "coefficient", 0.3)
    with pytest.raises(ConfigurationError, match="finite number"):
        replace_field(task_arithmetic(), "coefficient", math.nan)


def test_to_config_refuses_what_is_not_plain():
    @dataclass(frozen=True)
    class Holding(Transform):
        item: object = None

        def __call__(self, vectors: TaskVectors) -> TaskVectors:
            return vectors

    assert Holding(math.sqrt).to_config()["init_args"] == {"item": "math.sqrt"}
    for item in (torch.zeros(1), lambda: None, Path("x")):
        with pytest.raises(ConfigurationError, match="to_config: expected numbers"):
            Holding(item).to_config()
