"""What an adapter's tensors change in a base model: checked against its shapes, computed one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lit_merge.checkpoints.adapters.updates import LowRank, Update
from lit_merge.errors import NonFiniteError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Slicer, Structure, zeros
from lit_merge.params import is_finite, working_dtype

__all__ = ["AdapterParts", "Change", "adapter_difference"]

_What = TypeVar("_What")


@dataclass(frozen=True)
class Change:
    """What happens to one tensor of the base, in this order; names are those in the adapter's file.

    Attributes:
        saved: replaces it.
        tokens: replaces some of its rows.
        rows: their indices.
        factor: it is multiplied with it, along its rows or columns (IA3).
        update: is added, and its magnitude scales the sum's rows (DoRA).
        transposed: the tensor is ``[k, d]`` where the update is ``[d, k]``.
        bias: is added, times ``scale``.
        scale: of the bias.
    """

    saved: str = ""
    tokens: str = ""
    rows: tuple[int, ...] = ()
    factor: str = ""
    update: Update | None = None
    transposed: bool = False
    bias: str = ""
    scale: float = 1.0

    def parts(self) -> list[str]:
        """Names of all tensors that it takes."""
        update = [] if self.update is None else [*self.update.parts(), self.update.magnitude]
        return [one for one in (self.saved, self.tokens, self.factor, *update, self.bias) if one]

    @property
    def factored(self) -> LowRank | None:
        """The update, if the change is a low-rank product and nothing else."""
        alone = not (self.saved or self.tokens or self.factor or self.bias)
        found = self.update
        plain = isinstance(found, LowRank) and not found.magnitude and not found.truncated
        return found if alone and plain and isinstance(found, LowRank) else None


@dataclass(frozen=True)
class AdapterParts:
    """What is in an adapter's file.

    Attributes:
        path: how messages call the adapter.
        tensors: the file's tensors.
        updates: module -> what is added to its weight.
        saved: parameter -> name in the file, for what was saved as a whole.
        factors: module -> name of what its weight is multiplied with.
        tokens: module -> name of the rows of its table that were trained, and their indices.
        fan_in_fan_out: the configuration's flag, see :meth:`_square_is_transposed`.
    """

    path: Path
    tensors: LazyMapping
    updates: Mapping[str, Update]
    saved: Mapping[str, str]
    factors: Mapping[str, str]
    tokens: Mapping[str, tuple[str, tuple[int, ...]]]
    fan_in_fan_out: bool

    def names(self) -> list[str]:
        """The parameters that are changed, those apart that the base may do without: biases that LoRA adds."""
        weights = [f"{module}.weight" for kind in (self.updates, self.factors, self.tokens) for module in kind]
        return list(dict.fromkeys([*weights, *self.saved]))

    def biases(self) -> list[str]:
        """The biases that LoRA of biases changes."""
        return [f"{module}.bias" for module, update in self.updates.items() if update.bias]

    def without(self, names: Iterable[str]) -> AdapterParts:
        """The same without what changes some parameters."""
        left = set(names)
        return replace(
            self,
            saved={name: saved for name, saved in self.saved.items() if name not in left},
            updates=_without(self.updates, left),
            factors=_without(self.factors, left),
            tokens=_without(self.tokens, left),
        )

    def changes(self, base: LazyMapping, removed: str, added: str) -> dict[str, Change]:
        """Name in the base -> what happens to it.

        Raises:
            StructureMismatchError: shapes differ, a bias is missing, or it cannot be told whether a square weight is
                transposed.
        """
        changes: dict[str, Change] = {}

        def change(name: str, **what: object) -> None:
            changes[name] = replace(changes.get(name, Change()), **what)  # type: ignore[arg-type]

        for name, saved in self.saved.items():
            target = added + name.removeprefix(removed)
            self._check_shape(name, self.tensors.shape(saved), base.shape(target))
            change(target, saved=saved)
        for module, (name, rows) in self.tokens.items():
            target = f"{added}{module.removeprefix(removed)}.weight"
            shape = base.shape(target)
            self._check_shape(f"{module}.weight, rows {len(rows)}", self.tensors.shape(name), (len(rows), *shape[1:]))
            outside = [row for row in rows if not 0 <= row < shape[0]]
            if outside:
                raise StructureMismatchError(
                    f"{self.path}: expected tokens below {shape[0]:,}, the rows of {target} in the base, got "
                    f"{first_few(outside)}. Use the base model that the adapter was trained on."
                )
            change(target, tokens=name, rows=rows)
        for module, name in self.factors.items():
            target = f"{added}{module.removeprefix(removed)}.weight"
            transposed = self._factor_is_transposed(module, self.tensors.shape(name), base.shape(target))
            change(target, factor=name, transposed=transposed)
            bias = target.removesuffix("weight") + "bias"
            if bias in base and self.tensors.shape(name)[0] != 1:
                self._check_shape(f"{module}.bias", self.tensors.shape(name)[:1], base.shape(bias))
                change(bias, factor=name)
        for module, target, transposed in self._placed_updates(base, removed, added):
            update = self.updates[module]
            change(target, update=update, transposed=transposed)
            if update.bias:
                name = target.removesuffix("weight") + "bias"
                self._check_bias(module, name, base)
                change(name, bias=update.bias, scale=update.scale)
        return changes

    def _placed_updates(self, base: LazyMapping, removed: str, added: str) -> list[tuple[str, str, bool]]:
        """Module, the weight's name in the base, and whether that is transposed."""
        shapes = {module: update.shape(self.tensors) for module, update in self.updates.items()}
        weights = {module: f"{added}{module.removeprefix(removed)}.weight" for module in self.updates}
        placed = []
        for module, update in self.updates.items():
            weight, product = weights[module], shapes[module]
            embedding = isinstance(update, LowRank) and update.embedding
            matrix = len(product) == 2 and not embedding
            expected = base.shape(weight)
            if matrix and product != expected and product[::-1] == tuple(expected):
                placed.append((module, weight, True))
                continue
            flat = matrix and len(expected) > 2 and not isinstance(update, LowRank)  # LoHa, LoKr of a convolution
            wanted = torch.Size((expected[0], expected[1:].numel())) if flat else expected
            self._check_shape(f"{module}.weight", product, wanted)
            square = matrix and not flat and product[0] == product[1]
            placed.append(
                (module, weight, embedding or (square and self._square_is_transposed(base, module, weights, shapes)))
            )
        return placed

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
        raise self._both_ways(module)

    def _factor_is_transposed(self, module: str, factor: torch.Size, weight: torch.Size) -> bool:
        """Whether a weight ``[in, out]`` is multiplied with what peft keeps for ``[out, in]``."""
        if len(factor) != 2 or len(weight) != 2 or 1 not in factor:
            raise StructureMismatchError(
                f"{self.path}: expected a factor [d, 1] or [1, k] of a matrix, got {tuple(factor)} for {module} of "
                f"shape {tuple(weight)}. Merge this adapter with peft, and use the merged model."
            )
        size, axis = max(factor), int(factor[0] == 1)
        if weight[0] != weight[1]:
            self._check_shape(f"{module}.weight", factor, factor if size in weight else weight)
            return weight[axis] != size
        self._check_shape(f"{module}.weight", factor, factor if size == weight[0] else weight)
        return self.fan_in_fan_out

    def _both_ways(self, module: str) -> StructureMismatchError:
        return StructureMismatchError(
            f"{self.path}: expected all adapted weights [out, in], or all [in, out], got both, and {module} is square. "
            "Merge this adapter with peft, and use the merged model."
        )

    def _check_bias(self, module: str, name: str, base: LazyMapping) -> None:
        update = self.updates[module]
        if name not in base:
            raise StructureMismatchError(
                f"{self.path}: expected a base with {name}, to which this adapter (lora_bias) adds, got a base whose "
                f"{module} has no bias. Give the base with these biases as zeros, where its network can have them "
                "(attention_bias, mlp_bias in its config.json), or train without lora_bias."
            )
        self._check_shape(f"{module}.bias", self.tensors.shape(update.bias), base.shape(name))

    def _check_shape(self, name: str, got: Iterable[int], expected: Iterable[int]) -> None:
        if tuple(got) != tuple(expected):
            raise StructureMismatchError(
                f"{self.path}: expected a change of {name} of shape {tuple(expected)}, as in the base, got "
                f"{tuple(got)}. Use the base model that the adapter was trained on."
            )


def adapter_difference(parts: AdapterParts, base: LazyMapping, changes: Mapping[str, Change]) -> LazyMapping:
    """τ under all names of the base with floating-point values, in float32 or float64.

    Raises:
        StructureMismatchError: a parameter that is changed has no floating-point values in the base.
    """
    used = {name: [parts.tensors.dtype(part) for part in change.parts()] for name, change in changes.items()}
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
        return super().slicer(name) if name in self._changes else zeros


def _value(
    tensors: LazyMapping, base: LazyMapping, changes: Mapping[str, Change], structure: Structure, name: str
) -> Tensor:
    shape, dtype = structure[name]
    change = changes.get(name)
    total = torch.zeros(shape, dtype=dtype)
    if change is None:
        return total

    def initial() -> Tensor:
        return base[name].detach().to("cpu", dtype)

    def read(part: str) -> Tensor:
        return tensors[part].detach().to(dtype)

    if change.saved:
        total += read(change.saved) - initial()
    if change.tokens:
        rows = torch.tensor(change.rows)
        total[rows] = read(change.tokens) - initial()[rows]
    if change.factor:
        factor = read(change.factor)
        factor = factor.reshape(shape) if len(shape) == 1 else factor.T if change.transposed else factor
        total += initial() * (factor - 1)
    if change.update is not None:
        total += _updated(change, tensors, lambda: initial() + total, base.dtype(name), shape, dtype)
    if change.bias:
        total += change.scale * read(change.bias)
    if not is_finite(total):
        raise NonFiniteError(
            f"adapter: expected a finite difference, got NaN or infinity in {name}. "
            "Train again with a lower learning rate, or remove this adapter."
        )
    return total


def _updated(
    change: Change,
    tensors: LazyMapping,
    start: Callable[[], Tensor],
    stored: torch.dtype,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """What an update adds to the weight W that ``start`` gives, in the weight's shape."""
    update = change.update
    assert update is not None
    product = update.product(tensors, dtype)
    truncated = update.truncated if isinstance(update, LowRank) else 0
    if truncated or update.magnitude:
        weight = start()
        weight = weight.T if change.transposed else weight.flatten(1)
        if truncated:  # KaSA: W without its smallest singular components is what is stored and adapted
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            kept = max(len(values) - truncated, 0)
            product = product + (((left[:, :kept] * values[:kept]) @ right[:kept]).to(stored).to(dtype) - weight)
        if update.magnitude:  # DoRA (Liu et al. 2024, equation 5): m (W + ΔW) / ‖W + ΔW‖, row by row
            moved = weight + product
            lengths = tensors[update.magnitude].detach().to(dtype).reshape(-1, 1)
            product = lengths / torch.linalg.vector_norm(moved, dim=1, keepdim=True) * moved - weight
    return (product.T if change.transposed else product).reshape(shape)


def _without(modules: Mapping[str, _What], left: set[str]) -> dict[str, _What]:
    return {module: what for module, what in modules.items() if f"{module}.weight" not in left}
