"""AdaRank: masks over the singular values of task vectors, learned together with merging coefficients."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.lazy import Computed
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.naming import is_attention, is_bias, is_mlp
from lit_merge.params import Params, add_scaled, working_dtype
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.matrices import decomposed
from lit_merge.vectors.storage import Storage
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["AdaRank", "SingularDirections", "combine_singular"]


@dataclass(frozen=True)
class AdaRank:
    """Which singular directions of every task vector take part in a merge is learned, one mask per direction.

    AdaRank (Lee et al. 2026, 2503.22178; as in the authors' program). Of every attention and MLP weight
    ``τ_t = Σ_i s_i u_i v_iᵀ``; the merge is ``θ0 + Σ_t λ_t Σ_i b_i s_i u_i v_iᵀ`` with ``b = [σ(m / temperature) > ½]``
    on the way there and the gradient of ``σ(m / temperature)`` on the way back (straight-through). The logits m start
    at ``start`` for the first ``⌊rank_fraction · r⌋`` directions and at ``-start`` for the others, r = min(rows,
    columns). All other parameters are merged as without masks.

    The authors learn for 10,000 steps with Adam at 1e-3, without a clamp, and start with λ = 0.3 and all directions on
    raw vectors, with λ = 2.3 and 0.16 of them on departures from the average (CART). Their program evaluates on
    labelled test images every 500 steps and logs the best of these; nothing here looks at labels.

    Args:
        rank_fraction: fraction of the directions that take part at first, in [0, 1].
        start: absolute value at which the logits start, positive.
        temperature: that the logits are divided by, positive.
        include: a regular expression; 2-D parameters in whose names it is found get masks, instead of the attention and
            MLP weights of the blocks.

    Raises:
        ConfigurationError: a number is out of range, or ``include`` is no regular expression.
    """

    rank_fraction: float = 1.0
    start: float = 0.1
    temperature: float = 10.0
    include: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank_fraction <= 1:
            raise ConfigurationError(f"AdaRank.rank_fraction: expected a number in [0, 1], got {self.rank_fraction}.")
        for name in ("start", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"AdaRank.{name}: expected a positive number, got {getattr(self, name)}.")
        try:
            re.compile(self.include or "")
        except (re.error, TypeError) as error:
            raise ConfigurationError(
                f"AdaRank.include: expected a regular expression, got {self.include!r} ({error})."
            ) from error

    def caution(self, learning_rate: float, steps: int) -> str | None:
        """What to say where no mask can change: Adam moves a logit by about its rate in a step, and has to reach zero.

        Args:
            learning_rate: of Adam.
            steps: of the whole run; not positive if they are not known.
        """
        if steps <= 0 or learning_rate * steps > self.start:
            return None
        return (
            f"masks: {steps} steps at a learning rate of {learning_rate:g} move a logit by {learning_rate * steps:.2g} "
            f"at most, and it has to move by {self.start:g} until its mask changes: all stay as they start. Set more "
            f"than {self.start / learning_rate:.0f} steps, a higher learning_rate or a lower AdaRank.start."
        )

    def ranks(self, vectors: TaskVectors) -> dict[str, int]:
        """Parameter -> the number of its singular values, of those that get masks, in their order.

        Raises:
            ConfigurationError: there is none.
        """
        found = {name: min(vectors.shape(name)[1:]) for name in vectors.names if self._has_masks(name, vectors)}
        if not found:
            wanted = "of attention or MLPs" if self.include is None else f"named {self.include!r}"
            raise ConfigurationError(
                f"masks: expected matrices {wanted} among the parameters, got {first_few(vectors.names)}. Set "
                "AdaRank.include to a part of their names."
            )
        return found

    def logits(self, ranks: Mapping[str, int], kept: Mapping[str, Tensor] | None, tasks: int) -> Tensor:
        """Where the logits start, ``(T, K)``, K the ranks' sum.

        Args:
            ranks: of every parameter.
            kept: parameter -> which directions take part, bool ``(T, r)``; by default the first ones.
            tasks: T.
        """
        parts = []
        for name, rank in ranks.items():
            first = torch.arange(rank) < count_of(float(self.rank_fraction), rank)
            chosen = first.expand(tasks, rank) if kept is None else kept[name]
            parts.append(torch.where(chosen, self.start, -self.start))
        return torch.cat(parts, 1)

    def applied(self, logits: Tensor) -> Tensor:
        """The masks, 0 or 1, in the logits' shape, with the gradient of ``σ(m / temperature)``."""
        soft = (logits / self.temperature).sigmoid()
        # What is added is 0 to the last bit, so that the masks are.
        return (soft.detach() > 0.5).to(soft) + (soft - soft.detach())

    def _has_masks(self, name: str, vectors: TaskVectors) -> bool:
        shape = vectors.shape(name)[1:]
        if len(shape) != 2 or not shape.numel() or is_bias(name):
            return False
        if self.include is not None:
            return re.search(self.include, name) is not None
        return is_attention(name) or is_mlp(name)


class SingularDirections:
    """T task vectors of M matrices as their singular directions, decomposed once, where a storage says.

    They take ``T Σ r (rows + columns)`` numbers, 4/3 of the vectors themselves in a transformer block whose MLP is four
    times as wide. Decompositions are done on the CPU, so that the directions are those of
    :class:`~lit_merge.transforms.LearnedScale`, which writes the merge.

    Args:
        vectors: of matrices alone, after any transforms.
        storage: ``device``, ``bfloat16``, ``host`` or ``mapped``, a temporary file that is read at every pass.
        device: where the merged weights are needed.

    Raises:
        ConfigurationError: a singular value decomposition fails.
    """

    def __init__(self, vectors: TaskVectors, storage: Storage, device: torch.device) -> None:
        self.device, self.tasks, self._storage = device, vectors.tasks, storage
        self._shapes = {name: vectors.shape(name)[1:] for name in vectors.names}
        self._ranks = {name: min(shape) for name, shape in self._shapes.items()}
        self._dtype = working_dtype(*(vectors.dtype(name) for name in vectors.names))
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        compute = partial(_packed, vectors)
        if storage == "mapped":
            self._folder = tempfile.TemporaryDirectory(prefix="lit-merge-", dir=os.environ.get("TMPDIR"))
            path = Path(self._folder.name) / "directions.safetensors"
            lengths = {name: torch.Size((len(self.tasks), self._length(name))) for name in self._shapes}
            write_tensors(path, Computed({n: (size, vectors.dtype(n)) for n, size in lengths.items()}, compute), {})
            self._held: Mapping[str, Tensor] = LazyTensors(path)
        else:
            self._held = {name: self._placed(compute(name)) for name in self._shapes}

    @property
    def names(self) -> Sequence[str]:
        """The M matrices."""
        return tuple(self._shapes)

    @property
    def columns(self) -> Tensor:
        """For each of the K directions which of the M matrices it belongs to."""
        return torch.repeat_interleave(torch.arange(len(self._ranks)), torch.tensor(list(self._ranks.values())))

    @property
    def bytes_held(self) -> int:
        """What the directions take in this process's memory, on the device or the host."""
        return 0 if self._folder is not None else sum(one.nbytes for one in self._held.values())

    @torch.no_grad()
    def add_weighted(
        self, scales: Tensor, base: Mapping[str, Tensor] | None, out: Mapping[str, Tensor] | None = None, first: int = 0
    ) -> Params:
        """``base[n] + Σ_t Σ_i scales[t, i] s_i u_i v_iᵀ`` of every matrix; without a base the sum alone.

        Args:
            scales: ``(T, K)``, or of fewer tasks.
            base: θ0; the results have its dtypes.
            out: tensors whose memory the results may take; new ones by default.
            first: the task of the first row of ``scales``.
        """
        scales = scales.detach().to(self.device, self._dtype)
        tasks = slice(first, first + len(scales))
        merged: Params = {}
        with torch.autocast(self.device.type, enabled=False):
            for name, part, left, right in self._factors():
                total = torch.zeros(self._shapes[name], dtype=self._dtype, device=self.device)
                for scale, u, v in zip(scales[:, part], left[tasks], right[tasks], strict=True):
                    # What is masked costs nothing where finding it does not wait for the device.
                    chosen = scale.nonzero().flatten() if self.device.type == "cpu" else slice(None)
                    total.addmm_((u[chosen] * scale[chosen].unsqueeze(1)).T, v[chosen])
                found = total if base is None else add_scaled(base[name].detach(), total)
                merged[name] = found if out is None else out[name].detach().copy_(found)
        return merged

    @torch.no_grad()
    def products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``s_i u_iᵀ G v_i`` of every direction, ``(T, K)`` in float64; 0 for a matrix without a gradient G."""
        found = torch.zeros(len(self.tasks), sum(self._ranks.values()), dtype=torch.float64, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for name, part, left, right in self._factors():
                if name in gradients:
                    gradient = gradients[name].detach().to(self.device, self._dtype)
                    for row, u, v in zip(found[:, part], left, right, strict=True):
                        row += ((u @ gradient) * v).sum(1)
        return found

    def _factors(self) -> Iterator[tuple[str, slice, Tensor, Tensor]]:
        """Of every matrix its place among the K, ``s_i u_i`` as ``(T, r, rows)`` and ``v_i`` as ``(T, r, columns)``."""
        before = 0
        for name, (rows, columns) in self._shapes.items():
            rank = self._ranks[name]
            packed = self._held[name].to(self.device, self._dtype, non_blocking=True)
            left = packed[:, : rank * rows].unflatten(1, (rank, rows))
            right = packed[:, rank * rows :].unflatten(1, (rank, columns))
            yield name, slice(before, before + rank), left, right
            before += rank

    def _length(self, name: str) -> int:
        return self._ranks[name] * sum(self._shapes[name])

    def _placed(self, packed: Tensor) -> Tensor:
        if self._storage == "host":
            return packed.pin_memory() if self.device.type == "cuda" else packed
        return packed.to(self.device, torch.bfloat16 if self._storage == "bfloat16" else self._dtype)


def combine_singular(
    base: Mapping[str, Tensor] | None,
    directions: SingularDirections,
    coefficients: Tensor,
    masks: Tensor,
    out: Mapping[str, Tensor] | None = None,
) -> Params:
    """``θ0 + Σ_t λ[t, n] Σ_i b[t, i] s_i u_i v_iᵀ`` of every matrix n, with gradients of λ and b computed by hand.

    With ``p[t, i] = s_i u_iᵀ G v_i``, ``∂L/∂λ[t, n] = Σ_i b p`` and ``∂L/∂b[t, i] = λ p``. As in
    :func:`lit_merge.functional.combine` nothing of the size of the parameters is saved for them.

    Args:
        base: θ0; None for 0.
        directions: the task vectors.
        coefficients: λ, ``(T, M)``.
        masks: b, ``(T, K)``.
        out: results of an earlier call that nobody needs any more; their memory may be used again.
    """
    merged: tuple[Tensor, ...] = _CombineSingular.apply(directions, base, coefficients, masks, out)
    return dict(zip(directions.names, merged, strict=True))


class _CombineSingular(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        directions: SingularDirections,
        base: Mapping[str, Tensor] | None,
        coefficients: Tensor,
        masks: Tensor,
        out: Mapping[str, Tensor] | None,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.directions = directions
        ctx.save_for_backward(coefficients, masks)
        sums = directions.add_weighted(coefficients[:, directions.columns.to(coefficients.device)] * masks, base, out)
        return tuple(sums[name] for name in directions.names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        coefficients, masks = ctx.saved_tensors
        directions: SingularDirections = ctx.directions
        given = {name: one for name, one in zip(directions.names, gradients, strict=True) if one is not None}
        products = directions.products(given).to(coefficients.device)
        columns = directions.columns.to(coefficients.device)
        own = torch.zeros(coefficients.shape, dtype=products.dtype, device=products.device)
        own.index_add_(1, columns, products * masks)
        return None, None, own.to(coefficients), (products * coefficients[:, columns]).to(masks), None


def _packed(vectors: TaskVectors, name: str) -> Tensor:
    """The singular directions of one matrix, ``(T, r (rows + columns))``: all ``s_i u_i``, then all ``v_i``."""
    left, values, right = decomposed("AdaRank", name, partial(torch.linalg.svd, full_matrices=False), vectors[name])
    return torch.cat([(left * values.unsqueeze(1)).mT.flatten(1), right.flatten(1)], 1)
