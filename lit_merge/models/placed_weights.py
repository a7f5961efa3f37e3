"""A network's weights, set in place to θ0 + Σ α_k τ_k again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError
from lit_merge.models.merged import swapped
from lit_merge.params import check_same_structure

__all__ = ["PlacedWeights"]

_ALIGNED = 16  # entries: 64 bytes of float32, where processors like matrices to begin


class PlacedWeights:
    """θ0, the vectors and the sum as flat buffers on the network's device, so that a new sum is a few operations.

    Args:
        network: its parameters are θ0, of one dtype; they are not changed.
        vectors: K task vectors under the network's names.

    Raises:
        StructureMismatchError: names or shapes of a vector are not the network's.
        ConfigurationError: the network has no parameters, or of several dtypes.
    """

    def __init__(self, network: nn.Module, vectors: Sequence[Mapping[str, Tensor]]) -> None:
        own = {name: value.detach() for name, value in network.named_parameters()}
        for index, vector in enumerate(vectors):
            check_same_structure(own, vector, f"task vector {index}")
        kinds = {(value.dtype, value.device) for value in own.values()}
        if len(kinds) != 1:
            raise ConfigurationError(
                f"{type(network).__name__}: expected parameters of one dtype on one device, got {len(kinds)} kinds. "
                "Convert it first, e.g. with .float()."
            )
        self._network = network
        self._places: dict[str, int] = {}
        size = 0
        for name, value in own.items():
            self._places[name] = size
            size += -(-value.numel() // _ALIGNED) * _ALIGNED
        example = next(iter(own.values()))
        self._base, *self._vectors = (self._flat(example, size, one) for one in (own, *vectors))
        self._sum = self._base.clone()
        self._views = {
            name: self._sum[start : start + own[name].numel()].view_as(own[name])
            for name, start in self._places.items()
        }

    def set(self, coefficients: Sequence[float]) -> None:
        """Set the weights to θ0 + Σ α_k τ_k, added up in this order; K numbers."""
        torch.add(self._base, self._vectors[0], alpha=coefficients[0], out=self._sum)
        for vector, coefficient in zip(self._vectors[1:], coefficients[1:], strict=True):
            self._sum.add_(vector, alpha=coefficient)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For a while these weights stand in for the network's own."""
        with swapped(self._network, self._views):
            yield

    def _flat(self, example: Tensor, size: int, tensors: Mapping[str, Tensor]) -> Tensor:
        flat = torch.zeros(size, dtype=example.dtype, device=example.device)
        for name, start in self._places.items():
            value = tensors[name]
            flat[start : start + value.numel()] = value.reshape(-1).to(flat)
        return flat
