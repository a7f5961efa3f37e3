"""Parameters as ``dict[str, Tensor]`` under the model's own names: the one representation used everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_merge.errors import NonFiniteError, StructureMismatchError, first_few

__all__ = [
    "Params",
    "add",
    "add_scaled",
    "check_finite",
    "check_same_structure",
    "check_variance",
    "compare",
    "count_nonzero",
    "dot",
    "dtype_of",
    "fingerprint",
    "is_finite",
    "norm",
    "scale",
    "shape_of",
    "shapes_of",
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


def shapes_of(params: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Name -> shape, without reading the tensors of a lazy mapping."""
    return {name: shape_of(params, name) for name in params}


def compare(
    expected: Mapping[str, Sequence[int]],
    got: Mapping[str, Sequence[int]],
    required: Iterable[str] | None = None,
    unexpected: bool = True,
) -> str:
    """What two sets of names and shapes differ in, as words for a message.

    Args:
        expected: name -> shape, the reference.
        got: what is compared with it.
        required: the names that must be in ``got``; all of ``expected`` by default.
        unexpected: whether names that ``expected`` lacks count.

    Returns:
        E.g. ``"2 missing (a, b) and 1 of another shape (c (3,) instead of (4,))"``; empty if nothing differs.
    """
    differences = {
        "missing": [name for name in (expected if required is None else required) if name not in got],
        "unexpected": [name for name in got if unexpected and name not in expected],
        "of another shape": [
            f"{name} {tuple(got[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in got and tuple(got[name]) != tuple(shape)
        ],
    }
    parts = [f"{len(found)} {kind} ({first_few(found)})" for kind, found in differences.items() if found]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def check_same_structure(
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    what: str = "parameters",
    like: str = "",
    advice: str = "Use parameters of the same architecture.",
    required: Iterable[str] | None = None,
    unexpected: bool = True,
) -> None:
    """Refuse two sets of parameters whose names or shapes differ, see :func:`compare`.

    Args:
        expected: the reference, name -> tensor.
        got: what is compared with it.
        what: how the message calls ``got``.
        like: how it calls ``expected``; "the same N parameters" by default.
        advice: its end.
        required: the names that must be in ``got``; all of ``expected`` by default.
        unexpected: whether names that ``expected`` lacks are refused.

    Raises:
        StructureMismatchError: names are missing or unexpected, or shapes differ; the first offenders are named.
    """
    if found := compare(shapes_of(expected), shapes_of(got), required, unexpected):
        like = like or f"the same {len(expected)} parameters"
        raise StructureMismatchError(f"{what}: expected {like}, got {found}. {advice}")


def count_nonzero(values: Tensor) -> int:
    """How many elements of a tensor are not 0; on a CPU by NumPy, in half the time of torch's own."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return int(torch.count_nonzero(values))
    return int(np.count_nonzero(values.detach().numpy() != 0))


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; in one pass, two where its sum overflows."""
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if values.numel() == 0 or math.isfinite(float(values.sum())):
        return True  # a sum may overflow by itself, but it never hides what is not finite
    lowest, highest = torch.aminmax(values)
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


def check_variance(name: str, value: Tensor) -> Tensor:
    """Refuse a running variance below zero, which networks take the root of: a sum of vectors is no measurement.

    Args:
        name: of the tensor.
        value: what it would be.

    Returns:
        The same tensor.

    Raises:
        NonFiniteError: it is a running variance with a value below zero.
    """
    if name.rpartition(".")[2] == "running_var" and value.numel() and float(value.min()) < 0:
        raise NonFiniteError(
            f"{name}: expected a running variance of at least 0, got {float(value.min()):.3g} from a sum of task "
            "vectors. Leave running statistics out of them, as TaskVector.from_checkpoints does, and measure them."
        )
    return value


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
    """Inner product over all elements, accumulated in float64, one tensor at a time."""
    check_same_structure(first, second)
    return math.fsum(
        float(torch.dot(first[name].flatten().double(), second[name].flatten().double())) for name in first
    )


def norm(params: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all elements, accumulated in float64, one tensor at a time."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in params.values()))


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """A 16-digit hexadecimal fingerprint of names, shapes, dtypes and every value (SHA-256, names sorted)."""
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")  # not copied
    return digest.hexdigest()[:16]
