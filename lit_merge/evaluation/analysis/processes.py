"""The processes that share an analysis: started by Lightning Fabric, or by whoever started this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from lit_merge.errors import ConfigurationError, one_line
from lit_merge.transforms.base import whole_number

__all__ = ["Processes", "processes"]

_Item = TypeVar("_Item")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """One of the processes.

    Attributes:
        rank: which one.
        count: how many there are.
        device: what this one computes on.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

    @property
    def is_first(self) -> bool:
        """Whether this one writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """Every W-th item: what this process does of them."""
        return list(items[self.rank :: self.count])

    def from_first(self, value: Any) -> Any:
        """What the first process has; all wait for it."""
        if self.count == 1:
            return value
        held = [value if self.is_first else None]
        distributed.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in their order."""
        if self.count == 1:
            return [value]
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, value)
        return parts


@contextmanager
def processes(devices: int) -> Iterator[Processes]:
    """Start as many processes as there are devices to use, unless something like torchrun has; one on each.

    With several, the command line is repeated by Lightning Fabric for each of the others.

    Raises:
        ConfigurationError: there are not so many devices.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lit_merge.evaluation.accuracies import quiet

    whole_number("devices", devices, minimum=1)
    present = distributed.is_available() and distributed.is_initialized()
    try:
        with quiet():
            fabric = Fabric(accelerator="auto", devices=devices, strategy="auto" if devices == 1 else "ddp")
            fabric.launch()
    except (MisconfigurationException, ValueError) as error:
        raise ConfigurationError(f"devices: {one_line(error)}. Use another number of devices.") from error
    try:
        yield Processes(fabric.global_rank, fabric.world_size, fabric.device)
    finally:
        if not present and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
