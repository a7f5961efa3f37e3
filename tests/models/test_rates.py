"""Layer-wise learning rates, on the names of real towers."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, dataclass

import jsonargparse
import numpy as np
import pytest

from lit_merge.errors import ConfigurationError
from lit_merge.models import ExpLR, LinLR, Rates

BEFORE = ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
BEHIND = ("proj", "ln_post.weight", "ln_post.bias")
ALL_KINDS = [LinLR(), ExpLR(), ExpLR(0.9), ExpLR(1.0)]


def vit(layers):
    inside = [
        f"transformer.resblocks.{index}.{part}" for index in range(layers) for part in ("ln_1.weight", "mlp.c_fc.bias")
    ]
    return ["class_embedding", "positional_embedding", "proj", "conv1.weight", *BEFORE[3:], *inside, *BEHIND[1:]]


def refusal(action, *arguments):
    with pytest.raises(ConfigurationError) as caught:
        action(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rates", "factors"),
    [
        (LinLR(), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (ExpLR(), [0.0625, 0.125, 0.25, 0.5, 1.0]),
        (ExpLR(0.1), [1e-4, 1e-3, 1e-2, 0.1, 1.0]),
        (ExpLR(1), [1.0] * 5),
    ],
    ids=repr,
)
def test_every_parameter_has_a_factor(rates, factors):
    names = vit(5)
    given = rates(names)
    assert list(given) == names
    for index, factor in enumerate(factors):
        for part in ("ln_1.weight", "mlp.c_fc.bias"):
            assert given[f"transformer.resblocks.{index}.{part}"] == pytest.approx(factor, rel=1e-12)
    assert {given[name] for name in BEFORE} == {given["transformer.resblocks.0.ln_1.weight"]}
    assert {given[name] for name in BEHIND} == {1.0}
    assert all(type(factor) is float for factor in given.values())


def test_the_linear_rates_of_twelve_blocks():
    given = LinLR()(vit(12))
    assert all(given[f"transformer.resblocks.{index}.ln_1.weight"] == index / 11 for index in range(12))


@pytest.mark.parametrize("rates", ALL_KINDS, ids=repr)
def test_factors_grow_with_depth_and_stay_in_range(rates):
    given = rates(vit(24))
    factors = [given[f"transformer.resblocks.{index}.ln_1.weight"] for index in range(24)]
    assert factors == sorted(factors)
    assert factors[-1] == 1.0
    assert all(0 <= factor <= 1 for factor in given.values())


@pytest.mark.parametrize("rates", ALL_KINDS, ids=repr)
def test_a_single_block_moves_at_the_peak(rates):
    names = ["embeddings.weight", "blocks.0.weight", "head.weight"]
    assert rates(names) == dict.fromkeys(names, 1.0)


def test_the_stages_of_a_resnet():
    names = ["conv1.weight", *(f"layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4)), "attnpool.q_proj.weight"]
    assert list(ExpLR()(names).values()) == [0.125, 0.125, 0.25, 0.5, 1.0, 1.0]
    assert list(LinLR()(names).values()) == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("rates", ALL_KINDS, ids=repr)
def test_any_iterable_in_any_order(rates):
    names = vit(3)
    assert rates(iter(names)) == rates(tuple(names)) == rates(dict.fromkeys(names))
    assert list(rates(reversed(names))) == names[::-1]
    assert rates(reversed(names)) == rates(names)


def test_rates_need_blocks():
    assert refusal(LinLR(), ["a.weight", "b.weight", "c.weight", "d.weight"]) == (
        "LinLR(): expected a network with numbered blocks, got 4 parameters without (a.weight, b.weight, c.weight and "
        "1 more). Train it at one learning rate."
    )
    assert refusal(ExpLR(), []) == (
        "ExpLR(base=0.5): expected a network with numbered blocks, got 0 parameters without. "
        "Train it at one learning rate."
    )


@pytest.mark.parametrize("base", [0, 0.0, -0.5, 1.01, math.nan, math.inf, True, "0.5", None])
def test_bases_out_of_range(base):
    assert refusal(ExpLR, base) == f"ExpLR.base: expected a number in (0, 1], got {base!r}."


def test_a_base_from_numpy():
    assert ExpLR(np.float32(0.5))(vit(5)) == ExpLR()(vit(5))


@pytest.mark.parametrize("rates", ALL_KINDS, ids=repr)
def test_rates_pickle_print_compare_and_stay_as_they_are(rates):
    copy = pickle.loads(pickle.dumps(rates))
    assert copy == rates
    assert hash(copy) == hash(rates)
    assert eval(repr(rates)) == rates
    assert [other for other in ALL_KINDS if other == rates] == [rates]
    with pytest.raises(FrozenInstanceError):
        rates.base = 0.3


def test_rates_of_ones_own():
    @dataclass(frozen=True)
    class Half(Rates):
        def factor(self, block, last):
            return 1.0 if block == last else 0.5

    assert Half()(["conv1.weight", "blocks.0.w", "blocks.1.w", "norm.weight"]) == {
        "conv1.weight": 0.5,
        "blocks.0.w": 0.5,
        "blocks.1.w": 1.0,
        "norm.weight": 1.0,
    }
    with pytest.raises(TypeError, match="abstract"):
        Rates()


def parser():
    result = jsonargparse.ArgumentParser(exit_on_error=False)
    result.add_argument("--rates", type=Rates | None, default=None)
    return result


@pytest.mark.parametrize("rates", [*ALL_KINDS, None], ids=repr)
def test_configuration_files(rates):
    config = {"rates": None}
    if rates is not None:
        config = {"rates": {"class_path": f"lit_merge.models.{type(rates).__name__}", "init_args": vars(rates)}}
    parsed = parser().parse_object(config)
    assert parser().instantiate_classes(parsed).rates == rates
    written = parser().dump(parsed)
    assert parser().instantiate_classes(parser().parse_string(written)).rates == rates


def test_command_line():
    parsed = parser().parse_args(["--rates=lit_merge.models.ExpLR", "--rates.base=0.8"])
    assert parser().instantiate_classes(parsed).rates == ExpLR(0.8)


def test_the_blocks_of_a_decoder_are_deeper_than_those_of_the_encoder():
    names = [*(f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in (0, 1)), "encoder.final_layer_norm.weight"]
    names += [f"decoder.block.{i}.layer.1.EncDecAttention.q.weight" for i in (0, 1, 2)]
    names += ["decoder.embed_tokens.weight", "decoder.final_layer_norm.weight", "lm_head.weight"]
    assert list(LinLR()(names).values()) == [0, 1 / 4, 1 / 4, 2 / 4, 3 / 4, 1, 0, 1, 1]
