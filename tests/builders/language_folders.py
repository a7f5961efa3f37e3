"""Tiny random language models with their tokenizers, as folders of transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"w{number}" for number in range(20))]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = 60


def tokenizer(kind: str) -> Any:
    """One number a word: 0 padding, 1 begin, 2 end, 3 unknown, then :data:`WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = {"encoder": "<s> $A </s>", "encoder_decoder": "$A </s>", "causal": "<s> $A"}[kind]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "causal":
        del names["pad_token"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=24, **names)


def language_model(name: str, seed: int = 0, **settings: Any) -> Any:
    """A model of hidden width 16 and two layers.

    Biases and normalisations are random as well, so that no derivative is zero by chance.
    """
    import transformers as hf

    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    bart = {"d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    for part in ("encoder", "decoder"):
        bart |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    made: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bert": (hf.BertModel, hf.BertConfig, {**bert, "max_position_embeddings": 32}),
        "roberta": (hf.RobertaModel, hf.RobertaConfig, {**bert, "max_position_embeddings": 34, "pad_token_id": 1}),
        "distilbert": (
            hf.DistilBertModel,
            hf.DistilBertConfig,
            {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        ),
        "modernbert": (hf.ModernBertModel, hf.ModernBertConfig, {**bert, "pad_token_id": 0}),
        "mpnet": (hf.MPNetModel, hf.MPNetConfig, {**bert, "max_position_embeddings": 34}),
        "deberta": (hf.DebertaV2Model, hf.DebertaV2Config, {**bert, "relative_attention": True}),
        "xlm-roberta-xl": (
            hf.XLMRobertaXLModel,
            hf.XLMRobertaXLConfig,
            {**bert, "max_position_embeddings": 34, "pad_token_id": 1},
        ),
        "t5": (hf.T5ForConditionalGeneration, hf.T5Config, t5),
        "flan-t5": (
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            {**t5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ),
        "bart": (hf.BartForConditionalGeneration, hf.BartConfig, {**bart, "max_position_embeddings": 32}),
        "falcon": (hf.FalconForCausalLM, hf.FalconConfig, {**bert, "bos_token_id": 1, "eos_token_id": 2}),
        "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**bert, "num_key_value_heads": 1, "head_dim": 8}),
        "gpt2": (
            hf.GPT2LMHeadModel,
            hf.GPT2Config,
            {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2},
        ),
        "llama": (
            hf.LlamaForCausalLM,
            hf.LlamaConfig,
            {**bert, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True},
        ),
    }
    kind, config, own = made[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config(**{"vocab_size": VOCABULARY, **own, **settings})).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value), alpha=0.1)
    return model


KINDS = {
    **dict.fromkeys(("t5", "flan-t5", "bart"), "encoder_decoder"),
    **dict.fromkeys(("falcon", "gemma2", "gpt2", "llama"), "causal"),
}
"""Of the models that are no encoders."""


def language_folder(
    folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Such a model and its tokenizer on the disk."""
    language_model(name, seed, **settings).to(dtype).save_pretrained(folder)
    tokenizer(KINDS.get(name, "encoder")).save_pretrained(folder)
    return folder


def in_double(model: Any) -> Any:
    """The model in float64, normalisations included, of which transformers' own compute the variance in float32."""
    for part in model.double().modules():
        if hasattr(part, "variance_epsilon"):
            part.forward = partial(_root_mean_square_norm, part)
    return model


def _root_mean_square_norm(part: Any, hidden: torch.Tensor) -> torch.Tensor:
    return part.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + part.variance_epsilon)
