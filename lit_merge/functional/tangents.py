"""Tangents of the layers that make up transformers, each as few matrix products as the arithmetic needs.

A rule takes a function's arguments, some of them dual (a value with a tangent, :mod:`torch.autograd.forward_ad`), and
returns a dual result. The value has no graph; the tangent has one, through which a loss trains what it came from.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["FastTangents"]


class FastTangents(TorchFunctionMode):
    """Sends the functions that have a rule to it; torch's fused attention, which has no formula, turns itself off.

    Attention keeps no matrix of weights on a GPU where Triton runs (:mod:`lit_merge.functional.flash`). As for torch's
    own kernels, ``with sdpa_kernel(SDPBackend.MATH)`` or ``torch.backends.cuda.enable_flash_sdp(False)`` asks for the
    dense rule, which everything else uses: a CPU, float64, dropout, wide heads, a mask that has a tangent.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the rule, or the function itself."""
        return _RULES.get(func, func)(*args, **(kwargs or {}))


def _dual(value: Tensor | None) -> tuple[Any, Tensor | None]:
    return (None, None) if value is None else tuple(forward_ad.unpack_dual(value))


def _as_autocast_does(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast the inputs of a matrix product."""
    enabled = torch.is_autocast_enabled(device_type)
    return _cast(torch.get_autocast_dtype(device_type), *tensors) if enabled else tensors


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(value if value is None or value.dtype == torch.float64 else value.to(dtype) for value in tensors)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``ẏ = x Ẇᵀ + ẋ Wᵀ + ḃ`` on rows: on more dimensions torch would expand the weight over the batch."""
    (x, dx), (w, dw), (b, db) = _dual(input), _dual(weight), _dual(bias)
    if (dx is None and dw is None and db is None) or weight.ndim != 2:
        return F.linear(input, weight, bias)
    x, dx, w, dw, b, db = _as_autocast_does(x.device.type, x, dx, w, dw, b, db)
    shape = (*x.shape[:-1], w.shape[0])
    x = x.reshape(-1, x.shape[-1])
    y = F.linear(x, w, b)
    dy = None
    if dw is not None:
        dy = x.mm(dw.t()) if db is None else torch.addmm(db, x, dw.t())
    elif db is not None:
        dy = db.expand_as(y).clone()
    if dx is not None:
        dx = dx.reshape(-1, dx.shape[-1])
        dy = dx.mm(w.t()) if dy is None else dy.addmm_(dx, w.t())
    assert dy is not None
    return forward_ad.make_dual(y.view(shape), dy.view(shape))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **out: Any) -> Tensor:
    """A bias and a product, as the layers of a GPT-2 are written, is a linear layer."""
    linear = input.ndim == 1 and beta == 1 and alpha == 1 and not out
    if linear:
        return _linear(mat1, mat2.t(), input)
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha, **out)


def _matmul(input: Tensor, other: Tensor, **out: Any) -> Tensor:
    """A product with one matrix is a linear layer."""
    linear = input.ndim >= 2 and other.ndim == 2 and not out
    return _linear(input, other.t()) if linear else torch.matmul(input, other, **out)


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``ẏ = x * Ẇ + ẋ * W + ḃ`` without the terms that are zero: images, for one, have no tangent."""
        (x, dx), (w, dw), (b, db) = _dual(input), _dual(weight), _dual(bias)
        if dx is None and dw is None and db is None:
            return convolve(input, weight, bias, *args, **kwargs)
        y = convolve(x, w, b, *args, **kwargs)
        terms = []
        if dw is not None:
            terms.append(convolve(x, dw, db, *args, **kwargs))
        elif db is not None:
            terms.append(db.to(y.dtype).view(-1, *[1] * (w.ndim - 2)).expand_as(y))
        if dx is not None:
            terms.append(convolve(dx, w, None, *args, **kwargs))
        return forward_ad.make_dual(y, terms[0] if len(terms) == 1 else terms[0] + terms[1])

    return rule


class _LayerNormTangent(torch.autograd.Function):
    """``ẏ = w ⊙ P ẋ / σ + x̂ ⊙ ẇ + ḃ``; P is a symmetric projection, so torch's backward kernel serves both ways."""

    @staticmethod
    def forward(
        ctx: Any, shape: list[int], x: Tensor, mean: Tensor, rstd: Tensor, w: Any, dx: Any, dw: Any, db: Any
    ) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, w)
        ctx.shape = shape
        if dx is None:
            tangent = torch.zeros_like(x)
        else:
            tangent, _, _ = _layer_norm_backward(dx, x, shape, mean, rstd, None, None, [True, False, False])
            tangent = tangent if w is None else tangent.mul_(w)
        if dw is not None:
            tangent.addcmul_((x - mean).mul_(rstd), dw)
        return tangent if db is None else tangent.add_(db)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, mean, rstd, w = ctx.saved_tensors
        b = x.new_empty(ctx.shape)  # only its shape is read
        wanted = list(ctx.needs_input_grad[5:])
        return None, None, None, None, None, *_layer_norm_backward(gradient, x, ctx.shape, mean, rstd, w, b, wanted)


def _layer_norm_backward(gradient: Tensor, *others: Any) -> Any:
    """Gradients of input, weight and bias."""
    return torch.ops.aten.native_layer_norm_backward(gradient.contiguous(), *others)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    (x, dx), (w, dw), (b, db) = _dual(input), _dual(weight), _dual(bias)
    if dx is None and dw is None and db is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    device_type, dtype, shape = x.device.type, x.dtype, list(normalized_shape)
    if torch.is_autocast_enabled(device_type) or (w is not None and w.dtype != dtype):
        x, dx, w, dw, b, db = _cast(torch.float32, x, dx, w, dw, b, db)
        dtype = dtype if device_type == "cpu" else x.dtype  # as torch's autocast returns it
    with torch.autocast(device_type, enabled=False):
        x = x.contiguous()
        y, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
        dy = _LayerNormTangent.apply(shape, x, mean, rstd, w, dx, dw, db)
        return forward_ad.make_dual(y.to(dtype), dy.to(dtype))


class _AttentionTangent(torch.autograd.Function):
    """Tangent of ``softmax(s q kᵀ + m) v`` where P, the softmax, is known.

    ``Ṡ = s (q̇ kᵀ + q k̇ᵀ) + ṁ``, ``Ṗ = P ⊙ (Ṡ - rowsum(P ⊙ Ṡ))``, ``ẏ = Ṗ v + P v̇``; the softmax's Jacobian is
    symmetric, so torch's backward kernel serves both ways. Keys, values and the mask may be the same for several
    queries, of which the gradients are added up.
    """

    @staticmethod
    def forward(
        ctx: Any, scale: float, p: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Any, dk: Any, dv: Any, dm: Any
    ) -> Tensor:
        ctx.save_for_backward(p, q, k, v)
        ctx.scale, ctx.of_mask = scale, None if dm is None else dm.shape
        terms = []
        if dq is not None or dk is not None or dm is not None:
            scores = [] if dq is None else [dq @ k.mT]
            scores += [] if dk is None else [q @ dk.mT]
            score = None if not scores else scores[0] if len(scores) == 1 else scores[0].add_(scores[1])
            if score is not None:
                score = score.mul_(scale) if dm is None else score.mul_(scale).add_(dm)
            else:
                score = dm.expand_as(p).contiguous()
            terms.append(_softmax_backward(score, p) @ v)
        if dv is not None:
            terms.append(p @ dv)
        return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        p, q, k, v = ctx.saved_tensors
        wants_q, wants_k, wants_v, wants_m = ctx.needs_input_grad[5:]
        score = _softmax_backward(gradient @ v.mT, p) if wants_q or wants_k or wants_m else None
        dm = None
        if wants_m and score is not None:
            dm, score = score.sum_to_size(ctx.of_mask), score * ctx.scale
        elif score is not None:
            score = score.mul_(ctx.scale)
        dq = score @ k if wants_q and score is not None else None
        dk = (score.mT @ q).sum_to_size(k.shape) if wants_k and score is not None else None
        dv = (p.mT @ gradient).sum_to_size(v.shape) if wants_v else None
        return None, None, None, None, None, dq, dk, dv, dm


def _softmax_backward(gradient: Any, p: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(gradient, p, -1, p.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    (q, dq), (k, dk), (v, dv), (mask, dm) = _dual(query), _dual(key), _dual(value), _dual(attn_mask)
    alone = dq is None and dk is None and dv is None and dm is None
    groups = q.shape[-3] // k.shape[-3] if enable_gqa else 1  # queries that have a key in common
    usual = q.ndim == k.ndim == v.ndim >= 3 and q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
    usual = usual and k.shape[-3] == v.shape[-3] and q.shape[-3] == groups * k.shape[-3]
    if alone or dropout_p or not usual:
        with nullcontext() if alone else sdpa_kernel(SDPBackend.MATH):  # the only one with a forward-mode formula
            gqa = {"enable_gqa": True} if enable_gqa else {}  # not known to torch 2.4
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **gqa
            )
    q, k, v, dq, dk, dv = _as_autocast_does(q.device.type, q, k, v, dq, dk, dv)
    dm = dm if dm is None else dm.to(q.dtype)
    if dm is None and _flash_fits(q, k, v, mask) and _flash_runs(q.device):
        from lit_merge.functional.flash import attend

        return forward_ad.make_dual(*attend(q, k, v, dq, dk, dv, mask, is_causal, scale))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if groups > 1:  # [heads, length, width] -> [keys' heads, queries of one, length, width]
        q, dq = (one if one is None else one.unflatten(-3, (-1, groups)) for one in (q, dq))
        k, dk, v, dv = (one if one is None else one.unsqueeze(-3) for one in (k, dk, v, dv))
        mask, dm = (one if one is None else _grouped(one, groups) for one in (mask, dm))
    scores = (q @ k.mT).mul_(scale)
    if is_causal:
        scores.masked_fill_(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1, dtype=q.dtype)
    if mask is not None:
        p.masked_fill_(scores == -torch.inf, 0)  # torch, too, has zeros where a query may see no key
    y, dy = p @ v, _AttentionTangent.apply(scale, p, q, k, v, dq, dk, dv, dm)
    return forward_ad.make_dual(y, dy) if groups == 1 else forward_ad.make_dual(y.flatten(-4, -3), dy.flatten(-4, -3))


_WIDEST = 128  # head of which a block's sums of value and tangent fit into registers


def _flash_fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether these are shapes and dtypes that the kernels know, and torch's switch is on."""
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and q.ndim == 4
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1] <= _WIDEST
        and min(q.numel(), k.numel()) > 0
        and (mask is None or mask.ndim <= 4)
    )


@functools.cache
def _flash_runs(device: torch.device) -> bool:
    """Whether Triton compiles the kernels there, which takes a C compiler besides; tried once."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16
        return False
    try:
        from lit_merge.functional.flash import attend

        one = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16, device=device)
        attend(one, one, one, one, one, one)
    except Exception as error:  # of many kinds, whatever is missing
        warnings.warn(
            f"linearised attention: Triton compiles nothing on {device} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}), so the matrices of weights are kept, of "
            "queries × keys per head. Install triton and a C compiler.",
            stacklevel=2,
        )
        return False
    return True


def _grouped(mask: Tensor, groups: int) -> Tensor:
    """A mask that fits queries in groups: ``[…, heads or 1, queries, keys]`` with one more axis."""
    if mask.ndim < 3:
        return mask
    return mask.unsqueeze(-3) if mask.shape[-3] == 1 else mask.unflatten(-3, (-1, groups))


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention`` on ``[length, batch, width]``: a mode does not see the functions inside it."""
    unusual = (bias_k, bias_v, key_padding_mask, static_k, static_v)
    if need_weights or add_zero_attn or query.ndim != 3 or any(part is not None for part in unusual):
        with sdpa_kernel(SDPBackend.MATH):
            return F.multi_head_attention_forward(
                query,
                key,
                value,
                embed_dim_to_check,
                num_heads,
                in_proj_weight,
                in_proj_bias,
                bias_k,
                bias_v,
                add_zero_attn,
                dropout_p,
                out_proj_weight,
                out_proj_bias,
                training,
                key_padding_mask,
                need_weights,
                attn_mask,
                use_separate_proj_weight,
                q_proj_weight,
                k_proj_weight,
                v_proj_weight,
                static_k,
                static_v,
                average_attn_weights,
                is_causal,
            )
    if query is key and key is value and not use_separate_proj_weight:
        assert in_proj_weight is not None
        projected = _linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        packed = (None,) * 3 if in_proj_weight is None else in_proj_weight.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else packed
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = tuple(
            _linear(part, weight, bias)  # type: ignore[arg-type]
            for part, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
    # [length, batch, width] -> [batch, heads, length, width / heads]
    q, k, v = (part.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for part in projected)
    if attn_mask is not None:
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask  # here True hides, there it shows
        attn_mask = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.ndim == 3 else attn_mask
    attended = _attention(q, k, v, attn_mask, dropout_p if training else 0.0, is_causal and attn_mask is None)
    return _linear(attended.permute(2, 0, 1, 3).flatten(-2), out_proj_weight, out_proj_bias), None


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
