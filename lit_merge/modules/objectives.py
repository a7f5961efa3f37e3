"""What is minimised: small objects that a configuration names, and that research adds to.

An objective is called with ``(logits, batch)`` and returns a scalar; ``needs_targets`` says whether it reads labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError, did_you_mean
from lit_merge.functional.tokens import prediction_entropy, token_losses
from lit_merge.metrics.hits import UNLABELLED, losses_of

__all__ = [
    "Comparison",
    "CrossEntropy",
    "Entropy",
    "Expert",
    "Features",
    "Objective",
    "Outputs",
    "minimised",
    "objective_of",
]


class Objective(ABC):
    """What an objective has; subclass it for one of your own, and name it by its import path.

    Attributes:
        needs_targets: whether it reads the batch's targets; otherwise unlabelled examples do.
    """

    needs_targets: ClassVar[bool]

    @abstractmethod
    def __call__(self, logits: Tensor, batch: Any) -> Tensor:
        """The objective of a batch.

        Args:
            logits: ``[B, C]``; of a language model's next tokens ``[B, M, V]``.
            batch: a :class:`lit_merge.data.Batch`, with ``targets`` -1 where they are not known, and ``indices`` -1
                where an example only fills the batch up.

        Returns:
            A scalar.
        """


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """The mean cross-entropy of the labelled examples; of next tokens the mean over every example's tokens.

    Args:
        label_smoothing: in [0, 1).

    Raises:
        ConfigurationError: it is out of range.
    """

    label_smoothing: float = 0.0
    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(
                f"label_smoothing: expected a number in [0, 1), got {self.label_smoothing}. Use e.g. 0.1."
            )

    def __call__(self, logits: Tensor, batch: Any) -> Tensor:
        """See :class:`Objective`."""
        if logits.ndim == 3:
            total, count = token_losses(logits, batch.targets, self.label_smoothing)
            return (total / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
        return F.cross_entropy(logits, batch.targets, ignore_index=UNLABELLED, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Entropy(Objective):
    """The mean Shannon entropy of the predictions, which needs no labels (Yang et al. 2024, equation 8).

    Predictions are of classes, of answers by their scores, or of the next token at an example's positions.
    """

    needs_targets: ClassVar[bool] = False

    def __call__(self, logits: Tensor, batch: Any) -> Tensor:
        """See :class:`Objective`."""
        return prediction_entropy(logits)[batch.indices >= 0].mean()


class Outputs(NamedTuple):
    """What one model says about a batch of one task.

    Attributes:
        features: of the encoder, ``[B, d]``.
        logits: of the task's head, ``[B, C]``; of a language model's next tokens ``[B, M, V]``.
    """

    features: Tensor
    logits: Tensor


class Comparison(Objective):
    """An objective of a merge that compares it with the individual model ``θ0 + τ_t`` of the batch's task.

    The individual model sees the same examples, has the same head, and gets no gradient. No labels are read.
    """

    needs_targets: ClassVar[bool] = False

    @abstractmethod
    def against(self, merged: Outputs, individual: Outputs, batch: Any) -> Tensor:
        """The objective of a batch of one task.

        Args:
            merged: what the merge says, with gradients.
            individual: what the individual model says.
            batch: a :class:`lit_merge.data.Batch`, with ``indices`` -1 where an example only fills the batch up.

        Returns:
            A scalar.
        """

    def __call__(self, logits: Tensor, batch: Any) -> Tensor:
        """Refuse logits alone.

        Raises:
            ConfigurationError: always; :meth:`against` is what a merge calls.
        """
        raise ConfigurationError(
            f"objective {self!r}: expected a merge of individual models to compare with, got one model. Use it in "
            "MergeModule for tasks that have a vector, or objective cross_entropy here."
        )


@dataclass(frozen=True)
class Expert(Comparison):
    """The mean cross-entropy to the individual model's most probable class, where that is to be trusted.

    SyMerge's self-labels (Jung et al. 2026; ``crosspseudoconf`` of the authors' program): an example counts if both
    models agree, or if the individual one is at least as confident as the merge; the others are dropped. The mean is
    over what counts, which with several processes is what each of them keeps itself; it is 0 if nothing does. Of next
    tokens every position is an example.

    Args:
        keep: ``trusted``, as above, or ``all`` examples (``crosspseudo``).

    Raises:
        ConfigurationError: there is no such choice.
    """

    keep: Literal["trusted", "all"] = "trusted"

    def __post_init__(self) -> None:
        if self.keep not in ("trusted", "all"):
            raise ConfigurationError(f"Expert.keep: expected trusted or all, got {self.keep!r}.")

    def against(self, merged: Outputs, individual: Outputs, batch: Any) -> Tensor:
        """See :class:`Comparison`."""
        logits, expert = _precise(merged.logits), _precise(individual.logits)
        kept = batch.indices >= 0
        if logits.ndim == 3:  # logits are zero where nothing is predicted
            kept = kept.unsqueeze(1) & (expert != 0).any(-1)
        confidence, labels = expert.softmax(-1).max(-1)
        own, guesses = logits.detach().softmax(-1).max(-1)
        if self.keep == "trusted":
            kept = kept & ((guesses == labels) | (confidence >= own))
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return torch.where(kept.flatten(), losses, 0).sum() / kept.sum().clamp(min=1)


@dataclass(frozen=True)
class Features(Comparison):
    """The mean absolute difference between the merge's features and the individual model's (``l1feature`` of SyMerge).

    Features are the encoder's, as the head gets them, before any normalisation; the mean is over examples and elements.
    Of next tokens they are the logits, and every position where something is predicted is an example.
    """

    def against(self, merged: Outputs, individual: Outputs, batch: Any) -> Tensor:
        """See :class:`Comparison`."""
        real, expert = batch.indices >= 0, _precise(individual.features)
        if expert.ndim == 3:  # zeros where nothing is predicted
            real = real.unsqueeze(1) & (expert != 0).any(-1)
        difference = (_precise(merged.features) - expert)[real].abs()
        return difference.sum() / max(difference.numel(), 1)


def minimised(objective: Objective, head: Any, logits: Tensor, batch: Any) -> Tensor:
    """The objective of a batch; in place of the cross-entropy, the mean of a head's own ``loss`` if it has one.

    Args:
        objective: what is asked for.
        head: made the logits.
        logits: ``[B, C]``.
        batch: their :class:`lit_merge.data.Batch`.

    Returns:
        A scalar.
    """
    if not isinstance(objective, CrossEntropy) or not hasattr(head, "loss"):
        return objective(logits, batch)
    losses, counted = losses_of(head, logits, batch), (batch.indices >= 0).float()
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype.itemsize >= 4 else values.float()


_NAMED = {"cross_entropy": CrossEntropy, "entropy": Entropy, "expert": Expert, "features": Features}


def objective_of(given: Objective | str) -> Objective:
    """The objective that is given, or the one that a name stands for.

    Names are ``entropy``, ``cross_entropy``, and for merges ``expert`` and ``features``.

    Raises:
        ConfigurationError: there is no such name.
    """
    if not isinstance(given, str):
        return given
    if given not in _NAMED:
        raise ConfigurationError(
            f"objective: expected {', '.join(sorted(_NAMED))} or an object by class path, got {given!r}. "
            f"{did_you_mean(given, _NAMED, 'Subclass lit_merge.modules.Objective for another one.')}"
        )
    return _NAMED[given]()
