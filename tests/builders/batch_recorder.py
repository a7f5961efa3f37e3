"""A module that keeps the batches of every stage, and its trainer."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn

from lit_merge.models import Preprocessing

SMALL = Preprocessing(8)


class Recorder(L.LightningModule):
    """Sees batches, learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.preprocessing = SMALL
        self.trained, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch))
        return self.weight * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, batch))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, batch))

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def quiet_trainer(**settings):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **settings,
        }
    )
