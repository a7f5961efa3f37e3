"""One vector for all tasks that keeps of every element the largest, and the mask that cuts a task out of it by sign."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_merge.transforms.base import Transform, chain, check_transform
from lit_merge.transforms.masks import merged_by
from lit_merge.transforms.signs import ElectSign
from lit_merge.vectors import TaskVectors

__all__ = ["LargestMagnitude", "SignMask"]


@dataclass(frozen=True)
class LargestMagnitude(Transform):
    """Of every element that of the task where it is largest in magnitude: from T vectors to one.

    MagMax (Marczak et al. 2024). After :class:`ElectSign` it is the unified vector of EMR-Merging (Huang
    et al. 2024). If the largest magnitude occurs with both signs, the positive element is taken, so that
    the order of the tasks does not matter; the authors' program takes the last task's.
    """

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return vectors.reduce_elements(_largest, note=self)


@dataclass(frozen=True)
class SignMask(Transform):
    """A vector per task, cut out of the merged one where the signs agree: ``m_t ⊙ τ_uni`` with ``m_t = τ_t τ_uni > 0``.

    The masks of EMR-Merging (Huang et al. 2024); ``Rescale("l1")`` after it multiplies every
    task's vector by ``λ_t = Σ|τ_t| / Σ|m_t ⊙ τ_uni|``. θ0 plus row t stands for task t.

    Args:
        merge: how τ_uni is made of the vectors; it reduces them to one.

    Raises:
        ConfigurationError: ``merge`` is no transform; on application, it leaves several vectors.
    """

    merge: Transform = chain(ElectSign(), LargestMagnitude())  # noqa: RUF009 - frozen, so it can be shared

    def __post_init__(self) -> None:
        check_transform("SignMask.merge", self.merge)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """From stacks ``(T, *shape)`` to masked copies of the merged vector, ``(T, *shape)``."""
        return vectors.map_elements(_cut_out, note=self, others=[merged_by(self, self.merge, vectors)])


def _largest(name: str, start: int, chunk: Tensor) -> Tensor:
    highest, lowest = chunk.amax(0, keepdim=True), chunk.amin(0, keepdim=True)
    return highest.where(highest >= -lowest, lowest)


def _cut_out(name: str, start: int, chunk: Tensor, merged: Tensor) -> Tensor:
    return merged * (chunk.sign_() * merged.sign() > 0)
