"""Transforms as plain data: what a list of parts stands for, and what is misspelt."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    Chain,
    ConsensusMask,
    DisjointMean,
    ElectSign,
    LiNeS,
    Mean,
    Override,
    Scale,
    Sum,
    Trim,
    WithOverrides,
    lines,
    svc,
    task_arithmetic,
    ties,
)
from lit_merge.transforms.parts import from_parts, known_parts, resolve_transform, with_overrides


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["Sum"], Chain((Sum(),))),
        (
            [{"Trim": {"density": 0.1}}, "ElectSign", {"DisjointMean": None}, {"LiNeS": {"alpha": "norm_ratio"}}],
            Chain((Trim(0.1), ElectSign(), DisjointMean(), LiNeS("norm_ratio"))),
        ),
        ([{"ties": {"density": 0.1}}], ties(0.1)),
        (["weight_average", {"Scale": {"coefficient": {"a": 1, "b": 2}}}], Chain((Mean(), Scale({"a": 1, "b": 2})))),
        ([{"ConsensusMask": {"k": 1, "merge": "Mean"}}], Chain((ConsensusMask(1, merge=Mean()),))),
        ([{"ConsensusMask": {"merge": {"ties": {"density": 0.3}}}}], Chain((ConsensusMask(merge=ties(0.3)),))),
        (
            [{"ConsensusMask": {"merge": ["Sum", {"Scale": {"coefficient": 2}}]}}],
            Chain((ConsensusMask(merge=Chain((Sum(), Scale(2)))),)),
        ),
        ([{"lines": {"merge": "task_arithmetic", "beta": 0.5}}], lines(task_arithmetic(), beta=0.5)),
        ([{"lines": {"merge": None}}], lines()),
    ],
)
def test_parts_are_their_chain(parts, expected):
    assert from_parts(parts) == expected


@pytest.mark.parametrize("name", sorted(known_parts()))
def test_every_part_tells_the_types_of_its_fields(name):
    assert get_type_hints(known_parts()[name]) is not None


def test_transforms_and_recipes_are_parts_and_nothing_else():
    known = known_parts()
    assert {"Sum", "Trim", "LiNeS", "TallMask", "ties", "lines", "analogy"} <= set(known)
    assert not {"Chain", "WithOverrides", "Override", "Transform", "chain", "recipe", "RECIPES"} & set(known)


def test_overrides():
    given = [
        {"names": r"\.ln_", "parts": ["weight_average"]},
        {"blocks": [0, 1], "parts": [{"task_arithmetic": {"coefficient": 0.1}}]},
    ]
    overrides = (Override(Chain((Mean(),)), r"\.ln_"), Override(task_arithmetic(0.1), blocks=(0, 1)))
    assert with_overrides(Sum(), given) == WithOverrides(Sum(), overrides)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ([], r"parts: expected a list of at least one part, got \[\]\. Use e\.g\."),
        ("Sum", r"parts: expected a list of at least one part, got 'Sum'"),
        ({"Sum": {}}, "parts: expected a list of at least one part"),
        (["Summ"], r"part: expected a transform or recipe, got 'Summ'\. Did you mean Sum\?"),
        (["elect_sign"], r"Did you mean ElectSign\?"),
        (["LINES"], r"Did you mean LiNeS or lines\?"),
        ([{"task_arithmetc": {}}], r"Did you mean task_arithmetic\?"),
        (["xyzzy"], r"got 'xyzzy'\. Use one of ACE, CART, CARTDirections, .* and \d+ more\."),
        (["Chain"], "part: expected a transform or recipe, got 'Chain'"),
        (
            [{"Trim": {"densty": 0.1}}],
            r"part Trim: expected fields among density.*got 'densty'\. Did you mean density",
        ),
        ([{"ties": {"coeff": 1}}], r"part ties: expected fields among .*got 'coeff'"),
        ([{"Sum": {"a": 1}}], r"part Sum: expected fields among none, got 'a'\."),
        ([{"Trim": 0.1}], r"part Trim: expected its fields by name, got 0\.1\."),
        ([{"Scale": {}}], r"part Scale: expected a value for coefficient, got none\."),
        ([{"Trim": {"density": 1.5}}], r"Trim\.density: expected a .*at most 1, got 1\.5"),
        ([{"Trim": {"density": "a"}}], r"Trim\.density: .*got 'a'"),
        ([{"Sum": {}, "Mean": {}}], r"parts: expected a name, or one name with its fields, got .*an entry of its own"),
        ([3], "parts: expected a name, or one name with its fields, got 3"),
        ([{3: {}}], "part: expected a transform or recipe, got 3"),
        ([{"ConsensusMask": {"merge": "Summ"}}], r"got 'Summ'\. Did you mean Sum\?"),
        ([{"ConsensusMask": {"merge": []}}], "parts: expected a list of at least one part"),
        ([{"ConsensusMask": {"merge": 3}}], "parts: expected a list of at least one part, got 3"),
    ],
)
def test_what_is_wrong_with_a_part(parts, line):
    with pytest.raises(ConfigurationError, match=line) as error:
        from_parts(parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], r"overrides: expected a list of at least one, got \[\]"),
        ({"names": "a"}, "overrides: expected a list of at least one"),
        (["Sum"], "overrides: expected mappings with parts, and names or blocks, got 'Sum'"),
        ([{"names": "a"}], "overrides: expected mappings with parts"),
        ([{"parts": ["Sum"]}], "Override: expected names or blocks, got neither"),
        (
            [{"parts": ["Sum"], "block": [1]}],
            r"overrides: expected fields among names, blocks, parts, got 'block'.*blocks",
        ),
        ([{"parts": ["Sum"], "names": "("}], r"Override\.names: expected a regular expression, got '\('"),
        ([{"parts": ["Sum"], "blocks": [-1]}], r"Override\.blocks: expected a whole number of at least 0"),
        ([{"parts": ["Summ"], "blocks": [1]}], r"Did you mean Sum\?"),
    ],
)
def test_what_is_wrong_with_an_override(overrides, line):
    with pytest.raises(ConfigurationError, match=line):
        with_overrides(Sum(), overrides)


OWN = """
from dataclasses import dataclass
from lit_merge.transforms import Transform

@dataclass(frozen=True)
class Halve(Transform):
    share: float = 0.5

    def __post_init__(self):
        self._fraction("share")

    def __call__(self, vectors):
        return vectors.map_elements(lambda name, start, stack: stack * self.share, note=self)

number = 3
"""


def test_a_transform_of_ones_own_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_transforms_of_a_test.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    halve = from_parts([{"own_transforms_of_a_test.Halve": {"share": 0.25}}, "Sum"])
    assert repr(halve) == "chain(Halve(share=0.25), Sum())"
    with pytest.raises(ConfigurationError, match=r"own_transforms_of_a_test\.Halve: expected fields among share, got"):
        from_parts([{"own_transforms_of_a_test.Halve": {"shaer": 0.25}}])
    with pytest.raises(ConfigurationError, match=r"got 'own_transforms_of_a_test\.Third', which is not there\. Name a"):
        from_parts(["own_transforms_of_a_test.Third"])
    with pytest.raises(ConfigurationError, match=r"got 'own_transforms_of_a_test\.number', which is something else"):
        from_parts(["own_transforms_of_a_test.number"])
    with pytest.raises(ConfigurationError, match=r"got 'no_such_module\.Halve' \(No module named 'no_such_module'\)"):
        from_parts(["no_such_module.Halve"])


def test_a_recipes_merge_is_written_as_in_a_part():
    for written in ({"ties": {"density": 0.1}}, [{"ties": {"density": 0.1}}], ties(0.1)):
        assert resolve_transform("svc", {"merge": written}, None) == svc(ties(0.1))
    assert resolve_transform("lines", {"merge": "Mean", "beta": 0.5}, None) == lines(Mean(), beta=0.5)
    with pytest.raises(ConfigurationError, match=r"expected a transform or recipe, got 'tise'\. Did you mean ties"):
        resolve_transform("core_space", {"merge": "tise"}, None)
