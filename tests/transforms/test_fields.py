"""Fields of transforms by their addresses."""

from __future__ import annotations

import pytest

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    ConsensusMask,
    DisjointMean,
    Drop,
    ElectSign,
    Interpolate,
    LiNeS,
    Override,
    Scale,
    ScaleBlocks,
    Sum,
    TallMask,
    Trim,
    WithOverrides,
    chain,
    consensus_ties,
    lines,
    replace_field,
    ties,
)
from lit_merge.transforms.fields import field_path, field_value

TWO = chain(Scale(1), Trim(0.2), Scale(2))
NESTED = chain(Trim(0.5), ConsensusMask(2, 0.4, chain(Trim(0.2), Sum(), Scale(3))), Scale(0.3))
BY_TASK = chain(Scale({"a": 0.1, "b": 0.2}), ScaleBlocks([0.1, 0.2, 0.3]))
PARTS = WithOverrides(Trim(0.2), [Override(Drop(0.5), names="ln"), Override(chain(Trim(0.1), Scale(1)), blocks=[0])])


@pytest.mark.parametrize(
    ("transform", "field", "value", "expected"),
    [
        (TWO, "density", 0.5, chain(Scale(1), Trim(0.5), Scale(2))),
        (TWO, "Trim.density", 0.5, chain(Scale(1), Trim(0.5), Scale(2))),
        (TWO, "1.density", 0.5, chain(Scale(1), Trim(0.5), Scale(2))),
        (TWO, "1.Trim.density", 0.5, chain(Scale(1), Trim(0.5), Scale(2))),
        (TWO, "0.coefficient", 0.5, chain(Scale(0.5), Trim(0.2), Scale(2))),
        (TWO, "2.coefficient", 0.5, chain(Scale(1), Trim(0.2), Scale(0.5))),
        (Scale(1), "Scale.coefficient", 0.5, Scale(0.5)),
        (NESTED, "coefficient", 9, chain(*NESTED.steps[:2], Scale(9))),
        (NESTED, "Trim.density", 0.9, chain(Trim(0.9), *NESTED.steps[1:])),
        (
            NESTED,
            "ConsensusMask.merge.Trim.density",
            0.9,
            chain(Trim(0.5), ConsensusMask(2, 0.4, chain(Trim(0.9), Sum(), Scale(3))), Scale(0.3)),
        ),
        (NESTED, "merge.density", 0.9, replace_field(NESTED, "ConsensusMask.merge.Trim.density", 0.9)),
        (NESTED, "1.merge.0.density", 0.9, replace_field(NESTED, "ConsensusMask.merge.Trim.density", 0.9)),
        (NESTED, "merge", Sum(), chain(Trim(0.5), ConsensusMask(2, 0.4, Sum()), Scale(0.3))),
        (TallMask(0.4, ties()), "merge.density", 0.7, TallMask(0.4, ties(0.7))),
        (consensus_ties(), "merge.Scale.coefficient", 2, chain(ConsensusMask(2, 0.4, ties(0.2, 2.0)), Scale(1.0))),
        (BY_TASK, "Scale.coefficient.b", 0.9, chain(Scale({"a": 0.1, "b": 0.9}), BY_TASK.steps[1])),
        (BY_TASK, "ScaleBlocks.coefficients.2", 0.9, chain(BY_TASK.steps[0], ScaleBlocks([0.1, 0.2, 0.9]))),
        (PARTS, "transform.density", 0.9, WithOverrides(Trim(0.9), PARTS.overrides)),
        (
            PARTS,
            "WithOverrides.overrides.1.transform.Trim.density",
            0.9,
            WithOverrides(Trim(0.2), [PARTS.overrides[0], Override(chain(Trim(0.9), Scale(1)), blocks=[0])]),
        ),
        (lines(alpha=0.2), "LiNeS.outside", 0.5, chain(Sum(), LiNeS(0.2, 1.0, outside=0.5))),  # None before
        (ConsensusMask(2), "k", 3.0, ConsensusMask(3)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_field_is_replaced(transform, field, value, expected):
    before = repr(transform)
    changed = replace_field(transform, field, value)
    assert changed == expected
    assert repr(changed) == repr(expected)
    assert repr(transform) == before
    assert field_value(changed, field) == value


def test_whole_numbers_stay_whole():
    assert isinstance(field_value(replace_field(ConsensusMask(2), "k", 3.0), "k"), int)
    with pytest.raises(ConfigurationError, match=r"ConsensusMask\.k: expected a whole number"):
        replace_field(ConsensusMask(2), "k", 2.5)


@pytest.mark.parametrize(
    ("transform", "field", "value", "message"),
    [
        (TWO, "coefficient", 1, "got 2 (steps 0, 2; choose with step=…). Its fields are 0.coefficient, density, "),
        (TWO, "Scale.coefficient", 1, "got 2 (steps 0, 2; choose with step=…)"),
        (TWO, "3.coefficient", 1, "got none. Did you mean 0.coefficient? Its fields are 0.coefficient, "),
        (TWO, "densty", 1, "densty: expected exactly one step of chain(Scale(coefficient=1.0), Trim("),
        (TWO, "densty", 1, "got none. Did you mean density? Its fields are "),
        (chain(Sum(), Scale(1)), "LiNeS.coefficient", 1, "Did you mean coefficient? Its fields are coefficient."),
        (consensus_ties(), "density", 0.1, "got none. Did you mean merge.density? Its fields are k, threshold, "),
        (chain(Sum(), DisjointMean()), "density", 0.1, "got none. Its fields are none."),
        (TWO, "1.density.a", 0.1, "got none. "),
        (BY_TASK, "coefficient.c", 0.1, "got none. "),
        (BY_TASK, "coefficients.3", 0.1, "got none. "),
        (BY_TASK, "coefficients.-1", 0.1, "got none. "),
        (TWO, "", 0.1, "got none. "),
        (TWO, "density.", 0.1, "got none. "),
        (Interpolate(), "fraction.real", 0.1, "got none. "),
        (BY_TASK, "coefficient", 0.1, "expected a value of the kind of {'a': 0.1, 'b': 0.2} in Scale(coefficient={"),
        (ElectSign(), "weighting", 0.1, "a value of the kind of 'mass' in ElectSign(weighting='mass'), got 0.1"),
        (Drop(0.5), "rescale", 0.5, "expected a value of the kind of True in Drop("),
        (Drop(0.5), "p", True, "expected a value of the kind of 0.5 in Drop("),
        (NESTED, "merge.density", 7, "Trim.density: expected a finite number at least 0 and at most 1, got 7."),
    ],
    ids=str,
)
def test_what_is_no_field(transform, field, value, message):
    with pytest.raises(ConfigurationError) as error:
        replace_field(transform, field, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_how_a_field_is_reached():
    assert field_path(Scale(1), "coefficient") == ("coefficient",)
    assert field_path(TWO, "Trim.density") == ("steps", 1, "density")
    assert field_path(TWO, "coefficient", step=2) == ("steps", 2, "coefficient")
    assert field_path(BY_TASK, "coefficient.b") == ("steps", 0, "coefficient", "b")
    assert field_path(NESTED, "merge.0.density") == ("steps", 1, "merge", "steps", 0, "density")
