"""Merge task vectors or fine-tuned weights into one model.

Examples:
  lit-merge merge --vectors '[a.safetensors, b.safetensors]' --recipe task_arithmetic --output merged.safetensors
  lit-merge merge --vectors '[a, b]' --base base --parts '[{Trim: {density: 0.2}}, ElectSign, DisjointMean]' --output c
  lit-merge merge --vectors '[a.safetensors, b.safetensors]' --recipe ties --search '{}' --output merged.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_merge.commands.running import RESOLVED, warn
from lit_merge.errors import ConfigurationError
from lit_merge.models.merging.opening import open_merge, remote_sources
from lit_merge.models.merging.output import beside
from lit_merge.models.merging.plan import MergePlan
from lit_merge.models.network import Network
from lit_merge.transforms import Transform
from lit_merge.transforms.parts import resolve_transform

if TYPE_CHECKING:
    from lightning import LightningDataModule

    from lit_merge.evaluation.calibration import Calibration
    from lit_merge.evaluation.recalibration import Recalibration
    from lit_merge.evaluation.search import CoefficientSearch, SearchResult

__all__ = ["MergeResult", "merge"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or would write.

    Attributes:
        output: the file or folder.
        transform: the chain that was applied, with what a search chose.
        search: the search's curve, or None.
        plan: what it takes; printed, it is a table.
        written: False after a dry run.
        outcome: what was found out while it was written, in words.
    """

    output: Path
    transform: Transform
    search: SearchResult | None
    plan: MergePlan
    written: bool = True
    outcome: tuple[str, ...] = ()

    def describe(self) -> str:
        """The merge in a line, after what was done about differences; of a dry run, its plan."""
        if not self.written:
            return str(self.plan)
        found = f", {self.search.describe()}" if self.search else ""
        return "\n".join([*self.plan.notes, *self.outcome, f"{self.transform!r}{found} -> {self.output}"])


def merge(
    vectors: list[str],
    output: str,
    recipe: str | None = None,
    settings: dict[str, Any] | None = None,
    transform: Transform | None = None,
    parts: list[str | dict[str, Any]] | None = None,
    overrides: list[dict[str, Any]] | None = None,
    kind: Literal["weights", "task_vector", "lora"] = "weights",
    dtype: Literal["float32", "bfloat16", "float16", "as_base"] | None = None,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    network: Network | None = None,
    base: str | None = None,
    tasks: list[str] | None = None,
    shard_size: str | None = None,
    device: str = "cpu",
    search: CoefficientSearch | None = None,
    data: LightningDataModule | None = None,
    overwrite: bool = False,
    linearized: bool = False,
    verify: bool = False,
    leave_out: list[str] | None = None,
    heads: Literal["refuse", "keep"] = "refuse",
    rows: Literal["base", "common", "union"] | None = None,
    running_statistics: Literal["average", "base"] = "average",
    recalibrate: Recalibration | None = None,
    calibrate: Calibration | None = None,
    write_as: str | None = None,
    rank: int | None = None,
    remote: Literal["download", "stream"] = "download",
    dry_run: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Merge task vectors or fine-tuned weights into one model, by a recipe or any chain of transforms.

    Args:
        vectors: task vector files, or fine-tuned weights, which are differenced against the base: any checkpoint that
            lit-merge import takes as well. Their order matters for analogy and per-task coefficients only.
        output: file to write, ending in .safetensors; or a folder, for shards and for chains that leave several
            vectors. A model card is written with it (<name>.md, README.md in a folder), a search's curve as
            <name>-search.json, and by the command its configuration as <name>-merge.yaml. Missing folders are created.
        recipe: name of a method, e.g. task_arithmetic, ties, lines, weight_average, negation, analogy.
        settings: of the recipe, e.g. {coefficient: 0.3}.
        transform: instead of a recipe, any transform by class path, or a Chain of them.
        parts: instead of a recipe, a list of names of transforms and recipes, each with its fields if it needs any,
            e.g. [{Trim: {density: 0.2}}, ElectSign, DisjointMean].
        overrides: other parts for some of the parameters, e.g. [{names: ln_, parts: [Mean]}, {blocks: [0], parts:
            [{task_arithmetic: {coefficient: 0.1}}]}]; the first one that fits a parameter counts.
        kind: weights writes the whole model, of a CLIP loadable by open_clip; task_vector writes the merged τ; lora
            writes it as an adapter that peft opens, in a folder.
        dtype: of the stored tensors; as_base keeps every tensor's own, and is the default for weights made with base,
            otherwise float32 is.
        model: the CLIP that the vectors start from.
        pretrained: its weights.
        network: instead of both, any network, by class path.
        base: instead of model and pretrained, the weights of any base model: a safetensors or PyTorch file, or the
            folder or index of a sharded one. Names are then the files' own, and open_clip is not needed.
        tasks: names of the vectors, in order; by default their own, or the files' or folders' names.
        shard_size: write an output folder as shards of at most this size, e.g. 2GB.
        device: where stacks are computed, e.g. cuda; one parameter of all vectors is moved at a time.
        search: choose a coefficient on validation data instead of taking the given one; for networks.
        data: the tasks to search, calibrate or recalibrate on; by default the embedded tasks that the vectors are named
            after.
        overwrite: replace an existing output and the files beside it.
        linearized: whether the vectors are merged for the encoder's tangent at θ0, as they were trained: a search
            evaluates that instead of the encoder, and the output's header says so.
        verify: read all inputs once before merging, compare them with the digests in their headers, and hash those that
            have none. Truncated files are noticed without.
        leave_out: patterns of names whose change is left out, e.g. [classifier.*]; there the base is written.
        heads: what to do about heads that only a fine-tune has: refuse, or keep each in <task>-head.safetensors.
        rows: for tables of different vocabularies: base for the base's rows, common for those that all have, union for
            all tokens. Without it they are refused.
        running_statistics: of batch normalisation: average for the mean of the inputs that bring their own, or base.
        recalibrate: measure them again in the merged network instead, on images of data, by default of the embedded
            tasks that the vectors are named after; their labels are not read. For networks; {} for 1,024 images.
        calibrate: solve for the merged network's blocks again, one after the other, on a few unlabelled inputs of the
            vectors' tasks: FeatCal after any merge, RegMeanPlusPlus after weight_average. For networks; it starts from
            what the recipe, or the search, has given.
        write_as: of a CLIP, the layout of names: open_clip, image_tower, transformers or timm; by default the base's.
            In a folder its configuration is written too, if that of the base is known.
        rank: of an adapter's factors, at most. By default the inputs' ranks add up, which is exact for sums of LoRA
            adapters, with any coefficients; otherwise the best approximation is written, and its error said.
        remote: how inputs on the Hub (hf://) are read that are not in its cache: download brings them there, when
            everything is known to fit; stream reads ranges of them as they are needed, in each pass, without a copy.
        dry_run: print what would be done, its passes over the inputs and the memory it takes, and write nothing; no
            tensor of the vectors is read, nor of a base that is given as weights, but for a few thousand elements of
            each, for the warnings. A search is not counted.
        progress: show a progress bar if the standard error is a terminal.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, or the output exists.
        OSError: the disk is full or not writable; nothing is left of the output then.
    """
    chosen = resolve_transform(recipe, settings, transform, parts, overrides)
    if base is not None and search is not None:
        raise ConfigurationError(
            "search: expected a CLIP, which can be evaluated, got base. Use model and pretrained, or remove search."
        )
    if search is not None:
        search.check(chosen)
    opened = {
        **{"vectors": vectors, "output": output, "model": model, "pretrained": pretrained, "network": network},
        **{"base": base, "kind": kind, "dtype": dtype, "tasks": tasks, "shard_size": shard_size, "device": device},
        **{"linearized": linearized, "verify": verify, "leave_out": leave_out, "heads": heads, "rows": rows},
        **{"running_statistics": running_statistics, "write_as": write_as, "rank": rank, "recalibrate": recalibrate},
        **{"calibrate": calibrate},
    }
    with remote_sources(remote) as sources:
        job, planned = open_merge(opened, chosen, sources, overwrite, dry_run)
        said = planned.plan.warnings
        warn(said)
        if dry_run:
            return MergeResult(job.target.path, chosen, None, planned.plan, written=False)
        if search is not None:  # the refusals come before, as this may take long
            from lit_merge.evaluation.search import search_coefficient

            settled: dict[str, Any] = {"data": data, "linearized": linearized, "network": job.network()}
            settled["vector_files"] = [one.path for one in job.inputs]
            found = search_coefficient(job.vectors, chosen, search, **settled)
            planned = job.plan(found.transform, found=found)
            warn(line for line in planned.plan.warnings if line not in said)
        settings_file = {beside(job.target.path, "merge.yaml").name: RESOLVED.get()} if RESOLVED.get() else {}
        warn(job.write(planned, overwrite, progress, settings_file, data))
    return MergeResult(job.target.path, planned.transform, planned.found, planned.plan, outcome=job.outcome)
