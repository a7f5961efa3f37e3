"""``f(x; θ0)`` and the tangent ``J_θ f(x; θ0) · τ`` in one pass, by forward-mode differentiation.

The tangent is an ordinary differentiable function of τ, so that a loss on it trains τ; the primal computation leaves no
graph. Plain ``torch.func.jvp`` is exact but slow for transformers: the tangent of a linear layer on a 3-D input becomes
a batched product with the weight expanded over the batch. Here the layers that matter have rules of their own
(:mod:`lit_merge.functional.tangents`); every other operator uses torch's formula.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from lit_merge.errors import LitMergeError
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
        LitMergeError: the module's output is no tensor, or it uses an operator without a forward-mode derivative.
    """
    own = {name: value.detach() for name, value in module.named_parameters()} | {
        name: value.detach() for name, value in parameters.items()
    }
    # Lightning evaluates in inference mode, where no tangent can be attached.
    with torch.inference_mode(False), torch.set_grad_enabled(_records()), _evaluating(module), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(own[name], value) for name, value in tangents.items()}
        inputs, keywords = _ordinary(inputs), _ordinary(keywords)
        try:
            with FastTangents():
                output = functional_call(module, {**own, **duals}, inputs, keywords)
        except (NotImplementedError, RuntimeError) as error:
            raise _refusal(error) from error
        if not isinstance(output, Tensor):
            raise LitMergeError(
                f"linearised {type(module).__name__}: expected a module that returns one tensor, got "
                f"{type(output).__name__}. Wrap it in one that does."
            )
        value, tangent = forward_ad.unpack_dual(output)
        return value, torch.zeros_like(value) if tangent is None else tangent


def _records() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _ordinary(value: Any) -> Any:
    """The same without inference tensors, which may not be saved for a derivative."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple | list):
        return type(value)(_ordinary(item) for item in value)
    if isinstance(value, dict):
        return {key: _ordinary(item) for key, item in value.items()}
    return value


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _refusal(error: Exception) -> Exception:
    """Torch's complaint about a missing formula as one line; any other error as it is."""
    text = str(error)
    if "forward AD" not in text and "forward mode AD" not in text:
        return error
    named = re.search(r"forward AD with (\S+)", text)
    operator = named[1] if named else "an autograd.Function without jvp"
    return LitMergeError(
        f"linearised: expected operators with a forward-mode derivative, got {operator}, which has none. "
        "Replace it in the module by operators that have one, give its autograd.Function a jvp, train only parameters "
        "behind it, or do not linearise."
    )
