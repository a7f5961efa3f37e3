"""A merge before anything is computed: what it reads, what it will do, and how it is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from lit_merge._version import __version__
from lit_merge.checkpoints.pairing.differences import RowRule, Rules
from lit_merge.errors import ConfigurationError, one_line
from lit_merge.files.hub import address_entry, parse_address, pinned
from lit_merge.files.lazy import Computed, LazyMapping
from lit_merge.files.shards import INDEX_ENDING, parse_size, write_shards
from lit_merge.files.staging import staged
from lit_merge.files.store import write_tensors
from lit_merge.models.merging.card import model_card
from lit_merge.models.merging.cautions import Cautions, cautions_of, rank_cautions, statistics_cautions
from lit_merge.models.merging.form import form_of
from lit_merge.models.merging.inputs import Input, open_base, open_inputs
from lit_merge.models.merging.lora_folder import check_lora, factored, lora_form, planned_lora
from lit_merge.models.merging.output import (
    MergedWeights,
    Output,
    RoundedVector,
    Target,
    beside,
    card_of,
    check_file_names,
)
from lit_merge.models.merging.plan import MergePlan, check_space, plan_merge
from lit_merge.models.merging.progress import merge_progress
from lit_merge.models.merging.running_statistics import RunningStatistics
from lit_merge.models.network import Base, Network
from lit_merge.params import dtype_of
from lit_merge.transforms import Transform
from lit_merge.vectors import TaskVector, TaskVectors, check_base

__all__ = ["DTYPES", "Kind", "Merge", "Planned"]

Kind = Literal["weights", "task_vector", "lora"]
Heads = Literal["refuse", "keep"]
Averaged = Literal["average", "base"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "as_base": None}
"""What tensors can be stored as; ``as_base`` keeps every tensor's own."""


class Recalibrating(Protocol):
    """What measures running statistics anew: :class:`lit_merge.evaluation.recalibration.Recalibration`."""

    def of(
        self, network: Network, weights: LazyMapping, tasks: Sequence[str], data: Any = None
    ) -> Mapping[str, Tensor]:
        """The running statistics of a network under given weights."""

    def describe(self) -> str:
        """Where they come from, in words."""

    def plain(self) -> dict[str, Any]:
        """Its settings."""


class Calibrating(Protocol):
    """What solves for a merge's blocks again: :class:`lit_merge.evaluation.calibration.Calibration`."""

    def of(
        self,
        network: Network,
        vectors: TaskVectors,
        start: TaskVectors,
        data: Any = None,
        folder: Path | None = None,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, int]]:
        """Name -> τ of the calibrated parameters, and how many inputs of every task were seen."""

    def describe(self) -> str:
        """What is done on what, in words."""

    def to_config(self) -> dict[str, Any]:
        """Class and settings as plain data."""


@dataclass(frozen=True)
class Planned:
    """A merge by a certain chain.

    Attributes:
        transform: the chain.
        merged: what it makes of the vectors; lazy.
        outputs: what is written.
        plan: what it takes.
        cautions: what is legal in it and dangerous, in words.
        found: what a search has chosen, or None.
    """

    transform: Transform
    merged: TaskVectors
    outputs: list[Output]
    plan: MergePlan
    cautions: Cautions
    found: Any = None


class Merge:
    """An opened base and opened inputs, from which any chain can be planned and written; no tensor is read before.

    The arguments are the settings of ``lit-merge merge``, which ``lit-merge merge --help_all`` explains.

    Attributes:
        base: the base model, opened once.
        inputs: what is merged.
        vectors: the inputs side by side, with θ0.
        outcome: what :meth:`write` has found out, in words: of an adapter its ranks and errors.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, or a setting is refused.
    """

    def __init__(
        self,
        vectors: Sequence[str],
        output: str,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        network: Network | None = None,
        base: str | None = None,
        kind: Kind = "weights",
        dtype: str | None = None,
        tasks: Sequence[str] | None = None,
        shard_size: str | None = None,
        device: str = "cpu",
        linearized: bool = False,
        verify: bool = False,
        leave_out: Sequence[str] | None = None,
        heads: Heads = "refuse",
        rows: RowRule | None = None,
        running_statistics: Averaged = "average",
        write_as: str | None = None,
        rank: int | None = None,
        recalibrate: Recalibrating | None = None,
        calibrate: Calibrating | None = None,
    ) -> None:
        self.target, self.kind, self.linearized, self.device = Target(Path(output)), kind, linearized, device
        self._shard_size = _shard_size(shard_size, self.target)
        _check_device(device)
        # Of what lies on the Hub the commit is written down, and everything below reads that one.
        vectors, base = [pinned(path) for path in vectors], base and pinned(base)
        pretrained = pretrained and pinned(pretrained)
        self.base: Base = open_base(model, pretrained, base, verify, network)
        self._base_path = base or pretrained
        origin = {"base": base} if base is not None else {"model": model, "pretrained": pretrained}
        if network is not None:
            origin = {"network": f"{type(network).__module__}.{type(network).__qualname__}"}
        self._settings = {
            **{"kind": kind, "dtype": dtype, **origin},
            **{"tasks": tasks, "shard_size": shard_size, "linearized": linearized or None, "output": output},
            **{"leave_out": list(leave_out or []) or None, "rows": rows},
            **{"heads": heads if heads != "refuse" else None},
            **{"running_statistics": running_statistics if running_statistics != "average" else None},
            **{"write_as": write_as, "rank": rank},
            **{"recalibrate": None if recalibrate is None else recalibrate.plain()},
            **{"calibrate": None if calibrate is None else calibrate.to_config()},
        }
        self._rank, self.outcome = rank, tuple[str, ...]()
        if kind == "lora" or rank is not None:
            check_lora(kind, rank, base, self.target.path, self.target.is_file)
        _check_choice("heads", heads, Heads)
        _check_choice("running_statistics", running_statistics, Averaged)
        self._average, self._recalibrate = running_statistics == "average", recalibrate
        self._calibrate = calibrate
        rules = Rules(tuple(leave_out or ()), heads == "keep", rows)
        self._dtype = DTYPES[dtype or ("as_base" if base is not None and kind == "weights" else "float32")]
        self.form = form_of(self.base, base, self.target.is_file, kind == "weights", self._dtype, write_as)
        self.form = lora_form() if kind == "lora" else self.form
        inputs, self._rows = open_inputs(vectors, self.base, tasks, verify, rules)
        if kind == "task_vector" and self._rows.added:
            raise ConfigurationError(
                f"kind task_vector: expected changes of tensors that the base has, got others: "
                f"{'; '.join(self._rows.added)}. Write weights instead."
            )
        self.base = self._rows.base
        self.form = self.form.with_entries(self._rows.entries).with_tokenizer(self._rows.tokenizer)
        self._set_inputs(inputs)
        if recalibrate is not None:
            self._check_recalibration()
        if calibrate is not None:
            self._check_calibration()

    def _set_inputs(self, inputs: list[Input]) -> None:
        self.inputs = inputs
        self.statistics = RunningStatistics(self.base, inputs, self._average)
        known = TaskVectors([one.vector for one in inputs])  # that they fit each other, and then the base
        self._hashed = self.kind == "task_vector" or bool(known.base_fingerprint)
        self._known = known
        self._looked: dict[bool, Cautions] = {}
        self.vectors = TaskVectors([one.vector for one in inputs], base=self.base.parameters, device=self.device)

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences between the base and the inputs that are normal, and what is done about each, in words."""
        said = [f"{one.vector.task or one.path}: {note}" for one in self.inputs for note in one.notes]
        copies = [
            f"{name} is {first} again: merged once, written under both names" for name, first in self.base.ties.items()
        ]
        measured = self.statistics.notes
        if self._recalibrate is not None:
            measured = (f"{self.statistics.count} running statistics: {self._recalibrate.describe()}",)
        added = () if self.kind == "lora" else self._rows.added  # peft adapts modules, whatever they share
        calibrated = () if self._calibrate is None else (self._calibrate.describe(),)
        return (*copies, *self._rows.notes, *added, *said, *self.vectors.notes, *measured, *calibrated)

    def _check_recalibration(self) -> None:
        network = self.network()
        wrong = "a linearised merge, whose normalisations stay at θ0" if self.linearized else f"kind {self.kind}"
        if self.linearized or self.kind != "weights":
            raise ConfigurationError(f"recalibrate: expected merged weights, got {wrong}. Remove one of them.")
        if not self.statistics.count:
            raise ConfigurationError(
                f"recalibrate: expected a network with running statistics, as batch normalisation has them, got "
                f"{network.name} without. Remove recalibrate."
            )

    def _check_calibration(self) -> None:
        self.network()
        if self.linearized or self.kind == "lora":
            wrong = "a linearised merge, whose layers have inputs of two kinds" if self.linearized else "kind lora"
            raise ConfigurationError(f"calibrate: expected ordinary weights, got {wrong}. Remove one of them.")
        tasks = self.vectors.tasks
        if twice := [task for task in tasks if tasks.count(task) > 1 or not task]:
            raise ConfigurationError(
                f"calibrate: expected vectors of different tasks, got {twice[0]!r} for several or without a name. Set "
                "tasks to names that the data know."
            )

    def network(self) -> Network:
        """The base as what can be evaluated.

        Raises:
            ConfigurationError: only its weights are known.
        """
        if not isinstance(self.base, Network):
            raise ConfigurationError(
                f"base: expected a network, which can be evaluated, got the weights {self.base.name}. Use model and "
                "pretrained, or network."
            )
        return self.base

    def select(self, rows: Sequence[int]) -> Merge:
        """The merge of some of the inputs, on the same base."""
        chosen = copy.copy(self)
        chosen._settings = {**self._settings, "tasks": [self.inputs[row].vector.task for row in rows]}
        chosen._set_inputs([self.inputs[row] for row in rows])
        return chosen

    @property
    def addresses(self) -> dict[str, Any]:
        """The arguments that say where inputs and base are, those on the Hub with their commits."""
        origin = {name: self._settings[name] for name in ("base", "pretrained") if self._settings.get(name)}
        return {"vectors": [one.path for one in self.inputs], **origin}

    def plan(self, transform: Transform, dry: bool = False, found: Any = None, values: bool = True) -> Planned:
        """What a chain will read, need and write.

        Args:
            transform: the chain.
            dry: whether this is all that is asked for: then no tensor is read, not even for the base's fingerprint, but
                for a few thousand elements, from which losses by rounding are estimated.
            found: what a search has chosen, for the header.
            values: whether the inputs' values may be looked at, for the warnings.

        Raises:
            StructureMismatchError: the vectors, or statistics that the chain reads, belong to another base.
            ConfigurationError: the chain cannot be written to this output.
        """
        fingerprinted = isinstance(self.base, Network) or (self._hashed and not dry)
        fingerprint = self.base.fingerprint if fingerprinted else ""
        check_base(self._known, fingerprint, self.base.name, self.base.activation)
        merged = transform(self.vectors)
        if self._calibrate is not None and len(merged.tasks) != 1:
            raise ConfigurationError(
                f"calibrate: expected one merged vector, got {len(merged.tasks)}. Reduce them first, e.g. with Sum."
            )
        cautions = (self._cautions(dry) if values else Cautions()).with_more(
            [
                *statistics_cautions(transform, self._known.base_fingerprint, fingerprint),
                *rank_cautions(transform, self.vectors),
            ]
        )
        metadata = self._provenance(transform, found, fingerprinted)
        if cautions.lasting:
            metadata["warnings"] = json.dumps(cautions.lasting, ensure_ascii=False)
        places = self.form.places(self.target.stems(self.kind, merged.tasks))
        outputs = [
            self._output(row, metadata, place, stem) for (place, stem), row in zip(places, _rows(merged), strict=True)
        ]
        self.form.check_shards(max(len(one.shards) for one in outputs))
        plan = plan_merge(
            *(self.inputs, self.base, transform, merged, outputs, self.target.folder, self.device),
            writes_weights=self.kind == "weights",
            fingerprinted=self._hashed,
            notes=(*self.notes, *self.form.notes),
            warnings=cautions.lines,
        )
        return Planned(transform, merged, outputs, plan, cautions, found)

    def _cautions(self, estimated: bool) -> Cautions:
        """From a sample of the inputs, which is read once."""
        if estimated not in self._looked:
            parameters = self.base.parameters
            stored = (lambda name: self._dtype or dtype_of(parameters, name)) if estimated else None
            self._looked[estimated] = cautions_of(self.inputs, self.base, stored if self.kind == "weights" else None)
        return self._looked[estimated]

    def check(self, planned: Planned, overwrite: bool) -> None:
        """Refuse to replace an input, or anything unasked, or to fill the disk.

        Raises:
            ConfigurationError: it would.
        """
        self._stale(planned, overwrite)
        check_space(planned.plan, self.target.folder)

    def write(
        self,
        planned: Planned,
        overwrite: bool = False,
        progress: bool = False,
        more: Mapping[str, str] | None = None,
        data: Any = None,
    ) -> tuple[str, ...]:
        """Compute and write everything, or leave nothing.

        Args:
            planned: by which chain.
            overwrite: whether an existing output is replaced.
            progress: whether to show a bar, if the standard error is a terminal.
            more: file name -> text, written in the same transaction.
            data: whose inputs running statistics are measured or blocks calibrated on, if they are.

        Returns:
            What was found out on the way and is to be warned of, one line each: what rounding has taken.

        Raises:
            LitMergeError: something exists, or a value does not fit.
            OSError: the disk is full or not writable; nothing is left of the output then.
        """
        stale = partial(self._stale, planned, overwrite)
        stale()
        with staged(self.target.folder, stale, _tensors_last) as folder, merge_progress(progress) as bar:
            bar.find_out(planned.merged.statistics)
            if self._calibrate is not None:
                planned = self._calibrated(self._calibrate, planned, folder, data)
            if self.kind == "lora":
                planned = replace(planned, outputs=[factored(one) for one in planned.outputs])
                self.outcome = tuple(said for one in planned.outputs if (said := one.metadata.get("lora")))
            for one in planned.outputs:
                if self._recalibrate is None or not isinstance(one.measured, MergedWeights):
                    continue
                one.measured.replace(self._recalibrate.of(self.network(), one.measured, one.measured.tasks, data))
            for one in planned.outputs:
                _write(folder, one, bar.watch(one.tensors, one.stem))
            losses = tuple(filter(None, (one.caution() for one in planned.outputs)))
            card = self._card(planned, (*planned.cautions.lasting, *losses))
            (folder / card_of(self.target.path).name).write_text(card, encoding="utf-8")
            for name, text in (more or {}).items():
                (folder / name).write_text(text, encoding="utf-8")
            for name, head in self._heads().items():
                write_tensors(folder / name, head, {"format": "pt"})
            if planned.found is not None:
                planned.found.save(folder / beside(self.target.path, "search.json").name)
        return losses

    def _calibrated(self, calibrate: Calibrating, planned: Planned, folder: Path, data: Any) -> Planned:
        """The merge with other blocks, and with a header that says what they were solved for on."""
        found, seen = calibrate.of(self.network(), self.vectors, planned.merged, data, folder)
        start = planned.merged.single()
        structure = {name: (start.shape(name), start.dtype(name)) for name in start}
        values = Computed(structure, partial(_from_either, found, start))
        merged = TaskVectors([TaskVector(values, start.task, metadata=start.metadata)], base=self.base.parameters)
        entry = {"calibration": json.dumps({**calibrate.to_config(), "inputs": dict(seen), "labels_read": False})}
        outputs = [self._output(merged, {**one.metadata, **entry}, one.place, one.stem) for one in planned.outputs]
        return replace(planned, merged=merged, outputs=outputs)

    def _stale(self, planned: Planned, overwrite: bool) -> list[Path]:
        """What an earlier output would leave behind, after refusing what must not be replaced."""
        target, outputs = self.target, planned.outputs
        stale = [path for one in outputs for path in one.in_the_way(target.folder)]
        others = [beside(target.path, "merge.yaml"), beside(target.path, "search.json"), card_of(target.path)]
        written = [*(target.folder / name for one in outputs for name in one.files), *others]
        written += [target.folder / name for name in self._heads()]
        replaced = list(dict.fromkeys([*stale, *(path for path in written if path.exists() or path.is_symlink())]))
        read = [*self.base.files, *self.form.companions.sources, *(path for one in self.inputs for path in one.files)]
        taken = {path.resolve() for path in read}
        for path in [*replaced, *written]:
            if path.resolve() in taken or (path.exists() and any(path.samefile(one) for one in read if one.exists())):
                raise ConfigurationError(
                    f"output: expected another file than the inputs, got {path}. Choose another name."
                )
        if replaced and not overwrite:
            raise ConfigurationError(
                f"output: expected a new file, got {replaced[0]}, which exists. Set overwrite to replace it."
            )
        return stale

    def _heads(self) -> dict[str, LazyMapping]:
        """File name -> the head that only one of the inputs has."""
        stem = f"{self.target.path.stem}-" if self.target.is_file else ""
        heads = [(one.vector.task, one.heads) for one in self.inputs if one.heads]
        check_file_names([task for task, _ in heads])
        return {f"{stem}{task}-head.safetensors": head for task, head in heads}

    def _provenance(self, transform: Transform, found: Any, fingerprinted: bool) -> dict[str, str]:
        """The header's entries that say where the tensors come from."""
        inputs = [{"tasks": one.vector.task, **address_entry(one.path), **one.digests} for one in self.inputs]
        entries = {
            "base_model": self.base.name,
            "transform": repr(transform),
            "transform_config": json.dumps(transform.to_config()),
            "inputs": json.dumps(inputs),
            "lit_merge": __version__,
        }
        if fingerprinted:
            entries["base_fingerprint"] = self.base.fingerprint
        if self.base.activation:
            entries["activation"] = self.base.activation
        if known := {**address_entry(self._base_path), **self.base.digests}:
            entries["base"] = json.dumps(known)
        if self.linearized:
            entries["linearized"] = "true"
        if found is not None:
            entries["search"] = json.dumps(found.plain())
        if self.notes:
            entries["differences"] = json.dumps(self.notes, ensure_ascii=False)
        return entries

    def _output(self, merged: TaskVectors, metadata: dict[str, str], place: str, stem: str) -> Output:
        """What is written of one merged vector, lazily, with its header."""
        settings = self._shard_size, place, self.form.companions
        if self.kind == "weights":
            replaced = self.statistics.values()
            weights = MergedWeights(self.base, merged, self._dtype, replaced)
            header = {**self.form.header, **metadata}
            return Output.plan(stem, self.form.tensors(weights), header, *settings, weights)
        vector = merged.single()
        if self.kind == "lora":
            factors = planned_lora(self.base, self.inputs, vector, self._rank, self._dtype, self._base_path)
            return Output.plan(stem, factors, {"format": "pt", **metadata}, None, place, self.form.companions)
        vector = TaskVector(vector, vector.task, metadata={**vector.metadata, **metadata})
        rounded = RoundedVector(vector, self._dtype, self.base.parameters)
        return Output.plan(stem, rounded, vector.metadata, *settings, rounded)

    def _card(self, planned: Planned, warnings: Sequence[str]) -> str:
        path, outputs = self.target.path, planned.outputs
        vectors = {"vectors": [one.path for one in self.inputs], "transform": planned.transform.to_config()}
        address = parse_address(self._base_path or "")
        return model_card(
            path.stem if self.target.is_file else path.absolute().name,
            [one.model for one in outputs],
            planned.merged.tasks,
            self.base,
            self.inputs,
            planned.transform,
            {key: value for key, value in {**vectors, **self._settings}.items() if value is not None},
            f"A search has {planned.found.describe()}." if planned.found else "",
            self.kind == "weights",
            notes=(*self.notes, *self.outcome),
            warnings=warnings,
            repository=address.repository if address is not None else self.base.repository,
            form=self.form,
        )


def _from_either(first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str) -> Tensor:
    return first[name] if name in first else second[name]


def _tensors_last(path: Path) -> tuple[bool, bool]:
    """Files of tensors are moved after all others, and an index last: half a model is never read."""
    return path.name.endswith(INDEX_ENDING), path.suffix == ".safetensors"


def _shard_size(shard_size: str | None, target: Target) -> int | None:
    if shard_size is None:
        return None
    if target.is_file:
        raise ConfigurationError(
            f"shard_size: expected a folder as output, got the file {target.path}. Name a folder, or remove shard_size."
        )
    return parse_size(shard_size)


def _check_choice(name: str, value: str, choices: object) -> None:
    known = get_args(choices)
    if value not in known:
        raise ConfigurationError(f"{name}: expected {' or '.join(known)}, got {value!r}. Use one of them.")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device: expected one that is there, got {device!r} ({one_line(error, 200)}). Use cpu."
        ) from error


def _rows(merged: TaskVectors) -> list[TaskVectors]:
    count = len(merged.tasks)
    return [merged] if count == 1 else [merged.select([index]) for index in range(count)]


def _write(folder: Path, output: Output, tensors: Any) -> None:
    metadata = dict(output.metadata)
    folder = folder / output.place
    folder.mkdir(exist_ok=True)
    if digests := output.companions.write(folder):
        metadata["companions"] = json.dumps(digests, ensure_ascii=False)
    metadata |= output.late_entries()
    if len(output.shards) > 1:
        write_shards(folder, tensors, metadata, output.shards, output.stem, late_metadata=output.late_entries)
    else:
        file = folder / f"{output.stem}.safetensors"
        write_tensors(file, tensors, metadata, late_metadata=output.late_entries)
