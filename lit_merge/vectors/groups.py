"""Which parameters share one merging coefficient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.naming import block_of, is_after_blocks, is_attention, is_mlp

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
        raise ConfigurationError(
            f"granularity: expected {', '.join(get_args(Granularity))}, got {granularity!r}. Use one of them."
        )
    if granularity in ("block", "group") and all(block_of(name) is None for name in names):
        raise ConfigurationError(
            f"granularity {granularity}: expected parameters in numbered blocks, such as blocks.3.mlp.weight, got "
            f"{first_few(names)}. Use tensor for this network."
        )
    group_of: dict[str, Callable[[str], str]] = {
        "task": lambda name: "all",
        "block": _block,
        "tensor": lambda name: name,
        "group": _part_of_block,
    }
    return tuple(map(group_of[granularity], names))


def _block(name: str) -> str:
    block = block_of(name)
    if block is None:
        return "head" if is_after_blocks(name) else "embedding"
    return f"block {block}"


def _part_of_block(name: str) -> str:
    if block_of(name) is None:
        return _block(name)
    part = "attention" if is_attention(name) else "mlp" if is_mlp(name) else "other"
    return f"{_block(name)} {part}"
