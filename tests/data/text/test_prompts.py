"""Prompts: what a field may be, and that nothing of a template is ever evaluated."""

from __future__ import annotations

import pytest

from lit_merge.data.text.prompts import FILTERS, Prompt, cell, is_missing
from lit_merge.errors import ConfigurationError, DataError

ROW = {
    "text": "A bee flies.",
    "label": 1,
    "score": 3.8,
    "choices": {"text": ["the sun ", "the moon"], "label": ["A", "B"]},
    "question": "Which is _____",
    "empty": "",
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text}", "A bee flies."),
        ("a {{{text}}} b", "a {A bee flies.} b"),
        ("no field", "no field"),
        ("{choices.text.1}", "the moon"),
        ("{choices.label}", "['A', 'B']"),
        ("{label}", "1"),
        ("{text|lower}", "a bee flies."),
        ("{text|upper|first}", "A"),
        ("{text|rest|strip|strip:.}", "bee flies"),
        ("{score|decimals:1}|{score|decimals:0}", "3.8|4"),
        ("{choices.text|join:\n - }", "the sun\n - the moon"),
        ("{choices.text|lettered:\n}", "A. the sun \nB. the moon"),
        ("{question|blank_or:choices.text}?", "Which is the sun or the moon?"),
        ("{text|strip:.|blank_or:choices.text}", "A bee flies the sun or the moon"),
        ("{empty}", ""),
    ],
)
def test_fields_and_filters(template, expected):
    assert Prompt(template)(ROW) == expected


def test_columns_and_constant():
    prompt = Prompt("Is {a.b} like {c|lower}? {a}")
    assert prompt.columns == ("a", "c")
    assert prompt.constant == "Is  like ? "
    assert set(FILTERS) == {"lower", "upper", "first", "rest", "strip", "join", "lettered", "decimals", "blank_or"}


@pytest.mark.parametrize(
    "hostile",
    [
        "{0.__class__}",
        "{text.__class__}",
        "{text.__class__.__mro__}",
        "{__import__('os').system('id')}",
        "{text[0]}",
        "{text!r}",
        "{text:>10}",
        "{self._parts}",
        "{choices.text.0.__len__}",
        "{choices.keys}",
    ],
)
def test_nothing_is_evaluated(hostile):
    def used():
        prompt = Prompt(hostile)
        prompt.check(ROW, "my.csv")
        return prompt(ROW)

    with pytest.raises((ConfigurationError, DataError)) as refused:
        used()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text", r"prompt: expected fields such as \{text\}, got a brace that is not closed in '\{text'\. Write"),
        ("text}", r"got a closing brace alone"),
        ("{}", r"got a field without a name"),
        ("{text|shout}", r"prompt: expected filters among lower, .*, got 'shout' in \{text\|shout\}"),
    ],
)
def test_wrong_templates(template, message):
    with pytest.raises(ConfigurationError, match=message):
        Prompt(template)


def test_wrong_rows():
    with pytest.raises(ConfigurationError, match=r"columns of my.csv \(text, .*\), got 'txet'\. Did you mean text\?"):
        Prompt("{txet}").check(ROW, "my.csv")
    with pytest.raises(DataError, match=r"^field choices.text.7: expected a key or a position in every row"):
        Prompt("{choices.text.7}")(ROW)
    with pytest.raises(DataError, match=r"expected a value of text that decimals fits, got 'A bee flies.'"):
        Prompt("{text|decimals:1}")(ROW)
    assert cell(ROW, "choices.label.1") == "B"


def test_missing_cells():
    assert [is_missing(one) for one in (None, float("nan"), "", " \n", "nan", 0, 0.0, False)] == [True] * 4 + [
        False
    ] * 4
