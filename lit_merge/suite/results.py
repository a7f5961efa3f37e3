"""The results of a suite, put together from what its stages have written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.data.embedded.tasks import DRAWN_TASKS
from lit_merge.data.published.task import is_published
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, first_few
from lit_merge.files.cache import Cache
from lit_merge.files.store import LazyTensors
from lit_merge.metrics import CosineMatrix
from lit_merge.metrics.of_heads import MORE
from lit_merge.naming import number_of_blocks
from lit_merge.report.environment import hardware, versions
from lit_merge.report.results import JOINT
from lit_merge.suite.ledger import FileLedger
from lit_merge.suite.recipe import Recipe
from lit_merge.transforms import Chain
from lit_merge.transforms.learned import transform_before
from lit_merge.vectors import Coefficients, TaskVector, TaskVectors

__all__ = ["check_expected", "deviations", "suite_results"]

_POINTS = 1.0


def suite_results(
    known: Mapping[str, Any],
    directory: Path,
    seeds: Sequence[int],
    recipes: Mapping[str, Recipe],
    joint: bool,
    ledger: FileLedger,
) -> dict[str, Any]:
    """The content of results.json. It depends on the stages' outputs alone, not on who ran them, where and when.

    Args:
        known: what is known without them: name, model, tasks, classes, settings, perhaps control tasks.
        directory: the suite's.
        seeds: of fine-tuning.
        recipes: name -> how it merges.
        joint: whether there is a model that was fine-tuned on all tasks jointly.
        ledger: knows the outputs' hashes.

    Raises:
        LitMergeError: a test has left no accuracy.
    """
    tasks: list[str] = known["tasks"]
    controls: list[str] = known.get("control", [])
    every = [*tasks, *controls]

    def of_seed(seed: int) -> dict[str, Any]:
        stages = directory / f"seed-{seed}"
        vectors = [stages / "fit" / task / "task_vector.safetensors" for task in tasks]
        references = {JOINT: _accuracies(stages / "joint" / "test", tasks)} if joint else {}
        return {
            "individual": {task: _accuracy(stages / "individual" / task, "test/accuracy") for task in tasks},
            **_more({task: (stages / "individual" / task, "test/") for task in tasks}, "individual_"),
            **({"references": references} if references else {}),
            **_measures(vectors, ledger),
            "merged": {
                name: {
                    **(_learned if recipe.learned else _merged)(directory, stages / "merge" / name, recipe),
                    "accuracy": _accuracies(stages / "test" / name, tasks),
                    **({"control_accuracy": _accuracies(stages / "test" / name, controls)} if controls else {}),
                    **_more(_together(stages / "test" / name, every)),
                }
                for name, recipe in recipes.items()
            },
        }

    return {
        "schema": 1,
        **{key: known[key] for key in ("name", "model", "tasks", "classes", "control") if key in known},
        "evaluated_on": "test",
        "coefficients_chosen_on": "val" if any(recipe.search for recipe in recipes.values()) else None,
        "settings": known["settings"],
        "versions": versions(),
        "hardware": hardware(),
        "zero_shot": _accuracies(directory / "zero-shot", tasks),
        **({"zero_shot_control_accuracy": _accuracies(directory / "zero-shot", controls)} if controls else {}),
        **_more(_together(directory / "zero-shot", every), "zero_shot_"),
        "seeds": {str(seed): of_seed(seed) for seed in seeds},
    }


def deviations(results: Mapping[str, Any], expected: Mapping[str, float]) -> list[str]:
    """Individually fine-tuned models that are more than a point from where they are expected.

    Merged accuracies are compared across publications only between models that were as good before.

    Args:
        results: the content of results.json.
        expected: task -> accuracy in percent.

    Returns:
        One line per task and seed, in the order of the seeds.
    """
    lines = []
    for seed, found in results["seeds"].items():
        for task in [task for task in expected if task in found["individual"]]:
            percent = expected[task]
            reached = 100 * found["individual"][task]
            if abs(reached - percent) > _POINTS:
                lines.append(
                    f"{task}, seed {seed}: expected the fine-tuned model within a point of {percent:.1f} %, got "
                    f"{reached:.1f} % ({reached - percent:+.1f}). Compare its data and fine-tuning with the "
                    "publication's before merged accuracies are compared."
                )
    return lines


def check_expected(expected: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Refuse accuracies of unknown tasks, and those that are no percentages.

    Tasks that have a name of their own, such as ``mnist``, may be left out of the suite.

    Raises:
        ConfigurationError: there are some.
    """
    known = [*tasks, *DRAWN_TASKS]
    if unknown := [task for task in expected if task not in known and not is_published(task)]:
        raise ConfigurationError(
            f"expected: expected accuracies of the tasks {first_few(tasks, 30)}, got one of {unknown[0]!r}. Remove it."
        )
    if wrong := [task for task, percent in expected.items() if not 1 < percent <= 100]:
        raise ConfigurationError(
            f"expected: expected accuracies in percent, above 1 and at most 100, got {expected[wrong[0]]} of "
            f"{wrong[0]}. Correct it."
        )


def _accuracy(stage: Path, key: str) -> float:
    path = stage / "test_metrics.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    if key not in found:
        raise LitMergeError(
            f"{path}: expected {key}, got {first_few(found) or 'nothing'}. Let the module's test_step log it."
        )
    return round(found[key], 6)


def _accuracies(stage: Path, tasks: Sequence[str]) -> dict[str, float]:
    return {task: _accuracy(stage, f"test/{task}/accuracy") for task in tasks}


def _more(places: Mapping[str, tuple[Path, str]], prefix: str = "") -> dict[str, dict[str, float]]:
    """Metric -> task -> value, of what is measured beside the accuracy: of next tokens, of numbers.

    Args:
        places: task -> the stage that has tested it, and what its metrics' names begin with.
        prefix: of the metrics' names in the result.
    """
    found: dict[str, dict[str, float]] = {}
    for task, (stage, begin) in places.items():
        logged = json.loads((stage / "test_metrics.json").read_text(encoding="utf-8"))
        for metric in [one for one in MORE if begin + one in logged]:
            found.setdefault(prefix + metric, {})[task] = round(logged[begin + metric], 6)
    return found


def _together(stage: Path, tasks: Sequence[str]) -> dict[str, tuple[Path, str]]:
    """Where a stage that tests all tasks has the metrics of each."""
    return {task: (stage, f"test/{task}/") for task in tasks}


def _measures(paths: Sequence[Path], ledger: FileLedger) -> dict[str, Any]:
    """Sizes and cosines of task vectors; those of known files are found in the cache."""
    cache = Cache("task-vectors")
    key = cache.key([__version__, [ledger.digest(path) for path in paths]])
    if (known := cache.value(key)) is not None:
        return dict(known)
    vectors = [TaskVector.load(path) for path in paths]
    stack = TaskVectors(vectors)
    cosines = CosineMatrix(stack.tasks, number_of_blocks(stack.model_names))
    cosines.update(stack)
    found = {
        "task_vectors": {vector.task: _size(vector) for vector in vectors},
        "cosine_similarity": [[round(value, 6) for value in row] for row in cosines.compute()[0].tolist()],
    }
    cache.write_value(key, found)
    return found


def _merged(directory: Path, stage: Path, recipe: Recipe) -> dict[str, Any]:
    header = LazyTensors(stage / "merged.safetensors").metadata
    path = stage / "merged-search.json"
    found = json.loads(path.read_text(encoding="utf-8")) if recipe.search else None
    fixed = recipe.settings.get("coefficient")
    return {
        "transform": _without(directory, header["transform"], json.loads(header["transform_config"])),
        "coefficient": found.get("best") if found else fixed if isinstance(fixed, int | float) else None,
        "search": _curve(found) if found else None,
    }


def _learned(directory: Path, stage: Path, recipe: Recipe) -> dict[str, Any]:
    """As of a recipe, how it was learned, on which split and how many examples, and every task's mean coefficient."""
    path = stage / "coefficients.safetensors"
    coefficients = Coefficients.load(path)
    header = coefficients.metadata
    group = "" if coefficients.granularity == "task" else f" and {coefficients.granularity}"
    steps = [*_steps_before(path, header), f"learned λ per task{group}", "Sum()"]
    config = json.loads(header.get("transform_config", "null"))
    means = coefficients.values.mean(dim=1).tolist()
    return {
        "transform": _without(directory, f"chain({', '.join(steps)})", config),
        "coefficient": None,
        "search": None,
        "learned": {
            **{key: header[key] for key in ("objective", "learned_on") if key in header},
            **{key: json.loads(header[key]) for key in ("fraction", "examples", "step") if key in header},
        },
        "mean_coefficients": {task: round(mean, 6) for task, mean in zip(coefficients.tasks, means, strict=True)},
    }


def _steps_before(path: Path, header: Mapping[str, str]) -> list[str]:
    """What came before learned coefficients, as it prints: the steps of one chain, or one transform."""
    try:
        before = transform_before(str(path))
    except FileFormatError:  # of the user's own classes, which nothing on disk may name
        return [header["transform"]]
    return [] if before is None else [repr(step) for step in (before.steps if isinstance(before, Chain) else [before])]


def _without(directory: Path, text: str, config: Any) -> str:
    """How a transform prints, with the suite's own files named as they are in its directory, wherever that is."""
    if isinstance(config, str) and Path(config).is_relative_to(directory):
        return text.replace(repr(config), repr(str(Path(config).relative_to(directory))))
    for inner in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        text = _without(directory, text, inner)
    return text


def _curve(search: dict[str, Any]) -> dict[str, Any] | None:
    """A search's curve, of one field that was judged by normalised accuracy; what else it found is in its own file."""
    return {key: search[key] for key in ("values", "normalised", "absolute")} if search.get("normalised") else None


def _size(vector: TaskVector) -> dict[str, Any]:
    return {
        "norm": round(vector.norm(), 6),
        "relative_norm": float(vector.metadata["relative_norm"]),
        "steps": int(vector.metadata["step"]),
    }
