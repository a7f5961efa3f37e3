"""Whether the entropy of predictions stands for the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics.utilities import dim_zero_cat

from lit_merge.functional import shannon_entropy
from lit_merge.metrics.plotting import DrawnMetric
from lit_merge.metrics.spearman import spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EntropyLossSpearman"]


class EntropyLossSpearman(DrawnMetric):
    """Spearman's rank correlation of single images' entropy and cross-entropy (Yang et al. 2024, figure 3).

    Args:
        **settings: of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> metric = EntropyLossSpearman()
        >>> metric.update(torch.tensor([[9.0, 0.0], [2.0, 1.0], [1.0, 1.1]]), torch.tensor([0, 0, 0]))
        >>> float(metric.compute())
        1.0
    """

    higher_is_better = True
    entropies: list[Tensor]
    losses: list[Tensor]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("entropies", [], dist_reduce_fx="cat")
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in some images.

        Args:
            logits: ``[N, C]``.
            labels: ``[N]``, in [0, C), or -1 for what does not count.
        """
        counted = labels >= 0
        # In float64: in float32 all images that the model is sure of would have the loss 0.
        chosen = logits[counted].detach().double()
        self.entropies.append(shannon_entropy(chosen))
        self.losses.append(F.cross_entropy(chosen, labels[counted], reduction="none"))

    def compute(self) -> Tensor:
        """A float64 scalar in [-1, 1]; NaN where all images have the same entropy or the same loss."""
        return spearman(dim_zero_cat(self.entropies), dim_zero_cat(self.losses))

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw a point per image of this process, its entropy against its loss."""
        from lit_merge.report.panels import quieten

        value = float(found)
        entropies, losses = (dim_zero_cat(one).cpu().numpy() for one in (self.entropies, self.losses))
        axes.plot(entropies, losses, "o", color="#0072b2", markersize=3, alpha=0.4, markeredgewidth=0)
        axes.set_xlabel("entropy (nats)")
        axes.set_ylabel("cross-entropy (nats)")
        axes.set_title(f"Spearman {value:.3f}", loc="left", weight="bold")
        quieten(axes, "bottom", "left")
