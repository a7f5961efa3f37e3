"""What the LightningModules share: an image tower with its preprocessing, its θ0, and zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, FileFormatError, NonFiniteError, StructureMismatchError
from lit_merge.models.encoder import Preprocessing, load_clip
from lit_merge.models.heads import ZeroShotHead, build_head
from lit_merge.modules.attention import fast_attention
from lit_merge.params import Params, check_finite, check_same_structure, fingerprint
from lit_merge.vectors.merge import check_base
from lit_merge.vectors.store import LazyTensors
from lit_merge.vectors.task_vector import TaskVector

__all__ = ["EncoderModule"]


class EncoderModule(L.LightningModule):
    """Base of the modules: an encoder whose parameters keep their own names, and where it started from.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`; ignored when ``encoder`` is given.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        encoder: any module ``[B, …] -> [B, d]`` instead of an open_clip image tower.
        preprocessing: how images become its input; taken from the model by default.
        task_vector: file of a task vector to start from: the encoder becomes θ0 + τ, while θ0 stays the base.
        weights: file of whole (e.g. merged) weights to start from; θ0 stays the base. Excludes ``task_vector``.

    Attributes:
        encoder: the network that is trained or evaluated.
        preprocessing: read by the data modules.
        base_fingerprint: of θ0.

    Raises:
        ConfigurationError: both ``task_vector`` and ``weights`` are given, or the model is unknown.
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
    ) -> None:
        super().__init__()
        if task_vector is not None and weights is not None:
            raise ConfigurationError("task_vector and weights: expected one of them, got both. Remove one.")
        self.clip = None
        if encoder is None:
            self.clip = load_clip(model, pretrained)
            encoder, self.base_name = self.clip.visual, self.clip.name
            preprocessing = preprocessing or self.clip.preprocessing
        else:
            self.base_name = type(encoder).__name__
        self.encoder = encoder
        self.preprocessing = preprocessing or Preprocessing()
        self._initial = {name: value.detach().cpu().clone() for name, value in encoder.named_parameters()}
        self.base_fingerprint = self.clip.fingerprint if self.clip is not None else fingerprint(self._initial)
        if task_vector is not None:
            self.load_task_vector(TaskVector.load(task_vector, verify=True))
        if weights is not None:
            self.load_weights(weights)

    @property
    def initial_parameters(self) -> Params:
        """θ0, on the CPU, under the encoder's own names; not to be changed."""
        return self._initial

    def task_vector(self) -> Params:
        """τ = θ − θ0 of the encoder as it is now, on the CPU, in θ0's dtype."""
        return {
            name: value.detach().cpu().to(self._initial[name].dtype) - self._initial[name]
            for name, value in self.encoder.named_parameters()
        }

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put other values of the same names and shapes into the encoder.

        Raises:
            StructureMismatchError: names or shapes differ.
        """
        own = dict(self.encoder.named_parameters())
        check_same_structure(own, parameters, "weights")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(parameters[name])

    def load_task_vector(self, vector: TaskVector, coefficient: float = 1.0) -> None:
        """Set the encoder to θ0 + coefficient · τ.

        Raises:
            StructureMismatchError: the vector belongs to another base, or its names or shapes differ.
        """
        check_base(vector, self.base_fingerprint, self.base_name)
        self.load_parameters(vector.apply_to(self._initial, coefficient))

    def load_weights(self, path: str | Path) -> None:
        """Put whole weights from a safetensors file into the encoder: the tower alone, or a CLIP (``visual.…``).

        Running statistics and other buffers are taken over as well where the file has them.

        Raises:
            FileFormatError: the file is missing, damaged, no safetensors file, or a task vector.
            StructureMismatchError: names or shapes differ, or the file says that it has another base.
            NonFiniteError: a value is NaN or infinite.
        """
        stored = LazyTensors(path)
        known = stored.metadata.get("base_fingerprint", "")
        if known and known != self.base_fingerprint:
            raise StructureMismatchError(
                f"{path}: expected weights of the base model {self.base_name} (fingerprint {self.base_fingerprint}), "
                f"got fingerprint {known}. Give the model that these weights were made from."
            )
        if stored.metadata.get("format", "").startswith("lit-merge/task-vector/"):
            raise FileFormatError(f"{path}: expected whole weights, got a task vector. Give it as task_vector instead.")
        if stored.content_digest is not None:  # of the files that lit-merge writes
            stored.verify()
        own = all(name in stored for name, _ in self.encoder.named_parameters())  # a text tower shares some of them
        prefix = "visual." if not own and any(name.startswith("visual.") for name in stored) else ""
        values = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
        check_finite(values, str(path))
        buffers = {name: buffer for name, buffer in self.encoder.named_buffers() if name in values}
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
                "head: expected one for a module that is no CLIP, got none. Pass head=… (features [B, d] -> logits)."
            )
        return build_head(self.clip, list(classes), list(templates))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images ``[B, 3, S, S]`` as raw features ``[B, d]``."""
        with fast_attention(images.device):
            return self.encoder(images)

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
        """Note where the encoder started from."""
        checkpoint["base_fingerprint"] = self.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base: its task vector would be measured from the wrong θ0.

        Raises:
            StructureMismatchError: it is one.
        """
        known = checkpoint.get("base_fingerprint", self.base_fingerprint)
        if known != self.base_fingerprint:
            raise StructureMismatchError(
                f"checkpoint: expected one that started from {self.base_name} (fingerprint {self.base_fingerprint}), "
                f"got fingerprint {known}. Use the model, weights and seed that the run started from."
            )

    def base_description(self) -> dict[str, str]:
        """What describes the base in files: fingerprint and name."""
        return {"base_fingerprint": self.base_fingerprint, "base_model": self.base_name}
