"""Which differences between a base and a fine-tune are normal, decided by rule, and said; all others are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pairing.alignment import align
from lit_merge.checkpoints.pairing.ties import equal_tensors, tied_names
from lit_merge.errors import StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping, Selected
from lit_merge.naming import block_of, is_buffer, is_head, is_running_statistic, is_vocabulary
from lit_merge.params import compare, dtype_of

__all__ = ["Fitted", "RowRule", "Rules", "fit_to_base", "heads_advice", "parameter_names"]

RowRule = Literal["base", "common", "union"]
"""Which rows of a vocabulary's tables a merge has, if the checkpoints differ in their number."""

Shapes = Mapping[str, torch.Size]

_SMALL = 1 << 20  # elements of a buffer that is compared


@dataclass(frozen=True)
class Rules:
    """What a user says about differences.

    Attributes:
        leave_out: patterns of names, as a shell has them (``classifier.*``), whose change is left out.
        keep_heads: leave out the heads that only a fine-tune has; they are written for themselves.
        rows: what to do about tables of different vocabularies; None refuses them.
        offered: the settings that the user has for this, which messages may name: not every command has all.
    """

    leave_out: tuple[str, ...] = ()
    keep_heads: bool = False
    rows: RowRule | None = None
    offered: tuple[str, ...] = ("leave_out", "heads", "rows")


@dataclass(frozen=True)
class Fitted:
    """A fine-tune under the names of its base.

    Attributes:
        tuned: θ, of the parameters that it has.
        absent: parameters of the base that it has not, or that are left out: nothing changed there.
        notes: what was done about each kind of difference, in words.
        statistics: running means and variances, under the base's names.
        heads: what only the fine-tune has of a head, under its own names.
        used: the patterns that fitted a name.
    """

    tuned: LazyMapping
    absent: tuple[str, ...]
    notes: tuple[str, ...]
    statistics: LazyMapping
    heads: LazyMapping
    used: frozenset[str]


def parameter_names(base: Mapping[str, Tensor], ties: Mapping[str, str] | None = None) -> list[str]:
    """The parameters among a model's tensors: floating-point, measured by no layer, and each once.

    Args:
        base: a model's tensors.
        ties: its :func:`~lit_merge.checkpoints.pairing.ties.tied_names`; found out if they are not given.
    """
    ties = tied_names(base) if ties is None else ties
    return [
        name
        for name in base
        if (dtype_of(base, name).is_floating_point or dtype_of(base, name).is_complex)
        and name not in ties
        and not is_running_statistic(name)
        and not is_buffer(name)
    ]


def fit_to_base(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rules: Rules | None = None,
    ties: Mapping[str, str] | None = None,
    what: str = "fine-tuned checkpoint",
) -> Fitted:
    """Bring a fine-tune under the names of its base, and decide about every difference by rule.

    Normal, and said in the notes: other prefixes and spellings; integer tensors and buffers that only one of them has
    or that differ (the base's are used); parameters that the fine-tune has not (nothing changed there); equal copies
    of a tied table; heads, if they are left out or kept.

    Args:
        base: θ0 with all that belongs to it.
        tuned: θ in the same way.
        rules: what the user says.
        ties: names of the base that are others again; found out if they are not given.
        what: how messages call the fine-tune.

    Raises:
        StructureMismatchError: it has parameters that the base has not, shapes or kinds of dtype differ, a tie is
            broken, or it is of another depth; the message names the setting that leaves it out.
    """
    rules, ties = rules or Rules(), tied_names(base) if ties is None else ties
    lazy_base, lazy = as_lazy(base), as_lazy(tuned)
    alignment = align(base, tuned)
    names, notes = dict(alignment.names), [note] if (note := alignment.describe()) else []
    parameters = parameter_names(base, ties)
    known = set(parameters)
    _refuse_quantised([name for name in base if name not in known], lazy_base, what)
    taken = set(names.values())
    extra = [name for name in tuned if name not in taken]
    left = _left_out(rules.leave_out, {**{name: names.get(name, name) for name in parameters}, **{n: n for n in extra}})
    left_extra = {name for name in extra if name in left.names}
    extra = [name for name in extra if name not in left_extra]
    notes += _buffers(lazy_base, lazy, names, extra)
    extra = [name for name in extra if lazy.dtype(name).is_floating_point and not _measured(name)]
    extra, tied_notes = _ties(lazy_base, lazy, names, extra, parameters, ties, what)
    notes += tied_notes
    heads = [name for name in extra if is_head(name)]
    present = {name: names[name] for name in parameters if name in names and name not in left.names}
    surplus = [name for name in extra if not (rules.keep_heads and name in heads)]
    merged = [name for name in parameters if name not in left.names]
    others = {name: other for name, other in names.items() if name not in known}
    _refuse(lazy_base, lazy, merged, others, present, surplus, what, rules)
    absent = [name for name in parameters if name not in present]
    _refuse_other_depth(parameters, [name for name in absent if name not in left.names], what)
    if left.names:
        notes.append(f"left out as asked: {len(left.names)} tensors ({first_few(sorted(left.names), 3)})")
    if heads and rules.keep_heads:
        notes.append(f"a head of its own: {len(heads)} tensors ({first_few(heads, 3)}), written for itself")
    if missing := [name for name in absent if name not in left.names]:
        notes.append(f"no {len(missing)} of {len(parameters)} parameters ({first_few(missing, 3)}): unchanged there")
    statistics = {name: names[name] for name in base if is_running_statistic(name) and name in names}
    return Fitted(
        tuned=Selected(lazy, present),
        absent=tuple(absent),
        notes=tuple(notes),
        statistics=Selected(lazy, statistics),
        heads=Selected(lazy, {name: name for name in heads}),
        used=left.patterns,
    )


@dataclass(frozen=True)
class _LeftOut:
    names: frozenset[str]
    patterns: frozenset[str]


def _left_out(patterns: Sequence[str], names: Mapping[str, str]) -> _LeftOut:
    """Patterns fit the base's names or the checkpoint's own."""
    found = [
        (name, pattern)
        for name, own in names.items()
        for pattern in patterns
        if fnmatchcase(name, pattern) or fnmatchcase(own, pattern)
    ]
    return _LeftOut(frozenset(name for name, _ in found), frozenset(pattern for _, pattern in found))


def _measured(name: str) -> bool:
    return is_buffer(name) or is_running_statistic(name)


def _buffers(base: LazyMapping, tuned: LazyMapping, names: Mapping[str, str], extra: Sequence[str]) -> list[str]:
    """What is said about buffers: those of the base are used, bit for bit."""
    mine = [name for name in base if is_buffer(name) or not base.dtype(name).is_floating_point]
    absent = [name for name in mine if name not in names]
    others = [
        name
        for name in mine
        if name in names and base.shape(name).numel() <= _SMALL and not _same_values(base, name, tuned, names[name])
    ]
    more = [name for name in extra if is_buffer(name) or not tuned.dtype(name).is_floating_point]
    notes = []
    if absent:
        notes.append(f"without {_buffer_words(absent)}, which no training changes: the base's")
    if others:
        notes.append(f"other values of {_buffer_words(others)} than the base: the base's")
    if more:
        notes.append(f"{_buffer_words(more)} that the base has not: not written")
    return notes


def _same_values(base: LazyMapping, name: str, tuned: LazyMapping, other: str) -> bool:
    if base.dtype(name) == torch.bool and tuned.dtype(other) != torch.bool:
        return tuned.shape(other) == base.shape(name) and torch.equal(base[name], tuned[other].bool())
    return equal_tensors(base, name, tuned, other)


def _buffer_words(names: Sequence[str]) -> str:
    return f"{len(names)} buffer{'s' * (len(names) > 1)} ({first_few(names, 2)})"


def _ties(
    base: LazyMapping,
    tuned: LazyMapping,
    names: dict[str, str],
    extra: list[str],
    parameters: Sequence[str],
    ties: Mapping[str, str],
    what: str,
) -> tuple[list[str], list[str]]:
    """Tables that are stored twice in one of the two; what is left of the extra names, and what there is to say."""
    notes, broken = [], []
    for copy, first in ties.items():  # two names of the base are one tensor
        if copy not in names:
            continue
        if first not in names:
            names[first] = names[copy]
        elif not equal_tensors(tuned, names[first], tuned, names[copy]):
            broken.append(names[copy])
    tables = [name for name in parameters if is_vocabulary(name) and len(base.shape(name)) == 2]
    for name in tables:  # it is stored under the other of its names
        same = [one for one in extra if is_vocabulary(one) and tuned.shape(one) == base.shape(name)]
        if name not in names and same and all(equal_tensors(tuned, same[0], tuned, one) for one in same):
            names[name] = same[0]
            extra = [one for one in extra if one not in same]
            notes.append(f"{same[0]} is the base's {name}")
    for one in [name for name in extra if is_vocabulary(name)]:  # the fine-tune stores a tied table twice
        twins = [names[name] for name in tables if name in names and tuned.shape(names[name]) == tuned.shape(one)]
        if any(equal_tensors(tuned, one, tuned, twin) for twin in twins):
            extra = [name for name in extra if name != one]
            notes.append(f"{one} is a copy of a tied table: not counted twice")
        elif twins:
            broken.append(one)
    if broken:
        raise StructureMismatchError(
            f"{what}: expected {first_few(broken)} to be the embedding again, as in the base, whose head is tied to "
            f"it, got other values. Set leave_out to [{', '.join(broken)}] to go without this head, or merge on a base "
            "whose head is not tied."
        )
    return extra, notes


def _refuse(
    base: LazyMapping,
    tuned: LazyMapping,
    parameters: Sequence[str],
    others: Mapping[str, str],
    present: Mapping[str, str],
    extra: Sequence[str],
    what: str,
    rules: Rules,
) -> None:
    """Refuse what no rule covers, with the way out."""
    shapes = {name: base.shape(name) for name in present}
    got = {name: tuned.shape(other) for name, other in present.items()}
    pairs = {**present, **{name: other for name, other in others.items() if not is_buffer(name)}}
    dtypes = {name: (base.dtype(name), tuned.dtype(other)) for name, other in pairs.items()}
    kinds = [
        f"{name} ({first} and {second})"
        for name, (first, second) in dtypes.items()
        if first.is_floating_point != second.is_floating_point or first.is_complex or second.is_complex
    ]
    if kinds:
        raise StructureMismatchError(
            f"{what}: expected real floating-point values in both, got {first_few(kinds)}. "
            "Convert both checkpoints to the same kind of dtype."
        )
    if not extra and shapes == got:
        return
    expected = {name: base.shape(name) for name in parameters}
    found = compare(expected, {**got, **{name: tuned.shape(name) for name in extra}})
    wrong = [name for name in present if shapes[name] != got[name]]
    raise StructureMismatchError(
        f"{what}: expected the same {len(parameters)} parameters, got {found}. "
        f"{_advice(wrong, extra, shapes, got, rules)}"
    )


def heads_advice(names: Iterable[str], rules: Rules, kept: bool) -> str:
    """The settings by which heads that do not fit are left out or written for themselves; without a full stop.

    Args:
        names: of the heads' parameters.
        rules: whose settings the user has.
        kept: whether they can be written for themselves: the base has none of their names.
    """
    patterns = sorted({name.rpartition(".")[0] + ".*" for name in names})
    keep = ", or heads to keep to write them for themselves" if kept and "heads" in rules.offered else ""
    return f"Set leave_out to [{', '.join(patterns)}] to merge all but the heads{keep}"


def _advice(wrong: Sequence[str], extra: Sequence[str], shapes: Shapes, got: Shapes, rules: Rules) -> str:
    """What to set: ``wrong`` are of another shape, ``extra`` are what the base has not."""
    rows = [name for name in wrong if is_vocabulary(name) and got[name][1:] == shapes[name][1:]]
    heads = [name for name in (*wrong, *extra) if is_head(name) and name not in rows]
    if {*rows, *heads} != {*wrong, *extra}:
        return "Use parameters of the same architecture, or set leave_out to what is not to be merged."
    also = "set rows to base, common or union, as the vocabularies differ"
    if "rows" not in rules.offered:
        also = "merge them by lit-merge merge, whose setting rows is for vocabularies that differ"
    if not heads:
        return f"{also[0].upper()}{also[1:]}."
    ways = heads_advice(heads, rules, not any(name in heads for name in wrong))
    return f"{ways}{f'; {also}' if rows else ''}."


def _refuse_other_depth(parameters: Sequence[str], absent: Sequence[str], what: str) -> None:
    """A checkpoint that is whole but for the last blocks is one of another depth, no partial fine-tune."""
    gone, dropped, tails = set(absent), set[str](), True
    stacks: dict[bool, dict[int, list[str]]] = {False: {}, True: {}}  # an encoder or the only one, and a decoder
    for name in parameters if absent else ():
        if (block := block_of(name)) is not None:
            stacks["decoder" in name.split(".")].setdefault(block, []).append(name)
    for blocks in stacks.values():
        lacking = sorted(block for block, names in blocks.items() if gone.issuperset(names))
        dropped.update(name for block in lacking for name in blocks[block])
        left = len(blocks) - len(lacking)
        tails = tails and (not lacking or (left > 0 and lacking == list(range(left, len(blocks)))))
    if dropped and tails and gone == dropped:
        total = sum(map(len, stacks.values()))
        fewer = sum(not gone.issuperset(names) for blocks in stacks.values() for names in blocks.values())
        raise StructureMismatchError(
            f"{what}: expected the {total} blocks of the base, got a whole network of {fewer}. Use the base model of "
            "the same depth."
        )


def _refuse_quantised(others: Sequence[str], base: LazyMapping, what: str) -> None:
    """Integer matrices are weights that somebody quantised: the base's would be written in silence.

    Eight-bit floats with a scale beside them are quantised, too: sums of either are no sums of the weights.
    """
    packed = [
        name
        for name in others
        if base.dtype(name) in (torch.int8, torch.uint8, torch.int32)
        and len(base.shape(name)) == 2
        and base.shape(name).numel() > _SMALL // 1024
        and not is_buffer(name)
        and name.rpartition(".")[2] in ("weight", "qweight", "weight_packed", "qzeros")
    ]
    packed += [
        name
        for name in base
        if base.dtype(name).is_floating_point
        and base.dtype(name).itemsize == 1
        and (f"{name}_scale" in base or f"{name}_scale_inv" in base)
    ]
    if packed:
        raise StructureMismatchError(
            f"{what}: expected a base with floating-point weights, got {len(packed)} quantised ones "
            f"({first_few(packed)}). Use the model before it was quantised."
        )
