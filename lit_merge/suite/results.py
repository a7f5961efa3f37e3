"""The results of a suite, put together from what its stages have written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_merge.report.environment import hardware, versions
from lit_merge.report.results import JOINT
from lit_merge.suite.recipe import Recipe
from lit_merge.vectors import Coefficients, TaskVector

__all__ = ["suite_results"]


def suite_results(
    known: Mapping[str, Any], directory: Path, seeds: Sequence[int], recipes: Mapping[str, Recipe], joint: bool
) -> dict[str, Any]:
    """The content of results.json. It depends on the stages' outputs alone, not on who ran them, where and when.

    Args:
        known: what is known without them: name, model, tasks, classes, settings.
        directory: the suite's.
        seeds: of fine-tuning.
        recipes: name -> how it merges.
        joint: whether there is a model that was fine-tuned on all tasks jointly.
    """
    tasks: list[str] = known["tasks"]

    def of_seed(seed: int) -> dict[str, Any]:
        place = directory / f"seed-{seed}"
        vectors = [TaskVector.load(place / "fit" / task / "task_vector.safetensors") for task in tasks]
        references = {JOINT: _accuracies(place / "joint" / "test", tasks)} if joint else {}
        return {
            "individual": {task: _metrics(place / "individual" / task)["test/accuracy"] for task in tasks},
            **({"references": references} if references else {}),
            "task_vectors": {vector.task: _size(vector) for vector in vectors},
            "cosine_similarity": [[round(one.cosine_similarity(other), 6) for other in vectors] for one in vectors],
            "merged": {
                name: {
                    **(_learned(place / "merge" / name) if recipe.learned else _merged(place / "merge" / name, recipe)),
                    "accuracy": _accuracies(place / "test" / name, tasks),
                }
                for name, recipe in recipes.items()
            },
        }

    return {
        "schema": 1,
        **{key: known[key] for key in ("name", "model", "tasks", "classes")},
        "evaluated_on": "test",
        "coefficients_chosen_on": "val",
        "settings": known["settings"],
        "versions": versions(),
        "hardware": hardware(),
        "zero_shot": _accuracies(directory / "zero-shot", tasks),
        "seeds": {str(seed): of_seed(seed) for seed in seeds},
    }


def _metrics(stage: Path) -> dict[str, float]:
    found = json.loads((stage / "test_metrics.json").read_text(encoding="utf-8"))
    return {key: round(value, 6) for key, value in found.items()}


def _accuracies(stage: Path, tasks: Sequence[str]) -> dict[str, float]:
    metrics = _metrics(stage)
    return {task: metrics[f"test/{task}/accuracy"] for task in tasks}


def _merged(stage: Path, recipe: Recipe) -> dict[str, Any]:
    transform = TaskVector.load(stage / "merged.safetensors").metadata["transform"]
    path = stage / "merged-search.json"
    found = json.loads(path.read_text(encoding="utf-8")) if recipe.search else None
    return {
        "transform": transform.replace(f"{stage.parents[2]}/", ""),  # files of the suite: the same wherever it is
        "coefficient": found.get("best") if found else recipe.settings.get("coefficient"),
        "search": _curve(found) if found else None,
    }


def _learned(stage: Path) -> dict[str, Any]:
    """As of a recipe, and every task's mean coefficient."""
    coefficients = Coefficients.load(stage / "coefficients.safetensors")
    before = coefficients.metadata.get("transform", "")
    if before.startswith("chain("):  # the steps of one chain
        before = before[len("chain(") : -1]
    group = "" if coefficients.granularity == "task" else f" and {coefficients.granularity}"
    steps = [*([before] if before else []), f"learned λ per task{group}", "Sum()"]
    means = coefficients.values.mean(dim=1).tolist()
    return {
        "transform": f"chain({', '.join(steps)})",
        "coefficient": None,
        "search": None,
        "mean_coefficients": {task: round(mean, 6) for task, mean in zip(coefficients.tasks, means, strict=True)},
    }


def _curve(search: dict[str, Any]) -> dict[str, Any] | None:
    """A search's curve, of one field that was judged by normalised accuracy; what else it found is in its own file."""
    return {key: search[key] for key in ("values", "normalised", "absolute")} if search.get("normalised") else None


def _size(vector: TaskVector) -> dict[str, Any]:
    return {
        "norm": round(vector.norm(), 6),
        "relative_norm": float(vector.metadata["relative_norm"]),
        "steps": int(vector.metadata["step"]),
    }
