"""CLIP image encoders, zero-shot heads and what parameter names say. Importing this does not import open_clip."""

from lit_merge.models.adarank import AdaRank
from lit_merge.models.encoder import (
    ClipModel,
    Preprocessing,
    empty_image_tower,
    full_clip_model,
    hub_repository,
    load_clip,
)
from lit_merge.models.heads import ZeroShotHead, build_head, zero_shot_weights
from lit_merge.models.lora import LoRA
from lit_merge.models.network import Base, ClipNetwork, ModuleNetwork, Network
from lit_merge.models.parametrisations import Direct, Linearised, LinearisedLowRank, LowRank, Parametrisation
from lit_merge.models.rates import ExpLR, LinLR, Rates
from lit_merge.models.selection import All, Attention, LastBlocks, Matching, Selection, TaLoS
from lit_merge.models.weights import save_clip
from lit_merge.naming import block_of, is_after_blocks, is_attention, number_of_blocks

__all__ = [
    "AdaRank",
    "All",
    "Attention",
    "Base",
    "ClipModel",
    "ClipNetwork",
    "Direct",
    "ExpLR",
    "LastBlocks",
    "LinLR",
    "Linearised",
    "LinearisedLowRank",
    "LoRA",
    "LowRank",
    "Matching",
    "ModuleNetwork",
    "Network",
    "Parametrisation",
    "Preprocessing",
    "Rates",
    "Selection",
    "TaLoS",
    "ZeroShotHead",
    "block_of",
    "build_head",
    "empty_image_tower",
    "full_clip_model",
    "hub_repository",
    "is_after_blocks",
    "is_attention",
    "load_clip",
    "number_of_blocks",
    "save_clip",
    "zero_shot_weights",
]
