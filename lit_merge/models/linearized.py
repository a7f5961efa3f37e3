"""A network replaced by its tangent at θ0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.functional import linearize
from lit_merge.models.lora import LoRA
from lit_merge.params import Params, check_same_structure

__all__ = ["LinearizedLowRank", "LinearizedModel"]


class LinearizedModel(nn.Module):
    """``f_lin(x; τ) = f(x; θ0) + J_θ f(x; θ0) · τ`` (Ortiz-Jimenez et al. 2023, eq. 4): linear in τ, which trains.

    τ has the module's own parameter names, in ``named_parameters()`` and in the state dict, and starts at zero. θ0 is
    the module's own storage, not a copy; it is neither trained nor part of the state dict. The module always runs in
    evaluation mode: dropout is off, batch normalisation uses its running statistics.

    Args:
        module: ``f``; it returns one tensor. Its parameters stop requiring gradients.
        trainable: names of the parameters that have a τ; the others stay at θ0, and their tangents are not computed.
            None for all.

    Raises:
        ConfigurationError: a name is none of the module's, or the module has no parameters.

    Examples:
        >>> import torch
        >>> model = LinearizedModel(torch.nn.Linear(2, 1))
        >>> [name for name, _ in model.named_parameters()]
        ['weight', 'bias']
        >>> bool(model.tangent(torch.ones(3, 2)).any())
        False
    """

    def __init__(self, module: nn.Module, trainable: Iterable[str] | None = None) -> None:
        super().__init__()
        own = dict(module.named_parameters())
        names = list(own if trainable is None else trainable)
        unknown = [name for name in names if name not in own]
        if unknown or not names:
            raise ConfigurationError(
                f"trainable: expected names of the {len(own)} parameters of {type(module).__name__}, got "
                f"{first_few(unknown) or 'none'}. Use names of module.named_parameters()."
            )
        # Beside the registered modules: what is registered is what trains and what a checkpoint holds.
        self._base = [module.requires_grad_(False).eval()]
        chosen = set(names)
        self._trained = tuple(name for name in own if name in chosen)
        for name in self._trained:
            holder, leaf = self._holder_of(name)
            self._register(holder, leaf, name, own[name])

    def _holder_of(self, name: str) -> tuple[nn.Module, str]:
        """Where what trains of a parameter is registered, and as what."""
        *path, leaf = name.split(".")
        holder: nn.Module = self
        for part in path:  # by its dictionary: a part may be called like a method of this class
            holder = holder._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        return holder, leaf

    def _register(self, holder: nn.Module, leaf: str, name: str, value: Tensor) -> None:
        holder._parameters[leaf] = nn.Parameter(torch.zeros_like(value))

    def changes(self) -> Params:
        """The τ of what trains, under the module's names, with its gradient."""
        return dict(self.named_parameters())

    @property
    def module(self) -> nn.Module:
        """``f``, with θ0 as its parameters."""
        return self._base[0]

    def initial_parameters(self) -> Params:
        """θ0, as it is stored in the module."""
        return {name: value.detach() for name, value in self.module.named_parameters()}

    def task_vector(self) -> Params:
        """τ under all of the module's names; zeros where nothing trains."""
        trained = self.changes()
        return {
            name: trained[name].detach() if name in trained else torch.zeros_like(value)
            for name, value in self.initial_parameters().items()
        }

    def load_task_vector(self, vector: Mapping[str, Tensor], coefficient: float = 1.0) -> None:
        """Set τ, e.g. to that of a full fine-tune: post-hoc linearisation.

        Args:
            vector: under the module's names; τ becomes ``coefficient`` times it.
            coefficient: any finite number.

        Raises:
            StructureMismatchError: names or shapes differ.
            ConfigurationError: the vector is not zero where nothing trains here.
        """
        check_same_structure(self.initial_parameters(), vector, "task vector")
        trained = dict(self.named_parameters())
        lost = [name for name, value in vector.items() if name not in trained and bool(value.any())]
        if lost and coefficient:
            raise ConfigurationError(
                f"task vector: expected zeros outside of the {len(trained)} parameters that train, got other values in "
                f"{len(lost)}: {first_few(lost)}. Let them train as well."
            )
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(vector[name]).mul_(coefficient)

    def forward_parts(self, *inputs: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """``(f(x; θ0), J_θ f(x; θ0) · τ)`` in one pass, each of the shape of the module's output.

        Raises:
            LitMergeError: the module uses an operator without a forward-mode derivative, or returns no tensor.
        """
        return linearize(self.module, {}, self.changes(), *inputs, **keywords)

    def tangent(self, *inputs: Any, **keywords: Any) -> Tensor:
        """``J_θ f(x; θ0) · τ``, of the shape of the module's output."""
        return self.forward_parts(*inputs, **keywords)[1]

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """``f(x; θ0) + J_θ f(x; θ0) · τ``, of the shape of the module's output."""
        value, tangent = self.forward_parts(*inputs, **keywords)
        return value + tangent

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearizedModel:
        """Move or convert θ0 and the module's buffers together with τ."""
        self.module._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


class LinearizedLowRank(LinearizedModel):
    """``f(x; θ0) + J_φ f(x; φ0) (φ − φ0)``, φ the factors of low-rank updates (L-LoRA, Tang et al. 2024, eq. 2).

    φ0 = (A0, B0 = 0), so that the derivative along A is zero and what remains is ``f(x; θ0) + J_θ f(x; θ0) · τ`` with
    ``τ_W = α/r · B A0``: the linearised network of :class:`LinearizedModel`, whose τ lies in a space of low rank and is
    linear in B, which trains. A0 is drawn once, stays, and is part of the state dict. The authors' program linearises
    every adapted layer by itself, whose output is the same function of B, but not the network on top of them.

    Args:
        module: ``f``, as for :class:`LinearizedModel`; it is not changed.
        lora: rank, scale and which weights.

    Raises:
        ConfigurationError: the selection names what LoRA cannot adapt, or updates would drop inputs out.
    """

    def __init__(self, module: nn.Module, lora: LoRA) -> None:
        if lora.dropout:
            raise ConfigurationError(
                f"lora.dropout: expected 0 of a linearised network, which has no dropout, got {lora.dropout}. Set it "
                "to 0."
            )
        self._updates = lora.updates_of(module)
        super().__init__(module, self._updates)

    def _register(self, holder: nn.Module, leaf: str, name: str, value: Tensor) -> None:
        self._updates[name].A.requires_grad_(False)
        holder._modules[leaf] = self._updates[name]

    def changes(self) -> Params:
        """See :class:`LinearizedModel`: the dense updates, with the gradient of B."""
        own = dict(self.module.named_parameters())
        return {name: update.dense(own[name]) for name, update in self._updates.items()}

    def load_task_vector(self, vector: Mapping[str, Tensor], coefficient: float = 1.0) -> None:
        """Refuse it, unless it is zero: a dense vector has no factors with this A0.

        Raises:
            StructureMismatchError: names or shapes differ.
            ConfigurationError: the vector is not zero.
        """
        check_same_structure(self.initial_parameters(), vector, "task vector")
        if coefficient and any(bool(value.any()) for value in vector.values()):
            raise ConfigurationError(
                "task vector: expected to start at θ0 with lora and linearized, got a vector, which the drawn factors "
                "cannot hold. Start without it, or remove lora."
            )
        with torch.no_grad():
            for update in self._updates.values():
                update.B.zero_()
