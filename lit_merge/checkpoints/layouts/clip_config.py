"""The configuration of one and the same CLIP in open_clip's and in transformers' words.

Tensors tell neither the number of heads nor the activation; whoever writes a CLIP in another library's layout takes
both from the configuration that it came with. What the other library has no word for is refused, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_merge.errors import StructureMismatchError, first_few

__all__ = ["open_clip_config", "preprocessor_config", "transformers_config"]

Config = Mapping[str, Any]

# open_clip's defaults (CLIPVisionCfg, CLIPTextCfg), as its configurations leave them out.
_VISION = {
    **{"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224},
}
_TEXT = {
    **{"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0},
}
# Entries that change nothing about what is computed from pixels and token numbers.
_NO_MATTER = {
    *("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "patch_dropout", "output_tokens"),
    *("timm_model_pretrained", "hf_model_pretrained"),
}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
# transformers' defaults (CLIPVisionConfig, CLIPTextConfig), which older files leave out of the parts.
_THEIR_VISION = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
}
_THEIR_TEXT = {
    **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    **{"max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_HIGHEST_TOKEN = 2  # with this end token transformers' CLIP takes the highest token's features, as open_clip does


def transformers_config(model: Config, whole: bool, dtype: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a CLIP that open_clip has built.

    Args:
        model: open_clip's ``model_cfg``.
        whole: whether the text tower is there (``CLIPModel``), or the image tower alone
            (``CLIPVisionModelWithProjection``).
        dtype: of the weights, e.g. ``float32``, if it is the same for all.

    Raises:
        StructureMismatchError: the model has something that transformers' CLIP has not.
    """
    _refuse(set(model) - _MODEL, "model_cfg")
    vision = _with_defaults(model.get("vision_cfg"), _VISION, "vision_cfg")
    text = _with_defaults(model.get("text_cfg"), _TEXT, "text_cfg")
    common = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "projection_dim": model["embed_dim"],
        "layer_norm_eps": 1e-5,
    }
    image = {
        "model_type": "clip_vision_model",
        "hidden_size": vision["width"],
        "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_channels": 3,
        **common,
    }
    stored = {"torch_dtype": dtype} if dtype else {}
    if not whole:
        return {"architectures": ["CLIPVisionModelWithProjection"], **image, **stored}
    words = {
        "model_type": "clip_text_model",
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "bos_token_id": 0,
        "eos_token_id": _HIGHEST_TOKEN,
        "pad_token_id": 0,
        **common,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "text_config": words,
        "vision_config": image,
        **stored,
    }


def open_clip_config(config: Config, preprocessor: Config | None = None) -> dict[str, Any]:
    """The ``open_clip_config.json`` of a whole CLIP of transformers.

    Args:
        config: transformers' ``config.json`` of a ``CLIPModel``.
        preprocessor: its ``preprocessor_config.json``; None if there is none.

    Raises:
        StructureMismatchError: it is no whole CLIP, or its towers differ in what open_clip has one setting for.
    """
    if config.get("model_type") != "clip":
        raise StructureMismatchError(
            f"{_OTHER['open_clip']}: expected the configuration of a whole CLIP (model_type clip), got "
            f"{config.get('model_type')}. Write it as it is."
        )
    vision = {**_THEIR_VISION, **_part(config, "vision_config")}
    text = {**_THEIR_TEXT, **_part(config, "text_config")}
    activations = {str(part["hidden_act"]) for part in (vision, text)}
    same = len(activations) == 1 and activations <= set(_ACTIVATIONS)
    wrong = [] if same else [f"hidden_act {', '.join(sorted(activations))}"]
    ending = text.get("eos_token_id", text["vocab_size"] - 1)
    wrong += [f"eos_token_id {ending}"] * (ending not in (_HIGHEST_TOKEN, text["vocab_size"] - 1))
    wrong += ["layer_norm_eps"] * any(part["layer_norm_eps"] != 1e-5 for part in (vision, text))
    wrong += ["num_channels"] * (vision["num_channels"] != 3)
    if wrong:
        raise StructureMismatchError(
            f"{_OTHER['open_clip']}: expected QuickGELU or GELU in both towers, ε = 1e-5, three channels and the "
            f"last token as the end, got {first_few(wrong)}. Write it as it is."
        )
    model = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[activations.pop()],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }
    known = preprocessor or {}
    seen = {"mean": known.get("image_mean"), "std": known.get("image_std")}
    seen["interpolation"] = {2: "bilinear", 3: "bicubic"}.get(known.get("resample", -1))
    if isinstance(known.get("size"), Mapping):
        seen["resize_mode"] = "shortest" if "shortest_edge" in known["size"] else "squash"
    return {"model_cfg": model, "preprocess_cfg": {name: value for name, value in seen.items() if value is not None}}


def preprocessor_config(size: int, preprocess: Config) -> dict[str, Any] | None:
    """The ``preprocessor_config.json`` of a CLIP that open_clip has built; None where transformers has no such way.

    Args:
        size: side of the square input, in pixels.
        preprocess: open_clip's ``preprocess_cfg`` with ``mean`` and ``std``.
    """
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash") or not {"mean", "std"} <= set(preprocess):
        return None
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if mode == "shortest" else square,
        "resample": 2 if preprocess.get("interpolation") == "bilinear" else 3,
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


_OTHER = {"transformers": "writing as transformers", "open_clip": "writing as open_clip"}


def _part(config: Config, name: str) -> Config:
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise StructureMismatchError(f"{name}: expected an object, got {type(part).__name__}. Repair the config.json.")
    return part


def _with_defaults(part: Any, defaults: Config, what: str) -> dict[str, Any]:
    given = dict(part) if isinstance(part, Mapping) else {}
    _refuse({name for name, value in given.items() if name not in defaults and value} - _NO_MATTER, what)
    return {**defaults, **given}


def _refuse(names: set[str], what: str) -> None:
    if names:
        raise StructureMismatchError(
            f"{_OTHER['transformers']}: expected a CLIP that transformers has too, got {first_few(sorted(names))} in "
            f"{what}. Write it as open_clip, or its image tower."
        )
