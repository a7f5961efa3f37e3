"""OrthoReg: a penalty that keeps the columns of every weight's change orthonormal, so that vectors interfere less."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.modules.penalty import Penalty
from lit_merge.transforms.base import finite_number, whole_number

__all__ = ["OrthoReg", "orthogonality"]


@dataclass(frozen=True)
class OrthoReg(Penalty):
    """``λ · Σ_l ‖ΔW_lᵀ ΔW_l − I‖_F`` over the weight matrices that train, in any regime (OrthoReg, CVPR 2026).

    ΔW is what training has added to θ0: of a linearised network τ, of LoRA α/r · B A. It needs no data. As in the
    authors' program, of a matrix with fewer rows than columns ``ΔW ΔWᵀ`` is taken, and the norms are not squared;
    squared, both products have the same gradient.

    Args:
        weight: λ; the authors try 0.1 to 100, and show 10.
        squared: whether the norms are squared, as in the paper's equation.
        start_step: the first optimiser step with a penalty.
        names: a regular expression; matrices in whose names it is not found are left out. None for all.

    Raises:
        ConfigurationError: a setting is out of its range; in training, no such matrix trains.
    """

    name: ClassVar[str] = "orthogonality"
    weight: float = 10.0
    squared: bool = False
    start_step: int = 0
    names: str | None = None

    def __post_init__(self) -> None:
        finite_number("penalty.weight", self.weight, minimum=0.0)
        whole_number("penalty.start_step", self.start_step, minimum=0)
        try:
            re.compile(self.names or "")
        except (re.error, TypeError) as error:
            raise ConfigurationError(
                f"penalty.names: expected a regular expression, got {self.names!r} ({error})."
            ) from error

    def of_module(self, module: Any) -> Tensor:
        """The sum over the matrices, a scalar."""
        parts = [
            orthogonality(change, self.squared)
            for name, change in module.parametrisation.departures()
            if change.ndim == 2 and change.numel() and (self.names is None or re.search(self.names, name))
        ]
        if not parts:
            raise ConfigurationError(
                f"penalty: expected weight matrices that train, with names of {self.names or 'any kind'}, got none. "
                "Select some, or remove the penalty."
            )
        return torch.stack(parts).sum()


def orthogonality(change: Tensor, squared: bool = False) -> Tensor:
    """``‖Gram − I‖_F`` of the smaller Gram matrix of a change ``[m, n]``, a scalar in float32 or float64."""
    with torch.autocast(change.device.type, enabled=False):
        wide = change.to(torch.promote_types(change.dtype, torch.float32))
        wide = wide if wide.shape[0] < wide.shape[1] else wide.mT
        gram = wide @ wide.mT
        rest = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return rest.square().sum() if squared else torch.linalg.vector_norm(rest)
