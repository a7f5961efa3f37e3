"""Folders as people download them, tiny and made by the libraries themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["make_downloads", "tokenizer"]

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "server", "disk", "full", "the", "is"]


def tokenizer(words: list[str] | None = None) -> Any:
    """A word-level tokenizer of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words or _WORDS)}, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=known, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]")


def make_downloads(folder: Path) -> None:
    """A sentence encoder and a fine-tune of it, BERTs with heads, CLIP towers, LoRA adapters, and ResNets."""
    torch.manual_seed(0)
    folder.mkdir()
    _sentence_encoders(folder)
    _clips(folder)
    _adapters(folder)
    _residual_networks(folder)


def _tuned(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return changed


def _sentence_encoders(folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(_WORDS), max_position_embeddings=32, **sizes)
    base = BertModel(config)
    base.save_pretrained(folder / "minilm")
    tokenizer().save_pretrained(folder / "minilm")
    weights = load_file(folder / "minilm/model.safetensors")  # as versions wrote it that stored this buffer
    save_file({**weights, "embeddings.position_ids": torch.arange(32)[None]}, folder / "minilm/model.safetensors")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "minilm/modules.json").write_text(json.dumps(modules))
    (folder / "minilm/1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "minilm/1_Pooling/config.json").write_text(json.dumps(pooling))
    _tuned(base, 1).save_pretrained(folder / "sre-embedding")
    for seed, (name, labels) in enumerate({"bert-sentiment": 2, "bert-topics": 4}.items()):
        tuned = BertForSequenceClassification(
            BertConfig(vocab_size=len(_WORDS), max_position_embeddings=32, num_labels=labels, **sizes)
        )
        tuned.bert.load_state_dict(_tuned(base, 10 + seed).state_dict())
        tuned.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def _clips(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**text, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    text = {**text, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 8}
    base = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    base.save_pretrained(folder / "clip")
    for seed, name in enumerate(("clip-cars", "clip-dtd")):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
        state = _tuned(base, 20 + seed).state_dict()
        tower.load_state_dict({key: state[key] for key in tower.state_dict() if key in state}, strict=False)
        tower.save_pretrained(folder / name)


def _adapters(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(_WORDS), tie_word_embeddings=False, bos_token_id=2, eos_token_id=3, **sizes)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "llama")
    tokenizer().save_pretrained(folder / "llama")
    for seed, name in enumerate(("lora-maths", "lora-code")):
        torch.manual_seed(30 + seed)
        adapted = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(folder / name)


def _residual_networks(folder: Path) -> None:
    import timm

    base = timm.create_model("resnet10t", num_classes=4)
    for seed, name in enumerate(("resnet", "resnet-flowers", "resnet-pets")):
        module = base if name == "resnet" else _tuned(base, 40 + seed)
        state = module.state_dict()
        if name != "resnet":
            state = {key: value * 0.3 if key.endswith("running_var") else value for key, value in state.items()}
        torch.save(state, folder / f"{name}.pth")
