"""Masks that say which elements of a merged vector belong to which task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform, check_transform, whole_number
from lit_merge.transforms.reduce import Sum, per_task, per_task_values
from lit_merge.vectors import TaskVectors

__all__ = ["ConsensusMask", "TallMask", "merged_by"]


@dataclass(frozen=True)
class TallMask(Transform):
    """A vector per task, cut out of the merged one: ``m_t ⊙ τ_MTL`` with ``m_t = |τ_t| > λ |τ_MTL − τ_t|``.

    TALL masks (Wang et al. 2024, equation 5): adding row t to θ0 rebuilds task t.

    Args:
        threshold: λ, at least 0; one number for all tasks, or one per task, by name or in the order of the vectors. The
            paper chooses each of 0.2 … 0.6 on validation data.
        merge: how τ_MTL is made of the vectors; it reduces them to one.

    Raises:
        ConfigurationError: a threshold is negative or not finite, or ``merge`` is no transform; on application, if the
            per-task thresholds do not fit the tasks, or ``merge`` leaves several vectors.
    """

    threshold: float | Mapping[str, float] | Sequence[float] = 0.4
    merge: Transform = Sum()  # noqa: RUF009 - frozen, so it can be shared

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", per_task("TallMask.threshold", self.threshold, minimum=0.0))
        check_transform("TallMask.merge", self.merge)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """From stacks ``(T, *shape)`` to masked copies of the merged vector, ``(T, *shape)``."""
        merged = merged_by(self, self.merge, vectors)
        thresholds = per_task_values("TallMask.threshold", self.threshold, vectors.tasks)
        return vectors.map_elements(partial(_cut_out, thresholds), note=self, others=[merged])


@dataclass(frozen=True)
class ConsensusMask(Transform):
    """The merged vector without the elements that fewer than k tasks use: an element stays if k TALL masks have it.

    Consensus merging (Wang et al. 2024, section 4.2).

    Args:
        k: from 1 to the number of tasks.
        threshold: λ of the masks, as for :class:`TallMask`.
        merge: how τ_MTL is made of the vectors; it reduces them to one.

    Raises:
        ConfigurationError: as for :class:`TallMask`, or k is not a whole number of at least 1; on application, if there
            are fewer than k tasks.
    """

    k: int = 2
    threshold: float | Mapping[str, float] | Sequence[float] = 0.4
    merge: Transform = Sum()  # noqa: RUF009 - frozen, so it can be shared

    def __post_init__(self) -> None:
        whole_number("ConsensusMask.k", self.k, minimum=1)
        object.__setattr__(self, "threshold", per_task("ConsensusMask.threshold", self.threshold, minimum=0.0))
        check_transform("ConsensusMask.merge", self.merge)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        if self.k > len(vectors.tasks):
            raise ConfigurationError(
                f"ConsensusMask.k: expected at most the number of task vectors ({len(vectors.tasks)}), got {self.k}. "
                "Lower k, or give more vectors."
            )
        merged = merged_by(self, self.merge, vectors)
        thresholds = per_task_values("ConsensusMask.threshold", self.threshold, vectors.tasks)
        return vectors.reduce_elements(partial(_agreed, self.k, thresholds), note=self, others=[merged])


def merged_by(transform: Transform, merge: Transform, vectors: TaskVectors) -> TaskVectors:
    """What ``transform.merge`` makes of vectors, which has to be one."""
    merged = merge(vectors)
    if len(merged.tasks) != 1:
        raise ConfigurationError(
            f"{type(transform).__name__}.merge: expected a transform that leaves one vector, got {merge!r}, which "
            f"leaves {len(merged.tasks)}. Use e.g. Sum()."
        )
    return merged


def _mask(thresholds: tuple[float, ...], chunk: Tensor, merged: Tensor) -> Tensor:
    """The TALL masks; the chunk is written into."""
    factors = torch.tensor(thresholds, dtype=chunk.dtype, device=chunk.device).unsqueeze(1)
    others = (merged - chunk).abs_().mul_(factors)
    return chunk.abs_() > others


def _cut_out(thresholds: tuple[float, ...], name: str, start: int, chunk: Tensor, merged: Tensor) -> Tensor:
    return merged * _mask(thresholds, chunk, merged)


def _agreed(k: int, thresholds: tuple[float, ...], name: str, start: int, chunk: Tensor, merged: Tensor) -> Tensor:
    return merged.masked_fill_(_mask(thresholds, chunk, merged).sum(0, keepdim=True) < k, 0)
