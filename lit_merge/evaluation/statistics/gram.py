"""Gram matrices of what linear layers get as input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.statistics.examples import examples
from lit_merge.functional.evaluation import evaluating
from lit_merge.models.linearized import LinearizedModel
from lit_merge.params import Params, check_finite, working_dtype

__all__ = ["LayerInputs", "collect_gram"]


def collect_gram(
    module: nn.Module,
    loader: Iterable[Any],
    convolutions: bool = False,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
) -> Params:
    r"""``G = XᵀX / n`` of the inputs X ``[n, in]`` of every linear layer (Jin et al. 2023, section 3).

    n counts rows: one per image, or one per image and token; what texts are padded with is none, and of answers to
    choose from each comes with a text of its own. As G is their mean, data sets of other sizes do not weigh
    differently. Products of a batch are computed in the inputs' own precision, float32 at least, and summed in float64,
    or in float32 on a device that has no float64.

    Found are 2-D weights in ``F.linear`` (so ``nn.Linear``, and ``nn.MultiheadAttention``'s packed or separate input
    projections and its output projection), and in ``x @ W.T``, ``x @ W`` and ``torch.addmm`` (GPT-2's layers). Without
    a matrix remain the packed input projection of an attention whose query, key and value differ, as its rows have
    different inputs, and weights that are computed from parameters, as LoRA's. Evaluation mode is used whatever the
    module's own. No labels are read. One process only; several would each collect their own images.

    Args:
        module: images ``[B, …]`` -> anything.
        loader: gives :class:`lit_merge.data.Batch`, pairs ``(images, labels)``, or images alone.
        convolutions: also take 2-D convolutions without groups, as linear layers on patches, for patch embeddings.
        inputs: the module's arguments of a batch; by default its ``inputs``.

    Returns:
        Name of the weight -> ``[in, in]``, float32, or float64 for float64 weights, on the CPU. For a weight ``[in,
        out]`` that is used as ``x @ W`` the key is the name and ``.T``; for a convolution's ``[out, c, h, w]``, ``in =
        c · h · w``.

    Raises:
        ConfigurationError: no such layer was used, or a convolution's padding is not given by numbers of zeros.
        DataError: there is no image.
        NonFiniteError: a value is NaN or infinite.
    """
    mode = LayerInputs(module, convolutions)
    with torch.no_grad(), evaluating(module), mode:
        for given, _ in examples(loader, module, inputs, padded=False, in_order=False):
            module(*given)
    if not mode.totals or isinstance(module, LinearizedModel):  # whose tangents are products with its parameters, too
        raise ConfigurationError(
            f"collect_gram: expected a module with linear layers on parameters of its own, got {type(module).__name__} "
            "without. Give the encoder itself, neither linearised nor with LoRA."
        )
    grams = {key: (total / mode.counts[key]).to(mode.dtypes[key]).cpu() for key, total in mode.totals.items()}
    check_finite(grams, "Gram matrices")
    return grams


class LayerInputs(TorchFunctionMode):
    """Sums ``xᵀx`` of what comes together with a parameter; torch's fused attention turns itself off."""

    def __init__(self, module: nn.Module, convolutions: bool) -> None:
        super().__init__()
        self.keys: dict[Any, tuple[str, torch.dtype]] = {}
        for name, value in module.named_parameters():
            if value.ndim == 2 and value.numel():
                self.keys.setdefault(identity_of(value.t()), (f"{name}.T", value.dtype))
            if value.numel():
                self.keys[identity_of(value)] = (name, value.dtype)
        self.rules: dict[Any, Callable[..., Any]] = {
            F.linear: self._linear,
            torch.matmul: self._matmul,
            Tensor.matmul: self._matmul,
            Tensor.__matmul__: self._matmul,
            torch.addmm: self._addmm,
            F.multi_head_attention_forward: self._attention,
            **({F.conv2d: self._convolution} if convolutions else {}),
        }
        self.totals: Params = {}
        self.counts: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the inputs on the way."""
        return self.rules.get(func, func)(*args, **(kwargs or {}))

    def _note(self, weight: Tensor, inputs: Tensor) -> None:
        """Add inputs ``[…, in]`` of a weight ``[out, in]``, if that is a parameter."""
        key, dtype = self.keys.get(identity_of(weight), (None, None))
        if key is None or dtype is None:
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        rows = rows.to(working_dtype(rows.dtype))
        with torch.autocast(rows.device.type, enabled=False):
            product = rows.mT @ rows
        product = product if product.device.type == "mps" else product.double()
        self.totals[key] = self.totals[key] + product if key in self.totals else product
        self.counts[key] = self.counts.get(key, 0) + len(rows)
        self.dtypes[key] = working_dtype(dtype)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._note(weight, input)
        return F.linear(input, weight, bias)

    def _matmul(self, input: Tensor, other: Tensor, **out: Any) -> Tensor:
        if other.ndim == 2:
            self._note(other.t(), input)
        return torch.matmul(input, other, **out)

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **settings: Any) -> Tensor:
        self._note(mat2.t(), mat1)
        return torch.addmm(input, mat1, mat2, **settings)

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if groups != 1:
            return output
        if isinstance(padding, str):
            raise ConfigurationError(
                f"convolutions: expected padding by a number of zeros, got {padding!r}. Set convolutions to false."
            )
        images = input if input.ndim == 4 else input.unsqueeze(0)
        return self._convolved(weight, F.unfold(images, weight.shape[2:], dilation, padding, stride).mT, bias, output)

    def _convolved(self, weight: Tensor, patches: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
        """The output of a convolution, whose patches ``[B, L, in]`` are known."""
        self._note(weight, patches)
        return output

    def _attention(
        self,
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
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``nn.MultiheadAttention``, inside of which a mode sees nothing."""
        if others.get("use_separate_proj_weight"):
            for name, inputs in (("q_proj_weight", query), ("k_proj_weight", key), ("v_proj_weight", value)):
                self._note(others[name], inputs)
        elif query is key and key is value and in_proj_weight is not None:
            self._note(in_proj_weight, query)
        # Through the identity as output projection comes what the real one gets; it is applied here.
        identity = torch.eye(len(out_proj_weight), dtype=out_proj_weight.dtype, device=out_proj_weight.device)
        attended, weights = F.multi_head_attention_forward(
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
            identity,
            None,
            **others,
        )
        return self._linear(attended, out_proj_weight, out_proj_bias), weights


def identity_of(value: Tensor) -> tuple[Any, ...]:
    """What tells a parameter, or its transpose, from other tensors, also where it is another object."""
    return value.data_ptr(), tuple(value.shape), value.stride(), value.device
