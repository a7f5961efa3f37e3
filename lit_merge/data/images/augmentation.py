"""Light augmentation whose amounts are a function of seed, epoch and image, whatever the batch or the process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["augment_lightly", "image_seeds", "uniforms"]

LARGEST_SHIFT = 2
"""In pixels, in each direction."""
LARGEST_CHANGE = 0.1
"""Of brightness and of contrast, as a fraction."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al. 2014): a bijection of uint64 whose bits look random."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def image_seeds(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """One seed per drawn image.

    Args:
        seed: of the run, non-negative.
        epochs: int64 ``[B]``, non-negative.
        indices: int64 ``[B]``, non-negative.

    Returns:
        uint64 ``[B]``.
    """
    state = _mixed(np.full(len(indices), seed, np.uint64))
    state = _mixed(state ^ epochs.astype(np.uint64))
    return _mixed(state ^ indices.astype(np.uint64))


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) per seed: uint64 ``[B]`` -> float64 ``[B, count]``."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mixed(seeds[:, None] ^ steps) >> np.uint64(11)) * 2.0**-53


def augment_lightly(images: Tensor, seeds: np.ndarray) -> Tensor:
    """Shift, brighten or darken, and change the contrast of each image a little; never flip.

    Flipped characters and signs would be others. What leaves the image at one edge is filled in by repeating the
    opposite edge's pixels; contrast is about the image's mean.

    Args:
        images: uint8, ``[B, C, H, W]``.
        seeds: uint64 ``[B]``, see :func:`image_seeds`.

    Returns:
        uint8, ``[B, C, H, W]``.
    """
    count, _, height, width = images.shape
    amounts = uniforms(seeds, 4)
    shifts = torch.from_numpy((amounts[:, :2] * (2 * LARGEST_SHIFT + 1)).astype(np.int64))  # in [0, 4]
    factors = torch.from_numpy((1 + LARGEST_CHANGE * (2 * amounts[:, 2:] - 1)).astype(np.float32))
    padded = F.pad(images, (LARGEST_SHIFT,) * 4, mode="replicate")
    rows = (shifts[:, :1] + torch.arange(height))[:, :, None]
    columns = (shifts[:, 1:] + torch.arange(width))[:, None, :]
    # The channels last, so that one index picks a pixel of all of them.
    pixels = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)
    # Summed as integers: the mean must not depend on how a batch is cut up.
    mean = pixels.sum(dim=(1, 2, 3), dtype=torch.int64).to(torch.float32).div_(pixels[0].numel())[:, None, None, None]
    brightness, contrast = factors[:, 0, None, None, None], factors[:, 1, None, None, None]
    return ((pixels - mean) * contrast + mean).mul_(brightness).round_().clamp_(0, 255).to(torch.uint8).contiguous()
