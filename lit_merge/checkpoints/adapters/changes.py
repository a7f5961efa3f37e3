"""What an adapter's tensors change in a base model: checked against its shapes, computed one weight at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.errors import NonFiniteError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Slicer, Structure
from lit_merge.params import is_finite, working_dtype

__all__ = ["AdapterParts", "Change", "Update", "adapter_difference"]


@dataclass(frozen=True)
class Update:
    """The factors of one module, by their names in the file.

    Attributes:
        scale: s.
        a: A ``[r, k, …]``.
        b: B ``[d, r, …]``, its further lengths one.
        bias: added to the module's bias, times s; "" if none.
        embedding: whether the module is a table ``[k, d]``.
    """

    scale: float
    a: str
    b: str
    bias: str = ""
    embedding: bool = False


@dataclass(frozen=True)
class Change:
    """What happens to one tensor of the base; names are those in the adapter's file.

    Attributes:
        saved: replaces it.
        a: A, with ``b``: their product is added.
        b: B.
        bias: is added.
        scale: of what is added.
        transposed: the product is transposed.
    """

    saved: str = ""
    a: str = ""
    b: str = ""
    bias: str = ""
    scale: float = 1.0
    transposed: bool = False


@dataclass(frozen=True)
class AdapterParts:
    """What is in an adapter's file.

    Attributes:
        path: how messages call the adapter.
        tensors: the file's tensors.
        updates: module -> its factors.
        saved: parameter -> name in the file, for what was saved as a whole.
        fan_in_fan_out: the configuration's flag, see :meth:`_square_is_transposed`.
    """

    path: Path
    tensors: LazyMapping
    updates: Mapping[str, Update]
    saved: Mapping[str, str]
    fan_in_fan_out: bool

    def names(self) -> list[str]:
        """The parameters that are changed."""
        biases = [f"{module}.bias" for module, update in self.updates.items() if update.bias]
        return [*(f"{module}.weight" for module in self.updates), *self.saved, *biases]

    def changes(self, base: LazyMapping, removed: str, added: str) -> dict[str, Change]:
        """Name in the base -> what happens to it.

        Raises:
            StructureMismatchError: shapes differ, or it cannot be told whether a square weight is transposed.
        """
        changes: dict[str, Change] = {}
        for name, saved in self.saved.items():
            target = added + name.removeprefix(removed)
            self._check_shape(name, self.tensors.shape(saved), base.shape(target))
            changes[target] = Change(saved=saved)
        shapes = {module: self._product_shape(update) for module, update in self.updates.items()}
        weights = {module: f"{added}{module.removeprefix(removed)}.weight" for module in self.updates}
        for module, update in self.updates.items():
            weight, product = weights[module], shapes[module]
            matrix = len(product) == 2 and not update.embedding
            if matrix and product != base.shape(weight) and product[::-1] == tuple(base.shape(weight)):
                transposed = True
            else:
                self._check_shape(f"{module}.weight", product, base.shape(weight))
                square = matrix and product[0] == product[1]
                transposed = update.embedding or (square and self._square_is_transposed(base, module, weights, shapes))
            saved = changes.get(weight, Change()).saved
            changes[weight] = Change(saved, update.a, update.b, scale=update.scale, transposed=transposed)
            if update.bias:
                name = weight.removesuffix("weight") + "bias"
                self._check_shape(f"{module}.bias", self.tensors.shape(update.bias), base.shape(name))
                changes[name] = Change(changes.get(name, Change()).saved, bias=update.bias, scale=update.scale)
        return changes

    def _product_shape(self, update: Update) -> torch.Size:
        """Of B A: ``[d, k]``; of a convolution ``[d, k, …]``; of an embedding, where it is transposed, ``[k, d]``."""
        a, b = self.tensors.shape(update.a), self.tensors.shape(update.b)
        return torch.Size((*a[1:], *b[:1]) if update.embedding else (*b[:1], *a[1:]))

    def _square_is_transposed(
        self, base: LazyMapping, module: str, weights: Mapping[str, str], shapes: Mapping[str, torch.Size]
    ) -> bool:
        """Whether a square weight is that of a Conv1D, ``[in, out]``.

        The configuration has one flag, that of the module that peft came to last. Modules of the same name whose
        weights are not square tell more.
        """
        leaf = module.rpartition(".")[2]
        seen = {
            base.shape(weight) != shapes[other]
            for other, weight in weights.items()
            if other.rpartition(".")[2] == leaf and len(shapes[other]) == 2 and shapes[other][0] != shapes[other][1]
        }
        for name in base:
            shape, bias = base.shape(name), name.removesuffix("weight") + "bias"
            same = name == f"{leaf}.weight" or name.endswith(f".{leaf}.weight")
            if same and len(shape) == 2 and shape[0] != shape[1] and bias in base:
                seen.add(base.shape(bias) == shape[1:])
        if len(seen) == 1:
            return seen.pop()
        if not seen and self.fan_in_fan_out and {other.rpartition(".")[2] for other in weights} == {leaf}:
            return True
        straight = all(base.shape(weight) == shapes[other] for other, weight in weights.items())
        if not seen and not self.fan_in_fan_out and straight:
            return False
        raise StructureMismatchError(
            f"{self.path}: expected all adapted weights [out, in], or all [in, out], got both, and {module} is square. "
            "Merge this adapter with peft, and use the merged model."
        )

    def _check_shape(self, name: str, got: torch.Size, expected: torch.Size) -> None:
        if got != expected:
            raise StructureMismatchError(
                f"{self.path}: expected a change of {name} of shape {tuple(expected)}, as in the base, got "
                f"{tuple(got)}. Use the base model that the adapter was trained on."
            )


def adapter_difference(parts: AdapterParts, base: LazyMapping, changes: Mapping[str, Change]) -> LazyMapping:
    """τ under all names of the base with floating-point values, in float32 or float64.

    Raises:
        StructureMismatchError: a parameter that is changed has no floating-point values in the base.
    """
    used = {
        name: [parts.tensors.dtype(part) for part in (change.saved, change.a, change.b, change.bias) if part]
        for name, change in changes.items()
    }
    others = [
        f"{name} ({base.dtype(name)})"
        for name, dtypes in used.items()
        if not base.dtype(name).is_floating_point and any(dtype.is_floating_point for dtype in dtypes)
    ]
    if others:
        raise StructureMismatchError(
            f"{parts.path}: expected floating-point values in the base, got {first_few(others)}. "
            "Use the base that is not quantised."
        )
    structure: Structure = {
        name: (base.shape(name), working_dtype(base.dtype(name), *used.get(name, ())))
        for name in base
        if base.dtype(name).is_floating_point
    }
    return _Difference(structure, parts.tensors, base, changes)


class _Difference(Computed):
    """A computed difference, most of which is zero."""

    def __init__(
        self, structure: Structure, tensors: LazyMapping, base: LazyMapping, changes: Mapping[str, Change]
    ) -> None:
        super().__init__(structure, partial(_value, tensors, base, changes, structure))
        self._changes = changes

    def slicer(self, name: str) -> Slicer:
        """Zeros are not computed first."""
        return super().slicer(name) if name in self._changes else _zeros


def _value(
    tensors: LazyMapping, base: LazyMapping, changes: Mapping[str, Change], structure: Structure, name: str
) -> Tensor:
    shape, dtype = structure[name]
    change = changes.get(name)
    total = torch.zeros(shape, dtype=dtype)
    if change is None:
        return total
    if change.saved:
        total += tensors[change.saved].detach().to(dtype) - base[name].detach().to("cpu", dtype)
    if change.a:
        a, b = tensors[change.a].detach().to(dtype), tensors[change.b].detach().to(dtype)
        product = b.flatten(1) @ a.flatten(1)
        if change.transposed:
            product = product.T
        total += change.scale * product.reshape(shape)
    if change.bias:
        total += change.scale * tensors[change.bias].detach().to(dtype)
    if not is_finite(total):
        raise NonFiniteError(
            f"adapter: expected a finite difference, got NaN or infinity in {name}. "
            "Train again with a lower learning rate, or remove this adapter."
        )
    return total


def _zeros(start: int, stop: int, out: Tensor) -> None:
    out.zero_()
