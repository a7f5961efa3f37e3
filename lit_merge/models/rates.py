"""Layer-wise learning rates: earlier blocks move less (the baselines of LiNeS, Wang et al. 2025)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.naming import Depth

__all__ = ["ExpLR", "LinLR", "Rates"]


@dataclass(frozen=True)
class Rates(ABC):
    """A factor of the peak learning rate for every parameter; subclasses implement :meth:`factor`.

    What is before the blocks (embeddings, stem) moves as the first block does, what is after them (last normalisation,
    pooling, projection) as the last. Blocks are those of :class:`lit_merge.naming.Depth`: of a ConvNeXt or ResNet its
    stages, of an encoder and a decoder the encoder's first.
    """

    def __call__(self, names: Iterable[str]) -> dict[str, float]:
        """Give every parameter its factor.

        Args:
            names: of all parameters of a network, so that its blocks are counted, whether they train or not.

        Returns:
            name -> factor in [0, 1], in the given order.

        Raises:
            ConfigurationError: the network has no blocks.
        """
        names = tuple(names)
        depth = Depth(names)
        last = depth.blocks - 1
        if last < 0:
            raise ConfigurationError(
                f"{self!r}: expected a network with numbered blocks, got {len(names)} parameters without"
                f"{f' ({first_few(names)})' if names else ''}. Train it at one learning rate."
            )
        return {name: self.factor(min(max(depth.position(name), 0), last), last) for name in names}

    @abstractmethod
    def factor(self, block: int, last: int) -> float:
        """The factor in [0, 1] of a block, both counted from 0; 1 for the last one."""


@dataclass(frozen=True)
class LinLR(Rates):
    """From 0 at the first block to 1 at the last: l / (L − 1) for block l = 0 … L − 1 (LinLR of the LiNeS paper)."""

    def factor(self, block: int, last: int) -> float:
        """Linear in depth; a single block moves at the peak."""
        return block / last if last else 1.0


@dataclass(frozen=True)
class ExpLR(Rates):
    """Smaller by the same ratio at every block: base^(L − 1 − l) for block l = 0 … L − 1 (ExpLR of the LiNeS paper).

    Args:
        base: ratio of a block's rate to the next one's, in (0, 1]; 1 for one rate.

    Raises:
        ConfigurationError: the base is out of range.
    """

    base: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.base, Real) or isinstance(self.base, bool) or not 0 < self.base <= 1:
            raise ConfigurationError(f"ExpLR.base: expected a number in (0, 1], got {self.base!r}.")

    def factor(self, block: int, last: int) -> float:
        """Exponential in depth."""
        return float(self.base ** (last - block))
