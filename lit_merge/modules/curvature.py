"""Quadratic forms in τ by the curvature of a network's features: Kronecker factors of several tasks, put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lit_merge.errors import FileFormatError, StructureMismatchError, first_few
from lit_merge.params import Params, check_finite
from lit_merge.vectors import LazyTensors
from lit_merge.vectors.statistics import (
    EIGENVALUES,
    INPUT_BASIS,
    INPUT_FACTOR,
    OUTPUT_BASIS,
    OUTPUT_FACTOR,
    WHOLE_FACTOR,
    bias_of,
    row_blocks,
)

__all__ = [
    "Curvature",
    "EigenCurvature",
    "LayerCurvature",
    "ParameterCurvature",
    "aggregated",
    "curvatures",
    "curvatures_of_files",
    "dtype_of_products",
    "kronecker_form",
]


class Curvature(ABC):
    """A symmetric matrix that makes a number of the changes of some parameters."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""

    @abstractmethod
    def of(self, changes: Mapping[str, Tensor]) -> Tensor | None:
        """The form, a scalar that can be differentiated once; None where none of the parameters is among the names."""

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> Curvature:
        """The same elsewhere."""


@dataclass(frozen=True)
class LayerCurvature(Curvature):
    """``tr(G Δ A Δᵀ)`` of a linear layer, Δ ``[out, in]`` or with the bias as its last column ``[out, in + 1]``.

    Args:
        weight: its name.
        bias: of its bias, "" for none.
        transposed: whether the weight is stored as ``[in, out]``.
        inputs: A, symmetric.
        outputs: G, ``[out, out]``, symmetric, or its diagonal blocks ``[k, out/k, out/k]``.
    """

    weight: str
    bias: str
    transposed: bool
    inputs: Tensor
    outputs: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Curvature`."""
        return (self.weight, self.bias) if self.bias else (self.weight,)

    def of(self, changes: Mapping[str, Tensor]) -> Tensor | None:
        """See :class:`Curvature`; of weight and bias one may have no change."""
        rows = self._rows(changes)
        return None if rows is None else self._form(rows)

    def _form(self, rows: Tensor) -> Tensor:
        return kronecker_form(rows, self.inputs, self.outputs)

    def _rows(self, changes: Mapping[str, Tensor]) -> Tensor | None:
        """Δ."""
        weight, bias = changes.get(self.weight), changes.get(self.bias)
        if weight is None and bias is None:
            return None
        if weight is None:
            assert bias is not None
            rows = bias.new_zeros(len(bias), len(self.inputs) - 1)
        else:
            rows = weight.mT if self.transposed else weight.flatten(1)
        if self.bias:
            rows = torch.cat([rows, (rows.new_zeros(len(rows)) if bias is None else bias).unsqueeze(1)], 1)
        return rows

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerCurvature:
        """See :class:`Curvature`."""
        return replace(self, inputs=self.inputs.to(device, dtype), outputs=self.outputs.to(device, dtype))


@dataclass(frozen=True)
class EigenCurvature(LayerCurvature):
    """``Σ_ij D_ij (Vᵀ Δ U)²_ij`` of a linear layer (EK-FAC, George et al. 2018), as :class:`LayerCurvature`.

    Args:
        weight: its name.
        bias: of its bias, "" for none.
        transposed: whether the weight is stored as ``[in, out]``.
        inputs: U, eigenvectors of A in its columns.
        outputs: V, those of G, or of its blocks.
        values: D, ``[out, in]``, or ``[k, out/k, in]``.
    """

    values: Tensor

    def _form(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.to(self.inputs.dtype).unflatten(0, (-1, self.outputs.shape[-1]))
            return (self.values * (self.outputs.mT @ wide @ self.inputs).to(self.values.dtype).square()).sum()

    def to(self, device: torch.device, dtype: torch.dtype) -> EigenCurvature:
        """See :class:`Curvature`; D is not rounded below float32."""
        moved = cast(EigenCurvature, super().to(device, dtype))
        return replace(moved, values=self.values.to(device, torch.promote_types(dtype, torch.float32)))


@dataclass(frozen=True)
class ParameterCurvature(Curvature):
    """``τᵀ F τ`` of all elements of one parameter.

    Args:
        name: the parameter's.
        matrix: F, symmetric.
    """

    name: str
    matrix: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Curvature`."""
        return (self.name,)

    def of(self, changes: Mapping[str, Tensor]) -> Tensor | None:
        """See :class:`Curvature`."""
        if self.name not in changes:
            return None
        return kronecker_form(changes[self.name].reshape(1, -1), self.matrix, self.matrix.new_ones(1, 1))

    def to(self, device: torch.device, dtype: torch.dtype) -> ParameterCurvature:
        """See :class:`Curvature`."""
        return replace(self, matrix=self.matrix.to(device, dtype))


def dtype_of_products(change: Tensor) -> torch.dtype:
    """What the products of a form are in: bfloat16 where autocast has the network's in it; float16 lacks the range."""
    kind = change.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return torch.bfloat16
    return torch.promote_types(change.dtype, torch.float32)


def kronecker_form(change: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """``tr(G Δ A Δᵀ)``, computed with its gradient ``2 G Δ A``, so that a backward pass has no further products.

    Args:
        change: Δ, ``[out, in]``.
        inputs: A, ``[in, in]``, symmetric; products are in its dtype.
        outputs: G, ``[out, out]``, symmetric, or its diagonal blocks ``[k, out/k, out/k]``; of the same dtype.

    Returns:
        A scalar that can be differentiated once, in float32 at least.
    """
    summed = torch.promote_types(inputs.dtype, torch.float32)
    with torch.autocast(change.device.type, enabled=False):
        with torch.no_grad():
            wide = change.to(inputs.dtype).unflatten(0, (-1, outputs.shape[-1]))
            curved = (outputs @ wide @ inputs).flatten(0, 1)
        # One of the two factors is held constant: half of the gradient.
        half = (curved.to(summed) * change.to(summed)).sum()
        return 2 * half - half.detach()


def aggregated(files: Sequence[LazyTensors]) -> Params:
    r"""One set of factors for all tasks, so that what they cost does not grow with T.

    .. math::
        A = \sum_t \frac{n_t}{N} A_t, \qquad G = \sum_t G_t, \qquad F = \sum_t \frac{n_t}{N} F_t

    Args:
        files: one for each task, as ``lit-merge statistics --kind kfac`` writes them, with means over ``n_t`` examples.

    Returns:
        The factors under the files' names and in their dtype, summed in float64, one after another.

    Raises:
        FileFormatError: a file does not say of how many examples it is.
        StructureMismatchError: the files are of different layers or shapes.
        NonFiniteError: a value is NaN or infinite.
    """
    _check_same_layers(files)
    first, counts = files[0], [_examples(file) for file in files]
    factors: Params = {}
    for name in first:
        total = torch.zeros((), dtype=torch.float64)
        for file, count in zip(files, counts, strict=True):
            factor = file[name]
            if factor.shape != first[name].shape:
                raise StructureMismatchError(
                    f"{file.path}: expected shape {tuple(first[name].shape)} for {name} as in {first.path}, got "
                    f"{tuple(factor.shape)}. Collect both files with the same settings."
                )
            total = total + (1.0 if name.startswith(OUTPUT_FACTOR) else count / sum(counts)) * factor.double()
        factors[name] = total.to(first[name].dtype)
    check_finite(factors, "Kronecker factors")
    return factors


def curvatures_of_files(files: Sequence[LazyTensors], parameters: Mapping[str, Tensor]) -> list[Curvature]:
    r"""What the factors of several tasks are about in a network, put together.

    Of plain factors that is one set whatever the number of tasks (:func:`aggregated`). With corrected eigenvalues every
    task has bases of its own: what is kept and computed grows with T, and forms are weighed by ``n_t / N``.

    Args:
        files: one for each task, as ``lit-merge statistics --kind kfac`` writes them.
        parameters: the network's, for their names and shapes.

    Raises:
        FileFormatError: a file does not say of how many examples it is.
        StructureMismatchError: the files are of different layers, shapes or kinds, or of another network.
        NonFiniteError: a value is NaN or infinite.
    """
    path = str(files[0].path)
    if not any(name.startswith(EIGENVALUES) for name in files[0]):
        return curvatures(aggregated(files), parameters, path)
    _check_same_layers(files)
    counts = [_examples(file) for file in files]
    found: list[Curvature] = []
    for file, count in zip(files, counts, strict=True):
        share = count / sum(counts)
        scaled = {n: value * (1 if n[:2] in (INPUT_BASIS, OUTPUT_BASIS) else share) for n, value in file.items()}
        check_finite(scaled, "Kronecker factors")
        found += curvatures(scaled, parameters, str(file.path))
    return found


def curvatures(factors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], path: str) -> list[Curvature]:
    """What aggregated factors are about in a network.

    Args:
        factors: of :func:`aggregated`, or of a file with corrected eigenvalues.
        parameters: the network's, for their names and shapes.
        path: of one of the files, for messages.

    Raises:
        StructureMismatchError: a factor is of none of the parameters, of another shape, or without its other half.
    """
    found: list[Curvature] = []
    for key, factor in factors.items():
        kind, name = key[:2], key[2:]
        weight = name.removesuffix(".T")
        if kind not in (*_INPUTS, *_OTHERS, WHOLE_FACTOR) or weight not in parameters:
            raise StructureMismatchError(
                f"{path}: expected factors of the network's parameters, got {key}. Collect them from this network."
            )
        if kind == WHOLE_FACTOR:
            _check_shape(key, factor, (parameters[name].numel(),) * 2, path)
            found.append(ParameterCurvature(name, factor))
        elif kind in _INPUTS:
            found.append(_layer(kind, name, factors, parameters, path))
        elif _OTHERS[kind] + name not in factors:
            raise _half(path, key, _OTHERS[kind] + name)
    return found


_INPUTS = {INPUT_FACTOR: OUTPUT_FACTOR, INPUT_BASIS: OUTPUT_BASIS}
_OTHERS = {OUTPUT_FACTOR: INPUT_FACTOR, OUTPUT_BASIS: INPUT_BASIS, EIGENVALUES: INPUT_BASIS}


def _layer(
    kind: str, name: str, factors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], path: str
) -> LayerCurvature:
    needed = [_INPUTS[kind], *([EIGENVALUES] if kind == INPUT_BASIS else [])]
    for other in needed:
        if other + name not in factors:
            raise _half(path, kind + name, other + name)
    inputs, (outputs, *values) = factors[kind + name], [factors[other + name] for other in needed]
    weight, transposed = parameters[name.removesuffix(".T")], name.endswith(".T")
    rows, columns = weight.mT.shape if transposed else weight.flatten(1).shape
    bias = bias_of(name) if len(inputs) == columns + 1 and bias_of(name) in parameters else ""
    width = columns + bool(bias)
    _check_shape(kind + name, inputs, (width, width), path)
    blocks = row_blocks(name)
    size = rows // blocks
    several = () if blocks == 1 else (blocks,)
    _check_shape(needed[0] + name, outputs, (*several, size, size), path)
    common = (name.removesuffix(".T"), bias, transposed, inputs, outputs)
    if not values:
        return LayerCurvature(*common)
    _check_shape(EIGENVALUES + name, values[0], (*several, size, width), path)
    return EigenCurvature(*common, values[0])


def _check_same_layers(files: Sequence[LazyTensors]) -> None:
    first = files[0]
    for file in files[1:]:
        missing, more = sorted(set(first) - set(file)), sorted(set(file) - set(first))
        if missing or more:
            got = f"nothing for {first_few(missing)}" if missing else f"others ({first_few(more)})"
            raise StructureMismatchError(
                f"{file.path}: expected factors of the same layers as in {first.path}, got {got}. Collect both files "
                "with the same settings."
            )


def _half(path: str, there: str, other: str) -> StructureMismatchError:
    return StructureMismatchError(f"{path}: expected {other} beside {there}, got nothing. Collect the file again.")


def _check_shape(key: str, factor: Tensor, shape: tuple[int, ...], path: str) -> None:
    if tuple(factor.shape) != shape:
        raise StructureMismatchError(
            f"{path}: expected shape {shape} for {key}, got {tuple(factor.shape)}. Collect them from this network."
        )


def _examples(file: LazyTensors) -> int:
    count = file.metadata.get("images", "")
    if not count.isdecimal() or int(count) < 1:
        raise FileFormatError(
            f"{file.path}: expected the number of examples as images in the header, got {count!r}. Collect it again."
        )
    return int(count)
