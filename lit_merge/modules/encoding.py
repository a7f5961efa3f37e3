"""What the LightningModules share: a network, how it departs from θ0, what it needs of its data, and its heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_merge.checkpoints.activation import IMAGE_TOWER, activations_of, check_activation
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.errors import ConfigurationError, LitMergeError, NonFiniteError, StructureMismatchError
from lit_merge.files.lazy import LazyMapping
from lit_merge.functional.attention import fast_attention
from lit_merge.functional.products import slow_precision
from lit_merge.models.encoder import ClipModel, Preprocessing
from lit_merge.models.lora import LoRA
from lit_merge.models.network import ClipNetwork, Network, TaskWords, network_of, shared_names
from lit_merge.models.parametrisations import Parametrisation, parametrisation_of
from lit_merge.models.selection import Selection
from lit_merge.modules.trained_heads import Listings, VectorFile, trained_head
from lit_merge.params import Params, check_finite, check_same_structure
from lit_merge.vectors.merge import check_base
from lit_merge.vectors.task_vector import TaskVector

__all__ = ["EncoderModule"]


class EncoderModule(L.LightningModule):
    """Base of the modules: an encoder whose parameters keep their own names, and where it started from.

    The network (:class:`~lit_merge.models.network.Network`) says how batches go in and what heads there are; the
    parametrisation (:class:`~lit_merge.models.parametrisations.Parametrisation`) how it departs from θ0. Whichever they
    are, :meth:`task_vector` is τ under the network's own names, and the files are the same.

    Args:
        model: shorthand for a CLIP as the network: its architecture, as for :func:`lit_merge.models.load_clip`.
        pretrained: with these weights, as for :func:`lit_merge.models.load_clip`.
        network: any network, by class path, instead of model and pretrained.
        encoder: any module ``[B, …] -> [B, d]`` instead; shorthand for a network of it without heads.
        preprocessing: how examples become its input; by default as the network has it.
        task_vector: file of a task vector to start from: the encoder becomes θ0 + τ, while θ0 stays the base.
        weights: file of whole (e.g. merged) weights to start from; θ0 stays the base. Excludes ``task_vector``.
        linearized: shorthand for the parametrisation ``f(x; θ0) + J τ`` (:class:`lit_merge.LinearizedModel`).
        trainable: which parameters train; None for all.
        lora: shorthand for low-rank updates that train instead.
        parametrisation: any other one, by class path.

    Attributes:
        base: the network.
        encoder: the module that is trained or evaluated: a :class:`lit_merge.LinearizedModel` if linearised.
        preprocessing: read by the data modules.
        base_fingerprint: of θ0.

    Raises:
        ConfigurationError: settings exclude each other, the model is unknown, or nothing is selected.
        StructureMismatchError: a file belongs to another base or architecture.
    """

    def __init__(
        self,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        network: Network | None = None,
        encoder: nn.Module | None = None,
        preprocessing: Preprocessing | None = None,
        task_vector: str | None = None,
        weights: str | None = None,
        linearized: bool = False,
        trainable: Selection | None = None,
        lora: LoRA | None = None,
        parametrisation: Parametrisation | None = None,
    ) -> None:
        super().__init__()
        self._stage = ""
        self._vector_files: list[VectorFile] = []
        self._listings: Listings = {}
        self._refused: dict[str, LitMergeError] = {}  # task -> why it has no trained head, until a checkpoint brings it
        if task_vector is not None and weights is not None:
            raise ConfigurationError("task_vector and weights: expected one of them, got both. Remove one.")
        self.parametrisation = parametrisation_of(parametrisation, linearized, trainable, lora)
        self.trainable, self.lora = trainable, lora
        self.base = network_of(network, model, pretrained, encoder, preprocessing)
        self.base_name, self.base_fingerprint = self.base.name, self.base.fingerprint
        self.preprocessing = self.base.preprocessing
        self.linearized = self.parametrisation.linearised
        self._loaded = [*self.base.module.modules()]  # before low-rank updates are added, which are in training mode
        self.encoder = self.parametrisation.prepare(self.base.module)
        if task_vector is not None:
            vector = TaskVector.load(task_vector, verify=True)
            self.load_task_vector(vector)
            self.look_beside([(task_vector, vector.tasks)])
        if weights is not None:
            self.load_weights(weights)

    def setup(self, stage: str) -> None:
        """Warn of a precision that the processor is slow at; know the stage, on which depends what heads there are."""
        self._stage = stage
        caution = slow_precision(self.trainer.precision or "32-true", self.device)
        if caution is not None:
            rank_zero_warn(caution)

    @property
    def as_loaded(self) -> bool:
        """Whether all parts of the network are in evaluation mode, as libraries' loaders leave them."""
        return not any(part.training for part in self._loaded)

    def checkpoint_activations(self, advice: str) -> None:
        """Let the encoder's blocks be computed again on the way back.

        Raises:
            ConfigurationError: the encoder cannot, or is linearised; the message ends with the advice.
        """
        switch = getattr(self.network, "set_grad_checkpointing", None)
        if self.linearized or switch is None:
            raise ConfigurationError(
                "activation_checkpointing: expected an encoder with set_grad_checkpointing() that is not linearised, "
                f"got {'a linearised one' if self.linearized else type(self.network).__name__}. {advice}"
            )
        switch(True)

    @property
    def clip(self) -> ClipModel | None:
        """The CLIP that the network is the image tower of, if it is one."""
        return self.base.clip if isinstance(self.base, ClipNetwork) else None

    @property
    def network(self) -> nn.Module:
        """The network's own modules; linearised, those that hold θ0."""
        return self.parametrisation.network

    @property
    def initial_parameters(self) -> Params:
        """θ0, on the CPU, under the encoder's own names; not to be changed."""
        return self.parametrisation.initial_parameters

    def task_vector(self) -> Mapping[str, Tensor]:
        """τ = θ − θ0 of the encoder as it is now, on the CPU, in θ0's dtype; linearised, its τ.

        Computed tensor by tensor when it is read: take a ``dict`` of it to keep it while training goes on. Of LoRA it
        is the dense update.
        """
        return self.parametrisation.task_vector()

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put other values θ of the same names and shapes into the encoder; linearised, τ becomes θ − θ0.

        Raises:
            StructureMismatchError: names or shapes differ.
        """
        self.parametrisation.load_parameters(parameters)

    def load_task_vector(self, vector: TaskVector, coefficient: float = 1.0) -> None:
        """Set the encoder to θ0 + coefficient · τ; linearised, its τ to coefficient · τ.

        Raises:
            StructureMismatchError: the vector belongs to another base, or its names or shapes differ.
        """
        self.check_vector(vector)
        self.parametrisation.load_task_vector(vector, coefficient)

    def check_vector(self, vector: TaskVector) -> None:
        """Refuse a vector of another base model, which the activation function is part of.

        Raises:
            StructureMismatchError: the vector says that it is one.
        """
        check_base(vector, self.base_fingerprint, self.base_name, self.base.activation)

    def load_weights(self, path: str | Path) -> None:
        """Put whole weights into the encoder: those of the tower alone, or of a CLIP, in any form that can be opened.

        Running statistics and other buffers are taken over as well where the file has them.

        Raises:
            FileFormatError: the file is missing or damaged, or holds no whole weights.
            StructureMismatchError: names or shapes differ, or the file says that it has another base or activation.
            NonFiniteError: a value is NaN or infinite.
        """
        opened = open_checkpoint(path)
        known = opened.metadata.get("base_fingerprint") or opened.other.get("base_fingerprint")
        if known and known != self.base_fingerprint:
            raise StructureMismatchError(
                f"{path}: expected weights of the base model {self.base_name} (fingerprint {self.base_fingerprint}), "
                f"got fingerprint {known}. Give the model that these weights were made from."
            )
        opened.require_weights()
        activation = activations_of(opened).get(IMAGE_TOWER, "")
        check_activation(self.base.activation, activation, str(path), self.base_name)
        opened.verify()
        whole = all(name in opened for name in self.initial_parameters)  # a head may be beside what looks like a prefix
        stored: LazyMapping = opened if whole else opened.without_prefix()
        if opened.recognised.layout in ("transformers", "timm"):
            stored = opened.image_tower()
        own = all(name in stored for name in self.initial_parameters)  # a text tower shares some of them
        prefix = "visual." if not own and any(name.startswith("visual.") for name in stored) else ""
        values = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
        check_finite(values, str(path))
        for name, first in shared_names(self.network).items():  # state dicts have them under all names
            copy = values.pop(name, None)
            if copy is not None and not torch.equal(copy, values.setdefault(first, copy)):
                raise StructureMismatchError(
                    f"{path}: expected {name} and {first} to be one tensor, as {self.base_name} has them, got two. "
                    "Give weights of this network."
                )
        buffers = {name: buffer for name, buffer in self.network.named_buffers() if name in values}
        check_same_structure(buffers, {name: values[name] for name in buffers}, f"{path}: buffers")
        self.load_parameters({name: value for name, value in values.items() if name not in buffers})
        for name, buffer in buffers.items():
            buffer.copy_(values[name])

    def make_head(self, task: TaskWords) -> nn.Module:
        """The head of a task: that of the network, unless this is overridden.

        Where the network would make a new one, and it does not train here, it is the one that a run has written beside
        the task vector.

        Args:
            task: has a ``name``, ``classes`` and ``templates``.

        Raises:
            ConfigurationError: the network has no head for such a task, or a new one only.
            StructureMismatchError: the head beside the task vector is of other classes.
        """
        if not self.base.makes_new_head(task) or self.starts_head(task):
            return self.base.head(task)
        return trained_head(task, self._vector_files, self._listings)

    def starts_head(self, task: TaskWords) -> bool:
        """Whether a new head of this task is trained here."""
        return False

    def look_beside(self, vectors: Iterable[VectorFile]) -> None:
        """Look for trained heads beside these task vectors, too.

        Args:
            vectors: files and their tasks.
        """
        self._vector_files += vectors

    def _head_to_restore(self, task: TaskWords) -> nn.Module:
        """:meth:`make_head`; where it refuses for want of a trained one, a new one, as a checkpoint may follow."""
        self._refused.pop(task.name or "", None)
        try:
            return self.make_head(task)
        except LitMergeError as error:
            if not self.base.makes_new_head(task):
                raise
            self._refused[task.name or ""] = error
            return self.base.head(task)

    def check_heads(self) -> None:
        """Refuse heads that nobody has trained, once a checkpoint would have brought others.

        Raises:
            LitMergeError: as :meth:`make_head`.
        """
        for error in self._refused.values():
            raise error

    def on_validation_start(self) -> None:
        """See :meth:`check_heads`."""
        self.check_heads()

    def on_test_start(self) -> None:
        """See :meth:`check_heads`."""
        self.check_heads()

    def on_predict_start(self) -> None:
        """See :meth:`check_heads`."""
        self.check_heads()

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """What the encoder takes of a batch."""
        return self.base.inputs(batch)

    def forward(self, *inputs: Any) -> Tensor:
        """Encode inputs, e.g. images ``[B, 3, S, S]``, as raw features ``[B, d]``."""
        with fast_attention(inputs[0].device):
            return self.encoder(*inputs)

    def features(self, batch: Any) -> Tensor:
        """Features ``[B, d]`` of a batch."""
        return self(*self.inputs(batch))

    def forward_parts(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """``f(x; θ0)`` and ``J_θ f(x; θ0) · τ`` of inputs, each ``[B, d]``, with the current τ.

        A linearised encoder's output is their sum. Of any other, this is its tangent at θ0, for the τJp metric and
        penalty; it needs a copy of θ0 for the parameters that train on the encoder's device.
        """
        return self.parametrisation.forward_parts(*inputs)

    def check_loss(self, loss: Tensor) -> Tensor:
        """Return the loss if it is finite on every process; all processes stop together if it is not.

        Raises:
            NonFiniteError: it is NaN or infinite on one of them.
        """
        finite = bool(torch.isfinite(loss.detach()).all())
        if self.trainer.world_size > 1:
            finite = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            raise NonFiniteError(
                f"loss: expected a finite value, got {float(loss.detach())} at step {self.trainer.global_step}. "
                "Lower learning_rate, or look for damaged images; the last checkpoint is untouched."
            )
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the encoder started from, and whether its parameters are θ or τ."""
        checkpoint["base_fingerprint"] = self.base_fingerprint
        checkpoint["linearized"] = self.linearized
        checkpoint["low_rank"] = self._low_rank
        if self.base.activation:
            checkpoint["activation"] = self.base.activation

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, or whose tensors mean something else under the same names.

        Raises:
            StructureMismatchError: it is one.
        """
        known = checkpoint.get("base_fingerprint", self.base_fingerprint)
        if known != self.base_fingerprint:
            raise StructureMismatchError(
                f"checkpoint: expected one that started from {self.base_name} (fingerprint {self.base_fingerprint}), "
                f"got fingerprint {known}. Use the model, weights and seed that the run started from."
            )
        activation = str(checkpoint.get("activation") or "")
        check_activation(self.base.activation, activation, "checkpoint", self.base_name)
        if checkpoint.get("linearized", False) != self.linearized:
            raise StructureMismatchError(
                f"checkpoint: expected one of a run with linearized={self.linearized}, got one with "
                f"linearized={not self.linearized}. Set linearized as that run did."
            )
        low_rank = checkpoint.get("low_rank", self._low_rank)
        if low_rank != self._low_rank:
            raise StructureMismatchError(
                f"checkpoint: expected one of a run with {self._low_rank or 'no lora'}, got one with "
                f"{low_rank or 'no lora'}. Set lora as that run did."
            )
        self._refused.clear()  # it holds the heads
        self.parametrisation.restored()

    @property
    def _low_rank(self) -> str:
        """What a checkpoint's factors mean; which weights have some, their names say."""
        lora = getattr(self.parametrisation, "lora", None)
        if not isinstance(lora, LoRA):
            return ""
        scales = {pattern: float(alpha) for pattern, alpha in (lora.alpha_pattern or {}).items()}
        return repr(replace(lora, alpha=float(lora.alpha), alpha_pattern=scales or None, dropout=0.0, on=None))

    def base_description(self) -> dict[str, str]:
        """What describes the base in files: fingerprint, name and, if it is known, activation function."""
        known = {"activation": self.base.activation} if self.base.activation else {}
        return {"base_fingerprint": self.base_fingerprint, "base_model": self.base_name, **known}
