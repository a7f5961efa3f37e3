"""The results of a suite: read from JSON, checked, and averaged over tasks and seeds."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.errors import FileFormatError, first_few
from lit_merge.report.reader import Reader

__all__ = [
    "INDIVIDUAL",
    "JOINT",
    "SCHEMA",
    "ZERO_SHOT",
    "CoefficientSearch",
    "MergedResult",
    "Results",
    "SeedResults",
    "VectorSize",
    "display_name",
    "summary",
]

SCHEMA = 1
"""The version of the results format that this module reads."""

ZERO_SHOT = "zero-shot"
"""The method that is no merge: the pre-trained model, the same for all seeds."""

INDIVIDUAL = "individual"
"""The method that is no merge: one fine-tuned model per task, the reference of normalised accuracy."""

JOINT = "joint"
"""The method that is no merge: one model, fine-tuned on all tasks jointly; a suite may have this reference."""

_NAMES = {  # as the papers write them
    **{"iso_c": "Iso-C", "iso_cts": "Iso-CTS", "tsv_m": "TSV-M", "dc_merge": "DC-Merge", "ace": "ACE-Merging"},
    **{"optmerge": "OptMerge", "orthomerge": "OrthoMerge", "actmerge": "ActMerge"},
    **{name: name.upper() for name in ("wudi", "iwudi", "swudi", "aswudi", "cart", "esm", "svc")},
}
_WORDS = {"adamerging": "AdaMerging", "dare": "DARE", "lines": "LiNeS", "tall": "TALL", "ties": "TIES"}


@dataclass(frozen=True)
class VectorSize:
    """How far fine-tuning on one task moved the weights.

    Attributes:
        norm: ‖τ‖, the Euclidean norm of the task vector.
        relative_norm: ‖τ‖ / ‖θ0‖, a fraction.
        steps: optimiser steps.
    """

    norm: float
    relative_norm: float
    steps: int


@dataclass(frozen=True)
class CoefficientSearch:
    """The candidates of a coefficient search and what each scored; three tuples of equal length.

    Attributes:
        values: the coefficients tried.
        normalised: mean normalised accuracy of each.
        absolute: mean accuracy of each.
    """

    values: tuple[float, ...]
    normalised: tuple[float, ...]
    absolute: tuple[float, ...]


@dataclass(frozen=True)
class MergedResult:
    """One merged model.

    Attributes:
        transform: the chain of transforms as it prints.
        coefficient: the merging coefficient, None for a method without one.
        accuracy: task -> accuracy.
        search: how the coefficient was chosen, None if it was not searched for.
    """

    transform: str
    coefficient: float | None
    accuracy: dict[str, float]
    search: CoefficientSearch | None


@dataclass(frozen=True)
class SeedResults:
    """What one seed gave.

    Attributes:
        individual: task -> accuracy of the model fine-tuned on that task.
        task_vectors: task -> size of its task vector.
        cosine_similarity: between the task vectors, one row and one column per task.
        merged: method -> merged model.
        references: other method that is no merge, e.g. ``"joint"`` -> task -> accuracy.
    """

    individual: dict[str, float]
    task_vectors: dict[str, VectorSize]
    cosine_similarity: tuple[tuple[float, ...], ...]
    merged: dict[str, MergedResult]
    references: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The results of a suite; all accuracies are fractions.

    Methods are ``"zero-shot"``, the merged models under the names of their recipes, further references such as
    ``"joint"`` if the suite has them, and ``"individual"``. What is said about a method comes as one value per seed, in
    the order of :attr:`seeds`; :func:`summary` makes mean and spread of it.

    Attributes:
        name: the suite.
        model_name: the pre-trained model.
        model_fingerprint: of its weights.
        model_parameters: how many it has.
        tasks: names, in the order of the suite.
        classes: task -> number of classes.
        evaluated_on: the split that the accuracies were measured on.
        coefficients_chosen_on: the split that the coefficients were chosen on, None if none was chosen.
        versions: package -> version.
        hardware: where the suite ran.
        zero_shot: task -> accuracy of the pre-trained model.
        seeds: seed -> its results.
    """

    name: str
    model_name: str
    model_fingerprint: str
    model_parameters: int
    tasks: tuple[str, ...]
    classes: dict[str, int]
    evaluated_on: str
    coefficients_chosen_on: str | None
    versions: dict[str, Any]
    hardware: dict[str, Any]
    zero_shot: dict[str, float]
    seeds: dict[str, SeedResults]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a results file.

        Args:
            path: a JSON file that a suite wrote.

        Raises:
            FileFormatError: the file is missing, is not JSON, or lacks something.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise FileFormatError(
                f"{path}: expected a results file, got {error.strerror or error}. Check the path."
            ) from error
        except (ValueError, RecursionError) as error:
            problem = " ".join(str(error).split())
            raise FileFormatError(
                f"{path}: expected JSON, got something else ({problem}). Run the suite again."
            ) from error
        return cls.from_dict(data, source=str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "results") -> Results:
        """Check a results document; keys that this version does not know are ignored.

        Args:
            data: the document as ``json.load`` returns it.
            source: what messages call it, e.g. its path.

        Raises:
            FileFormatError: the schema is another one, a key is missing, or a value is not what it must be.
        """
        document = Reader(data, source)
        if isinstance(data, dict) and "schema" not in data:
            got = f"an object with {first_few(map(repr, data)) or 'nothing'}"
            raise document.refusal("the results that a suite writes", got, "Check the path.")
        schema = document["schema"]
        if schema.value != SCHEMA or isinstance(schema.value, bool):
            raise schema.refusal(f"schema {SCHEMA}", repr(schema.value), "Read it with the version that wrote it.")
        names = document["tasks"].items()
        tasks = tuple(task.text() for task in names)
        if not tasks or len(set(tasks)) < len(tasks):
            raise document["tasks"].refusal("one or more different tasks", repr(list(tasks)))
        seeds = {seed: _seed(entry, tasks) for seed, entry in document["seeds"].entries().items()}
        if not seeds:
            raise document["seeds"].refusal("one or more seeds", "none")
        first = next(iter(seeds))
        for seed, results in seeds.items():
            for key, found, wanted in (
                ("merged", list(results.merged), list(seeds[first].merged)),
                ("references", list(results.references), list(seeds[first].references)),
            ):
                if set(found) != set(wanted):
                    raise document["seeds"][seed][key].refusal(
                        f"the methods of seed {first} ({', '.join(wanted) or 'none'})", ", ".join(found) or "none"
                    )
        model = document["model"]
        return cls(
            name=document["name"].text(),
            model_name=model["name"].text(),
            model_fingerprint=model["fingerprint"].text(),
            model_parameters=model["parameters"].integer(),
            tasks=tasks,
            classes={task: count.integer() for task, count in document["classes"].entries(tasks).items()},
            evaluated_on=document["evaluated_on"].text(),
            coefficients_chosen_on=document["coefficients_chosen_on"].optional(Reader.text),
            versions={name: entry.value for name, entry in document["versions"].entries().items()},
            hardware={name: entry.value for name, entry in document["hardware"].entries().items()},
            zero_shot=_accuracies(document["zero_shot"], tasks),
            seeds=seeds,
        )

    def methods(self) -> list[str]:
        """Zero-shot, the merged models in the order of the suite, references, individual."""
        return [ZERO_SHOT, *self.merged_methods(), *self.references(), INDIVIDUAL]

    def merged_methods(self) -> list[str]:
        """The merged models only, in the order of the suite."""
        return list(next(iter(self.seeds.values())).merged)

    def references(self) -> list[str]:
        """Methods that are no merges, beside zero-shot and individual, e.g. ``["joint"]``."""
        return list(next(iter(self.seeds.values())).references)

    def merged(self, method: str) -> list[MergedResult]:
        """The merged model of a method, one per seed."""
        return [seed.merged[method] for seed in self.seeds.values()]

    def accuracy(self, method: str, task: str) -> list[float]:
        """Accuracy on one task, one value per seed; that of zero-shot is the same for all."""
        if method == ZERO_SHOT:
            return [self.zero_shot[task]] * len(self.seeds)
        if method == INDIVIDUAL:
            return [seed.individual[task] for seed in self.seeds.values()]
        if method in self.references():
            return [seed.references[method][task] for seed in self.seeds.values()]
        return [merged.accuracy[task] for merged in self.merged(method)]

    def normalised(self, method: str, task: str) -> list[float]:
        """Accuracy divided by that of the individual model of the same seed; NaN where that is 0."""
        pairs = zip(self.accuracy(method, task), self.accuracy(INDIVIDUAL, task), strict=True)
        return [accuracy / individual if individual else math.nan for accuracy, individual in pairs]

    def mean_accuracy(self, method: str) -> list[float]:
        """Accuracy averaged over tasks, one value per seed."""
        return _over_tasks([self.accuracy(method, task) for task in self.tasks])

    def mean_normalised(self, method: str) -> list[float]:
        """Normalised accuracy averaged over tasks, one value per seed."""
        return _over_tasks([self.normalised(method, task) for task in self.tasks])

    def model_and_scope(self) -> str:
        """Model, number of tasks and number of seeds in one phrase, for titles."""
        counts = ((len(self.tasks), "task"), (len(self.seeds), "seed"))
        return ", ".join([self.model_name, *(f"{count} {word}{'s' * (count != 1)}" for count, word in counts)])

    def protocol(self) -> str:
        """What was measured and how coefficients were chosen in one phrase, for titles."""
        measured = f"{_split(self.evaluated_on)} accuracy"
        if self.coefficients_chosen_on is None:
            return measured
        return f"{measured}, coefficients chosen on {_split(self.coefficients_chosen_on)}"

    def searched_on(self) -> str:
        """The score that a coefficient search maximised in one phrase, for titles."""
        split = self.coefficients_chosen_on
        return "normalised accuracy" if split is None else f"normalised {_split(split)} accuracy"


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and spread over seeds.

    Args:
        values: one value per seed.

    Returns:
        The mean, and the sample standard deviation (divisor n − 1), None for one seed.
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def display_name(method: str) -> str:
    """The method's name for readers, e.g. ``"task arithmetic"`` for ``"task_arithmetic"``."""
    return _NAMES.get(method, " ".join(_WORDS.get(word, word) for word in method.split("_")))


def _split(name: str) -> str:
    return {"val": "validation", "train": "training"}.get(name, name)


def _over_tasks(by_task: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*by_task, strict=True)]


def _accuracies(entry: Reader, tasks: Sequence[str]) -> dict[str, float]:
    return {task: value.fraction() for task, value in entry.entries(tasks).items()}


def _seed(entry: Reader, tasks: Sequence[str]) -> SeedResults:
    cosines = tuple(tuple(cell.number() for cell in row.items()) for row in entry["cosine_similarity"].items())
    if [len(row) for row in cosines] != [len(tasks)] * len(tasks):
        raise entry["cosine_similarity"].refusal(
            f"{len(tasks)} rows of {len(tasks)} values", f"rows of {[len(row) for row in cosines]} values"
        )
    merged = entry["merged"].entries()
    references = entry["references"].entries() if "references" in entry.entries() else {}
    for reserved in (ZERO_SHOT, INDIVIDUAL, *references):
        if reserved in merged:
            raise merged[reserved].refusal("a merged model under the name of its recipe", reserved, "Rename it.")
    return SeedResults(
        individual=_accuracies(entry["individual"], tasks),
        task_vectors={task: _size(size) for task, size in entry["task_vectors"].entries(tasks).items()},
        cosine_similarity=cosines,
        merged={method: _merged(result, tasks) for method, result in merged.items()},
        references={method: _accuracies(result, tasks) for method, result in references.items()},
    )


def _size(entry: Reader) -> VectorSize:
    return VectorSize(entry["norm"].number(), entry["relative_norm"].number(), entry["steps"].integer())


def _merged(entry: Reader, tasks: Sequence[str]) -> MergedResult:
    return MergedResult(
        transform=entry["transform"].text(),
        coefficient=entry["coefficient"].optional(Reader.number),
        accuracy=_accuracies(entry["accuracy"], tasks),
        search=entry["search"].optional(_search),
    )


def _search(entry: Reader) -> CoefficientSearch:
    columns = [tuple(cell.number() for cell in entry[key].items()) for key in ("values", "normalised", "absolute")]
    if not columns[0] or len({len(column) for column in columns}) > 1:
        lengths = " and ".join(str(len(column)) for column in columns)
        raise entry.refusal("as many values as normalised and absolute accuracies", f"{lengths} of them")
    return CoefficientSearch(*columns)
