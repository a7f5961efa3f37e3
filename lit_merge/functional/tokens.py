"""Losses, scores and entropies of predicted tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_merge.functional.entropy import shannon_entropy

__all__ = ["answer_scores", "answers_first", "prediction_entropy", "token_hits", "token_losses"]

_IGNORED = -1
_NEVER = -1e4
"""A logit or score that counts as minus infinity, but for which an entropy is defined, also in half precision."""


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every example's tokens, in float32 or better.

    Args:
        logits: ``[B, M, V]``.
        targets: ``[B, M]``, tokens in [0, V), -1 where nothing is to be predicted.
        label_smoothing: in [0, 1).

    Returns:
        The sum over an example's tokens and how many these are, both ``[B]``.
    """
    precise = logits if logits.dtype.itemsize >= 4 else logits.float()
    losses = F.cross_entropy(
        precise.flatten(0, 1),
        targets.flatten(),
        ignore_index=_IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view_as(targets).sum(1), (targets != _IGNORED).sum(1)


def token_hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether all of an example's tokens are the most probable ones, given those before them.

    Args:
        logits: ``[B, M, V]``.
        targets: ``[B, M]``, -1 where nothing is to be predicted.

    Returns:
        1 or 0 for right or wrong, and 1 or 0 for counted or not; both float32 ``[B]``.
    """
    counted = targets != _IGNORED
    right = ((logits.argmax(-1) == targets) | ~counted).all(1)
    return right.float(), counted.any(1).float()


def prediction_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of every example's prediction, in nats: of its class, or the mean over its next tokens.

    Args:
        logits: ``[B, C]``; or ``[B, M, V]``, zeros at positions where nothing is predicted, which do not count.

    Returns:
        ``[B]``; 0 without any position.
    """
    if logits.ndim == 2:
        return shannon_entropy(logits)
    predicted = (logits.detach() != 0).any(-1)
    return (shannon_entropy(logits) * predicted).sum(-1) / predicted.sum(-1).clamp(min=1)


def answers_first(logits: Tensor, answers: Tensor) -> Tensor:
    """Logits over the vocabulary in another order, so that they alone tell how probable an answer is.

    At every position the answer's token trades places with token 0. Where an answer has no token, the logits make
    the first one certain. What reads the features needs no answers then, and as all of it is linear in the logits, it
    may be applied to a linearised model's value and tangent, and to their sums.

    Args:
        logits: ``[B, C, M, V]``.
        answers: tokens in [0, V), int64 ``[B, C, M]``, -1 where there is none.

    Returns:
        ``[B, C, M, V]``.
    """
    places = answers.clamp(min=0).unsqueeze(-1)
    first = logits[..., :1]
    swapped = torch.cat([logits.gather(-1, places), logits.scatter(-1, places, first)[..., 1:]], -1)
    certain = torch.full((logits.shape[-1],), _NEVER, dtype=logits.dtype, device=logits.device)
    certain[0] = 0
    return torch.where((answers < 0).unsqueeze(-1), certain, swapped)


def answer_scores(features: Tensor, mean: bool = False) -> Tensor:
    """The log-probability of every answer, so that their softmax is the probability among the answers.

    Args:
        features: ``[B, C, M, V]``, of :func:`answers_first`.
        mean: over an answer's tokens instead of their sum, which prefers short answers.

    Returns:
        ``[B, C]``, in float32 or better; where an example has fewer answers, a score that no probability remains of.
    """
    precise = features if features.dtype.itemsize >= 4 else features.float()
    tokens = precise.log_softmax(-1)[..., 0]
    counted = features.detach()[..., 1] > _NEVER / 2
    count = counted.sum(-1)
    scores = (tokens * counted).sum(-1)
    return torch.where(count > 0, scores / count.clamp(min=1) if mean else scores, torch.full_like(scores, _NEVER))
