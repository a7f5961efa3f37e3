"""Merging without data: transforms of task vectors, their chains, and the named methods built from them.

Imports torch and safetensors only.
"""

from lit_merge.transforms.base import Chain, Transform, chain
from lit_merge.transforms.calibration import Calibrate, Polarise
from lit_merge.transforms.clip import Clip
from lit_merge.transforms.conflicts.competition import PCB
from lit_merge.transforms.conflicts.largest import LargestMagnitude, SignMask
from lit_merge.transforms.conflicts.overlap import RAM
from lit_merge.transforms.conflicts.trust_region import TrustRegion
from lit_merge.transforms.conflicts.variance import SCE
from lit_merge.transforms.covariance import ACE
from lit_merge.transforms.depth import LiNeS, ScaleBlocks
from lit_merge.transforms.directions import CalibratedDirections, CARTDirections, TSVDirections
from lit_merge.transforms.essential import ESM
from lit_merge.transforms.fields import replace_field
from lit_merge.transforms.geometry import KarcherMean, ModelStock, Slerp
from lit_merge.transforms.interference import WUDI, OptMerge, SpectralWUDI
from lit_merge.transforms.learned import LearnedScale
from lit_merge.transforms.masks import ConsensusMask, TallMask
from lit_merge.transforms.override import Override, WithOverrides
from lit_merge.transforms.projective import DOGE
from lit_merge.transforms.recipes import (
    RECIPES,
    ace,
    actmerge,
    adamerging,
    analogy,
    aswudi,
    breadcrumbs,
    cart,
    consensus_ta,
    consensus_ties,
    core_space,
    dare_linear,
    dare_ties,
    dc_merge,
    della,
    doge,
    emr,
    esm,
    fisher,
    iso_c,
    iso_cts,
    iwudi,
    karcher,
    knots,
    lines,
    magmax,
    model_stock,
    nearswap,
    negation,
    optmerge,
    orthomerge,
    pcb,
    ram,
    ram_plus,
    recipe,
    regmean,
    rewarded_soup,
    sce,
    slerp,
    svc,
    swudi,
    tall_masks,
    task_arithmetic,
    tatr,
    ties,
    tsv_m,
    weight_average,
    wudi,
)
from lit_merge.transforms.reduce import Interpolate, Mean, Negate, Scale, Sum
from lit_merge.transforms.rescale import Rescale
from lit_merge.transforms.rotations import OrthoMerge
from lit_merge.transforms.signs import DisjointMean, DisjointSum, ElectSign
from lit_merge.transforms.sparsify import Drop, DropByRank, MagnitudeWindow, Trim
from lit_merge.transforms.spectral import CART, DCMerge, IsoC, IsoCTS, TSVMerge
from lit_merge.transforms.subspaces import CoreSpace, KnOTS
from lit_merge.transforms.weighted import FisherMean, RegMean

__all__ = [
    "ACE",
    "CART",
    "DOGE",
    "ESM",
    "PCB",
    "RAM",
    "RECIPES",
    "SCE",
    "WUDI",
    "CARTDirections",
    "Calibrate",
    "CalibratedDirections",
    "Chain",
    "Clip",
    "ConsensusMask",
    "CoreSpace",
    "DCMerge",
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
    "KnOTS",
    "LargestMagnitude",
    "LearnedScale",
    "LiNeS",
    "MagnitudeWindow",
    "Mean",
    "ModelStock",
    "Negate",
    "OptMerge",
    "OrthoMerge",
    "Override",
    "Polarise",
    "RegMean",
    "Rescale",
    "Scale",
    "ScaleBlocks",
    "SignMask",
    "Slerp",
    "SpectralWUDI",
    "Sum",
    "TSVDirections",
    "TSVMerge",
    "TallMask",
    "Transform",
    "Trim",
    "TrustRegion",
    "WithOverrides",
    "ace",
    "actmerge",
    "adamerging",
    "analogy",
    "aswudi",
    "breadcrumbs",
    "cart",
    "chain",
    "consensus_ta",
    "consensus_ties",
    "core_space",
    "dare_linear",
    "dare_ties",
    "dc_merge",
    "della",
    "doge",
    "emr",
    "esm",
    "fisher",
    "iso_c",
    "iso_cts",
    "iwudi",
    "karcher",
    "knots",
    "lines",
    "magmax",
    "model_stock",
    "nearswap",
    "negation",
    "optmerge",
    "orthomerge",
    "pcb",
    "ram",
    "ram_plus",
    "recipe",
    "regmean",
    "replace_field",
    "rewarded_soup",
    "sce",
    "slerp",
    "svc",
    "swudi",
    "tall_masks",
    "task_arithmetic",
    "tatr",
    "ties",
    "tsv_m",
    "weight_average",
    "wudi",
]
