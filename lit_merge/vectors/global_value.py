"""What a transform has to know about all parameters at once, computed when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from lit_merge.vectors.threads import NeededInMainThread, in_worker

__all__ = ["Statistic"]

_Value = TypeVar("_Value")


class Statistic(Generic[_Value]):
    """A value over all parameters, e.g. the threshold of a global trim: computed at the first call, then kept.

    Args:
        what: what it is, for the plan that ``lit-merge merge --dry_run true`` prints.
        reads: how often computing it goes through every input vector.
        compute: computes it. A ``functools.partial`` of a module-level function keeps it picklable.
        at_most: whether ``reads`` is an upper bound, as the last passes may not be needed.
    """

    def __init__(self, what: str, reads: int, compute: Callable[[], _Value], at_most: bool = False) -> None:
        self.what, self.reads, self.at_most = what, reads, at_most
        self._compute = compute
        self._values: list[_Value] = []

    def __call__(self) -> _Value:
        """The value; in a thread that computes chunks it is asked of the main one."""
        if not self._values and in_worker():
            raise NeededInMainThread(self)
        if not self._values:
            self._values.append(self._compute())
        return self._values[0]

    def __repr__(self) -> str:
        return f"{self.what} ({'at most ' if self.at_most else ''}{self.reads} reads)"
