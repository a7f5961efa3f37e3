"""TATR: task arithmetic within the elements in which tasks do not disturb each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_merge.transforms.base import Transform
from lit_merge.transforms.conflicts.competition import Cuts, floor_of
from lit_merge.transforms.magnitudes import cuts_over_all, keep_largest, size_of
from lit_merge.transforms.weighted import per_parameter
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.statistics import StatisticsFiles, open_statistics

__all__ = ["TrustRegion"]


@dataclass(frozen=True)
class TrustRegion(Transform):
    r"""Sets the elements in which tasks conflict most to zero, in every vector; there are T vectors still.

    .. math:: \Omega = \sum_{s \neq t} |\bar g_s| \odot |\tau_t|

    Task arithmetic in the trust region (Sun et al. 2025): ḡ_s is the mean absolute gradient of task s's loss at θ0
    over some of its images, so that Ω is to first order what the tasks' vectors cost each other. Without data, |τ_s|
    stands for it, as in the paper's zero-shot variant. Exactly the largest n − ⌊(1 − fraction) n⌋ of the n elements of
    Ω are set to zero (of equal ones the first by name and position), unless they are 0.

    Args:
        fraction: of the elements that are set to zero, in [0, 1); 0 changes nothing.
        statistics: task -> file of its mean absolute gradients, from ``lit-merge statistics --kind gradients``; None
            for the variant without data.

    Raises:
        ConfigurationError: ``fraction`` is out of range; on application, a task has no file.
        FileFormatError: on application, a file is missing, damaged, or holds no gradients.
        StructureMismatchError: on application, a file is of another task, base model or architecture.
    """

    fraction: float = 0.01
    statistics: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._number("fraction", minimum=0.0, below=1.0)
        if self.statistics is not None:
            object.__setattr__(self, "statistics", StatisticsFiles(self.statistics, "TrustRegion.statistics"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Mask every row of the stacks ``(T, *shape)``."""
        others = []
        if self.statistics is not None:
            files = open_statistics("gradients", self.statistics, vectors, "TrustRegion.statistics")
            others = [TaskVectors([per_parameter("mean absolute gradients", file, vectors) for file in files])]
        size = size_of(vectors)
        dropped = size - floor_of(self.fraction, size, upper=True)
        settings: dict[str, Any] = {"note": self, "others": others}
        if not dropped:
            return vectors.map_elements(_unchanged, **settings)
        conflict = vectors.map_elements(_conflict_alone, tasks=[vectors.merged_tasks], others=others)
        cuts = cuts_over_all("TrustRegion: threshold of the conflict", conflict, dropped)
        return vectors.map_elements(partial(_without, cuts), **settings, statistics=[cuts])


def _conflict(chunk: Tensor, gradients: Tensor | None) -> Tensor:
    """Ω, ``(1, n)``, from every pair once; in float64, so that the order of the tasks does not decide."""
    total = torch.zeros_like(chunk[:1], dtype=torch.float64)
    vectors, costs = torch.zeros_like(total), torch.zeros_like(total)  # sums over the tasks before
    for index in range(len(chunk)):
        vector = chunk[index : index + 1].abs().double()
        cost = vector if gradients is None else gradients[index : index + 1].to(chunk.device).abs().double()
        total.add_(cost * vectors).add_(costs * vector)
        vectors.add_(vector)
        costs.add_(cost)
    return total.to(chunk.dtype)


def _conflict_alone(name: str, start: int, chunk: Tensor, *gradients: Tensor) -> Tensor:
    return _conflict(chunk, *(gradients or (None,)))


def _without(cuts: Cuts, name: str, start: int, chunk: Tensor, *gradients: Tensor) -> Tensor:
    if not chunk.numel():
        return chunk
    largest = keep_largest(cuts(), name, start, _conflict(chunk, *(gradients or (None,))))
    return chunk.masked_fill_(largest != 0, 0)


def _unchanged(name: str, start: int, chunk: Tensor, *gradients: Tensor) -> Tensor:
    return chunk
