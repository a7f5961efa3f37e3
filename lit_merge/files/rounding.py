"""Rounding while writing: the tensors in the dtype to store, with the error that this makes measured on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, NonFiniteError
from lit_merge.files.lazy import LazyMapping
from lit_merge.params import is_finite

__all__ = ["Rounded"]


class Rounded(LazyMapping):
    """A view that rounds each tensor as it is read, and sums up the squared rounding error in float64.

    Args:
        tensors: name -> floating-point tensor.
        dtype: floating-point dtype to round to; ``None`` leaves every tensor as it is.
        what: how an error message calls the tensors.

    Raises:
        ConfigurationError: ``dtype`` is not a floating-point dtype.
        NonFiniteError: on reading a tensor that holds NaN or infinity, before or after rounding.
    """

    def __init__(self, tensors: LazyMapping, dtype: torch.dtype | None, what: str) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigurationError(f"dtype: expected a floating-point dtype, got {dtype}. Use torch.bfloat16.")
        self._tensors = tensors
        self._dtype = dtype
        self._what = what
        self._squared_error = 0.0
        self._squared_norm = 0.0

    @property
    def relative_error(self) -> float:
        """‖round(τ) − τ‖₂ / ‖τ‖₂ over the tensors read so far; 0 for zero vectors."""
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def storage(self) -> str:
        """The header entry ``storage``: JSON with the stored dtype and the relative rounding error, of fixed length."""
        dtypes = sorted({str(self.dtype(name)).removeprefix("torch.") for name in self})
        return f'{{"dtype": "{"+".join(dtypes)}", "relative_error": {self.relative_error:.6e}}}'

    def __getitem__(self, name: str) -> Tensor:
        return self._rounded(name, self._tensors[name].detach())

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened tensors one after the other, in the chunks in which they are computed."""
        for name, chunk in self._tensors.stream(names):
            yield name, self._rounded(name, chunk.detach())

    def _rounded(self, name: str, exact: Tensor) -> Tensor:
        if not is_finite(exact):
            raise NonFiniteError(
                f"{self._what}: expected finite values, got NaN or infinity in {name}. "
                "Train again with a lower learning rate, or remove this input."
            )
        rounded = exact.to(self.dtype(name))
        if rounded.dtype != exact.dtype:
            if not is_finite(rounded.float()):
                raise NonFiniteError(
                    f"{self._what}: expected values that fit into {rounded.dtype}, got {exact.abs().max():.3g} in "
                    f"{name}. Store it as bfloat16 or float32."
                )
            reference = exact.double()
            self._squared_error += float((rounded.double() - reference).square().sum())
            self._squared_norm += float(reference.square().sum())
        return rounded

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype to store, without reading the tensor."""
        return self._dtype or self._tensors.dtype(name)
