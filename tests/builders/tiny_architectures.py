"""Tiny models of transformers' architectures, made from their configurations, and a merge of two fine-tunes of each.

Each is fine-tuned by one step of AdamW on random inputs, twice; base and fine-tunes are saved by the library, merged by
``lit_merge.commands.merge.merge``, opened again by the library, and compared with the sum in float64.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENT = 0.5
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SMALL, "vocab_size": 64, "max_position_embeddings": 32}
_LLAMA = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PIXELS = {**_SMALL, "image_size": 16, "patch_size": 8}
_BART = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 64},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
_T5 = {
    **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
    **{"decoder_start_token_id": 0},
}


@dataclass(frozen=True)
class Architecture:
    """A model class and a configuration for it.

    Attributes:
        model: name of the class in transformers.
        config: name of the configuration's class.
        kind: of network, for tables.
        settings: of the configuration.
        inputs: what the model is called with: ``text``, ``pair``, ``pixels``, ``both`` or ``sounds``.
        parts: settings that are configurations themselves: name -> class, settings.
        more: arguments of the call besides.
    """

    model: str
    config: str
    kind: str
    settings: dict[str, Any]
    inputs: str = "text"
    parts: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> Any:
        """The model with random weights, in evaluation mode."""
        import transformers

        parts = {name: getattr(transformers, kind)(**given) for name, (kind, given) in self.parts.items()}
        config = getattr(transformers, self.config)(**self.settings, **parts)
        torch.manual_seed(seed)
        return getattr(transformers, self.model)(config).eval()

    def open(self, folder: Path | str, dtype: torch.dtype) -> Any:
        """The model in a folder, by the library alone; what it says of names that do not fit is refused."""
        import transformers

        kind = getattr(transformers, self.model)
        model, info = kind.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
        wrong = {key: value for key, value in info.items() if value}
        if wrong:
            raise AssertionError(f"{self.model}: {wrong}")
        if "num_local_experts" in self.settings:  # grouped products have no float64
            model.set_experts_implementation("eager")
        return model.eval().to(dtype)

    def call(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The model's first outputs for random inputs, as one flat tensor."""
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 60, (2, 8), generator=generator)
        dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
        size = self.settings.get("image_size") or next(
            (given["image_size"] for _, given in self.parts.values() if "image_size" in given), 32
        )
        pixels = torch.rand(2, 3, size, size, generator=generator).to(dtype)
        given: dict[str, Any] = {
            "text": {"input_ids": words},
            "pair": {"input_ids": words, "decoder_input_ids": words[:, :5]},
            "pixels": {"pixel_values": pixels},
            "both": {"input_ids": words, "pixel_values": pixels},
            "sounds": {"input_values": torch.rand(2, 400, generator=generator).to(dtype)},
            "spectrum": {
                "input_features": torch.rand(2, 8, 32, generator=generator).to(dtype),
                "decoder_input_ids": words[:, :5],
            },
        }[self.inputs]
        if "image_token" in self.more:
            tokens, image = self.more["image_token"]
            given["input_ids"] = torch.cat([torch.full((2, tokens), image), words], 1)
        torch.manual_seed(seed)  # some draw the patches that they look at
        found = model(**given, **{key: value for key, value in self.more.items() if key != "image_token"})
        floats = [one for one in found.to_tuple() if isinstance(one, Tensor) and one.is_floating_point()]
        return torch.cat([one.reshape(-1) for one in floats])

    def tuned(self, model: Any, seed: int) -> Any:
        """A copy after one step of AdamW."""
        found = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2)
        outputs = self.call(found, seed)
        target = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
        (outputs - target).square().mean().backward()
        optimizer.step()
        return found.eval()


def _bert(model: str, config: str, **more: Any) -> Architecture:
    return Architecture(model, config, "encoder", {**_TEXT, **more})


def _decoder(model: str, config: str, **more: Any) -> Architecture:
    return Architecture(model, config, "decoder", {**_LLAMA, **more})


def _vision(model: str, config: str, settings: dict[str, Any]) -> Architecture:
    return Architecture(model, config, "vision", settings, "pixels")


_TWO_TOWERS = {"vocab_size": 64, "max_position_embeddings": 32}
_STAGES = {"num_channels": 3, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _bert("BertForMaskedLM", "BertConfig"),
    "roberta": _bert("RobertaForMaskedLM", "RobertaConfig", max_position_embeddings=40),
    "xlm-roberta": _bert("XLMRobertaModel", "XLMRobertaConfig", max_position_embeddings=40),
    "distilbert": Architecture(
        *("DistilBertForSequenceClassification", "DistilBertConfig", "encoder"),
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 64, "max_position_embeddings": 32},
    ),
    "albert": _bert("AlbertForMaskedLM", "AlbertConfig", embedding_size=8),
    "electra": _bert("ElectraForPreTraining", "ElectraConfig", embedding_size=8),
    "mpnet": _bert("MPNetModel", "MPNetConfig", max_position_embeddings=40),
    "deberta-v2": _bert("DebertaV2Model", "DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": _bert(
        "ModernBertForMaskedLM", "ModernBertConfig", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    ),
    "esm": _bert("EsmForMaskedLM", "EsmConfig", pad_token_id=0, mask_token_id=3, position_embedding_type="rotary"),
    "gpt2": Architecture(
        *("GPT2LMHeadModel", "GPT2Config", "decoder"),
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **_WORDS},
    ),
    "gpt-neox": _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "opt": Architecture(
        *("OPTForCausalLM", "OPTConfig", "decoder"),
        {**{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}, **_WORDS,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16},
    ),
    "bloom": Architecture(
        *("BloomForCausalLM", "BloomConfig", "decoder"), {"hidden_size": 16, "n_layer": 2, "n_head": 2, **_WORDS}
    ),
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig"),
    "mistral": _decoder("MistralForCausalLM", "MistralConfig"),
    "mixtral": _decoder("MixtralForCausalLM", "MixtralConfig", num_local_experts=3, num_experts_per_tok=2),
    "qwen2": _decoder("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma2": _decoder("Gemma2ForCausalLM", "Gemma2Config", query_pre_attn_scalar=8),
    "phi": _decoder("PhiForCausalLM", "PhiConfig"),
    "olmo2": _decoder("Olmo2ForCausalLM", "Olmo2Config"),
    "falcon": Architecture(
        *("FalconForCausalLM", "FalconConfig", "decoder"),
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **_WORDS},
    ),
    "mamba": Architecture(
        *("MambaForCausalLM", "MambaConfig", "decoder"),
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **_WORDS, "use_mambapy": False},
    ),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", "encoder-decoder", _T5, "pair"),
    "t5 1.1": Architecture(
        *("T5ForConditionalGeneration", "T5Config", "encoder-decoder"),
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}, "pair",
    ),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", "encoder-decoder", _BART, "pair"),
    "mbart": Architecture("MBartForConditionalGeneration", "MBartConfig", "encoder-decoder", _BART, "pair"),
    "pegasus": Architecture("PegasusForConditionalGeneration", "PegasusConfig", "encoder-decoder", _BART, "pair"),
    "marian": Architecture("MarianMTModel", "MarianConfig", "encoder-decoder", _BART, "pair"),
    "m2m-100": Architecture("M2M100ForConditionalGeneration", "M2M100Config", "encoder-decoder", _BART, "pair"),
    "whisper": Architecture(
        *("WhisperForConditionalGeneration", "WhisperConfig", "encoder-decoder"),
        {**{key: value for key, value in _BART.items() if key != "max_position_embeddings"}, "num_mel_bins": 8,
         "max_source_positions": 16, "max_target_positions": 32, "suppress_tokens": None,
         "begin_suppress_tokens": None},
        "spectrum",
    ),
    "vit": _vision("ViTForImageClassification", "ViTConfig", _PIXELS),
    "deit": _vision("DeiTForImageClassificationWithTeacher", "DeiTConfig", _PIXELS),
    "beit": _vision("BeitForImageClassification", "BeitConfig", {**_PIXELS, "use_relative_position_bias": True}),
    "dinov2": _vision("Dinov2Model", "Dinov2Config", _PIXELS),
    "swin": _vision("SwinForImageClassification", "SwinConfig", {**_STAGES, "image_size": 16, "patch_size": 4}),
    "convnext": _vision(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32, "layer_scale_init_value": 0.1},
    ),
    "resnet": _vision(
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "image_size": 32},
    ),
    "segformer": _vision(
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
         "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 8, "image_size": 32},
    ),
    "clip": Architecture(
        *("CLIPModel", "CLIPConfig", "vision and language"), {"projection_dim": 12}, "both",
        {"text_config": ("CLIPTextConfig", {**_SMALL, **_TWO_TOWERS, "eos_token_id": 2}),
         "vision_config": ("CLIPVisionConfig", _PIXELS)},
    ),
    "siglip": Architecture(
        *("SiglipModel", "SiglipConfig", "vision and language"), {}, "both",
        {"text_config": ("SiglipTextConfig", {**_SMALL, **_TWO_TOWERS}),
         "vision_config": ("SiglipVisionConfig", _PIXELS)},
    ),
    "chinese-clip": Architecture(
        *("ChineseCLIPModel", "ChineseCLIPConfig", "vision and language"), {"projection_dim": 12}, "both",
        {"text_config": ("ChineseCLIPTextConfig", {**_SMALL, **_TWO_TOWERS}),
         "vision_config": ("ChineseCLIPVisionConfig", _PIXELS)},
    ),
    "blip": Architecture(
        *("BlipForConditionalGeneration", "BlipConfig", "vision and language"), {"projection_dim": 12}, "both",
        {"text_config": ("BlipTextConfig", {**_SMALL, **_TWO_TOWERS, "encoder_hidden_size": 16, "sep_token_id": 2,
                                            "bos_token_id": 1, "eos_token_id": 2}),
         "vision_config": ("BlipVisionConfig", _PIXELS)},
    ),
    "vilt": Architecture("ViltModel", "ViltConfig", "vision and language", {**_PIXELS, **_TWO_TOWERS}, "both"),
    "git": Architecture(
        *("GitForCausalLM", "GitConfig", "vision and language"), {**_TEXT, **_WORDS}, "both",
        {"vision_config": ("GitVisionConfig", _PIXELS)},
    ),
    "llava": Architecture(
        *("LlavaForConditionalGeneration", "LlavaConfig", "vision and language"),
        {"image_token_index": 61, "vision_feature_layer": -1}, "both",
        {"text_config": ("LlamaConfig", _LLAMA), "vision_config": ("CLIPVisionConfig", _PIXELS)},
        {"image_token": (4, 61)},
    ),
    "vision encoder and text decoder": Architecture(
        *("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", "vision and language"), {}, "pixels",
        {"encoder": ("ViTConfig", _PIXELS),
         "decoder": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **_WORDS,
                                    "add_cross_attention": True, "is_decoder": True})},
        {"decoder_input_ids": torch.arange(3, 11).view(2, 4)},
    ),
    "wav2vec2": Architecture(
        *("Wav2Vec2ForCTC", "Wav2Vec2Config", "encoder"),
        {**_SMALL, "vocab_size": 16, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
         "num_feat_extract_layers": 2, "pad_token_id": 0},
        "sounds",
    ),
}  # fmt: skip
"""Name -> architecture."""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the library's bars and hints."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def saved(architecture: Architecture, place: Path, dtype: torch.dtype, shards: str | None) -> list[Path]:
    """Folders of the base and of two fine-tunes, written by the library."""
    base = architecture.build(0)
    models = {"base": base, "one": architecture.tuned(base, 1), "two": architecture.tuned(base, 2)}
    more = {} if shards is None else {"max_shard_size": shards}
    for name, model in models.items():
        model.to(dtype).save_pretrained(str(place / name), **more)
    return [place / name for name in models]


def expected(architecture: Architecture, folders: list[Path]) -> Any:
    """θ0 + α Σ (θ_t − θ0) in float64, of the parameters as the library opens them; buffers are the base's."""
    base, *tuned = (architecture.open(folder, torch.float64) for folder in folders)
    others = [dict(one.named_parameters()) for one in tuned]
    with torch.no_grad():
        for name, value in base.named_parameters():
            value.add_(COEFFICIENT * sum(one[name] - value for one in others))
    return base


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def roundings(found: nn.Module, wanted: nn.Module, digits: int) -> float:
    """Largest distance of a parameter from the exact value, in units of one rounding to ``digits`` binary digits."""
    others = dict(wanted.named_parameters())
    worst = 0.0
    for name, value in found.named_parameters():
        exact = others[name]
        half = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - digits - 1)  # of the last place
        worst = max(worst, float(((value - exact).abs() / half).nan_to_num(0).max()))
    return worst


def trial(architecture: Architecture, place: Path, merge: Callable[..., Any]) -> dict[str, Any]:
    """Merge in float32 from one file, and in bfloat16 from shards, kept and widened; the errors."""
    found: dict[str, Any] = {}
    with silent(), torch.no_grad():
        for name, dtype, shards, asked in (
            ("float32", torch.float32, None, None),
            ("bfloat16, sharded", torch.bfloat16, "20KB", None),
            ("bfloat16, sharded, to float32", torch.bfloat16, "20KB", "float32"),
        ):
            folder = place / name.replace(", ", "-").replace(" ", "-")
            source = place / f"models-{str(dtype).removeprefix('torch.')}"
            if not source.exists():
                with torch.enable_grad():
                    folders = saved(architecture, source, dtype, shards)
                exact = expected(architecture, folders)
            size = None if shards is None else "24KB"
            merge([str(one) for one in folders[1:]], str(folder), "task_arithmetic", {"coefficient": COEFFICIENT},
                  base=str(folders[0]), dtype=asked, shard_size=size)  # fmt: skip
            opened = architecture.open(folder, torch.float64)
            if name == "bfloat16, sharded":
                found[name] = {"roundings": roundings(opened, exact, 8)}
            else:
                found[name] = {"outputs": distance(architecture.call(opened), architecture.call(exact))}
    parameters = list(exact.parameters())
    found["parameters"] = sum(one.numel() for one in parameters)
    return found
