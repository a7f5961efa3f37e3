"""Measures of task vectors at every depth of the network: what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.metrics.plotting import DrawnMetric
from lit_merge.naming import Depth, depth_labels
from lit_merge.vectors import TaskVectors

__all__ = ["DepthMetric", "with_whole"]


class DepthMetric(DrawnMetric):
    """A measure of T task vectors that adds up over their parameters: of all of them, and of every block.

    Its states have a row for each of the P positions in the network's depth, so that parameters may come in any order,
    in several updates, and from processes that have some of them each: as views of the vectors of a whole network.

    Args:
        tasks: the T tasks.
        blocks: number L of the network's blocks, see :func:`lit_merge.naming.number_of_blocks`.
        **settings: of :class:`torchmetrics.Metric`.

    Attributes:
        places: what the first dimension of results is: ``whole``, then ``embedding``, ``block 0``, …, ``head``.

    Raises:
        ConfigurationError: there is no task, or the number of blocks is negative.
    """

    def __init__(self, tasks: Sequence[str], blocks: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        if isinstance(tasks, str) or not tasks or blocks < 0:
            raise ConfigurationError(
                f"{type(self).__name__}: expected a list of tasks and a number of blocks of at least 0, got {tasks!r} "
                f"and {blocks}. Use vectors.tasks and number_of_blocks(vectors.model_names)."
            )
        self.tasks, self.blocks = tuple(tasks), blocks
        self.places = ("whole", *(depth_labels(blocks) if blocks else ("parameters",)))

    def _add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.long) -> None:
        """Add a state ``[P, *shape]`` of sums."""
        self.add_state(name, torch.zeros(len(self.places) - 1, *shape, dtype=dtype), dist_reduce_fx="sum")

    def _rows(self, vectors: TaskVectors) -> Callable[[str], int]:
        """Where a parameter counts: 0 before the blocks, 1 … L in block 0 … L − 1, L + 1 after them; 0 without blocks.

        Raises:
            StructureMismatchError: there are not T vectors, or more blocks than were announced.
        """
        if len(vectors.tasks) != len(self.tasks):
            raise StructureMismatchError(
                f"{type(self).__name__}: expected {len(self.tasks)} task vectors, got {len(vectors.tasks)}. "
                "Give the same ones in every update."
            )
        depth = Depth(vectors.model_names)
        if depth.blocks > self.blocks:
            raise StructureMismatchError(
                f"{type(self).__name__}: expected a network with {self.blocks} blocks, got one with {depth.blocks}. "
                "Give the number of blocks of the whole network."
            )

        def row(name: str) -> int:
            position = depth.position(name)
            after = position == depth.blocks  # of what these vectors have, perhaps not the whole network
            return 0 if not self.blocks else self.blocks + 1 if after else position + 1

        return row


def with_whole(sums: Tensor) -> Tensor:
    """``[P, …]`` sums of the places, after their sum, that of the whole vectors: ``[1 + P, …]``."""
    return torch.cat([sums.sum(0, keepdim=True), sums])
