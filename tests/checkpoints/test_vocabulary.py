"""Vocabularies beside weights: every file that a tokenizer is saved as, and what two of them differ in."""

from __future__ import annotations

import json

import pytest

from lit_merge.checkpoints.vocabulary import differing_tokens, vocabulary_of
from lit_merge.errors import FileFormatError

FORMS = {
    "tokenizer.json": json.dumps(
        {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<c>"}, "x"]}
    ),
    "vocab.json": json.dumps({"a": 0, "b": 1, "<c>": 2}),
    "vocab.txt": "a\nb\n<c>\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_read(name, tmp_path):
    assert vocabulary_of(tmp_path) is None
    (tmp_path / name).write_text(FORMS[name])
    assert vocabulary_of(tmp_path) == {"a": 0, "b": 1, "<c>": 2}
    (tmp_path / "added_tokens.json").write_text('{"<d>": 3}')
    assert ("<d>" in vocabulary_of(tmp_path)) == (name != "tokenizer.json")


def test_pieces_with_scores_are_numbered(tmp_path):
    content = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary_of(tmp_path) == {"<unk>": 0, "a": 1}


def test_tokens_that_differ():
    first, second = {"b": 1, "a": 0, "c": 2}, {"a": 0, "b": 2, "d": 1}
    assert differing_tokens(first, second) == ["b", "c", "d"]
    assert differing_tokens(first, dict(first)) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "expected JSON"),
        ("tokenizer.json", "[]", "expected tokens with numbers"),
        ("vocab.json", '{"a": "b"}', "expected tokens with numbers"),
    ],
)
def test_what_is_damaged_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileFormatError, match=message):
        vocabulary_of(tmp_path)
