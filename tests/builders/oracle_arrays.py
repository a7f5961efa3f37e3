"""Task vectors as arrays, and what trimming them leaves, restated in NumPy."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import torch

from lit_merge.vectors import TaskVector, TaskVectors

Arrays = dict[str, np.ndarray]


def window(vector: Arrays, density: float, outliers: float = 0.0, scope: str = "global") -> Arrays:
    """Keep ⌊density · n⌋ entries, at least one, after the ⌊outliers · n⌋ largest; ties by name, then by place."""
    if scope == "tensor":
        return {name: window({name: values}, density, outliers)[name] for name, values in vector.items()}
    entries = [(name, place) for name in sorted(vector) for place in range(vector[name].size)]
    magnitude = {(name, place): abs(float(vector[name].flat[place])) for name, place in entries}
    ranked = sorted(entries, key=lambda entry: -magnitude[entry])  # sorted() is stable
    top = int(Decimal(str(outliers)) * len(entries))
    count = max(int(Decimal(str(density)) * len(entries)), 1)
    result = {name: np.zeros(values.shape) for name, values in vector.items()}
    for name, place in ranked[top : top + count]:
        result[name].flat[place] = vector[name].flat[place]
    return result


def arrays(vectors: TaskVectors) -> list[Arrays]:
    return [{name: vectors[name][row].double().numpy() for name in vectors} for row in range(len(vectors.tasks))]


def random_vectors(kind: str) -> TaskVectors:
    generator = torch.Generator().manual_seed(3)
    shapes = {"z": (3, 5), "a": (7,), "m": (), "b": (2, 1, 3), "empty": (0,)}
    rows = []
    for task in ("one", "two", "three"):
        tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        if kind == "float32":
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        elif kind == "mixed":
            tensors = {name: tensor.float() if name in "am" else tensor for name, tensor in tensors.items()}
        elif kind == "equal":
            tensors = {name: tensor.mul(1.5).round().float() for name, tensor in tensors.items()}
        elif kind == "denormal":
            tensors = {name: tensor.float() * 1e-42 for name, tensor in tensors.items()}
            assert 0 < tensors["z"].abs().max() < torch.finfo(torch.float32).tiny
        elif kind == "zero":
            tensors = {name: tensor.float() * (0.0 if task == "two" else -0.0) for name, tensor in tensors.items()}
        elif kind == "sparse":
            tensors = {name: tensor.float() * (tensor > 0.7) for name, tensor in tensors.items()}
        elif kind == "extreme":
            tensors = {name: tensor.sign() * 10 ** (150 * tensor.clamp(-2, 2)) for name, tensor in tensors.items()}
        rows.append(TaskVector(tensors, task))
    return TaskVectors(rows)
