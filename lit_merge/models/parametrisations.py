"""How a network departs from θ0: directly, along its tangent, or by low-rank updates; a new way is one more class.

A parametrisation decides what trains and how it becomes a task vector under the network's own names, so that
extraction, files and merging know nothing of regimes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lit_merge.errors import ConfigurationError
from lit_merge.files.lazy import Computed
from lit_merge.functional import linearize
from lit_merge.models.linearized import LinearizedLowRank, LinearizedModel
from lit_merge.models.lora import LoRA, clear_updates, own_parameters, update_of, updates
from lit_merge.models.selection import Selection
from lit_merge.params import Params, check_same_structure
from lit_merge.vectors.apply import apply_vector
from lit_merge.vectors.task_vector import TaskVector

__all__ = ["Direct", "Linearised", "LinearisedLowRank", "LowRank", "Parametrisation", "parametrisation_of"]


class Parametrisation(ABC):
    """What trains, and what it means for θ; used for one network, whose parameters are θ0 when it is prepared.

    Subclass it for another way to depart from θ0: :meth:`prepared` turns the network into the module that trains, e.g.
    by torch's parametrisations, of which :meth:`task_vector` and :meth:`load_parameters` know already. ``repr`` names
    the regime in a task vector's header.

    Attributes:
        linearised: whether the module's output is ``f(x; θ0) + J τ``, so that it is linear in τ.
        encoder: the module that trains, once prepared.
    """

    linearised = False
    encoder: nn.Module

    def prepare(self, module: nn.Module) -> nn.Module:
        """Let what is to train require gradients and freeze the rest; returns the module that is trained."""
        self._initial = {name: value.detach().cpu().clone() for name, value in module.named_parameters()}
        self.encoder = self.prepared(module)
        return self.encoder

    @abstractmethod
    def prepared(self, module: nn.Module) -> nn.Module:
        """The module that trains; θ0 has been copied."""

    @property
    def network(self) -> nn.Module:
        """The network's own modules."""
        return self.encoder

    @property
    def initial_parameters(self) -> Params:
        """θ0, on the CPU, under the network's own names; not to be changed."""
        return self._initial

    def task_vector(self) -> Mapping[str, Tensor]:
        """τ = θ − θ0 as it is now, on the CPU, in θ0's dtype, under the network's own names.

        By default θ is what the modules read under these names, through torch's parametrisations where they have some;
        computed tensor by tensor when it is read: take a ``dict`` of it to keep it.
        """
        initial = self.initial_parameters
        structure = {name: (value.shape, value.dtype) for name, value in initial.items()}
        return Computed(structure, self._departed)

    @torch.no_grad()
    def _departed(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return _difference(getattr(self.network.get_submodule(owner), leaf), self.initial_parameters[name])

    def departures(self) -> Iterator[tuple[str, Tensor]]:
        """Own names and θ − θ0 of what trains, where it is and with its gradient, for penalties on τ itself.

        By default as :meth:`task_vector`, of what requires gradients.
        """
        for name, start in self.initial_parameters.items():
            owner, _, leaf = name.rpartition(".")
            value: Tensor = getattr(self.network.get_submodule(owner), leaf)
            if value.requires_grad:
                yield name, value - start.to(value)

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Set θ; by default by assignment, which calls the ``right_inverse`` of torch's parametrisations.

        Raises:
            StructureMismatchError: names or shapes differ from θ0's.
        """
        check_same_structure(self.initial_parameters, parameters, "weights")
        for name, value in parameters.items():
            owner, _, leaf = name.rpartition(".")
            part = self.network.get_submodule(owner)
            if is_parametrized(part, leaf):
                setattr(part, leaf, value.to(getattr(part, leaf)))
            else:
                getattr(part, leaf).copy_(value)

    def load_task_vector(self, vector: TaskVector, coefficient: float = 1.0) -> None:
        """Set θ to θ0 + coefficient · τ.

        Raises:
            StructureMismatchError: names or shapes differ from θ0's.
        """
        whole = apply_vector(vector, self.initial_parameters, coefficient)
        assert isinstance(whole, dict)
        self.load_parameters(whole)

    def forward_parts(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """``f(x; θ0)`` and ``J_θ f(x; θ0) · τ`` with the current τ, each of the shape of the network's output.

        Raises:
            ConfigurationError: the tangent is not defined by what trains.
        """
        raise ConfigurationError(
            f"tangent: expected parameters that train themselves, got those of {self!r}. Load the task vector into a "
            "module without it to measure the tangent, or train without a penalty."
        )

    @property
    def has_tangent(self) -> bool:
        """Whether :meth:`forward_parts` is there, which a penalty on the tangent needs."""
        return type(self).forward_parts is not Parametrisation.forward_parts

    def restored(self) -> None:  # noqa: B027 - most have nothing to do
        """A checkpoint has changed what trains."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Direct(Parametrisation):
    """The parameters themselves train.

    Args:
        trainable: which of them; None for all.
    """

    def __init__(self, trainable: Selection | None = None) -> None:
        self.trainable = trainable

    def prepared(self, module: nn.Module) -> nn.Module:
        """See :class:`Parametrisation`."""
        if self.trainable:
            own = dict(module.named_parameters())
            chosen = set(self.trainable(own))
            for name, value in own.items():
                value.requires_grad_(name in chosen)
        self._placed: Params = {}
        self._elsewhere: frozenset[str] | None = frozenset()
        return module

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """See :class:`Parametrisation`."""
        super().load_parameters(parameters)
        self._elsewhere = None

    def restored(self) -> None:
        """See :class:`Parametrisation`."""
        self._elsewhere = None

    def forward_parts(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """See :class:`Parametrisation`; it needs a copy of θ0 of what moves on the network's device."""
        moved = self._moved()
        initial = self._initial_of(moved)
        return linearize(self.encoder, initial, {name: value - initial[name] for name, value in moved.items()}, *inputs)

    def departures(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Parametrisation`; it needs the same copy."""
        trained = {name: value for name, value in self.encoder.named_parameters() if value.requires_grad}
        initial = self._initial_of(trained)
        yield from ((name, value - initial[name]) for name, value in trained.items())

    def _moved(self) -> dict[str, nn.Parameter]:
        """The parameters that are not at θ0, or will not be: those that train, and frozen ones with loaded values."""
        own = dict(self.encoder.named_parameters())
        if self._elsewhere is None:
            self._elsewhere = frozenset(
                name for name, value in own.items() if not torch.equal(value, self._initial[name].to(value))
            )
        return {name: value for name, value in own.items() if value.requires_grad or name in self._elsewhere}

    def _initial_of(self, moved: Mapping[str, Tensor]) -> Params:
        """θ0 on these parameters' device and in their dtype, copied there once."""
        for name, value in moved.items():
            placed = self._placed.get(name)
            if placed is None or (placed.device, placed.dtype) != (value.device, value.dtype):
                with torch.inference_mode(False):  # a copy made in validation is used in training as well
                    self._placed[name] = self._initial[name].to(value.device, value.dtype)
        return {name: self._placed[name] for name in moved}

    def __repr__(self) -> str:
        return f"Direct({self.trainable!r})"


class Linearised(Parametrisation):
    """τ trains in ``f(x; θ0) + J_θ f(x; θ0) · τ`` (Ortiz-Jimenez et al. 2023, eq. 4).

    Args:
        trainable: which parameters have a τ; None for those that require gradients.
    """

    linearised = True
    encoder: LinearizedModel

    def __init__(self, trainable: Selection | None = None) -> None:
        self.trainable = trainable

    def prepare(self, module: nn.Module) -> nn.Module:
        """See :class:`Parametrisation`; θ0 stays where it is, without a copy."""
        own = dict(module.named_parameters())
        self._dtypes = {name: value.dtype for name, value in own.items()}  # the trainer's precision may change them
        self._host: Params = {}
        self.encoder = self.prepared(module)
        return self.encoder

    def prepared(self, module: nn.Module) -> LinearizedModel:
        """See :class:`Parametrisation`."""
        own = dict(module.named_parameters())
        names = self.trainable(own) if self.trainable else [name for name, one in own.items() if one.requires_grad]
        return LinearizedModel(module, names)

    @property
    def network(self) -> nn.Module:
        """The network's own modules, which hold θ0."""
        return self.encoder.module

    @property
    def initial_parameters(self) -> Params:
        """See :class:`Parametrisation`; from an accelerator each is copied once."""
        found: Params = {}
        for name, value in self.encoder.initial_parameters().items():
            if value.device.type == "cpu":
                found[name] = value
            else:
                if name not in self._host or self._host[name].dtype != value.dtype:
                    self._host[name] = value.cpu()
                found[name] = self._host[name]
        return found

    def task_vector(self) -> Params:
        """See :class:`Parametrisation`."""
        tau = self.encoder.task_vector()
        return {name: value.to("cpu", self._dtypes[name]) for name, value in tau.items()}

    def departures(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Parametrisation`: τ."""
        yield from ((name, value) for name, value in self.encoder.changes().items() if value.requires_grad)

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """See :class:`Parametrisation`: τ becomes θ − θ0."""
        initial = self.initial_parameters
        check_same_structure(initial, parameters, "weights")
        self.encoder.load_task_vector({name: parameters[name] - value for name, value in initial.items()})

    def load_task_vector(self, vector: TaskVector, coefficient: float = 1.0) -> None:
        """See :class:`Parametrisation`."""
        self.encoder.load_task_vector(vector, coefficient)

    def forward_parts(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """See :class:`Parametrisation`."""
        return self.encoder.forward_parts(*inputs)

    def __repr__(self) -> str:
        return f"Linearised({self.trainable!r})"


class LinearisedLowRank(Linearised):
    """``α/r · B A0`` trains as τ of the linearised network (L-LoRA, Tang et al. 2024).

    See :class:`~lit_merge.models.linearized.LinearizedLowRank`.

    Args:
        lora: rank, scale and which weights; without dropout.
    """

    def __init__(self, lora: LoRA) -> None:
        super().__init__()
        self.lora = lora

    def prepared(self, module: nn.Module) -> LinearizedModel:
        """See :class:`Parametrisation`."""
        return LinearizedLowRank(module, self.lora)

    def departures(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Parametrisation`: the dense updates, also where no gradients are recorded."""
        yield from self.encoder.changes().items()

    def __repr__(self) -> str:
        return f"LinearisedLowRank({self.lora!r})"


class LowRank(Parametrisation):
    """Low-rank updates train; the task vector is dense (Hu et al. 2022).

    Args:
        lora: rank, scale and which weights.
    """

    def __init__(self, lora: LoRA) -> None:
        self.lora = lora

    def prepared(self, module: nn.Module) -> nn.Module:
        """See :class:`Parametrisation`."""
        self.lora.inject(module)
        return module

    def departures(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Parametrisation`: the updates, without dropout."""
        yield from updates(self.encoder, gradient=True)

    @torch.no_grad()
    def _departed(self, name: str) -> Tensor:
        start, update = self._initial[name], update_of(self.encoder, name)
        departure = _difference(own_parameters(self.encoder)[name], start)
        return departure if update is None else departure + update.cpu().to(start.dtype)

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """See :class:`Parametrisation`; the updates begin again at zero."""
        check_same_structure(self._initial, parameters, "weights")
        clear_updates(self.encoder)
        for name, value in own_parameters(self.encoder).items():
            value.copy_(parameters[name])

    def __repr__(self) -> str:
        return f"LowRank({self.lora!r})"


def _difference(value: Tensor, start: Tensor) -> Tensor:
    """θ − θ0 in θ0's dtype, θ0 rounded as the trainer's precision has: of what does not train it is zero."""
    own = value.detach().cpu()
    wide = torch.promote_types(own.dtype, start.dtype)
    return (own.to(wide) - start.to(own.dtype).to(wide)).to(start.dtype)


def parametrisation_of(
    parametrisation: Parametrisation | None = None,
    linearized: bool = False,
    trainable: Selection | None = None,
    lora: LoRA | None = None,
) -> Parametrisation:
    """The parametrisation that is given, or the one that its shorthands stand for.

    Args:
        parametrisation: any of its own.
        linearized: shorthand for :class:`Linearised`.
        trainable: of it, or of :class:`Direct`.
        lora: shorthand for :class:`LowRank`; together with ``linearized`` for :class:`LinearisedLowRank`.

    Raises:
        ConfigurationError: settings exclude each other.
    """
    given = [name for name, one in (("linearized", linearized), ("trainable", trainable), ("lora", lora)) if one]
    if parametrisation is not None:
        if given:
            raise ConfigurationError(
                f"parametrisation: expected no {' and '.join(given)} together with it, got both. Remove one."
            )
        return parametrisation
    if lora is not None:
        if trainable is not None:
            raise ConfigurationError(
                "lora and trainable: expected one of them, got both: LoRA's factors are what trains. Remove one, or "
                "choose weights by lora.on."
            )
        return LinearisedLowRank(lora) if linearized else LowRank(lora)
    return Linearised(trainable) if linearized else Direct(trainable)
