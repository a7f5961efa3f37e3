"""A GGUF file, as llama.cpp's converter lays one out: its network, and that the weights may be trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.language_folders import language_model
from torch import Tensor

from lit_merge.data.text import TextTask
from lit_merge.models.language import CausalNetwork

gguf = pytest.importorskip("gguf")
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "Ġ", "Ġa", "Ġb", "Ġc", "Ġd"]
BLOCK = {
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"},
    **{"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
}


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys in the order of llama.cpp's rotary embedding."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return language_model("llama", vocab_size=len(WORDS), tie_word_embeddings=False).eval()


@pytest.fixture(scope="module")
def file(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, config = tmp_path_factory.mktemp("gguf") / "tiny.gguf", model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges([f"Ġ {letter}" for letter in "abcd"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    state = model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {
        f"blk.{block}.{theirs}": f"model.layers.{block}.{ours}"
        for block in range(config.num_hidden_layers)
        for theirs, ours in BLOCK.items()
    }
    for theirs, ours in names.items():
        weight = state[f"{ours}.weight"].float()
        if "q_proj" in ours or "k_proj" in ours:
            heads = config.num_attention_heads if "q_proj" in ours else config.num_key_value_heads
            weight = permuted(weight, heads)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_are_those_of_the_model(model: torch.nn.Module, file: Path) -> None:
    network = CausalNetwork(str(file))
    ids = torch.tensor([[3, 8, 9, 10, 11]])
    with torch.inference_mode():
        wanted = model(ids).logits
        got = network.module(ids, torch.ones_like(ids))
    assert (got - wanted).abs().max() <= 1e-5
    assert network.preprocessing.tokenizer("a b")["input_ids"] == [3, 9]


def test_what_was_read_is_no_quantised_model_any_more(file: Path) -> None:
    inner = CausalNetwork(str(file)).module.of_transformers
    assert not getattr(inner, "is_quantized", False)
    assert not hasattr(inner.config, "quantization_config")
    assert not inner.config.to_dict().get("quantization_config")


def test_it_can_be_trained_by_trl(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from lit_merge.modules.rewarded import RewardedRun, train_adapter

    rows = [{"text": text, "rest": "c d"} for text in ("a b", "b c", "c d", "d a")]
    task = TextTask(rows={"train": rows, "val": rows[:1]}, label_column=None, target="rest", repeated="keep")
    settings = {"max_steps": 1, "per_device_train_batch_size": 2}
    record = train_adapter(CausalNetwork(str(file)), task, RewardedRun("sft", settings=settings), tmp_path / "adapter")
    assert record["texts"] == 4
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
