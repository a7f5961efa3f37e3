"""How surprised a language model is, per token."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Perplexity"]


class Perplexity(Metric):
    """``exp(Σ −log p / Σ tokens)`` over all tokens of all examples and processes; NaN without any token.

    torchmetrics' own takes logits and makes their softmax again; here the losses are known.

    Examples:
        >>> import torch
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([0.0, 1.3863]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(2.0000)
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, surprise: Tensor, tokens: Tensor) -> None:
        """Add examples.

        Args:
            surprise: sum of an example's negative log-likelihoods in nats, ``[B]``.
            tokens: how many they are, ``[B]``; 0 of padding.
        """
        self.total += surprise.detach().double().sum()
        self.tokens += tokens.sum()

    def compute(self) -> Tensor:
        """The perplexity, a float32 scalar."""
        return (self.total / self.tokens).exp().float()
