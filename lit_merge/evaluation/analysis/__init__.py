"""Measures of task vectors and merged models on a user's own vectors and images: what ``lit-merge analyze`` does."""

from lit_merge.evaluation.analysis.disentanglement import DirectPair, LinearPair, disentanglement_errors
from lit_merge.evaluation.analysis.settings import Analysis, Grid, Method, Paths
from lit_merge.models.placed_weights import PlacedWeights

__all__ = [
    "Analysis",
    "DirectPair",
    "Grid",
    "LinearPair",
    "Method",
    "Paths",
    "PlacedWeights",
    "disentanglement_errors",
]
