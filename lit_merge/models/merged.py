"""A network whose weights are θ0 + Σ_t λ_t τ_t, with the merging coefficients λ as its only trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.functional import combine
from lit_merge.functional.recomputation import call_once
from lit_merge.models.adarank import AdaRank, SingularDirections, combine_singular
from lit_merge.params import Params, compare, shapes_of
from lit_merge.vectors.coefficients import Coefficients
from lit_merge.vectors.groups import Granularity, group_names
from lit_merge.vectors.storage import Storage, VectorStorage
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["MergedModel", "swapped"]

_RECOMPUTATION = (
    "MergedModel: expected a module without activation checkpointing, which would run it again on θ0 in the backward "
    "pass, got one that recomputes. Switch it off, or set use_reentrant=False and call module and backward() inside "
    "`with swapped(model.module, model.merged_parameters())`."
)


class MergedModel(nn.Module):
    """``f(x; θ0 + Σ_t λ[t, g] τ_t)`` with learnable λ, one per task t and group g of parameters.

    AdaMerging's model (Yang et al. 2024, equations 6 and 7). ``granularity="task"`` is its "task-wise", ``"tensor"``
    its "layer-wise" form; with trimmed and sign-elected task vectors it is AdaMerging++. Buffers are the module's own.

    The task vectors are read, and stored where ``storage`` says, when the weights are merged for the first time, on the
    device on which the coefficients are then. They are no parameters and no buffers: neither moved, nor saved.

    Args:
        module: ``f``, with θ0 as its parameters, which stop requiring gradients. They are its own storage, no copy. Its
            mode (dropout) is its own, too: this model's ``train()`` and ``eval()`` leave it as it is.
        task_vectors: T of them, after any transforms, under the module's parameter names; parameters that they lack
            stay at θ0.
        granularity: which parameters share a coefficient, see :func:`lit_merge.vectors.groups.group_names`.
        init: where λ starts: one number, one per task (in their order or by name), or :class:`Coefficients`.
        clamp: the range that λ is clamped to whenever it is used, or None. The gradient of a coefficient outside of it
            is zero; on its border it is not.
        storage: where the task vectors are, see :class:`lit_merge.vectors.storage.VectorStorage`.
        sharded: whether each process holds 1/W of every task vector only.
        masks: learn which singular directions of the matrices take part, too.

    Attributes:
        coefficients: λ before clamping, ``(T, L)``, float32 or float64 whatever the module is converted to.
        mask_logits: of ``masks``, ``(T, K)``, one per singular direction, in the coefficients' dtype; else None.
        ranks: parameter -> the number of its singular directions, of those that have masks.
        tasks: the T tasks.
        groups: the L groups' names.
        members: parameter -> its group.
        clamp: the range, or None.

    Raises:
        ConfigurationError: an argument is out of range, or λ starts outside of ``clamp``.
        StructureMismatchError: the task vectors or coefficients are not this module's.

    Examples:
        >>> import torch
        >>> from lit_merge.vectors import TaskVector, TaskVectors
        >>> vectors = [TaskVector({"weight": torch.eye(2)}, "a"), TaskVector({"weight": torch.ones(2, 2)}, "b")]
        >>> network = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(network.weight)
        >>> MergedModel(network, TaskVectors(vectors), init=[0.5, 0.25])(torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """

    def __init__(
        self,
        module: nn.Module,
        task_vectors: TaskVectors,
        granularity: Granularity = "tensor",
        init: float | Sequence[float] | Mapping[str, float] | Coefficients = 0.3,
        clamp: tuple[float, float] | None = (0.0, 1.0),
        storage: Storage = "device",
        sharded: bool = False,
        masks: AdaRank | None = None,
    ) -> None:
        super().__init__()
        own = dict(module.named_parameters())
        _check_structure(own, task_vectors)
        # In the module's order, which groups, files and figures then have; that of a file is alphabetical.
        names = [name for name in own if name in task_vectors]
        self._vectors = task_vectors if list(task_vectors.names) == names else task_vectors.restrict(names)
        self.tasks = task_vectors.tasks
        self.granularity = granularity
        group_of = group_names(names, granularity)
        self.members = dict(zip(names, group_of, strict=True))
        self.groups = tuple(dict.fromkeys(group_of))
        self._columns = [self.groups.index(group) for group in group_of]
        self.clamp = _checked_range(clamp)
        self.storage, self.sharded = storage, sharded
        start = self._starting_values(init)
        wide = any(task_vectors.dtype(name) == torch.float64 for name in names)
        self.coefficients = nn.Parameter(start.to(torch.float64 if wide else torch.float32))
        self.masks = masks
        self.ranks = {} if masks is None else masks.ranks(self._vectors)
        self.mask_logits = self._starting_masks(init)
        self._plain_names = [name for name in names if name not in self.ranks]
        # Beside the registered modules: the coefficients are what trains and what a checkpoint holds.
        self._base = [module.requires_grad_(False)]
        self._stored: VectorStorage | None = None
        self._singular: SingularDirections | None = None

    @property
    def module(self) -> nn.Module:
        """``f``, with θ0 as its parameters."""
        return self._base[0]

    @property
    def task_vectors(self) -> TaskVectors:
        """What is merged, in the order of the module's parameters."""
        return self._vectors

    def applied(self) -> Tensor:
        """λ as it is used, after clamping: ``(T, L)``, differentiable."""
        if self.clamp is None:
            return self.coefficients
        lowest, highest = self.clamp
        inside = (self.coefficients >= lowest) & (self.coefficients <= highest)
        # Not by torch.clamp, whose gradient on the border depends on the version: λ may start there.
        return torch.where(inside, self.coefficients, self.coefficients.detach().clamp(lowest, highest))

    def merged_parameters(self, tangent: bool = False, out: Mapping[str, Tensor] | None = None) -> Params:
        """θ0 + Σ_t λ_t τ_t of the parameters that the task vectors have, differentiable with respect to λ.

        Args:
            tangent: without θ0: the merged task vector, for linearised networks.
            out: results of an earlier call that nobody needs any more; their memory may be used again.
        """
        if torch.compiler.is_compiling():  # reading vectors and summing them up on threads of its own is no graph
            return torch.compiler.disable(self._merged)(tangent, out)
        return self._merged(tangent, out)

    def _merged(self, tangent: bool, out: Mapping[str, Tensor] | None) -> Params:
        base, applied = self.base_parameters(tangent), self.applied()
        if self.masks is None:
            return combine(base, self.vector_storage(), applied, self._columns, out)
        column = dict(zip(self.members, self._columns, strict=True))
        found: Params = {}
        if self._plain_names:
            found = combine(base, self.vector_storage(), applied, [column[name] for name in self._plain_names], out)
        own = applied[:, [column[name] for name in self.ranks]]
        found |= combine_singular(base, self.singular_directions(), own, self.applied_masks(), out)
        return {name: found[name] for name in self.members}

    def base_parameters(self, tangent: bool) -> Params | None:
        """θ0 of the parameters that are merged; None of a tangent, which has no base."""
        if tangent:
            return None
        return {name: own for name, own in self.module.named_parameters() if name in self.members}

    def individual_parameters(self, row: int, tangent: bool = False, out: Mapping[str, Tensor] | None = None) -> Params:
        """θ0 + τ_t of one task vector alone, whatever the coefficients; without gradients.

        Args:
            row: t, a position in :attr:`tasks`.
            tangent: without θ0: τ_t itself.
            out: results of an earlier call that nobody needs any more; their memory may be used again.
        """
        base = self.base_parameters(tangent)
        if self.masks is None:
            return self.vector_storage().add_one(row, base, out)
        plain = self.vector_storage().add_one(row, base, out) if self._plain_names else {}
        whole = torch.ones(1, sum(self.ranks.values()))
        return {**plain, **self.singular_directions().add_weighted(whole, base, out, row)}

    def applied_masks(self) -> Tensor:
        """Which singular directions take part, 0 or 1: ``(T, K)``, with a straight-through gradient.

        Raises:
            ConfigurationError: the model has no masks.
        """
        if self.masks is None or self.mask_logits is None:
            raise ConfigurationError("masks: expected a model that learns them, got one without. Set masks: AdaRank.")
        return self.masks.applied(self.mask_logits)

    def learned_parameters(self) -> list[nn.Parameter]:
        """What trains: the coefficients, and the masks if there are any."""
        return [self.coefficients] if self.mask_logits is None else [self.coefficients, self.mask_logits]

    def singular_directions(self) -> SingularDirections:
        """The singular directions of the matrices that have masks; decomposed when first called on a device.

        Raises:
            ConfigurationError: a singular value decomposition fails.
        """
        device = self.coefficients.device
        if self._singular is None or self._singular.device != device:
            self._singular = None
            self._singular = SingularDirections(self._vectors.restrict(list(self.ranks)), self.storage, device)
        return self._singular

    def vector_storage(self) -> VectorStorage:
        """The task vectors where ``storage`` says; read when this is called for the first time on a device.

        With masks, those of the parameters that have none.

        Raises:
            ConfigurationError: there is too little memory; the message says which storage would fit.
        """
        device = self.coefficients.device
        if self._stored is None or self._stored.device != device:
            self._stored = None
            plain = self._vectors if self.masks is None else self._vectors.restrict(self._plain_names)
            self._stored = VectorStorage(plain, self.storage, device, self.sharded)
        return self._stored

    def to_coefficients(self, metadata: Mapping[str, str] | None = None) -> Coefficients:
        """λ as it is used, and the masks, with the tasks and parameters that they belong to."""
        values, masks = self.applied().detach(), {}
        if self.masks is not None:
            parts = self.applied_masks().detach().cpu().bool().split(list(self.ranks.values()), 1)
            masks = dict(zip(self.ranks, parts, strict=True))
        return Coefficients(values, self.tasks, self.groups, self.members, self.granularity, metadata or {}, masks)

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """``f`` with merged weights; they are merged anew in every call, differentiably.

        Raises:
            ConfigurationError: gradients are recorded and ``f`` uses activation checkpointing, which would run it
                again on θ0 in the backward pass.
        """
        with swapped(self.module, self.merged_parameters()):
            result: Tensor = call_once(self.module, inputs, keywords, _RECOMPUTATION)
            return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedModel:
        """Move or convert θ0 and the module's buffers too; λ keeps its precision, as small steps vanish in bfloat16."""
        self.module._apply(fn, recurse)
        precise = [one.detach() for one in self.learned_parameters()]
        super()._apply(fn, recurse)
        for one, before in zip(self.learned_parameters(), precise, strict=True):
            if one.dtype.itemsize < before.dtype.itemsize:
                one.data = before.to(one.device)
        return self

    def _starting_masks(self, init: object) -> nn.Parameter | None:
        known = init.masks if isinstance(init, Coefficients) else {}
        if self.masks is None:
            if known:
                raise ConfigurationError(
                    f"init: expected coefficients without masks, got masks of {first_few(known)}. Set masks: AdaRank."
                )
            return None
        if self.sharded:
            raise ConfigurationError(
                "sharded: expected false with masks, whose directions every process needs whole, got true. Use storage "
                "bfloat16 or mapped to save memory."
            )
        if known and set(known) != set(self.ranks):
            others = sorted(set(known) ^ set(self.ranks))
            raise ConfigurationError(
                f"init: expected masks of {first_few(self.ranks)}, got others or none of {first_few(others)}. Set "
                "AdaRank.include as it was."
            )
        kept = dict(init.for_tasks(self.tasks).masks) if isinstance(init, Coefficients) and known else None
        logits = self.masks.logits(self.ranks, kept, len(self.tasks))
        return nn.Parameter(logits.to(self.coefficients.dtype))

    def _starting_values(self, init: float | Sequence[float] | Mapping[str, float] | Coefficients) -> Tensor:
        shape = (len(self.tasks), len(self.groups))
        if isinstance(init, Coefficients):
            init.check_fits(self._vectors)
            known = init.for_tasks(self.tasks)
            columns = {group: known.of(name) for name, group in self.members.items()}
            values = torch.stack([columns[group] for group in self.groups], dim=1)
            spread = [name for name, group in self.members.items() if not torch.equal(known.of(name), columns[group])]
            if spread:
                raise ConfigurationError(
                    f"init: expected coefficients that are equal within each group of granularity {self.granularity}, "
                    f"got others for {first_few(spread)}. Use granularity {known.granularity}."
                )
        else:
            if isinstance(init, Mapping):
                if set(init) != set(self.tasks):
                    raise ConfigurationError(
                        f"init: expected a number for each of {first_few(self.tasks, 12)}, got {first_few(init, 12)}. "
                        "Name every task once."
                    )
                init = [init[task] for task in self.tasks]
            numbers = list(init) if isinstance(init, Sequence) else [init] * len(self.tasks)
            valid = all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers)
            if len(numbers) != len(self.tasks) or not valid:
                raise ConfigurationError(
                    f"init: expected a finite number, or one for each of {len(self.tasks)} tasks, got {init!r}. "
                    "Use e.g. 0.3."
                )
            values = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1).expand(shape)
        values = values.clone()
        if self.clamp is not None and bool(((values < self.clamp[0]) | (values > self.clamp[1])).any()):
            raise ConfigurationError(
                f"init: expected numbers within clamp, [{self.clamp[0]:g}, {self.clamp[1]:g}], got some from "
                f"{float(values.min()):g} to {float(values.max()):g}, which could never be learned. Change one of them."
            )
        return values


@contextmanager
def swapped(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let tensors stand in for parameters of a module for a while.

    Unlike with ``torch.func.functional_call`` they stay in place for as long as the context, so that the backward pass
    may be inside, in which activation checkpointing runs the module again; and shared parameters are put back.

    Args:
        module: put back as it was in the end; a parameter that it uses in several places is replaced in all of them.
        parameters: under the names of ``module.named_parameters()``.
    """
    by_identity = {id(own): parameters[name] for name, own in module.named_parameters() if name in parameters}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for leaf, own in list(part._parameters.items()):
            if own is not None and id(own) in by_identity:
                replaced.append((part, leaf, own))
    try:
        for part, leaf, own in replaced:
            part._parameters[leaf] = by_identity[id(own)]  # type: ignore[assignment]
        yield
    finally:
        for part, leaf, own in replaced:
            part._parameters[leaf] = own


def _check_structure(own: Mapping[str, Tensor], vectors: TaskVectors) -> None:
    shapes = {name: vectors.shape(name)[1:] for name in vectors.names}
    if found := compare(shapes_of(own), shapes, required=()):
        raise StructureMismatchError(
            f"task vectors: expected parameters of the module, got {found}. Use the module that was fine-tuned."
        )


def _checked_range(clamp: tuple[float, float] | None) -> tuple[float, float] | None:
    if clamp is None:
        return None
    numbers = tuple(clamp)
    if len(numbers) != 2 or not all(isinstance(one, (int, float)) and not math.isnan(one) for one in numbers):
        raise ConfigurationError(f"clamp: expected two numbers or null, got {clamp!r}. Use e.g. [0, 1].")
    if numbers[0] > numbers[1]:
        raise ConfigurationError(
            f"clamp: expected the lower number first, got [{numbers[0]:g}, {numbers[1]:g}]. Swap them."
        )
    return float(numbers[0]), float(numbers[1])
