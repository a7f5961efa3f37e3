"""Task vectors in, merged weights or a merged task vector out: what ``lit-merge merge`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.search import CoefficientSearch, SearchResult, search_coefficient
from lit_merge.files.hub import address_entry, parse_address, pinned
from lit_merge.files.shards import INDEX_ENDING, parse_size, write_shards
from lit_merge.files.store import write_tensors
from lit_merge.models import hub_repository
from lit_merge.models.merging.card import model_card
from lit_merge.models.merging.inputs import Base, ClipBase, Input, open_base, open_inputs
from lit_merge.models.merging.output import MergedWeights, Output, RoundedVector, Target, beside, card_of, staged
from lit_merge.models.merging.plan import MergePlan, check_space, plan_merge
from lit_merge.models.merging.progress import merge_progress
from lit_merge.transforms import Transform
from lit_merge.transforms.parts import resolve_transform
from lit_merge.vectors import TaskVector, TaskVectors, check_base

__all__ = ["MergeResult", "beside", "merge"]

if TYPE_CHECKING:
    from lightning import LightningDataModule

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "as_base": None}


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or would write.

    Attributes:
        output: the file or folder.
        transform: the chain that was applied, with what a search chose.
        search: the search's curve, or None.
        plan: what it takes; printed, it is a table.
        written: False after a dry run.
    """

    output: Path
    transform: Transform
    search: SearchResult | None
    plan: MergePlan
    written: bool = True


def merge(
    vectors: list[str],
    output: str,
    recipe: str | None = None,
    settings: dict[str, Any] | None = None,
    transform: Transform | None = None,
    parts: list[str | dict[str, Any]] | None = None,
    overrides: list[dict[str, Any]] | None = None,
    kind: Literal["weights", "task_vector"] = "weights",
    dtype: Literal["float32", "bfloat16", "float16", "as_base"] | None = None,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    base: str | None = None,
    tasks: list[str] | None = None,
    shard_size: str | None = None,
    device: str = "cpu",
    search: CoefficientSearch | None = None,
    data: LightningDataModule | None = None,
    overwrite: bool = False,
    linearized: bool = False,
    verify: bool = False,
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
        kind: weights writes the whole model, of a CLIP loadable by open_clip; task_vector writes the merged τ.
        dtype: of the stored tensors; as_base keeps every tensor's own, and is the default for weights made with base,
            otherwise float32 is.
        model: the CLIP that the vectors start from.
        pretrained: its weights.
        base: instead of model and pretrained, the weights of any base model: a safetensors or PyTorch file, or the
            folder or index of a sharded one. Names are then the files' own, and open_clip is not needed.
        tasks: names of the vectors, in order; by default their own, or the files' or folders' names.
        shard_size: write an output folder as shards of at most this size, e.g. 2GB.
        device: where stacks are computed, e.g. cuda; one parameter of all vectors is moved at a time.
        search: choose a coefficient on validation data instead of taking the given one; for CLIPs.
        data: the tasks to search on; by default the embedded tasks that the vectors are named after.
        overwrite: replace an existing output and the files beside it.
        linearized: whether the vectors are merged for the encoder's tangent at θ0, as they were trained: a search
            evaluates that instead of the encoder, and the output's header says so.
        verify: read all inputs once before merging, compare them with the digests in their headers, and hash those that
            have none. Truncated files are noticed without.
        dry_run: print what would be done, its passes over the inputs and the memory it takes, and write nothing; no
            tensor of the vectors is read, nor of a base that is given as weights. A search is not counted.
        progress: show a progress bar if the standard error is a terminal.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, or the output exists.
        OSError: the disk is full or not writable; nothing is left of the output then.
    """
    chosen = resolve_transform(recipe, settings, transform, parts, overrides)
    target = Target(Path(output))
    size = _shard_size(shard_size, target)
    _check_device(device)
    if base is not None and search is not None:
        raise ConfigurationError(
            "search: expected a CLIP, which can be evaluated, got base. Use model and pretrained, or remove search."
        )
    # Of what lies on the Hub the commit is written down, and everything below reads that one.
    vectors, base = [pinned(path) for path in vectors], base and pinned(base)
    pretrained = pretrained and pinned(pretrained)
    start = open_base(model, pretrained, base, verify and not dry_run)
    inputs = open_inputs(vectors, start, tasks, verify and not dry_run)
    rows = [one.vector for one in inputs]
    known = TaskVectors(rows)  # that they fit each other, and then the base
    hashed = kind == "task_vector" or bool(known.base_fingerprint)
    fingerprinted = isinstance(start, ClipBase) or (hashed and not dry_run)
    if fingerprinted:
        check_base(known, start.fingerprint(), start.name)
    stacked = TaskVectors(rows, base=start.parameters, device=device)
    stored = _DTYPES[dtype or ("as_base" if base is not None and kind == "weights" else "float32")]

    def planned(transform: Transform, found: SearchResult | None) -> tuple[TaskVectors, list[Output], MergePlan]:
        merged = transform(stacked)
        metadata = _provenance(start, base or pretrained, inputs, transform, found, linearized, fingerprinted)
        pairs = zip(target.stems(kind, merged.tasks), _rows(merged), strict=True)
        outputs = [Output.plan(stem, *_tensors(kind, start, row, stored, metadata), size) for stem, row in pairs]
        plan = plan_merge(inputs, start, transform, merged, outputs, target.folder, device, kind == "weights", hashed)
        return merged, outputs, plan

    merged, outputs, plan = planned(chosen, None)
    stale = _check_files(target, outputs, [*start.files, *(path for one in inputs for path in one.files)], overwrite)
    check_space(plan, target.folder)
    found = None
    if search is not None:
        search.check(chosen)
    if dry_run:
        return MergeResult(target.path, chosen, None, plan, written=False)
    if search is not None:  # the refusals come before, as this may take long
        found = search_coefficient(stacked, chosen, search, model, pretrained, data, linearized)
        chosen = found.transform
        merged, outputs, plan = planned(chosen, found)
    config = {
        **{"vectors": vectors, "transform": chosen.to_config(), "kind": kind, "dtype": dtype},
        **({"base": base} if base is not None else {"model": model, "pretrained": pretrained}),
        **{"tasks": tasks, "shard_size": shard_size, "linearized": linearized or None, "output": output},
    }
    card = model_card(
        target.path.stem if target.is_file else target.path.absolute().name,
        [f"{one.stem}{'.safetensors' if len(one.shards) == 1 else INDEX_ENDING}" for one in outputs],
        merged.tasks,
        start,
        inputs,
        chosen,
        {key: value for key, value in config.items() if value is not None},
        f"A search has {found.describe()}." if found else "",
        kind == "weights",
        _repository(start, base or pretrained, model),
    )
    with staged(target.folder, stale) as folder, merge_progress(progress) as bar:
        bar.find_out(merged.statistics)
        for one in outputs:
            _write(folder, one, bar.watch(one.tensors, one.stem))
        (folder / card_of(target.path).name).write_text(card, encoding="utf-8")
        if found is not None:
            found.save(folder / beside(target.path, "search.json").name)
    return MergeResult(target.path, chosen, found, plan)


def _shard_size(shard_size: str | None, target: Target) -> int | None:
    if shard_size is None:
        return None
    if target.is_file:
        raise ConfigurationError(
            f"shard_size: expected a folder as output, got the file {target.path}. Name a folder, or remove shard_size."
        )
    return parse_size(shard_size)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = " ".join(str(error).split())[:200].rstrip(". ")
        raise ConfigurationError(f"device: expected one that is there, got {device!r} ({line}). Use cpu.") from error


def _repository(base: Base, path: str | None, model: str) -> str | None:
    """``owner/name`` of the base on the Hub, if it came from there."""
    address = parse_address(path or "")
    if address is not None:
        return address.repository
    return hub_repository(model, path) if isinstance(base, ClipBase) else None


def _provenance(
    base: Base,
    base_path: str | None,
    inputs: Sequence[Input],
    transform: Transform,
    found: SearchResult | None,
    linearized: bool,
    fingerprinted: bool,
) -> dict[str, str]:
    """The header's entries that say where the tensors come from."""
    entries = {
        "base_model": base.name,
        "transform": repr(transform),
        "transform_config": json.dumps(transform.to_config()),
        "inputs": json.dumps([{"tasks": one.vector.task, **address_entry(one.path), **one.digests} for one in inputs]),
        "lit_merge": __version__,
    }
    if fingerprinted:
        entries["base_fingerprint"] = base.fingerprint()
    if known := {**address_entry(base_path), **base.digests}:
        entries["base"] = json.dumps(known)
    if linearized:
        entries["linearized"] = "true"
    if found is not None:
        entries["search"] = json.dumps(found.plain())
    return entries


def _rows(merged: TaskVectors) -> list[TaskVectors]:
    count = len(merged.tasks)
    return [merged] if count == 1 else [merged.select([index]) for index in range(count)]


def _tensors(
    kind: str, base: Base, merged: TaskVectors, dtype: torch.dtype | None, metadata: dict[str, str]
) -> tuple[MergedWeights | RoundedVector, dict[str, str]]:
    """What is written of one merged vector, lazily, and its header."""
    if kind == "weights":
        return MergedWeights(base, merged, dtype), {"format": "lit-merge/weights/1", **metadata}
    vector = merged.single()
    vector = TaskVector(vector, vector.task, metadata={**vector.metadata, **metadata})
    return RoundedVector(vector, dtype, base.parameters), vector.metadata


def _check_files(target: Target, outputs: Sequence[Output], inputs: Sequence[Path], overwrite: bool) -> list[Path]:
    """Refuse to replace an input, or anything unasked; returns what an earlier output would leave behind."""
    stale = [path for one in outputs for path in one.in_the_way(target.folder)]
    others = [beside(target.path, "merge.yaml"), beside(target.path, "search.json"), card_of(target.path)]
    written = [*(target.folder / name for one in outputs for name in one.files), *others]
    replaced = list(dict.fromkeys([*stale, *(path for path in written if path.exists() or path.is_symlink())]))
    taken = {path.resolve() for path in inputs}
    for path in [*replaced, *written]:
        if path.resolve() in taken or (path.exists() and any(path.samefile(one) for one in inputs)):
            raise ConfigurationError(f"output: expected another file than the inputs, got {path}. Choose another name.")
    if replaced and not overwrite:
        raise ConfigurationError(
            f"output: expected a new file, got {replaced[0]}, which exists. Set overwrite to replace it."
        )
    return stale


def _write(folder: Path, output: Output, tensors: Any) -> None:
    if len(output.shards) > 1:
        write_shards(folder, tensors, output.metadata, output.shards, output.stem)
        return
    rounded, metadata = output.tensors, dict(output.metadata)
    if not isinstance(rounded, RoundedVector):
        write_tensors(folder / f"{output.stem}.safetensors", tensors, metadata)
        return
    metadata["storage"] = rounded.storage()  # with the rounding error, which is known at the end
    late = {"late_metadata": lambda: {"storage": rounded.storage()}}
    write_tensors(folder / f"{output.stem}.safetensors", tensors, metadata, **late)
