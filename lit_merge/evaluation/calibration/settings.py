"""What is calibrated on, and the way through the blocks that all calibrations take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.evaluation.calibration.activations import Activations
from lit_merge.functional.evaluation import evaluating
from lit_merge.params import Params, check_finite
from lit_merge.transforms.base import finite_number, one_of, whole_number
from lit_merge.vectors import TaskVectors

if TYPE_CHECKING:
    from lit_merge.evaluation.calibration.walk import Walk
    from lit_merge.models.network import Network

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration(ABC):
    """A merge whose blocks are solved for again, in forward order, from what unlabelled inputs become on the way.

    In memory are the network, one block of one individual model, matrices of one block's layers, and activations of
    the inputs up to ``memory``; the others are on the disk.

    Args:
        images: how many inputs of every task (images, or texts), drawn without replacement; labels are not read.
        split: whose: ``train``, ``val``, or ``test``, which is then seen.
        batch_size: inputs at a time; changes rounding only.
        seed: of the choice.
        memory: GiB of inputs and activations that are held in memory, at least 0.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    images: int = 256
    split: Literal["train", "val", "test"] = "train"
    batch_size: int = 32
    seed: int = 0
    memory: float = 1.0

    def __post_init__(self) -> None:
        whole_number("calibrate.images", self.images, minimum=1)
        whole_number("calibrate.batch_size", self.batch_size, minimum=1)
        one_of("calibrate.split", self.split, ("train", "val", "test"))
        finite_number("calibrate.memory", self.memory, minimum=0.0)

    @abstractmethod
    def block(self, walk: Walk, index: int) -> Params:
        """τ of one block of the merged model, from inputs that all blocks before it have made.

        Args:
            walk: its earlier blocks are calibrated.
            index: of the block.

        Returns:
            Name inside the block -> τ; a parameter that is left out stays as the start has it.
        """

    def calibrate(
        self,
        module: nn.Module,
        vectors: TaskVectors,
        start: TaskVectors,
        given: Mapping[str, Iterable[tuple[Any, ...]]],
        folder: Path | None = None,
    ) -> Params:
        """Calibrate all blocks of a merge.

        Args:
            module: at θ0; it is as it was afterwards.
            vectors: τ_t of the individual models, under the module's names.
            start: τ of a merge of them, T = 1.
            given: task -> batches, each a tuple of the module's arguments.
            folder: where activations are that do not fit into memory.

        Returns:
            Name -> τ of the calibrated parameters; on the CPU, or mapped from the disk.

        Raises:
            ConfigurationError: the module has no blocks that can be run one by one, a task has no inputs, or there are
                several merged vectors.
            NonFiniteError: a value is NaN or infinite.
        """
        from lit_merge.evaluation.calibration.walk import Walk

        start.single()
        store = Activations(folder, int(self.memory * 2**30))
        kept = {task: [store.keep(batch) for batch in batches] for task, batches in given.items()}
        found: Params = {}
        with evaluating(module):
            walk = Walk(module, vectors, start, kept, store)
            for index, path in enumerate(walk.blocks.paths):
                solved = self.block(walk, index)
                check_finite(solved, f"calibrated {path}")
                walk.advance(index, {**walk.start(index), **solved})
                found |= {f"{path}.{name}": store.keep(tau) for name, tau in solved.items()}
        return found

    def of(
        self,
        network: Network,
        vectors: TaskVectors,
        start: TaskVectors,
        data: Any = None,
        folder: Path | None = None,
    ) -> tuple[Params, dict[str, int]]:
        """Calibrate a merge on the tasks' data, on the device that Lightning chooses.

        Args:
            network: whose module is at θ0; it is as it was afterwards.
            vectors: τ_t, one per task.
            start: τ of a merge of them, T = 1.
            data: a :class:`lit_merge.data.MultiTaskDataModule`; by default the embedded tasks of these names.
            folder: where activations are that do not fit into memory.

        Returns:
            Name -> τ of the calibrated parameters, and how many inputs there were of every task.

        Raises:
            ConfigurationError: the data lack a task, or as for :meth:`calibrate`.
            DataError: a task has no such inputs.
        """
        from lit_merge.evaluation.search import quiet, silent_trainer

        chosen = self._chosen(network, vectors.tasks, data)
        with quiet():
            device = silent_trainer().strategy.root_device
        _ = network.parameters, network.fingerprint  # of θ0 where it is
        before = next(network.module.parameters()).device
        module = network.module.to(device)
        try:
            batches = {task: self._batches(network, examples, rows) for task, (examples, rows) in chosen.items()}
            found = self.calibrate(module, vectors, start, batches, folder)
        finally:
            module.to(before)
        return found, {task: len(rows) for task, (_, rows) in chosen.items()}

    def describe(self) -> str:
        """What is done on what, in words."""
        return (
            f"blocks calibrated by {type(self).__name__} on at most {self.images:,} unlabelled {self.split} inputs of "
            f"every task{', which is measured on what it has seen' if self.split == 'test' else ''} (calibrate)"
        )

    def to_config(self) -> dict[str, Any]:
        """The calibration as plain data, ``{"class_path": …, "init_args": {…}}``."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"class_path": f"lit_merge.evaluation.calibration.{type(self).__qualname__}", "init_args": arguments}

    def _chosen(self, network: Network, tasks: Sequence[str], data: Any) -> dict[str, tuple[Any, list[int]]]:
        """Task -> its examples, and which of them."""
        import torch

        from lit_merge.data.multitask import MultiTaskDataModule, task_names

        data = MultiTaskDataModule(tasks=list(tasks)) if data is None else data
        if missing := [task for task in tasks if task not in task_names(data)]:
            raise ConfigurationError(
                f"calibrate: expected inputs of the tasks {', '.join(tasks)}, got none of {first_few(missing)} (data: "
                f"{', '.join(task_names(data))}). Give data of them."
            )
        found = {}
        for task in tasks:
            own = data.tasks[task]
            own.source.prepare()
            examples = own.examples(self.split, network)
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.seed)).tolist()
            found[task] = (examples, order[: self.images])
        return found

    def _batches(self, network: Network, examples: Any, rows: list[int]) -> Iterable[tuple[Tensor, ...]]:
        from lit_merge.evaluation.statistics.examples import examples as placed_examples

        batches = (
            examples.__getitems__(rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        )
        return (
            given for given, _ in placed_examples(batches, network.module, network.inputs, padded=False, in_order=False)
        )
