"""Which images a head got right."""

from __future__ import annotations

from torch import Tensor

__all__ = ["UNLABELLED", "hits"]

UNLABELLED = -1
"""The label of padding, and of images whose class is not known."""


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Correctness and weight of every image, whose weighted mean is the accuracy.

    Args:
        logits: ``[B, C]``.
        labels: ``[B]``, in [0, C), or -1 where it does not count.

    Returns:
        1 or 0 for right or wrong, and 1 or 0 for counted or not; both float32 ``[B]``.
    """
    return (logits.argmax(-1) == labels).float(), (labels != UNLABELLED).float()
