"""LoRA on language models against the peft library: the dense update is what peft merges into the weights."""

from __future__ import annotations

import pytest
import torch
from builders.language_folders import KINDS, language_model, tokenizer

from lit_merge.errors import ConfigurationError
from lit_merge.models import Matching
from lit_merge.models.language.modules import CausalModule, EncoderDecoderModule, PooledEncoder
from lit_merge.models.language.tokenization import Tokenization
from lit_merge.models.lora import LoRA, own_parameters, updates

peft = pytest.importorskip("peft")
MODULES = {"encoder": PooledEncoder, "encoder_decoder": EncoderDecoderModule, "causal": CausalModule}
TARGETS = {
    "bert": ["query", "key", "value", "attention.output.dense"],
    "t5": ["q", "k", "v", "o"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
SETTINGS = {
    "plain": {},
    "rslora": {"rslora": True},
    "patterns": {
        "rank_pattern": {r"layer.1.\w+.(\w+.)*query|h.1.attn.c_attn|1.self_attn.v_proj|block.1.layer.0.\w+.q": 3},
        "alpha_pattern": {"q|query|q_proj|attn.c_attn": 5.0},
    },
}


def moved(name, settings):
    """Our LoRA on the module and peft's on the same model, with the same factors, which are random."""
    kind = KINDS.get(name, "encoder")
    module = MODULES[kind](language_model(name).double())
    lora = LoRA(rank=2, alpha=7.0, **settings)
    torch.manual_seed(3)
    names = lora.inject(module)
    theirs = language_model(name).double()
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=7.0,
        target_modules=TARGETS[name],
        use_rslora=settings.get("rslora", False),
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
        **fan,
    )
    theirs = peft.get_peft_model(theirs, config)
    layers = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for adapted in names:
            layer = adapted.removesuffix(".weight")
            ours = module.get_submodule(layer).parametrizations["weight"][0]
            ours.B.normal_()
            layers[layer].lora_A["default"].weight.copy_(ours.A)
            layers[layer].lora_B["default"].weight.copy_(ours.B)
    return kind, module, theirs, names


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", TARGETS)
def test_the_dense_update_is_what_peft_merges(name, settings):
    kind, module, theirs, names = moved(name, SETTINGS[settings])
    rows = {layer: part for layer, part in theirs.named_modules() if hasattr(part, "lora_A")}
    assert len(rows) == len(names)
    initial = {key: value.detach().clone() for key, value in own_parameters(module).items()}
    dense = dict(updates(module))
    output = texts_of(kind, module)
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert set(merged) == set(initial)
    for key, value in merged.items():
        torch.testing.assert_close(initial[key] + dense.get(key, 0), value.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(output, texts_of(kind, MODULES[kind](loaded(name, merged))), rtol=0, atol=1e-12)


def loaded(name, values):
    model = language_model(name).double()
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(values[key])
    return model


def texts_of(kind, module):
    tokenization = Tokenization(tokenizer(kind), kind, 24, 8, start_id=0)
    targets = None if kind == "encoder" else ["c d", "w1"]
    encoded = tokenization.encode(["a b c w3", "b"], targets)
    with torch.no_grad():
        return module(*tokenization.padded(encoded.input_ids, encoded.target_ids)[0])


def test_ranks_are_those_of_the_patterns():
    _, module, _, names = moved("gpt2", SETTINGS["patterns"])
    ranks = {
        name: len(module.get_submodule(name.removesuffix(".weight")).parametrizations["weight"][0].A) for name in names
    }
    assert ranks == {name: 3 if name == "transformer.h.1.attn.c_attn.weight" else 2 for name in names}


def test_the_regime_names_what_was_set():
    assert repr(LoRA(2)) == "LoRA(rank=2, alpha=16.0, dropout=0.0, on=None)"
    assert repr(LoRA(2, rslora=True)) == "LoRA(rank=2, alpha=16.0, dropout=0.0, on=None, rslora=True)"


def test_tied_embeddings_are_left_alone():
    module = CausalModule(language_model("gpt2"))
    with pytest.raises(ConfigurationError) as error:
        LoRA(2, on=Matching("wte")).inject(module)
    assert str(error.value) == (
        "LoRA.on: expected weights that one layer has for itself, got transformer.wte.weight, which several layers "
        "share. Leave them out of the selection."
    )
    LoRA(2).inject(module)
    assert module.lm_head.weight is module.transformer.wte.weight


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q": 0}}, "LoRA.rank_pattern: q: expected an integer of at least 1, got 0."),
        ({"alpha_pattern": {"q": -1}}, "LoRA.alpha_pattern: q: expected a positive number, got -1."),
        (
            {"rank_pattern": {"*": 1}},
            "LoRA.rank_pattern: expected a regular expression, got '*' (nothing to repeat at position 0).",
        ),
    ],
)
def test_patterns_that_are_none(settings, message):
    with pytest.raises(ConfigurationError) as error:
        LoRA(**settings)
    assert str(error.value) == message
