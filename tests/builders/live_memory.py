"""How much memory tensors take while something is computed."""

from __future__ import annotations

import weakref

import torch


class LiveTensorBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self.alive:
                    self.alive[key] = tensor.untyped_storage().nbytes()
                    weakref.finalize(tensor, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
