"""Which parameters train, on the names of real towers."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import jsonargparse
import open_clip
import pytest
import torch

import lit_merge
from lit_merge.errors import ConfigurationError
from lit_merge.models import All, Attention, LastBlocks, Matching, Selection
from lit_merge.naming import is_attention, is_bias, is_mlp

BEFORE = ("class_embedding", "positional_embedding")
STEM = ("conv1.weight", "ln_pre.weight", "ln_pre.bias")
BEHIND = ("ln_post.weight", "ln_post.bias")
NORMS = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
ATTENTION = ("attn.in_proj_weight", "attn.out_proj.weight")
ATTENTION_BIASES = ("attn.in_proj_bias", "attn.out_proj.bias")
MLP = ("mlp.c_fc.weight", "mlp.c_proj.weight")
MLP_BIASES = ("mlp.c_fc.bias", "mlp.c_proj.bias")
BLOCK = (
    *("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"),
    *("attn.out_proj.bias", "ln_2.weight", "ln_2.bias"),
    *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)
RESNET = (
    *("conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.0.bn1.weight"),
    *("layer2.0.conv1.weight", "layer3.0.conv1.weight", "layer4.0.conv1.weight", "layer4.0.downsample.0.weight"),
    *("attnpool.positional_embedding", "attnpool.q_proj.weight", "attnpool.c_proj.bias"),
)
MLP_OF_ONES_OWN = ("first.weight", "first.bias", "second.weight", "second.bias")
ALL_KINDS = [
    All(),
    Attention(),
    Attention(4),
    LastBlocks(2),
    LastBlocks(fraction=0.5),
    LastBlocks(count=1, behind=False),
    Matching(r"mlp\.c_fc"),
]


def blocks(indices, parts=BLOCK):
    return tuple(f"transformer.resblocks.{index}.{part}" for index in indices for part in parts)


def vit(layers):
    """The names of open_clip's vision transformers, in their order."""
    return (*BEFORE, "proj", *STEM, *blocks(range(layers)), *BEHIND)


LIT_TINY = vit(6)
VIT_B_32 = vit(12)
CONVNEXT = ("trunk.stem.0.weight", *(f"trunk.stages.{n}.blocks.0.mlp.fc1.weight" for n in range(4)), "head.proj.weight")


def in_order_of(names, chosen):
    return tuple(name for name in names if name in set(chosen))


def refusal(action, *arguments, **settings):
    with pytest.raises(ConfigurationError) as caught:
        action(*arguments, **settings)
    return str(caught.value)


def test_the_names_are_those_of_lit_tiny():
    config = json.loads((Path(lit_merge.__file__).parent / "models/assets/lit-tiny.json").read_text())
    with torch.device("meta"):
        visual = open_clip.CLIP(**config).visual
    assert tuple(name for name, _ in visual.named_parameters()) == LIT_TINY


@pytest.mark.parametrize("names", [LIT_TINY, VIT_B_32, RESNET, MLP_OF_ONES_OWN], ids=["tiny", "B-32", "ResNet", "own"])
def test_all(names):
    assert All()(names) == names


@pytest.mark.parametrize(
    ("paradigm", "parts", "tensors"),
    [
        (1, ATTENTION, 24),
        (2, ATTENTION + ATTENTION_BIASES, 48),
        (3, ATTENTION + MLP, 48),
        (4, ATTENTION + ATTENTION_BIASES + MLP + MLP_BIASES, 96),
    ],
)
def test_the_paradigms_of_jin_et_al(paradigm, parts, tensors):
    assert Attention(paradigm)(LIT_TINY) == in_order_of(LIT_TINY, blocks(range(6), parts))
    selected = Attention(paradigm)(VIT_B_32)
    assert selected == in_order_of(VIT_B_32, blocks(range(12), parts))
    assert len(selected) == tensors


def test_paradigm_1_is_the_default():
    assert Attention() == Attention(1) != Attention(2)


def test_attention_of_other_namings():
    eva = ["attn.q_proj.weight", "attn.q_proj.bias", "attn.norm.weight", "mlp.fc1_g.weight", "mlp.norm.weight"]
    eva = [f"trunk.blocks.0.{part}" for part in eva] + ["trunk.norm.weight", "trunk.attn_pool.kv.weight"]
    assert Attention(1)(eva) == (eva[0],)
    assert Attention(2)(eva) == tuple(eva[:2])
    assert Attention(3)(eva) == (eva[0], eva[3])


@pytest.mark.parametrize("paradigm", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("names", "found"),
    [
        (RESNET, "12 parameters (conv1.weight, bn1.weight, bn1.bias and 9 more)"),
        (CONVNEXT, f"6 parameters ({', '.join(CONVNEXT[:3])} and 3 more)"),
        (MLP_OF_ONES_OWN, "4 parameters (first.weight, first.bias, second.weight and 1 more)"),
        ((), "0 parameters"),
    ],
    ids=["ResNet", "ConvNeXt", "own", "nothing"],
)
def test_attention_needs_attention(paradigm, names, found):
    assert refusal(Attention(paradigm), names) == (
        f"attention paradigm {paradigm}: expected a network with attention blocks, got {found} without. "
        "Choose another selection, e.g. Matching."
    )


@pytest.mark.parametrize("paradigm", [3, 4])
def test_feed_forward_layers_that_names_do_not_show_are_not_skipped(paradigm):
    names = [f"encoder.layer.0.{part}.weight" for part in ("attention.attention.query", "inner.dense")]
    assert Attention(1)(names) == (names[0],)
    assert refusal(Attention(paradigm), names) == (
        f"attention paradigm {paradigm}: expected a network with feed-forward blocks, got 2 parameters "
        f"({names[0]}, {names[1]}) without. Choose another selection, e.g. Matching."
    )


# What every language model's blocks call their projections, and what stands beside them.
BLOCKS = {
    "bert.encoder.layer.0.": (
        [*(f"attention.self.{part}" for part in ("query", "key", "value")), "attention.output.dense"],
        ["intermediate.dense", "output.dense"],
        ["attention.output.LayerNorm", "output.LayerNorm"],
    ),
    "transformer.layer.1.": (
        [f"attention.{part}_lin" for part in ("q", "k", "v", "out")],
        ["ffn.lin1", "ffn.lin2"],
        ["sa_layer_norm", "output_layer_norm"],
    ),
    "layers.0.": (["attn.Wqkv", "attn.Wo"], ["mlp.Wi", "mlp.Wo"], ["attn_norm", "mlp_norm"]),
    "decoder.block.0.layer.0.": (
        [f"SelfAttention.{part}" for part in "qkvo"],
        [],
        ["SelfAttention.relative_attention_bias", "layer_norm"],
    ),
    "decoder.block.3.layer.1.": ([f"EncDecAttention.{part}" for part in "qkvo"], [], ["layer_norm"]),
    "encoder.block.0.layer.1.": ([], [f"DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")], ["layer_norm"]),
    "transformer.h.0.": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"], ["ln_1", "ln_2"]),
    "model.layers.1.": (
        [f"self_attn.{part}_proj" for part in "qkvo"],
        [f"mlp.{part}_proj" for part in ("gate", "up", "down")],
        ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"],
    ),
}


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("block", BLOCKS)
def test_projections_of_language_models(block, leaf):
    attention, feed_forward, others = BLOCKS[block]
    names = [f"{block}{part}.{leaf}" for part in (*attention, *feed_forward, *others)]
    assert [name for name in names if is_attention(name)] == names[: len(attention)]
    assert [name for name in names if is_mlp(name)] == names[len(attention) : len(attention) + len(feed_forward)]


@pytest.mark.parametrize("paradigm", [0, 5, -1, "1", 1.5, None])
def test_unknown_paradigms(paradigm):
    assert refusal(Attention, paradigm) == (f"Attention.paradigm: expected 1, 2, 3 or 4, got {paradigm!r}.")


def test_half_ft():
    selected = LastBlocks(fraction=0.5)(VIT_B_32)
    assert selected == ("proj", *blocks(range(6, 12)), *BEHIND)
    assert LastBlocks(count=6)(VIT_B_32) == selected
    assert LastBlocks(fraction=0.5)(LIT_TINY) == ("proj", *blocks(range(3, 6)), *BEHIND)


def test_last_ft():
    assert LastBlocks(count=1, behind=False)(VIT_B_32) == blocks([11])
    assert LastBlocks(count=1)(LIT_TINY) == ("proj", *blocks([5]), *BEHIND)


def test_the_last_blocks_of_a_resnet_are_its_stages():
    assert LastBlocks(1)(RESNET) == RESNET[7:]
    assert LastBlocks(1, behind=False)(RESNET) == RESNET[7:9]
    assert LastBlocks(3)(CONVNEXT) == CONVNEXT[2:]


def test_what_lies_before_the_blocks_never_trains():
    assert LastBlocks(count=12)(VIT_B_32) == ("proj", *blocks(range(12)), *BEHIND)
    assert LastBlocks(fraction=1)(VIT_B_32) == LastBlocks(count=12)(VIT_B_32)


@pytest.mark.parametrize(
    ("layers", "fraction", "trained"),
    [
        (12, 0.5, 6),
        (13, 0.5, 7),
        (1, 0.5, 1),
        (3, 0.1, 1),
        (12, 0.25, 3),
        (12, 0.26, 4),
        (12, 1e-12, 1),
        (12, 1.0, 12),
        (12, 0.999, 12),
    ],
)
def test_frozen_blocks_are_rounded_down(layers, fraction, trained):
    names = [f"blocks.{index}.weight" for index in range(layers)]
    assert LastBlocks(fraction=fraction)(names) == tuple(names[-trained:])


@pytest.mark.parametrize("layers", [4, 6, 10, 12, 24, 32, 48])
def test_fractions_that_floating_point_does_not_have(layers):
    names = [f"blocks.{index}.weight" for index in range(layers)]
    for trained in range(1, layers + 1):
        assert len(LastBlocks(fraction=trained / layers)(names)) == trained


@pytest.mark.parametrize(
    ("settings", "got"),
    [({}, "neither"), ({"count": 1, "fraction": 0.5}, "count=1 and fraction=0.5"), ({"behind": False}, "neither")],
)
def test_either_count_or_fraction(settings, got):
    assert refusal(LastBlocks, **settings) == (f"LastBlocks: expected either count or fraction, got {got}.")


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2"])
def test_counts_out_of_range(count):
    assert refusal(LastBlocks, count) == (f"LastBlocks.count: expected an integer of at least 1, got {count!r}.")


@pytest.mark.parametrize("fraction", [0, 0.0, -0.5, 1.01, math.nan, math.inf, True, "0.5"])
def test_fractions_out_of_range(fraction):
    assert refusal(LastBlocks, fraction=fraction) == (
        f"LastBlocks.fraction: expected a number in (0, 1], got {fraction!r}."
    )


def test_more_blocks_than_there_are():
    assert refusal(LastBlocks(13), VIT_B_32) == (
        "LastBlocks.count: expected at most 12, the network's number of blocks, got 13. Lower it."
    )


@pytest.mark.parametrize("selection", [LastBlocks(1), LastBlocks(fraction=0.5), LastBlocks(1, behind=False)])
def test_last_blocks_need_blocks(selection):
    assert refusal(selection, MLP_OF_ONES_OWN) == (
        "LastBlocks: expected a network with numbered blocks, got 4 parameters "
        "(first.weight, first.bias, second.weight and 1 more) without. Choose another selection, e.g. Matching."
    )


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        (r"^second", MLP_OF_ONES_OWN[2:]),
        (r"bias$", MLP_OF_ONES_OWN[1::2]),
        (r"ir.*t", ("first.weight", "first.bias")),
        (r"first\.weight|second\.bias", ("first.weight", "second.bias")),
        (r"^(?!.*bias)", MLP_OF_ONES_OWN[::2]),
    ],
)
def test_matching_searches_in_names(pattern, selected):
    assert Matching(pattern)(MLP_OF_ONES_OWN) == selected


def test_matching_nothing():
    assert refusal(Matching("thrid"), MLP_OF_ONES_OWN) == (
        "Matching(pattern='thrid'): expected to select some parameters, got none of 4 parameters "
        "(first.weight, first.bias, second.weight and 1 more). Choose another selection."
    )


def test_nothing_to_select_from():
    assert refusal(All(), []) == (
        "All(): expected to select some parameters, got none of 0 parameters. Choose another selection."
    )


def test_what_is_no_regular_expression():
    assert refusal(Matching, "blocks.(1") == (
        "Matching.pattern: expected a regular expression, got 'blocks.(1' "
        "(missing ), unterminated subpattern at position 7)."
    )
    for pattern in ("a{99999999999999999999}", None, 3):
        text = refusal(Matching, pattern)
        assert text.startswith(f"Matching.pattern: expected a regular expression, got {pattern!r} (")
        assert text.endswith(").")
        assert "\n" not in text


@pytest.mark.parametrize("selection", ALL_KINDS, ids=repr)
def test_the_given_order_is_kept_and_any_iterable_is_taken(selection):
    selected = selection(VIT_B_32)
    assert selection(reversed(VIT_B_32)) == selected[::-1]
    assert selection(dict.fromkeys(VIT_B_32)) == selection(iter(VIT_B_32)) == selected
    assert set(selected) <= set(VIT_B_32)


@pytest.mark.parametrize("selection", ALL_KINDS, ids=repr)
def test_selections_pickle_print_compare_and_stay_as_they_are(selection):
    copy = pickle.loads(pickle.dumps(selection))
    assert copy == selection
    assert hash(copy) == hash(selection)
    assert copy(VIT_B_32) == selection(VIT_B_32)
    assert eval(repr(selection)) == selection
    assert [other for other in ALL_KINDS if other == selection] == [selection]
    with pytest.raises(FrozenInstanceError):
        selection.anything = 1


@dataclass(frozen=True)
class Biases(Selection):
    """The example of the module's documentation."""

    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        return is_bias


def test_a_selection_of_ones_own():
    assert Biases()(MLP_OF_ONES_OWN) == ("first.bias", "second.bias")
    assert refusal(Biases(), ["first.weight"]).startswith("Biases(): expected to select some parameters, got none of ")
    with pytest.raises(TypeError, match="abstract"):
        Selection()


def parser():
    result = jsonargparse.ArgumentParser(exit_on_error=False)
    result.add_argument("--trainable", type=Selection | None, default=None)
    return result


@pytest.mark.parametrize("selection", [*ALL_KINDS, None], ids=repr)
def test_configuration_files(selection):
    config = {"trainable": None}
    if selection is not None:
        path = f"lit_merge.models.{type(selection).__name__}"
        config = {"trainable": {"class_path": path, "init_args": vars(selection)}}
    parsed = parser().parse_object(config)
    assert parser().instantiate_classes(parsed).trainable == selection
    written = parser().dump(parsed)
    assert parser().instantiate_classes(parser().parse_string(written)).trainable == selection


def test_command_line():
    def parse(*arguments):
        return parser().instantiate_classes(parser().parse_args(list(arguments))).trainable

    assert parse() is None
    assert parse("--trainable=lit_merge.models.Attention", "--trainable.paradigm=2") == Attention(2)
    assert parse("--trainable=LastBlocks", "--trainable.fraction=0.5") == LastBlocks(fraction=0.5)
    assert parse("--trainable=lit_merge.models.All") == All()
    with pytest.raises(jsonargparse.ArgumentError, match=re.escape("paradigm")):
        parse("--trainable=lit_merge.models.Attention", "--trainable.paradigm=5")
    with pytest.raises(Exception, match="LastBlocks: expected either count or fraction, got neither"):
        parse("--trainable=lit_merge.models.LastBlocks")


def test_the_last_blocks_of_an_encoder_and_a_decoder_are_the_decoders():
    names = [f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in (0, 1)]
    names += ["encoder.final_layer_norm.weight", "decoder.embed_tokens.weight"]
    last = ["decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder.final_layer_norm.weight", "lm_head.weight"]
    assert LastBlocks(count=1)([*names, *last]) == tuple(last)
    assert LastBlocks(count=1, behind=False)([*names, *last]) == (last[0],)
    assert LastBlocks(count=2)([*names, *last]) == (names[1], names[2], *last)
    assert Attention()([*names, *last]) == (*names[:2], last[0])
