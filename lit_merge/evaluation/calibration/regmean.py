"""RegMean++: RegMean on the inputs that the merged model itself makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_merge.evaluation.calibration.settings import Calibration
from lit_merge.params import Params
from lit_merge.transforms.base import finite_number
from lit_merge.transforms.weighted import Regression

if TYPE_CHECKING:
    from lit_merge.evaluation.calibration.walk import Walk

__all__ = ["RegMeanPlusPlus"]


@dataclass(frozen=True)
class RegMeanPlusPlus(Calibration):
    r"""RegMean with the inputs of the merged model's earlier blocks (Nguyen et al. 2025, RegMean++).

    .. math:: W = \Big(\sum_t \tilde G_t\Big)^{-1} \sum_t \tilde G_t W_t, \qquad G_t = X_t^\top X_t / n_t

    as :class:`lit_merge.transforms.RegMean`, from which only X_t differs: a block's input is what the blocks before it
    make of the task's inputs after they were merged; within the block they pass through the task's own layers. What is
    not linear in a block takes its mean, what is outside the blocks stays as the start has it: with ``weight_average``
    as the start this is the paper's method.

    Args:
        images: as for :class:`Calibration`, like the next four.
        split: whose inputs.
        batch_size: inputs at a time.
        seed: of the choice.
        memory: GiB of activations in memory.
        off_diagonal: factor α of the off-diagonal elements, in [0, 1].

    Raises:
        ConfigurationError: a setting is out of range.
    """

    off_diagonal: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_number("RegMeanPlusPlus.off_diagonal", self.off_diagonal, minimum=0.0, maximum=1.0)

    def block(self, walk: Walk, index: int) -> Params:
        """The regression of every linear layer, and the mean of the rest."""
        solved = walk.mean(index)
        regressions: dict[str, Regression] = {}
        for task in walk.tasks:
            expert = walk.expert(index, task)
            grams: dict[str, Tensor] = {}
            counts: dict[str, int] = {}
            with walk.placed(index, walk.merged_weights(index, expert)) as mode:
                for number in walk.batches(task):
                    walk.run(index, task, number, mode)
                    for key, rows in mode.linear.items():
                        product = (rows.mT @ rows).double()
                        grams[key] = grams[key] + product if key in grams else product
                        counts[key] = counts.get(key, 0) + len(rows)
            for key, gram in grams.items():
                name = key.removesuffix(".T")
                if name not in solved:
                    continue
                if key not in regressions:
                    regressions[key] = Regression(_rows(key, solved[name]), self.off_diagonal)
                regressions[key].add(gram / counts[key], _rows(key, expert[name]))
        for key, regression in regressions.items():
            name = key.removesuffix(".T")
            departure = _rows(key, regression.departure(torch.finfo(torch.float32).eps))
            solved[name] = solved[name] + departure.to(solved[name].dtype)
        return solved


def _rows(key: str, weight: Tensor) -> Tensor:
    """A weight as ``[out, in]``; the same turns it back."""
    return weight.mT if key.endswith(".T") else weight
