"""Which examples a head got right, and what its predictions cost."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lit_merge.functional.tokens import token_hits, token_losses

__all__ = ["UNLABELLED", "hits", "hits_of", "losses_of"]

UNLABELLED = -1
"""The target of padding, and of examples whose class is not known."""


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Correctness and weight of every example, whose weighted mean is the accuracy.

    Args:
        logits: ``[B, C]``; of next tokens ``[B, M, V]``, all of which have to be right.
        labels: ``[B]``, in [0, C), or -1 where it does not count; ``[B, M]`` of tokens.

    Returns:
        1 or 0 for right or wrong, and 1 or 0 for counted or not; both float32 ``[B]``.
    """
    if logits.ndim == 3:
        return token_hits(logits, labels)
    return (logits.argmax(-1) == labels).float(), (labels != UNLABELLED).float()


def hits_of(head: Any, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """What a right answer is to this head: its own ``hits(logits, batch)``, or agreement with the targets.

    Args:
        head: made the logits.
        logits: ``[B, C]``.
        batch: their :class:`lit_merge.data.Batch`.

    Returns:
        Correctness and weight of every example, as of :func:`hits`.
    """
    own = getattr(head, "hits", None)
    return hits(logits, batch.targets) if own is None else own(logits, batch)


def losses_of(head: Any, logits: Tensor, batch: Any) -> Tensor:
    """The loss of every example to this head, ``[B]``: its own ``loss(logits, batch)``, or the cross-entropy.

    Of next tokens it is the mean over an example's tokens. Examples without a target have 0.
    """
    own = getattr(head, "loss", None)
    if own is not None:
        return own(logits, batch)
    if logits.ndim == 3:
        total, count = token_losses(logits, batch.targets)
        return total / count.clamp(min=1)
    return F.cross_entropy(logits, batch.targets, ignore_index=UNLABELLED, reduction="none")
