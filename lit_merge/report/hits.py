"""Which test examples a model got right, one bit each: what any later comparison of two models is computed from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_merge.errors import FileFormatError
from lit_merge.files.store import LazyTensors, write_tensors

__all__ = ["FORMAT", "load_hits", "save_hits"]

FORMAT = "lit-merge/hits/1"


def save_hits(path: str | os.PathLike[str], hits: Mapping[str, Tensor]) -> None:
    """Write one file for all tasks, atomically.

    Args:
        path: ends in ``.safetensors``, in an existing folder.
        hits: task -> bool ``[N]``, right or wrong, in the order of the split's examples.

    Raises:
        WriteError: the disk is full or not writable.
    """
    packed = {task: torch.from_numpy(np.packbits(one.numpy().astype(np.uint8))) for task, one in hits.items()}
    counts = {task: len(one) for task, one in hits.items()}
    write_tensors(Path(path), packed, {"format": FORMAT, "examples": json.dumps(counts)})


def load_hits(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what :func:`save_hits` wrote, checked against its digest.

    Returns:
        Task -> bool ``[N]``.

    Raises:
        FileFormatError: it is missing, damaged, or something else.
    """
    stored = LazyTensors(Path(path), verify=True)
    try:
        if stored.metadata["format"] != FORMAT:
            raise KeyError(FORMAT)
        counts = json.loads(stored.metadata["examples"])
        found = {task: np.unpackbits(stored[task].numpy(), count=int(counts[task])) for task in stored}
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: expected format {FORMAT}, got something else. Test the model again.") from error
    return {task: torch.from_numpy(bits).bool() for task, bits in found.items()}
