"""Every kind of adapter that is read: the merged model's logits are those of peft's own model with the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge.checkpoints.adapters.additions import Extended, model_settings
from lit_merge.checkpoints.adapters.reading import Adapter, adapter_folder, open_adapter
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.commands.merge import merge
from lit_merge.errors import FileFormatError, StructureMismatchError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 5, 3, 7, 2, 9]])


def llama(tied: bool = False, bias: bool = False) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": bias}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.point = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        images = input_ids.float().reshape(1, 2, 3, 1).expand(1, 2, 3, 4) / 8
        return self.head(self.point(self.conv(images)).mean((2, 3)))


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def logits(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :3]} if "T5" in type(getattr(model, "base_model", model)).__name__ else {}
    more = more or ({"decoder_input_ids": IDS[:, :3]} if hasattr(model, "decoder") else {})
    with torch.no_grad():
        output = model(input_ids=IDS, **more)
    return output if isinstance(output, Tensor) else output.logits


def adapt(model: nn.Module, config: Any, folder: Path, **saving: Any) -> Tensor:
    """Adapt a model with random factors, save the adapter; the adapted model's logits."""
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder, **saving)
    return logits(adapted)


def merged(build: Callable[[], nn.Module], base: Mapping[str, Tensor], difference: Mapping[str, Tensor]) -> Tensor:
    model = fresh(build)
    missing, unexpected = model.load_state_dict({name: base[name] + difference[name] for name in difference}, False)
    assert not unexpected
    assert not [name for name in missing if name in difference]
    return logits(model)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """As a file has it: every tensor once, under the first of its names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in sorted(model.state_dict().items(), key=lambda one: "lm_head" in one[0]):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor.clone()
    return found


ATTENTION = ["q_proj", "v_proj"]
LORA = {"r": 2, "lora_alpha": 3}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "Llama, LoRA": (llama, lambda: peft.LoraConfig(target_modules=[*ATTENTION, "up_proj"], **LORA)),
    "Llama, rsLoRA": (llama, lambda: peft.LoraConfig(target_modules=ATTENTION, use_rslora=True, **LORA)),
    "Llama, biases": (
        lambda: llama(bias=True),
        lambda: peft.LoraConfig(target_modules=ATTENTION, lora_bias=True, **LORA),
    ),
    "Llama, patterns": (
        llama,
        lambda: peft.LoraConfig(
            target_modules=[*ATTENTION, "down_proj"],
            # A dot is any character; names count from one of their dots; the first entry that fits does, and the
            # file has them sorted.
            rank_pattern={r"layers\.1\..*_proj": 4, "proj": 5, "self_attn.q.proj": 3},
            alpha_pattern={"(q|v)_proj": 7, "1.mlp.down_proj": 9, "^model.layers.0.mlp.down_proj": 5, "q_proj": 11},
            **LORA,
        ),
    ),
    "Llama, some layers": (
        llama,
        lambda: peft.LoraConfig(
            target_modules=["q_proj", "k_proj", "o_proj"], layers_to_transform=[1], exclude_modules=["k_proj"], **LORA
        ),
    ),
    "Llama, tables and heads": (llama, lambda: peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], **LORA)),
    "Llama, saved": (
        llama,
        lambda: peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head", "norm"], **LORA),
    ),
    "Llama, tokens": (
        llama,
        lambda: peft.LoraConfig(target_modules=ATTENTION, trainable_token_indices={"embed_tokens": [7, 3]}, **LORA),
    ),
    "Llama, only tokens": (
        llama,
        lambda: peft.TrainableTokensConfig(token_indices=[5, 1], target_modules=["embed_tokens"]),
    ),
    "Llama, orthogonal": (
        llama,
        lambda: peft.LoraConfig(target_modules=ATTENTION, init_lora_weights="orthogonal", **LORA),
    ),
    "Llama, DoRA": (llama, lambda: peft.LoraConfig(target_modules=[*ATTENTION, "embed_tokens"], use_dora=True, **LORA)),
    "Llama, KaSA": (llama, lambda: peft.LoraConfig(target_modules=ATTENTION, kasa_config=kasa(), **LORA)),
    "Llama, AdaLoRA": (
        llama,
        lambda: peft.AdaLoraConfig(target_modules=ATTENTION, init_r=3, target_r=2, total_step=9, lora_alpha=5),
    ),
    "Llama, LoHa": (
        llama,
        lambda: peft.LoHaConfig(target_modules=ATTENTION, r=2, alpha=3, alpha_pattern={"v_proj": 5}),
    ),
    "Llama, LoKr": (llama, lambda: peft.LoKrConfig(target_modules=ATTENTION, r=2, alpha=3, rank_pattern={"v_proj": 1})),
    "Llama, IA3": (
        lambda: llama(bias=True),
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "GPT-2, LoRA": (
        gpt2,
        lambda: peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **LORA),
    ),
    "GPT-2, DoRA": (
        gpt2,
        lambda: peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True, **LORA),
    ),
    "GPT-2, AdaLoRA": (
        gpt2,
        lambda: peft.AdaLoraConfig(target_modules=["c_attn"], init_r=2, target_r=1, total_step=9, fan_in_fan_out=True),
    ),
    "GPT-2, IA3": (
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "BERT, LoRA": (bert, lambda: peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", **LORA)),
    "BERT, table": (bert, lambda: peft.LoraConfig(target_modules=["query", "word_embeddings"], bias="all", **LORA)),
    "T5, LoRA": (t5, lambda: peft.LoraConfig(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM", **LORA)),
    "convolutions, LoRA": (Convolutions, lambda: peft.LoraConfig(target_modules=["conv", "point", "head"], **LORA)),
    "convolutions, DoRA": (
        Convolutions,
        lambda: peft.LoraConfig(target_modules=["conv", "point"], use_dora=True, **LORA),
    ),
    "convolutions, LoHa": (Convolutions, lambda: peft.LoHaConfig(target_modules=["conv", "point"], r=2)),
    "convolutions, LoHa with cores": (
        Convolutions,
        lambda: peft.LoHaConfig(target_modules=["conv"], r=2, use_effective_conv2d=True),
    ),
    "convolutions, LoKr": (Convolutions, lambda: peft.LoKrConfig(target_modules=["conv", "point"], r=8)),
    "convolutions, LoKr with a core": (
        Convolutions,
        lambda: peft.LoKrConfig(target_modules=["conv"], r=1, use_effective_conv2d=True, decompose_both=True),
    ),
}


def kasa() -> Any:
    return pytest.importorskip("peft.tuners.lora.config").KasaConfig()


@pytest.mark.parametrize("case", CASES)
def test_the_merged_models_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    base = stored(fresh(build))
    expected = adapt(fresh(build), config(), tmp_path)
    assert not torch.allclose(expected, logits(fresh(build)), atol=1e-3)  # it does something
    torch.testing.assert_close(
        merged(build, base, open_adapter(tmp_path).difference(base)), expected, atol=1e-5, rtol=1e-5
    )


def test_several_adapters_of_one_model_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    model = fresh(llama)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=ATTENTION, **LORA), adapter_name="maths")
    adapted.add_adapter("code", peft.LoraConfig(target_modules=["k_proj"], r=3))
    adapted.save_pretrained(tmp_path / "both")
    with pytest.raises(
        FileFormatError, match=r"expected one adapter, got 2 \(code, maths\). Name the folder of one, or"
    ):
        open_checkpoint(tmp_path / "both")
    assert open_checkpoint(tmp_path / "both" / "code").adapter is not None
    adapted.save_pretrained(tmp_path / "one", selected_adapters=["maths"])
    assert open_checkpoint(tmp_path / "one").path == tmp_path / "one" / "maths"
    model = fresh(llama)
    model.save_pretrained(tmp_path / "one")
    assert open_checkpoint(tmp_path / "one").adapter is None  # a model with adapters beside it
    (tmp_path / "none").mkdir()
    assert adapter_folder(tmp_path / "none") is None


def test_the_first_of_several_fitting_alphas_counts_and_is_said(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], alpha_pattern={"q_proj": 5, "self_attn.q_proj": 9}, **LORA)
    expected = adapt(fresh(llama), config, tmp_path)
    adapter, base = open_adapter(tmp_path), stored(fresh(llama))
    torch.testing.assert_close(merged(llama, base, adapter.difference(base)), expected, atol=1e-5, rtol=1e-5)
    assert len(adapter.notes) == 1
    assert adapter.notes[0].startswith(
        "alpha_pattern has several entries of different value for model.layers.0.self_att"
    )


# Embeddings that are the head as well

TIED: dict[str, tuple[dict[str, Any], bool]] = {  # settings -> whether the two stay one tensor
    "the table": ({"target_modules": ["embed_tokens"]}, False),
    "the head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "both, each on its own": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "both as one": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "a copy of the table": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "a copy of both": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "rows": ({"target_modules": ["q_proj"], "trainable_token_indices": [4, 6]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
}


def extended(adapter: Adapter, folder: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any]]:
    """The base with what the adapter needs, the difference from that, and the changed settings."""
    opened = open_checkpoint(folder)
    config = model_settings(opened.files)
    additions = adapter.additions(opened, config)
    base = Extended(opened, additions)
    return base, adapter.difference(base, {**config, **additions.settings}), additions.settings


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_is_written_as_peft_computes_it(case: str, tmp_path: Path) -> None:
    settings, tied = TIED[case]
    fresh(lambda: llama(tied=True)).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    expected = adapt(model, peft.LoraConfig(**settings, **LORA), tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    base, difference, changed = extended(adapter, tmp_path / "base")
    assert changed == ({} if tied else {"tie_word_embeddings": False})
    assert ("lm_head.weight" in base) is not tied
    got = merged(lambda: llama(tied=tied), base, difference)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    file = load_file(tmp_path / "base" / "model.safetensors")
    if tied:
        return
    with pytest.raises(
        StructureMismatchError,
        match=r"a change that leaves embedding and head one tensor, as in the base \(tie_word_embeddings\), got one "
        r"where the adapter changes (model.embed_tokens|lm_head)[\w. ]*, which the base has in one tensor with .",
    ):
        adapter.difference(file, model_settings([tmp_path / "base" / "model.safetensors"]))


@pytest.mark.parametrize("explicit", [False, True])
def test_a_merge_of_a_tied_models_adapters_and_fine_tunes_opens(explicit: bool, tmp_path: Path) -> None:
    """The head of a fine-tune is its embedding; of the adapter's model it is the base's: half of each difference."""
    base = fresh(lambda: llama(tied=True))
    base.save_pretrained(tmp_path / "base")
    adapt(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(target_modules=["embed_tokens"], **LORA),
        tmp_path / "lora",
    )
    tuned = fresh(lambda: llama(tied=True))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    for model, folder in ((base, "base"), (tuned, "tuned")) if explicit else ():  # equal copies, as some programs write
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / folder / "model.safetensors", {"format": "pt"})
    result = merge(
        [str(tmp_path / "lora"), str(tmp_path / "tuned")],
        str(tmp_path / "out"),
        recipe="task_arithmetic",
        settings={"coefficient": 0.5},
        base=str(tmp_path / "base"),
        progress=False,
    )
    said = result.describe()
    assert "the adapter changes model.embed_tokens, which the base has in one tensor with lm_head\n" in said
    added = "1 tensor is added to the model (lm_head.weight), whose config.json needs tie_word_embeddings: false"
    assert (added in said) is not explicit
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    got = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    start, moved, lora = (
        base.state_dict(),
        tuned.state_dict(),
        load_file(tmp_path / "lora" / "adapter_model.safetensors"),
    )
    table = next(name for name in start if name.endswith("embed_tokens.weight"))
    a, b = (lora[f"base_model.model.model.embed_tokens.lora_embedding_{one}"].double() for one in "AB")
    half = (moved[table].double() - start[table].double()) / 2
    torch.testing.assert_close(got["lm_head.weight"].double(), start[table] + half, atol=1e-6, rtol=0)
    torch.testing.assert_close(got[table].double(), start[table] + half + 0.75 * (b @ a).T, atol=1e-6, rtol=0)


def test_heads_of_other_architectures_that_are_their_embedding(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    model = fresh(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes, num_attention_heads=2)))
    model.save_pretrained(tmp_path / "base")
    adapt(model, peft.LoraConfig(target_modules=["word_embeddings"], **LORA), tmp_path / "adapter")
    opened = open_checkpoint(tmp_path / "base")
    with pytest.raises(
        StructureMismatchError,
        match=r"changes bert.embeddings.word_embeddings, which the base has in one tensor with its ou",
    ):
        open_adapter(tmp_path / "adapter").difference(opened, model_settings(opened.files))
    base = stored(fresh(t5))
    adapt(fresh(t5), peft.LoraConfig(target_modules=["shared", "q"], **LORA), tmp_path / "t5")
    with pytest.raises(
        StructureMismatchError,
        match=r"got one of shared, whose table encoder and decoder read .* in peft it changes nothing",
    ):
        open_adapter(tmp_path / "t5").difference(base)


# Biases that the base has not


def test_biases_that_the_base_has_not_are_added_where_the_network_can_have_them(tmp_path: Path) -> None:
    fresh(llama).save_pretrained(tmp_path / "base")
    expected = adapt(
        fresh(llama), peft.LoraConfig(target_modules=["q_proj"], lora_bias=True, **LORA), tmp_path / "lora"
    )
    adapter = open_adapter(tmp_path / "lora")
    base, difference, changed = extended(adapter, tmp_path / "base")
    assert changed == {"attention_bias": True}
    assert sum(name.endswith(".bias") for name in base) == 2 * 4
    got = merged(lambda: llama(bias=True), base, difference)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        StructureMismatchError,
        match=rf"^{tmp_path}/lora: expected a base with model.layers.0.self_attn.q_proj.bias, to which this adapter "
        r"\(lora_bias\) adds, got a base whose model.layers.0.self_attn.q_proj has no bias. Give the base with these",
    ):
        adapter.difference(stored(fresh(llama)))


def test_biases_are_refused_where_the_network_has_no_place_for_them(tmp_path: Path) -> None:
    base = stored(fresh(t5))
    adapt(fresh(t5), peft.LoraConfig(target_modules=["q"], lora_bias=True, **LORA), tmp_path)
    assert not open_adapter(tmp_path).additions(base, {"architectures": ["T5ForConditionalGeneration"]})
    with pytest.raises(StructureMismatchError, match=r"got a base whose [\w.]+.q has no bias"):
        open_adapter(tmp_path).difference(base)
