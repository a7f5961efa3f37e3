"""What is minimised: small objects that a configuration names, and that research adds to.

An objective is called with ``(logits, batch)`` and returns a scalar; ``needs_targets`` says whether it reads labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError, did_you_mean
from lit_merge.functional.tokens import prediction_entropy, token_losses
from lit_merge.metrics.hits import UNLABELLED

__all__ = ["CrossEntropy", "Entropy", "Objective", "objective_of"]


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


_NAMED = {"cross_entropy": CrossEntropy, "entropy": Entropy}


def objective_of(given: Objective | str) -> Objective:
    """The objective that is given, or the one that a name stands for: ``entropy`` or ``cross_entropy``.

    Raises:
        ConfigurationError: there is no such name.
    """
    if not isinstance(given, str):
        return given
    if given not in _NAMED:
        raise ConfigurationError(
            f"objective: expected entropy, cross_entropy or an object by class path, got {given!r}. "
            f"{did_you_mean(given, _NAMED, 'Subclass lit_merge.modules.Objective for another one.')}"
        )
    return _NAMED[given]()
