"""What the LightningModules share: an image tower, how it departs from θ0, its preprocessing, and zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError
from lit_merge.files.lazy import Computed
from lit_merge.functional import linearize
from lit_merge.functional.attention import fast_attention
from lit_merge.models.encoder import Preprocessing, load_clip
from lit_merge.models.heads import ZeroShotHead, build_head
from lit_merge.models.linearized import LinearizedModel
from lit_merge.models.lora import LoRA, clear_updates, own_parameters, update_of
from lit_merge.models.selection import Selection
from lit_merge.params import Params, check_finite, check_same_structure, fingerprint
from lit_merge.vectors.merge import check_base
from lit_merge.vectors.task_vector import TaskVector

__all__ = ["EncoderModule"]


class EncoderModule(L.LightningModule):
    """Base of the modules: an encoder whose parameters keep their own names, and where it started from.

    How the encoder departs from θ0 is chosen by orthogonal settings: whether it is evaluated as it is or linearised,
    and which parameters may move, themselves or by low-rank updates. Whichever it is, :meth:`task_vector` is τ under
    the encoder's own names, and the files are the same.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`; ignored when ``encoder`` is given.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        encoder: any module ``[B, …] -> [B, d]`` instead of an open_clip image tower.
        preprocessing: how images become its input; taken from the model by default.
        task_vector: file of a task vector to start from: the encoder becomes θ0 + τ, while θ0 stays the base.
        weights: file of whole (e.g. merged) weights to start from; θ0 stays the base. Excludes ``task_vector``.
        linearized: whether the encoder is ``f(x; θ0) + J τ`` (:class:`lit_merge.LinearizedModel`).
        trainable: which parameters train; None for all.
        lora: low-rank updates train instead.

    Attributes:
        encoder: the network that is trained or evaluated: a :class:`lit_merge.LinearizedModel` if linearised.
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
        encoder: nn.Module | None = None,
        preprocessing: Preprocessing | None = None,
        task_vector: str | None = None,
        weights: str | None = None,
        linearized: bool = False,
        trainable: Selection | None = None,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        if task_vector is not None and weights is not None:
            raise ConfigurationError("task_vector and weights: expected one of them, got both. Remove one.")
        if lora is not None and (linearized or trainable is not None):
            other, reason = (
                ("linearized", "the encoder is not linear in LoRA's factors. Remove one.")
                if linearized
                else ("trainable", "LoRA's factors are what trains. Remove one, or choose weights by lora.on.")
            )
            raise ConfigurationError(f"lora and {other}: expected one of them, got both: {reason}")
        self.clip = None
        if encoder is None:
            self.clip = load_clip(model, pretrained)
            encoder, self.base_name = self.clip.visual, self.clip.name
            preprocessing = preprocessing or self.clip.preprocessing
        else:
            self.base_name = type(encoder).__name__
        self.preprocessing = preprocessing or Preprocessing()
        self.linearized, self.trainable, self.lora = linearized, trainable, lora
        self.encoder = self._prepare(encoder)
        self.base_fingerprint = self.clip.fingerprint if self.clip is not None else fingerprint(self.initial_parameters)
        if task_vector is not None:
            self.load_task_vector(TaskVector.load(task_vector, verify=True))
        if weights is not None:
            self.load_weights(weights)

    def _prepare(self, encoder: nn.Module) -> nn.Module:
        """Let the selected parameters train and freeze the others."""
        own = dict(encoder.named_parameters())
        self._dtypes = {name: value.dtype for name, value in own.items()}  # the trainer's precision may change them
        self._initial: Params | None = None
        self._placed: Params = {}
        self._elsewhere: frozenset[str] | None = frozenset()
        if self.linearized:
            names = self.trainable(own) if self.trainable else [n for n, value in own.items() if value.requires_grad]
            return LinearizedModel(encoder, names)  # which leaves θ0 where it is
        self._initial = {name: value.detach().cpu().clone() for name, value in own.items()}
        if self.lora:
            self.lora.inject(encoder)
        elif self.trainable:
            chosen = set(self.trainable(own))
            for name, value in own.items():
                value.requires_grad_(name in chosen)
        return encoder

    @property
    def network(self) -> nn.Module:
        """The encoder's own modules; linearised, those that hold θ0."""
        return self.encoder.module if isinstance(self.encoder, LinearizedModel) else self.encoder

    @property
    def initial_parameters(self) -> Params:
        """θ0, on the CPU, under the encoder's own names; not to be changed."""
        if isinstance(self.encoder, LinearizedModel):
            return {name: value.cpu() for name, value in self.encoder.initial_parameters().items()}
        assert self._initial is not None
        return self._initial

    def task_vector(self) -> Mapping[str, Tensor]:
        """τ = θ − θ0 of the encoder as it is now, on the CPU, in θ0's dtype; linearised, its τ.

        Computed tensor by tensor when it is read: take a ``dict`` of it to keep it while training goes on. Of LoRA it
        is the dense update.
        """
        if isinstance(self.encoder, LinearizedModel):
            tau = self.encoder.task_vector()
            return {name: value.to("cpu", self._dtypes[name]) for name, value in tau.items()}
        initial = self.initial_parameters
        structure = {name: (value.shape, value.dtype) for name, value in initial.items()}
        return Computed(structure, partial(_departure, initial, self.encoder, own_parameters(self.encoder)))

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put other values θ of the same names and shapes into the encoder; linearised, τ becomes θ − θ0.

        Raises:
            StructureMismatchError: names or shapes differ.
        """
        if isinstance(self.encoder, LinearizedModel):
            initial = self.initial_parameters
            check_same_structure(initial, parameters, "weights")
            self.encoder.load_task_vector({name: parameters[name] - value for name, value in initial.items()})
            return
        own = own_parameters(self.encoder)
        check_same_structure(own, parameters, "weights")
        clear_updates(self.encoder)
        self._elsewhere = None
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(parameters[name])

    def load_task_vector(self, vector: TaskVector, coefficient: float = 1.0) -> None:
        """Set the encoder to θ0 + coefficient · τ; linearised, its τ to coefficient · τ.

        Raises:
            StructureMismatchError: the vector belongs to another base, or its names or shapes differ.
        """
        check_base(vector, self.base_fingerprint, self.base_name)
        if isinstance(self.encoder, LinearizedModel):
            self.encoder.load_task_vector(vector, coefficient)
        else:
            self.load_parameters(vector.apply_to(self.initial_parameters, coefficient))

    def load_weights(self, path: str | Path) -> None:
        """Put whole weights into the encoder: those of the tower alone, or of a CLIP, in any form that can be opened.

        Running statistics and other buffers are taken over as well where the file has them.

        Raises:
            FileFormatError: the file is missing or damaged, or holds no whole weights.
            StructureMismatchError: names or shapes differ, or the file says that it has another base.
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
        opened.verify()
        stored = opened.without_prefix()
        if opened.recognised.layout in ("transformers", "timm"):
            stored = opened.image_tower()
        own = all(name in stored for name in self.initial_parameters)  # a text tower shares some of them
        prefix = "visual." if not own and any(name.startswith("visual.") for name in stored) else ""
        values = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
        check_finite(values, str(path))
        buffers = {name: buffer for name, buffer in self.network.named_buffers() if name in values}
        check_same_structure(buffers, {name: values[name] for name in buffers}, f"{path}: buffers")
        self.load_parameters({name: value for name, value in values.items() if name not in buffers})
        for name, buffer in buffers.items():
            buffer.copy_(values[name])

    def make_head(self, classes: Sequence[str], templates: Sequence[str]) -> ZeroShotHead:
        """The frozen zero-shot head for classes and templates, from the cache if it was built before.

        Raises:
            ConfigurationError: the encoder is no CLIP, so that there is no text tower to build it with.
        """
        if self.clip is None:
            raise ConfigurationError(
                "head: expected one for a module that is no CLIP, got none. Pass head=… (features [B, d] -> logits), "
                "or override make_head for the heads of other tasks."
            )
        return build_head(self.clip, list(classes), list(templates))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images ``[B, 3, S, S]`` as raw features ``[B, d]``."""
        with fast_attention(images.device):
            return self.encoder(images)

    def forward_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x; θ0)`` and ``J_θ f(x; θ0) · τ`` of images ``[B, 3, S, S]``, each ``[B, d]``, with the current τ.

        A linearised encoder's output is their sum. Of any other, this is its tangent at θ0, for the τJp metric and
        penalty; it needs a copy of θ0 for the parameters that train on the encoder's device.
        """
        if isinstance(self.encoder, LinearizedModel):
            return self.encoder.forward_parts(images)
        if self.lora is not None:
            raise ConfigurationError(
                "tangent: expected parameters that train themselves, got LoRA's factors. Load the task vector into a "
                "module without lora to measure it, or train without a penalty."
            )
        moved = self._moved()
        initial = self._initial_beside(moved)
        return linearize(self.encoder, initial, {name: value - initial[name] for name, value in moved.items()}, images)

    def _moved(self) -> dict[str, nn.Parameter]:
        """The parameters that are not at θ0, or will not be: those that train, and frozen ones with loaded values."""
        own = dict(self.encoder.named_parameters())
        if self._elsewhere is None:
            start = self.initial_parameters
            self._elsewhere = frozenset(n for n, value in own.items() if not torch.equal(value, start[n].to(value)))
        return {name: value for name, value in own.items() if value.requires_grad or name in self._elsewhere}

    def _initial_beside(self, moved: Mapping[str, Tensor]) -> Params:
        """θ0 on these parameters' device and in their dtype, copied there once."""
        for name, value in moved.items():
            placed = self._placed.get(name)
            if placed is None or (placed.device, placed.dtype) != (value.device, value.dtype):
                with torch.inference_mode(False):  # a copy made in validation is used in training as well
                    self._placed[name] = self.initial_parameters[name].to(value.device, value.dtype)
        return {name: self._placed[name] for name in moved}

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, or one that has τ where this module has θ, under the same names.

        Raises:
            StructureMismatchError: it is one.
        """
        known = checkpoint.get("base_fingerprint", self.base_fingerprint)
        if known != self.base_fingerprint:
            raise StructureMismatchError(
                f"checkpoint: expected one that started from {self.base_name} (fingerprint {self.base_fingerprint}), "
                f"got fingerprint {known}. Use the model, weights and seed that the run started from."
            )
        if checkpoint.get("linearized", False) != self.linearized:
            raise StructureMismatchError(
                f"checkpoint: expected one of a run with linearized={self.linearized}, got one with "
                f"linearized={not self.linearized}. Set linearized as that run did."
            )
        self._elsewhere = None

    def base_description(self) -> dict[str, str]:
        """What describes the base in files: fingerprint and name."""
        return {"base_fingerprint": self.base_fingerprint, "base_model": self.base_name}


def _departure(initial: Params, encoder: nn.Module, own: Mapping[str, Tensor], name: str) -> Tensor:
    """One tensor of τ."""
    departure = own[name].detach().cpu().to(initial[name].dtype) - initial[name]
    update = update_of(encoder, name)
    return departure if update is None else departure + update.cpu()
