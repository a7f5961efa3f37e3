"""Two checkpoints brought under the same names, whatever files and layouts they came in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.activation import IMAGE_TOWER, activations_of, check_activations
from lit_merge.checkpoints.adapters.additions import is_embedding, model_settings
from lit_merge.checkpoints.adapters.additions import is_head as is_output_head
from lit_merge.checkpoints.layouts.linearised_towers import linearised_towers
from lit_merge.checkpoints.layouts.towers import Recognised, image_tower, recognise, written_as
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.opening import OpenedCheckpoint, open_checkpoint
from lit_merge.checkpoints.pairing.differences import Rules, fit_to_base, heads_advice, parameter_names
from lit_merge.checkpoints.pairing.ties import tied_names
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Selected, Slicer, Structure
from lit_merge.naming import is_head, is_running_statistic, is_vocabulary, number_of_blocks
from lit_merge.params import check_same_structure

if TYPE_CHECKING:
    from lit_merge.checkpoints.adapters.reading import Adapter

__all__ = ["Checkpoint", "Names", "Pair", "pair_of"]

Checkpoint = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]
"""Name -> tensor, a module, or the path of whatever :func:`lit_merge.checkpoints.opening.open_checkpoint` opens."""

Names = Literal["auto", "own", "image_tower"]
"""Under which names a difference is taken, see :meth:`lit_merge.vectors.TaskVector.from_checkpoints`."""

_PROJECTION = "visual_projection.weight"  # which a CLIPVisionModel of transformers does without
_ENCODER = "encoder."  # what names of the network begin with in checkpoints of our own modules


@dataclass(frozen=True)
class Pair:
    """What a task vector is made of.

    Attributes:
        base: θ0 and what belongs to it.
        tuned: θ under the same names, of the parameters that it has; τ itself where the file holds that.
        is_difference: whether ``tuned`` is τ.
        image_tower: whether the names are those of an image tower.
        own_base: θ0 as the fine-tuned file itself has it, if it does; τ is the difference from that.
        started_from: fingerprint of the θ0 that the fine-tuned file says it started from; empty if it says nothing.
        notes: what was done about the differences that are normal, in words.
        absent: parameters that the fine-tune has not, or that are left out; nothing changed there.
        statistics: running means and variances of the fine-tune, under the base's names.
        heads: what only the fine-tune has of a head, under its own names.
        used: the patterns of ``leave_out`` that fitted a name.
        activation: of an image tower's blocks, which no weight shows; empty if nothing beside the weights says it.
        adapter: what τ is made of, if that is an adapter of peft, without heads that are left out or kept.
    """

    base: Mapping[str, Tensor]
    tuned: Mapping[str, Tensor]
    is_difference: bool = False
    image_tower: bool = False
    own_base: LazyMapping | None = None
    started_from: str = ""
    notes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    statistics: LazyMapping | None = None
    heads: LazyMapping | None = None
    used: frozenset[str] = frozenset()
    activation: str = ""
    adapter: Adapter | None = None


def pair_of(
    pretrained: Checkpoint,
    finetuned: Checkpoint,
    names: Names = "auto",
    rules: Rules | None = None,
    config: Mapping[str, Any] | None = None,
) -> Pair:
    """Bring two checkpoints under the same names; nothing but headers is read, and small buffers and tied tables.

    Args:
        pretrained: θ0.
        finetuned: θ, or what stands for τ.
        names: see :data:`Names`.
        rules: what a user says about differences.
        config: the model's ``config.json``, which says whether its head is its embedding; by default the one beside a
            file of θ0.

    Raises:
        ConfigurationError: a checkpoint is neither a mapping of tensors nor a path, or ``names`` is unknown.
        FileFormatError: a file is damaged, or holds no weights.
        StructureMismatchError: they cannot be brought under the same names, or were trained with different activation
            functions.
    """
    if names not in get_args(Names):
        raise ConfigurationError(f"names: expected {' or '.join(get_args(Names))}, got {names!r}. Use one of them.")
    base, tuned = _opened(pretrained, "pretrained"), _opened(finetuned, "finetuned")
    first, second = (activations_of(one) if isinstance(one, OpenedCheckpoint) else {} for one in (base, tuned))
    check_activations(first, second, _named(tuned, "finetuned"), _named(base, "pretrained"))
    pair = _pair(base, tuned, names, rules, config)
    activation = first.get(IMAGE_TOWER) or second.get(IMAGE_TOWER) or ""
    return replace(pair, activation=activation) if pair.image_tower else pair


def _pair(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    names: Names,
    rules: Rules | None,
    config: Mapping[str, Any] | None,
) -> Pair:
    started_from = ""
    if isinstance(tuned, OpenedCheckpoint):
        if tuned.adapter is not None:
            return _adapted(base, tuned, names, rules, config)
        if tuned.recognised.layout == "linearised":
            return _linearised(base, tuned, names)
        started_from = str(tuned.metadata.get("base_fingerprint") or tuned.other.get("base_fingerprint") or "")
        if tuned.holds_difference:
            return _of_linearised_run(base, tuned, names, started_from)
    if not _by_towers(base, tuned, names):
        return _fitted(_own_names(base, tuned), tuned, rules)
    tower = _tower(base)
    finetuned_tower, notes = _tower_like(tuned, tower)
    _check_size(tower, finetuned_tower, _named(base, "pretrained"), _named(tuned, "finetuned"))
    pair = _fitted(tower, finetuned_tower, rules)
    return replace(pair, image_tower=True, started_from=started_from, notes=(*notes, *pair.notes))


def _fitted(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rules: Rules | None) -> Pair:
    fitted = fit_to_base(base, tuned, rules)
    return Pair(
        base,
        fitted.tuned if isinstance(tuned, LazyMapping) else {name: fitted.tuned[name] for name in fitted.tuned},
        notes=fitted.notes,
        absent=fitted.absent,
        statistics=fitted.statistics,
        heads=fitted.heads,
        used=fitted.used,
    )


def _opened(checkpoint: Checkpoint, what: str) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, nn.Module):
        return {name: value.detach() for name, value in checkpoint.state_dict().items()}
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = open_checkpoint(checkpoint)
    if isinstance(checkpoint, OpenedCheckpoint):
        checkpoint.require_weights(difference=what == "finetuned")
        return checkpoint
    if not isinstance(checkpoint, Mapping):
        raise ConfigurationError(
            f"{what}: expected a mapping name -> tensor, a module or the path of a checkpoint, got "
            f"{type(checkpoint).__name__}. Use dict(model.named_parameters())."
        )
    if not isinstance(checkpoint, LazyMapping):
        others = [
            f"{name} ({type(value).__name__})" for name, value in checkpoint.items() if not hasattr(value, "shape")
        ]
        if others:
            raise ConfigurationError(
                f"{what}: expected a mapping name -> tensor, got {first_few(others)}. Pass the state dict inside it."
            )
    return checkpoint


def _named(tensors: Mapping[str, Tensor], what: str) -> str:
    return str(tensors.path) if isinstance(tensors, OpenedCheckpoint) else what


def _is_clip(tensors: Mapping[str, Tensor]) -> bool:
    if isinstance(tensors, OpenedCheckpoint):
        return tensors.is_clip
    return recognise(tensors).layout not in ("own", "linearised")


def _goes_by_tower(base: Mapping[str, Tensor], names: Names) -> bool:
    return names == "image_tower" or (names == "auto" and _is_clip(base))


def _by_towers(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], names: Names) -> bool:
    if names != "auto":
        return names == "image_tower"
    same = len(base) == len(tuned) and all(name in tuned for name in base)
    if same and not isinstance(base, OpenedCheckpoint) and not isinstance(tuned, OpenedCheckpoint):
        return False
    clips = _is_clip(base), _is_clip(tuned)
    return all(clips) if same else any(clips)


def _own_names(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The base as it is, or without the prefix that a program has put before all of its names, and not the other's."""
    if isinstance(base, OpenedCheckpoint) and set(base) != set(tuned):
        whole = base.without_prefix()
        return whole if len(whole) == len(base) else base  # a head beside the prefix belongs to the model
    return base


def _tower(tensors: Mapping[str, Tensor]) -> LazyMapping:
    if isinstance(tensors, OpenedCheckpoint):
        return tensors.image_tower()
    return image_tower(tensors, recognise(tensors))


def _tower_like(tuned: Mapping[str, Tensor], base: LazyMapping) -> tuple[LazyMapping, tuple[str, ...]]:
    """The fine-tuned image tower; of a CLIPVisionModel, which ends before the projection, with that of the base."""
    found = tuned.recognised if isinstance(tuned, OpenedCheckpoint) else recognise(tuned)
    if found.layout != "transformers" or found.prefix + _PROJECTION in tuned or "proj" not in base:
        return _tower(tuned), ()
    projection = Selected(written_as(base, "transformers"), {found.prefix + _PROJECTION: _PROJECTION})
    whole = _Joined(as_lazy(tuned), projection)
    note = "the fine-tuned checkpoint has no projection; its difference there is zero"
    return image_tower(whole, recognise(whole)), (note,)


def _check_size(base: LazyMapping, tuned: LazyMapping, base_name: str, tuned_name: str) -> None:
    """Two sizes of vision transformers differ in every tensor: say it by their size."""
    sizes = [
        (number_of_blocks(one), one.shape("class_embedding")[0]) for one in (base, tuned) if "class_embedding" in one
    ]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        (blocks, width), (other_blocks, other_width) = sizes
        raise StructureMismatchError(
            f"{tuned_name}: expected an image tower of {blocks} blocks of width {width} as in {base_name}, got "
            f"{other_blocks} blocks of width {other_width}. Give the pre-trained model of the same architecture."
        )


def _adapted(
    base: Mapping[str, Tensor],
    tuned: OpenedCheckpoint,
    names: Names,
    rules: Rules | None,
    config: Mapping[str, Any] | None,
) -> Pair:
    assert tuned.adapter is not None
    if config is None:
        config = model_settings(base.files) if isinstance(base, OpenedCheckpoint) else {}
    lazy, rules = as_lazy(base), rules or Rules()
    if _goes_by_tower(base, names):
        sorted_out = _sorted_out(tuned.adapter, lazy, rules)
        tower = image_tower(sorted_out.adapter.difference(lazy, config), _recognised(base))
        pair = Pair(_tower(base), tower, is_difference=True, image_tower=True)
        return _with_heads(pair, sorted_out, sorted_out.left)
    # A head that is stored beside the embedding, and equal to it, is that tensor again, unless the model says not.
    ties = {} if config.get("tie_word_embeddings") is False else tied_names(base)
    once = Selected(lazy, {name: name for name in lazy if name not in ties})
    sorted_out = _sorted_out(tuned.adapter, once, rules)
    difference = sorted_out.adapter.difference(once, config)
    patterns = rules.leave_out
    fitting = {name: [one for one in patterns if fnmatchcase(name, one)] for name in parameter_names(base, ties)}
    left = dict.fromkeys([*(name for name, fits in fitting.items() if fits), *sorted_out.left])
    measured = [name for name in sorted_out.adapter.changes(once, config) if is_running_statistic(name)]
    structure = {name: (lazy.shape(name), lazy.dtype(name)) for name in measured}
    pair = Pair(
        base,
        Selected(difference, {name: name for name, fits in fitting.items() if not fits and name in difference}),
        is_difference=True,
        statistics=Computed(structure, partial(_moved, lazy, difference)) if measured else None,
        used=frozenset(one for fits in fitting.values() for one in fits),
    )
    return _with_heads(pair, sorted_out, list(left))


@dataclass(frozen=True)
class _SortedOut:
    """An adapter without what the base has no place for, and what became of that."""

    adapter: Adapter
    left: list[str]  # under the base's names where it has them, otherwise the adapter's
    kept: LazyMapping
    used: frozenset[str]


def _sorted_out(adapter: Adapter, base: LazyMapping, rules: Rules) -> _SortedOut:
    """Leave out or keep the heads that were saved with an adapter and do not fit the base, as the rules say.

    Raises:
        StructureMismatchError: the rules say nothing of one.
    """
    found = adapter.misfits(base, rules.leave_out)
    fitting = {
        name: [one for one in rules.leave_out if fnmatchcase(name, one) or (target and fnmatchcase(target, one))]
        for name, target in found.items()
    }
    rest = {name: target for name, target in found.items() if not fitting[name]}
    absent = [name for name, target in rest.items() if not target]
    kept = [*adapter.saved(absent)] if rules.keep_heads else []
    # The head of a language model may be its embedding: that has messages of its own, as have other vocabularies.
    if not rules.keep_heads and not all(is_output_head(name) or is_embedding(name) for name in absent):
        raise StructureMismatchError(
            f"{adapter.path}: expected a base with the heads that were saved with the adapter, got none named "
            f"{first_few(absent)}. {heads_advice(absent, rules, kept=True)}."
        )
    whole = adapter.saved(rest)
    others = {name: target for name, target in rest.items() if target and is_head(name) and not is_vocabulary(name)}
    if others:
        shapes = [f"{name} {tuple(whole.shape(name))} instead of {tuple(base.shape(others[name]))}" for name in others]
        raise StructureMismatchError(
            f"{adapter.path}: expected the heads that were saved with the adapter in the base's shapes, got "
            f"{first_few(shapes)}. {heads_advice(others, rules, kept=False)}."
        )
    left = [name for name in found if fitting[name]]
    used = frozenset(one for fits in fitting.values() for one in fits)
    fitted = adapter.without([*left, *kept])
    return _SortedOut(fitted, [found[name] or name for name in left], adapter.saved(kept), used)


def _with_heads(pair: Pair, sorted_out: _SortedOut, left: Sequence[str]) -> Pair:
    """The pair of an adapter, with what is said of all that is left out, and the heads that are kept."""
    notes, kept = [*sorted_out.adapter.notes], list(sorted_out.kept)
    if left:
        notes.append(f"left out as asked: {len(left)} tensors ({first_few(left, 3)})")
    if kept:
        notes.append(f"a head of its own: {len(kept)} tensors ({first_few(kept, 3)}), written for itself")
    used = pair.used | sorted_out.used
    return replace(pair, notes=tuple(notes), heads=sorted_out.kept, used=used, adapter=sorted_out.adapter)


def _recognised(tensors: Mapping[str, Tensor]) -> Recognised:
    return tensors.recognised if isinstance(tensors, OpenedCheckpoint) else recognise(tensors)


def _moved(base: LazyMapping, difference: LazyMapping, name: str) -> Tensor:
    return base[name] + difference[name].to(base.dtype(name))


def _linearised(base: Mapping[str, Tensor], tuned: OpenedCheckpoint, names: Names) -> Pair:
    """θ0 and θ that a linearised encoder's file holds side by side, under the names of the base's image tower."""
    if names == "own":
        raise ConfigurationError(
            f"{tuned.path}: expected parameters with names, got the numbered ones of a linearised encoder. Take its "
            "difference from the CLIP that it started from, under the names of the image tower."
        )
    tower = _tower(base)
    try:
        initial, final = linearised_towers(tuned, tower)
    except StructureMismatchError as error:
        raise StructureMismatchError(f"{tuned.path}: {error}") from error
    return Pair(tower, final, image_tower=True, own_base=initial)


def _of_linearised_run(base: Mapping[str, Tensor], tuned: OpenedCheckpoint, names: Names, started_from: str) -> Pair:
    """τ, which a linearised module of our own has as its parameters under the encoder's names; zero where none is."""
    as_tower = _goes_by_tower(base, names)
    initial = _tower(base) if as_tower else as_lazy(base)
    stored = Selected(tuned, {name.removeprefix(_ENCODER): name for name in tuned if name.startswith(_ENCODER)})
    structure = {
        name: (initial.shape(name), torch.float32) for name in initial if initial.dtype(name).is_floating_point
    }
    trained = {name: structure[name] for name in stored if name in structure}
    check_same_structure(Computed(trained, initial.__getitem__), stored, f"{tuned.path}: what was trained")
    return Pair(
        initial, Computed(structure, partial(_or_zeros, stored, structure)), True, as_tower, started_from=started_from
    )


def _or_zeros(stored: LazyMapping, structure: Structure, name: str) -> Tensor:
    return stored[name].float() if name in stored else torch.zeros(structure[name][0])


class _Joined(LazyMapping):
    """Two mappings with different names, as one."""

    def __init__(self, first: LazyMapping, second: LazyMapping) -> None:
        self._first, self._second = first, second

    def _of(self, name: str) -> LazyMapping:
        return self._second if name in self._second else self._first

    def __getitem__(self, name: str) -> Tensor:
        return self._of(name)[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from self._second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""
        return self._of(name).dtype(name)

    def slicer(self, name: str) -> Slicer:
        """As the mapping that has it reads parts."""
        return self._of(name).slicer(name)
