"""A merge that is learned, in its plainest form: what the callbacks need of a module, for their tests."""

from __future__ import annotations

from contextlib import nullcontext

import lightning as L
import torch
from torch import nn

from lit_merge.models.merged import MergedModel
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.coefficients import Coefficients
from lit_merge.vectors.groups import group_names


class BlockEncoder(nn.Module):
    """Images ``[B, 3, S, S]`` -> features ``[B, 6]``; three blocks, dropout, and what lies behind registered first."""

    def __init__(self, size=4):
        super().__init__()
        self.proj = nn.Linear(5, 6)
        self.conv1 = nn.Linear(3 * size**2, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.drop = nn.Dropout(0.2)

    def forward(self, images):
        hidden = self.conv1(images.flatten(1))
        for block in self.blocks:
            hidden = hidden + self.drop(torch.tanh(block(hidden)))
        return self.proj(hidden)


def merged_model(tasks, granularity="tensor", init=0.3, clamp=(0.0, 1.0), size=4):
    """The encoder with random task vectors, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BlockEncoder(size)
        shapes = {name: value.shape for name, value in encoder.named_parameters()}
        vectors = [TaskVector({n: 0.4 * torch.randn(shape) for n, shape in shapes.items()}, task) for task in tasks]
    return MergedModel(encoder, TaskVectors(vectors), granularity, init, clamp)


class Merging(L.LightningModule):
    """Minimises the entropy of every task's predictions."""

    preprocessing = None

    def __init__(self, tasks, classes=3, learning_rate=0.05, **settings):
        super().__init__()
        self.merged, self.tasks, self.learning_rate = merged_model(tasks, **settings), tuple(tasks), learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.heads = nn.ModuleDict({task: nn.Linear(6, classes) for task in tasks}).requires_grad_(False)

    def describe(self):
        return {"base_model": "BlockEncoder"}

    def merged_once(self):
        return nullcontext()

    def forward(self, images):
        return self.merged(images)

    def features(self, batch):
        return self(*batch.inputs)

    def classify(self, features, task):
        return self.heads[task](features)

    def training_step(self, batch, batch_idx):
        loss = 0.0
        for task, part in batch.items():
            probabilities = self.classify(self(part.images), task).softmax(-1)
            loss = loss - (probabilities * probabilities.log()).sum(-1).mean()
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam([self.merged.coefficients], self.learning_rate)


class Steps(L.Callback):
    """The coefficients after every step, and what training is like before it."""

    def __init__(self):
        self.coefficients, self.states, self.metrics = {}, [], {}

    def on_train_start(self, trainer, pl_module):
        self.coefficients[trainer.global_step] = pl_module.merged.coefficients.detach().clone()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        modes = {name: part.training for name, part in pl_module.named_modules()}
        self.states.append((modes, torch.get_rng_state().tolist(), torch.is_grad_enabled()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.coefficients[trainer.global_step] = pl_module.merged.coefficients.detach().clone()
        self.metrics[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class NoMerge(L.LightningModule):
    """A module that learns no coefficients."""

    def training_step(self, batch, batch_idx):
        raise AssertionError

    def configure_optimizers(self):
        return None


def coefficients_of(names, granularity, tasks, start=0.0, end=1.0, **metadata):
    """Made-up coefficients between two numbers, from a seed."""
    members = dict(zip(names, group_names(list(names), granularity), strict=True))
    groups = tuple(dict.fromkeys(members.values()))
    values = torch.rand(len(tasks), len(groups), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return Coefficients(start + (end - start) * values, tuple(tasks), groups, members, granularity, metadata)


def vision_transformer(layers):
    """The parameters of open_clip's image tower, in its order: ``proj`` comes before the blocks."""
    block = ("ln_1", "attn.in_proj", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = ["class_embedding", "positional_embedding", "proj", "conv1.weight", "ln_pre.weight", "ln_pre.bias"]
    for layer in range(layers):
        for part in block:
            separator = "_" if part == "attn.in_proj" else "."
            names += [f"transformer.resblocks.{layer}.{part}{separator}{kind}" for kind in ("weight", "bias")]
    return [*names, "ln_post.weight", "ln_post.bias"]
