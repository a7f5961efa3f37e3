"""``f(x; θ0)`` and the tangent ``J_θ f(x; θ0) · τ`` in one pass, by forward-mode differentiation.

The tangent is an ordinary differentiable function of τ, so that a loss on it trains τ; the primal computation leaves no
graph. Plain ``torch.func.jvp`` is exact but slow for transformers: the tangent of a linear layer on a 3-D input becomes
a batched product with the weight expanded over the batch. Here the layers that matter have rules of their own
(:mod:`lit_merge.functional.tangents`); every other operator uses torch's formula.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from lit_merge.errors import ConfigurationError, LitMergeError, first_few
from lit_merge.functional.evaluation import evaluating
from lit_merge.functional.recomputation import no_recomputation
from lit_merge.functional.tangents import FastTangents

__all__ = ["linearize"]


def linearize(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    *inputs: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """Evaluate a module at θ0 together with its directional derivative along τ (Ortiz-Jimenez et al. 2023, eq. 4).

    The gradient flows into ``tangents`` alone. Dropout is off and batch normalisation uses its running statistics,
    whatever the module's mode. Nothing is computed for parameters that have no tangent.

    Args:
        module: ``f``; its own parameters are used for the names that ``parameters`` leaves out.
        parameters: θ0, or part of it, under the module's names.
        tangents: τ, or the part of it that is not zero; shapes and dtypes as the parameters.
        *inputs: of the module.
        **keywords: of the module.

    Returns:
        ``f(x; θ0)`` and ``J_θ f(x; θ0) · τ``, both of the shape of the module's output.

    Raises:
        ConfigurationError: a name is none of the module's.
        LitMergeError: the module's output is no tensor, or it uses an operator without a forward-mode derivative.
    """
    own = dict(module.named_parameters())
    unknown = [name for name in (*parameters, *tangents) if name not in own]
    if unknown:
        raise ConfigurationError(
            f"linearised {type(module).__name__}: expected names of its {len(own)} parameters, got "
            f"{first_few(unknown)}. Use names of module.named_parameters()."
        )
    records = torch.is_grad_enabled()  # asked here: leaving inference mode turns it on
    try:
        # Lightning evaluates in inference mode, where no tangent can be attached.
        with torch.inference_mode(False), torch.set_grad_enabled(records), evaluating(module), forward_ad.dual_level():
            own = _constant({**own, **parameters})
            duals = {name: forward_ad.make_dual(own[name], _ordinary(value)) for name, value in tangents.items()}
            with no_recomputation(_RECOMPUTATION), FastTangents():
                output = functional_call(module, {**own, **duals}, _constant(inputs), _constant(keywords))
            if not isinstance(output, Tensor):
                raise LitMergeError(
                    f"linearised {type(module).__name__}: expected a module that returns one tensor, got "
                    f"{type(output).__name__}. Wrap it in one that does."
                )
            value, tangent = forward_ad.unpack_dual(output)
            return value, torch.zeros_like(value) if tangent is None else tangent
    except RuntimeError as error:
        refusal = _refusal(str(error))
        if refusal is None:
            raise
        raise LitMergeError(f"linearised: {refusal}") from error


def _ordinary(value: Tensor) -> Tensor:
    """The same, but no inference tensor: those may not be saved for a derivative."""
    return value.clone() if value.is_inference() else value


def _constant(value: Any) -> Any:
    """The same with ordinary tensors through which no gradient flows."""
    if isinstance(value, Tensor):
        return _ordinary(value).detach()
    if isinstance(value, tuple | list):
        items = [_constant(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _constant(item) for key, item in value.items()}
    return value


_RECOMPUTATION = (
    "expected a module without gradient checkpointing, got one that recomputes. Switch it off, e.g. with "
    "set_grad_checkpointing(False)."
)


def _refusal(text: str) -> str | None:
    """Torch's complaint about what cannot be linearised as one line; None for any other error."""
    if text == _RECOMPUTATION:
        return text
    if "Nested forward mode AD" in text or "_unpack_dual" in text or "_make_dual" in text:
        return (
            "expected no torch.func.jvp, jacfwd or vmap and no other linearised module around or inside this one, got "
            "one; torch cannot nest them. Call the module itself."
        )
    if "dual tensor" in text:
        compiled = "flex_attention" if "flex_attention" in text else "a compiled part"
        return (
            f"expected no part that torch.compile computes, got {compiled}, whose tangent would be dropped. Do not "
            'compile it; of a transformers network set attn_implementation="sdpa" (or "eager").'
        )
    if "forward AD" not in text and "forward mode AD" not in text:
        return None
    named = re.search(r"forward AD with (\S+)", text)
    operator = named[1] if named else "an autograd.Function without jvp"
    return (
        f"expected operators with a forward-mode derivative, got {operator}, which has none. Replace it in the module "
        "by operators that have one, give its autograd.Function a jvp, train only parameters after it, or do not "
        "linearise."
    )
