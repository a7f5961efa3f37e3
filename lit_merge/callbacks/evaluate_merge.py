"""The accuracy of the merged model while one of its task vectors is still in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_merge.callbacks.steps import EverySteps
from lit_merge.data.embedded.tasks import DRAWN_TASKS
from lit_merge.data.multitask import MultiTaskDataModule, task_names
from lit_merge.data.published.task import is_published
from lit_merge.errors import ConfigurationError, DataError, first_few
from lit_merge.functional import linearize
from lit_merge.functional.evaluation import evaluating
from lit_merge.metrics.hits import hits_of
from lit_merge.models.lora import own_parameters
from lit_merge.models.merged import swapped
from lit_merge.modules.finetune import FineTuneModule
from lit_merge.params import check_finite
from lit_merge.transforms import Transform
from lit_merge.transforms.base import whole_number
from lit_merge.transforms.parts import resolve_transform
from lit_merge.vectors import TaskVector, TaskVectors, merged_parameters

__all__ = ["EvaluateMerge"]


class EvaluateMerge(EverySteps):
    """Merges the task vector in training with stored ones, and logs what the merged model gets right.

    τ as it is now and the stored vectors, in this order, go through a chain of transforms. The model θ0 + merged τ, of
    a linearised module ``f(x; θ0) + J · merged τ``, then classifies validation images of every task under the task's
    zero-shot head. Logged, each in [0, 1], and there for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor:

    - ``merge/{task}/accuracy`` of every task of the data;
    - ``merge/accuracy``, the mean over all of them;
    - ``merge/accuracy_others``, the mean over all but the task in training.

    The training goes on as if it had not happened, bit for bit: the merged weights stand in for the encoder's during
    the evaluation only, random states and modes are put back, and nothing is
    written. While it evaluates, this takes one more copy of the weights on the device, and of τ in main memory;
    stored vectors are read one parameter at a time. Every process merges the same vectors and evaluates its share of
    the images.

    Args:
        vectors: task vector files of other tasks, at least one.
        recipe: name of a method, e.g. ``task_arithmetic``; either this or ``transform``.
        settings: of the recipe, e.g. ``{coefficient: 0.3}``.
        transform: instead of a recipe, any transform or chain that leaves one vector.
        every_n_steps: evaluate after every so many optimiser steps; the loggers get the values at that step.
        at_validation: evaluate at every validation, but not at the sanity check before the training.
        data: a :class:`~lit_merge.data.MultiTaskDataModule` with the task in training, those of the vectors and any
            further ones; None for the embedded tasks that training and vectors are named after.
        limit_batches: validation batches per task and process; None for all.
        prefix: of the names that are logged, in place of ``merge``.

    Raises:
        ConfigurationError: a setting is unknown, out of range, or contradicts another one; when fit starts, the module
            is none for one task, a task is there twice or has no data, or the transform leaves several vectors.
        FileFormatError: when fit starts, a file is no task vector.
        StructureMismatchError: when fit starts, a vector has another base model.
        DataError: a task has no labelled validation image.
        NonFiniteError: a merged value is NaN or infinite.

    Examples:
        >>> EvaluateMerge(["letters.safetensors"], recipe="task_arithmetic", settings={"coefficient": 0.4}).transform
        chain(Sum(), Scale(coefficient=0.4))
    """

    def __init__(
        self,
        vectors: list[str],
        recipe: str | None = None,
        settings: dict[str, Any] | None = None,
        transform: Transform | None = None,
        every_n_steps: int | None = None,
        at_validation: bool = True,
        data: L.LightningDataModule | None = None,
        limit_batches: int | None = None,
        prefix: str = "merge",
    ) -> None:
        if isinstance(vectors, str) or not vectors:
            raise ConfigurationError(
                f"vectors: expected a list of at least one task vector file, got {vectors!r}. "
                "List those of the other tasks."
            )
        whole_number("every_n_steps", every_n_steps, minimum=1, optional=True)
        whole_number("limit_batches", limit_batches, minimum=1, optional=True)
        if every_n_steps is None and not at_validation:
            raise ConfigurationError(
                "every_n_steps and at_validation: expected at least one of them, got neither. Set one, or remove the "
                "callback."
            )
        if not prefix or prefix in ("train", "val", "test"):
            raise ConfigurationError(
                f"prefix: expected a name that no other metric begins with, got {prefix!r}. Use e.g. merge."
            )
        self.vectors = list(vectors)
        self.transform = _chosen(recipe, settings, transform)
        self.every_n_steps, self.at_validation = every_n_steps, at_validation
        self.data, self.limit_batches, self.prefix = data, limit_batches, prefix
        self._stored: list[TaskVector] = []
        self._heads: dict[str, nn.Module] = {}
        self._loaders: dict[str, DataLoader[Any]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the vectors, read the images and build the other tasks' heads, once; refuse what cannot work."""
        if not isinstance(pl_module, FineTuneModule):
            raise ConfigurationError(
                f"EvaluateMerge: expected a module with the task vector of one task, such as FineTuneModule, got "
                f"{type(pl_module).__name__}. Remove the callback."
            )
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        if sum(isinstance(other, EvaluateMerge) and other.prefix == self.prefix for other in callbacks) > 1:
            raise ConfigurationError(
                f"prefix: expected another one for every EvaluateMerge, got {self.prefix!r} twice. Change one."
            )
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            self._stored = [TaskVector.load(path, verify=True) for path in self.vectors]
            for vector in self._stored:
                pl_module.check_vector(vector)
            known = [vector.tasks for vector in self._stored]
            pl_module.look_beside(zip(self.vectors, known, strict=True))
            self._merged(pl_module)
            data: Any = self._tasks(pl_module)
            data.trainer = trainer
            if trainer.local_rank == 0:
                data.prepare_data()
            trainer.strategy.barrier("images of the merged tasks")
            data.setup("validate")
            self._loaders = dict(zip(data.task_names, data.val_dataloader(), strict=True))
            self._heads = {}
            for task in data.task_names:
                if task != pl_module.task:
                    head = pl_module.make_head(data.tasks[task])
                    self._heads[task] = head.requires_grad_(False).eval().to(next(pl_module.network.parameters()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that never validates, where that is needed."""
        super().on_train_start(trainer, pl_module)
        validates = trainer.enable_validation and trainer.val_dataloaders != []
        if self.every_n_steps is None and not validates:
            raise ConfigurationError(
                "at_validation: expected a run that validates, got one that never does. Set every_n_steps, or give "
                "the data a validation split."
            )

    def _at_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        values = self._evaluate(trainer, pl_module)
        for name, value in values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, logger=False)
        # Not through log: that would wait for log_every_n_steps, and then repeat the value at other steps.
        numbers = {"epoch": trainer.current_epoch, **{name: float(value) for name, value in values.items()}}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step - 1)  # as Lightning counts, from 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate, before anyone acts on the validation's metrics."""
        if self.at_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            for name, value in self._evaluate(trainer, cast(FineTuneModule, pl_module)).items():
                # The processes have equal values, whose largest is exactly that one; their mean may be rounded.
                pl_module.log(name, value, sync_dist=True, reduce_fx="max")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of images, heads and files."""
        self._stored, self._heads, self._loaders = [], {}, {}

    def _tasks(self, pl_module: FineTuneModule) -> Any:
        """The data, with every task that has a vector among its own."""
        names = [pl_module.task, *(task for vector in self._stored for task in vector.tasks or ("",))]
        if "" in names:
            what = "the training data" if not pl_module.task else self.vectors[names.index("") - 1]
            raise ConfigurationError(f"tasks: expected a name for every task, got none of {what}. Give it a name.")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigurationError(
                f"vectors: expected other tasks than {pl_module.task}, which is in training, each once, got "
                f"{first_few(repeated)} again. Remove it."
            )
        if self.data is None:
            unknown = [name for name in names if name not in DRAWN_TASKS and not is_published(name)]
            if unknown:
                raise ConfigurationError(
                    f"data: expected a data module, as {first_few(unknown)} is no task of a known name, got none. "
                    "Use MultiTaskDataModule with paths."
                )
            return MultiTaskDataModule(tasks=names)
        data: Any = self.data
        missing = [name for name in names if name not in task_names(data)]
        if missing:
            raise ConfigurationError(
                f"data: expected every merged task, got none of {first_few(missing)} (data: "
                f"{', '.join(data.task_names)}). Name the tasks of data as the vectors'."
            )
        classes = tuple(data.tasks[pl_module.task].classes)
        if pl_module.classes != classes:
            raise ConfigurationError(
                f"data: expected {pl_module.task} with the classes in training, {first_few(pl_module.classes)}, got "
                f"{first_few(classes)}. Give both data modules the same images and class names."
            )
        return data

    def _merged(self, pl_module: FineTuneModule) -> TaskVector:
        """The merged vector; it is computed when it is read."""
        own = TaskVector(dict(pl_module.task_vector()), pl_module.task, metadata=pl_module.base_description())
        vectors = self.transform(TaskVectors([own, *self._stored], base=pl_module.initial_parameters))
        if len(vectors.tasks) != 1:
            raise ConfigurationError(
                f"transform: expected one that leaves one vector, got {len(vectors.tasks)} of {self.transform!r}. "
                "End it with Sum(), Mean() or another reducer."
            )
        return vectors.single()

    def _evaluate(self, trainer: L.Trainer, pl_module: FineTuneModule) -> dict[str, Tensor]:
        """The metrics: name -> scalar, the same on every process."""
        # Outside of the inference mode in which Lightning validates: linearising would copy its tensors every time.
        randomness = isolate_rng(include_cuda=pl_module.device.type == "cuda")
        with randomness, torch.inference_mode(False), torch.no_grad(), evaluating(pl_module):
            with _merged_model(pl_module, self._merged(pl_module)) as encode:
                counts = torch.stack([self._count(trainer, pl_module, encode, task) for task in self._loaders])
            counts = cast(Tensor, trainer.strategy.reduce(counts, reduce_op="sum"))
            tasks = list(self._loaders)
            empty = [task for task, count in zip(tasks, counts[:, 1].tolist(), strict=True) if not count]
            if empty:
                raise DataError(
                    f"{first_few(empty)}: expected labelled validation images, got none. Give the task some, or leave "
                    "it out of data."
                )
            accuracy = counts[:, 0] / counts[:, 1]
            others = [index for index, task in enumerate(tasks) if task != pl_module.task]
            return {
                **{f"{self.prefix}/{task}/accuracy": value for task, value in zip(tasks, accuracy, strict=True)},
                f"{self.prefix}/accuracy": accuracy.mean(),
                f"{self.prefix}/accuracy_others": accuracy[others].mean(),
            }

    def _count(self, trainer: L.Trainer, pl_module: FineTuneModule, encode: Callable[..., Tensor], task: str) -> Tensor:
        """How many of this process's images of a task are right, and how many count; int64 ``[2]``."""
        head = self._heads.get(task, pl_module.head)
        assert head is not None
        count = torch.zeros(2, dtype=torch.int64, device=pl_module.device)
        for batch in islice(self._loaders[task], self.limit_batches):
            placed = move_data_to_device(trainer.precision_plugin.convert_input(batch), pl_module.device)
            with trainer.precision_plugin.val_step_context():
                logits = head(encode(*pl_module.inputs(placed)))
                right, counted = hits_of(head, logits, placed)
            count += torch.stack([right.sum(), counted.sum()]).long()
        return count


def _chosen(recipe: str | None, settings: dict[str, Any] | None, transform: Transform | None) -> Transform:
    if (recipe is None) == (transform is None):
        got = "neither" if recipe is None else "both"
        raise ConfigurationError(
            f"recipe and transform: expected exactly one of them, got {got}. Use e.g. recipe: task_arithmetic."
        )
    return resolve_transform(recipe, settings, transform)


@contextmanager
def _merged_model(pl_module: FineTuneModule, merged: TaskVector) -> Iterator[Callable[..., Tensor]]:
    """Inputs -> features ``[B, d]`` of the merged model, while its weights stand in for the network's."""
    network, own = pl_module.network, own_parameters(pl_module.network)
    if pl_module.linearized:
        tangents = {name: value.to(own[name]) for name, value in merged.items()}
        check_finite(tangents, "merged task vector")
        yield lambda *inputs: torch.add(*linearize(network, {}, tangents, *inputs))
        return
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    # What is not the encoder's own are LoRA's factors: without them, its weights are the merged ones.
    weights = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters() if name not in own}
    for name, value in merged_parameters(pl_module.initial_parameters, merged):
        weights[names[id(own[name])]] = value.to(own[name])
    with swapped(network, weights):
        yield network
