"""Merging without data: transforms of task vectors, their chains, and the named methods built from them.

Imports torch and safetensors only.
"""

from lit_merge.transforms.base import Chain, Transform, chain, replace_field
from lit_merge.transforms.recipes import RECIPES, analogy, negation, recipe, task_arithmetic, weight_average
from lit_merge.transforms.reduce import Mean, Negate, Scale, Sum

__all__ = [
    "RECIPES",
    "Chain",
    "Mean",
    "Negate",
    "Scale",
    "Sum",
    "Transform",
    "analogy",
    "chain",
    "negation",
    "recipe",
    "replace_field",
    "task_arithmetic",
    "weight_average",
]
