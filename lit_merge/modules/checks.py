"""What a learned merge refuses before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.models.adarank import AdaRank
from lit_merge.modules.objectives import Comparison, Features, Objective
from lit_merge.transforms import Transform

__all__ = ["check_given", "check_individuals", "check_tasks", "checked_kinds"]


def check_individuals(objective: Objective, learned: Sequence[str], merged: Sequence[str]) -> None:
    """Refuse to compare with individual models where a task has none, or two.

    Args:
        objective: what is minimised.
        learned: the tasks that are learned on.
        merged: the vectors' tasks, all of each vector.
    """
    wrong = [task for task in learned if merged.count(task) != 1]
    if isinstance(objective, Comparison) and wrong:
        got = "several" if wrong[0] in merged else "none"
        raise ConfigurationError(
            f"objective {objective!r}: expected one vector of every task that is learned on, to compare with its "
            f"individual model, got {got} of {first_few(wrong)}. Leave it out of data.adapted, or use entropy."
        )


def check_tasks(before: Sequence[str], after: Sequence[str], transform: Transform | None) -> None:
    """Refuse vectors without names of their own, and transforms that do not leave one per task."""
    if "" in before or len(set(before)) < len(before):
        repeated = sorted({task for task in before if before.count(task) > 1})
        raise ConfigurationError(
            f"vectors: expected a name for every task, each once, got {first_few(repeated) or 'one without'}. "
            "Load the vectors and save them with a task of their own."
        )
    if tuple(before) != tuple(after):
        raise ConfigurationError(
            f"transform: expected one that leaves a vector for each of {len(before)} tasks, got {len(after)} of "
            f"{transform!r}. Leave out the part that sums them up; learning the coefficients takes its place."
        )


def check_given(vectors: Sequence[str], parts: Any, transform: Transform | None, images_per_pass: int | None) -> None:
    """Refuse too few vectors, and settings that exclude each other."""
    if isinstance(vectors, str) or len(vectors) < 2:
        raise ConfigurationError(
            f"vectors: expected a list of at least two task vector files, got {vectors!r}. List those of all "
            "tasks; for a single vector let lit-merge merge search its coefficient."
        )
    if parts is not None and transform is not None:
        raise ConfigurationError("parts and transform: expected at most one of them, got both. Remove one.")
    if images_per_pass is not None and images_per_pass < 1:
        raise ConfigurationError(
            f"images_per_pass: expected a positive number or null, got {images_per_pass}. Change it."
        )


def checked_kinds(learn: Sequence[str] | None, objective: Objective, masks: AdaRank | None) -> tuple[str, ...]:
    """What is learned, each once, in one order."""
    known = ("coefficients", "heads", "surgery")
    given = ("coefficients",) if learn is None else tuple(learn)
    if isinstance(learn, str) or not given or set(given) - set(known) or len(set(given)) < len(given):
        raise ConfigurationError(f"learn: expected some of {', '.join(known)}, each once, got {learn!r}. Change it.")
    if "coefficients" not in given and masks is not None:
        raise ConfigurationError(
            "masks: expected coefficients in learn, with which they are learned, got none. Add it."
        )
    if "heads" in given and isinstance(objective, Features):
        raise ConfigurationError(
            "learn: expected no heads with objective features, which does not depend on them, got both. Use objective "
            "expert, or leave out heads."
        )
    return tuple(kind for kind in known if kind in given)
