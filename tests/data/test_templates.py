"""Prompt templates: those published with CLIP, the embedded suite's, and the user's own."""

from __future__ import annotations

import pytest

from lit_merge.data import EMBEDDED_TASKS
from lit_merge.data.published.registry import REGISTRY
from lit_merge.data.sources import chosen_templates
from lit_merge.data.templates import GENERIC, TEMPLATES, templates_for
from lit_merge.errors import ConfigurationError


def test_the_published_templates_are_all_there():
    counts = {"sun397": 2, "cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8}
    assert {name: len(TEMPLATES[name]) for name in counts} == counts
    assert set(TEMPLATES) == {*REGISTRY, "generic"}
    assert TEMPLATES["resisc45"][0] == "satellite imagery of {}."
    assert TEMPLATES["resisc45"][-1] == "aerial view of the {}."
    assert TEMPLATES["dtd"][4] == "a photo of the {} texture."
    assert TEMPLATES["mnist"] == ('a photo of the number: "{}".',)


def test_templates_can_all_be_used():
    for name in [*TEMPLATES, *EMBEDDED_TASKS]:
        templates = templates_for(name)
        assert len(set(templates)) == len(templates), name
        assert all(template.format("X").count("X") == 1 for template in templates), name


def test_templates_for():
    assert templates_for("dtd") == templates_for("DTD") == TEMPLATES["dtd"]
    assert templates_for("generic") == GENERIC == ("a photo of a {}.",)
    assert templates_for("signs") == EMBEDDED_TASKS["signs"].templates
    with pytest.raises(ConfigurationError, match=r"got 'eurosatt'\. Did you mean eurosat"):
        templates_for("eurosatt")
    with pytest.raises(ConfigurationError, match="or use 'generic'"):
        templates_for("zzzz")


def test_chosen_templates():
    assert chosen_templates(None, GENERIC) == GENERIC
    assert chosen_templates("mnist", GENERIC) == TEMPLATES["mnist"]
    assert chosen_templates(["a {}.", "the {}."], GENERIC) == ("a {}.", "the {}.")


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ("a {}.", "expected a list or the name of a data set, got the text 'a {}.'. Put it into a list."),
        ([], "expected at least one text, each with exactly one {}, got none. Use e.g. 'a photo of a {}.'."),
        (["a {}.", "a cat", "{} {}"], "each with exactly one {}, got 'a cat', '{} {}'."),
        ([3], "each with exactly one {}, got 3."),
        ("cifar11", "expected one of generic, sun397"),
    ],
)
def test_refused_templates(templates, expected):
    with pytest.raises(ConfigurationError) as error:
        chosen_templates(templates, GENERIC)
    assert str(error.value).startswith("templates: ")
    assert expected in str(error.value)
