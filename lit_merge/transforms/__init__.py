"""Merging without data: transforms of task vectors, their chains, and the named methods built from them.

Imports torch and safetensors only.
"""

from lit_merge.transforms.base import Chain, Transform, chain
from lit_merge.transforms.depth import LiNeS, ScaleBlocks
from lit_merge.transforms.fields import replace_field
from lit_merge.transforms.geometry import KarcherMean, ModelStock, Slerp
from lit_merge.transforms.interference import WUDI
from lit_merge.transforms.learned import LearnedScale
from lit_merge.transforms.masks import ConsensusMask, TallMask
from lit_merge.transforms.override import Override, WithOverrides
from lit_merge.transforms.recipes import (
    RECIPES,
    adamerging,
    analogy,
    breadcrumbs,
    consensus_ta,
    consensus_ties,
    dare_linear,
    dare_ties,
    della,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    lines,
    model_stock,
    negation,
    recipe,
    regmean,
    rewarded_soup,
    slerp,
    tall_masks,
    task_arithmetic,
    ties,
    tsv_m,
    weight_average,
    wudi,
)
from lit_merge.transforms.reduce import Interpolate, Mean, Negate, Scale, Sum
from lit_merge.transforms.rescale import Rescale
from lit_merge.transforms.signs import DisjointMean, DisjointSum, ElectSign
from lit_merge.transforms.sparsify import Drop, DropByRank, MagnitudeWindow, Trim
from lit_merge.transforms.spectral import IsoC, IsoCTS, TSVMerge
from lit_merge.transforms.weighted import FisherMean, RegMean

__all__ = [
    "RECIPES",
    "WUDI",
    "Chain",
    "ConsensusMask",
    "DisjointMean",
    "DisjointSum",
    "Drop",
    "DropByRank",
    "ElectSign",
    "FisherMean",
    "Interpolate",
    "IsoC",
    "IsoCTS",
    "KarcherMean",
    "LearnedScale",
    "LiNeS",
    "MagnitudeWindow",
    "Mean",
    "ModelStock",
    "Negate",
    "Override",
    "RegMean",
    "Rescale",
    "Scale",
    "ScaleBlocks",
    "Slerp",
    "Sum",
    "TSVMerge",
    "TallMask",
    "Transform",
    "Trim",
    "WithOverrides",
    "adamerging",
    "analogy",
    "breadcrumbs",
    "chain",
    "consensus_ta",
    "consensus_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "fisher",
    "iso_c",
    "iso_cts",
    "karcher",
    "lines",
    "model_stock",
    "negation",
    "recipe",
    "regmean",
    "replace_field",
    "rewarded_soup",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "weight_average",
    "wudi",
]
