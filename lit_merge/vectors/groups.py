"""Which parameters share one merging coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.naming import Depth, is_attention, is_mlp

__all__ = ["Granularity", "group_names"]

Granularity = Literal["task", "block", "tensor", "group"]
"""One coefficient per task for all parameters, per block, per parameter, or per kind of layer within a block."""


def group_names(names: Sequence[str], granularity: Granularity) -> tuple[str, ...]:
    """Name the coefficient group of every parameter.

    Args:
        names: the parameters' names.
        granularity: ``task``, all parameters in one group ``all`` (AdaMerging's "task-wise", Yang et al. 2024,
            equation 6); ``tensor``, every parameter by itself under its own name (its "layer-wise", equation 7);
            ``block``, the groups ``embedding``, ``block 0``, ``block 1``, …, ``head``; ``group``, the same with every
            block divided into ``block 0 attention``, ``block 0 mlp`` and ``block 0 other``.

    Returns:
        One group's name per parameter, in the same order.

    Raises:
        ConfigurationError: the granularity is unknown, or asks for blocks and no parameter belongs to one.

    Examples:
        >>> group_names(["conv1.weight", "blocks.0.mlp.fc1.weight", "blocks.0.ln_1.weight", "norm.weight"], "group")
        ('embedding', 'block 0 mlp', 'block 0 other', 'head')
    """
    if granularity not in get_args(Granularity):
        raise ConfigurationError(f"granularity: expected {', '.join(get_args(Granularity))}, got {granularity!r}.")
    if granularity == "task":
        return ("all",) * len(names)
    if granularity == "tensor":
        return tuple(names)
    depth = Depth(names)
    if not depth.blocks:
        raise ConfigurationError(
            f"granularity {granularity}: expected parameters in numbered blocks, such as blocks.3.mlp.weight, got "
            f"{first_few(names)}. Use tensor for this network."
        )
    return tuple(_group(depth, name, granularity == "group") for name in names)


def _group(depth: Depth, name: str, divided: bool) -> str:
    label = depth.label(name)
    if not divided or depth.block(name) is None:
        return label
    return f"{label} {'attention' if is_attention(name) else 'mlp' if is_mlp(name) else 'other'}"
