"""Rows of vocabularies."""

from __future__ import annotations

import pytest
import torch

from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.pairing.rows import WithRows, plan_rows, vocabulary_names
from lit_merge.errors import StructureMismatchError

BASE = {"u": 0, "a": 1, "b": 2}


def rows(plan):
    return plan.base.tolist(), [one.tolist() for one in plan.inputs]


def test_by_number_without_tokenizers():
    assert rows(plan_rows("base", 3, [5, 2])) == ([0, 1, 2], [[0, 1, 2], [0, 1, -1]])
    assert rows(plan_rows("common", 3, [5, 2])) == ([0, 1], [[0, 1], [0, 1]])
    assert rows(plan_rows("union", 3, [5, 2])) == ([0, 1, 2, -1, -1], [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]])
    assert plan_rows("union", 3, [5], BASE, [None]).note == "5 rows, by number, as a tokenizer is missing"


def test_by_token_where_all_tokenizers_are_there():
    moved = {"b": 0, "u": 1, "x": 2, "a": 3}
    plan = plan_rows("base", 3, [4], BASE, [moved])
    assert rows(plan) == ([0, 1, 2], [[1, 3, 0]])
    plan = plan_rows("union", 3, [4], BASE, [moved])
    assert plan.tokens == {"u": 0, "a": 1, "b": 2, "x": 3}
    assert rows(plan) == ([0, 1, 2, -1], [[1, 3, 0, 2]])
    assert plan.note == "4 rows, by the tokenizers' tokens, 1 of them new ('x')"
    with pytest.raises(
        StructureMismatchError, match=r"rows common: .* got 3 with another \('u', 'a', 'b'\)\. Set rows"
    ):
        plan_rows("common", 3, [4], BASE, [moved])


def test_two_inputs_that_gave_one_number_to_different_tokens():
    plan = plan_rows("union", 3, [4, 4], BASE, [{**BASE, "x": 3}, {**BASE, "y": 3}])
    assert plan.tokens == {**BASE, "x": 3, "y": 4}
    assert rows(plan) == ([0, 1, 2, -1, -1], [[0, 1, 2, 3, -1], [0, 1, 2, -1, 3]])


def test_rows_that_fill_a_table_up_go_by_number():
    padded = plan_rows("base", 5, [4], BASE, [{**BASE, "x": 3}])  # rows 3 and 4 of the base have no token
    assert rows(padded) == ([0, 1, 2, 3, 4], [[0, 1, 2, -1, -1]])


def test_new_rows_start_from_the_mean_of_those_that_have_them():
    base = as_lazy({"embed_tokens.weight": torch.zeros(2, 2), "norm.weight": torch.ones(2)})
    inputs = [as_lazy({"embed_tokens.weight": torch.full((3, 2), float(value))}) for value in (1, 5)]
    plan = plan_rows("union", 2, [3, 3])
    assert vocabulary_names(base) == ["embed_tokens.weight"]
    whole = WithRows(base, ["embed_tokens.weight"], plan.base, list(zip(inputs, plan.inputs, strict=True)))
    assert whole["embed_tokens.weight"].tolist() == [[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]
    assert whole.shape("embed_tokens.weight") == (3, 2)
    out = torch.empty(2)
    whole.slicer("embed_tokens.weight")(4, 6, out)
    assert out.tolist() == [3.0, 3.0]
    assert whole["norm.weight"].tolist() == [1.0, 1.0]
