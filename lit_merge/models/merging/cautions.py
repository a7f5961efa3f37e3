"""What is legal in a merge and known to ruin it, said with numbers before the work is done.

The numbers are those of a sample: a few thousand elements of a number of tensors, the same ones of every vector.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lit_merge.checkpoints.adapters.additions import model_settings
from lit_merge.checkpoints.difference import DifferenceSlicer
from lit_merge.checkpoints.vocabulary import differing_tokens, vocabulary_of
from lit_merge.errors import FileFormatError, StructureMismatchError, first_few, one_line
from lit_merge.files.content_digest import content_entry
from lit_merge.files.lazy import LazyMapping, Slicer
from lit_merge.files.store import LazyTensors
from lit_merge.models.merging.inputs import Input
from lit_merge.models.merging.rounding_loss import RoundingLoss, is_narrow, rounding_caution
from lit_merge.models.network import Base, ClipNetwork
from lit_merge.params import working_dtype
from lit_merge.transforms import ESM, DCMerge, IsoCTS, OptMerge, Transform, TSVDirections, TSVMerge
from lit_merge.transforms.fields import parts_of
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.statistics import StatisticsFiles

__all__ = ["Cautions", "cautions_of", "rank_cautions", "statistics_cautions", "training_cautions"]

_TENSORS = 128  # that are sampled; those of a model with more are chosen by a hash of their names
_PLACES = 4  # in a tensor, evenly spread
_ELEMENTS = 512  # at each of them
_RATIO = 3.0  # of norms
_ADDRESS = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name on the Hugging Face Hub
_UNSURE = 0.1  # by which confidence may be below accuracy
_DIVIDING = (TSVMerge, TSVDirections, IsoCTS, DCMerge, ESM, OptMerge)  # a matrix's rank among the vectors


@dataclass(frozen=True)
class Cautions:
    """What a merge is warned of before it is done, one line each.

    Attributes:
        lasting: what stays true of the outcome, and goes into its header and card.
        estimates: what is known exactly as soon as it is written, and then said by its ``rounding_caution``.
    """

    lasting: tuple[str, ...] = ()
    estimates: tuple[str, ...] = ()

    def with_more(self, lasting: Iterable[str]) -> Cautions:
        """These and others."""
        return replace(self, lasting=(*self.lasting, *lasting))

    @property
    def lines(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.lasting, *self.estimates)


@dataclass(frozen=True)
class _Sample:
    """Some elements of a vector: per tensor its number of elements, and the values, in float32 or better."""

    label: str
    sizes: Mapping[str, int]
    values: Mapping[str, Tensor]
    every: int  # elements of all tensors, sampled or not

    @cached_property
    def norm(self) -> float:
        """An estimate of ‖τ‖; exact if all elements were read."""
        means = {name: float(np.square(one.numpy(), dtype=np.float64).mean()) for name, one in self.values.items()}
        squares = {name: mean * self.sizes[name] for name, mean in means.items()}
        seen = sum(self.sizes.values())
        return math.sqrt(math.fsum(squares.values()) * self.every / seen) if seen else 0.0

    @property
    def count(self) -> int:
        """Elements that were read."""
        return sum(one.numel() for one in self.values.values())

    def equals(self, other: _Sample) -> bool:
        """Whether all elements are the same, and not all of them zero."""
        same = self.values.keys() == other.values.keys() and all(
            torch.equal(one, other.values[name]) for name, one in self.values.items()
        )
        return same and any(bool(one.any()) for one in self.values.values())


def cautions_of(inputs: Sequence[Input], base: Base, stored: Callable[[str], torch.dtype] | None = None) -> Cautions:
    """Look at a sample of the inputs, and at the tokenizers beside them.

    Args:
        inputs: what is merged.
        base: θ0.
        stored: parameter -> dtype that θ0 + τ is to be stored in; None where τ itself is written.
    """
    names = _chosen([one.vector for one in inputs])
    origins: _Origins = {}
    samples = [_sample(one.vector, names, _label(one), origins) for one in inputs]
    lasting = [*_repeated(inputs, samples), *_norms(samples), *_tokenizers(inputs, base)]
    lasting += _other_bases(inputs, base)
    lasting += [line for one in inputs for line in training_cautions(one.vector.metadata, _label(one))]
    estimates = [] if stored is None else _estimated_losses(inputs, samples, base, stored)
    return Cautions(tuple(lasting), tuple(estimates))


def rank_cautions(transform: Transform, vectors: TaskVectors) -> list[str]:
    """Say where a merge that divides a matrix's rank among the vectors has less than one direction for each.

    Args:
        transform: the chain.
        vectors: that it is applied to.
    """
    count = len(vectors.tasks)
    ranks = {name: min(vectors.shape(name)[1:]) for name in vectors if len(vectors.shape(name)) == 3}
    low = {name: rank for name, rank in ranks.items() if 0 < rank < count}
    if not low or not list(parts_of(transform, _DIVIDING)):
        return []
    name = min(low, key=lambda one: low[one])
    return [
        f"{count} vectors share the {low[name]} directions of {name}, and {len(low)} of {len(ranks)} matrices have "
        "fewer directions than there are vectors: a merge that gives each vector its own cannot keep them apart there. "
        "Name these matrices in exclude, or merge fewer vectors."
    ]


def training_cautions(header: Mapping[str, str], label: str) -> list[str]:
    """What a task vector's header says about its training that is known to ruin merges (Yoshida et al. 2026).

    Args:
        header: of the vector's file.
        label: how the lines call the vector.
    """
    found, distil = [], "Distil it first (ConditionModule, temperatures [1, 10]), or train without."
    smoothing, confidence, accuracy = (
        _number(header.get(name, "")) for name in ("label_smoothing", "confidence", "train_accuracy")
    )
    if smoothing > 0:
        sure = f", its mean confidence was {confidence:.2f} at the end" if confidence == confidence else ""
        found.append(
            f"{label} was trained with label smoothing {smoothing:g}{sure}: models of low confidence lose most when "
            f"they are merged. {distil}"
        )
    elif accuracy - confidence > _UNSURE:
        found.append(
            f"{label} has low confidence: {confidence:.2f} on average at the end of training, at an accuracy of "
            f"{accuracy:.2f}: such models lose most when they are merged. {distil}"
        )
    return found


def _number(text: str) -> float:
    """Of a header's entry, which may be anything."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def statistics_cautions(transform: Transform, vectors_fingerprint: str, base_fingerprint: str) -> list[str]:
    """Refuse statistics of another base, and say of which it is not known.

    Args:
        transform: the chain, whose parts may read files of statistics.
        vectors_fingerprint: of the base that the vectors name, which the parts compare themselves; "" if unknown.
        base_fingerprint: of the base that is merged into; "" if it is not known.

    Raises:
        StructureMismatchError: statistics were collected from models of another base.
    """
    found: list[str] = []
    for files in parts_of(transform, StatisticsFiles):
        for task, path in files.items():
            known = LazyTensors(path).metadata.get("base_fingerprint", "")
            expected = vectors_fingerprint or base_fingerprint
            if known and expected and known != expected:
                raise StructureMismatchError(
                    f"{path}: expected statistics for the base model of this merge (fingerprint {expected}), got "
                    f"fingerprint {known}. Collect them from a model of this base."
                )
            if not known or not expected:
                whose = "the statistics do" if not known else "the vectors do"
                found.append(
                    f"{Path(path).name}: whether these statistics of {task} are of the same base model is not known, "
                    f"as {whose} not say; those of another one ruin the merge."
                )
    return found


def _chosen(vectors: Sequence[TaskVector]) -> list[str]:
    """The tensors that are sampled, of every vector that has them."""
    known = dict.fromkeys(name for one in vectors for name in one)
    if len(known) <= _TENSORS:
        return sorted(known)
    return sorted(sorted(known, key=lambda name: hashlib.sha256(name.encode()).digest())[:_TENSORS])


_Origins: TypeAlias = dict[tuple[str, torch.dtype], tuple[LazyMapping, Tensor]]
"""Elements of θ0 that the samples of several vectors start from."""


def _sample(tensors: LazyMapping, names: Sequence[str], label: str, origins: _Origins) -> _Sample:
    sizes = {name: tensors.shape(name).numel() for name in tensors}
    present = [name for name in names if sizes.get(name)]
    values = {}
    for name in present:
        read = tensors.slicer(name)  # the one before goes when this one is there: the file stays open
        dtype = torch.float64 if tensors.dtype(name) == torch.float64 else torch.float32
        if not isinstance(read, DifferenceSlicer):
            values[name] = _elements(read, sizes[name], dtype)
            continue
        origin, part = origins.get((name, dtype), (None, None))
        if part is None or origin is not read.origin:
            part = _elements(read.base, sizes[name], dtype)
            origins[name, dtype] = read.origin, part
        values[name] = _elements(read.tuned, sizes[name], dtype).sub_(part)
    return _Sample(label, {name: sizes[name] for name in present}, values, sum(sizes.values()))


def _elements(read: Slicer, count: int, dtype: torch.dtype) -> Tensor:
    """Elements at a few places of so many; all of them if they are few."""
    out = torch.empty(min(count, _PLACES * _ELEMENTS), dtype=dtype)
    for begin, start, stop in _places(count):
        read(start, stop, out[begin : begin + stop - start])
    return out


def _places(count: int) -> Iterator[tuple[int, int, int]]:
    """Where a place is in the sample, and its first and last element in the tensor."""
    if count <= _PLACES * _ELEMENTS:
        yield 0, 0, count
        return
    for number in range(_PLACES):
        start = number * (count - _ELEMENTS) // (_PLACES - 1)
        yield number * _ELEMENTS, start, start + _ELEMENTS


def _label(one: Input) -> str:
    return one.vector.task or one.path


def _repeated(inputs: Sequence[Input], samples: Sequence[_Sample]) -> Iterator[str]:
    for (first, own), (second, other) in combinations(zip(inputs, samples, strict=True), 2):
        digests = [content_entry(one.digests)[1] for one in (first, second)]
        if digests[0] and digests[0] == digests[1]:
            how = f"their content has the digest {digests[0][:16]}"
        elif own.equals(other):
            how = f"all of {own.count:,} elements that were compared are equal"
        else:
            continue
        names = [_label(first), _label(second)]
        names = names if names[0] != names[1] else [first.path, second.path]
        yield (
            f"{names[0]} and {names[1]} are the same vector, {how}: it counts twice. Remove one, unless that is meant."
        )


def _norms(samples: Sequence[_Sample]) -> Iterator[str]:
    """One line if the longest vector is much longer than the shortest that is not zero."""
    sizes = [(one.norm, one.label) for one in samples if one.norm]
    if len(sizes) < 2:
        return
    (longest, first), (shortest, second) = max(sizes), min(sizes)
    if longest > _RATIO * shortest:
        yield (
            f"‖τ‖ of {first} is {longest:.3g}, {longest / shortest:.1f} times that of {second}, {shortest:.3g} "
            f"(estimated on {samples[0].count:,} elements each): what is merged is mostly {first}. Scale the vectors, "
            "e.g. by a coefficient per task, or learn coefficients."
        )


def _tokenizers(inputs: Sequence[Input], base: Base) -> Iterator[str]:
    """Where tokenizers lie beside the base and an input. They only describe: damaged ones refuse nothing."""
    try:
        own = vocabulary_of(base.files[0].parent) if base.files else None
    except FileFormatError:
        yield "the tokenizer of the base cannot be read, and is not compared with those of the inputs."
        return
    for one in inputs if own is not None else ():
        if one.by_token:  # as rows has asked for: no row meets that of another token
            continue
        try:
            other = vocabulary_of(one.files[0].parent) if one.files else None
        except FileFormatError:
            yield f"the tokenizer of {_label(one)} cannot be read, and is not compared with that of the base."
            continue
        tokens = differing_tokens(own, other) if own is not None and other is not None else []
        if tokens:
            yield (
                f"the tokenizer of {_label(one)} differs from that of the base in {len(tokens):,} tokens "
                f"({first_few(map(repr, tokens))}) of {len(own or ()):,}: their embeddings are merged with those of "
                "other tokens. Merge models of one tokenizer."
            )


def _other_bases(inputs: Sequence[Input], base: Base) -> Iterator[str]:
    """Where an adapter's configuration names another base. Copies have other names, too: that refuses nothing."""
    for one in inputs:
        stated = None if one.adapter is None else one.adapter.settings.get("base_model_name_or_path")
        if isinstance(stated, str) and stated and (own := _other_name(stated, base)):
            yield (
                f"{_label(one)} was trained on {one_line(stated, 200)}, as its adapter_config.json says, and its base "
                f"here is {own}: on other weights an adapter does not do what it was trained to. Use that base, unless "
                "this is a copy of it."
            )


def _other_name(stated: str, base: Base) -> str:
    """What the base is called, if that can be told to be another one than the stated; otherwise ""."""
    # open_clip's addresses are not those of the same weights in transformers, which adapters name.
    if not base.files or isinstance(base, ClipNetwork):
        return ""
    folder, repository = base.files[0].parent, base.repository
    if _is_folder(stated):  # on this machine: whether a download is the same is not known
        known = repository is None and folder.is_dir()
        return str(folder) if known and not folder.samefile(stated) else ""
    entry = model_settings(base.files).get("_name_or_path")
    own = repository or (entry if isinstance(entry, str) and not _is_folder(entry) else "")
    both = _ADDRESS.fullmatch(stated) and _ADDRESS.fullmatch(own)
    if not both or stated.casefold() == own.casefold():
        return ""
    return own if repository else f"{folder}, whose config.json names {own}"


def _is_folder(name: str) -> bool:
    """Of a name that may be anything."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def _estimated_losses(
    inputs: Sequence[Input], samples: Sequence[_Sample], base: Base, stored: Callable[[str], torch.dtype]
) -> Iterator[str]:
    origin = base.parameters
    theta: dict[str, Tensor] = {}
    for one, sample in zip(inputs, samples, strict=True):
        loss, dtypes = RoundingLoss(), set[torch.dtype]()
        for name, update in sample.values.items():
            dtype = stored(name)
            if not is_narrow(dtype):
                continue
            if name not in theta:
                wide = working_dtype(origin.dtype(name), torch.float32)
                theta[name] = _elements(origin.slicer(name), origin.shape(name).numel(), wide)
            part = RoundingLoss.of(theta[name], update, (theta[name] + update).to(dtype))
            loss += part.scaled(sample.sizes[name] / update.numel())
            dtypes.add(dtype)
        if line := rounding_caution(_label(one), list(dtypes), loss, sample.count):
            yield line
