"""The methods of FusionBench that look at images, beside ours: RegMean and Fisher merging of a tiny network.

Rows of benchmarks/parity.py. The merges are given equal statistics, which are compared in rows of their own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from fusion_bench.method.fisher_merging.clip_fisher_merging import FisherMergingForCLIPVisionModel
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.regmean.clip_regmean import RegMeanAlgorithmForCLIP
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_merge import transforms as ours
from lit_merge.evaluation.statistics import collect_fisher, collect_gram
from lit_merge.params import Params
from lit_merge.transforms import Transform
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.statistics import write_statistics

SEED = 20250731
INPUTS, HIDDEN, CLASSES = 12, 8, 5
BATCH_SIZE = 16
Statistics = dict[str, Params]


@dataclass(frozen=True)
class Tuned:
    """θ0, T networks θ_t, and images with labels of every task, more of every further one."""

    base: nn.Module
    models: dict[str, nn.Module]
    images: dict[str, list[tuple[Tensor, int]]]

    @property
    def parameters(self) -> dict[str, list[Tensor]]:
        """Name -> the parameter of every task."""
        return {
            name: [model.get_parameter(name).detach() for model in self.models.values()]
            for name, _ in self.base.named_parameters()
        }

    def statistics(self, collect: Callable[..., Params]) -> Statistics:
        """What one of our functions collects of every task."""
        return {
            task: collect(model, DataLoader(self.images[task], BATCH_SIZE))  # type: ignore[arg-type]
            for task, model in self.models.items()
        }

    def merged(
        self, kind: Literal["fisher", "gram"], statistics: Statistics, build: Callable[[dict[str, str]], Transform]
    ) -> Tensor:
        """τ of our merge with these statistics, all parameters in a row."""
        starts = dict(self.base.named_parameters())
        vectors = [
            TaskVector({name: value.detach() - starts[name].detach() for name, value in model.named_parameters()}, task)
            for task, model in self.models.items()
        ]
        with tempfile.TemporaryDirectory() as folder:
            files = {task: f"{folder}/{task}.safetensors" for task in statistics}
            for task, path in files.items():
                write_statistics(path, kind, statistics[task], task)
            result = build(files)(TaskVectors(vectors))
            return flat({name: result[name][0] for name in result})

    def departure(self, merged: Params) -> Tensor:
        """τ of a library's merged parameters."""
        return flat({name: merged[name] - value.detach() for name, value in self.base.named_parameters()})


@dataclass(frozen=True)
class DataRow:
    """As ``Row`` of benchmarks/parity.py; either side makes a row of numbers of the tuned networks."""

    method: str
    theirs: Callable[[Tuned], Tensor]
    ours: Callable[[Tuned], Tensor]
    lit_merge: str
    images: int = 40
    reason: str = ""
    paper: str = ""

    def results(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """What the library makes of two, three and four tasks, and what we do."""
        for tasks in (2, 3, 4):
            given = tuned(tasks, self.images, dtype)
            yield self.theirs(given), self.ours(given)


def flat(tensors: Params) -> Tensor:
    """All in a row, by name."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def joined(statistics: Statistics) -> Tensor:
    """The statistics of all tasks in a row."""
    return torch.cat([flat(tensors) for tensors in statistics.values()])


def tuned(tasks: int, images: int, dtype: torch.dtype) -> Tuned:
    """The same for every row: a network of two linear layers."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = nn.Sequential()
    base.add_module("inner", nn.Linear(INPUTS, HIDDEN, dtype=dtype))
    base.add_module("activation", nn.Tanh())
    base.add_module("outer", nn.Linear(HIDDEN, CLASSES, dtype=dtype))
    with torch.no_grad():
        for value in base.parameters():
            value.copy_(0.5 * drawn(*value.shape))
    models: dict[str, nn.Module] = {}
    data = {}
    for index in range(tasks):
        models[f"task{index}"] = model = copy.deepcopy(base)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.2 * drawn(*value.shape).to(dtype))
        count = images + 16 * index if images > INPUTS else images
        pixels = (drawn(1, INPUTS) + drawn(count, INPUTS)).to(dtype)
        data[f"task{index}"] = [(image, number % CLASSES) for number, image in enumerate(pixels)]
    return Tuned(base, models, data)


def stand_in(images: int, batch_size: int) -> Any:
    """What FusionBench's collecting methods look at of their algorithm."""
    return SimpleNamespace(
        fabric=SimpleNamespace(setup_dataloaders=lambda loader: loader, setup=lambda model: model),
        clip_processor=None,
        dataloader_kwargs={"batch_size": batch_size},
        compute_logits=lambda model, batch, task: model(batch[0]),
        config=SimpleNamespace(num_fisher_examples=images),
        num_regmean_examples=images,
    )


def their_grams(given: Tuned) -> Statistics:
    """FusionBench's Gram matrices, under our names."""
    torch.manual_seed(SEED)  # its loader shuffles
    found: Statistics = {}
    for task, model in given.models.items():
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        images = given.images[task]
        algorithm = stand_in(len(images), BATCH_SIZE)
        grams = RegMeanAlgorithmForCLIP.get_regmean_weights(algorithm, task, model, images, layers)
        found[task] = {f"{name}.weight": gram for name, gram in grams.items()}
    return found


def their_fishers(given: Tuned, batch_size: int = BATCH_SIZE) -> Statistics:
    """FusionBench's Fisher information."""
    found: Statistics = {}
    for task, model in given.models.items():
        names, images = [name for name, _ in model.named_parameters()], given.images[task]
        algorithm = stand_in(len(images), batch_size)
        found[task] = FisherMergingForCLIPVisionModel.get_fisher_weights(algorithm, task, model, images, names)
    return found


def class_by_class(given: Tuned) -> Statistics:
    """The same, but every gradient is that of one image and one class before it is squared."""
    softmax, parts = torch.softmax, []
    for label in range(CLASSES):
        chosen = torch.eye(CLASSES)[label]
        with mock.patch.object(torch, "softmax", lambda *given, chosen=chosen, **by: softmax(*given, **by) * chosen):
            parts.append(their_fishers(given, batch_size=1))
    return {
        task: {name: torch.stack([part[task][name] for part in parts]).sum(0) for name in parts[0][task]}
        for task in given.models
    }


def their_regmean(off_diagonal: float, given: Tuned) -> Tensor:
    """FusionBench's merge of our Gram matrices."""
    grams = [
        {name.removesuffix(".weight"): gram for name, gram in tensors.items()}
        for tensors in given.statistics(collect_gram).values()
    ]
    return given.departure(merging_with_regmean_weights(given.parameters, grams, off_diagonal))


def their_fisher_mean(normalise: bool, floor: float, given: Tuned) -> Tensor:
    """FusionBench's merge with our Fisher information."""
    fishers = list(given.statistics(collect_fisher).values())
    equal = torch.ones(len(fishers), dtype=torch.float64) / len(fishers)
    return given.departure(merging_with_fisher_weights(given.parameters, fishers, equal, normalise, floor))


INVERTED = "Σ G_t is singular: it inverts that all the same, we take of the best weights those nearest to the mean"
ADDED = "it adds the floor to F before dividing by its norm, the authors raise F to it before, we after"
SQUARED = "it squares the sum over the classes and images of a batch, the authors and we every one's gradient"


def data_rows() -> list[DataRow]:
    """RegMean and Fisher merging: what is done with statistics, then the statistics."""

    def regmean(off_diagonal: float, **others: Any) -> DataRow:
        transform = partial(ours.RegMean, off_diagonal=off_diagonal)

        def merge(given: Tuned) -> Tensor:
            return given.merged("gram", given.statistics(collect_gram), transform)

        method, text = f"regmean, α = {off_diagonal:g}", f"RegMean(…, off_diagonal={off_diagonal})"
        return replace(DataRow(method, partial(their_regmean, off_diagonal), merge, text), **others)

    def fisher(method: str, floors: tuple[float, float], normalise: bool, added: float = 0.0, **others: Any) -> DataRow:
        settings: dict[str, Any] = {"floor": floors[1], "normalise": "norm" if normalise else None}

        def merge(given: Tuned) -> Tensor:
            fishers = given.statistics(collect_fisher)
            fishers = {task: {name: value + added for name, value in one.items()} for task, one in fishers.items()}
            return given.merged("fisher", fishers, partial(ours.FisherMean, **settings))

        text = f"FisherMean(…, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        return DataRow(
            f"fisher_merging{method}", partial(their_fisher_mean, normalise, floors[0]), merge, text, **others
        )

    def collected(method: str, theirs: Callable[[Tuned], Statistics], collect: Any, **others: Any) -> DataRow:
        def mine(given: Tuned) -> Tensor:
            return joined(given.statistics(collect))

        return DataRow(method, lambda given: joined(theirs(given)), mine, collect.__name__, **others)

    information = "fisher_merging, its Fisher information"
    return [
        regmean(0.9),
        regmean(1.0),
        regmean(1.0, method="regmean, α = 1, two images", images=2, reason=INVERTED, paper="undefined"),
        collected("regmean, its Gram matrices", their_grams, collect_gram),
        fisher("", (1e-6, 1e-6), True, reason=ADDED, paper="neither"),
        fisher(", no floor", (0.0, 0.0), True),
        fisher(", no floor, not normalised", (0.0, 0.0), False),
        fisher(", floor added to F, not normalised", (1e-6, 0.0), False, added=1e-6),
        collected(information, their_fishers, collect_fisher, reason=SQUARED, paper="lit-merge"),
        collected(f"{information}, one image and class a batch", class_by_class, collect_fisher),
    ]
