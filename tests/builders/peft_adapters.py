"""Adapters as peft writes them, and what its own merge makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


def adapt(model: nn.Module, folder: Path, safe: bool = True, **settings: Any) -> dict[str, Tensor]:
    """Adapt with random factors, save; the difference that peft's merge makes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(folder, safe_serialization=safe)
    merged = adapted.merge_and_unload().state_dict()
    return {name: merged[name] - tensor for name, tensor in before.items()}
