"""How good a language model's responses are: by a sequence classifier, or by any callable of prompts and responses."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, NonFiniteError, first_few
from lit_merge.transforms.base import one_of, whole_number

if TYPE_CHECKING:
    from lit_merge.models.language.loading import LoadedModel

__all__ = ["ClassifierReward", "Reward", "WordCount", "checked_rewards"]


class Reward(ABC):
    """What a response is worth, the more the better; subclass it for one of your own, named by its import path."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The reward of every response, float32 ``[N]``.

        Args:
            prompts: N texts.
            responses: what was written after each.
        """


def checked_rewards(name: str, reward: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """A reward's values, float32 ``[N]`` on the CPU, as there has to be one of every response.

    Raises:
        ConfigurationError: there are more or fewer.
        NonFiniteError: one is NaN or infinite.
    """
    values = torch.as_tensor(reward(list(prompts), list(responses)), dtype=torch.float32).detach().cpu()
    if values.shape != (len(responses),):
        raise ConfigurationError(
            f"reward {name}: expected one number for each of {len(responses)} responses, got the shape "
            f"{list(values.shape)}. Return a tensor [N]."
        )
    if not bool(values.isfinite().all()):
        raise NonFiniteError(f"reward {name}: expected finite numbers, got {values[~values.isfinite()][0]:g}.")
    return values


@dataclass(frozen=True)
class WordCount(Reward):
    """How near a response is to a number of words: ``−|words − n| / n``, at most 0.

    Args:
        words: n, at least 1.
    """

    words: int = 20

    def __post_init__(self) -> None:
        whole_number("WordCount.words", self.words, minimum=1)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """See :class:`Reward`."""
        return torch.tensor([-abs(len(text.split()) - self.words) / self.words for text in responses])


@dataclass(frozen=True)
class ClassifierReward(Reward):
    """A sequence classifier's score of a response: a reward model, or the probability of e.g. toxicity.

    Args:
        path: a folder of transformers with its tokenizer, or ``hf://owner/name``; its code is never run.
        label: which of its outputs, by name or number.
        against: an output whose score is subtracted, or None.
        score: ``logit``, as reward models give it; or the probability: ``softmax`` over the labels, or ``sigmoid``.
        above: instead of the score 1 where it is above this number, and 0 elsewhere: the mean is a fraction.
        text: what the classifier reads, with ``{response}`` and perhaps ``{prompt}``; special tokens are written out.
        prompt_part: a regular expression whose first group is the part of the prompt that ``{prompt}`` stands for,
            or None for all of it.
        first_sentence: whether a response is read up to its first full stop.
        batch_size: texts at a time.

    Raises:
        ConfigurationError: a setting is out of its range; in use, there is no such label.
    """

    path: str
    label: str | int = 0
    against: str | int | None = None
    score: Literal["logit", "softmax", "sigmoid"] = "logit"
    above: float | None = None
    text: str = "{response}"
    prompt_part: str | None = None
    first_sentence: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        one_of("ClassifierReward.score", self.score, ("logit", "softmax", "sigmoid"))
        whole_number("ClassifierReward.batch_size", self.batch_size, minimum=1)
        if "{response}" not in self.text:
            raise ConfigurationError(
                f"ClassifierReward.text: expected a text with {{response}}, got {self.text!r}. Add it."
            )
        if self.above is not None and not math.isfinite(self.above):
            raise ConfigurationError(f"ClassifierReward.above: expected a finite number, got {self.above}.")
        try:
            groups = 1 if self.prompt_part is None else re.compile(self.prompt_part).groups
        except re.error as error:
            raise ConfigurationError(
                f"ClassifierReward.prompt_part: expected a regular expression, got {self.prompt_part!r} ({error})."
            ) from error
        if groups < 1:
            raise ConfigurationError(
                f"ClassifierReward.prompt_part: expected a group in parentheses, got none in {self.prompt_part!r}."
            )

    @cached_property
    def _loaded(self) -> LoadedModel:
        from lit_merge.models.language.loading import load_classifier

        loaded = load_classifier(self.path)
        return loaded

    def _place(self, label: str | int) -> int:
        config: Any = self._loaded.model.config
        names = {int(number): str(name) for number, name in config.id2label.items()}
        places = {name: number for number, name in names.items()}
        if isinstance(label, str) and label in places:
            return places[label]
        if isinstance(label, str) or label not in names:
            raise ConfigurationError(
                f"ClassifierReward.label: expected one of {first_few(names.values(), 8)} of {self.path}, or its "
                f"number, got {label!r}."
            )
        return label

    def texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        """What the classifier reads."""
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            if self.prompt_part is not None and (match := re.search(self.prompt_part, prompt, re.DOTALL)):
                prompt = match[1] or ""
            if self.first_sentence and "." in response:
                response = response.partition(".")[0] + "."
            # One pass: braces in the prompt or the response mean nothing.
            values = {"{prompt}": prompt, "{response}": response}
            found.append(re.sub(r"\{(?:prompt|response)\}", lambda hit, own=values: own[hit[0]], self.text))  # type: ignore[misc]
        return found

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """See :class:`Reward`."""
        texts, model, tokenizer = self.texts(prompts, responses), self._loaded.model, self._loaded.tokenizer
        place, against = self._place(self.label), None if self.against is None else self._place(self.against)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        model.to(device)
        # A classifier that reads the last token finds it by its own number for padding, and from the text's begin.
        padded = tokenizer.pad_token_id is not None and (
            tokenizer.pad_token_id == getattr(model.config, "pad_token_id", None)
        )
        found = []
        for start in range(0, len(texts), self.batch_size):
            # One text at a time where nothing can be padded with.
            chunk = texts[start : start + self.batch_size]
            parts = [chunk] if padded else chunk
            for part in parts:
                given = tokenizer(
                    part if isinstance(part, list) else [part],
                    padding=isinstance(part, list),
                    padding_side="right",
                    truncation=True,
                    max_length=_longest(self._loaded),
                    return_tensors="pt",
                )
                logits = model(**given.to(device)).logits.float()
                found.append(self._scores(logits, place, against).cpu())
        return torch.cat(found) if found else torch.zeros(0)

    def _scores(self, logits: Tensor, place: int, against: int | None) -> Tensor:
        if self.score == "softmax":
            logits = logits.softmax(-1)
        elif self.score == "sigmoid":
            logits = logits.sigmoid()
        chosen = logits[:, place] if against is None else logits[:, place] - logits[:, against]
        return chosen if self.above is None else (chosen > self.above).float()


def _longest(loaded: LoadedModel) -> int:
    from lit_merge.models.language.loading import longest_input

    known = [loaded.tokenizer.model_max_length, longest_input(loaded.model, loaded.tokenizer) or math.inf]
    shortest = min(known)
    return int(shortest) if shortest < 1e9 else 512
