"""The individual models θ0 + τ_t that a merge is compared with, while it is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.params import Params
from lit_merge.vectors.storage import VectorStorage

if TYPE_CHECKING:
    from lit_merge.modules.merge import MergeModule

__all__ = ["IndividualModels"]


class IndividualModels:
    """What each task's own model says about its examples: one frozen pass per task, with one set of weights in memory.

    The weights are θ0 + τ_t of the vectors as they were fine-tuned, before any transform. Without a transform they come
    from the vectors that the merge holds already; otherwise the plain ones are stored beside them, in the same way,
    when they are first needed. In bfloat16 they are rounded as the merge's are.

    Args:
        module: whose vectors, network and storage these are.
    """

    def __init__(self, module: MergeModule) -> None:
        self._module = [module]  # in a list, so that the module does not become a part of what it owns
        self._stored: VectorStorage | None = None
        self._weights: Params | None = None

    @torch.no_grad()
    def features(self, batches: Mapping[str, Any]) -> dict[str, Tensor]:
        """Task -> the features ``[B, d]`` of its batch under its own model.

        With sharded vectors every process merges all of them in one order, also those of tasks that it has no batch of.

        Args:
            batches: task -> :class:`lit_merge.data.Batch`.
        """
        module = self._module[0]
        found = {}
        for row, tasks in enumerate(module.vector_tasks):
            mine = [task for task in tasks if task in batches]
            if not mine and not module.merged.sharded:
                continue
            self._weights = self.parameters(row, self._weights)
            for task in mine:
                found[task] = module.encode(module.inputs(batches[task]), self._weights)
        return found

    def parameters(self, row: int, out: Params | None = None) -> Params:
        """θ0 + τ_t of one vector; linearised, its τ_t."""
        module = self._module[0]
        merged = module.merged
        if module.transform is None:
            return merged.individual_parameters(row, module.linearized, out)
        device = merged.coefficients.device
        if self._stored is None or self._stored.device != device:
            self._stored = None
            plain = module.plain_vectors.restrict(merged.task_vectors.names)
            self._stored = VectorStorage(plain, merged.storage, device, merged.sharded)
        return self._stored.add_one(row, merged.base_parameters(module.linearized), out)

    def free(self) -> None:
        """Free the weights of the last pass."""
        self._weights = None
