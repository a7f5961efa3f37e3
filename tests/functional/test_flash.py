"""Attention's kernels against the definition in float64: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.functional import linearize, tangents

pytest.importorskip("triton")
flash = importlib.import_module("lit_merge.functional.flash")
GPU = torch.cuda.is_available()  # elsewhere tests/conftest.py asks for Triton's interpreter


def attend(*args, **settings):
    """The kernels, with arguments and results on the CPU."""
    if not GPU:
        return flash.attend(*args, **settings)
    args, settings = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, (args, settings))
    return tuple(one.cpu() for one in flash.attend(*args, **settings))


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    """Triton 3.6's makes no loop of numpy 2.4's arrays of one element."""
    one = torch.ones(1, 1, 1, 16)
    try:
        attend(one, one, one, one, one, one)
    except Exception as error:
        if GPU or "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip(f"Triton's interpreter does not fit numpy: {error}")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """The interpreter's time goes by blocks, and no shared memory limits them."""
    if not GPU:
        monkeypatch.setattr(flash, "_blocks", lambda *_: flash._Blocks(64, 64, 4, 1))


def by_definition(q, k, v, dq, dk, dv, mask=None, causal=False, scale=None):
    """Softmax and its derivative, written out in float64; a query that sees nothing gives zeros."""
    q, k, v, dq, dk, dv = (None if one is None else one.double() for one in (q, k, v, dq, dk, dv))
    groups = q.shape[1] // k.shape[1]
    k, v, dk, dv = (None if one is None else one.repeat_interleave(groups, 1) for one in (k, v, dk, dv))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.mT
    if mask is not None:
        scores = scores + (torch.where(mask, 0, -torch.inf) if mask.dtype == torch.bool else mask)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    slope = torch.zeros_like(weights)
    slope = slope if dq is None else slope + scale * dq @ k.mT
    slope = slope if dk is None else slope + scale * q @ dk.mT
    slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))
    return weights @ v, slope @ v if dv is None else slope @ v + weights @ dv


def draw(batch, heads, length, width, dtype=torch.float32, gradient=False):
    """Strided as a packed projection leaves it: [length, batch, heads, width]."""
    drawn = torch.randn(length, batch, heads, width).to(dtype).permute(1, 2, 0, 3)
    return drawn.requires_grad_(gradient)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def errors(q, k, v, dq, dk, dv, *args, **settings):
    """Of value, tangent, and the gradients of the tangents, relative in norm."""
    y, dy = attend(q, k, v, dq, dk, dv, *args, **settings)
    expected, tangent = by_definition(q, k, v, dq, dk, dv, *args, **settings)
    assert not y.requires_grad
    assert y.dtype == dy.dtype == q.dtype
    g, trained = torch.randn(dy.shape).to(dy.dtype), [one for one in (dq, dk, dv) if one is not None]
    pairs = zip(torch.autograd.grad(dy, trained, g), torch.autograd.grad(tangent, trained, g.double()), strict=True)
    return [error(y, expected), error(dy, tangent), *(error(*pair) for pair in pairs)]


PADDING = torch.tensor([25, 13]).view(2, 1, 1, 1) > torch.arange(40)
BLIND = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(0)) < 0.5
BLIND[:, :, 3] = False  # this query sees no key
CASES = {  # batch, heads, heads of keys, queries, keys, width
    "ViT-B/32": ((1, 1, 1, 50, 50, 64), {}),
    "CLIP's text": ((1, 1, 1, 77, 77, 64), {"causal": True}),
    "ViT-B/16": ((1, 1, 1, 197, 197, 64), {}),
    "long keys": ((1, 1, 1, 3, 2048, 32), {}),
    "long queries": ((1, 1, 1, 2048, 3, 32), {}),
    "width 128": ((1, 2, 2, 70, 33, 128), {"scale": 0.3}),
    "width 80": ((1, 1, 1, 17, 33, 80), {}),
    "more queries than keys, causal": ((1, 1, 1, 70, 33, 32), {"causal": True}),
    "grouped, causal": ((1, 4, 2, 40, 40, 8), {"causal": True}),
    "padding": ((2, 1, 1, 30, 40, 32), {"mask": PADDING}),
    "padding, causal": ((2, 2, 1, 40, 40, 32), {"mask": PADDING, "causal": True}),
    "a query that sees nothing": ((2, 1, 1, 30, 40, 32), {"mask": BLIND}),
    "added": ((1, 2, 2, 30, 40, 32), {"mask": torch.where(BLIND, 0.5, -torch.inf)[1, 0]}),
    "lowest number added": ((2, 1, 1, 30, 40, 32), {"mask": torch.where(BLIND, 0, torch.finfo(torch.float32).min)}),
}


LONG = {"long keys": (16, 512), "long queries": (512, 16)}


@pytest.mark.parametrize("case", CASES)
def test_the_definition(case, monkeypatch):
    if case.startswith("long") and not GPU:
        monkeypatch.setattr(flash, "_blocks", lambda *_: flash._Blocks(*LONG[case], 4, 1))
    torch.manual_seed(1)
    (batch, heads, shared, queries, keys, width), settings = CASES[case]
    shapes = [(batch, heads, queries, width), (batch, shared, keys, width), (batch, shared, keys, width)]
    values, moves = ([draw(*shape, gradient=gradient) for shape in shapes] for gradient in (False, True))
    assert max(errors(*values, *moves, **settings)) < 2e-6


@pytest.mark.parametrize("given", ["q", "k", "v", "qk", "qv", "kv"])
def test_parts_without_a_tangent(given):
    torch.manual_seed(2)
    values = [draw(1, 2, length, 16) for length in (20, 33, 33)]
    moves = [
        draw(*one.shape, gradient=True) if name in given else None for name, one in zip("qkv", values, strict=True)
    ]
    assert max(errors(*values, *moves)) < 2e-6


def test_one_gradient_of_many_tangents():
    torch.manual_seed(3)
    values, moves = [draw(1, 1, 20, 16) for _ in range(3)], [draw(1, 1, 20, 16) for _ in range(3)]
    for index in range(3):
        chosen = [one.clone().requires_grad_(place == index) for place, one in enumerate(moves)]
        gradients = [pair(*values, *chosen)[1].square().sum() for pair in (attend, by_definition)]
        gradients = [torch.autograd.grad(each, chosen[index])[0] for each in gradients]
        assert error(*(each.double() for each in gradients)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    """The tangents have much in common, which must cancel before it is rounded."""
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16 products")
    torch.manual_seed(4)
    values, moves = ([draw(1, 1, 100, 32, dtype, gradient) for _ in range(3)] for gradient in (False, True))
    with torch.no_grad():
        moves[1] += 20 * torch.randn(32, dtype=dtype)  # every key the same way: the weights do not change
    got = errors(*values, *moves)
    assert max(got) < 8 * torch.finfo(dtype).eps, got


def test_gradients_and_tangents_of_any_stride():
    torch.manual_seed(5)
    q = draw(1, 2, 17, 16).expand(3, -1, -1, -1)  # as learned queries of a pool are
    k, v = draw(3, 2, 16, 17).mT, draw(3, 2, 17, 16)
    moves = [torch.randn(3, 2, 17, 16).requires_grad_() for _ in range(3)]
    results = [pair(q, k, v, *moves)[1].sum() for pair in (attend, by_definition)]
    for got, expected in zip(*(torch.autograd.grad(each, moves) for each in results), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def calls(monkeypatch):
    """The rule uses the kernels; what they were called with."""
    seen, kernels = [], attend

    class Module:
        @staticmethod
        def attend(*args):
            seen.append(args)
            return kernels(*args)

    monkeypatch.setitem(sys.modules, flash.__name__, Module)
    monkeypatch.setattr(tangents, "_flash_runs", lambda device: True)
    return seen


def pairs_of(evaluate, *shapes, dtype=torch.float32):
    with forward_ad.dual_level(), tangents.FastTangents():
        duals = [forward_ad.make_dual(*torch.randn(2, *shape, dtype=dtype)) for shape in shapes]
        return tuple(forward_ad.unpack_dual(evaluate(*duals)))


HEADS = ((2, 2, 5, 8),) * 3
RULE = {
    "plain": (HEADS, {}, 1),
    "causal": (HEADS, {"is_causal": True, "scale": 0.3}, 1),
    "mask": (HEADS, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, 1),
    "groups": (((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {"enable_gqa": True}, 1),
    "three axes": (((2, 5, 8),) * 3, {}, 0),
    "wide": (((1, 1, 5, 160),) * 3, {}, 0),
    "another width of values": (((1, 1, 5, 8), (1, 1, 5, 8), (1, 1, 5, 6)), {}, 0),
    "no keys": (((1, 1, 5, 8), (1, 1, 0, 8), (1, 1, 0, 8)), {}, 0),
}


@pytest.mark.parametrize("case", RULE)
def test_the_rule_uses_it_where_it_can(calls, case):
    shapes, settings, used = RULE[case]

    def evaluate(*duals):
        return F.scaled_dot_product_attention(*duals, **settings)

    torch.manual_seed(6)
    got = pairs_of(evaluate, *shapes)
    assert len(calls) == used
    torch.manual_seed(6)
    with sdpa_kernel(SDPBackend.MATH):  # torch's own switch
        expected = pairs_of(evaluate, *shapes)
    assert len(calls) == used
    torch.testing.assert_close(got, expected)


def test_the_rule_is_dense_otherwise(calls):
    pairs_of(F.scaled_dot_product_attention, *HEADS, dtype=torch.float64)
    pairs_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), *HEADS)
    pairs_of(lambda *duals: F.scaled_dot_product_attention(*duals), *HEADS, (5, 5))  # a mask with a tangent
    assert not calls


def test_a_network_with_it_is_the_same(calls):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2)

        def forward(self, x):
            x = self.norm(x)
            return x + self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(7)
    module, x = nn.Sequential(Encoder(), Encoder()), torch.randn(9, 2, 16)
    tau = {name: torch.randn_like(value).requires_grad_() for name, value in module.named_parameters()}
    results = []
    for kernel in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(kernel):
            value, tangent = linearize(module, {}, tau, x)
        results.append([value, tangent, *torch.autograd.grad(tangent.square().sum(), list(tau.values()))])
    assert len(calls) == 2
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_no_triton_is_no_error(monkeypatch):
    """A GPU on which nothing compiles: the dense rule, and a warning once."""
    broken = type("Broken", (), {"attend": staticmethod(lambda *args: exec("raise OSError('no C compiler')"))})
    monkeypatch.setitem(sys.modules, flash.__name__, broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **settings: torch.ones(*shape, **settings))
    device = torch.device("cuda", 7)
    with pytest.warns(UserWarning, match=r"Triton compiles nothing on cuda:7 \(OSError: no C compiler\), so the mat"):
        assert tangents._flash_runs(device) is False
    assert tangents._flash_runs(device) is False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert tangents._flash_runs(torch.device("cuda", 8)) is False
    assert tangents._flash_runs(torch.device("cpu")) is False
    tangents._flash_runs.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_matrix_of_weights_on_a_gpu():
    """Of 1 GiB in bfloat16 per matrix: two heads of 16,384 tokens."""
    torch.manual_seed(8)
    own = nn.MultiheadAttention(128, 2, bias=False, device="cuda", dtype=torch.bfloat16)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = own

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(16384, 1, 128, device="cuda", dtype=torch.bfloat16)
    tau = {name: torch.randn_like(value).requires_grad_() for name, value in Attend().named_parameters()}
    torch.cuda.reset_peak_memory_stats()
    linearize(Attend(), {}, tau, x)[1].square().mean().backward()
    assert torch.cuda.max_memory_allocated() < 200 * 2**20
