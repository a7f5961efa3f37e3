"""CLIP image encoders, zero-shot heads and what parameter names say. Importing this does not import open_clip."""

from lit_merge.models.encoder import ClipModel, Preprocessing, full_clip_model, load_clip
from lit_merge.models.heads import ZeroShotHead, build_head, zero_shot_weights
from lit_merge.models.naming import block_of, is_attention, number_of_blocks
from lit_merge.models.weights import save_clip

__all__ = [
    "ClipModel",
    "Preprocessing",
    "ZeroShotHead",
    "block_of",
    "build_head",
    "full_clip_model",
    "is_attention",
    "load_clip",
    "number_of_blocks",
    "save_clip",
    "zero_shot_weights",
]
