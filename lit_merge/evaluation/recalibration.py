"""Running statistics of a merged network, measured again on images: what REPAIR does for interpolated networks.

The mean and variance that a batch normalisation has stored are those of the network that it was trained in. In a merge
of several, activations have others, smaller ones as a rule (Jordan et al. 2023, sections 3 and 4), so that what comes
out of a normalisation is neither centred nor of variance one any more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_merge.data.multitask import MultiTaskDataModule, task_names
from lit_merge.errors import ConfigurationError, first_few
from lit_merge.evaluation.statistics.examples import examples
from lit_merge.files.lazy import LazyMapping
from lit_merge.functional.evaluation import evaluating
from lit_merge.models.merged import swapped
from lit_merge.models.network import Network
from lit_merge.naming import is_running_statistic
from lit_merge.params import Params, check_finite
from lit_merge.transforms.base import one_of, whole_number

__all__ = ["Recalibration", "recalibrate"]


@dataclass(frozen=True)
class Recalibration:
    """On which images running statistics are measured again; their labels are not read.

    Args:
        images: how many, of all tasks together, at least two; which ones depends on the seed alone.
        split: whose: ``train``, or ``val``.
        batch_size: images at a time, fewer than twice as many, of all tasks alike; at least two.
        seed: of the choice.
        tasks: whose images; by default those of all merged tasks.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    images: int = 1024
    split: Literal["train", "val"] = "train"
    batch_size: int = 128
    seed: int = 0
    tasks: list[str] | None = None

    def __post_init__(self) -> None:
        whole_number("recalibrate.images", self.images, minimum=2)
        whole_number("recalibrate.batch_size", self.batch_size, minimum=2)
        one_of("recalibrate.split", self.split, ("train", "val"))

    def describe(self) -> str:
        """Where the statistics come from, in words."""
        of = f" of {', '.join(self.tasks)}" if self.tasks else ""
        return f"measured again on {self.images:,} {self.split} images{of} (recalibrate)"

    def plain(self) -> dict[str, Any]:
        """The settings as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def of(self, network: Network, weights: LazyMapping, tasks: Sequence[str], data: Any = None) -> Params:
        """The running statistics of a network under given weights.

        Args:
            network: is as it was afterwards.
            weights: its parameters by their names in the whole model; others are left aside.
            tasks: that were merged.
            data: a :class:`lit_merge.data.MultiTaskDataModule`; by default the embedded tasks of these names.

        Returns:
            Name in the whole model -> tensor; empty if the network has no running statistics.

        Raises:
            ConfigurationError: the data lack a task, or the network has running statistics that are no batch
                normalisation's.
            DataError: a task has no such images.
        """
        module = network.module
        if not any(is_running_statistic(name) for name, _ in module.named_buffers()):
            return {}
        own = {name: weights[network.prefix + name] for name, _ in module.named_parameters()}
        own = {name: value.to(dtype=torch.float32) for name, value in own.items()}
        with swapped(module, own):
            found = recalibrate(module, self.batches(network, tasks, data), network.inputs)
        return {network.prefix + name: value for name, value in found.items()}

    def batches(self, network: Network, tasks: Sequence[str], data: Any = None) -> Iterator[Any]:
        """Batches in which every task has its part, of images drawn without replacement and not augmented."""
        named = list(dict.fromkeys(self.tasks or tasks))
        data = MultiTaskDataModule(tasks=named) if data is None else data
        missing = [task for task in named if task not in task_names(data)]
        if missing or not named:
            raise ConfigurationError(
                f"recalibrate: expected images of the tasks {', '.join(named)}, got none of {first_few(missing)} "
                f"(data: {', '.join(task_names(data))}). Give data of them, or set recalibrate.tasks."
            )
        chosen = []
        for place, task in enumerate(named):
            own = data.tasks[task]
            own.source.prepare()
            found = own.examples(self.split, network)
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed)).tolist()
            most = self.images // len(named) + (place < self.images % len(named))
            chosen.append((found, order[:most]))
        steps = max(1, sum(len(rows) for _, rows in chosen) // self.batch_size)
        for step in range(steps):
            parts = [(own, rows[len(rows) * step // steps : len(rows) * (step + 1) // steps]) for own, rows in chosen]
            batches = [own.__getitems__(rows) for own, rows in parts if rows]
            yield type(batches[0]).join(batches)


@torch.no_grad()
def recalibrate(
    module: nn.Module, batches: Iterable[Any], inputs: Callable[[Any], tuple[Any, ...]] | None = None
) -> Params:
    r"""Mean and variance of every batch normalisation's input, measured anew (Jordan et al. 2023, section 3.1).

    The normalisations are in training mode, so that each of them sees what comes out of earlier ones when these use
    the statistics of the batch; all else is in evaluation mode. As with torch's ``momentum=None``, what is returned is
    the mean over batches of equal weight,

    .. math:: \mu = \frac{1}{B} \sum_b \mu_b, \qquad \sigma^2 = \frac{1}{B} \sum_b \frac{n_b}{n_b - 1} \sigma_b^2,

    with the n_b values of a channel in a batch. A batch should be a mixture of what the network is to be used on: what
    only differs between batches is in no variance. Labels are not read, and nothing about the module has changed
    afterwards.

    Args:
        module: with the merged weights. Narrower than float32, a copy in float32 is measured.
        batches: :class:`lit_merge.data.Batch`, pairs ``(images, labels)``, or images alone; at least two values per
            channel in each.
        inputs: the module's arguments of a batch; by default its ``inputs``.

    Returns:
        Name of each ``running_mean`` and ``running_var`` -> tensor ``[C]``, on the CPU; empty if there are none.

    Raises:
        ConfigurationError: running statistics belong to something else than a batch normalisation, or a batch has one
            value per channel.
        DataError: there is no image.
        NonFiniteError: a value is NaN or infinite.
    """
    if any(value.is_floating_point() and value.dtype.itemsize < 4 for value in module.parameters()):
        module = copy.deepcopy(module).float()
    norms = {
        name: one for name, one in module.named_modules() if isinstance(one, _BatchNorm) and one.track_running_stats
    }
    known = {f"{name}.{leaf}".lstrip(".") for name in norms for leaf in ("running_mean", "running_var")}
    others = [name for name, _ in module.named_buffers() if is_running_statistic(name) and name not in known]
    if others:
        raise ConfigurationError(
            f"recalibrate: expected running statistics of batch normalisations, got {first_few(others)} of another "
            "kind. Leave recalibrate out."
        )
    if not norms:
        return {}
    with torch.inference_mode(False), evaluating(module), _measuring(norms.values()):
        try:
            for given, _ in examples(batches, module, inputs):
                module(*given)
        except ValueError as error:  # torch's own, of a normalisation with one value per channel
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigurationError(
                "recalibrate: expected at least two values per channel in every batch, got one. Use larger batches."
            ) from error
        found = {name: value.detach().cpu().clone() for name, value in module.named_buffers() if name in known}
    check_finite(found, "running statistics")
    return found


@contextmanager
def _measuring(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Training mode of normalisations, whose buffers are others for a while: those of no batch so far."""
    kept = []
    for norm in norms:
        buffers = {name: norm._buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked")}
        kept.append((norm, norm.momentum, buffers))
        for name, value in buffers.items():
            norm._buffers[name] = None if value is None else value.clone()
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        yield
    finally:
        for norm, momentum, buffers in kept:
            norm.momentum, norm.training = momentum, False
            norm._buffers.update(buffers)
