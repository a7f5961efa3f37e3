"""Parameters as ``dict[str, Tensor]`` under the model's own names: the one representation used everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.errors import NonFiniteError, StructureMismatchError, first_few

__all__ = [
    "Params",
    "add",
    "add_scaled",
    "check_finite",
    "check_same_structure",
    "dot",
    "dtype_of",
    "fingerprint",
    "is_finite",
    "norm",
    "scale",
    "shape_of",
    "working_dtype",
]

Params = dict[str, Tensor]


def shape_of(params: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of ``params[name]``; a lazy mapping with a ``shape(name)`` method answers without reading the tensor."""
    describe = getattr(params, "shape", None)
    return describe(name) if callable(describe) else params[name].shape


def dtype_of(params: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Dtype of ``params[name]``; a lazy mapping with a ``dtype(name)`` method answers without reading the tensor."""
    describe = getattr(params, "dtype", None)
    return describe(name) if callable(describe) else params[name].dtype


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if any of ``dtypes`` is float64, otherwise float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_same_structure(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], what: str = "parameters") -> None:
    """Refuse two sets of parameters whose names or shapes differ.

    Args:
        expected: the reference, name -> tensor.
        got: what is compared with it.
        what: how the message calls ``got``.

    Raises:
        StructureMismatchError: names are missing or unexpected, or shapes differ; the first offenders are named.
    """
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing ({first_few(missing)})")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected ({first_few(unexpected)})")
        raise StructureMismatchError(
            f"{what}: expected the same {len(expected)} parameter names, got {' and '.join(parts)}. "
            "Use parameters of the same architecture."
        )
    shapes = [
        f"{name} {tuple(shape_of(got, name))} instead of {tuple(shape_of(expected, name))}"
        for name in expected
        if shape_of(got, name) != shape_of(expected, name)
    ]
    if shapes:
        raise StructureMismatchError(
            f"{what}: {len(shapes)} parameters have another shape: {first_few(shapes)}. "
            "Use parameters of the same architecture."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity, in one pass and without a temporary."""
    if tensor.numel() == 0:
        return True
    lowest, highest = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return math.isfinite(float(lowest)) and math.isfinite(float(highest))


def check_finite(params: Mapping[str, Tensor], what: str = "parameters") -> None:
    """Refuse NaN and infinite values.

    Raises:
        NonFiniteError: naming the first tensors that hold such values.
    """
    offenders = [name for name, tensor in params.items() if not is_finite(tensor)]
    if offenders:
        raise NonFiniteError(
            f"{what}: expected finite values, got NaN or infinity in {first_few(offenders)}. "
            "Train again with a lower learning rate, or remove this input."
        )


def add(first: Mapping[str, Tensor], second: Mapping[str, Tensor], coefficient: float = 1.0) -> Params:
    """``first + coefficient * second``, name by name; both are left untouched."""
    check_same_structure(first, second)
    return {name: torch.add(tensor, second[name], alpha=coefficient) for name, tensor in first.items()}


def add_scaled(target: Tensor, update: Tensor, coefficient: float = 1.0) -> Tensor:
    """``target + coefficient * update`` in the dtype and on the device of ``target``.

    Computed in float32, or in float64 if either tensor is float64, and rounded once at the end.

    Args:
        target: floating-point tensor of any shape.
        update: floating-point tensor of the same shape.
        coefficient: factor of ``update``.

    Returns:
        A new tensor; both inputs are left untouched.
    """
    dtype = working_dtype(target.dtype, update.dtype)
    return torch.add(target.to(dtype), update.to(target.device, dtype), alpha=coefficient).to(target.dtype)


def scale(params: Mapping[str, Tensor], coefficient: float) -> Params:
    """``coefficient * params``, name by name."""
    return {name: tensor * coefficient for name, tensor in params.items()}


def dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Inner product over all entries, accumulated in float64, one tensor at a time."""
    check_same_structure(first, second)
    return math.fsum(
        float(torch.dot(first[name].flatten().double(), second[name].flatten().double())) for name in first
    )


def norm(params: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all entries, accumulated in float64, one tensor at a time."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in params.values()))


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """A 16-digit hexadecimal fingerprint of names, shapes, dtypes and every value (SHA-256, names sorted)."""
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")  # not copied
    return digest.hexdigest()[:16]
