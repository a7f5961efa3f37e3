"""Merging coefficients by depth, and the line that LiNeS would have chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.naming import Depth, depth_labels
from lit_merge.vectors.coefficients import Coefficients

__all__ = ["DepthMeans", "depth_means", "group_places", "lines_fit"]


@dataclass(frozen=True, eq=False)
class DepthMeans:
    """The mean coefficient of every task at every position in a network's depth, its groups counting alike.

    Attributes:
        values: float64 ``(T, D)``.
        tasks: the T tasks.
        places: the D positions of :class:`lit_merge.naming.Depth`: -1 before the blocks, the block's index, L after
            them.
        blocks: their number L.
    """

    values: Tensor
    tasks: tuple[str, ...]
    places: tuple[int, ...]
    blocks: int

    @property
    def names(self) -> tuple[str, ...]:
        """What the positions are called: ``embedding``, ``block 0``, …, ``head``."""
        labels = depth_labels(self.blocks)
        return tuple(labels[place + 1] for place in self.places)


def group_places(coefficients: Coefficients) -> dict[str, int] | None:
    """The position of every group, as in :attr:`DepthMeans.places`.

    Returns:
        Group -> position; None if a group has several, as the only one of task-wise coefficients does, or if the
        network has no blocks.
    """
    depth = Depth(coefficients.members)
    places: dict[str, int] = {}
    for name, group in coefficients.members.items():
        if places.setdefault(group, depth.position(name)) != depth.position(name):
            return None
    return places if depth.blocks else None


def depth_means(coefficients: Coefficients) -> DepthMeans | None:
    """The mean coefficients by depth; None where the coefficients have no depth (:func:`group_places`)."""
    places = group_places(coefficients)
    if places is None:
        return None
    of_groups = torch.tensor([places[group] for group in coefficients.groups])
    present = sorted(set(of_groups.tolist()))
    values = torch.stack([coefficients.values[:, of_groups == place].mean(1) for place in present], dim=1)
    return DepthMeans(values, coefficients.tasks, tuple(present), Depth(coefficients.members).blocks)


def lines_fit(means: DepthMeans) -> tuple[float, float] | None:
    """The line ``α + β · ℓ / (L − 1)`` of LiNeS (Wang et al. 2025, eq. 3) through the means over the tasks.

    It is the least-squares line over the blocks; what is outside of them does not count.

    Returns:
        Its ends ``(α, α + β)``, at the first and at the last block; None with less than two blocks.
    """
    inside = [index for index, place in enumerate(means.places) if 0 <= place < means.blocks]
    if len(inside) < 2:
        return None
    depth = torch.tensor([means.places[index] / (means.blocks - 1) for index in inside], dtype=torch.float64)
    value = means.values[:, inside].mean(0)
    centred = depth - depth.mean()
    slope = (centred * value).sum() / centred.square().sum()
    start = value.mean() - slope * depth.mean()
    return float(start), float(start + slope)
