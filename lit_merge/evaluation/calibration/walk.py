"""A walk through the blocks of a network, in which a merged model and individual models take turns in one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.calibration.activations import Activations, placed
from lit_merge.evaluation.calibration.blocks import Blocks
from lit_merge.evaluation.calibration.inputs import BlockInputs
from lit_merge.models.merged import swapped
from lit_merge.params import Params, add_scaled
from lit_merge.vectors import TaskVectors

__all__ = ["Walk"]

Recorded = dict[str, Any]


class Walk:
    """A module at θ0, T individual models θ0 + τ_t and a merged one θ0 + τ, of which one block at a time is placed.

    Args:
        module: at θ0, in evaluation mode, on the device to compute on.
        vectors: τ_t, one per task.
        start: τ of a merge, T = 1.
        given: task -> the module's arguments, a tuple per batch, as :meth:`Activations.keep` returns them.
        store: for activations.

    Attributes:
        blocks: the module's.
        tasks: in the order of the vectors.
    """

    def __init__(
        self,
        module: nn.Module,
        vectors: TaskVectors,
        start: TaskVectors,
        given: Mapping[str, Sequence[Any]],
        store: Activations,
    ) -> None:
        self._module, self._vectors, self._start, self._given, self._store = module, vectors, start, given, store
        self.tasks = vectors.tasks
        if missing := [task for task in self.tasks if not given.get(task)]:
            raise ConfigurationError(
                f"calibrate: expected inputs of every task, got none of {missing[0]}. Give at least one batch of each."
            )
        self._own = {name: value.detach() for name, value in module.named_parameters()}
        self.device = next(iter(self._own.values())).device
        self.blocks = Blocks(module, placed(given[self.tasks[0]][0], self.device))
        self._merged: dict[str, list[Recorded]] = {task: [{} for _ in given[task]] for task in self.tasks}
        self._experts: dict[str, list[Recorded]] = {task: [{} for _ in given[task]] for task in self.tasks}

    def start(self, index: int) -> Params:
        """τ of the start's block, by names inside the block."""
        return self._block(self._start, index)

    def base(self, index: int) -> Params:
        """θ0 of a block."""
        return {self._inside(index, name): self._own[name] for name in self.blocks.names(index)}

    def expert(self, index: int, task: str) -> Params:
        """τ_t of a task's block."""
        return self._block(self._vectors.select([self.tasks.index(task)]), index)

    def mean(self, index: int) -> Params:
        """The mean of the τ_t of a block, one parameter of all tasks in memory at a time."""
        return {
            self._inside(index, name): self._vectors[name].mean(0).to(self.device)
            for name in self.blocks.names(index)
            if name in self._vectors
        }

    def batches(self, task: str) -> range:
        """The numbers of a task's batches."""
        return range(len(self._given[task]))

    def merged_weights(self, index: int, block: Mapping[str, Tensor]) -> Params:
        """The merged model's weights around a block, which has these τ: as far as they matter to the block's output."""
        return self._weights(self._start, index, block)

    def expert_weights(self, index: int, task: str, block: Mapping[str, Tensor]) -> Params:
        """A task's own model's, likewise."""
        return self._weights(self._vectors.select([self.tasks.index(task)]), index, block)

    @contextmanager
    def placed(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[BlockInputs]:
        """For a while these weights are in the module; gives what notes the block's inputs."""
        with torch.no_grad(), swapped(self._module, weights):
            yield BlockInputs(self.blocks.part(index))

    def run(self, index: int, task: str, number: int, mode: BlockInputs | None = None, own: bool = False) -> Any:
        """What the block that is in the module gives for a batch; ``mode`` notes its inputs.

        Args:
            index: of the block.
            task: whose inputs.
            number: of the batch.
            mode: forgets what it has noted before.
            own: whether the block gets what the task's own model made of the inputs, instead of the merged one.
        """
        recorded = (self._experts if own else self._merged)[task][number]
        given, recorded = placed(self._given[task][number], self.device), placed(recorded, self.device)
        if mode is None:
            return self.blocks.run(index, given, recorded)
        mode.clear()
        with mode:
            return self.blocks.run(index, given, recorded)

    def record(self, index: int, task: str, number: int, output: Any, own: bool = False) -> None:
        """Keep what a block gave, for the next one."""
        recorded = (self._experts if own else self._merged)[task][number]
        stack = self.blocks.stack(index)
        recorded.pop(stack, None)  # before the next is there
        recorded[stack] = self._store.keep(output)

    def advance(self, index: int, block: Mapping[str, Tensor]) -> None:
        """Run the merged model's block, which has these τ now, on all inputs."""
        if index + 1 == len(self.blocks.paths):
            return
        with self.placed(index, self.merged_weights(index, block)):
            for task in self.tasks:
                for number in self.batches(task):
                    self.record(index, task, number, self.run(index, task, number))

    def token_weights(self, index: int, task: str, number: int, output: Any, unused: float) -> Tensor | None:
        """Of the last block the weight of every token, ``[B, L]``: 1 where the features depend on it, else ``unused``.

        None for other blocks, and where all tokens weigh the same.
        """
        if index + 1 < len(self.blocks.paths) or unused == 1:
            return None
        given = placed(self._given[task][number], self.device)
        recorded = placed(self._merged[task][number], self.device)
        used = self.blocks.used_tokens(given, recorded, output)
        return None if used is None or bool(used.all()) else used.double().clamp(min=unused)

    def in_rows(self, weights: Tensor | None, tokens_first: bool, rows: int) -> Tensor | None:
        """Weights of tokens, ``[B, L]``, in the order of the rows of a layer's input; None if these are others."""
        if weights is None or weights.numel() != rows:
            return None
        ordered = weights.mT if tokens_first or self.blocks.examples_axis == 1 else weights
        return ordered.reshape(-1, 1)

    def _block(self, vectors: TaskVectors, index: int) -> Params:
        return {
            self._inside(index, name): vectors[name][0].to(self.device)
            for name in self.blocks.names(index)
            if name in vectors
        }

    def _inside(self, index: int, name: str) -> str:
        return name.removeprefix(f"{self.blocks.paths[index]}.")

    def _weights(self, vectors: TaskVectors, index: int, block: Mapping[str, Tensor]) -> Params:
        path, around = self.blocks.paths[index], [name for name in self.blocks.around(index) if name in vectors]
        moved = {name: vectors[name][0] for name in around} | {f"{path}.{name}": tau for name, tau in block.items()}
        return {name: add_scaled(self._own[name], tau.to(self.device)) for name, tau in moved.items()}
