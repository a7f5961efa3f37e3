"""What the linear layers and normalisations of one block get as input in a pass."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.evaluation.statistics.gram import LayerInputs, identity_of
from lit_merge.params import working_dtype

__all__ = ["BlockInputs", "row_parts"]

_NORM = re.compile(r"norm|(\A|_)ln(\d|_|\Z)")
# Of these every token is used, wherever the features are taken from: others attend to it.
_KEY_OR_VALUE = frozenset({"k", "v", "k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k_proj_weight"})
_KEY_OR_VALUE |= {"v_proj_weight", "key_proj", "value_proj"}
_PACKED = frozenset({"in_proj_weight", "qkv", "c_attn"})  # queries, then keys, then values
_MIXED = frozenset({"query_key_value", "qkv_proj", "Wqkv", "kv_proj", "kv"})  # in orders of their own


class BlockInputs(LayerInputs):
    """Notes the inputs of a block's linear layers, and what its normalisations give before scale and shift.

    Linear layers are those of :func:`~lit_merge.evaluation.statistics.collect_gram`. Normalisations are layer
    normalisations and root mean square ones.

    Args:
        block: whose parameters' names are the keys; a linear layer's end in ``.T`` if it is used as ``x @ W``.

    Attributes:
        linear: key -> inputs, ``[R, in]``.
        normal: name of the scale -> normalised inputs, ``[R, d]``.
        tokens_first: the keys whose rows are ordered by token and then by example, instead of as the block's output.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, convolutions=False)
        own = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
        self.rules |= {F.layer_norm: self._layer_norm}
        self.rules |= dict.fromkeys((F.rms_norm, torch.rms_norm), self._rms_norm) | dict.fromkeys(own, self._product)
        self._inside = False
        self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        self.linear: dict[str, Tensor] = {}
        self.normal: dict[str, Tensor] = {}
        self.tokens_first: set[str] = set()

    def _note(self, weight: Tensor, inputs: Tensor) -> None:
        key, _ = self.keys.get(identity_of(weight), (None, None))
        if key is None:
            return
        _append(self.linear, key, inputs)
        if self._inside:
            self.tokens_first.add(key)

    def _attention(self, *arguments: Any, **others: Any) -> tuple[Tensor, Tensor | None]:
        self._inside = True  # where the examples are the second dimension, always
        try:
            return super()._attention(*arguments, **others)
        finally:
            self._inside = False

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        if (name := self._scale(weight)) is not None:
            _append(self.normal, name, F.layer_norm(input, normalized_shape, None, None, eps))
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    def _rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if (name := self._scale(weight)) is not None:
            _append(self.normal, name, F.rms_norm(input, normalized_shape, None, eps))
        return F.rms_norm(input, normalized_shape, weight, eps)

    def _product(self, one: Any, other: Any, **out: Any) -> Tensor:
        """A root mean square normalisation that is written out ends with ``scale * x``."""
        for scale, values in ((one, other), (other, one)):
            if isinstance(values, Tensor) and (name := self._scale(scale)) is not None and _is_norm(name):
                _append(self.normal, name, values)
        return torch.mul(one, other, **out)

    def _scale(self, value: Any) -> str | None:
        if not isinstance(value, Tensor) or value.ndim != 1:
            return None
        return self.keys.get(identity_of(value), (None,))[0]


def row_parts(key: str, rows: int) -> list[tuple[slice, bool]]:
    """The rows of a weight ``[out, in]`` by whether tokens that no feature depends on are useless to them.

    They are useful to keys and values only, to which the tokens that count attend.
    """
    parts = key.removesuffix(".T").removesuffix(".weight").split(".")
    if parts[-1] in _KEY_OR_VALUE or parts[-1] in _MIXED or (parts[-1] in _PACKED and rows % 3):
        return [(slice(0, rows), False)]
    if parts[-1] in _PACKED:
        return [(slice(0, rows // 3), True), (slice(rows // 3, rows), False)]
    return [(slice(0, rows), True)]


def _is_norm(name: str) -> bool:
    return any(_NORM.search(part.lower()) for part in name.split(".")[:-1])


def _append(noted: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Add rows; a copy, as the network may write into them."""
    rows = values.detach().reshape(-1, values.shape[-1])
    rows = rows.to(working_dtype(rows.dtype), copy=True)
    noted[name] = torch.cat([noted[name], rows]) if name in noted else rows
