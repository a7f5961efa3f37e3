"""Other transforms for some of the parameters."""

from __future__ import annotations

import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    DisjointMean,
    ElectSign,
    LiNeS,
    Mean,
    Negate,
    Override,
    Rescale,
    Scale,
    Sum,
    Transform,
    Trim,
    WithOverrides,
    chain,
    ties,
)
from lit_merge.vectors import TaskVector, TaskVectors

NAMES = (
    *("conv1.weight", "blocks.0.attn.weight", "blocks.0.mlp.weight", "blocks.0.ln.bias"),
    *("blocks.1.attn.weight", "blocks.1.mlp.weight", "blocks.1.ln.bias", "ln_post.bias"),
)


@pytest.fixture
def vectors() -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    return TaskVectors(
        [TaskVector({name: torch.randn(20, generator=generator) for name in NAMES}, task) for task in ("a", "b", "c")]
    )


def factors(result: TaskVectors, vectors: TaskVectors) -> dict[str, float]:
    found = {name: result[name] / vectors[name] for name in vectors}
    for name, ratio in found.items():
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), msg=name)
    return {name: round(float(ratio[0, 0]), 5) for name, ratio in found.items()}


def test_the_first_override_that_fits_counts(vectors):
    transform = WithOverrides(
        Scale(2),
        [Override(Scale(3), names=r"\.attn\."), Override(Scale(4), blocks=[1]), Override(Scale(5), names="bias$")],
    )
    assert factors(transform(vectors), vectors) == {
        "conv1.weight": 2,
        "blocks.0.attn.weight": 3,
        "blocks.0.mlp.weight": 2,
        "blocks.0.ln.bias": 5,
        "blocks.1.attn.weight": 3,
        "blocks.1.mlp.weight": 4,
        "blocks.1.ln.bias": 4,
        "ln_post.bias": 5,
    }
    assert transform(vectors).names == vectors.names


def test_names_and_blocks_must_both_fit(vectors):
    transform = WithOverrides(chain(), [Override(Negate(), names="weight", blocks=(0,))])
    negated = [name for name, factor in factors(transform(vectors), vectors).items() if factor == -1]
    assert negated == ["blocks.0.attn.weight", "blocks.0.mlp.weight"]


def test_every_part_ranks_its_own_parameters(vectors):
    """A tenth of the biases, half of the rest: not a tenth and a half of everything."""
    result = WithOverrides(Trim(0.5), [Override(Trim(0.1), names="bias")])(vectors)
    biases = [name for name in NAMES if "bias" in name]
    weights = [name for name in NAMES if "bias" not in name]
    for part, density in ((biases, 0.1), (weights, 0.5)):
        kept = sum(result[name].count_nonzero(dim=1) for name in part)
        assert kept.tolist() == [int(density * 20 * len(part))] * 3
        alone = Trim(density)(vectors.restrict(part))
        for name in part:
            assert torch.equal(result[name], alone[name])
    assert [one.what for one in result.statistics] == ["Trim: threshold", "Trim: threshold"]


def test_the_majority_sign_is_that_of_the_part():
    vectors = TaskVectors(
        [
            TaskVector({"x": torch.tensor([1.0, 1.0, 1.0, 1.0]), "y": torch.tensor([2.0, -1.0])}, "a"),
            TaskVector({"x": torch.tensor([1.0, 1.0, 1.0, 1.0]), "y": torch.tensor([-2.0, -1.0])}, "b"),
        ]
    )
    elect = chain(ElectSign(), DisjointMean())
    assert elect(vectors)["y"].tolist() == [[2, -1]]
    assert WithOverrides(elect, [Override(elect, names="y")])(vectors)["y"].tolist() == [[-2, -1]]


def test_scaling_by_depth_sees_the_whole_network(vectors):
    result = WithOverrides(Scale(3), [Override(LiNeS(0.5, 1.0), names="attn")])(vectors)
    found = factors(result, vectors)
    assert (found["blocks.0.attn.weight"], found["blocks.1.attn.weight"], found["conv1.weight"]) == (0.5, 1.5, 3)


def test_parts_know_their_own_inputs(vectors):
    result = WithOverrides(chain(Mean(), Rescale()), [Override(chain(Sum(), Rescale()), names="bias")])(vectors)
    biases = vectors.restrict([name for name in NAMES if "bias" in name])
    for name in biases:
        torch.testing.assert_close(result[name], chain(Sum(), Rescale())(biases)[name])


def test_nested_in_a_chain_and_in_each_other(vectors):
    inner = WithOverrides(Scale(2), [Override(Scale(3), names="attn")])
    outer = WithOverrides(Scale(5), [Override(chain(inner, Scale(10)), blocks=[0, 1])])
    found = factors(chain(outer, Negate())(vectors), vectors)
    assert (found["conv1.weight"], found["blocks.0.attn.weight"], found["blocks.1.mlp.weight"]) == (-5, -30, -20)


def test_all_parameters_overridden(vectors):
    result = WithOverrides(Scale(7), [Override(Sum(), names="weight"), Override(Mean(), names="")])(vectors)
    assert result.tasks == ("a+b+c",)
    torch.testing.assert_close(result["ln_post.bias"], vectors["ln_post.bias"].mean(0, keepdim=True))


def test_settings_are_frozen_plain_data():
    transform = WithOverrides(ties(0.5), [Override(Trim(1), names="attn", blocks=[0, 2])])
    assert transform.overrides == (Override(Trim(1.0), "attn", (0, 2)),)
    assert transform.to_config()["init_args"]["overrides"] == [
        {
            "transform": {"class_path": "lit_merge.transforms.Trim", "init_args": {"density": 1.0, "scope": "global"}},
            "names": "attn",
            "blocks": [0, 2],
        }
    ]
    assert "<" not in repr(transform)


def test_from_a_configuration_file(vectors):
    """Class names and plain values, as one writes them by hand."""
    import jsonargparse
    import yaml

    config = yaml.safe_load(
        """
        class_path: lit_merge.transforms.WithOverrides
        init_args:
          transform: {class_path: lit_merge.transforms.Scale, init_args: {coefficient: 2}}
          overrides:
            - names: attn
              transform: {class_path: lit_merge.transforms.Negate}
            - blocks: [1]
              transform: {class_path: lit_merge.transforms.Scale, init_args: {coefficient: 3}}
        """
    )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=Transform)
    built = parser.instantiate_classes(parser.parse_object({"transform": config})).transform
    assert built == WithOverrides(Scale(2), [Override(Negate(), names="attn"), Override(Scale(3), blocks=[1])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transform": Sum}, r"Override\.transform: expected a transform, got <class .*Pass an instance"),
        ({"transform": Sum()}, r"Override: expected names or blocks, got neither\. Say which parameters are meant\."),
        ({"names": "("}, r"Override\.names: expected a regular expression, got '\(' \(missing \), .*"),
        ({"names": 3}, r"Override\.names: expected a regular expression, got 3 \("),
        ({"blocks": []}, r"Override\.blocks: expected a list of block indices, got \[\]\. Use e\.g\. \[0, 1, 2\]\."),
        ({"blocks": 3}, r"Override\.blocks: expected a list of block indices, got 3\."),
        ({"blocks": "01"}, r"Override\.blocks: expected a list of block indices, got '01'\."),
        ({"blocks": [0, -1]}, r"Override\.blocks: expected a whole number of at least 0, got -1\."),
        ({"blocks": [True]}, r"Override\.blocks: expected a whole number of at least 0, got True\."),
    ],
)
def test_an_override_refuses(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Override(**{"transform": Sum(), **arguments})


def test_with_overrides_refuses_what_is_no_transform_or_override():
    with pytest.raises(
        ConfigurationError, match=r"WithOverrides\.transform: expected a transform, got 'ties'\. Pass an"
    ):
        WithOverrides("ties", [])
    one = Override(Sum(), names="x")
    for wrong, got in (
        (one, r"Override\("),
        ([one, Sum()], r"\[Override\(.*Sum\(\)\]"),
        ("ab", "'ab'"),
        (None, "None"),
    ):
        with pytest.raises(
            ConfigurationError,
            match=rf"WithOverrides\.overrides: expected a list of overrides, got {got}.*\. Use \[Over",
        ):
            WithOverrides(Sum(), wrong)


def test_application_refuses_overrides_that_do_not_fit(vectors):
    with pytest.raises(
        ConfigurationError,
        match=r"Override: expected at least one parameter for Override\(.*names='atn'.*got none of 8 \(such as conv1\.w"
        r".* and 6 more\)\. Correct the pattern, or the order of the overrides\.",
    ):
        WithOverrides(Sum(), [Override(Sum(), names="atn")])(vectors)
    with pytest.raises(ConfigurationError, match=r"Override: expected at least one parameter .*order of the overrides"):
        WithOverrides(Sum(), [Override(Sum(), blocks=[0]), Override(Sum(), names=r"blocks\.0\.attn")])(vectors)
    with pytest.raises(
        ConfigurationError,
        match=r"Override\.blocks: expected indices below the number of blocks \(2\), got 2, 7\. Blocks are",
    ):
        WithOverrides(Sum(), [Override(Sum(), blocks=[1, 2, 7])])(vectors)
    with pytest.raises(
        ConfigurationError,
        match=r"WithOverrides\(.*: expected parts with the same number of vectors, got 1 and 3\. Let",
    ):
        WithOverrides(Sum(), [Override(Negate(), names="attn")])(vectors)
