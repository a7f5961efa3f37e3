"""SCE: the elements on which the tasks differ most, merged with weights that are the tasks' energies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import Transform
from lit_merge.transforms.magnitudes import count_of, find_cuts_of_stack, keep_largest
from lit_merge.vectors import TaskVectors
from lit_merge.vectors.sources import Work, sum_rows

__all__ = ["SCE"]


@dataclass(frozen=True)
class SCE(Transform):
    """Selects, calculates and erases, one parameter at a time: from T vectors to one.

    SCE (Wan et al. 2024): of every parameter the elements with the largest variance over the tasks are selected; a
    task's weight is the mean square of its selected elements; what disagrees with the sign of the tasks' sum is erased
    (a sum of zero counts as positive), and what is left is averaged with the weights.

    Exactly ⌊density · v⌋ elements are selected, at least one, v the number of those whose variance is not zero; of
    equal variances the first. If none varies, all are. mergekit does the same; the authors' program selects for the
    weights alone, and merges all elements.

    Args:
        density: fraction of the varying elements that is selected, in (0, 1]; the authors take 0.1.

    Raises:
        ConfigurationError: ``density`` is not in (0, 1]; on application, if there is one vector only.
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        self._fraction("density")

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        if len(vectors.tasks) < 2:
            raise ConfigurationError(
                "SCE: expected at least two vectors, got 1, which has no variance. Give more, or leave it out."
            )
        function = partial(_selected_mean, self.density)
        return vectors.map(function, tasks=[vectors.merged_tasks], note=self, work=_work)


def _selected_mean(density: float, name: str, stack: Tensor) -> Tensor:
    if stack.numel() == 0:
        return stack[:1]
    flat = stack.view(len(stack), -1)
    if density < 1:
        flat.mul_(_mask(density, name, flat))
    squares = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) ** 2
    total = squares.sum()
    weights = squares / total if total > 0 else torch.full_like(squares, 1 / len(flat))
    positive = flat.sum(0, dtype=torch.float64) >= 0
    agrees = (flat > 0).eq_(positive).logical_and_(flat != 0)
    factors = agrees * weights.to(flat.dtype).unsqueeze(1)
    divisor = sum_rows(factors.clone())
    merged = sum_rows(flat.mul_(factors)).div_(divisor.masked_fill_(divisor == 0, 1))
    return merged.view(1, *stack.shape[1:])


def _mask(density: float, name: str, flat: Tensor) -> Tensor:
    """1 where the variance is among the largest, else 0: ``(1, n)``."""
    variance = flat.var(0, correction=0, keepdim=True)
    varying = int(variance.count_nonzero())
    if not varying:
        return torch.ones_like(variance)
    cuts = find_cuts_of_stack(name, variance, max(count_of(density, varying), 1))
    return keep_largest(cuts, name, 0, variance).sign_()


def _work(name: str, shape: torch.Size, itemsize: int) -> Work:
    return Work(3 * shape.numel() * itemsize)  # signs, factors and the variance's temporaries
