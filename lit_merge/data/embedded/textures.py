"""Procedural textures (the suite's DTD)."""

from __future__ import annotations

import math

import numpy as np

from lit_merge.data.embedded.canvas import SIZE, Brush, photograph, to_image

__all__ = ["TEXTURES", "draw_texture", "texture_field"]

TEXTURES = (
    "striped",
    "checkered",
    "dotted",
    "zigzagged",
    "grid",
    "marbled",
    "cracked",
    "spiralled",
    "woven",
    "bubbly",
    "scaly",
    "cobwebbed",
)


def _cell_distances(brush: Brush, x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """Distances to ``count`` random centres, ``[SIZE, SIZE, count]``, centres kept apart by best-candidate sampling."""
    centres = brush.random.uniform(-0.6 * SIZE, 0.6 * SIZE, (1, 2))
    for _ in range(count - 1):
        candidates = brush.random.uniform(-0.6 * SIZE, 0.6 * SIZE, (4, 2))
        gaps = np.linalg.norm(candidates[:, None] - centres[None], axis=-1).min(axis=1)
        centres = np.concatenate([centres, candidates[gaps.argmax()][None]])
    return np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1])


def texture_field(brush: Brush, texture: str, scale: float, angle: float) -> np.ndarray:
    """The pattern as a float array ``[SIZE, SIZE]`` in [0, 1]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) - SIZE / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    u = cosine * x + sine * y + brush.uniform(0, 40)
    v = -sine * x + cosine * y + brush.uniform(0, 40)
    period = 12 * scale
    if texture == "striped":
        return (u / period % 1 < 0.5).astype(np.float32)
    if texture == "checkered":
        return ((u // period + v // period) % 2).astype(np.float32)
    if texture == "dotted":
        return (((u / period % 1 - 0.5) ** 2 + (v / period % 1 - 0.5) ** 2) < 0.085).astype(np.float32)
    if texture == "zigzagged":
        return ((u + np.abs(v / period % 2 - 1) * period * 1.2) / period % 1 < 0.5).astype(np.float32)
    if texture == "grid":
        return np.maximum(u / period % 1 < 0.2, v / period % 1 < 0.2).astype(np.float32)
    if texture == "marbled":
        return 0.5 + 0.5 * np.sin((u + brush.noise(6, 14 * scale) + brush.noise(12, 6 * scale)) / period * 4)
    if texture == "spiralled":
        radius, turn = np.hypot(x, y) + 1, np.arctan2(y, x) * brush.choose((-1, 1))
        return (np.sin(radius / period * 3.4 + turn + brush.uniform(0, 6)) > 0).astype(np.float32)
    if texture == "woven":
        strand = 0.85 * period
        over = (u // strand + v // strand) % 2
        return np.where(over > 0, np.abs(u / strand % 1 - 0.5) * 2, 1 - np.abs(v / strand % 1 - 0.5) * 1.6)
    if texture == "cobwebbed":
        dx, dy = x - brush.uniform(-12, 12), y - brush.uniform(-12, 12)
        radius, turn = np.hypot(dx, dy) + 0.1, np.arctan2(dy, dx) + angle
        spokes = 8
        sector = turn / (2 * math.pi) * spokes % 1
        spoke = np.minimum(sector, 1 - sector) * radius * 2 * math.pi / spokes < 1.2
        ring = radius * (1 - 0.25 * np.sin(math.pi * sector)) / (0.75 * period) % 1 < 0.19
        return np.maximum(spoke, ring).astype(np.float32)
    distances = _cell_distances(brush, x, y, max(8, round(26 / scale**1.5)))
    if texture == "bubbly":
        radii = brush.random.uniform(4, 9, distances.shape[-1]) * scale
        return np.clip(1 - np.abs(distances - radii).min(-1) / 1.7, 0, 1)
    nearest = np.partition(distances, 1, axis=-1)
    if texture == "cracked":
        return (nearest[..., 1] - nearest[..., 0] < 2.3).astype(np.float32)
    return np.clip(nearest[..., 0] / (8 * scale), 0, 1)


def draw_texture(brush: Brush, label: int) -> np.ndarray:
    """A flat texture in two colours, uint8 ``[32, 32, 3]``."""
    texture = TEXTURES[label]
    if brush.clean:
        angle = 0.0 if brush.chance(0.6) else brush.uniform(-0.4, 0.4)
        field = texture_field(brush, texture, brush.uniform(0.9, 1.3), angle)
        ground = brush.any_colour()
        ink = brush.contrasting(ground, 105)
    else:
        field = texture_field(brush, texture, brush.uniform(0.8, 1.3), brush.uniform(0, math.pi))
        field = np.clip(field + brush.noise(8, 0.15), 0, 1)
        ground = brush.any_colour()
        ink = brush.contrasting(ground, 70)
    pixels = np.array(ground) * (1 - field[..., None]) + np.array(ink) * field[..., None]
    if brush.clean:
        return photograph(to_image(pixels), brush, blur=0.4)
    pixels = pixels + brush.noise(3, 32)[..., None]
    return photograph(to_image(pixels), brush, blur=0.9, grain=14, exposure=0.35)
