"""Merging without data: transforms of task vectors, their chains, and the named methods built from them.

Imports torch and safetensors only.
"""

from lit_merge.transforms.base import Chain, Transform, chain, replace_field
from lit_merge.transforms.depth import LiNeS, ScaleBlocks
from lit_merge.transforms.masks import ConsensusMask, TallMask
from lit_merge.transforms.override import Override, WithOverrides
from lit_merge.transforms.recipes import (
    RECIPES,
    analogy,
    breadcrumbs,
    consensus_ta,
    consensus_ties,
    dare_linear,
    dare_ties,
    della,
    lines,
    negation,
    recipe,
    rewarded_soup,
    tall_masks,
    task_arithmetic,
    ties,
    weight_average,
)
from lit_merge.transforms.reduce import Interpolate, Mean, Negate, Scale, Sum
from lit_merge.transforms.rescale import Rescale
from lit_merge.transforms.signs import DisjointMean, DisjointSum, ElectSign
from lit_merge.transforms.sparsify import Drop, DropByRank, MagnitudeWindow, Trim

__all__ = [
    "RECIPES",
    "Chain",
    "ConsensusMask",
    "DisjointMean",
    "DisjointSum",
    "Drop",
    "DropByRank",
    "ElectSign",
    "Interpolate",
    "LiNeS",
    "MagnitudeWindow",
    "Mean",
    "Negate",
    "Override",
    "Rescale",
    "Scale",
    "ScaleBlocks",
    "Sum",
    "TallMask",
    "Transform",
    "Trim",
    "WithOverrides",
    "analogy",
    "breadcrumbs",
    "chain",
    "consensus_ta",
    "consensus_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "lines",
    "negation",
    "recipe",
    "replace_field",
    "rewarded_soup",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "weight_average",
]
