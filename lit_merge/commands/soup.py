"""Average the models that do not lower the average's validation accuracy.

Examples:
  lit-merge soup --vectors '[seed-0.safetensors, seed-1.safetensors]' --output soup.safetensors
  lit-merge soup --vectors '[a.safetensors, b.safetensors]' --kind task_vector --output soup.safetensors
  lit-merge soup --config configs/soup/greedy.yaml --vectors '[a.safetensors, b.safetensors]' --output soup.safetensors
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from lit_merge.commands.merge import MergeResult
from lit_merge.commands.running import warn
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.soup import SoupResult, greedy_soup
from lit_merge.metrics.scores import mean_accuracy
from lit_merge.models.merging.opening import open_merge, remote_sources
from lit_merge.models.merging.output import beside
from lit_merge.models.network import Network
from lit_merge.transforms import weight_average

if TYPE_CHECKING:
    from lightning import LightningDataModule

__all__ = ["SoupOutput", "soup"]


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


def soup(
    vectors: list[str],
    output: str,
    kind: Literal["weights", "task_vector"] = "weights",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    network: Network | None = None,
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
        network: instead of both, any network, by class path.
        tasks: names of the vectors, in order; by default their own.
        data: the tasks whose mean validation accuracy counts; by default the embedded tasks that the vectors are named
            after.
        overwrite: replace an existing output and the files beside it.
        linearized: whether the vectors were trained for the encoder's tangent at θ0, and are evaluated as that.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, the data have no validation images, or the
            output exists.
    """
    from lit_merge.data.multitask import MultiTaskDataModule, task_names
    from lit_merge.evaluation.accuracies import Evaluation, in_memory, validation_loaders
    from lit_merge.modules.multitask import MultiTaskModule

    opened = {
        **{"vectors": vectors, "output": output, "model": model, "pretrained": pretrained, "network": network},
        **{"kind": kind, "dtype": dtype, "tasks": tasks, "linearized": linearized},
    }
    # What the merge would refuse, it refuses before anything is evaluated.
    with remote_sources("download") as sources:
        job, intended = open_merge(opened, weight_average(), sources, overwrite)
    curve = beside(job.target.path, "soup.json")
    warn(intended.cautions.lasting)
    if curve.exists() and not overwrite:
        raise ConfigurationError(
            f"output: expected a new file, got {curve}, which exists. Set overwrite to replace it."
        )
    data = data if data is not None else MultiTaskDataModule(tasks=list(dict.fromkeys(job.vectors.tasks)))
    names = task_names(data)
    module = MultiTaskModule(network=job.network(), linearized=linearized)
    module.look_beside((one.path, one.vector.tasks) for one in job.inputs)
    evaluation = Evaluation(module, validation_loaders(module, data, names))
    found = greedy_soup(job.vectors, lambda vector: mean_accuracy(evaluation.accuracy(in_memory(vector)), names))
    files = [one.path for one in job.inputs]
    content = {
        "split": "val",
        "tasks": list(names),
        "vectors": [
            {"file": file, "task": task, "accuracy": accuracy}
            for file, task, accuracy in zip(files, job.vectors.tasks, found.individual, strict=True)
        ],
        "steps": [asdict(step) for step in found.steps],
        "chosen": found.chosen,
        "accuracy": found.accuracy,
    }
    chosen = job.select(found.chosen)
    planned = chosen.plan(weight_average())
    warn(chosen.write(planned, overwrite, more={curve.name: json.dumps(content, indent=2) + "\n"}))
    return SoupOutput(found, files, MergeResult(job.target.path, planned.transform, None, planned.plan))
