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
from lit_merge.metrics.signs import SignConflict, sign_counts
from lit_merge.metrics.spearman import Spearman, spearman
from lit_merge.metrics.tau_jp import TauJp, tau_jp_norms

__all__ = [
    "CosineMatrix",
    "DisentanglementError",
    "EntropyLossSpearman",
    "NonlinearAdvantage",
    "NormByDepth",
    "NormalisedAccuracy",
    "Perplexity",
    "SignConflict",
    "Spearman",
    "TargetControlTradeOff",
    "TauJp",
    "cosines",
    "disagreement",
    "nonlinear_advantage",
    "pairwise_products",
    "representation_divergence",
    "sign_counts",
    "spearman",
    "tau_jp_norms",
]
