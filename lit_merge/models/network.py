"""What is fine-tuned and merged: a network with what surrounds it, or a base model of which only weights are known.

Everything else talks to these objects: the modules train and evaluate a :class:`Network`, merges start from a
:class:`Base`. A network of one's own is one class, named by its import path wherever ``network`` is a setting.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lit_merge.checkpoints.activation import (
    IMAGE_TOWER,
    Activations,
    activations_of,
    check_activation,
    check_activations,
)
from lit_merge.checkpoints.opening import OpenedCheckpoint, named_after, open_model
from lit_merge.checkpoints.pairing.ties import tied_names
from lit_merge.checkpoints.pairs import Names
from lit_merge.errors import ConfigurationError, StructureMismatchError, first_few
from lit_merge.files.hub import parse_address
from lit_merge.files.lazy import Computed, LazyMapping, Selected
from lit_merge.files.shards import bytes_of
from lit_merge.models.encoder import (
    ClipModel,
    Preprocessing,
    clip_activation,
    clip_config,
    hub_repository,
    load_clip,
    stored_tower,
    text_tensors,
)
from lit_merge.models.heads import build_head
from lit_merge.params import check_finite, dtype_of, fingerprint, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Base", "ClipNetwork", "FileBase", "ModuleNetwork", "Network", "TaskWords", "network_of", "shared_names"]


class TaskWords(Protocol):
    """What a head is made from: the part of a task that has nothing to do with its examples."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of the targets; empty for a task without classes."""

    @property
    def templates(self) -> Sequence[str]:
        """Texts with one ``{}`` for a class name."""


class Base(ABC):
    """θ0, and the whole model that it is a part of: what a merge starts from.

    Attributes:
        name: of the model.
        files: what the model is read from while merging; empty if it is in memory.
        prefix: what a parameter's name begins with in the whole model.
        digests: what is known of the files' content, for the provenance.
        memory: bytes that it holds in memory.
        names: under which weights are differenced from it.
        repository: ``owner/name`` on the Hugging Face Hub, if it came from there.
        activations: the activation functions of its parts, as far as they are known; they are part of what it is.
    """

    name: str
    files: tuple[Path, ...] = ()
    prefix = ""
    digests: Mapping[str, Any] = {}
    memory = 0
    names: Names = "own"
    repository: str | None = None
    activations: Mapping[str, str] = {}

    @property
    def activation(self) -> str:
        """That of an image tower, which task vectors carry; empty if it is not known."""
        return self.activations.get(IMAGE_TOWER, "")

    @property
    def ties(self) -> Mapping[str, str]:
        """Names in the whole model that are other names' tensors again -> those names."""
        return {}

    @property
    @abstractmethod
    def parameters(self) -> LazyMapping:
        """θ0 under the task vectors' names; of a file its other tensors, too."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The fingerprint of θ0, which task vectors carry."""

    @abstractmethod
    def whole(self) -> Mapping[str, Tensor]:
        """Every tensor of the model, read when it is asked for."""

    def of_weights(self, opened: OpenedCheckpoint) -> LazyMapping:
        """What corresponds to θ0 in the weights of a fine-tuned model; whole, where the difference has to find it.

        Raises:
            StructureMismatchError: the weights were trained with another activation function.
        """
        check_activations(self.activations, activations_of(opened), str(opened.path), self.name)
        return opened


class Network(Base):
    """A network that can be fine-tuned, linearised, merged and evaluated; subclass it for one of your own.

    A subclass sets ``name`` and ``module`` and says what a head is; the rest has defaults that fit any ``nn.Module``.

    Attributes:
        module: ``f``, on the CPU as loaded; its parameters are θ0, under their own names. It takes what
            :meth:`inputs` gives and returns one tensor: features ``[B, d]``, or logits of any shape.
        preprocessing: what the data need to make the network's inputs (an image transform, a tokenizer), handed to
            ``Task.split``; None if they need nothing.
        trains_heads: whether heads are new ones, to be trained with the task; its setting ``heads`` then takes trained
            ones, as a path with ``{task}`` in it.
    """

    module: nn.Module
    preprocessing: Any = None
    trains_heads: bool = False

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """The arguments of ``module`` for a :class:`lit_merge.data.Batch`; by default the batch's ``inputs``."""
        return tuple(batch.inputs)

    @abstractmethod
    def head(self, task: TaskWords) -> nn.Module:
        """The frozen head of a task: features to logits ``[B, C]``.

        A head may have ``loss(logits, batch) -> [B]`` and ``hits(logits, batch) -> (right [B], counted [B])`` of its
        own; otherwise these are the cross-entropy and the agreement of the largest logit with ``batch.targets``. One
        whose parameters are to train with the task has ``trains = True``.

        Raises:
            ConfigurationError: there is no head for such a task.
        """

    def makes_new_head(self, task: TaskWords) -> bool:
        """Whether :meth:`head` gives a task a new head, which says nothing before it has been trained."""
        return False

    @cached_property
    def parameters(self) -> LazyMapping:
        """The module's parameters."""
        return _lazily({name: value.detach() for name, value in self.module.named_parameters()})

    @cached_property
    def fingerprint(self) -> str:
        """Of the module's parameters as they are when this is asked for first."""
        return fingerprint(dict(self.module.named_parameters()))

    @property
    def memory(self) -> int:  # type: ignore[override]
        """Bytes of the parameters."""
        return sum(bytes_of(self.parameters, name) for name in self.parameters)

    @property
    def ties(self) -> Mapping[str, str]:
        """Further names of shared parameters in :meth:`whole` -> the names that they have in θ0."""
        return shared_names(self.module)

    def whole(self) -> Mapping[str, Tensor]:
        """The module's parameters and buffers."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}


class ClipNetwork(Network):
    """The image tower of a CLIP; its text side stays on the disk until heads are made.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        preprocessing: how images become the tower's input; by default as the weights want it.

    Raises:
        LitMergeError: as for :func:`lit_merge.models.load_clip`.
    """

    prefix = "visual."
    names: Names = "auto"

    def __init__(
        self, model: str = "lit-tiny", pretrained: str | None = None, preprocessing: Preprocessing | None = None
    ) -> None:
        self._arguments, self._preprocessing = (model, pretrained), preprocessing
        stored = stored_tower(model, pretrained)
        self._stored = None if stored is None else stored[1]
        self.name = self.clip.name if stored is None else stored[0]

    @cached_property
    def clip(self) -> ClipModel:
        """The model, built when it is first needed: a merge needs its weights only."""
        return load_clip(*self._arguments)

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The image tower."""
        return self.clip.visual

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the tower's input."""
        return self._preprocessing or self.clip.preprocessing

    @property
    def config(self) -> dict[str, Any]:
        """``model_cfg`` and ``preprocess_cfg``, as open_clip publishes them beside weights."""
        return clip_config(*self._arguments)

    @cached_property
    def repository(self) -> str | None:  # type: ignore[override]
        """``owner/name`` on the Hub of the weights behind a tag."""
        return hub_repository(*self._arguments)

    @cached_property
    def activations(self) -> Activations:  # type: ignore[override]
        """That of the image tower's blocks, if its architecture leaves a choice."""
        known = clip_activation(*self._arguments)
        return {IMAGE_TOWER: known} if known else {}

    @property
    def ties(self) -> Mapping[str, str]:
        """See :attr:`Network.ties`, which would build the tower: only those of timm may share parameters."""
        if self._stored is not None:
            return {}
        return {self.prefix + name: self.prefix + first for name, first in super().ties.items()}

    @cached_property
    def parameters(self) -> LazyMapping:
        """The image tower's parameters under its own names; from the file unless the tower has been built."""
        if self._stored is None or "clip" in vars(self):
            return _lazily({name: value.detach() for name, value in self.module.named_parameters()})
        return self._stored

    @cached_property
    def fingerprint(self) -> str:
        """Of the image tower as it is loaded."""
        if self._stored is None or "clip" in vars(self):
            return self.clip.fingerprint
        check_finite(self._stored, f"image tower of {self.name}")
        return fingerprint(self._stored)

    def head(self, task: TaskWords) -> nn.Module:
        """The zero-shot head of the task's class names and templates, from the cache if it was built before."""
        return build_head(self.clip, list(task.classes), list(task.templates))

    def whole(self) -> Mapping[str, Tensor]:
        """The text side as it is stored, and the image tower."""
        if self._stored is not None and "clip" not in vars(self):
            visual: Mapping[str, Tensor] = Selected(self._stored, {self.prefix + name: name for name in self._stored})
            text: Mapping[str, Tensor] = text_tensors(*self._arguments)
        else:
            state = self.module.state_dict()
            visual = {f"{self.prefix}{name}": value.detach().cpu() for name, value in state.items()}
            text = self.clip.text.tensors()
        return Computed(
            {name: (shape_of(one, name), dtype_of(one, name)) for one in (text, visual) for name in one},
            partial(_from_either, visual, text),
        )

    def of_weights(self, opened: OpenedCheckpoint) -> LazyMapping:
        """The image tower's parameters, which begin with ``visual.`` in the weights of a whole CLIP.

        Raises:
            StructureMismatchError: some are missing, and these are not the weights of a CLIP in another layout; or they
                were trained with another activation function.
        """
        known = activations_of(opened).get(IMAGE_TOWER, "")
        check_activation(self.activation, known, str(opened.path), self.name)
        stored = opened.without_prefix()
        missing = [name for name in self.parameters if self.prefix + name not in stored]
        if not missing:
            return Selected(stored, {name: self.prefix + name for name in self.parameters})
        if opened.recognised.layout == "own" and opened.adapter is None:
            raise StructureMismatchError(
                f"expected a task vector, or the weights of a whole CLIP with the image tower of "
                f"{self.name}, got no {self.prefix} names for {len(missing)} of {len(self.parameters)} parameters "
                f"({first_few(missing)}). For another model set base to its weights."
            )
        return opened


class ModuleNetwork(Network):
    """Any module, in memory.

    Args:
        module: features ``[B, d]`` of what a batch's ``inputs`` are; θ0 is its parameters.
        preprocessing: how images become its input.
        name: of the model; by default that of the module's class.
    """

    def __init__(self, module: nn.Module, preprocessing: Any = None, name: str | None = None) -> None:
        self.module, self.name = module, name or type(module).__name__
        self.preprocessing = preprocessing or Preprocessing()

    def head(self, task: TaskWords) -> nn.Module:
        """There is none: heads are given to the module that trains or evaluates.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"head: expected one for {self.name}, which is no CLIP, got none. Pass head=… or heads=… (features [B, d] "
            "-> logits), or give a network whose head(task) makes them."
        )


class FileBase(Base):
    """Any model, by its weights: a checkpoint under names of its own.

    Args:
        path: what :func:`~lit_merge.checkpoints.opening.open_checkpoint` opens.
    """

    def __init__(self, path: str) -> None:
        self.name = named_after(path)
        self.opened = open_model(path)
        self.files = self.opened.files
        self._tensors: LazyMapping = self.opened
        address = parse_address(path)
        self.repository = None if address is None else address.repository

    @cached_property
    def activations(self) -> Activations:  # type: ignore[override]
        """As the files beside the weights say it."""
        return activations_of(self.opened)

    @cached_property
    def parameters(self) -> LazyMapping:
        """All tensors of the file."""
        return Selected(self._tensors, {name: name for name in self._tensors})

    def with_tensors(self, tensors: LazyMapping) -> FileBase:
        """The same model with other tensors, such as tables with more rows.

        Args:
            tensors: all of them, under the same names.
        """
        changed = copy.copy(self)
        vars(changed).pop("parameters", None)
        changed._tensors = tensors
        return changed

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """Tables that the file stores twice; compared when it is first asked for."""
        return tied_names(self.opened)

    @cached_property
    def fingerprint(self) -> str:
        """Over the floating-point tensors; reads them once, when it is first asked for."""
        tensors = self.opened
        floating = [name for name in tensors if tensors.dtype(name).is_floating_point]
        structure = {name: (tensors.shape(name), tensors.dtype(name)) for name in floating}
        return fingerprint(Computed(structure, tensors.__getitem__))

    def whole(self) -> Mapping[str, Tensor]:
        """The same tensors."""
        return self._tensors


def shared_names(module: nn.Module) -> dict[str, str]:
    """Further names of a module's shared parameters -> the first ones, which ``named_parameters()`` has alone."""
    first = {id(value): name for name, value in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in every if name != first[id(value)]}


def network_of(
    network: Network | None = None,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    encoder: nn.Module | None = None,
    preprocessing: Any = None,
) -> Network:
    """The network that is given, or the one that its shorthands stand for.

    Args:
        network: any network.
        model: shorthand for a :class:`ClipNetwork` of this architecture.
        pretrained: with its weights.
        encoder: shorthand for a :class:`ModuleNetwork`.
        preprocessing: of either.

    Raises:
        ConfigurationError: a network and a shorthand are both given.
    """
    shorthands = {"pretrained": pretrained, "encoder": encoder, "preprocessing": preprocessing}
    shorthands["model"] = None if model == "lit-tiny" else model
    given = [name for name, value in shorthands.items() if value is not None]
    if network is not None:
        if given:
            raise ConfigurationError(
                f"network: expected no {' and '.join(given)} together with it, got both. Put them into the network's "
                "own settings."
            )
        return network
    if encoder is not None:
        return ModuleNetwork(encoder, preprocessing)
    return ClipNetwork(model, pretrained, preprocessing)


def _lazily(tensors: Mapping[str, Tensor]) -> Computed:
    return Computed({name: (value.shape, value.dtype) for name, value in tensors.items()}, tensors.__getitem__)


def _from_either(first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str) -> Tensor:
    return first[name] if name in first else second[name]
