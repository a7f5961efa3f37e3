"""Running means and variances of batch normalisation in a merge: they are measured, so never a sum of differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lit_merge.files.lazy import Computed, LazyMapping
from lit_merge.models.merging.inputs import Input
from lit_merge.models.network import Base
from lit_merge.naming import is_running_statistic
from lit_merge.params import dtype_of, shape_of, working_dtype

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """What a merge writes for the running statistics of its base.

    The mean over the inputs that bring statistics of their own (fine-tuned weights do, task vectors do not): for one
    input those of that model, for several a mixture whose variances are positive where theirs are. It is no measurement
    of the merged network, whose features differ from each of theirs; that is what ``recalibrate`` is for.

    Args:
        base: θ0.
        inputs: what is merged.
        average: whether to average; otherwise the base's are written.
    """

    def __init__(self, base: Base, inputs: Sequence[Input], average: bool) -> None:
        whole = base.whole()
        self._names = [name for name in whole if is_running_statistic(name)]
        self._sources: list[LazyMapping] = []
        if average:
            parameters = {name.removeprefix(base.prefix) for name in self._names}
            found = [one.statistics for one in inputs if one.statistics is not None]
            self._sources = [one for one in found if parameters and all(name in one for name in parameters)]
        self._count, self._prefix = len(inputs), base.prefix
        self._structure = {name: (shape_of(whole, name), dtype_of(whole, name)) for name in self._names}

    @property
    def count(self) -> int:
        """How many means and variances the base has."""
        return len(self._names)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where they come from, in words; empty without any."""
        if not self._names:
            return ()
        sources = len(self._sources)
        origin = f"the mean of {sources} of {self._count} inputs" if sources else "the base's"
        return (f"{len(self._names)} running statistics ({self._names[0]} ...): {origin}, no sum of differences",)

    def values(self) -> LazyMapping | None:
        """Name in the whole model -> statistic, computed when it is asked for; None where the base's are written."""
        return Computed(self._structure, partial(_mean, self._sources, self._prefix)) if self._sources else None


def _mean(sources: Sequence[LazyMapping], prefix: str, name: str) -> Tensor:
    values = [one[name.removeprefix(prefix)] for one in sources]
    dtype = working_dtype(*(value.dtype for value in values))
    return torch.stack([value.to(dtype) for value in values]).mean(0)
