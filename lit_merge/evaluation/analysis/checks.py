"""What is refused before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.evaluation.analysis.processes import Processes
from lit_merge.evaluation.analysis.settings import ON_IMAGES, Grid, Paths, check_analyses
from lit_merge.models.network import Base, Network
from lit_merge.vectors import TaskVector, TaskVectors, check_base

__all__ = ["check_images", "check_tasks", "claim_folder", "stacked_vectors", "wanted_analyses"]


def wanted_analyses(analyses: Sequence[str] | None, origin: Base, coefficients: str | None) -> list[str]:
    """The analyses, in the order that they are asked for.

    Raises:
        ConfigurationError: one is unknown, or lacks what it needs.
    """
    if analyses is None:
        more = [*(["coefficients"] if coefficients else []), *(["accuracy"] if isinstance(origin, Network) else [])]
        return ["cosine", "norms", "signs", *more]
    check_analyses(list(analyses))
    if "coefficients" in analyses and coefficients is None:
        raise ConfigurationError("coefficients: expected a file of merging coefficients, got none. Give it.")
    if coefficients is not None and "coefficients" not in analyses:
        raise ConfigurationError(
            f"coefficients: expected only with that analysis, got {coefficients}. Add coefficients to analyses."
        )
    asked = [name for name in analyses if name in ON_IMAGES]
    if asked and not isinstance(origin, Network):
        raise ConfigurationError(
            f"analyses: expected only those of vectors with base, got {first_few(asked)}, which need a network and "
            "images. Remove them, or set model or network."
        )
    of_vectors = [name for name in asked if name in ("disentanglement", "advantage")]
    if of_vectors and not getattr(origin, "vector_features", True):
        raise ConfigurationError(
            f"analyses: expected a network whose features are one vector for {first_few(of_vectors)}, got "
            f"{origin.name}, which predicts tokens. Remove it, or set a network that encodes."
        )
    return list(analyses)


def stacked_vectors(vectors: Sequence[TaskVector], origin: Base) -> TaskVectors:
    """The vectors side by side, with θ0.

    Raises:
        ConfigurationError: they have no names of their own.
        StructureMismatchError: they belong to another base, or to several.
    """
    names = [vector.task for vector in vectors]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not all(names):
        got = f"{first_few(repeated)} again" if repeated else "one without"
        raise ConfigurationError(f"tasks: expected a name for every vector, each once, got {got}. Set tasks.")
    for vector in vectors:
        check_base(vector, origin.fingerprint if vector.base_fingerprint else "", origin.name, origin.activation)
    return TaskVectors(vectors, base=origin.parameters)


def check_tasks(vectors: TaskVectors, wanted: Sequence[str], grid: Grid, paths: Paths) -> None:
    """Refuse settings about tasks without a vector.

    Raises:
        ConfigurationError: there are some.
    """
    named = [task for pair in grid.pairs or [] for task in pair] if "disentanglement" in wanted else []
    if "disentanglement" in wanted and not named and len(vectors.tasks) < 2:
        raise ConfigurationError(
            "disentanglement: expected at least two task vectors, got one. Add one, or leave this analysis out."
        )
    named += (paths.tasks or []) if "paths" in wanted else []
    unknown = [task for task in named if task not in vectors.tasks]
    if unknown:
        raise ConfigurationError(
            f"grid.pairs and paths.tasks: expected tasks among {', '.join(vectors.tasks)}, got {first_few(unknown)}. "
            "Name tasks that have a vector."
        )


def check_images(vectors: TaskVectors, images: Sequence[str], wanted: Sequence[str], grid: Grid, paths: Paths) -> None:
    """Refuse settings about tasks without images.

    Raises:
        ConfigurationError: there are some.
    """
    needed: list[str] = []
    if "disentanglement" in wanted:
        needed += [task for pair in grid.pairs or [list(vectors.tasks[:2])] for task in pair]
    if "paths" in wanted:
        needed += paths.tasks or vectors.tasks
        if len(images) < 2:
            raise ConfigurationError(
                f"paths: expected images of at least two tasks, got those of {first_few(images)}. "
                "Give data of other tasks as well."
            )
    missing = [task for task in needed if task not in images]
    if missing:
        raise ConfigurationError(
            f"data: expected images of every vector's task, got none of {first_few(missing)} (data: "
            f"{', '.join(images)}). Name the tasks of data as the vectors', or set tasks."
        )


def claim_folder(folder: Path, shared: Processes) -> None:
    """Make the folder an analysis's, and remove an earlier outcome.

    Raises:
        ConfigurationError: it holds something else, or cannot be created.
    """
    if shared.is_first:
        if folder.exists() and not (folder / "parts").is_dir() and (folder.is_file() or any(folder.iterdir())):
            raise ConfigurationError(
                f"output: expected a new folder or one that an analysis wrote, got {folder}, which holds something "
                "else. Choose another output."
            )
        try:
            (folder / "parts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"output: expected a folder that can be created, got {folder} ({error.strerror}). Choose another."
            ) from error
        for path in (folder / "analysis.json", *folder.glob("figures/*.png"), *folder.glob("figures/*.svg")):
            path.unlink(missing_ok=True)
    shared.from_first(None)
