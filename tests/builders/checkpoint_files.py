"""Writes checkpoints in the formats in which people publish them, each by the library that the format belongs to."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.files.shards import plan_shards, write_shards
from lit_merge.models import full_clip_model


class ImageEncoder(nn.Module):
    """An encoder object as the task-arithmetic papers published it: an open_clip model without its text transformer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train_preprocess = open_clip.image_transform(32, is_train=True)
        self.val_preprocess = open_clip.image_transform(32, is_train=False)
        self.cache_dir = None
        del self.model.transformer


class LinearizedModel(nn.Module):
    """A linearised network as its paper's program keeps it: θ0 and θ without names, in the order of the parameters."""

    def __init__(self, initial: nn.Module, tuned: nn.Module) -> None:
        super().__init__()
        self.params = nn.ParameterList(value.detach().clone() for value in tuned.parameters())
        self.params0 = nn.ParameterList(value.detach().clone() for value in initial.parameters())
        for one in self.params0:
            one.requires_grad = False


class LinearizedImageEncoder(nn.Module):
    """Its place in the published files."""

    def __init__(self, initial: nn.Module, tuned: nn.Module) -> None:
        super().__init__()
        self.model = LinearizedModel(initial, tuned)


@contextmanager
def published_module(name: str, *classes: type) -> Iterator[None]:
    """Let classes be those of a program that is not installed where the file is read."""
    module = types.ModuleType(name)
    places = {one: one.__module__ for one in classes}
    package = name.partition(".")[0]
    sys.modules |= {package: types.ModuleType(package), name: module}
    try:
        for one in classes:
            one.__module__ = name
            setattr(module, one.__name__, one)
        yield
    finally:
        for one, place in places.items():
            one.__module__ = place
        del sys.modules[package], sys.modules[name]


def clip_of(config: str, state: Mapping[str, Tensor]) -> Any:
    """The open_clip model of a config with these weights."""
    model = full_clip_model(config)[0]
    model.load_state_dict(dict(state))
    return model


def moved(state: Mapping[str, Tensor], seed: int, names: str = "visual.") -> dict[str, Tensor]:
    """Weights after a fine-tuning that never was: those whose names begin so are changed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.01 * torch.randn(value.shape, generator=generator) if name.startswith(names) else value.clone()
        for name, value in state.items()
    }


def whole_module(path: Path, config: str, state: Mapping[str, Tensor]) -> Path:
    """``torch.save(image_encoder)``, by a program whose package is ``src``."""
    with published_module("src.modeling", ImageEncoder):
        torch.save(ImageEncoder(clip_of(config, state)), path)
    return path


def torchscript(path: Path, config: str, state: Mapping[str, Tensor]) -> Path:
    """A TorchScript archive of a whole CLIP, with the three integers that OpenAI's carry."""
    model = clip_of(config, state).eval()
    for name, value in {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, {"encode_image": torch.zeros(1, 3, 32, 32)}, check_trace=False)
        torch.jit.save(traced, path)
    return path


def linearised(
    path: Path, config: str, initial: Mapping[str, Tensor], tuned: Mapping[str, Tensor], tower: bool = False
) -> Path:
    """The state dict of a linearised encoder: of the image tower alone, or of all of an ImageEncoder."""
    encoders = [clip_of(config, state) for state in (initial, tuned)]
    wrapped = [one.visual if tower else ImageEncoder(one) for one in encoders]
    state: dict[str, Any] = dict(LinearizedImageEncoder(*wrapped).state_dict())
    torch.save({**state, "model_name": "ViT-tiny"}, path)
    return path


def sharded(folder: Path, state: Mapping[str, Tensor], size: int) -> Path:
    """A folder of safetensors shards with their index."""
    folder.mkdir()
    write_shards(folder, state, {"format": "pt"}, plan_shards(state, size, "model"), "model")
    return folder


def safetensors(path: Path, state: Mapping[str, Tensor]) -> Path:
    """A safetensors file, by its own library."""
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def pytorch(path: Path, state: Mapping[str, Any], legacy: bool = False) -> Path:
    """``torch.save(state_dict)``, in today's container or in that of torch before 1.6."""
    torch.save(dict(state), path, _use_new_zipfile_serialization=not legacy)
    return path


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole CLIP's weights as transformers calls them: queries, keys and values apart, projections transposed."""
    renamed = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    found: dict[str, Tensor] = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
    }
    for leaf in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{leaf}"] = state[f"visual.ln_pre.{leaf}"]
        found[f"vision_model.post_layernorm.{leaf}"] = state[f"visual.ln_post.{leaf}"]
        found[f"text_model.final_layer_norm.{leaf}"] = state[f"ln_final.{leaf}"]
    for name, value in state.items():
        tower, block, inner = name.partition("transformer.resblocks.")
        if not block:
            continue
        number, _, inner = inner.partition(".")
        place = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
        if inner.startswith("attn.in_proj_"):
            for which, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{place}.self_attn.{which}_proj.{inner.removeprefix('attn.in_proj_')}"] = part
        else:
            part, _, leaf = inner.rpartition(".")
            found[f"{place}.{renamed[part]}.{leaf}"] = value
    return found


def transformers_config() -> Any:
    """The configuration of the tests' CLIP in transformers."""
    from transformers import CLIPConfig

    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 16, "projection_dim": 12}
    text = {"hidden_size": 8, "intermediate_size": 32, "max_position_embeddings": 16, "vocab_size": 49408}
    return CLIPConfig(
        text_config={**tower, **text, "num_hidden_layers": 1, "projection_dim": 12},
        vision_config={**tower, **vision},
        projection_dim=12,
    )


def transformers_folder(folder: Path, state: Mapping[str, Tensor], kind: str = "CLIPModel", **settings: Any) -> Path:
    """``save_pretrained`` of a ``CLIPModel``, a ``CLIPVisionModelWithProjection`` or a ``CLIPVisionModel``."""
    import transformers

    config = transformers_config()
    model = getattr(transformers, kind)(config if kind == "CLIPModel" else config.vision_config)
    named = transformers_names(state)
    own = model.state_dict()
    short = {name.removeprefix("vision_model."): value for name, value in named.items()}
    model.load_state_dict({name: named[name] if name in named else short[name] for name in own})
    model.save_pretrained(folder, **settings)
    return folder


def timm_file(path: Path, state: Mapping[str, Tensor]) -> Path:
    """The state dict of timm's vision transformer of CLIP's kind."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=12, pre_norm=True
    )
    renamed = {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1.": "patch_embed.proj.",
        "ln_pre.": "norm_pre.",
        "ln_post.": "norm.",
        "transformer.resblocks.": "blocks.",
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    found = {"head.weight": state["visual.proj"].T, "head.bias": torch.zeros(12)}
    for name, value in state.items():
        if name.startswith("visual.") and name != "visual.proj":
            other = name.removeprefix("visual.")
            for old, new in renamed.items():
                other = other.replace(old, new)
            found[other] = value
    own = model.state_dict()
    model.load_state_dict({name: found[name].reshape(own[name].shape) for name in found})
    torch.save(model.state_dict(), path)
    return path
