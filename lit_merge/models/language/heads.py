"""What language models' features become: class scores, next tokens, or the scores of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError
from lit_merge.functional.tokens import answer_scores, token_losses
from lit_merge.models.language.modules import PooledEncoder
from lit_merge.models.language.tokenization import Tokenization

__all__ = ["EncoderTexts", "LanguageHead"]


class LanguageHead(nn.Module):
    """Next tokens, and the ranking of answers by their probability; nothing in it trains.

    Features ``[B, M, V]`` are the logits of next tokens already. Features ``[B, C, M, V]`` are those of C answers
    (:func:`lit_merge.functional.tokens.answers_first`) and become ``[B, C]``: the sum of an answer's tokens'
    log-probabilities, or their mean. The softmax over them is the probability among the answers, so that accuracy,
    cross-entropy and entropy of classes are those of answers.

    Args:
        length_normalised: the mean instead of the sum: scores of answers of different lengths are compared per token.
    """

    def __init__(self, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, features: Tensor) -> Tensor:
        """Features to logits: ``[B, M, V]`` as they are, ``[B, C, M, V]`` to ``[B, C]``."""
        return answer_scores(features, self.length_normalised) if features.ndim == 4 else features

    def surprise(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor] | None:
        """What perplexity is made of: every example's sum of negative log-likelihoods and tokens; None of answers."""
        return token_losses(logits, batch.targets) if logits.ndim == 3 else None

    def extra_repr(self) -> str:
        """Show the setting when printed."""
        return f"length_normalised={self.length_normalised}"


class EncoderTexts:
    """A sentence encoder as the text side of zero-shot heads (:class:`lit_merge.models.heads.TextEncoder`).

    Args:
        module: the encoder at θ0.
        tokenization: of it.
        fingerprint: of θ0.
        logit_scale: the inverse temperature of the cosine similarities.
    """

    def __init__(self, module: PooledEncoder, tokenization: Tokenization, fingerprint: str, logit_scale: float) -> None:
        if not 0 < logit_scale < float("inf"):
            raise ConfigurationError(f"logit_scale: expected a positive number, got {logit_scale!r}. Use e.g. 20.")
        self._module, self._tokenization, self.logit_scale = module, tokenization, logit_scale
        self.text_fingerprint = f"{fingerprint}, {tokenization!r}, {module.pooling}, {logit_scale}"

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """N texts to ``[N, d]``, rows of length 1."""
        inputs, _ = self._tokenization.padded(self._tokenization.encode(texts).input_ids)
        device = next(self._module.parameters()).device
        features = self._module(*(one.to(device) for one in inputs))
        return nn.functional.normalize(features.float(), dim=-1)


Head = Literal["class_names", "classifier", "two_layer"]
