"""θ0 + α τ for a mapping (a new dict) and for a module (in place)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.pairing.differences import parameter_names
from lit_merge.checkpoints.pairing.ties import tied_names
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping
from lit_merge.params import Params, add_scaled, check_same_structure, check_variance

__all__ = ["apply_vector"]

_ADVICE = "Use the architecture that was fine-tuned; for a mapping with buffers, pass the module instead."


def apply_vector(
    vector: LazyMapping, target: Mapping[str, Tensor] | nn.Module, coefficient: float = 1.0
) -> Params | nn.Module:
    """θ0 + α τ; see :meth:`TaskVector.apply_to`.

    Raises:
        ConfigurationError: ``coefficient`` is not finite, or ``target`` is neither a mapping nor a module.
        StructureMismatchError: names or shapes do not fit; the target is unchanged.
    """
    if not math.isfinite(coefficient):
        raise ConfigurationError(f"coefficient: expected a finite number, got {coefficient}. Use another one.")
    if isinstance(target, nn.Module):
        return _applied_in_place(vector, target, float(coefficient))
    if not isinstance(target, Mapping):
        raise ConfigurationError(
            f"target: expected a mapping name -> tensor or a module, got {type(target).__name__}. "
            "Use dict(model.named_parameters())."
        )
    ties = tied_names(target)
    copies = {name: first for name, first in ties.items() if name not in vector}
    required = parameter_names(target, ties)
    check_same_structure(target, vector, "task vector", "the target's parameters", _ADVICE, required)
    changed = {
        name: check_variance(name, add_scaled(target[name].detach(), vector[name], float(coefficient)))
        for name in vector
    }
    # A tied tensor changes once, under all of its names.
    return {name: changed.get(copies.get(name, name), tensor) for name, tensor in target.items()}


def _applied_in_place(vector: LazyMapping, module: nn.Module, coefficient: float) -> nn.Module:
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    targets = {**dict(module.named_buffers(remove_duplicate=False)), **parameters}
    changed = {id(tensor): name for name, tensor in targets.items() if name in vector}  # tied tensors change once
    required = [name for name, tensor in parameters.items() if id(tensor) not in changed]
    check_same_structure(targets, vector, "task vector", "the target's parameters", _ADVICE, required)
    integers = [name for name in changed.values() if not targets[name].is_floating_point()]
    if integers:
        raise StructureMismatchError(
            f"task vector: expected floating-point targets, got integer elements {first_few(integers)}. "
            "Convert the module to a floating-point dtype first."
        )
    with torch.no_grad():
        for name in changed.values():
            targets[name].copy_(check_variance(name, add_scaled(targets[name], vector[name], coefficient)))
    return module
