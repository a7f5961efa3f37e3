from __future__ import annotations

import math

import pytest
import torch

from lit_merge import params
from lit_merge.errors import NonFiniteError, StructureMismatchError
from lit_merge.vectors import TaskVector


@pytest.fixture
def pair():
    return (
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)},
        {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor(0.5)},
    )


def test_arithmetic(pair):
    first, second = pair
    summed = params.add(first, second, coefficient=2.0)
    assert summed["a"].tolist() == [9.0, 0.0]
    assert summed["b"].item() == 4.0
    assert params.scale(first, -2.0)["a"].tolist() == [-2.0, -4.0]
    assert params.dot(first, second) == 4.0 - 2.0 + 1.5
    assert params.norm(first) == math.sqrt(14.0)
    assert first["a"].tolist() == [1.0, 2.0]


def test_dot_and_norm_are_accumulated_in_float64():
    many = {"a": torch.full((10_000,), 0.1, dtype=torch.float32)}
    exact = 10_000 * float(torch.tensor(0.1)) ** 2
    assert params.dot(many, many) == pytest.approx(exact, rel=1e-12)
    assert params.norm(many) ** 2 == pytest.approx(exact, rel=1e-12)


def test_another_structure_is_refused(pair):
    first, _ = pair
    with pytest.raises(StructureMismatchError, match=r"expected the same 2 parameters, got 1 missing \(b\)"):
        params.add(first, {"a": first["a"]})
    with pytest.raises(StructureMismatchError, match=r"1 missing \(b\) and 1 unexpected \(c\)"):
        params.dot(first, {"a": first["a"], "c": first["b"]})
    with pytest.raises(StructureMismatchError, match=r"head: .* got 1 of another shape \(a \(3,\) instead of \(2,\)"):
        params.check_same_structure(first, {"a": torch.zeros(3), "b": torch.tensor(0.0)}, what="head")
    with pytest.raises(StructureMismatchError, match="w0, w1, w2 and 7 more"):
        params.check_same_structure({f"w{i}": torch.zeros(1) for i in range(10)}, {})


@pytest.mark.parametrize(
    ("got", "settings", "expected"),
    [
        ({"a": (2,), "b": ()}, {}, ""),
        ({"a": [2]}, {}, "1 missing (b)"),
        ({"a": (2,)}, {"required": ["a"]}, ""),
        ({"a": (2,), "b": (), "c": (1,)}, {"unexpected": False}, ""),
        ({"a": (3,), "c": (1,)}, {}, "1 missing (b), 1 unexpected (c) and 1 of another shape (a (3,) instead of (2,))"),
        ({"a": (3,), "c": (1,)}, {"required": ()}, "1 unexpected (c) and 1 of another shape (a (3,) instead of (2,))"),
    ],
)
def test_what_differs(got, settings, expected):
    assert params.compare({"a": (2,), "b": ()}, got, **settings) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_counted_exactly(dtype):
    values = torch.ones(3, 1501).mul_(-1e-6).to(dtype)  # bfloat16 counts to 256, float16 to 2,048
    values[1, ::2] = 0
    values[0, 0] = -0.0
    assert params.count_nonzero(values) == int(torch.count_nonzero(values)) == 3 * 1501 - 751 - 1
    assert params.count_nonzero(values[:0]) == 0


def test_a_sum_that_overflows_hides_nothing():
    huge = torch.full((4,), 3e38)
    assert params.is_finite(huge)
    assert not params.is_finite(torch.tensor([torch.inf, -torch.inf]))
    assert not params.is_finite(torch.cat([huge, torch.tensor([torch.nan])]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_is_finite(dtype):
    assert params.is_finite(torch.ones(3).to(dtype))
    assert params.is_finite(torch.ones(0, 3).to(dtype))
    assert not params.is_finite(torch.tensor([[1.0, math.nan]]).to(dtype))
    if dtype != torch.float8_e4m3fn:  # has no infinity
        assert not params.is_finite(torch.tensor([1.0, -math.inf]).to(dtype))


def test_check_finite_names_the_tensors():
    with pytest.raises(NonFiniteError, match=r"θ: expected finite values, got NaN or infinity in b\."):
        params.check_finite({"a": torch.ones(2), "b": torch.tensor(math.nan)}, what="θ")


@pytest.mark.parametrize(
    ("target", "update"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float64), (torch.float64, torch.float32)],
)
def test_add_scaled_keeps_the_target_dtype_and_rounds_once(target, update):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1000, generator=generator).to(target)
    second = torch.randn(1000, generator=generator).to(update)
    working = params.working_dtype(target, update)
    result = params.add_scaled(first, second, 0.3)
    assert torch.equal(result, torch.add(first.to(working), second.to(working), alpha=0.3).to(target))


def test_fingerprint_depends_on_everything_but_the_order(pair):
    first, second = pair
    known = params.fingerprint(first)
    assert len(known) == 16
    assert known == params.fingerprint(dict(reversed(first.items())))
    flipped = {**first, "a": torch.nextafter(first["a"], torch.tensor(9.0))}
    renamed = {"c": first["a"], "b": first["b"]}
    reshaped = {**first, "a": first["a"].view(1, 2)}
    converted = {**first, "b": first["b"].double()}
    prints = [params.fingerprint(item) for item in (first, second, flipped, renamed, reshaped, converted)]
    assert len(set(prints)) == len(prints)


def test_shape_and_dtype_of_lazy_and_plain_mappings(pair):
    for mapping in (pair[0], TaskVector(pair[0])):
        assert params.shape_of(mapping, "a") == (2,)
        assert params.dtype_of(mapping, "b") == torch.float32
