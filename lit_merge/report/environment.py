"""What decides the numbers beside the settings: versions and hardware."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lit_merge._version import __version__

__all__ = ["hardware", "versions"]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("torch", "lightning", "open_clip_torch", "pillow", "numpy")
    return {
        "lit_merge": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, accelerator."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"processor": processor, "cores": os.cpu_count(), "accelerator": accelerator}
