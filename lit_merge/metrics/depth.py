"""Measures of task vectors at every depth of the network: what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchmetrics import Metric

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.naming import block_of, is_after_blocks
from lit_merge.vectors import TaskVectors

__all__ = ["DepthMetric", "place_names", "place_of"]


def place_of(name: str, blocks: int) -> int:
    """Where a parameter lies: 0 before the blocks, 1 … L in block 0 … L − 1, L + 1 behind them; 0 without blocks.

    Raises:
        StructureMismatchError: it belongs to a block that the network does not have.
    """
    block = block_of(name)
    if block is None:
        return blocks + 1 if blocks and is_after_blocks(name) else 0
    if block >= blocks:
        raise StructureMismatchError(
            f"{name}: expected a parameter of a network with {blocks} blocks, got one of block {block}. "
            "Give the number of blocks of the whole network."
        )
    return block + 1


def place_names(blocks: int) -> tuple[str, ...]:
    """What the places of :func:`place_of` are called: ``embedding``, ``block 0``, …, ``head``."""
    return ("embedding", *(f"block {block}" for block in range(blocks)), "head") if blocks else ("parameters",)


class DepthMetric(Metric):
    """A measure of T task vectors that adds up over their parameters: of all of them, and of every block.

    Its states have a row for each of the P places of the network, so that parameters may come in any order, in several
    updates, and from several processes that have some of them each.

    Args:
        tasks: the T tasks.
        blocks: number L of the network's blocks, see :func:`lit_merge.naming.number_of_blocks`.
        **settings: of :class:`torchmetrics.Metric`.

    Attributes:
        places: what the first dimension of results is: ``whole``, then ``embedding``, ``block 0``, …, ``head``.

    Raises:
        ConfigurationError: there is no task, or the number of blocks is negative.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, tasks: Sequence[str], blocks: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        if isinstance(tasks, str) or not tasks or blocks < 0:
            raise ConfigurationError(
                f"{type(self).__name__}: expected a list of tasks and a number of blocks of at least 0, got {tasks!r} "
                f"and {blocks}. Use vectors.tasks and number_of_blocks(vectors.model_names)."
            )
        self.tasks, self.blocks = tuple(tasks), blocks
        self.places = ("whole", *place_names(blocks))

    def _check(self, vectors: TaskVectors) -> None:
        if len(vectors.tasks) != len(self.tasks):
            raise StructureMismatchError(
                f"{type(self).__name__}: expected {len(self.tasks)} task vectors, got {len(vectors.tasks)}. "
                "Give the same ones in every update."
            )
