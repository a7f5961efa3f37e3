"""What a language model writes after a prompt, with every setting of the generation pinned.

Libraries change the defaults of generation, and folders bring their own: neither has a say here, so that a number stays
what it was. The settings are those of greedy decoding and go into the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.models.language.modules import LanguageModule
from lit_merge.models.language.tokenization import Tokenization

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Generation", "expected_texts", "prompt_texts", "prompts"]

_PINNED: dict[str, Any] = {
    **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "early_stopping": False},
    **{"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "min_new_tokens": 0},
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "renormalize_logits": False, "use_cache": True},
}


@dataclass(frozen=True)
class Generation:
    """Greedy decoding: at every step the most probable token, until the end of text or a number of tokens.

    Args:
        max_new_tokens: most tokens that are written, the end of text included.
    """

    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ConfigurationError(
                f"max_new_tokens: expected an integer of at least 1, got {self.max_new_tokens!r}. Use e.g. 32."
            )

    def settings(self, tokenization: Tokenization) -> dict[str, Any]:
        """All settings, as they go into the results; transformers' other ones are not set."""
        return {
            **_PINNED,
            "max_new_tokens": self.max_new_tokens,
            "pad_token_id": tokenization.pad_id,
            "eos_token_id": tokenization.end_id,
            "bos_token_id": tokenization.tokenizer.bos_token_id,
            "decoder_start_token_id": tokenization.start_id,
        }

    @torch.no_grad()
    def __call__(self, module: LanguageModule, tokenization: Tokenization, texts: Sequence[Tensor]) -> list[str]:
        """Write after some prompts.

        Args:
            module: with the weights to use, in evaluation mode.
            tokenization: of its network.
            texts: token numbers of every prompt, int64 ``[length]``, of any lengths.

        Returns:
            What was written after each, without special tokens and spaces around it.
        """
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), tokenization.pad_id, device=texts[0].device)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):  # what is written after a text begins at its end
            place = slice(longest - len(text), None) if tokenization.kind == "causal" else slice(len(text))
            ids[row, place], mask[row, place] = text, 1
        model = module.of_transformers
        from transformers import GenerationConfig

        own = GenerationConfig(**self.settings(tokenization))
        with _generation_config(model, own):
            # In inference mode caches would be, too, and stay with the model.
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=own)
        # A decoder's first token is given, and of a BART it is the end of text.
        written = written[:, longest if tokenization.kind == "causal" else 1 :]
        return _decoded(written.cpu(), tokenization)

    @torch.no_grad()
    def of_function(
        self, forward: Callable[..., Tensor], tokenization: Tokenization, texts: Sequence[Tensor]
    ) -> list[str]:
        """Write after some prompts by a function of inputs, such as a linearised model, which has no cache.

        Every token takes a pass over all that is there: the text is that of :meth:`__call__` where the function is the
        network.

        Args:
            forward: the network's inputs to logits ``[B, M, V]``.
            tokenization: of the network.
            texts: as for :meth:`__call__`.
        """
        device, given = texts[0].device, [text.cpu().numpy() for text in texts]
        written, begun = (
            torch.empty((len(texts), 0), dtype=torch.int64),
            torch.zeros((len(texts), 1), dtype=torch.int64),
        )
        ended = torch.zeros(len(texts), dtype=torch.bool)
        for _ in range(self.max_new_tokens):  # what follows is not known: any token stands for it
            inputs, _ = tokenization.padded(given, list(torch.cat([written, begun], 1).numpy()))
            logits = forward(*(one.to(device) for one in inputs))
            token = torch.where(ended, tokenization.pad_id, logits[:, -1].argmax(-1).cpu())
            written = torch.cat([written, token.unsqueeze(1)], 1)
            ended |= token == tokenization.end_id
            if bool(ended.all()):
                break
        return _decoded(written, tokenization)


def prompts(batch: Any, tokenization: Tokenization) -> list[Tensor]:
    """Token numbers of a batch's texts without what is to be predicted.

    Args:
        batch: a :class:`lit_merge.data.Batch` of texts with targets, or with answers to choose from.
        tokenization: of its network.
    """
    ids, mask = batch.inputs[:2]
    if tokenization.kind != "causal":
        return [row[: int(known.sum())] for row, known in zip(ids, mask, strict=True)]
    first = batch.inputs[2].flatten(1)[:, 0]  # it predicts the first token of what follows
    return [row[: int(place) + 1] for row, place in zip(ids if ids.ndim == 2 else ids[:, 0], first, strict=True)]


def prompt_texts(texts: Sequence[Tensor], tokenization: Tokenization) -> list[str]:
    """Prompts as texts again, without the special tokens that the tokenizer adds; those of a chat's turns stay."""
    return [tokenization.text(one.tolist()) for one in texts]


def expected_texts(batch: Any, tokenization: Tokenization) -> list[str | None]:
    """The target of every example of a batch as text, of ranked answers the right one; None where it is not known."""
    targets = batch.targets
    if len(batch.inputs) == 4:
        rows = batch.inputs[3][torch.arange(len(targets)), targets.clamp(min=0)]
        tokens = torch.where((targets >= 0).unsqueeze(-1), rows, -1)
    else:
        tokens = targets
    decode = tokenization.tokenizer.decode
    return [
        decode(row[row >= 0].tolist(), skip_special_tokens=True).strip() if bool((row >= 0).any()) else None
        for row in tokens.cpu()
    ]


def _decoded(written: Tensor, tokenization: Tokenization) -> list[str]:
    """Texts up to their ends: what stands after one is padding, which a GPT-2's tokenizer would read as a word."""
    ends = (written == -1 if tokenization.end_id is None else written == tokenization.end_id).long()
    rows = [row[: int(end.argmax())] if bool(end.any()) else row for row, end in zip(written, ends, strict=True)]
    return [one.strip() for one in tokenization.tokenizer.batch_decode(rows, skip_special_tokens=True)]


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """In place of the folder's, from which transformers would take what is not set."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before
