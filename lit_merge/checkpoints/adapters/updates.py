"""What each kind of adapter adds to one module's weight: factors by their names in the file, and their product."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.checkpoints.adapters.settings import Settings
from lit_merge.errors import FileFormatError
from lit_merge.files.lazy import LazyMapping

__all__ = ["ENDINGS", "Hadamard", "Kronecker", "LowRank", "Update", "update_of"]

ENDINGS = {  # ending of a name in the file -> which part of an update it is
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_diag": "diagonal",
    ".lora_A": "a",  # AdaLoRA
    ".lora_B": "b",
    ".lora_E": "diagonal",
    **{f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": part for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".ia3_l": "factor",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".trainable_tokens_delta": "tokens",
}
"""How the names of an adapter's tensors end, and what they are of their module."""


@dataclass(frozen=True)
class Update(ABC):
    """What is added to a weight.

    Attributes:
        scale: s, of the product and of the bias.
        bias: added to the module's bias, times s; "" if none.
        magnitude: m of DoRA, the lengths of the sum's rows; "" if none.
    """

    scale: float
    bias: str = ""
    magnitude: str = ""

    @abstractmethod
    def parts(self) -> list[str]:
        """Names of the tensors that the product is made of."""

    @abstractmethod
    def shape(self, tensors: LazyMapping) -> torch.Size:
        """Shape of the product, ``[d, k, …]``; nothing is read."""

    @abstractmethod
    def product(self, tensors: LazyMapping, dtype: torch.dtype) -> Tensor:
        """What is added, as a matrix ``[d, k]``, times s; further lengths are in k."""


@dataclass(frozen=True)
class LowRank(Update):
    """s · B A (Hu et al. 2022, equation 3), or s · B diag(e) A (AdaLoRA, KaSA).

    Attributes:
        a: A ``[r, k, …]``.
        b: B ``[d, r, …]``, its further lengths one.
        diagonal: e, r elements; "" if none.
        embedding: whether the module is a table ``[k, d]``.
        truncated: how many of the base weight's smallest singular components are taken away first (KaSA).
    """

    a: str = ""
    b: str = ""
    diagonal: str = ""
    embedding: bool = False
    truncated: int = 0

    def parts(self) -> list[str]:
        """Names of A, B and e."""
        return [self.a, self.b, *([self.diagonal] if self.diagonal else [])]

    def shape(self, tensors: LazyMapping) -> torch.Size:
        """``[d, k]``; of a convolution ``[d, k, …]``; of an embedding, where it is transposed, ``[k, d]``."""
        a, b = tensors.shape(self.a), tensors.shape(self.b)
        return torch.Size((*a[1:], *b[:1]) if self.embedding else (*b[:1], *a[1:]))

    def factors(self, tensors: LazyMapping, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B ``[d, r]`` and A ``[r, k]``, of which A is times e."""
        a, b = (tensors[name].detach().to(dtype).flatten(1) for name in (self.a, self.b))
        return b, a * tensors[self.diagonal].detach().to(dtype).reshape(-1, 1) if self.diagonal else a

    def product(self, tensors: LazyMapping, dtype: torch.dtype) -> Tensor:
        """The product s · B A."""
        b, a = self.factors(tensors, dtype)
        return self.scale * (b @ a)


@dataclass(frozen=True)
class Hadamard(Update):
    """s · (W1a W1b) ∘ (W2a W2b) (LoHa; Hyeon-Woo et al. 2022, equation 2), or with Tucker cores T1, T2 (their 3)."""

    w1_a: str = ""
    w1_b: str = ""
    w2_a: str = ""
    w2_b: str = ""
    t1: str = ""
    t2: str = ""

    def parts(self) -> list[str]:
        """Names of all that there are."""
        return [one for one in (self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2) if one]

    def shape(self, tensors: LazyMapping) -> torch.Size:
        """``[d, k]``, or with cores ``[d, k, …]``."""
        first, last = tensors.shape(self.w1_a), tensors.shape(self.w1_b)
        core = tensors.shape(self.t1)[2:] if self.t1 else ()
        return torch.Size((first[1] if self.t1 else first[0], last[1], *core))

    def product(self, tensors: LazyMapping, dtype: torch.dtype) -> Tensor:
        """The product by elements, times s."""
        first = _two_sided(tensors, dtype, self.t1, self.w1_a, self.w1_b)
        return self.scale * first * _two_sided(tensors, dtype, self.t2, self.w2_a, self.w2_b)


@dataclass(frozen=True)
class Kronecker(Update):
    """s · W1 ⊗ W2 (LoKr; Yeh et al. 2024, section 3.3), each of them whole or a product of two."""

    w1: str = ""
    w1_a: str = ""
    w1_b: str = ""
    w2: str = ""
    w2_a: str = ""
    w2_b: str = ""
    t2: str = ""

    def parts(self) -> list[str]:
        """Names of all that there are."""
        return [one for one in (self.w1, self.w1_a, self.w1_b, self.w2, self.w2_a, self.w2_b, self.t2) if one]

    def shape(self, tensors: LazyMapping) -> torch.Size:
        """``[d, k]``, or of a convolution ``[d, k, …]``."""
        first = tensors.shape(self.w1) if self.w1 else (tensors.shape(self.w1_a)[0], tensors.shape(self.w1_b)[1])
        if self.w2:
            second = tuple(tensors.shape(self.w2))
        else:
            left, right = tensors.shape(self.w2_a), tensors.shape(self.w2_b)[1]
            second = (left[1], right, *tensors.shape(self.t2)[2:]) if self.t2 else (left[0], right)
        return torch.Size((first[0] * second[0], first[1] * second[1], *second[2:]))

    def product(self, tensors: LazyMapping, dtype: torch.dtype) -> Tensor:
        """The Kronecker product, times s."""
        first = _whole(tensors, dtype, self.w1) if self.w1 else _two_sided(tensors, dtype, "", self.w1_a, self.w1_b)
        if self.w2:
            second = _whole(tensors, dtype, self.w2)
        else:
            second = _two_sided(tensors, dtype, self.t2, self.w2_a, self.w2_b, flat=False)
        first = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
        return self.scale * torch.kron(first, second.contiguous()).flatten(1)


def _whole(tensors: LazyMapping, dtype: torch.dtype, name: str) -> Tensor:
    return tensors[name].detach().to(dtype)


def _two_sided(tensors: LazyMapping, dtype: torch.dtype, core: str, left: str, right: str, flat: bool = True) -> Tensor:
    """L R; with a core ``[r, r, …]``, of which L ``[r, d]`` and R ``[r, k]`` make the first two lengths d and k."""
    first, last = _whole(tensors, dtype, left), _whole(tensors, dtype, right)
    if not core:
        return first @ last
    whole = torch.einsum("ij...,ip,jr->pr...", _whole(tensors, dtype, core), first, last)
    return whole.flatten(1) if flat else whole


def update_of(path: str, settings: Settings, tensors: LazyMapping, module: str, parts: Mapping[str, str]) -> Update:
    """A module's update, its tensors checked against each other and against the configuration.

    Args:
        path: how messages call the adapter.
        settings: its configuration.
        tensors: of its file.
        module: the module's name.
        parts: which part (a value of :data:`ENDINGS`) -> name in the file.

    Raises:
        FileFormatError: parts are missing, or do not fit each other or the configuration.
    """
    if settings.kind in ("LOHA", "LOKR"):
        return _lycoris(path, settings, tensors, module, parts)
    shapes = [tensors.shape(parts[which]) for which in "ab" if which in parts]
    whole = len(shapes) == 2 and min(map(len, shapes)) > 1 and (0 not in shapes[0] or settings.kind == "ADALORA")
    rank = shapes[0][0] if whole else 0
    square = whole and shapes[1][1] == rank and all(length == 1 for length in shapes[1][2:])
    sizes = {"magnitude": shapes[1][0], "bias": shapes[1][0], "diagonal": rank} if square else {}
    others = any(tensors.shape(parts[which]).numel() != size for which, size in sizes.items() if which in parts)
    diagonal = "diagonal" in parts
    if not square or others or diagonal != (settings.kind == "ADALORA" or bool(settings.get("kasa_config"))):
        got = ", ".join(f"{which} {tuple(tensors.shape(name))}" for which, name in parts.items())
        raise FileFormatError(
            f"{path}: expected factors A [r, …] and B [d, r] of {module}, got {got}. Save the adapter again."
        )
    if ("magnitude" in parts) != bool(settings.get("use_dora")):
        found = "a" if "magnitude" in parts else "no"
        raise FileFormatError(
            f"{path}: expected lengths of rows for {module} exactly with use_dora, got {found} lora_magnitude_vector. "
            "Use the configuration that was saved with them."
        )
    if settings.kind == "ADALORA":
        # Divided by the rank at first, whatever has been pruned; peft keeps it from zero.
        scale = settings.get("lora_alpha", 8) / (float(settings.get("init_r", 12)) + 1e-5)
        return LowRank(scale, a=parts["a"], b=parts["b"], diagonal=parts["diagonal"])
    ranks = settings.fitting("rank_pattern", module) or [settings.get("r", 8)]
    if rank not in ranks:
        raise FileFormatError(
            f"{path}: expected factors of rank {ranks[0]} for {module} by the configuration, got rank {rank}. "
            "Use the configuration that was saved with them."
        )
    alpha = settings.value("alpha_pattern", "lora_alpha", 8, module)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    embedding = parts["a"].endswith("lora_embedding_A")
    return LowRank(scale, **parts, embedding=embedding, truncated=rank if settings.get("kasa_config") else 0)


def _lycoris(path: str, settings: Settings, tensors: LazyMapping, module: str, parts: Mapping[str, str]) -> Update:
    kind: type[Update] = Hadamard if settings.kind == "LOHA" else Kronecker
    rank = settings.value("rank_pattern", "r", 8, module)
    scale = settings.value("alpha_pattern", "alpha", 8, module) / rank
    try:
        update = kind(scale, **parts)
        shape = update.shape(tensors)
        meta = _Meta(tensors)
        # On tensors without values, so that factors that do not fit are refused before anything is read.
        if update.product(meta, torch.float32).numel() != shape.numel():  # type: ignore[arg-type]
            raise IndexError
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        got = ", ".join(f"{which} {tuple(tensors.shape(name))}" for which, name in parts.items())
        raise FileFormatError(
            f"{path}: expected the factors of {settings.kind} for {module}, got {got}. Save the adapter again."
        ) from error
    return update


class _Meta:
    """The tensors of a file without their values."""

    def __init__(self, tensors: LazyMapping) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self._tensors.shape(name), device="meta")
