"""What a search measures instead of the accuracy: the perplexity of a text, or the reward of what is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_merge.errors import ConfigurationError
from lit_merge.metrics.perplexity import Perplexity
from lit_merge.metrics.rewards import Reward, checked_rewards
from lit_merge.models.language.generation import Generation, prompt_texts, prompts

if TYPE_CHECKING:
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["MeanReward", "Measure", "TokenProbability"]


class Measure(ABC):
    """A number per task and model, the more the better, in place of the accuracy.

    Attributes:
        key: tells it from other measures in the cache of what was measured; None if that is not to be cached.
    """

    key: str | None = None

    @abstractmethod
    def __call__(self, module: MultiTaskModule, task: str, batches: Iterable[Any]) -> float:
        """Measure the module as it is.

        Args:
            module: on its device, in evaluation mode.
            task: one of its tasks.
            batches: the task's, on the module's device.
        """

    @abstractmethod
    def describe(self) -> str:
        """What the number is, in a few words."""


@dataclass(frozen=True)
class TokenProbability(Measure):
    """``1 / perplexity = exp(−1/N Σ_n −log p(x_n | x_<n))``, the geometric mean of the right tokens' probabilities.

    It is in (0, 1] like an accuracy, and the share of it that is kept is ``perplexity(θ0) / perplexity(θ)``.
    """

    key = "1 / perplexity"

    def __call__(self, module: MultiTaskModule, task: str, batches: Iterable[Any]) -> float:
        """See :class:`Measure`.

        Raises:
            ConfigurationError: the task is not one of predicting tokens.
        """
        head: Any = module.head_of(task)
        metric = Perplexity().to(module.device)
        for batch in batches:
            surprise = head.surprise(head(module.features(batch)), batch) if hasattr(head, "surprise") else None
            if surprise is None:
                raise ConfigurationError(
                    f"search.perplexity: expected tasks of texts alone or with free targets, of which tokens are "
                    f"predicted, got {task}. Leave it out: it is measured by its accuracy then."
                )
            metric.update(*surprise)
        return float((-metric.total / metric.tokens).exp())

    def describe(self) -> str:
        """See :class:`Measure`."""
        return "1 / perplexity"


@dataclass(frozen=True)
class MeanReward(Measure):
    """The mean reward of what the model writes after a task's prompts, by greedy decoding.

    Args:
        name: of the reward, for messages.
        reward: of prompts and responses.
        generation: how much is written.
    """

    name: str
    reward: Reward
    generation: Generation

    def __call__(self, module: MultiTaskModule, task: str, batches: Iterable[Any]) -> float:
        """See :class:`Measure`.

        Raises:
            ConfigurationError: the network writes no texts, or is linearised.
            NonFiniteError: a reward is no finite number.
        """
        tokenization: Any = module.base.preprocessing
        network: Any = module.network
        if getattr(tokenization, "kind", "encoder") == "encoder" or module.linearized:
            got = "one that is linearised" if module.linearized else f"{module.base_name!r}"
            raise ConfigurationError(f"search.rewards: expected a network that writes texts, got {got}. Remove them.")
        found = []
        for batch in batches:
            given = prompts(batch, tokenization)
            written = self.generation(network, tokenization, given)
            values = checked_rewards(self.name, self.reward, prompt_texts(given, tokenization), written)
            found.append(values[batch.indices.cpu() >= 0].double())
        return float(torch.cat(found).mean())

    def describe(self) -> str:
        """See :class:`Measure`."""
        return f"mean of {self.reward!r} over {self.generation.max_new_tokens} tokens"
