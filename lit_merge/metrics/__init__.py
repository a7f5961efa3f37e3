"""What merging is about, as torchmetrics metrics and functions."""

from lit_merge.metrics.spearman import spearman
from lit_merge.metrics.tau_jp import TauJp, tau_jp_norms

__all__ = ["TauJp", "spearman", "tau_jp_norms"]
