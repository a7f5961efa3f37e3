"""Where the activations of calibration inputs are between two blocks: in memory, and beyond a limit on the disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree

__all__ = ["Activations", "placed"]


class Activations:
    """Keeps tensors, however nested: in memory up to a limit, the others as files that are mapped and have no name.

    A file without a name is gone when nobody holds its tensor, and when the process ends in whatever way: there is
    nothing to clean up.

    Args:
        folder: where files are; by default that of temporary files.
        memory: bytes that may be held in memory.
    """

    def __init__(self, folder: Path | None = None, memory: int = 2**30) -> None:
        self._folder, self._memory = folder, memory
        self.held = 0
        self.on_disk = 0

    def keep(self, value: Any) -> Any:
        """The same structure with copies of its tensors on the CPU.

        Raises:
            OSError: the disk is full or not writable.
        """
        return tree.tree_map_only(Tensor, self._copy, value)

    def _copy(self, value: Tensor) -> Tensor:
        size = value.numel() * value.element_size()
        if not size or self.held + size <= self._memory:
            copied = value.detach().to("cpu", copy=True)
            self.held += size
            weakref.finalize(copied, self._free, size).atexit = False
            return copied
        mapped = self._mapped(size, value)
        mapped.copy_(value.detach())
        self.on_disk += size
        return mapped

    def _free(self, size: int) -> None:
        self.held -= size

    def _mapped(self, size: int, value: Tensor) -> Tensor:
        handle, path = tempfile.mkstemp(suffix=".temporary", dir=self._folder)
        try:
            _reserve(handle, size)
            mapped = torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype)
        finally:
            os.close(handle)
            Path(path).unlink()
        return mapped.view(value.shape)


def placed(value: Any, device: torch.device) -> Any:
    """The same structure with copies of its tensors on a device, which whoever asked for them may write into."""
    return tree.tree_map_only(Tensor, lambda one: one.to(device, copy=True), value)


def _reserve(handle: int, size: int) -> None:
    """Room on the disk, so that a full one is an error now and no signal while the file is written to."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    piece = bytes(2**20)
    for start in range(0, size, len(piece)):
        os.write(handle, piece[: size - start])
