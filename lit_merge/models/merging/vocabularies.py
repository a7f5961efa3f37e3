"""A base and its inputs with the same rows in the tables of their vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_merge.checkpoints.opening import OpenedCheckpoint
from lit_merge.checkpoints.pairing.alignment import align
from lit_merge.checkpoints.pairing.differences import RowRule
from lit_merge.checkpoints.pairing.rows import RowPlan, WithRows, plan_rows, vocabulary_names
from lit_merge.checkpoints.vocabulary import Vocabulary, vocabulary_of
from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.lazy import LazyMapping, Selected
from lit_merge.models.network import Base, FileBase

__all__ = ["FittingTokenizer", "SameRows", "same_rows"]


@dataclass(frozen=True)
class FittingTokenizer:
    """Whose tokenizer has exactly the tokens of the rows of a merge.

    Attributes:
        name: of the model, as it was given; empty for the base.
        folder: that it lies in; None for the base's.
        refusal: why no model has one; empty if one has.
        without_row: tokens that are in a tokenizer and have no row of the merge.
    """

    name: str = ""
    folder: Path | None = None
    refusal: str = ""
    without_row: tuple[str, ...] = ()

    def describe(self) -> str:
        """It in words."""
        if self.refusal:
            return f"no model's tokenizer has exactly the tokens of these rows: {self.refusal}"
        whose = f"that of {self.name}" if self.name else "the base's"
        count = len(self.without_row)
        lost = (
            f"; {count} token{'s have' if count != 1 else ' has'} no row ({first_few(map(repr, self.without_row))})"
            if count
            else ""
        )
        return f"the tokenizer of these rows is {whose}{lost}"


@dataclass(frozen=True)
class SameRows:
    """What became of a base and its inputs.

    Attributes:
        base: θ0 with the rows of the merge.
        tensors: position of an input -> its tensors with those rows; inputs that had them already are left out.
        entries: what changes in the base's configuration.
        tokenizer: whose has the tokens of these rows; None where the base has none, or all is as it was.
        by_token: positions of the inputs of whose rows every one was merged with that of the same token.
        notes: what was done, in words.
        added: what was added to the base beside rows, and why, in words.
    """

    base: Base
    tensors: Mapping[int, LazyMapping] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: FittingTokenizer | None = None
    by_token: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def same_rows(base: Base, inputs: Sequence[OpenedCheckpoint], rule: RowRule, names: Sequence[str]) -> SameRows:
    """Bring the tables of all vocabularies to the same rows; nothing but headers and tokenizers is read.

    Args:
        base: θ0, as weights.
        inputs: what is merged; task vectors and adapters have the base's rows.
        rule: which rows, see :func:`~lit_merge.checkpoints.pairing.rows.plan_rows`.
        names: what the inputs are called in words, in the same order.

    Raises:
        ConfigurationError: the base is a network.
        StructureMismatchError: tokens have other numbers, and the rule goes by number.
    """
    if not isinstance(base, FileBase):
        raise ConfigurationError(f"rows: expected a base that is given as weights, got {base.name}. Set base.")
    tables = [name for name in vocabulary_names(base.opened) if name not in base.ties]
    found: dict[int, dict[str, str]] = {}
    for position, one in enumerate(inputs):
        aligned = align(base.opened, one).names if one.adapter is None and not _is_vector(one) else {}
        found[position] = {name: aligned[name] for name in tables if name in aligned}
    positions = [position for position, aligned in found.items() if aligned]
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
    called, folders = zip(*((names[position], inputs[position].path) for position in positions), strict=True)
    tokenizer = _fitting(rule, plan, own, list(zip(called, folders, others, strict=True)))
    notes = [f"vocabularies of {base_rows} and {', '.join(map(str, counts))} rows: {plan.note}"]
    by_token = {
        position
        for position, one, count in zip(positions, others, counts, strict=True)
        if one is not None and own is not None and _goes_by_token(rule, plan, own, one, min(base_rows, count))
    }
    return SameRows(
        base.with_tensors(whole),
        tensors,
        {"vocab_size": plan.rows} if plan.rows != base_rows else {},
        tokenizer,
        frozenset(by_token),
        (*notes, *([tokenizer.describe()] if tokenizer is not None else [])),
    )


def _goes_by_token(rule: RowRule, plan: RowPlan, own: Vocabulary, other: Vocabulary, shared: int) -> bool:
    """Whether the rows of two tables were found by their tokens, or have the same ones under the same numbers."""
    if rule != "common" and plan.tokens is not None:
        return True
    first, second = ({pair for pair in one.items() if pair[1] < shared} for one in (own, other))
    return first == second


def _fitting(
    rule: RowRule,
    plan: RowPlan,
    own: Vocabulary | None,
    others: Sequence[tuple[str, Path, Vocabulary | None]],
) -> FittingTokenizer | None:
    """The base's tokenizer if it has exactly the tokens of the rows, otherwise the first of an input that has.

    Where rows went by number, all tokenizers together say which tokens they have: a number may have been given to
    different tokens then, and no tokenizer has both.
    """
    if own is None:
        return None
    known = [own, *(one for _, _, one in others if one is not None)]
    if rule == "base":
        wanted = {pair for pair in own.items() if pair[1] < plan.rows}
    elif rule == "union" and plan.tokens is not None:
        wanted = set(plan.tokens.items())
    else:
        wanted = {pair for one in known for pair in one.items() if pair[1] < plan.rows}
    tokens = {token for token, _ in wanted}
    lost = tuple(dict.fromkeys(token for one in known for token in one if token not in tokens))
    if rule == "base" or own.items() == wanted:
        return FittingTokenizer(without_row=lost)
    for name, folder, one in others:
        if one is not None and one.items() == wanted:
            return FittingTokenizer(name, folder, without_row=lost)
    said = [f"the base's {_misfit(own, wanted)}"]
    said += [f"that of {name} {_misfit(one, wanted)}" for name, _, one in others if one is not None]
    return FittingTokenizer(refusal="; ".join(said), without_row=lost)


def _misfit(one: Vocabulary, wanted: Set[tuple[str, int]]) -> str:
    """How a tokenizer differs from the one that is wanted, with the tokens."""
    missing = [token for token, number in sorted(wanted, key=lambda pair: pair[1]) if one.get(token) != number]
    named = {token for token, _ in wanted}
    found = {
        "lacks": [token for token in missing if token not in one],
        "has under another number": [token for token in dict.fromkeys(missing) if token in one],
        "has without a row": [token for token in one if token not in named],
    }
    return ", ".join(f"{what} {first_few(map(repr, tokens))}" for what, tokens in found.items() if tokens)


def _is_vector(opened: OpenedCheckpoint) -> bool:
    return opened.metadata.get("format", "").startswith("lit-merge/task-vector/")


def _tokens(opened: OpenedCheckpoint) -> Vocabulary | None:
    return vocabulary_of(opened.path) if opened.path.is_dir() else None
