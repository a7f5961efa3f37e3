"""Make task vectors of checkpoints that other programs wrote, or convert one.

Examples:
  lit-merge import --finetuned tuned.pt --pretrained base.pt --output task_vector.safetensors
  lit-merge import --finetuned '[cars.pt, dtd.pt]' --pretrained laion2b_s34b_b79k --model ViT-B-32 --output vectors
  lit-merge import --pretrained model.pt --write_as transformers --output model.safetensors
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_merge._version import __version__
from lit_merge.checkpoints.layouts.linearised_towers import linearised_towers
from lit_merge.checkpoints.layouts.towers import check_layout, rewritten
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.left_out import changes_left_out, text_side
from lit_merge.checkpoints.opening import OpenedCheckpoint, named_after, open_checkpoint
from lit_merge.checkpoints.pairing.differences import Rules
from lit_merge.checkpoints.pairs import Names, Pair, pair_of
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.hub import address_entry, parse_address, pinned
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.rounding import Rounded
from lit_merge.files.shards import bytes_of
from lit_merge.models import empty_image_tower, load_clip
from lit_merge.params import Params, check_same_structure
from lit_merge.vectors import TaskVector, write_tensors

__all__ = ["ImportResult", "import_checkpoints"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VECTOR, _WEIGHTS = "task_vector.safetensors", "model.safetensors"  # files that are written if none is named
_ADVICE = "Give the pre-trained model and what was fine-tuned from it, or one checkpoint and write_as."


@dataclass
class ImportResult:
    """What an import wrote, or would write.

    Attributes:
        outputs: the files.
        lines: what was recognised, what is left out, and what was written, for people.
        written: False after a dry run.
    """

    outputs: list[Path] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    written: bool = True

    def describe(self) -> str:
        """All of it, a line each."""
        return "\n".join(self.lines)


def import_checkpoints(
    finetuned: list[str] | str | None = None,
    pretrained: str | None = None,
    task: list[str] | str | None = None,
    names: Names = "auto",
    model: str | None = None,
    section: str | None = None,
    pretrained_section: str | None = None,
    output: str | None = None,
    leave_out: list[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    write_as: Literal["open_clip", "image_tower", "transformers", "timm"] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ImportResult:
    """Make task vectors of checkpoints, or bring one to another library's names; nothing in a file is executed.

    Checkpoints are safetensors, sharded or not; PyTorch files of a state dict, of a whole module, of TorchScript or of
    Lightning; folders of transformers or open_clip; as fine-tuned ones also PEFT adapters and linearised encoders.

    Args:
        finetuned: the fine-tuned checkpoint, or a list of several of one pre-trained model.
        pretrained: the pre-trained one; with model also a tag that open_clip knows. A linearised encoder needs none.
        task: the task's name, or a list of names in the order of finetuned; by default that of the file or its folder.
        names: image_tower for open_clip's names of a CLIP's image tower, as the vectors of our own runs have them; own
            for the checkpoint's names; auto for the image tower's if it is a CLIP.
        model: the architecture, e.g. ViT-B-32, which the checkpoints are then checked against.
        section: of a fine-tuned PyTorch file with several state dicts, the key of the one to take.
        pretrained_section: the same of the pre-trained file.
        output: file to write, ending in .safetensors, by default task_vector.safetensors (model.safetensors with
            write_as); for several task vectors a folder.
        leave_out: patterns of names whose change is left out, such as those of heads that only the fine-tuned one has,
            e.g. classifier.*.
        dtype: of the stored tensors; by default that of the difference, or of the checkpoint with write_as.
        write_as: write the weights of one checkpoint, finetuned or pretrained, under the names of this layout instead.
        overwrite: replace existing outputs.
        dry_run: say what would be written, and write nothing.

    Returns:
        The files, and what there is to say about them.

    Raises:
        LitMergeError: a checkpoint is missing, damaged or of another architecture, or an output exists.
        OSError: the disk is full or not writable; files are whole or absent.
    """
    paths = [pinned(path) for path in ([finetuned] if isinstance(finetuned, str) else finetuned or [])]
    pretrained = pretrained and pinned(pretrained)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigurationError(f"dtype: expected {', '.join(_DTYPES)}, got {dtype!r}. Use one of them.")
    if write_as is not None:
        given = [*([pretrained] if pretrained is not None else []), *paths]
        if leave_out:
            raise ConfigurationError(
                "leave_out: expected it only for task vectors, got it with write_as, which writes all weights. Remove "
                "one of them."
            )
        return _convert(given, section or pretrained_section, output, dtype, write_as, overwrite, dry_run)
    if not paths:
        raise ConfigurationError(f"finetuned: expected at least one checkpoint, got none. {_ADVICE}")
    tasks = [task] if isinstance(task, str) else list(task or map(named_after, paths))
    if len(tasks) != len(paths):
        raise ConfigurationError(
            f"task: expected a name for each of the {len(paths)} checkpoints, got {len(tasks)}. Name all, or none."
        )
    targets = _targets(output, tasks)
    opened = [open_checkpoint(path, section) for path in paths]
    base = _open_base(pretrained, pretrained_section, model, opened)
    _check_targets(targets, [*base.files, *(file for one in opened for file in one.files)], overwrite)
    result = ImportResult(targets, [base.line] if base.line else [], not dry_run)
    names = "image_tower" if model is not None and names == "auto" else names
    started = [(*base.paired(one), one) for one in opened]
    rules = Rules(tuple(leave_out or ()), offered=("leave_out",))
    pairs = [pair_of(start, tuned, names, rules) for start, tuned, _ in started]
    _check_used(rules, pairs)
    fingerprints: dict[frozenset[str], str] = {}
    for path, (start, tuned, one), pair, name, target in zip(paths, started, pairs, tasks, targets, strict=True):
        result.lines.append(f"{one.path}: {one.describe()}")
        if base.architecture is not None and pair.image_tower:
            check_same_structure(base.architecture, pair.base, f"image tower of {model}")
        known = "" if dry_run else fingerprints.get(frozenset(pair.base))
        own = replace(rules, leave_out=tuple(one for one in rules.leave_out if one in pair.used))
        vector = TaskVector.from_checkpoints(start, tuned, name, base_fingerprint=known, names=names, rules=own)
        fingerprints[frozenset(pair.base)] = vector.base_fingerprint
        notes = [*pair.notes, *(changes_left_out(base.text, one) if pair.image_tower else ())]
        result.lines += [f"{one.path}: {note}" for note in notes]
        vector = TaskVector(vector, name, metadata={**vector.metadata, **_provenance(base, one, path)})
        result.lines.append(_write(vector, _DTYPES[dtype] if dtype else None, target, dry_run))
    return result


import_ = import_checkpoints


def _check_used(rules: Rules, pairs: list[Pair]) -> None:
    """Refuse patterns that fit no name of any checkpoint: they are misspelled."""
    used = frozenset[str]().union(*(pair.used for pair in pairs))
    if unused := sorted(set(rules.leave_out) - used):
        raise ConfigurationError(
            f"leave_out: expected patterns that fit a name of one of the checkpoints, got {first_few(unused)}. Use "
            "names as they are in the file, e.g. 'classifier.*'."
        )


@dataclass
class _Start:
    """What fine-tuning started from.

    Attributes:
        tensors: θ0; None if every fine-tuned file has it itself.
        text: the text tower and logit scale, under the names of open_clip or of the file.
        architecture: names and shapes of the image tower, if an architecture is named.
        name: of the model.
        files: that it is read from.
        line: what it was recognised as.
    """

    tensors: Mapping[str, Tensor] | None
    text: LazyMapping | None
    architecture: Params | None
    name: str
    files: tuple[Path, ...] = ()
    line: str = ""

    def paired(self, tuned: OpenedCheckpoint) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """θ0 and what is differenced from it."""
        if self.tensors is not None:
            return self.tensors, tuned
        assert self.architecture is not None
        return linearised_towers(tuned, as_lazy(self.architecture))


def _open_base(pretrained: str | None, section: str | None, model: str | None, tuned: list[OpenedCheckpoint]) -> _Start:
    architecture = empty_image_tower(model) if model is not None else None
    if pretrained is not None and (model is None or parse_address(pretrained) or Path(pretrained).exists()):
        opened = open_checkpoint(pretrained, section)
        name = named_after(pretrained) if model is None else _architecture_name(model)
        return _Start(
            opened, text_side(opened), architecture, name, opened.files, f"{opened.path}: {opened.describe()}"
        )
    if pretrained is None and all(one.recognised.layout == "linearised" for one in tuned):
        if model is None:
            raise ConfigurationError(
                f"model: expected the architecture of {tuned[0].path}, a linearised encoder whose parameters have "
                "numbers instead of names, got none. Set model, e.g. to ViT-B-32, or give the pre-trained checkpoint."
            )
        return _Start(None, None, architecture, _architecture_name(model))
    if model is None:
        raise ConfigurationError(
            f"pretrained: expected the checkpoint that fine-tuning started from, got none. {_ADVICE}"
        )
    clip = load_clip(model, pretrained)
    tower = as_lazy({name: parameter.detach() for name, parameter in clip.visual.named_parameters()})
    return _Start(
        tower, as_lazy(clip.text.tensors()), architecture, clip.name, (), f"{clip.name}: weights {clip.pretrained}"
    )


def _architecture_name(model: str) -> str:
    return Path(model).stem if model.endswith(".json") else model.replace("/", "-")


def _targets(output: str | None, tasks: list[str]) -> list[Path]:
    """The file of every task."""
    path = Path(output or _VECTOR)
    if len(tasks) == 1:
        return [_file(path)]
    if output is None or path.suffix == ".safetensors":
        raise ConfigurationError(
            f"output: expected a folder for {len(tasks)} task vectors, got {output or 'none'}. Name one."
        )
    wrong = [task for task in tasks if not re.fullmatch(r"[\w+\-][\w+\-. ]*", task) or tasks.count(task) > 1]
    if wrong:
        raise ConfigurationError(
            f"task: expected tasks that can name a file each, got {wrong[0]!r} among {', '.join(tasks)}. "
            "Set task to a list of names."
        )
    return [path / f"{task}.safetensors" for task in tasks]


def _file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"output: expected a file ending in .safetensors, got {path}. Rename it.")
    return path


def _check_targets(targets: list[Path], inputs: list[Path], overwrite: bool) -> None:
    read = {path.resolve() for path in inputs}
    for target in targets:
        if target.resolve() in read:
            raise ConfigurationError(f"output: expected another file than the inputs, got {target}. Rename it.")
        if target.exists() and not overwrite:
            raise ConfigurationError(
                f"output: expected a new file, got {target}, which exists. Set overwrite to replace it."
            )


def _provenance(base: _Start, tuned: OpenedCheckpoint, path: str) -> dict[str, str]:
    found = tuned.recognised
    origin = {
        **address_entry(path),
        "file": tuned.path.name,
        "container": tuned.container,
        "layout": found.layout,
        "prefix": found.prefix,
    }
    linearised = found.layout == "linearised" or tuned.holds_difference
    return {
        "base_model": base.name,
        "imported_from": json.dumps(origin),
        "versions": json.dumps({"lit_merge": __version__, "torch": str(torch.__version__)}),
        **({"regime": "linearized"} if linearised else {}),
    }


def _write(vector: TaskVector, dtype: torch.dtype | None, target: Path, dry_run: bool) -> str:
    """Write a task vector, unless this is a dry run, and say so."""
    size = _size(vector, dtype)
    if dry_run:
        return f"{vector.task or 'task vector'}: {size} would be written to {target}"
    target.parent.mkdir(parents=True, exist_ok=True)
    error = vector.save(target, dtype)
    rounding = f" (relative rounding error {error:.2e})" if error else ""
    return f"{vector.task or 'task vector'}: {size}{rounding}, base {vector.base_fingerprint} -> {target}"


def _size(tensors: LazyMapping, dtype: torch.dtype | None) -> str:
    entries = sum(tensors.shape(name).numel() for name in tensors)
    rounded = Rounded(tensors, dtype, "")
    kinds = sorted({str(rounded.dtype(name)).removeprefix("torch.") for name in tensors})
    stored = sum(bytes_of(rounded, name) for name in tensors)
    return f"{len(tensors)} tensors, {entries:,} entries in {first_few(kinds)}, {stored / 1e6:,.1f} MB"


def _convert(
    paths: list[str],
    section: str | None,
    output: str | None,
    dtype: str | None,
    layout: str,
    overwrite: bool,
    dry_run: bool,
) -> ImportResult:
    """Write one checkpoint under the names of another library."""
    check_layout(layout)
    if len(paths) != 1:
        raise ConfigurationError(
            f"write_as: expected one checkpoint as pretrained or finetuned, got {len(paths)}. Convert them one by one."
        )
    target = _file(Path(output or _WEIGHTS))
    opened = open_checkpoint(paths[0], section)
    opened.require_weights()
    _check_targets([target], list(opened.files), overwrite)
    result = ImportResult([target], [f"{opened.path}: {opened.describe()}"], not dry_run)
    try:
        tensors, _, note = rewritten(opened.tensors, layout)
    except StructureMismatchError as error:
        raise StructureMismatchError(f"{opened.path}: {error}") from error
    result.lines += [f"{opened.path}: {note}"] if note else []
    stored = Rounded(tensors, _DTYPES[dtype] if dtype else None, str(opened.path))
    if dry_run:
        result.lines.append(f"{layout}: {_size(stored, None)} would be written to {target}")
        return result
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, stored, {"format": "pt"})
    result.lines.append(f"{layout}: {_size(stored, None)} -> {target}")
    return result
