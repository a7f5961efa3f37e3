"""θ0 + α τ for a mapping (a new dict) and for a module (in place)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping
from lit_merge.params import Params, add_scaled, shape_of

__all__ = ["apply_vector", "check_shapes"]


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
    _check_names(vector, target, required=[name for name in target if target[name].is_floating_point()])
    check_shapes(vector, target)
    return {
        name: add_scaled(tensor.detach(), vector[name], float(coefficient)) if name in vector else tensor
        for name, tensor in target.items()
    }


def check_shapes(vector: LazyMapping, target: Mapping[str, Tensor]) -> None:
    """Refuse a vector whose shapes differ from the target's; all its names are in the target.

    Raises:
        StructureMismatchError: the first offenders are named.
    """
    offenders = [
        f"{name} {tuple(vector.shape(name))} for {tuple(shape_of(target, name))}"
        for name in vector
        if vector.shape(name) != shape_of(target, name)
    ]
    if offenders:
        raise StructureMismatchError(
            f"task vector: expected the target's shapes, got {len(offenders)} others: {first_few(offenders)}. "
            "Use the architecture that was fine-tuned."
        )


def _applied_in_place(vector: LazyMapping, module: nn.Module, coefficient: float) -> nn.Module:
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    places = {**dict(module.named_buffers(remove_duplicate=False)), **parameters}
    changed = {id(tensor): name for name, tensor in places.items() if name in vector}  # tied tensors change once
    _check_names(vector, places, required=[name for name, tensor in parameters.items() if id(tensor) not in changed])
    check_shapes(vector, places)
    integers = [name for name in changed.values() if not places[name].is_floating_point()]
    if integers:
        raise StructureMismatchError(
            f"task vector: expected floating-point targets, got integer entries {first_few(integers)}. "
            "Convert the module to a floating-point dtype first."
        )
    with torch.no_grad():
        for name in changed.values():
            places[name].copy_(add_scaled(places[name], vector[name], coefficient))
    return module


def _check_names(vector: LazyMapping, target: Mapping[str, Tensor], required: list[str]) -> None:
    unknown = [name for name in vector if name not in target]
    missing = [name for name in required if name not in vector]
    if unknown or missing:
        parts = [f"{len(unknown)} names that the target lacks ({first_few(unknown)})"] if unknown else []
        parts += [f"nothing for {len(missing)} parameters ({first_few(missing)})"] if missing else []
        raise StructureMismatchError(
            f"task vector: expected the names of the target's parameters, got {' and '.join(parts)}. "
            "Use the architecture that was fine-tuned; for a mapping with buffers, pass the module instead."
        )
