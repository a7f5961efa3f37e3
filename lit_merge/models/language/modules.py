"""Transformers' models as functions of tensors that return one tensor, under the models' own parameter names."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.functional.tokens import answers_first

__all__ = ["CausalModule", "EncoderDecoderModule", "LanguageModule", "PooledEncoder", "second_texts"]

Pooling = Literal["mean", "cls", "last"]

# Of these the logits are the output embedding's product with the last hidden states, and nothing more: it is computed
# where tokens are predicted only.
_PLAIN_HEADS = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"})


class LanguageModule(nn.Module):
    """A transformers model whose parts, parameters and buffers are this module's own, under the same names.

    The two share their dictionaries, so that what stands in for a parameter here does so there too; a checkpoint's
    names are those that ``from_pretrained`` knows.

    Args:
        model: of transformers; it is not changed.

    Attributes:
        config: the model's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._wrapped = [model]  # not registered: that would put "model." before every name
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.config = model.config
        self.training = model.training

    @property
    def of_transformers(self) -> Any:  # "model" is what a Llama calls a part of itself
        """The transformers model, with the values that the parameters have here."""
        model = self._wrapped[0]
        model.training = self.training
        return model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again on the way back, to save memory; a linearised model does not.

        Raises:
            ConfigurationError: the model has no such blocks.
        """
        model = self.of_transformers
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the older name
        if not enable:
            getattr(model, f"{kind}_checkpointing_disable")()
            return
        if not model.supports_gradient_checkpointing:
            raise ConfigurationError(
                f"activation_checkpointing: expected a model that can do it, got {type(model).__name__}. Turn it off."
            )
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        model.disable_input_require_grads()  # needed by the re-entrant way only; a tangent's value has no graph


class PooledEncoder(LanguageModule):
    """Token numbers to one vector per text.

    Args:
        model: an encoder.
        pooling: ``mean`` over the text's tokens, the first token's, ``cls``, or the ``last`` one's before the padding.
        normalize: whether the vectors are brought to length 1.
        separator: the token after which the second text of a pair begins, of models that tell the two apart.
    """

    def __init__(
        self, model: Any, pooling: Pooling = "mean", normalize: bool = False, separator: int | None = None
    ) -> None:
        super().__init__(model)
        self.pooling, self.normalize, self.separator = pooling, normalize, separator

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token numbers and mask, int64 ``[B, L]``, to features ``[B, d]``."""
        mask = _some(attention_mask)
        types = {} if self.separator is None else {"token_type_ids": second_texts(input_ids, mask, self.separator)}
        hidden = self.of_transformers(input_ids=input_ids, attention_mask=mask, **types).last_hidden_state
        if self.pooling == "cls":
            features = hidden[:, 0]
        elif self.pooling == "last":
            features = _taken(hidden, mask.sum(1, keepdim=True) - 1).squeeze(1)
        else:
            weights = mask.to(hidden.dtype)
            weights = weights / weights.sum(1, keepdim=True)
            features = (hidden * weights.unsqueeze(-1)).sum(1)
        return F.normalize(features, dim=-1) if self.normalize else features


class EncoderDecoderModule(LanguageModule):
    """Texts and the beginnings of their targets to the logits of the next tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, answers: Tensor | None = None
    ) -> Tensor:
        """Logits of every next token, zeros where the decoder has no token.

        Args:
            input_ids: int64 ``[B, L]``.
            attention_mask: int64 ``[B, L]``.
            decoder_input_ids: int64 ``[B, M]``, or ``[B, C, M]`` for C answers; -1 where there is none.
            answers: the tokens of C answers, int64 ``[B, C, M]``, -1 where there are none.

        Returns:
            ``[B, M, V]``; with answers ``[B, C, M, V]``, of which :func:`~lit_merge.functional.tokens.answers_first`
            has changed the order.
        """
        mask = _some(attention_mask)
        begun = decoder_input_ids.flatten(0, -2)
        encoded = self.of_transformers.get_encoder()(input_ids=input_ids, attention_mask=mask)
        times = len(begun) // len(input_ids)
        if times > 1:
            encoded["last_hidden_state"] = encoded[0].repeat_interleave(times, 0)
            mask = mask.repeat_interleave(times, 0)
        logits = self.of_transformers(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=begun.clamp(min=0), use_cache=False
        ).logits
        logits = _where(begun >= 0, logits).unflatten(0, decoder_input_ids.shape[:-1])
        return logits if answers is None else answers_first(logits, answers)


class CausalModule(LanguageModule):
    """Texts to the logits of next tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None, answers: Tensor | None = None
    ) -> Tensor:
        """Logits of the tokens after some positions, zeros where there is no position.

        Args:
            input_ids: int64 ``[B, L]``, or ``[B, C, L]`` for C answers; padding at the end.
            attention_mask: int64, of the same shape.
            positions: int64 ``[B, M]`` or ``[B, C, M]``, -1 where there is none; None for all of the text.
            answers: the tokens of C answers, int64 ``[B, C, M]``, -1 where there are none.

        Returns:
            ``[B, M, V]``, or ``[B, L, V]`` without positions; with answers ``[B, C, M, V]``, of which
            :func:`~lit_merge.functional.tokens.answers_first` has changed the order.
        """
        shape = input_ids.shape[:-1]
        ids, mask = input_ids.flatten(0, -2), attention_mask.flatten(0, -2)
        valid = mask > 0 if positions is None else positions.flatten(0, -2) >= 0
        places = None if positions is None else positions.flatten(0, -2).clamp(min=0)
        logits = _where(valid, self._logits(ids, _some(mask), places)).unflatten(0, shape)
        return logits if answers is None else answers_first(logits, answers)

    def _logits(self, ids: Tensor, mask: Tensor, places: Tensor | None) -> Tensor:
        model = self.of_transformers
        if places is None or self.config.model_type not in _PLAIN_HEADS:
            logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits if places is None else _taken(logits, places)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        predicted: Tensor = model.get_output_embeddings()(_taken(hidden, places))
        return predicted


def second_texts(ids: Tensor, mask: Tensor, separator: int) -> Tensor:
    """1 for the tokens of a pair's second text, which follow the first separator, 0 for all others; ``[B, L]``."""
    ends = (ids == separator).long()
    return (ends.cumsum(1) > ends).long() * (mask > 0)


def _taken(hidden: Tensor, places: Tensor) -> Tensor:
    """Some of the positions, ``[B, L, d]`` and ``[B, M]`` to ``[B, M, d]``."""
    return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _where(valid: Tensor, logits: Tensor) -> Tensor:
    """Zeros where nothing is predicted, so that no result depends on the padding."""
    return logits.masked_fill(~valid.unsqueeze(-1), 0)


def _some(mask: Tensor) -> Tensor:
    """The mask; an example of padding alone has one token, as attention to nothing is not defined."""
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    return torch.where(mask.any(1, keepdim=True), mask, first)
