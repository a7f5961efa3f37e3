"""A merged task vector as a LoRA adapter that peft opens: factors of a chosen rank for every weight that changed.

A linear rule of low-rank vectors is low-rank itself: Σ c_t s_t B_t A_t = [c_1 s_1 B_1, …] [A_1; …], which is written as
it stands, without any decomposition, as long as the ranks add up to no more than is asked for. What else lies within
the span of the inputs' factors is decomposed there (a matrix of rank × rank), and everything else as a whole; the best
approximation of a given rank is that of the largest singular values (Eckart and Young 1936), and its error is said.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoints.adapters.additions import is_embedding
from lit_merge.checkpoints.adapters.changes import Change
from lit_merge.checkpoints.adapters.reading import CONFIGURATION, Adapter
from lit_merge.checkpoints.pairing.ties import equal_tensors
from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping
from lit_merge.files.store import write_tensors
from lit_merge.files.text import write_text
from lit_merge.params import is_finite
from lit_merge.transforms.matrices import decomposed, triplets

__all__ = [
    "ADAPTER_STEM",
    "AdaptedWeight",
    "LoraPlan",
    "PlannedLora",
    "WrittenLora",
    "plan_lora",
    "write_lora",
    "written_lora",
]

ADAPTER_STEM = "adapter_model"
"""What peft calls the file of factors."""

_TABLES = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe|shared|relative_attention_bias)\.weight$", re.IGNORECASE)
_TRANSPOSING = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer", "ctrl")  # models of transformers' Conv1D
_AGREED = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")

Factors = tuple[Tensor, Tensor]
"""B ``[d, r]`` and A ``[r, k]``, whose product is the change of a weight as a matrix ``[d, k]``."""


@dataclass(frozen=True)
class AdaptedWeight:
    """One weight of the base that gets factors.

    Attributes:
        name: in the base.
        module: what peft calls the module.
        shape: of the weight.
        transposed: whether it is ``[k, d]`` (Conv1D, embeddings).
        embedding: whether it is a table.
        rank: of its factors, at most.
        known: for each input s, B and A of its change, as a reader of the file has them; None if it is no product.
    """

    name: str
    module: str
    shape: torch.Size
    transposed: bool
    embedding: bool
    rank: int
    known: tuple[tuple[Adapter, Change | None], ...] | None

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight's change as ``[d, k]``."""
        return tensor.T if self.transposed else tensor.flatten(1)

    def tensors(self, factors: Factors) -> dict[str, Tensor]:
        """The two tensors under peft's names."""
        b, a = factors
        start = f"base_model.model.{self.module}"
        if self.embedding:
            return {f"{start}.lora_embedding_A": a, f"{start}.lora_embedding_B": b}
        inner = self.shape[1:] if len(self.shape) > 2 else a.shape[1:]
        ones = (1,) * (len(self.shape) - 2)
        return {
            f"{start}.lora_A.weight": a.reshape(len(a), *inner),
            f"{start}.lora_B.weight": b.reshape(*b.shape, *ones),
        }


@dataclass(frozen=True)
class LoraPlan:
    """A LoRA adapter before anything is read.

    Attributes:
        weights: what gets factors.
        unchanged: what must not have changed, because LoRA cannot say it.
        settings: entries of the configuration that all inputs agree on.
        modules: all modules of the base with a matrix as weight, for short names of targets.
    """

    weights: tuple[AdaptedWeight, ...]
    unchanged: tuple[str, ...]
    settings: Mapping[str, Any]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class WrittenLora:
    """Factors in memory, and how far they are from what they stand for.

    Attributes:
        tensors: under peft's names.
        config: content of ``adapter_config.json``.
        error: ‖ΔW − s B A‖ / ‖ΔW‖ over all weights together, after rounding.
        worst: name and relative error of the weight where it is largest.
        exact: number of weights whose factors are the inputs' own, side by side.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    error: float
    worst: tuple[str, float]
    exact: int

    @property
    def header(self) -> dict[str, str]:
        """The header's entries that say what was lost."""
        return {"relative_error": f"{self.error:.3e}", "worst_weight": f"{self.worst[0]} {self.worst[1]:.3e}"}

    @property
    def config_text(self) -> str:
        """The configuration's file."""
        return json.dumps(self.config, indent=2, sort_keys=True) + "\n"

    def describe(self) -> str:
        """Ranks and errors in words."""
        ranks = sorted({self.config["r"], *self.config["rank_pattern"].values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        count = len(self.tensors) // 2
        joined = f"{self.exact} of them the inputs' factors side by side, " if self.exact else ""
        return (
            f"LoRA of {rank} for {count} weight{'s' * (count > 1)}, {joined}relative error {self.error:.1e}, "
            f"at most {self.worst[1]:.1e} ({self.worst[0]})"
        )


def plan_lora(
    base: LazyMapping,
    adapters: Sequence[Adapter | None],
    rank: int | None,
    config: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> LoraPlan:
    """Decide which weights get factors, from headers alone.

    Args:
        base: θ0.
        adapters: of each input; None for an input that is none.
        rank: of all factors, at most; None for the sum of the inputs' ranks.
        config: the base's ``config.json``.
        names: of the parameters that are merged; by default all of the base.

    Raises:
        ConfigurationError: ``rank`` is no positive number, or is not given and the inputs have none.
        StructureMismatchError: an adapter changes what LoRA cannot say: a bias, a norm, a tensor that was saved whole.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigurationError(f"rank: expected a positive number, got {rank!r}. Use e.g. 16.")
    config, merged = config or {}, list(base if names is None else names)
    modules = tuple(name.removesuffix(".weight") for name in base if len(base.shape(name)) == 2)
    known = [one for one in adapters if one is not None]
    if len(known) < len(adapters):
        if rank is None:
            raise ConfigurationError(
                "rank: expected a number, as not all inputs are LoRA adapters, whose ranks add up, got none. Set it."
            )
        weights, unchanged = _any_matrices(base, merged, rank, config)
        return LoraPlan(weights, unchanged, _agreed(known), modules)
    weights = _adapted(base, known, rank, config, merged)
    changed = {one.name for one in weights}
    return LoraPlan(weights, tuple(name for name in merged if name not in changed), _agreed(known), modules)


def written_lora(plan: LoraPlan, merged: Mapping[str, Tensor], dtype: torch.dtype) -> WrittenLora:
    """Factors of a merged task vector, and their configuration.

    Args:
        plan: of its weights.
        merged: τ; read one tensor at a time.
        dtype: to store factors in.

    Returns:
        The factors, in memory: they take little beside the model.

    Raises:
        StructureMismatchError: τ is not zero where LoRA cannot say it, or zero everywhere.
        NonFiniteError: a factor does not fit into ``dtype``.
    """
    if others := [name for name in plan.unchanged if name in merged and bool(merged[name].any())]:
        raise _inexpressible(others)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    missed = total = 0.0
    errors: dict[str, float] = {}
    exact = 0
    for weight in plan.weights:
        matrix = weight.matrix(merged[weight.name].detach().cpu())
        length = float(torch.linalg.vector_norm(matrix.double()))
        if not length:
            continue
        factors, joined = _factors(weight, matrix)
        b, a = (_rounded(one, dtype, weight.name) for one in factors)
        miss = float(torch.linalg.vector_norm(matrix.double() - b.double() @ a.double()))
        exact += joined
        missed, total = missed + miss**2, total + length**2
        errors[weight.name] = miss / length
        ranks[weight.module] = len(a)
        tensors.update(weight.tensors((b, a)))
    if not ranks:
        raise StructureMismatchError(
            "lora: expected a change of at least one weight, got a task vector of zeros. Check the coefficients."
        )
    worst = max(errors, key=errors.__getitem__)
    transposed = any(one.transposed and not one.embedding and one.module in ranks for one in plan.weights)
    config = _configuration(plan, ranks, transposed)
    return WrittenLora(tensors, config, math.sqrt(missed / total), (worst, errors[worst]), exact)


class PlannedLora(Computed):
    """The factors of a merge before they are computed: names, and shapes of the highest ranks that they can have.

    Args:
        plan: of its weights.
        merged: τ.
        dtype: to store factors in.
    """

    def __init__(self, plan: LoraPlan, merged: LazyMapping, dtype: torch.dtype) -> None:
        self.plan, self._merged, self._dtype = plan, merged, dtype
        shapes = [one.tensors(_blank(one)) for one in plan.weights]
        structure = {name: (tensor.shape, dtype) for tensors in shapes for name, tensor in tensors.items()}
        super().__init__(structure, lambda name: self.written.tensors[name])

    @cached_property
    def written(self) -> WrittenLora:
        """What they are, computed when it is first asked for; see :func:`written_lora`."""
        return written_lora(self.plan, self._merged, self._dtype)


def _blank(weight: AdaptedWeight) -> Factors:
    rows = _rows(weight)
    columns = weight.shape.numel() // max(rows, 1)
    return torch.empty(rows, weight.rank, device="meta"), torch.empty(weight.rank, columns, device="meta")


def write_lora(folder: Path, written: WrittenLora, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter's two files, each whole or not at all, the factors last.

    Args:
        folder: created if it is missing.
        written: the factors.
        metadata: more entries of the header.

    Raises:
        WriteError: the disk is full or not writable.
    """
    write_text(folder / CONFIGURATION, written.config_text)
    header = {"format": "pt", **(metadata or {}), **written.header}
    write_tensors(folder / f"{ADAPTER_STEM}.safetensors", written.tensors, header)


def _rows(weight: AdaptedWeight) -> int:
    return weight.shape[1] if weight.transposed else weight.shape[0]


def _adapted(
    base: LazyMapping,
    adapters: Sequence[Adapter],
    rank: int | None,
    config: Mapping[str, Any],
    merged: Sequence[str],
) -> tuple[AdaptedWeight, ...]:
    """The weights that adapters change, with their factors."""
    found = [(one, _changes(one, base, config, set(merged))) for one in adapters]
    names = dict.fromkeys(name for _, changes in found for name in changes)
    single = [
        name
        for name in names
        for _, changes in found
        if name in changes and (changes[name].update is None or changes[name].saved or changes[name].tokens)
    ]
    if single:
        raise _inexpressible(dict.fromkeys(single))
    places = [(one.placement(base), changes) for one, changes in found]
    weights = []
    for name in names:
        mine = [changes[name] for _, changes in found if name in changes]
        removed, added = next(place for place, changes in places if name in changes)
        shape = base.shape(name)
        embedding = any(getattr(one.update, "embedding", False) for one in mine)
        rows = shape[1] if mine[0].transposed else shape[0]
        full = min(rows, shape.numel() // max(rows, 1))
        known = tuple((one, changes.get(name)) for one, changes in found)
        ranks = [_rank(one, change) for one, change in known]
        whole = sum(one for one in ranks if one is not None)
        if None in ranks and rank is None:
            raise ConfigurationError(
                f"rank: expected a number, as the change of {name} is no product of factors (DoRA, KaSA, LoHa, LoKr or "
                "IA3), got none. Set it."
            )
        module = f"{removed}{name.removeprefix(added)}".removesuffix(".weight")
        most = min(full, rank or whole)
        usable = None if None in ranks else known
        weights.append(AdaptedWeight(name, module, shape, mine[0].transposed, embedding, most, usable))
    return tuple(weights)


def _changes(adapter: Adapter, base: LazyMapping, config: Mapping[str, Any], merged: set[str]) -> dict[str, Change]:
    """What an adapter changes of the merged parameters; peft saves a copy of the table beside its factors."""
    found = {name: change for name, change in adapter.changes(base, config).items() if name in merged}
    copies = [
        name
        for name, change in found.items()
        if change.saved and change.update and equal_tensors(adapter.tensors, change.saved, base, name)
    ]
    return {name: replace(change, saved="") if name in copies else change for name, change in found.items()}


def _rank(adapter: Adapter, change: Change | None) -> int | None:
    if change is None:
        return 0
    return None if change.factored is None else adapter.tensors.shape(change.factored.a)[0]


def _any_matrices(
    base: LazyMapping, names: Sequence[str], rank: int, config: Mapping[str, Any]
) -> tuple[tuple[AdaptedWeight, ...], tuple[str, ...]]:
    """All matrices, and what is none."""
    transposing = config.get("model_type") in _TRANSPOSING
    weights, others = [], []
    for name in names:
        shape = base.shape(name)
        if len(shape) != 2 or not name.endswith(".weight"):
            others.append(name)
            continue
        embedding = is_embedding(name) or _TABLES.search(name) is not None
        module = name.removesuffix(".weight")
        transposed = embedding or (transposing and not name.endswith("lm_head.weight"))
        weights.append(AdaptedWeight(name, module, shape, transposed, embedding, min(rank, *shape), None))
    return tuple(weights), tuple(others)


def _inexpressible(names: Iterable[str]) -> StructureMismatchError:
    listed = list(names)
    return StructureMismatchError(
        f"lora: expected changes of weights of linear layers, convolutions and embeddings, got {len(listed)} that LoRA "
        f"cannot say ({first_few(listed)}). Leave them out (leave_out), or write weights or a task vector."
    )


def _agreed(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Entries of the configurations that all have and that are the same."""
    entries: dict[str, Any] = {}
    for key in _AGREED:
        values = [one.settings.get(key) for one in adapters]
        if values and values[0] is not None and all(value == values[0] for value in values):
            entries[key] = values[0]
    if adapters and all(one.settings.get("ensure_weight_tying") for one in adapters):
        entries["ensure_weight_tying"] = True
    return entries


def _factors(weight: AdaptedWeight, matrix: Tensor) -> tuple[Factors, bool]:
    """B and A of a change, and whether they are the inputs' own."""
    if weight.known is not None:
        scaled = [_scaled(adapter, change) for adapter, change in weight.known if change is not None]
        eps = torch.finfo(matrix.dtype).eps
        wide = matrix.double()
        b, a = torch.cat([one for one, _ in scaled], 1), torch.cat([one for _, one in scaled])
        if (coefficients := _coefficients(scaled, wide, eps)) is not None:
            kept = [index for index, one in enumerate(coefficients) if one]
            b = torch.cat([coefficients[index] * scaled[index][0] for index in kept], 1)
            a = torch.cat([scaled[index][1] for index in kept])
            if len(a) <= weight.rank:
                return (b, a), True
            core = (torch.linalg.qr(b), torch.linalg.qr(a.T))
            (left, first), (right, second) = core
            return _truncated(weight, first @ second.T, left, right), False
        left, right = torch.linalg.qr(b)[0], torch.linalg.qr(a.T)[0]
        inner = left.T @ wide @ right
        outside = torch.linalg.vector_norm(wide - left @ inner @ right.T)
        if outside <= 8 * eps * torch.linalg.vector_norm(wide):
            return _truncated(weight, inner, left, right), False
    return _truncated(weight, matrix, None, None), False


def _scaled(adapter: Adapter, change: Change) -> Factors:
    update = change.factored
    assert update is not None
    b, a = update.factors(adapter.tensors, torch.float64)
    return update.scale * b, a


def _coefficients(scaled: Sequence[Factors], matrix: Tensor, eps: float) -> list[float] | None:
    """The c with matrix = Σ c_t B_t A_t up to rounding; None if there are none.

    Least squares over products of factors, which are small. What differs from a number of six digits by less than the
    rounding of the matrix is that number: 1 and −1 stay what they are.
    """
    gram = torch.stack([
        torch.stack([((b.T @ other_b) * (a @ other_a.T)).sum() for other_b, other_a in scaled]) for b, a in scaled
    ])  # fmt: skip
    inner = torch.stack([((b.T @ matrix) * a).sum() for b, a in scaled])
    lengths = gram.diagonal().clamp_min(0).sqrt()
    units = torch.where(lengths > 0, lengths, 1.0)
    solved = torch.linalg.lstsq(gram / units / units[:, None], (inner / units)[:, None], driver="gelsd").solution
    sizes = solved[:, 0].tolist()  # c_t ‖B_t A_t‖
    total = sum(map(abs, sizes))
    found = [
        _plain(c, eps * total / unit) for c, unit in zip((solved[:, 0] / units).tolist(), units.tolist(), strict=True)
    ]
    summed = sum((c * (b @ a) for c, (b, a) in zip(found, scaled, strict=True)), torch.zeros_like(matrix))
    return found if float(torch.linalg.vector_norm(matrix - summed)) <= 8 * eps * total else None


def _plain(value: float, rounding: float) -> float:
    short = float(f"{value:.6g}")
    return 0.0 if abs(value) <= rounding else short if abs(value - short) <= rounding else value


def _truncated(weight: AdaptedWeight, core: Tensor, left: Tensor | None, right: Tensor | None) -> Factors:
    """The largest singular values of L core Rᵀ, their roots on both sides; L and R have orthonormal columns."""
    first, values, second = decomposed("lora", weight.name, triplets, core, weight.rank)
    roots = values.sqrt()
    b, a = first * roots, roots[:, None] * second
    return (b if left is None else left @ b), (a if right is None else a @ right.T)


def _rounded(factor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = factor.to(dtype).contiguous()
    if not is_finite(stored):
        raise NonFiniteError(
            f"lora: expected factors that fit into {dtype}, got {float(factor.abs().max()):.3g} in {name}. "
            "Store them as bfloat16 or float32."
        )
    return stored


def _configuration(plan: LoraPlan, ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    """The entries of ``adapter_config.json``; α is the rank everywhere, so that s is one."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    modules = list(ranks)
    others = {_pattern(module, modules): rank for module, rank in sorted(ranks.items()) if rank != usual}
    return {
        "peft_type": "LORA",
        **{"base_model_name_or_path": None, "task_type": None, "auto_mapping": None, "revision": None},
        "ensure_weight_tying": False,
        **plan.settings,
        **{"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others},
        "target_modules": _targets(modules, plan.modules),
        **{"fan_in_fan_out": transposed, "bias": "none", "lora_bias": False, "lora_dropout": 0.0},
        **{"use_rslora": False, "use_dora": False, "init_lora_weights": True, "inference_mode": True},
        **{"modules_to_save": None, "layers_to_transform": None, "layers_pattern": None},
    }


def _pattern(module: str, modules: Sequence[str]) -> str:
    """A key of a pattern that fits this module alone."""
    return f"^{re.escape(module)}" if any(one.endswith("." + module) for one in modules) else module


def _targets(modules: Sequence[str], known: Sequence[str]) -> list[str]:
    """The last parts of the modules' names, where all modules of the base that end so are adapted; else whole names."""
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    targeted = {one for one in known if one.rpartition(".")[2] in leaves}
    return leaves if targeted <= set(modules) else sorted(modules)
