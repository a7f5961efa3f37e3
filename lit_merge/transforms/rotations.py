"""Merging what turns a weight apart from what changes it otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.params import is_finite
from lit_merge.transforms.base import Chain, Transform, check_transform
from lit_merge.transforms.matrices import check_pattern, decomposed, decomposition, is_matrix, work_of_matrices
from lit_merge.transforms.reduce import Scale, Sum
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work

__all__ = ["OrthoMerge"]


@dataclass(frozen=True)
class OrthoMerge(Transform):
    r"""Merges the rotations of the inputs that tasks learned on the group of rotations, and the rest as vectors.

    OrthoMerge (Yang et al. 2026, 2602.05943), for models that were not fine-tuned by rotations. Of every matrix W0
    ``[out, in]`` and its task vectors:

    1. ``R_t`` is the rotation with the smallest ``‖W0 R_t − W_t‖`` (Procrustes): P Qᵀ of ``W0ᵀ W_t = P S Qᵀ``, with the
       last column of P turned round if that is a reflection, which 2 cannot take (Kabsch 1976);
    2. Cayley's map makes it skew-symmetric, ``A_t = (R_t + I)⁻¹ (R_t − I)``, where rotations are added:
       ``A = Σ A_t / ‖Σ A_t‖ · (1/T) Σ ‖A_t‖``, the mean length in the direction of the sum;
    3. back, ``R = (I − A)⁻¹ (I + A)``, and ``W = W0 R + merge(W_t − W0 R_t)``, with R_t that A_t gives back as well.

    Where W0 or W_t has fewer rows than columns, R_t is not determined by 1; of the best the one nearest to the identity
    is taken, where the authors' program takes what its decomposition leaves. What is no matrix, or excluded, is merged
    by ``merge`` alone. Every R_t is needed for both terms and found twice, by a singular value decomposition of an
    ``in × in`` matrix. Computed in float64.

    Args:
        merge: how the rest is merged; it reduces the vectors to one. The authors' program takes 0.2 times the sum for
            task arithmetic.
        conflicts: whether only the rows of τ_t that point against the mean of the tasks are rotated, as in the
            program's second variant.
        exclude: a regular expression; matrices in whose names it is found have no rotation.

    Raises:
        ConfigurationError: a field is of another kind; on application, if there is no base, or ``merge`` leaves several
            vectors; on access, a decomposition fails.
    """

    merge: Transform = Chain((Sum(), Scale(0.2)))  # noqa: RUF009 - frozen, so it can be shared
    conflicts: bool = False
    exclude: str | None = None

    def __post_init__(self) -> None:
        check_transform("OrthoMerge.merge", self.merge)
        if not isinstance(self.conflicts, bool):
            raise ConfigurationError(f"OrthoMerge.conflicts: expected true or false, got {self.conflicts!r}.")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        base = vectors.base
        work = partial(work_of_matrices, self.exclude, _rotation_work)
        rest = self.merge(vectors.map(partial(_rest, self, base), work=work))
        if len(rest.tasks) != 1:
            raise ConfigurationError(
                f"OrthoMerge.merge: expected a transform that leaves one vector, got {self.merge!r}, which leaves "
                f"{len(rest.tasks)}. Use e.g. Sum()."
            )
        turned = partial(_turned, self, base)
        return vectors.map(turned, [vectors.merged_tasks], note=self, others=[rest], work=work)


def _origin(base: Mapping[str, Tensor], name: str, stack: Tensor) -> Tensor:
    return base[name].detach().to(stack.device, torch.float64)


def _rest(transform: OrthoMerge, base: Mapping[str, Tensor], name: str, stack: Tensor) -> Tensor:
    """``W_t − W0 R_t``."""
    if not is_matrix(transform.exclude, name, stack.shape):
        return stack
    origin, targets = _origin(base, name, stack), _targets(transform.conflicts, stack)
    for row, target in zip(stack, targets, strict=True):
        row.copy_(row.double() - origin @ _departure(decomposed("OrthoMerge", name, _skew, origin, target)))
    return stack


def _turned(transform: OrthoMerge, base: Mapping[str, Tensor], name: str, stack: Tensor, rest: Tensor) -> Tensor:
    """``W0 R − W0`` and the merged rest."""
    if not is_matrix(transform.exclude, name, stack.shape):
        return rest
    origin = _origin(base, name, stack)
    total = torch.zeros(stack.shape[2], stack.shape[2], dtype=torch.float64, device=stack.device)
    length = 0.0
    for target in _targets(transform.conflicts, stack):
        skew = decomposed("OrthoMerge", name, _skew, origin, target)
        total += skew
        length += float(torch.linalg.vector_norm(skew)) / len(stack)
    size = float(torch.linalg.vector_norm(total))
    if size <= torch.finfo(total.dtype).eps * len(total) * length:  # the rotations cancel, or there are none
        return rest
    total *= length / size
    return (rest[0].double() + origin @ _departure(total)).to(stack.dtype).unsqueeze(0)


def _targets(conflicts: bool, stack: Tensor) -> list[Tensor]:
    """The task vectors in float64, or their rows that point against the mean."""
    vectors = [one.double() for one in stack]
    if not conflicts:
        return vectors
    mean = sum(vectors) / len(vectors)
    return [one * ((one * mean).sum(1, keepdim=True) < 0) for one in vectors]


def _rotation(origin: Tensor, vector: Tensor) -> Tensor:
    """The rotation R with the smallest ``‖W0 R − (W0 + τ)‖``, of several that nearest to the identity."""
    if not bool(vector.any()):
        return torch.eye(origin.shape[1], dtype=origin.dtype, device=origin.device)
    left, values, right = torch.linalg.svd(origin.mT @ (origin + vector))
    if not is_finite(values):
        raise torch.linalg.LinAlgError
    kept = int((values > torch.finfo(values.dtype).eps * len(values) * values[:1]).sum())
    if kept < len(values):
        free, other = left[:, kept:], right[kept:]
        turn, _, back = torch.linalg.svd(free.mT @ other.mT)
        left = torch.cat([left[:, :kept], free @ turn], 1)
        right = torch.cat([right[:kept], back @ other])
    rotation = left @ right
    if float(torch.linalg.slogdet(rotation).sign) < 0:  # the direction that costs least, or nothing
        rotation = rotation - 2 * torch.outer(left[:, -1], right[-1])
    return rotation


def _skew(origin: Tensor, vector: Tensor) -> Tensor:
    """Cayley's map of a task's rotation, made skew-symmetric to the last digit."""
    rotation = _rotation(origin, vector)
    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    skew = torch.linalg.solve(rotation + identity, rotation - identity)
    return (skew - skew.mT) / 2


def _departure(skew: Tensor) -> Tensor:
    """``R − I`` of the rotation that Cayley's map makes of a skew-symmetric matrix."""
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew, 2 * skew)


def _rotation_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    part = decomposition(columns, columns, 8)
    work = Work.together([part] * tasks + [Work(0, 6.0 * tasks * columns**3)])
    return Work(work.memory + 8 * (6 * columns**2 + (tasks + 2) * rows * columns), work.operations)
