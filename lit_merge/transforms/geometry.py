"""Merging by angles: on the sphere of directions, or by how far the task vectors point the same way.

Every method here is a linear combination of the vectors whose coefficients follow from their inner products alone, one
parameter at a time. In the space of weights it is a combination of ``θ0 + τ_t``, given back as a task vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.params import shape_of
from lit_merge.transforms.base import Transform, whole_number
from lit_merge.vectors import TaskVectors

__all__ = ["KarcherMean", "ModelStock", "Slerp"]

Space = Literal["weights", "task_vectors"]

_LENGTH = 1 << 18  # elements per row of what is brought to float64 at a time
_NO_ANGLE = 1e-8  # a sine that float64 cannot tell from that of 0 or π


@dataclass(frozen=True)
class Slerp(Transform):
    """The point between two models on the arc from one to the other, one parameter at a time.

    ``(sin((1 − f) ω) x_1 + sin(f ω) x_2) / sin ω``, ω the angle between the flattened x_1 and x_2 (Shoemake 1985).
    Where they are nearly parallel or one is zero, ``(1 − f) x_1 + f x_2``.

    Args:
        fraction: f; 0 gives the first vector, 1 the second.
        space: ``weights`` takes the arc between θ0 + τ_1 and θ0 + τ_2, as common tools do, and needs the vectors'
            ``base``; ``task_vectors`` takes the one between τ_1 and τ_2.
        threshold: from what |cos ω| on the interpolation is linear, in [0, 1).

    Raises:
        ConfigurationError: a field is out of range; on application, if there are not exactly two vectors, or no base.
        StructureMismatchError: on application, the base has other shapes.
    """

    fraction: float = 0.5
    space: Space = "weights"
    threshold: float = 0.9995

    def __post_init__(self) -> None:
        self._number("fraction")
        self._choice("space", ("weights", "task_vectors"))
        self._number("threshold", minimum=0.0, below=1.0)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(2, *shape)`` to ``(1, *shape)``."""
        if len(vectors.tasks) != 2:
            raise ConfigurationError(
                f"Slerp: expected two vectors, got {len(vectors.tasks)} ({first_few(vectors.tasks)}). "
                "Select two of them, or use KarcherMean."
            )
        return _reduced(self, vectors, self.space, partial(_slerp, self.fraction, self.threshold))


@dataclass(frozen=True)
class KarcherMean(Transform):
    """The mean of the directions on the sphere times the mean of the norms, one parameter at a time.

    The direction m minimises the sum of squared angles to the x_t; it is reached from the normalised mean by
    ``m ← exp_m((1/T) Σ_t log_m(x_t / ‖x_t‖))`` (Karcher 1977; for merging Wang, Ye and Yin 2026). Of two models it is
    the middle of :class:`Slerp`'s arc. A zero tensor has no direction and counts in the mean of the norms; where the
    directions cancel, so that there is no mean direction, the plain mean is taken.

    Args:
        space: ``weights`` for the mean of the θ0 + τ_t, as common tools do, which needs the vectors' ``base``;
            ``task_vectors`` for that of the τ_t.
        iterations: at most so many steps.
        tolerance: length of a step, in radians, below which it ends.

    Raises:
        ConfigurationError: a field is out of range; on application, if there is no base.
        StructureMismatchError: on application, the base has other shapes.
    """

    space: Space = "weights"
    iterations: int = 100
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        self._choice("space", ("weights", "task_vectors"))
        whole_number("KarcherMean.iterations", self.iterations, minimum=1)
        self._number("tolerance", minimum=0.0)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        return _reduced(self, vectors, self.space, partial(_karcher, self.iterations, self.tolerance))


@dataclass(frozen=True)
class ModelStock(Transform):
    """The mean of the task vectors, shortened by how much they differ, one parameter at a time.

    ``t · (1/T) Σ_t τ_t`` with ``t = T cos θ / (1 + (T − 1) cos θ)`` (Jang et al. 2024, section 4); cos θ is the mean of
    the cosines of all pairs, as its authors say. A zero tensor has the cosine 0 to any other.

    Args:
        clamp: whether a negative cos θ counts as 0, so that t is a ratio between 0 and 1. Without, as in common tools,
            t is what the equation gives, which grows beyond all bounds as cos θ goes to −1/(T − 1), and 0 there.

    Raises:
        ConfigurationError: ``clamp`` is no bool; on application, if there is one vector only.
    """

    clamp: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.clamp, bool):
            raise ConfigurationError(f"ModelStock.clamp: expected true or false, got {self.clamp!r}.")

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        if len(vectors.tasks) < 2:
            raise ConfigurationError(
                "ModelStock: expected at least two vectors, got 1, which has no angle. Give more, or leave it out."
            )
        return _reduced(self, vectors, "task_vectors", partial(_model_stock, self.clamp))


_Coefficients = Callable[[Tensor], list[float]]
"""From the inner products of the T vectors, ``(T, T)`` in float64 on the CPU, to their T coefficients."""


def _reduced(transform: Transform, vectors: TaskVectors, space: Space, coefficients: _Coefficients) -> TaskVectors:
    base = vectors.base if space == "weights" else None
    if base is not None:
        offenders = [name for name in vectors if shape_of(base, name) != vectors.shape(name)[1:]]
        if offenders:
            raise StructureMismatchError(
                f"base: expected the shapes of the task vectors, got {len(offenders)} others: {first_few(offenders)}. "
                "Use the pre-trained parameters that the vectors start from."
            )
    function = partial(_combined, coefficients, base)
    return vectors.map(function, tasks=[vectors.merged_tasks], note=transform)


def _combined(coefficients: _Coefficients, base: Mapping[str, Tensor] | None, name: str, stack: Tensor) -> Tensor:
    rows = stack.reshape(len(stack), -1)
    origin = None if base is None else base[name].detach().to(rows.device, rows.dtype).reshape(-1)
    found = coefficients(_inner_products(rows, origin).cpu())
    merged = rows[0] * found[0]
    for row, coefficient in zip(rows[1:], found[1:], strict=True):
        merged.add_(row, alpha=coefficient)
    if origin is not None:  # Σ c_t (θ0 + τ_t) − θ0, without the rounding of the sums
        merged.add_(origin, alpha=math.fsum(found) - 1)
    return merged.view(1, *stack.shape[1:])


def _inner_products(rows: Tensor, origin: Tensor | None) -> Tensor:
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _LENGTH):
        chunk = rows[:, start : start + _LENGTH].double()
        if origin is not None:
            chunk = chunk + origin[start : start + _LENGTH].double()
        products += chunk @ chunk.T
    return products


def _slerp(fraction: float, threshold: float, products: Tensor) -> list[float]:
    length = math.sqrt(float(products[0, 0])) * math.sqrt(float(products[1, 1]))
    cosine = min(max(float(products[0, 1]) / length, -1.0), 1.0) if length else 1.0
    if abs(cosine) > threshold:
        return [1 - fraction, fraction]
    angle = math.acos(cosine)
    return [math.sin((1 - fraction) * angle) / math.sin(angle), math.sin(fraction * angle) / math.sin(angle)]


def _cosines(products: Tensor, norms: Tensor) -> Tensor:
    return (products / norms.outer(norms)).clamp_(-1, 1).fill_diagonal_(1)


def _karcher(iterations: int, tolerance: float, products: Tensor) -> list[float]:
    norms = products.diagonal().sqrt()
    has_direction = norms > 0
    cosines = _cosines(products[has_direction][:, has_direction], norms[has_direction])
    count = len(cosines)
    mean = torch.full((count,), 1 / max(count, 1), dtype=torch.float64)  # as a combination of the directions
    length = _length(mean, cosines)
    if length <= _NO_ANGLE:
        return [1 / len(norms)] * len(norms)
    for _ in range(iterations):
        mean = mean / length
        cosine = (cosines @ mean).clamp_(-1, 1)
        sine = (1 - cosine**2).sqrt()
        pull = torch.where(sine > _NO_ANGLE, cosine.acos() / sine, 1.0) / count
        step = pull - (pull * cosine).sum() * mean
        size = _length(step, cosines)
        if size <= tolerance:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        length = _length(mean, cosines)
    coefficients = torch.zeros_like(norms)
    coefficients[has_direction] = mean / _length(mean, cosines) * (norms.mean() / norms[has_direction])
    return coefficients.tolist()


def _length(combination: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(float(combination @ cosines @ combination), 0.0))


def _model_stock(clamp: bool, products: Tensor) -> list[float]:
    norms, count = products.diagonal().sqrt(), len(products)
    cosines = _cosines(products, norms).nan_to_num(nan=0.0)
    pairs = [float(cosines[pair]) for pair in combinations(range(count), 2)]
    cosine = math.fsum(pairs) / len(pairs)
    if clamp:
        cosine = max(cosine, 0.0)
    slope = 1 + (count - 1) * cosine
    ratio = count * cosine / slope if abs(slope) >= 1e-6 else 0.0
    return [ratio / count] * count
