"""What merging is about, as torchmetrics metrics and functions.

The calibration error of merged models is torchmetrics' own, ``torchmetrics.classification.MulticlassCalibrationError``.
"""

from lit_merge.metrics.accuracies import (
    NonlinearAdvantage,
    NormalisedAccuracy,
    TargetControlTradeOff,
    nonlinear_advantage,
)
from lit_merge.metrics.cosines import CosineMatrix, NormByDepth, cosines, pairwise_products
from lit_merge.metrics.disentanglement import DisentanglementError, disagreement, representation_divergence
from lit_merge.metrics.entropy_loss import EntropyLossSpearman
from lit_merge.metrics.perplexity import Perplexity
from lit_merge.metrics.rewards import ClassifierReward, Reward, WordCount
from lit_merge.metrics.scores import hypervolume, kept_share, pareto_front
from lit_merge.metrics.signs import SignConflict, sign_counts
from lit_merge.metrics.spearman import Spearman, spearman
from lit_merge.metrics.tau_jp import TauJp, tau_jp_norms

__all__ = [
    "ClassifierReward",
    "CosineMatrix",
    "DisentanglementError",
    "EntropyLossSpearman",
    "NonlinearAdvantage",
    "NormByDepth",
    "NormalisedAccuracy",
    "Perplexity",
    "Reward",
    "SignConflict",
    "Spearman",
    "TargetControlTradeOff",
    "TauJp",
    "WordCount",
    "cosines",
    "disagreement",
    "hypervolume",
    "kept_share",
    "nonlinear_advantage",
    "pairwise_products",
    "pareto_front",
    "representation_divergence",
    "sign_counts",
    "spearman",
    "tau_jp_norms",
]
