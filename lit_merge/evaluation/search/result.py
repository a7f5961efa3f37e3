"""What a search found: every point that was evaluated, and the one that was chosen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import Transform

__all__ = ["SearchPoint", "SearchResult"]


@dataclass(frozen=True)
class SearchPoint:
    """One evaluated point.

    Attributes:
        fields: address of a field -> its value.
        accuracy: task -> accuracy on the validation split, of the target and the control tasks; of those that are
            measured otherwise 1 / perplexity, or the mean reward.
        absolute: mean accuracy of the target tasks.
        normalised: mean normalised accuracy of the target tasks; None where the single models were not evaluated.
        control: mean accuracy of the control tasks, or the share that is kept (:func:`~lit_merge.metrics.kept_share`)
            where they are measured otherwise; None if there are none.
        score: what the criterion makes of it; the highest one is chosen.
    """

    fields: dict[str, float]
    accuracy: dict[str, float]
    absolute: float
    normalised: float | None
    control: float | None
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The points of a search, in the order in which they were evaluated.

    Attributes:
        points: at least one.
        chosen: position of the chosen one.
        pareto: positions of the points that no other one dominates, in the accuracies of the target and the control
            tasks; under the criterion ``negation`` low accuracies of the target tasks count as good.
        transform: the transform with the chosen values.
        criterion: by which it was chosen.
        split: the data it was chosen on.
        target: the target tasks.
        control: the control tasks.
        individual: task -> accuracy of its single fine-tuned model; None where that was not needed.
        zero_shot: task -> accuracy of the pre-trained model; None where that was not needed.
        measures: task -> what stands for its accuracy, in words.
        perplexity: the tasks that are measured by it.
        hypervolume: of the front above the pre-trained model, in the same coordinates; None where all is accuracy.
    """

    points: list[SearchPoint]
    chosen: int
    pareto: list[int]
    transform: Transform
    criterion: str
    split: str
    target: list[str]
    control: list[str]
    individual: dict[str, float] | None = None
    zero_shot: dict[str, float] | None = None
    measures: dict[str, str] = dataclass_field(default_factory=dict)
    perplexity: list[str] = dataclass_field(default_factory=list)
    hypervolume: float | None = None

    @property
    def fields(self) -> dict[str, float]:
        """The chosen values, by the fields' addresses."""
        return self.points[self.chosen].fields

    @property
    def field(self) -> str:
        """The only field that was varied.

        Raises:
            ConfigurationError: there are several.
        """
        if len(self.fields) != 1:
            raise ConfigurationError(
                f"search: expected one field, got {len(self.fields)} ({', '.join(self.fields)}). Use fields and points."
            )
        return next(iter(self.fields))

    @property
    def best(self) -> float:
        """The chosen value of the only field; raises as :attr:`field`."""
        return self.fields[self.field]

    @property
    def values(self) -> list[float]:
        """The values of the only field, point by point; raises as :attr:`field`."""
        return [point.fields[self.field] for point in self.points]

    @property
    def absolute(self) -> list[float]:
        """Mean accuracy of the target tasks, point by point."""
        return [point.absolute for point in self.points]

    @property
    def normalised(self) -> list[float]:
        """Mean normalised accuracy of the target tasks, point by point; empty where it is not known."""
        return [point.normalised for point in self.points if point.normalised is not None]

    @property
    def accuracy(self) -> list[dict[str, float]]:
        """Task -> accuracy, point by point."""
        return [point.accuracy for point in self.points]

    @property
    def ends(self) -> dict[str, str]:
        """Fields whose chosen value is the ``smallest`` or ``largest`` that was tried: better ones may lie beyond."""
        found = {}
        for name, value in self.fields.items():
            tried = {point.fields[name] for point in self.points}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                found[name] = "smallest" if value == min(tried) else "largest"
        return found

    def describe(self) -> str:
        """The chosen values in a few words, e.g. ``coefficient 1 chosen on validation data, the largest tried``."""
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.fields.items())
        alone = len(self.fields) == 1
        ends = "".join(f", the {end} tried{'' if alone else f' of {name}'}" for name, end in self.ends.items())
        return f"{chosen} chosen on validation data{ends}"

    def plain(self) -> dict[str, Any]:
        """The result as JSON has it, every point included; of one field also as columns."""
        one: dict[str, Any] = {}
        if len(self.fields) == 1:
            one = {"field": self.field, "best": self.best, "values": self.values}
            one |= {"absolute": self.absolute, "normalised": self.normalised or None}
        if self.measures:
            one |= {"measures": self.measures, "hypervolume": self.hypervolume}
            one |= {"perplexities": [self._perplexities(point.accuracy) for point in self.points]}
            one |= {"perplexities_of_base": self._perplexities(self.zero_shot or {})}
        return {
            "criterion": self.criterion,
            "split": self.split,
            "target": self.target,
            "control": self.control,
            "transform": repr(self.transform),
            "chosen": self.chosen,
            "fields": self.fields,
            "ends": self.ends,
            **one,
            "pareto": self.pareto,
            "individual": self.individual,
            "zero_shot": self.zero_shot,
            "points": [asdict(point) for point in self.points],
        }

    def _perplexities(self, found: dict[str, float]) -> dict[str, float]:
        return {task: 1 / found[task] if found[task] else float("inf") for task in self.perplexity}

    def save(self, path: Path) -> None:
        """Write :meth:`plain` as JSON, whole or not at all."""
        from lit_merge.files.text import write_text

        write_text(path, json.dumps(self.plain(), indent=2) + "\n")
