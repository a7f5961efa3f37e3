"""Other transforms for some of the parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.naming import Depth
from lit_merge.transforms.base import Transform, check_transform, whole_number
from lit_merge.vectors import TaskVectors

__all__ = ["Override", "WithOverrides"]


@dataclass(frozen=True)
class Override:
    """Which parameters are treated in another way, and how.

    Args:
        transform: what is applied to them.
        names: a regular expression that is searched for in the parameters' names.
        blocks: indices of blocks, from 0, as :class:`lit_merge.naming.Depth` counts them. With both, a
            parameter must fit both.

    Raises:
        ConfigurationError: neither names nor blocks are given, or the transform, the expression or an index is none.
    """

    transform: Transform
    names: str | None = None
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_transform("Override.transform", self.transform)
        if self.names is None and self.blocks is None:
            raise ConfigurationError("Override: expected names or blocks, got neither. Say which parameters are meant.")
        try:
            re.compile(self.names or "")
        except (re.error, TypeError) as error:
            raise ConfigurationError(
                f"Override.names: expected a regular expression, got {self.names!r} ({error})."
            ) from error
        if self.blocks is not None:
            if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence) or not self.blocks:
                raise ConfigurationError(
                    f"Override.blocks: expected a list of block indices, got {self.blocks!r}. Use e.g. [0, 1, 2]."
                )
            for index in self.blocks:
                whole_number("Override.blocks", index, minimum=0)
            object.__setattr__(self, "blocks", tuple(self.blocks))

    def selects(self, name: str, depth: Depth) -> bool:
        """Whether a parameter of a network is meant."""
        by_name = self.names is None or re.search(self.names, name) is not None
        return by_name and (self.blocks is None or depth.block(name) in self.blocks)


@dataclass(frozen=True)
class WithOverrides(Transform):
    """One transform for most parameters, and others for those that overrides name; the first one that fits counts.

    Each part sees its own parameters only: what it has to know of all of them, such as the threshold of a global trim,
    is taken over these.

    Args:
        transform: what is applied to the parameters that no override names.
        overrides: in order of precedence; all of them reduce to one vector, or none does.

    Raises:
        ConfigurationError: ``transform`` is no transform, or ``overrides`` no list of overrides; on application, an
            override fits no parameter or names a block that there is not, or the parts differ in the number of vectors.
    """

    transform: Transform
    overrides: Sequence[Override]

    def __post_init__(self) -> None:
        check_transform("WithOverrides.transform", self.transform)
        overrides: Any = self.overrides
        if not isinstance(overrides, Sequence) or not all(isinstance(one, Override) for one in overrides):
            raise ConfigurationError(
                f"WithOverrides.overrides: expected a list of overrides, got {overrides!r}. Use [Override(…), …]."
            )
        object.__setattr__(self, "overrides", tuple(self.overrides))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Apply each part to its own parameters."""
        depth = Depth(vectors.model_names)
        left = list(vectors)
        views = []
        for override in self.overrides:
            beyond = [index for index in override.blocks or () if index >= depth.blocks]
            if beyond:
                raise ConfigurationError(
                    f"Override.blocks: expected indices below the number of blocks ({depth.blocks}), got "
                    f"{first_few(beyond)}. Blocks are counted from 0."
                )
            meant = [name for name in left if override.selects(name, depth)]
            if not meant:
                raise ConfigurationError(
                    f"Override: expected at least one parameter for {override!r}, got none of {len(vectors)} "
                    f"(such as {first_few(vectors, 2)}). Correct the pattern, or the order of the overrides."
                )
            views.append(override.transform(vectors.restrict(meant)))
            left = [name for name in left if not override.selects(name, depth)]
        if left:
            views.append(self.transform(vectors.restrict(left)))
        return vectors.united(views, note=self)
