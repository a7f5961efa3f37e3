"""The objective of AdaMerging."""

from __future__ import annotations

from torch import Tensor

__all__ = ["shannon_entropy"]


def shannon_entropy(logits: Tensor) -> Tensor:
    """``−Σ_c p_c log p_c`` of the softmax, in nats, computed in float32 or better (Yang et al. 2024, equation 8).

    Args:
        logits: ``[…, C]``.

    Returns:
        ``[…]``, from 0 to log C.

    Examples:
        >>> import torch
        >>> round(float(shannon_entropy(torch.zeros(2))), 4)
        0.6931
    """
    logarithms = (logits if logits.dtype.itemsize >= 4 else logits.float()).log_softmax(-1)
    return -(logarithms.exp() * logarithms).sum(-1)
