"""LoRA: training low-rank updates whose task vector is dense, under the encoder's own names (Hu et al. 2022).

The updates are those of the ``peft`` library (shapes, initialisation, scale), but act through torch's parametrisations:
whoever reads an adapted weight reads W0 + α/r · B A, be it the layer, another module or a fused kernel. peft wraps
layers: of ``nn.MultiheadAttention`` it counts the output projection's update twice (0.21.2; its pull request 3774), and
a layer whose weight is read from outside (timm's BEiT and EVA, torchvision's Swin) it leaves untrained without a word.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.models.selection import Attention, Selection
from lit_merge.params import working_dtype

__all__ = ["LoRA", "Update", "clear_updates", "own_parameters", "update_of", "updates"]


_ALWAYS_SHOWN = ("rank", "alpha", "dropout", "on")
_TRANSPOSED = "Conv1D"  # of transformers, which need not be imported for its name


@dataclass(frozen=True, repr=False)
class LoRA:
    """Low-rank updates of selected weights, which train while everything else is frozen.

    A weight ``[d, …]`` counts as a matrix ``[d, k]`` and becomes W0 + α/r · B A, with B ``[d, r]`` zero at first and A
    ``[r, k]`` drawn as torch draws linear layers. A ``Conv1D``, as a GPT-2's layers are, has its weight transposed:
    ``[k, d]``, W0 + α/r · (B A)ᵀ.

    Args:
        rank: r, at least 1.
        alpha: α, positive.
        dropout: probability in [0, 1) with which the updates miss an input feature in training. A feature is missing
            for a whole forward pass: a weight cannot differ between the images of a batch.
        on: which weights; by default those of the query, key, value and output projections.
        rslora: whether the scale is α/√r, with which the updates do not shrink with the rank (Kalajdzievski 2023).
        rank_pattern: other ranks: a regular expression for the end of a layer's name -> r; the first that fits counts.
        alpha_pattern: other scales in the same way.

    Raises:
        ConfigurationError: a number is out of its range, or a pattern is no regular expression.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    on: Selection | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        _check_rank("LoRA.rank", self.rank)
        _check_alpha("LoRA.alpha", self.alpha)
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            for pattern, value in (getattr(self, name) or {}).items():
                check(f"LoRA.{name}: {pattern}", value)
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigurationError(
                        f"LoRA.{name}: expected a regular expression, got {pattern!r} ({error})."
                    ) from error
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ConfigurationError(f"LoRA.dropout: expected a number in [0, 1), got {self.dropout!r}.")

    def __repr__(self) -> str:
        given = [one for one in fields(self) if one.name in _ALWAYS_SHOWN or getattr(self, one.name) != one.default]
        return f"LoRA({', '.join(f'{one.name}={getattr(self, one.name)!r}' for one in given)})"

    def rank_of(self, layer: str) -> int:
        """The rank r of a layer, by its name."""
        return _by_pattern(layer, self.rank_pattern, self.rank)

    def factor_of(self, layer: str) -> float:
        """The factor of B A of a layer: α/r, or α/√r."""
        rank, alpha = self.rank_of(layer), _by_pattern(layer, self.alpha_pattern, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def inject(self, encoder: nn.Module) -> tuple[str, ...]:
        """Freeze an encoder and give its selected weights updates, which are zero; in place.

        Its function, buffers and mode stay as they are. From now on the factors are the parameters that require
        gradients, :func:`own_parameters` are the frozen ones and :func:`updates` the dense updates. Draws from torch's
        random state.

        Args:
            encoder: any module.

        Returns:
            The own names of the adapted weights.

        Raises:
            ConfigurationError: it has updates already, or the selection names what LoRA cannot adapt; then the encoder
                is as it was.
        """
        updates = self.updates_of(encoder)
        encoder.requires_grad_(False)
        for name, update in updates.items():
            owner, _, leaf = name.rpartition(".")
            register_parametrization(encoder.get_submodule(owner), leaf, update)
        return tuple(updates)

    def updates_of(self, encoder: nn.Module) -> dict[str, Update]:
        """Updates of an encoder's selected weights, which are zero, by the weights' own names; it stays as it is.

        Raises:
            ConfigurationError: as for :meth:`inject`.
        """
        if next(_adapted(encoder), None) is not None:
            raise ConfigurationError("LoRA: expected an encoder without LoRA, got one that has it already.")
        weights = dict(encoder.named_parameters())
        names = (self.on or Attention(1))(weights)
        _check_adaptable(names, weights, encoder)
        found = {}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            transposed = type(encoder.get_submodule(owner)).__name__ == _TRANSPOSED and leaf == "weight"
            found[name] = Update(weights[name], self, owner, transposed)
        return found


def own_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an encoder under its own names, whether it has LoRA or not: with LoRA, the frozen ones.

    Writing into them changes what the updates are added to.

    Args:
        encoder: any module.

    Returns:
        The names and tensors of ``named_parameters()`` before LoRA; the order may differ.
    """
    adapted = tuple(_adapted(encoder))
    own = {id(frozen): name for name, frozen, _ in adapted}
    factors = {id(factor) for _, _, update in adapted for factor in update.parameters()}
    return {
        own.get(id(parameter), name): parameter
        for name, parameter in encoder.named_parameters()
        if id(parameter) not in factors
    }


def updates(encoder: nn.Module, gradient: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The dense updates ΔW = α/r · B A, computed one at a time.

    Args:
        encoder: any module.
        gradient: whether ΔW has that of the factors.

    Yields:
        Own name and ΔW of every adapted weight, in the weight's shape and dtype and on its device; nothing if there is
        no LoRA.
    """
    for name, frozen, update in _adapted(encoder):
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            change = update.dense(frozen)
        yield name, change


def update_of(encoder: nn.Module, name: str) -> Tensor | None:
    """The dense update of one weight, as of :func:`updates`; None if it has none."""
    with torch.no_grad():
        return next((update.dense(frozen) for own, frozen, update in _adapted(encoder) if own == name), None)


def clear_updates(encoder: nn.Module) -> None:
    """Make the updates zero, as after :meth:`LoRA.inject`: the encoder is its frozen parameters again."""
    for _, _, update in _adapted(encoder):
        nn.init.zeros_(update.B)


class Update(nn.Module):
    """The parametrisation W -> W + α/r · B A; of a transposed weight Wᵀ -> Wᵀ + α/r · B A."""

    def __init__(self, weight: Tensor, settings: LoRA, layer: str = "", transposed: bool = False) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rows, columns = (columns, rows) if transposed else (rows, columns)
        rank = settings.rank_of(layer)
        dtype = working_dtype(weight.dtype)  # steps of half-precision factors would be rounded away
        self.A = nn.Parameter(torch.empty(rank, columns, device=weight.device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.factor, self.dropout, self.transposed = settings.factor_of(layer), settings.dropout, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return self._added(weight, self.A * F.dropout(self.A.new_ones(self.A.shape[1]), self.dropout, self.training))

    def dense(self, weight: Tensor) -> Tensor:
        """ΔW in the shape and dtype of ``weight``."""
        return self._added(torch.zeros_like(weight), self.A)

    def _added(self, weight: Tensor, A: Tensor) -> Tensor:
        first, second = (A.t(), self.B.t()) if self.transposed else (self.B, A)
        # Autocast would round before the sum, and small updates would be lost.
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.addmm(weight.flatten(1).to(A.dtype), first, second, alpha=self.factor)
        return total.to(weight.dtype).view_as(weight)


def _adapted(encoder: nn.Module) -> Iterator[tuple[str, Tensor, Update]]:
    """Own name, frozen weight and update of every adapted weight."""
    for path, part in encoder.named_modules():
        if isinstance(part, ParametrizationList) and isinstance(part[0], Update):
            owner, _, leaf = path.rpartition(".")
            yield owner.removesuffix("parametrizations") + leaf, part.original, part[0]


def _check_adaptable(names: tuple[str, ...], weights: dict[str, nn.Parameter], encoder: nn.Module) -> None:
    matrices = [name for name, weight in weights.items() if weight.ndim > 1 and weight.is_floating_point()]
    others = [name for name in names if name not in matrices]
    if others:
        possible = [name for name in matrices if name in names] or matrices
        raise ConfigurationError(
            f"LoRA.on: expected floating-point weights of two or more dimensions, got {first_few(others)}. "
            + (f"Select only those that LoRA can adapt, e.g. {first_few(possible)}." if possible else "Train in full.")
        )
    uses = Counter(id(weight) for part in encoder.modules() for weight in part.parameters(recurse=False))
    tied = [name for name in names if uses[id(weights[name])] > 1]
    if tied:
        raise ConfigurationError(
            f"LoRA.on: expected weights that one layer has for itself, got {first_few(tied)}, which several layers "
            "share. Leave them out of the selection."
        )


def _check_rank(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name}: expected an integer of at least 1, got {value!r}.")


def _check_alpha(name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigurationError(f"{name}: expected a positive number, got {value!r}.")


def _by_pattern(layer: str, patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
    """The value of the first pattern that fits a layer's name, or the end of it after a dot, as peft reads them."""
    fitting = (value for pattern, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    return next(fitting, otherwise)
