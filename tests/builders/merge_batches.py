"""Random images of three small tasks, and a trainer without noise: what fits of a merge are tested on."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import torch
from torch import nn

from builders.learned_merge import BlockEncoder
from lit_merge import TaskVector
from lit_merge.data.batch import ImageBatch

TASKS = ["a", "b", "c"]
CLASSES = {"a": 3, "b": 4, "c": 5}
SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


class Batches(L.LightningDataModule):
    """Random images of every task, always the same; a batch of one task may be missing."""

    task_share = 1.0

    def __init__(self, tasks=TASKS, size=4, steps=20, dtype=torch.float32, labelled=True):
        super().__init__()
        self.tasks = {task: SimpleNamespace(classes=list("qwert")[: CLASSES[task]], templates=["{}"]) for task in tasks}
        self.steps, self.size, self.dtype, self.labelled = steps, size, dtype, labelled

    @property
    def task_names(self):
        return tuple(self.tasks)

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        count = self.size
        return {
            task: ImageBatch(
                torch.randn(count, 3, 4, 4, generator=generator).to(self.dtype),
                torch.randint(CLASSES[task], (count,), generator=generator),
                torch.arange(count),
            )
            for task in self.tasks
        }

    def train_dataloader(self):
        return torch.utils.data.DataLoader([self.batch(step) for step in range(self.steps)], collate_fn=lambda x: x[0])

    def val_dataloader(self):
        return [torch.utils.data.DataLoader([self.batch(99)[task]], collate_fn=lambda x: x[0]) for task in self.tasks]


def vector_files(folder):
    """A file of a random task vector of the encoder for every task, always the same ones."""
    torch.manual_seed(3)
    shapes = {name: own.shape for name, own in BlockEncoder().named_parameters()}
    for task in TASKS:
        vector = {name: 0.8 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        TaskVector(vector, task).save(folder / f"{task}.safetensors")
    return [str(folder / f"{task}.safetensors") for task in TASKS]


def encoder_and_heads():
    """The encoder, for evaluation, and a linear head of every task; always the same ones."""
    torch.manual_seed(0)
    encoder = BlockEncoder().double().eval()
    return encoder, {task: nn.Linear(6, CLASSES[task]).double() for task in TASKS}
