"""The state dicts of linearised encoders, whose parameters are numbered instead of named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.recognition import recognise
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping, Selected

__all__ = ["linearised_pair"]

_WHAT = "linearised encoder"
_ADVICE = "Name the architecture that it was trained with"
_NUMBERED = re.compile(r"(.*\.)?params(0?)\.(?:0|[1-9]\d{0,8})")


def linearised_pair(
    tensors: Mapping[str, Tensor], order: Sequence[tuple[str, torch.Size]]
) -> tuple[LazyMapping, LazyMapping]:
    """θ0 and θ of a linearised encoder, under the names of its architecture.

    The programs of tangent task arithmetic (Ortiz-Jimenez et al. 2023) have a linearised model's parameters in two
    lists, ``params0`` (θ0) and ``params`` (θ), in the order of ``named_parameters()`` of the encoder that was
    linearised. Theirs is an open_clip model whose text transformer was deleted, so that the order is
    ``positional_embedding``, ``text_projection``, ``logit_scale``, ``visual.…``, ``token_embedding.weight``,
    ``ln_final.…``.

    Args:
        tensors: the state dict; nothing is read.
        order: name and shape of every parameter, in the architecture's order.

    Returns:
        θ0 and θ, name -> tensor, lazy, in the order given.

    Raises:
        ConfigurationError: ``order`` names a parameter twice.
        StructureMismatchError: the tensors are not two lists of parameters, the lists have another length than
            ``order``, or a shape differs.
    """
    names = [name for name, _ in order]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{_WHAT}: expected an order with distinct names, got one twice. {_ADVICE}.")
    prefixes = {match[1] or "" for match in map(_NUMBERED.fullmatch, tensors) if match}
    if len(prefixes) > 1:
        raise StructureMismatchError(
            f"{_WHAT}: expected the parameters of one encoder, got those of {len(prefixes)} "
            f"({first_few(sorted(prefixes))}). Leave only one of them."
        )
    recognised = recognise(tensors)
    if recognised.layout != "linearised":
        raise StructureMismatchError(
            f"{_WHAT}: expected parameters numbered params0.0, params0.1 … and params.0, params.1 …, got "
            f"{len(tensors)} names ({first_few(tensors)}). Use the state dict of a linearised encoder."
        )
    lists = [
        [name for name in tensors if name.startswith(f"{recognised.prefix}{kind}.")] for kind in ("params0", "params")
    ]
    if any(len(those) != len(names) for those in lists):
        raise StructureMismatchError(
            f"{_WHAT}: expected two lists of {len(names)} parameters, got {len(lists[0])} in params0 and "
            f"{len(lists[1])} in params. {_ADVICE}."
        )
    lazy = as_lazy(tensors)
    return _named(lazy, order, recognised.prefix + "params0"), _named(lazy, order, recognised.prefix + "params")


def _named(tensors: LazyMapping, order: Sequence[tuple[str, torch.Size]], start: str) -> LazyMapping:
    numbered = {name: f"{start}.{index}" for index, (name, _) in enumerate(order)}
    missing = [number for number in numbered.values() if number not in tensors]
    if missing:
        raise StructureMismatchError(
            f"{_WHAT}: expected {start}.0 to {start}.{len(order) - 1}, got no {first_few(missing)}. {_ADVICE}."
        )
    others = [
        f"{numbered[name]} {tuple(tensors.shape(numbered[name]))} instead of {name} {tuple(shape)}"
        for name, shape in order
        if tensors.shape(numbered[name]) != torch.Size(shape)
    ]
    if others:
        raise StructureMismatchError(
            f"{_WHAT}: expected the shapes of the architecture, got {first_few(others)}. {_ADVICE}."
        )
    return Selected(tensors, numbered)
