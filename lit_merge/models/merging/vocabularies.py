"""A base and its inputs with the same rows in the tables of their vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_merge.checkpoints.opening import OpenedCheckpoint
from lit_merge.checkpoints.pairing.alignment import align
from lit_merge.checkpoints.pairing.differences import RowRule
from lit_merge.checkpoints.pairing.rows import WithRows, plan_rows, vocabulary_names
from lit_merge.checkpoints.vocabulary import Vocabulary, vocabulary_of
from lit_merge.errors import ConfigurationError
from lit_merge.files.lazy import LazyMapping, Selected
from lit_merge.models.network import Base, FileBase

__all__ = ["SameRows", "same_rows"]


@dataclass(frozen=True)
class SameRows:
    """What became of a base and its inputs.

    Attributes:
        base: θ0 with the rows of the merge.
        tensors: position of an input -> its tensors with those rows; inputs that had them already are left out.
        entries: what changes in the base's configuration.
        tokenizer: the folder whose tokenizer is that of the merge; None for the base's.
        notes: what was done, in words.
        added: what was added to the base beside rows, and why, in words.
    """

    base: Base
    tensors: Mapping[int, LazyMapping] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def same_rows(base: Base, inputs: Sequence[OpenedCheckpoint], rule: RowRule) -> SameRows:
    """Bring the tables of all vocabularies to the same rows; nothing but headers and tokenizers is read.

    Args:
        base: θ0, as weights.
        inputs: what is merged; task vectors and adapters have the base's rows.
        rule: which rows, see :func:`~lit_merge.checkpoints.pairing.rows.plan_rows`.

    Raises:
        ConfigurationError: the base is a network.
        StructureMismatchError: tokens have other numbers, and the rule goes by number.
    """
    if not isinstance(base, FileBase):
        raise ConfigurationError(f"rows: expected a base that is given as weights, got {base.name}. Set base.")
    tables = [name for name in vocabulary_names(base.opened) if name not in base.ties]
    found: dict[int, dict[str, str]] = {}
    for position, one in enumerate(inputs):
        names = align(base.opened, one).names if one.adapter is None and not _is_vector(one) else {}
        found[position] = {name: names[name] for name in tables if name in names}
    positions = [position for position, names in found.items() if names]
    sizes = {base.opened.shape(name)[0] for name in tables}
    if not positions or len(sizes) != 1:
        return SameRows(base)
    (base_rows,) = sizes
    counts = [inputs[position].shape(next(iter(found[position].values())))[0] for position in positions]
    own, others = _tokens(base.opened), [_tokens(inputs[position]) for position in positions]
    if set(counts) == {base_rows} and all(one is None or own is None or one == own for one in others):
        return SameRows(base)
    plan = plan_rows(rule, base_rows, counts, own, others)
    fill = [
        (Selected(inputs[position], found[position]), index)
        for position, index in zip(positions, plan.inputs, strict=True)
    ]
    whole = WithRows(base.opened, [*tables, *(copy for copy in base.ties if copy in base.opened)], plan.base, fill)
    every = torch.arange(plan.rows)
    tensors = {
        position: WithRows(
            inputs[position],
            list(found[position].values()),
            index,
            [(Selected(whole, {theirs: mine for mine, theirs in found[position].items()}), every)],
        )
        for position, index in zip(positions, plan.inputs, strict=True)
    }
    same = [position for position, one in zip(positions, others, strict=True) if plan.tokens and one == plan.tokens]
    changed = plan.tokens is not None and plan.tokens != own
    notes = [f"vocabularies of {base_rows} and {', '.join(map(str, counts))} rows: {plan.note}"]
    if changed and not same:
        notes.append("no tokenizer has all of these tokens: the base's is written, add the new ones to it")
    return SameRows(
        base.with_tensors(whole),
        tensors,
        {"vocab_size": plan.rows} if plan.rows != base_rows else {},
        inputs[same[0]].path if changed and same else None,
        tuple(notes),
    )


def _is_vector(opened: OpenedCheckpoint) -> bool:
    return opened.metadata.get("format", "").startswith("lit-merge/task-vector/")


def _tokens(opened: OpenedCheckpoint) -> Vocabulary | None:
    return vocabulary_of(opened.path) if opened.path.is_dir() else None
