"""What can be said of task vectors by themselves: cosines, norms by depth, overlap and conflicts of signs."""

from __future__ import annotations

import math
from typing import Any

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.analysis.processes import Processes
from lit_merge.metrics import CosineMatrix, NormByDepth, SignConflict
from lit_merge.naming import number_of_blocks
from lit_merge.transforms import Trim
from lit_merge.vectors import Coefficients, TaskVectors

__all__ = ["cosine", "known_coefficients", "norms", "signs"]


def cosine(vectors: TaskVectors, processes: Processes) -> dict[str, Any]:
    """Cosine matrices, of the whole vectors and of every place with parameters."""
    if len(vectors.tasks) < 2:
        raise ConfigurationError(
            f"cosine: expected at least two task vectors, got {len(vectors.tasks)}. Add one, or leave cosine out."
        )
    metric = CosineMatrix(vectors.tasks, number_of_blocks(vectors.model_names))
    metric.update(vectors, processes.share(vectors.names))
    found = metric.compute()
    present = [index for index, matrix in enumerate(found.tolist()) if not math.isnan(matrix[0][0])]
    return {"places": [metric.places[index] for index in present], "cosine": found[present].tolist()}


def norms(vectors: TaskVectors, processes: Processes) -> dict[str, Any]:
    """‖τ‖, and ‖τ‖ / ‖θ0‖, of the whole vectors and of every place with parameters."""
    blocks = number_of_blocks(vectors.model_names)
    result: dict[str, Any] = {}
    for name, relative in (("norm", False), ("relative_norm", True)):
        metric = NormByDepth(vectors.tasks, blocks, relative)
        metric.update(vectors, processes.share(vectors.names))
        found = metric.compute().reshape(len(metric.places), -1)
        present = [index for index, row in enumerate(found.tolist()) if not all(map(math.isnan, row))]
        result |= {"places": [metric.places[index] for index in present], name: found[present].tolist()}
    return result


def signs(vectors: TaskVectors, density: float, processes: Processes) -> dict[str, Any]:
    """Overlap and sign conflict after trimming, of the whole vectors and of every place with parameters."""
    if len(vectors.tasks) < 2:
        raise ConfigurationError(
            f"signs: expected at least two task vectors, got {len(vectors.tasks)}. Add one, or leave signs out."
        )
    metric = SignConflict(vectors.tasks, number_of_blocks(vectors.model_names))
    metric.update(Trim(density)(vectors), processes.share(vectors.names))
    found = metric.compute()
    present = [index for index, value in enumerate(found["overlap"].tolist()) if not math.isnan(value)]
    return {
        "density": density,
        "places": [metric.places[index] for index in present],
        **{name: value[present].tolist() for name, value in found.items()},
    }


def known_coefficients(coefficients: Coefficients) -> dict[str, Any]:
    """The coefficients as JSON has them."""
    return {
        "granularity": coefficients.granularity,
        "tasks": list(coefficients.tasks),
        "groups": list(coefficients.groups),
        "values": coefficients.values.tolist(),
    }
