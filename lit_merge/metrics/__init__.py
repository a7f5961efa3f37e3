"""What merging is about, as torchmetrics metrics."""

from lit_merge.metrics.tau_jp import TauJp, tau_jp_norms

__all__ = ["TauJp", "tau_jp_norms"]
