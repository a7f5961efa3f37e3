"""What transforms, chains and recipes refuse, and how a field is replaced."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch

from lit_merge import transforms
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.transforms import (
    RECIPES,
    Chain,
    ConsensusMask,
    Drop,
    DropByRank,
    ElectSign,
    Interpolate,
    LiNeS,
    MagnitudeWindow,
    Mean,
    Negate,
    Rescale,
    Scale,
    ScaleBlocks,
    Sum,
    TallMask,
    Transform,
    Trim,
    analogy,
    chain,
    negation,
    recipe,
    replace_field,
    task_arithmetic,
    weight_average,
)
from lit_merge.transforms.base import OWN
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
    with pytest.raises(ConfigurationError, match=r"got unknown 'bb' and nothing for 'b'\. Did you mean b\?"):
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
        ConfigurationError, match=r"the name of a method, got 'task_arithmetics'\. Did you mean task_arithmetic"
    ):
        recipe("task_arithmetics")
    with pytest.raises(ConfigurationError, match=r"got 'zzz'\."):
        recipe("zzz")
    with pytest.raises(
        ConfigurationError, match=r"fields among coefficient, got 'coeficient'\. Did you mean coefficient"
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


@pytest.mark.parametrize("transform", [Trim, MagnitudeWindow, DropByRank])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan, "0.2", True, None])
def test_a_density_is_a_fraction(transform, density):
    expected = "a fraction above 0 and at most 1" if density == 0 else "a finite number at least 0 and at most 1"
    with pytest.raises(ConfigurationError, match=rf"{transform.__name__}\.density: expected {expected}, got "):
        transform(density)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Trim(0.2, "layer"), r"Trim\.scope: expected global or tensor, got 'layer'\."),
        (lambda: MagnitudeWindow(scope=""), r"MagnitudeWindow\.scope: expected global or tensor, got ''\."),
        (
            lambda: MagnitudeWindow(0.1, 1.0),
            r"MagnitudeWindow\.outliers: expected a finite number at least 0 and below 1",
        ),
        (
            lambda: MagnitudeWindow(0.1, -0.1),
            r"MagnitudeWindow\.outliers: expected a finite number at least 0 and below",
        ),
        (
            lambda: MagnitudeWindow(0.9, 0.2),
            r"MagnitudeWindow: expected density \+ outliers of at most 1, got 0\.9 \+ 0\.2\. Lower one of them\.",
        ),
        (lambda: Drop(1.0), r"Drop\.p: expected a finite number at least 0 and below 1, got 1\.0\."),
        (lambda: Drop(-0.1), r"Drop\.p: expected a finite number at least 0 and below 1, got -0\.1\."),
        (lambda: Drop(seed=1.5), r"Drop\.seed: expected a whole number, got 1\.5\."),
        (lambda: DropByRank(seed=None), r"DropByRank\.seed: expected a whole number, got None\."),
        (
            lambda: DropByRank(0.9, 0.2),
            r"DropByRank: expected 0 < density − epsilon and density \+ epsilon ≤ 1, got 0\.9 and 0\.2\. Lower",
        ),
        (lambda: DropByRank(0.2, 0.2), r"DropByRank: expected 0 < density − epsilon .*got 0\.2 and 0\.2\."),
        (lambda: DropByRank(0.2, -0.2), r"DropByRank\.epsilon: expected a finite number at least 0, got -0\.2\."),
        (lambda: ElectSign("sum"), r"ElectSign\.weighting: expected mass or count, got 'sum'\."),
        (lambda: TallMask(-0.1), r"TallMask\.threshold: expected a finite number at least 0, got -0\.1\."),
        (lambda: TallMask({"a": "x"}), r"TallMask\.threshold\['a'\]: expected a finite number at least 0, got 'x'\."),
        (lambda: TallMask([0.2, -1]), r"TallMask\.threshold\[1\]: expected a finite number at least 0, got -1\."),
        (
            lambda: TallMask(merge=Sum),
            r"TallMask\.merge: expected a transform, got <class .*\. Pass an instance, such as",
        ),
        (lambda: ConsensusMask(merge="ties"), r"ConsensusMask\.merge: expected a transform, got 'ties'\. Pass an inst"),
        (lambda: ConsensusMask(0), r"ConsensusMask\.k: expected a whole number of at least 1, got 0\."),
        (lambda: ConsensusMask(2.0), r"ConsensusMask\.k: expected a whole number of at least 1, got 2\.0\."),
        (lambda: ConsensusMask(1, -2), r"ConsensusMask\.threshold: expected a finite number at least 0, got -2\."),
        (lambda: Rescale("l3"), r"Rescale\.norm: expected l1 or l2 or linf, got 'l3'\."),
        (lambda: Rescale(scope="row"), r"Rescale\.scope: expected global or tensor, got 'row'\."),
        (lambda: Interpolate(None), r"Interpolate\.fraction: expected a finite number, got None\."),
        (
            lambda: LiNeS("ratio"),
            r"LiNeS\.alpha: expected a finite number or norm_ratio, got 'ratio'\.",
        ),
        (lambda: LiNeS(math.inf), r"LiNeS\.alpha: expected a finite number, got inf\."),
        (lambda: LiNeS(1, "x"), r"LiNeS\.beta: expected a finite number, got 'x'\."),
        (lambda: LiNeS(1, outside=math.nan), r"LiNeS\.outside: expected a finite number, got nan\."),
        (lambda: LiNeS(1, schedule="cubic"), r"LiNeS\.schedule: expected linear or sqrt or quadratic, got 'cubic'\."),
        (
            lambda: ScaleBlocks(0.5),
            r"ScaleBlocks\.coefficients: expected one number per block, got 0\.5\. Give a list\.",
        ),
        (
            lambda: ScaleBlocks("12"),
            r"ScaleBlocks\.coefficients: expected one number per block, got '12'\. Give a list\.",
        ),
        (lambda: ScaleBlocks([1, None]), r"ScaleBlocks\.coefficients\[1\]: expected a finite number, got None\."),
        (lambda: ScaleBlocks([1], True), r"ScaleBlocks\.outside: expected a finite number, got True\."),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_shares_that_add_up_to_one_are_not_refused():
    for tenths in range(1, 10):
        assert MagnitudeWindow(tenths / 10, 1 - tenths / 10).outliers == 1 - tenths / 10
        DropByRank(1 - tenths / 20, tenths / 20)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            ConsensusMask(3),
            r"ConsensusMask\.k: expected at most the number of task vectors \(2\), got 3\. Lower k, or give more",
        ),
        (
            ConsensusMask(merge=Negate()),
            r"ConsensusMask\.merge: expected a transform that leaves one vector, got Negate\(\), which leaves 2\. Use",
        ),
        (
            TallMask(merge=chain()),
            r"TallMask\.merge: expected a transform that leaves one vector, got chain\(\), which",
        ),
        (TallMask([0.1]), r"TallMask\.threshold: expected one per task \(2: a, b\), got 1\."),
        (
            TallMask({"a": 1, "c": 1}),
            r"TallMask\.threshold: expected the tasks a, b, got unknown 'c' and nothing for 'b'",
        ),
        (ConsensusMask(1, (1, 2, 3)), r"ConsensusMask\.threshold: expected one per task \(2: a, b\), got 3\."),
        (
            LiNeS(1),
            r"LiNeS: expected parameters in numbered blocks, such as blocks\.3\.mlp\.weight, got none among 1 names\.",
        ),
        (ScaleBlocks([1]), r"ScaleBlocks: expected parameters in numbered blocks"),
        (
            chain(Sum(), Interpolate()),
            r"Interpolate: expected two vectors, got 1 \(a\+b\)\. Select two of them\.",
        ),
    ],
    ids=repr,
)
def test_vectors_that_do_not_fit_are_refused(transform, message, vectors):
    with pytest.raises(ConfigurationError, match=message):
        transform(vectors)


def test_blocks_that_do_not_fit_are_refused():
    vectors = TaskVectors([TaskVector({"blocks.1.weight": torch.ones(1)}, task) for task in "ab"])
    with pytest.raises(
        ConfigurationError,
        match=r"ScaleBlocks\.coefficients: expected one per block \(2\), got 3\. Give as many as the network has",
    ):
        ScaleBlocks([1, 2, 3])(vectors)
    with pytest.raises(
        ConfigurationError,
        match=r"LiNeS\.alpha: expected one merged vector for norm_ratio, got 2\. Reduce them first, e\.g\. with",
    ):
        LiNeS("norm_ratio")(vectors)


def test_transforms_of_this_package_are_known_by_name_and_no_others():
    exposed = {name for name in transforms.__all__ if isinstance(getattr(transforms, name), type)} - {"Override"}
    assert {*OWN} == exposed - {"Transform"}
    assert all(OWN[name] is getattr(transforms, name) for name in OWN)


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear", "breadcrumbs"])
def test_methods_that_sum_take_a_coefficient_per_task(vectors, name):
    changed = chain(*recipe(name).steps[:-2])(vectors)
    expected = changed["weight"][0] - 2 * changed["weight"][1]
    for coefficient in ([1, -2], (1.0, -2.0), {"b": -2, "a": 1}):
        merged = recipe(name, coefficient=coefficient)(vectors)
        assert merged.tasks == ("a+b",)
        assert torch.equal(merged["weight"][0], expected)
        assert recipe(name, coefficient=coefficient).steps[-1] == Sum()
    assert recipe(name, coefficient=2).steps[-2:] == (Sum(), Scale(2))


@pytest.mark.parametrize("name", ["ties", "weight_average", "consensus_ta", "tsv_m"])
def test_a_coefficient_per_task_behind_another_merge_points_at_parts(vectors, name):
    scaled = chain(recipe(name), Scale([1, -1])) if name == "weight_average" else recipe(name, coefficient=[1, -1])
    with pytest.raises(ConfigurationError, match=r"expected one number for the merged vector a\+b, got 2\. Scale"):
        scaled(vectors)
