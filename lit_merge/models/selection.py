"""Which parameters train: what is not selected keeps its pre-trained value, and its task vector is zero.

A selection is a frozen dataclass that chooses among names. A new one is a few lines::

    @dataclass(frozen=True)
    class Biases(Selection):
        def selects(self, names: Sequence[str]) -> Callable[[str], object]:
            return is_bias
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.naming import Depth, is_attention, is_bias, is_mlp

__all__ = ["All", "Attention", "LastBlocks", "Matching", "Selection", "TaLoS"]


@dataclass(frozen=True)
class Selection(ABC):
    """A choice among the names of a network's parameters; subclasses implement :meth:`selects`."""

    def __call__(self, names: Iterable[str]) -> tuple[str, ...]:
        """Choose among names.

        Args:
            names: of all parameters of a network.

        Returns:
            The selected names, at least one, in the given order.

        Raises:
            ConfigurationError: nothing is selected, or the network has not what the selection is about.
        """
        names = tuple(names)
        selected = tuple(filter(self.selects(names), names))
        if not selected:
            raise ConfigurationError(
                f"{self!r}: expected to select some parameters, got none of {_count(names)}. Choose another selection."
            )
        return selected

    @abstractmethod
    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        """The function that says of a name whether it is selected, given the names of the whole network."""


@dataclass(frozen=True)
class All(Selection):
    """Every parameter: full fine-tuning."""

    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        """Whatever the name."""
        return lambda name: True


@dataclass(frozen=True)
class Attention(Selection):
    """Linear layers of the transformer blocks (Jin et al. 2024, "Fine-Tuning Attention Modules Only").

    Normalisations, embeddings and what is outside the blocks, a pooling attention too, stay as they are.

    Args:
        paradigm: 1 for the weights of the query, key, value and output projections, which is the paper's method;
            2 for their biases as well; 3 for the weights of the feed-forward layers as well, without biases; 4 for the
            weights and biases of both.

    Raises:
        ConfigurationError: the paradigm is none of them; when called, the network has no such layers.
    """

    paradigm: Literal[1, 2, 3, 4] = 1

    def __post_init__(self) -> None:
        if self.paradigm not in (1, 2, 3, 4):
            raise ConfigurationError(f"Attention.paradigm: expected 1, 2, 3 or 4, got {self.paradigm!r}.")

    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        """Linear layers by the components of the name."""
        kinds = {"attention": is_attention} | ({"feed-forward": is_mlp} if self.paradigm >= 3 else {})
        for kind, belongs in kinds.items():
            if not any(map(belongs, names)):
                raise ConfigurationError(
                    f"attention paradigm {self.paradigm}: expected a network with {kind} blocks, got {_count(names)} "
                    "without. Choose another selection, e.g. Matching."
                )
        biases = self.paradigm % 2 == 0
        return lambda name: (biases or not is_bias(name)) and any(belongs(name) for belongs in kinds.values())


@dataclass(frozen=True)
class LastBlocks(Selection):
    """The last blocks of a network, and what is after them.

    HalfFT and LastFT of the LiNeS paper (Wang et al. 2025) are ``LastBlocks(fraction=0.5)``, the first half of the
    blocks frozen, and ``LastBlocks(count=1, behind=False)``. What is before the blocks never trains. Blocks are
    those of :class:`lit_merge.naming.Depth`: of a ConvNeXt or ResNet its stages, of an encoder and a decoder the
    encoder's first.

    Args:
        count: how many blocks, from 1 to the network's number L.
        fraction: fraction of the blocks in (0, 1]; of L blocks, the first L (1 − fraction), rounded down, are frozen.
        behind: whether the parameters after the blocks (last normalisation, pooling, projection) train too.

    Raises:
        ConfigurationError: both or neither of count and fraction are given, or out of range; when called, the network
            has no blocks or fewer than ``count``.
    """

    count: int | None = None
    fraction: float | None = None
    behind: bool = True

    def __post_init__(self) -> None:
        if (self.count is None) == (self.fraction is None):
            got = "neither" if self.count is None else f"count={self.count!r} and fraction={self.fraction!r}"
            raise ConfigurationError(f"LastBlocks: expected either count or fraction, got {got}.")
        if self.count is not None and (not _is_a(int, self.count) or self.count < 1):
            raise ConfigurationError(f"LastBlocks.count: expected an integer of at least 1, got {self.count!r}.")
        if self.fraction is not None and (not _is_a(Real, self.fraction) or not 0 < self.fraction <= 1):
            raise ConfigurationError(f"LastBlocks.fraction: expected a number in (0, 1], got {self.fraction!r}.")

    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        """Names from the first trained block on."""
        depth = Depth(names)
        blocks = depth.blocks
        if not blocks:
            raise ConfigurationError(
                f"LastBlocks: expected a network with numbered blocks, got {_count(names)} without. "
                "Choose another selection, e.g. Matching."
            )
        if self.count is not None and self.count > blocks:
            raise ConfigurationError(
                f"LastBlocks.count: expected at most {blocks}, the network's number of blocks, got {self.count}. "
                "Lower it."
            )
        if self.count is not None:
            frozen = blocks - self.count
        else:
            assert self.fraction is not None
            frozen = min(math.floor(blocks * (1 - self.fraction) + 1e-9), blocks - 1)  # 10 (1 − 0.9) is less than 1
        end = blocks if self.behind else blocks - 1
        return lambda name: frozen <= depth.position(name) <= end


@dataclass(frozen=True)
class Matching(Selection):
    """Parameters in whose names a regular expression is found.

    Args:
        pattern: as for :func:`re.search`; anchor it with ``^`` and ``$`` to match whole names.

    Raises:
        ConfigurationError: the pattern is not a regular expression; when called, it is found in no name.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise ConfigurationError(
                f"Matching.pattern: expected a regular expression, got {self.pattern!r} ({error})."
            ) from error

    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        """Where the pattern is found."""
        return re.compile(self.pattern).search


@dataclass(frozen=True)
class TaLoS(Selection):
    """The elements to which the outputs at θ0 are least sensitive; the others stay (TaLoS, Iurada et al. 2025).

    The names are those of ``among``; which of their elements train is found when a fit begins, from examples of the
    task (:func:`lit_merge.modules.sensitivity.least_sensitive`), and kept in its checkpoints.

    Args:
        fraction: of all elements of these parameters that train, in (0, 1]; the authors' 0.1.
        among: which parameters; None for all. The authors take linear layers, convolutions and normalisations.
        examples: how many of the task's training examples are looked at.
        rounds: in how many rounds the elements are chosen, each leaving ``fraction^(1/rounds)`` of the last one's.
        seed: of the examples and of the sampled classes.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    fraction: float = 0.1
    among: Selection | None = None
    examples: int = 256
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_a(Real, self.fraction) or not 0 < self.fraction <= 1:
            raise ConfigurationError(f"TaLoS.fraction: expected a number in (0, 1], got {self.fraction!r}.")
        for name in ("examples", "rounds"):
            value = getattr(self, name)
            if not _is_a(int, value) or value < 1:
                raise ConfigurationError(f"TaLoS.{name}: expected an integer of at least 1, got {value!r}.")

    def selects(self, names: Sequence[str]) -> Callable[[str], object]:
        """Those of ``among``."""
        return (self.among or All()).selects(names)


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} parameters" + (f" ({first_few(names)})" if names else "")
