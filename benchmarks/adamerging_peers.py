"""What benchmarks/adamerging.py compares: the same optimisation steps on the same inputs, by three programs.

- ``paper``: the papers' own scheme, written plainly: for every task anew, each tensor is θ0 + Σ λ τ under autograd; one
  backward pass of the sum of the losses. To its favour without what the published program does beside: it keeps vectors
  in host memory, uses two batches per task, builds its loaders anew, and asks for the vectors' gradients as well.
- ``fusion_bench``: FusionBench's own loop and ``LayerWiseMergedModel`` as released, with the settings that it ships:
  one merge per step, a forward and a backward pass through network and merge for each task.
- ``lit_merge``: a fit of our ``MergeModule`` by Lightning's ``Trainer``.

Each function takes the inputs and returns what runs the steps: ``run(steps, mark)`` calls ``mark`` when a step begins
and once when the last has ended. Batches are in memory, and the same in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from lightning import Callback, LightningDataModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lit_merge.data import ImageBatch
from lit_merge.evaluation.search import quiet, silent_trainer
from lit_merge.models import load_clip
from lit_merge.models.heads import ZeroShotHead
from lit_merge.models.merged import swapped
from lit_merge.modules.merge import MergeModule
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector

SEED = 0
TASKS = {  # the classes of the literature's eight tasks
    "SUN397": 397,
    "Cars": 196,
    "RESISC45": 45,
    "EuroSAT": 10,
    "SVHN": 10,
    "GTSRB": 43,
    "MNIST": 10,
    "DTD": 47,
}
COEFFICIENT, LEARNING_RATE = 0.3, 1e-3
LENGTH = 1e-3  # standard deviation of a task vector's entries; that of ViT-B/32's weights is about 0.02

Run = Callable[[int, Callable[[], None]], None]


def write_inputs(folder: Path, model: str) -> None:
    """A network with random weights and the random task vectors, if they are not there."""
    if (folder / f"{list(TASKS)[-1]}.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    base = {name: value.detach() for name, value in load_clip(model, "random").visual.named_parameters()}
    save_file(base, folder / "base.safetensors")
    about = {"base_fingerprint": fingerprint(base)}
    for task in TASKS:
        TaskVector({name: LENGTH * torch.randn_like(value) for name, value in base.items()}, task, metadata=about).save(
            folder / f"{task}.safetensors"
        )


def size(folder: Path) -> tuple[int, int]:
    """How many parameters and tensors the network has."""
    base = load_file(folder / "base.safetensors")
    return sum(value.numel() for value in base.values()), len(base)


class Inputs:
    """One problem: network, task vectors, heads and batches, all drawn with :data:`SEED`.

    Args:
        folder: where :func:`write_inputs` wrote.
        model: as for :func:`lit_merge.models.load_clip`.
        vectors: how many of the tasks.
        images: per task.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, folder: Path, model: str, vectors: int, images: int, device: str) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.tasks = dict(list(TASKS.items())[:vectors])
        clip = load_clip(model, "random")
        self.network, self.preprocessing = clip.visual, clip.preprocessing
        base = self.read("base")
        self.network.load_state_dict(base, strict=False)
        self.network.to(self.device)
        generator = torch.Generator().manual_seed(SEED)
        features, size = base["proj"].shape[1], self.preprocessing.image_size
        self.heads: dict[str, nn.Module] = {}
        self.batches: dict[str, Tensor] = {}
        for task, classes in self.tasks.items():
            weight = nn.functional.normalize(torch.randn(classes, features, generator=generator), dim=1)
            self.heads[task] = ZeroShotHead(weight, 100.0, [str(index) for index in range(classes)]).to(self.device)
            self.batches[task] = torch.randn(images, 3, size, size, generator=generator).to(self.device)

    def read(self, name: str) -> dict[str, Tensor]:
        """A file's tensors, in memory of their own."""
        return {key: value.clone() for key, value in load_file(self.folder / f"{name}.safetensors").items()}

    def path(self, task: str) -> str:
        """The file of a task vector."""
        return str(self.folder / f"{task}.safetensors")


def paper(inputs: Inputs, storage: str) -> Run:
    """The papers' own scheme, as the module's docstring says."""
    network = inputs.network.requires_grad_(False)
    vectors = [inputs.read(task) for task in inputs.tasks]
    stacks = {
        name: (value.detach(), *(vector.pop(name).to(inputs.device) for vector in vectors))
        for name, value in network.named_parameters()
    }
    raw = nn.Parameter(torch.full((len(stacks), len(inputs.tasks)), COEFFICIENT, device=inputs.device))
    ones = torch.ones(len(stacks), 1, device=inputs.device)
    optimizer = torch.optim.Adam([raw], lr=LEARNING_RATE)

    def loss(task: str, images: Tensor) -> Tensor:
        coefficients = torch.cat((ones, raw.clamp(0.0, 1.0)), dim=1)
        merged = {
            name: sum(tuple(part * coefficient for part, coefficient in zip(parts, row, strict=True)))
            for (name, parts), row in zip(stacks.items(), coefficients, strict=True)
        }
        logits = inputs.heads[task](functional_call(network, merged, (images,)))
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean(0)

    def run(steps: int, mark: Callable[[], None]) -> None:
        for _ in range(steps):
            mark()
            losses = sum(loss(task, images) for task, images in inputs.batches.items())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
        mark()

    return run


def fusion_bench(inputs: Inputs, storage: str) -> Run:
    """FusionBench's loop; only its data, its heads and the clock are put in."""
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from lightning import Fabric
    from omegaconf import DictConfig

    first = next(iter(inputs.tasks))

    class Algorithm(LayerWiseAdaMergingAlgorithm):
        mark: Callable[[], None]

        def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor]]:
            if task == first:
                self.mark()
            return iter([(inputs.batches[task],)])

        def compute_logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
            return inputs.heads[task](module(images))

        def print_profile_summary(self, title: str | None = None) -> None:
            self.mark()  # it is what comes after the loop

    def load_model(name: str) -> nn.Module:
        if name == "_pretrained_":
            return inputs.network
        model = copy.deepcopy(inputs.network)
        with torch.no_grad():
            for key, change in inputs.read(name).items():
                model.get_parameter(key).add_(change.to(inputs.device))
        return model

    settings = {"optimizer": "adam", "lr": LEARNING_RATE, "init_values": COEFFICIENT, "weights": None}
    shipped = {"clamp_weights": False, "tie_weights": True, "strict": False}
    algorithm = Algorithm(DictConfig({**settings, **shipped}))
    algorithm.fabric = Fabric(accelerator=inputs.device.type, devices=1)
    algorithm.modelpool = SimpleNamespace(model_names=list(inputs.tasks), load_model=load_model)
    merged = algorithm.construct_layer_wise_merged_model(algorithm.modelpool)

    def run(steps: int, mark: Callable[[], None]) -> None:
        algorithm.mark, algorithm.config.max_steps = mark, steps
        algorithm.test_time_adaptation(merged)

    return run


def lit_merge(inputs: Inputs, storage: str) -> Run:
    """A fit of ours, with a data module that hands out the batches and nothing else."""
    module, batch = merge_module(inputs, storage), labelled(inputs)

    class Data(LightningDataModule):
        task_names = tuple(inputs.tasks)
        tasks: ClassVar = {task: SimpleNamespace(classes=head.classes) for task, head in inputs.heads.items()}
        steps = 0

        def train_dataloader(self) -> DataLoader:
            return DataLoader([batch] * self.steps, batch_size=None, collate_fn=lambda sample: sample)

    class Clock(Callback):
        mark: Callable[[], None]

        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            self.mark()

        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == trainer.max_steps:
                self.mark()

    data, clock = Data(), Clock()

    def run(steps: int, mark: Callable[[], None]) -> None:
        data.steps, clock.mark = steps, mark
        settings = {"accelerator": inputs.device.type, "max_steps": steps, "limit_val_batches": 0}
        with quiet():
            silent_trainer(callbacks=[clock], **settings).fit(module, data)

    return run


def merge_module(inputs: Inputs, storage: str) -> MergeModule:
    """Ours on the device, with the vectors where they are to be kept."""
    module = MergeModule(
        [inputs.path(task) for task in inputs.tasks],
        init=COEFFICIENT,
        learning_rate=LEARNING_RATE,
        storage=storage,
        encoder=inputs.network,
        heads=inputs.heads,
        preprocessing=inputs.preprocessing,
    ).to(inputs.device)
    module.merged.vector_storage()
    return module


def labelled(inputs: Inputs) -> dict[str, ImageBatch]:
    """The batches as the module takes them; the labels are not known."""
    found = {}
    for task, images in inputs.batches.items():
        indices = torch.arange(len(images), device=inputs.device)
        found[task] = ImageBatch(images, torch.full_like(indices, -1), indices)
    return found


def parts(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The two parts of a step of ours: the merge, there and back, and the network's passes over plain weights."""
    module, batches = merge_module(inputs, "device"), labelled(inputs)
    gradients = [torch.randn_like(value) for value in inputs.network.parameters()]

    def merge() -> object:
        weights = module.merged.merged_parameters()
        return torch.autograd.grad(list(weights.values()), [module.merged.coefficients], gradients)

    def network() -> object:
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.network.named_parameters()}
        with swapped(inputs.network, leaves):
            features = module.encode(torch.cat(list(inputs.batches.values())), leaves)
            slices = features.split([len(images) for images in inputs.batches.values()])
            losses = [
                module.compute_loss(module.classify(part, task), batch, task)
                for part, (task, batch) in zip(slices, batches.items(), strict=True)
            ]
            torch.stack(losses).sum().backward()
        return leaves

    return {"merge": merge, "network": network}
