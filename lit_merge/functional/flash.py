"""Attention's value and tangent in Triton, block by block: no matrix of weights, of its tangent or of its gradient.

With ``S = s q kᵀ + m``, ``P = softmax(S)`` and ``Ṡ = s (q̇ kᵀ + q k̇ᵀ)`` the pair is ``y = P v`` and
``ẏ = (P ⊙ (Ṡ - c)) v + P v̇``, where ``c`` is every row's mean of ``Ṡ`` under ``P``. Forward, one pass over the keys
keeps the maximum and the sum of the exponentials (Milakov & Gimelshein 2018) and, in the same way, ``c``: when a block
moves it by δ, what was summed of ``ẏ`` changes by ``-δ`` times what was summed of ``y``. The terms are centred from the
first, and do not cancel, whatever the tangents have in common.

``ẏ`` is linear in the tangents, so its transpose is the ordinary backward pass of attention, which sees values alone
(Dao et al. 2022, algorithm 4): with the gradient ``g`` of ``ẏ`` and ``δ = rowsum(g ⊙ y)``, ``G = P ⊙ (g vᵀ - δ)`` gives
``s G k``, ``s Gᵀ q`` and ``Pᵀ g``.

Importing this file imports triton.
"""

# mypy: disallow-untyped-defs=False
# Triton gives the arguments of its kernels their types.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

__all__ = ["attend"]

_VARYING = ["heads", "length_q", "length_k"]  # a new length compiles nothing


@triton.jit
def _block(at, stride, positions, length, dims, width):
    """Rows ``positions`` of a matrix ``[length, width]``, zeros beyond its edges."""
    inside = (positions < length)[:, None] & (dims < width)[None, :]
    return tl.load(at + positions[:, None].to(tl.int64) * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _store(at, stride, positions, length, dims, width, block):
    inside = (positions < length)[:, None] & (dims < width)[None, :]
    tl.store(at + positions[:, None].to(tl.int64) * stride + dims[None, :], block.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _masked(
    scores, row, column, length_q, length_k, mask_at, mask_row, mask_column, CAUSAL: tl.constexpr, MASK: tl.constexpr
):
    """The scores with the mask, and -inf where a query must not look; ``row`` and ``column`` broadcast to them."""
    seen = (row < length_q) & (column < length_k)
    if MASK != 0:
        entries = mask_at + row.to(tl.int64) * mask_row + column.to(tl.int64) * mask_column
        values = tl.load(entries, mask=seen, other=0)
        if MASK == 1:
            seen = seen & (values != 0)
        else:
            scores += values.to(tl.float32)
    if CAUSAL:
        seen = seen & (column <= row)
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, mask_ptr, y_ptr, dy_ptr, top_ptr, inverse_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_h, mask_q, mask_k, y_b, y_h, y_n,
    heads, length_q, length_k, width, scale,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    OF_Q: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    blocks = tl.cdiv(length_q, QUERIES)
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    b, h = (head // heads).to(tl.int64), head % heads
    shared = h // GROUPS  # the head of keys and values
    dims = tl.arange(0, WIDTH)
    q = _block(q_ptr + b * q_b + h * q_h, q_n, rows, length_q, dims, width)
    dq = q
    if OF_Q:
        dq = _block(dq_ptr + b * dq_b + h * dq_h, dq_n, rows, length_q, dims, width)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES], tl.float32)
    y = tl.zeros([QUERIES, WIDTH], tl.float32)
    dy = tl.zeros([QUERIES, WIDTH], tl.float32)
    end = length_k
    if CAUSAL:
        end = tl.minimum(length_k, (tl.program_id(0) % blocks + 1) * QUERIES)
    for first in range(0, end, KEYS):
        columns = first + tl.arange(0, KEYS)
        k = _block(k_ptr + b * k_b + shared * k_h, k_n, columns, length_k, dims, width)
        v = _block(v_ptr + b * v_b + shared * v_h, v_n, columns, length_k, dims, width)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = _masked(
            scores, rows[:, None], columns[None, :], length_q, length_k, mask_ptr + b * mask_b + h * mask_h,
            mask_q, mask_k, CAUSAL, MASK,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: all weights are zero
        p = tl.exp(scores - level[:, None])
        kept = tl.exp(top - level)
        top = higher
        total = total * kept + tl.sum(p, 1)
        y = y * kept[:, None]
        dy = dy * kept[:, None]
        if OF_Q or OF_K:
            tangent = tl.zeros([QUERIES, KEYS], tl.float32)
            if OF_Q:
                tangent = tl.dot(dq, tl.trans(k), tangent, input_precision=PRECISION)
            if OF_K:
                dk = _block(dk_ptr + b * dk_b + shared * dk_h, dk_n, columns, length_k, dims, width)
                tangent = tl.dot(q, tl.trans(dk), tangent, input_precision=PRECISION)
            tangent = tangent * scale - mean[:, None]
            move = tl.sum(p * tangent, 1) / tl.where(total == 0.0, 1.0, total)
            mean += move
            dy -= move[:, None] * y
            weighted = p * (tangent - move[:, None])
            dy = tl.dot(weighted.to(v.dtype), v, dy, input_precision=PRECISION)
        p = p.to(v.dtype)
        if OF_V:
            dv = _block(dv_ptr + b * dv_b + shared * dv_h, dv_n, columns, length_k, dims, width)
            dy = tl.dot(p, dv, dy, input_precision=PRECISION)
        y = tl.dot(p, v, y, input_precision=PRECISION)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    _store(y_ptr + b * y_b + h * y_h, y_n, rows, length_q, dims, width, y * inverse[:, None])
    _store(dy_ptr + b * y_b + h * y_h, y_n, rows, length_q, dims, width, dy * inverse[:, None])
    row = head.to(tl.int64) * length_q + rows
    tl.store(top_ptr + row, tl.where(top == float("-inf"), 0.0, top), mask=rows < length_q)
    tl.store(inverse_ptr + row, inverse, mask=rows < length_q)


@triton.jit(do_not_specialize=_VARYING)
def _backward_queries(
    q_ptr, k_ptr, v_ptr, mask_ptr, y_ptr, top_ptr, inverse_ptr, g_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, y_b, y_h, y_n, g_b, g_h, g_n,
    dq_b, dq_h, dq_n,
    heads, length_q, length_k, width, scale,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, OF_Q: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``δ`` of one block of queries, and the gradient of their tangents."""
    blocks = tl.cdiv(length_q, QUERIES)
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    b, h = (head // heads).to(tl.int64), head % heads
    shared = h // GROUPS
    dims = tl.arange(0, WIDTH)
    g = _block(g_ptr + b * g_b + h * g_h, g_n, rows, length_q, dims, width)
    y = _block(y_ptr + b * y_b + h * y_h, y_n, rows, length_q, dims, width)
    delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
    row = head.to(tl.int64) * length_q + rows
    tl.store(delta_ptr + row, delta, mask=rows < length_q)
    if OF_Q:
        q = _block(q_ptr + b * q_b + h * q_h, q_n, rows, length_q, dims, width)
        top = tl.load(top_ptr + row, mask=rows < length_q, other=0.0)
        inverse = tl.load(inverse_ptr + row, mask=rows < length_q, other=0.0)
        dq = tl.zeros([QUERIES, WIDTH], tl.float32)
        end = length_k
        if CAUSAL:
            end = tl.minimum(length_k, (tl.program_id(0) % blocks + 1) * QUERIES)
        for first in range(0, end, KEYS):
            columns = first + tl.arange(0, KEYS)
            k = _block(k_ptr + b * k_b + shared * k_h, k_n, columns, length_k, dims, width)
            v = _block(v_ptr + b * v_b + shared * v_h, v_n, columns, length_k, dims, width)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = _masked(
                scores, rows[:, None], columns[None, :], length_q, length_k, mask_ptr + b * mask_b + h * mask_h,
                mask_q, mask_k, CAUSAL, MASK,
            )  # fmt: skip
            p = tl.exp(scores - top[:, None]) * inverse[:, None]
            score = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(score.to(k.dtype), k, dq, input_precision=PRECISION)
        _store(dq_ptr + b * dq_b + h * dq_h, dq_n, rows, length_q, dims, width, dq * scale)


@triton.jit(do_not_specialize=_VARYING)
def _backward_keys(
    q_ptr, k_ptr, v_ptr, mask_ptr, top_ptr, inverse_ptr, g_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, g_b, g_h, g_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, length_q, length_k, width, scale,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the tangents of one block of keys and values; scores and weights are transposed here."""
    blocks = tl.cdiv(length_k, KEYS)
    head = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * KEYS
    columns = start + tl.arange(0, KEYS)
    shared_heads = heads // GROUPS
    b, shared = (head // shared_heads).to(tl.int64), head % shared_heads
    dims = tl.arange(0, WIDTH)
    k = _block(k_ptr + b * k_b + shared * k_h, k_n, columns, length_k, dims, width)
    v = _block(v_ptr + b * v_b + shared * v_h, v_n, columns, length_k, dims, width)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    begin = 0
    if CAUSAL:
        begin = start // QUERIES * QUERIES
    for member in range(GROUPS):
        h = shared * GROUPS + member
        for first in range(begin, length_q, QUERIES):
            rows = first + tl.arange(0, QUERIES)
            q = _block(q_ptr + b * q_b + h * q_h, q_n, rows, length_q, dims, width)
            g = _block(g_ptr + b * g_b + h * g_h, g_n, rows, length_q, dims, width)
            row = (b * heads + h) * length_q + rows
            top = tl.load(top_ptr + row, mask=rows < length_q, other=0.0)
            inverse = tl.load(inverse_ptr + row, mask=rows < length_q, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            scores = _masked(
                scores, rows[None, :], columns[:, None], length_q, length_k, mask_ptr + b * mask_b + h * mask_h,
                mask_q, mask_k, CAUSAL, MASK,
            )  # fmt: skip
            p = tl.exp(scores - top[None, :]) * inverse[None, :]
            if OF_V:
                dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
            if OF_K:
                delta = tl.load(delta_ptr + row, mask=rows < length_q, other=0.0)
                score = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
                dk = tl.dot(score.to(q.dtype), q, dk, input_precision=PRECISION)
    if OF_K:
        _store(dk_ptr + b * dk_b + shared * dk_h, dk_n, columns, length_k, dims, width, dk * scale)
    if OF_V:
        _store(dv_ptr + b * dv_b + shared * dv_h, dv_n, columns, length_k, dims, width, dv)


class _Blocks(NamedTuple):
    """Rows of queries and of keys that a program holds, and how Triton lays it out."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel, width of a head up to, and bytes of an element: without spilled registers but for float32, and within the
# 99 KB of shared memory of the smallest GPUs with bfloat16.
_BLOCKS = {
    ("forward", 64, 2): _Blocks(64, 64, 4, 2),
    ("forward", 128, 2): _Blocks(64, 32, 4, 2),
    ("forward", 64, 4): _Blocks(64, 32, 4, 1),
    ("forward", 128, 4): _Blocks(16, 32, 4, 1),
    ("queries", 64, 2): _Blocks(64, 64, 4, 2),
    ("queries", 128, 2): _Blocks(64, 32, 4, 2),
    ("queries", 64, 4): _Blocks(64, 32, 4, 1),
    ("queries", 128, 4): _Blocks(32, 32, 4, 1),
    ("keys", 64, 2): _Blocks(64, 64, 4, 2),
    ("keys", 128, 2): _Blocks(32, 64, 4, 2),
    ("keys", 64, 4): _Blocks(32, 64, 4, 1),
    ("keys", 128, 4): _Blocks(32, 32, 8, 1),
}


def _blocks(kernel: str, q: Tensor) -> _Blocks:
    return _BLOCKS[kernel, 64 if q.shape[-1] <= 64 else 128, q.element_size()]


class _Attend(torch.autograd.Function):
    """``y``, which has no graph, and ``ẏ``, which has one."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float, dq: Any, dk: Any, dv: Any
    ) -> tuple[Tensor, Tensor]:
        q, k, v, dq, dk, dv = (one if one is None or one.stride(-1) == 1 else one.contiguous()
                               for one in (q, k, v, dq, dk, dv))  # fmt: skip
        batch, heads, length_q, width = q.shape
        settings = {
            "GROUPS": heads // k.shape[1],
            "CAUSAL": causal,
            "MASK": 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2,
            "WIDTH": max(16, triton.next_power_of_2(width)),
            "PRECISION": "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }
        sizes = (heads, length_q, k.shape[2], width, scale)
        blocks = _blocks("forward", q)
        y, dy = torch.empty_like(q), torch.empty_like(q)
        top, inverse = torch.empty(2, batch, heads, length_q, device=q.device, dtype=torch.float32)
        tangents = [value if one is None else one for one, value in ((dq, q), (dk, k), (dv, v))]
        with torch.cuda.device_of(q):
            _forward[(batch * heads * triton.cdiv(length_q, blocks.queries),)](
                q, k, v, *tangents, q if mask is None else mask, y, dy, top, inverse,
                *_strides(q, k, v, *tangents), *_mask_strides(mask), *_strides(y), *sizes, **settings,
                OF_Q=dq is not None, OF_K=dk is not None, OF_V=dv is not None, **_launched(blocks),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, mask, y, top, inverse)
        ctx.sizes, ctx.settings = sizes, settings
        ctx.mark_non_differentiable(y)
        return y, dy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, g: Tensor) -> Any:
        q, k, v, mask, y, top, inverse = ctx.saved_tensors
        of_q, of_k, of_v = ctx.needs_input_grad[6:]
        g = g if g.stride(-1) == 1 else g.contiguous()
        dq, dk, dv = (torch.empty_like(one) if wanted else None for one, wanted in ((q, of_q), (k, of_k), (v, of_v)))
        delta = torch.empty_like(top)
        common = (*_strides(q, k, v), *_mask_strides(mask))
        mask = q if mask is None else mask
        with torch.cuda.device_of(q):
            if of_q or of_k:
                out = q if dq is None else dq
                blocks = _blocks("queries", q)
                programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], blocks.queries)
                _backward_queries[(programs,)](
                    q, k, v, mask, y, top, inverse, g, delta, out, *common, *_strides(y, g, out), *ctx.sizes,
                    **ctx.settings, OF_Q=of_q, **_launched(blocks),
                )  # fmt: skip
            if of_k or of_v:
                blocks = _blocks("keys", q)
                programs = k.shape[0] * k.shape[1] * triton.cdiv(k.shape[2], blocks.keys)
                outs = [like if one is None else one for one, like in ((dk, k), (dv, v))]
                _backward_keys[(programs,)](
                    q, k, v, mask, top, inverse, g, delta, *outs, *common, *_strides(g, *outs), *ctx.sizes,
                    **ctx.settings, OF_K=of_k, OF_V=of_v, **_launched(blocks),
                )  # fmt: skip
        return None, None, None, None, None, None, dq, dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, head and position; along a head's width it is one."""
    return [step for one in tensors for step in one.stride()[:3]]


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if mask is None else mask.stride()


def _launched(blocks: _Blocks) -> dict[str, int]:
    return {
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent, both ``[batch, heads, queries, width]``, in memory that no product of lengths enters.

    Args:
        q: ``[batch, heads, queries, width]``, float32, bfloat16 or float16; width at most 128. What is
            summed is float32.
        k: ``[batch, heads of keys, keys, width]``; the number of heads is a multiple of that of keys.
        v: as ``k``.
        dq: tangent of ``q``, of its shape; None where it has none. The same for ``dk`` and ``dv``.
        dk: of ``k``.
        dv: of ``v``.
        mask: broadcasts to ``[batch, heads, queries, keys]``: boolean, True where a query may look, or added to the
            scores. A query that may see no key gives zeros.
        causal: query i sees the keys up to i.
        scale: of the scores; None for ``width ** -0.5``.

    Returns:
        ``y`` without a graph and ``ẏ``, through which gradients flow into the tangents.
    """
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attend.apply(q, k, v, mask, causal, scale, dq, dk, dv)
