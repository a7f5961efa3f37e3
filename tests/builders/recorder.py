"""A module that keeps the batches that it is given, and its trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn

from lit_merge.data.batch import ImageBatch
from lit_merge.models import Preprocessing

SMALL = Preprocessing(8)


@dataclass(frozen=True)
class Penalty:
    schedule: str = "cyclic"
    batch_size: int | None = 2
    tasks: Sequence[str] | None = None
    images: int | None = None
    split: str = "train"


class Recorder(L.LightningModule):
    """Sees batches, learns nothing."""

    def __init__(self, penalty=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.preprocessing, self.penalty, self.trained = SMALL, penalty, []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch_idx, self.global_step, batch))
        return self.weight * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert isinstance(batch, ImageBatch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def quiet_trainer(**settings):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **settings,
        }
    )
