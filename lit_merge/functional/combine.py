"""θ0 + Σ_t λ[t] τ_t with gradients of λ: every task vector is read once on the way there and once on the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.params import Params

__all__ = ["Directions", "combine"]


class Directions(Protocol):
    """T task vectors of N parameters, wherever they are stored: :class:`lit_merge.vectors.storage.VectorStorage`."""

    @property
    def names(self) -> Sequence[str]:
        """The N parameters."""

    def add_weighted(
        self, weights: Tensor, base: Mapping[str, Tensor] | None, out: Mapping[str, Tensor] | None = None
    ) -> Params:
        """``base[n] + Σ_t weights[t, n] τ_t[n]`` of every parameter; without a base the sum alone.

        Args:
            weights: ``(T, N)``.
            base: θ0; the results have its dtypes and devices.
            out: tensors whose memory the results may take; new ones by default.
        """

    def inner_products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``⟨τ_t[n], gradients[n]⟩``, ``(T, N)``; a parameter without a gradient has 0."""


def combine(
    base: Mapping[str, Tensor] | None,
    directions: Directions,
    coefficients: Tensor,
    columns: Sequence[int] | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> Params:
    """``θ = θ0 + Σ_t λ[t, c(n)] τ_t[n]`` for every parameter n (Yang et al. 2024, equations 6 and 7).

    The gradient of λ is computed by hand: ``∂L/∂λ[t, n] = ⟨τ_t[n], ∂L/∂θ[n]⟩``. Nothing of the size of the parameters
    is saved for it, and no temporary is made per task. It is defined once: there is no second derivative. θ0 and the
    task vectors get no gradient.

    Args:
        base: θ0, name -> tensor, which has every parameter of the task vectors; further ones are left out. None for 0:
            the merged task vector alone.
        directions: the task vectors.
        coefficients: λ, ``(T, L)``.
        columns: for every parameter which of the L columns is its own; by default the n-th one, L = N.
        out: results of an earlier call that nobody needs any more; their memory may be used again.

    Returns:
        Name -> merged tensor, in θ0's dtypes and devices.

    Raises:
        ConfigurationError: λ is no matrix with the columns that are asked for.
        StructureMismatchError: θ0 lacks a parameter.

    Examples:
        >>> import torch
        >>> from lit_merge.vectors import TaskVector, TaskVectors
        >>> from lit_merge.vectors.storage import VectorStorage
        >>> vectors = TaskVectors([TaskVector({"w": torch.tensor(row)}) for row in ([2.0, 0.0], [0.0, 3.0])])
        >>> coefficients = torch.tensor([[0.5], [1.0]], requires_grad=True)
        >>> merged = combine({"w": torch.ones(2)}, VectorStorage(vectors), coefficients)["w"]
        >>> merged.tolist()
        [2.0, 4.0]
        >>> merged.sum().backward()
        >>> coefficients.grad.flatten().tolist()
        [2.0, 3.0]
    """
    names = tuple(directions.names)
    indices = list(range(len(names)) if columns is None else columns)
    width = coefficients.shape[-1] if coefficients.ndim == 2 else 0
    if len(indices) != len(names) or not all(0 <= index < width for index in indices):
        raise ConfigurationError(
            f"coefficients: expected a matrix with a column for each of {len(names)} parameters, got shape "
            f"{tuple(coefficients.shape)} and {len(indices)} columns. Give one column per parameter, or columns."
        )
    missing = [name for name in names if base is not None and name not in base]
    if missing:
        raise StructureMismatchError(
            f"base: expected every parameter of the task vectors, got no {missing[0]} ({len(missing)} missing). Use "
            "the parameters that they start from."
        )
    selected = torch.tensor(indices, device=coefficients.device)
    merged: tuple[Tensor, ...] = _Combine.apply(directions, base, coefficients[:, selected], out)
    return dict(zip(names, merged, strict=True))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        directions: Directions,
        base: Mapping[str, Tensor] | None,
        weights: Tensor,
        out: Mapping[str, Tensor] | None,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.directions, ctx.dtype, ctx.device = directions, weights.dtype, weights.device
        sums = directions.add_weighted(weights.detach(), base, out)
        return tuple(sums[name] for name in directions.names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        directions: Directions = ctx.directions
        given = {name: one for name, one in zip(directions.names, gradients, strict=True) if one is not None}
        return None, None, directions.inner_products(given).to(ctx.device, ctx.dtype), None
