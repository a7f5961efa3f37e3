"""Greedy soups: the average of those vectors that do not lower its validation accuracy; ``lit-merge soup``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_merge.commands.merge import MergeResult, merge
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.search.evaluation import Evaluation, in_memory, task_names, validation_loaders
from lit_merge.files.hub import pinned
from lit_merge.metrics.scores import mean_accuracy
from lit_merge.models.merging.inputs import open_base, open_inputs
from lit_merge.models.merging.output import beside
from lit_merge.transforms import Mean
from lit_merge.vectors import TaskVector, TaskVectors

if TYPE_CHECKING:
    from lightning import LightningDataModule

__all__ = ["SoupOutput", "SoupResult", "SoupStep", "greedy_soup", "soup"]


@dataclass(frozen=True)
class SoupStep:
    """One vector that was tried.

    Attributes:
        row: its position among the vectors.
        accuracy: of the soup with it.
        kept: whether it stayed in.
    """

    row: int
    accuracy: float
    kept: bool


@dataclass(frozen=True)
class SoupResult:
    """A greedy soup, step by step.

    Attributes:
        individual: every vector's own accuracy, in the order of the vectors.
        steps: the vectors in the order in which they were tried, the best one first.
    """

    individual: list[float]
    steps: list[SoupStep]

    @property
    def chosen(self) -> list[int]:
        """Positions of the vectors in the soup, in the order in which they were added."""
        return [step.row for step in self.steps if step.kept]

    @property
    def accuracy(self) -> float:
        """Accuracy of the soup, at least that of the best vector."""
        return [step.accuracy for step in self.steps if step.kept][-1]


@dataclass(frozen=True)
class SoupOutput:
    """What ``lit-merge soup`` wrote.

    Attributes:
        soup: which vectors are in it, and why.
        files: all vectors' files.
        merge: the merge of the chosen ones.
    """

    soup: SoupResult
    files: list[str]
    merge: MergeResult

    def describe(self) -> str:
        """The soup in a line."""
        names = ", ".join(self.files[row] for row in self.soup.chosen)
        return (
            f"greedy soup of {len(self.soup.chosen)} of {len(self.files)} vectors ({names}), "
            f"validation accuracy {self.soup.accuracy:.4g} -> {self.merge.output}"
        )


def greedy_soup(vectors: TaskVectors, evaluate: Callable[[TaskVector], float]) -> SoupResult:
    """Average vectors greedily (Wortsman et al. 2022, recipe 1).

    The vectors are sorted by their own accuracy, the best first, equal ones in the given order. The soup starts with
    the first one; each of the others stays in if the mean with it, ``1/|S| Σ_{t ∈ S} τ_t``, is at least as accurate as
    without.

    Args:
        vectors: of one task or of several, T of them.
        evaluate: the accuracy of θ0 + τ on held-out data; called 2 T − 1 times.

    Returns:
        Every step; ``Mean()(vectors.select(result.chosen))`` is the soup.
    """
    individual = [evaluate(vectors.vector(row)) for row in range(len(vectors.tasks))]
    first, *others = sorted(range(len(individual)), key=lambda row: -individual[row])
    chosen, best = [first], individual[first]
    steps = [SoupStep(first, best, True)]
    for row in others:
        accuracy = evaluate(Mean()(vectors.select([*chosen, row])).single())
        steps.append(SoupStep(row, accuracy, accuracy >= best))
        if steps[-1].kept:
            chosen, best = [*chosen, row], accuracy
    return SoupResult(individual, steps)


def soup(
    vectors: list[str],
    output: str,
    kind: Literal["weights", "task_vector"] = "weights",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    tasks: list[str] | None = None,
    data: LightningDataModule | None = None,
    overwrite: bool = False,
    linearized: bool = False,
) -> SoupOutput:
    """Average those of several fine-tuned models that do not lower the average's validation accuracy.

    Args:
        vectors: task vector files or fine-tuned weights, usually of one task with several seeds or settings.
        output: file to write, as for merge; each vector's accuracy and every step are written beside it as
            <name>-soup.json.
        kind: weights writes the whole model, loadable by open_clip; task_vector writes the mean τ.
        dtype: of the stored tensors, by default float32.
        model: the CLIP that the vectors start from.
        pretrained: its weights.
        tasks: names of the vectors, in order; by default their own.
        data: the tasks whose mean validation accuracy counts; by default the embedded tasks that the vectors are named
            after.
        overwrite: replace an existing output and the files beside it.
        linearized: whether the vectors were trained for the encoder's tangent at θ0, and are evaluated as that.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, the data have no validation images, or the
            output exists.
    """
    from lit_merge.data.multitask import MultiTaskDataModule
    from lit_merge.files.text import write_text
    from lit_merge.modules.multitask import MultiTaskModule

    vectors, pretrained = [pinned(path) for path in vectors], pretrained and pinned(pretrained)
    settings: dict[str, Any] = {
        **{"recipe": "weight_average", "kind": kind, "dtype": dtype, "model": model, "pretrained": pretrained},
        **{"linearized": linearized, "progress": False},
    }
    curve = beside(Path(output), "soup.json")
    # What the merge would refuse, it refuses before anything is evaluated.
    merge(vectors, output, **settings, tasks=tasks, overwrite=overwrite, dry_run=True)
    if curve.exists() and not overwrite:
        raise ConfigurationError(
            f"output: expected a new file, got {curve}, which exists. Set overwrite to replace it."
        )
    inputs = open_inputs(vectors, open_base(model, pretrained, None, False), tasks, False)
    stacked = TaskVectors([one.vector for one in inputs])
    data = data if data is not None else MultiTaskDataModule(tasks=list(dict.fromkeys(stacked.tasks)))
    names = task_names(data)
    module = MultiTaskModule(model, pretrained, linearized=linearized)
    evaluation = Evaluation(module, validation_loaders(module, data, names))
    found = greedy_soup(stacked, lambda vector: mean_accuracy(evaluation.accuracy(in_memory(vector)), names))
    files, rows = [vectors[row] for row in found.chosen], [stacked.tasks[row] for row in found.chosen]
    result = merge(files, output, **settings, tasks=rows, overwrite=overwrite)
    content = {
        "split": "val",
        "tasks": list(names),
        "vectors": [
            {"file": file, "task": task, "accuracy": accuracy}
            for file, task, accuracy in zip(vectors, stacked.tasks, found.individual, strict=True)
        ],
        "steps": [asdict(step) for step in found.steps],
        "chosen": found.chosen,
        "accuracy": found.accuracy,
    }
    write_text(curve, json.dumps(content, indent=2) + "\n")
    return SoupOutput(found, vectors, result)
