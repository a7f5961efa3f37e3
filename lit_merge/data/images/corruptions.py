"""The seven corruptions of AdaMerging's robustness table (Yang et al. 2024, table 4), as ImageNet-C defines them.

Definitions and severities are those of Hendrycks and Dietterich (2019): of ImageNet-C for images of 64 pixels and more,
and of CIFAR-10-C, by the same authors, for smaller ones. Two things are computed in another way: motion is a line of
Gaussian weights, drawn with interpolation, and drops of water find their rim by a gradient of 150 and octagonal
distances instead of OpenCV's detector of edges and its distance transform.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError

__all__ = ["CORRUPTIONS", "check_corruption", "corrupt"]

_SMALL = 64  # pixels of the shorter side; smaller images have CIFAR-10-C's severities
_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)

# Of each severity: for large images, for small ones.
_SEVERITIES: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]] = {
    "motion_blur": (
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "impulse_noise": (
        ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
        ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    ),
    "gaussian_noise": (
        ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
        ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    ),
    "pixelate": (
        ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
        ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    ),
    "spatter": (
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    "contrast": (
        ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    ),
    "jpeg": (
        ((25,), (18,), (15,), (10,), (7,)),
        ((80,), (65,), (58,), (50,), (40,)),
    ),
}

CORRUPTIONS = tuple(_SEVERITIES)
"""The names, in the order of the paper's table."""


def check_corruption(name: str, severity: int) -> None:
    """Refuse what :func:`corrupt` does not know.

    Raises:
        ConfigurationError: an unknown name, or a severity that is not one of 1 … 5.
    """
    if name not in _SEVERITIES:
        raise ConfigurationError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {name!r}. Choose one.")
    if severity not in range(1, 6) or isinstance(severity, bool):
        raise ConfigurationError(f"severity: expected one of 1, 2, 3, 4, 5, got {severity!r}. Choose one.")


def corrupt(image: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """One image, corrupted; a pure function of its arguments.

    Args:
        image: uint8, ``[3, H, W]``.
        name: one of :data:`CORRUPTIONS`.
        severity: from 1, mild, to 5.
        seed: of noise, drops and the direction of motion; give every image its own.

    Returns:
        uint8, ``[3, H, W]``.

    Raises:
        ConfigurationError: see :func:`check_corruption`.
    """
    check_corruption(name, severity)
    settings = _SEVERITIES[name][min(image.shape[1:]) < _SMALL][severity - 1]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {severity} {seed}".encode()))
    found = _FUNCTIONS[name](image.float() / 255, generator, *settings)
    return (found.clamp(0, 1) * 255 + 1e-3).to(torch.uint8)  # cut off, as there, but not for a rounding error


def _gaussian_noise(values: Tensor, generator: torch.Generator, deviation: float) -> Tensor:
    return values + deviation * torch.randn(values.shape, generator=generator)


def _impulse_noise(values: Tensor, generator: torch.Generator, amount: float) -> Tensor:
    """Every channel of a pixel by itself: black or white, equally often."""
    draws = torch.rand(values.shape, generator=generator)
    values = torch.where(draws < amount / 2, 0.0, values)
    return torch.where(draws > 1 - amount / 2, 1.0, values)


def _contrast(values: Tensor, generator: torch.Generator, factor: float) -> Tensor:
    mean = values.mean((1, 2), keepdim=True)
    return mean + factor * (values - mean)


def _picture(values: Tensor) -> Image.Image:
    return Image.fromarray((values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _values(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _pixelate(values: Tensor, generator: torch.Generator, factor: float) -> Tensor:
    picture = _picture(values)
    small = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
    return _values(picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX))


def _jpeg(values: Tensor, generator: torch.Generator, quality: float) -> Tensor:
    stream = io.BytesIO()
    _picture(values).save(stream, "JPEG", quality=int(quality))
    return _values(Image.open(stream))


def _motion_blur(values: Tensor, generator: torch.Generator, radius: float, sigma: float) -> Tensor:
    """Weights of half a Gaussian along a line of ``radius`` pixels, its angle drawn from (-45°, 45°)."""
    angle = math.radians(90 * torch.rand((), generator=generator).item() - 45)
    reach = int(radius)
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1)
    for step in range(reach + 1):
        x, y = reach + step * math.cos(angle), reach + step * math.sin(angle)
        left, top = min(int(x), 2 * reach - 1), min(int(y), 2 * reach - 1)
        across, down = x - left, y - top
        weight = math.exp(-(step**2) / (2 * sigma**2))
        kernel[top, left] += weight * (1 - across) * (1 - down)
        kernel[top, left + 1] += weight * across * (1 - down)
        kernel[top + 1, left] += weight * (1 - across) * down
        kernel[top + 1, left + 1] += weight * across * down
    return _filtered(values, kernel / kernel.sum())


def _filtered(values: Tensor, kernel: Tensor) -> Tensor:
    """Every channel correlated with a kernel, edges repeated."""
    pads = (kernel.shape[1] // 2,) * 2 + (kernel.shape[0] // 2,) * 2
    padded = F.pad(values[:, None], pads, mode="replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _smoothed(values: Tensor, sigma: float) -> Tensor:
    """A Gaussian filter, ``[1, H, W]``, cut off after four standard deviations."""
    places = torch.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    line = torch.exp(-(places**2) / (2 * sigma**2))
    line = line / line.sum()
    return _filtered(_filtered(values, line[None, :]), line[:, None])


def _spatter(
    values: Tensor,
    generator: torch.Generator,
    mean: float,
    deviation: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: float,
) -> Tensor:
    """Drops of water, or of mud at high severities: a smoothed field of noise where it is above a threshold."""
    liquid = mean + deviation * torch.randn(1, *values.shape[1:], generator=generator)
    liquid = _smoothed(liquid, sigma)
    liquid = torch.where(liquid < threshold, 0.0, liquid)
    if mud:
        drops = _smoothed((liquid > threshold).float(), strength)
        drops = torch.where(drops < 0.8, 0.0, drops)
        return values * (1 - drops) + torch.tensor(_MUD).view(3, 1, 1) * drops
    light = _rim(liquid) * liquid
    light = strength * light / light.max().clamp_min(1e-6)
    return values + light * torch.tensor(_WATER).view(3, 1, 1)


def _rim(liquid: Tensor) -> Tensor:
    """How light falls on drops: distances from their edges up to 20 pixels, equalised and embossed."""
    pixels = (liquid * 255).clamp(0, 255)
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    edges = _filtered(pixels, across).abs() + _filtered(pixels, across.T).abs() > 150
    distance = torch.full_like(pixels, 20.0)
    reached = edges
    for step in range(20):  # squares and crosses in turn: the distance is octagonal
        distance = torch.where(reached & (distance == 20), float(step), distance)
        grown = reached.float()[None]
        rows, columns = F.max_pool2d(grown, (3, 1), 1, (1, 0)), F.max_pool2d(grown, (1, 3), 1, (0, 1))
        cross = torch.maximum(rows, columns)
        reached = (F.max_pool2d(grown, 3, 1, 1) if step % 2 else cross)[0] > 0
    box = torch.full((3, 3), 1 / 9)
    levels = _filtered(distance, box).round().long()
    counts = torch.bincount(levels.flatten(), minlength=21).cumsum(0).float()
    lowest = counts[levels.min()]
    equalised = 255 * (counts[levels] - lowest) / (counts[-1] - lowest).clamp_min(1)
    embossed = _filtered(equalised, torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])).clamp(0, 255)
    return _filtered(embossed, box)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "motion_blur": _motion_blur,
    "impulse_noise": _impulse_noise,
    "gaussian_noise": _gaussian_noise,
    "pixelate": _pixelate,
    "spatter": _spatter,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
