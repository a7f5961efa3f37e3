"""The optimisation that the papers share: AdamW, warm-up, cosine, clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_merge.errors import ConfigurationError
from lit_merge.functional.attention import fast_attention
from lit_merge.models.parametrisations import Direct, Linearised, LinearisedLowRank, LowRank
from lit_merge.models.rates import Rates
from lit_merge.models.selection import TaLoS
from lit_merge.modules.encoding import EncoderModule
from lit_merge.modules.offsets import MergOPT, OffsetAware
from lit_merge.modules.sharpness import SAM, SharpnessAware

__all__ = ["FineTuningProtocol", "total_steps", "warm_up_cosine"]

# Of AdamW, as CLIP's vision transformers were trained with (Radford et al. 2021, table 18). At torch's 1e-8 parameters
# whose gradient is zero but for rounding, the key biases of attention above all, still walk at random.
_EPSILON = 1e-6


def warm_up_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear from 0 to 1 over the warm-up, then half a cosine down to 0.

    Args:
        warmup_steps: steps of the warm-up, 0 for none.
        total_steps: the step at which the factor reaches 0.

    Returns:
        A function of the step (counted from 0) with values in [0, 1], for ``torch.optim.lr_scheduler.LambdaLR``.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def total_steps(trainer: L.Trainer) -> int:
    """The number of optimiser steps of a whole run, which the schedule has to know.

    Raises:
        ConfigurationError: the trainer has no end.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise ConfigurationError(
            "trainer: expected an end that the learning rate can fall towards, got none. Set max_steps or max_epochs."
        )
    scheduler = _accumulation(trainer)
    if scheduler is not None and trainer.max_epochs != -1 and math.isfinite(trainer.num_training_batches):
        epochs = range(max(trainer.max_epochs or 0, 1))
        steps = sum(math.ceil(trainer.num_training_batches / scheduler.get_accumulate_grad_batches(e)) for e in epochs)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return int(steps)


def _accumulation(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    """What changes the trainer's accumulation from epoch to epoch, of which its own estimate of steps knows nothing."""
    found = (one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler))  # type: ignore[attr-defined]
    return next(found, None)


class FineTuningProtocol(EncoderModule):
    """An encoder module that trains as the papers do (Ilharco et al. 2023, appendix B).

    A network that is wholly in evaluation mode, as libraries' loaders leave it, is put into training mode when a fit
    begins, so that its dropout acts; one of which some parts are in training mode stays as it is. A linearised network
    has no dropout, and batch normalisation keeps its statistics.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`.
        pretrained: its weights.
        learning_rate: peak of the schedule.
        weight_decay: of every trained parameter, as in the papers' programs.
        warmup_fraction: of the steps, those over which the rate grows, in [0, 1).
        gradient_clip: largest norm of the gradient, 0 for no limit; the trainer's ``gradient_clip_val`` wins if set.
        rates: fraction of the learning rate that each block has, e.g. ``LinLR`` (Wang et al. 2025); None for all of it.
        optimizer_wrapper: makes another optimiser of AdamW, e.g. one that takes two gradients per step; the learning
            rate, schedule and clipping stay as they are.
        sam: sharpness-aware minimisation, e.g. ``{rho: 0.05, adaptive: false}``; every step costs two.
        mergopt: gradients at random offsets such as merging makes, e.g. ``{scale: 0.0005}``.
        activation_checkpointing: whether the encoder's blocks are computed again on the way back, to save memory.
        **encoder_settings: of :class:`EncoderModule`.

    Raises:
        ConfigurationError: a number is out of its range, or settings exclude each other.
    """

    def __init__(
        self,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
        gradient_clip: float = 1.0,
        rates: Rates | None = None,
        optimizer_wrapper: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
        sam: SAM | None = None,
        mergopt: MergOPT | None = None,
        activation_checkpointing: bool = False,
        **encoder_settings: Any,
    ) -> None:
        check_range("learning_rate", learning_rate)
        check_range("weight_decay", weight_decay)
        check_range("warmup_fraction", warmup_fraction, below=1.0)
        check_range("gradient_clip", gradient_clip)
        wrappers = {"sam": sam, "mergopt": mergopt, "optimizer_wrapper": optimizer_wrapper}
        if len(both := [name for name, one in wrappers.items() if one is not None]) > 1:
            raise ConfigurationError(f"{both[0]} and {both[1]}: expected one of them, got both. Remove one.")
        super().__init__(model=model, pretrained=pretrained, **encoder_settings)
        if sam is not None and sam.adaptive and self.linearized:
            raise ConfigurationError(
                "sam.adaptive: expected parameters that are weights, got a linearised network's, which are τ. "
                "Set adaptive to false."
            )
        if self.masks_elements and type(self).hold_elements is FineTuningProtocol.hold_elements:
            self.hold_elements()  # which refuses
        self.sam, self.mergopt = sam, mergopt
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.gradient_clip = gradient_clip
        self.rates = rates
        self._optimizer_wrapper = optimizer_wrapper
        self._wrapped: str | None = None
        self._random: list[Tensor] | None = None  # at the end of the last step; None within one
        if rates is not None:
            rates(self.initial_parameters)  # refuses a network without blocks before anything is loaded
        if activation_checkpointing:
            self.checkpoint_activations("Turn it off, or use smaller batches and accumulate_grad_batches.")
        self._keep_statistics()

    @property
    def masks_elements(self) -> bool:
        """Whether single elements train, and not whole parameters."""
        return isinstance(getattr(self.parametrisation, "trainable", None), TaLoS)

    def hold_elements(self) -> None:
        """Put elements that do not train back to where they were; called after an optimiser's step."""
        raise ConfigurationError(
            f"trainable: expected whole parameters with {type(self).__name__}, got {self.trainable!r}. Use "
            "FineTuneModule, or another selection."
        )

    def setup(self, stage: str) -> None:
        """See :class:`EncoderModule`; in fit, see the mode of the network described above."""
        super().setup(stage)
        if stage != "fit":
            return
        self._random = None
        if self.as_loaded:
            self.encoder.train()
            self._keep_statistics()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go back with the kernel of the way there, which blocks that are computed again have to use as well."""
        with fast_attention(loss.device):
            super().backward(loss, *args, **kwargs)

    def train(self, mode: bool = True) -> FineTuningProtocol:
        """Switch to training; batch normalisation keeps its statistics, which a task vector does not hold."""
        super().train(mode)
        self._keep_statistics()
        return self

    def _keep_statistics(self) -> None:
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimiser changes: of the encoder, those that require gradients."""
        return [(name, value) for name, value in self.encoder.named_parameters() if value.requires_grad]

    def configure_optimizers(self) -> Any:
        """AdamW, linear warm-up, cosine to 0 at the trainer's last step; one group per learning rate."""
        trained = self.trainable_parameters()
        shares = self.rates(name for name, _ in self.network.named_parameters()) if self.rates else {}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained:
            own = name if name in shares else name.rpartition(".")[0]  # of a factor the weight's
            groups.setdefault(shares.get(own, 1.0), []).append(parameter)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [{"params": group, "lr": self.learning_rate * share} for share, group in groups.items()],
            eps=_EPSILON,
            weight_decay=self.weight_decay,
        )
        if self.masks_elements:
            optimizer.register_step_post_hook(lambda *_: self.hold_elements())
        scheduler = _accumulation(self.trainer)
        batches = max([self.trainer.accumulate_grad_batches, *(scheduler.scheduling.values() if scheduler else ())])
        for name, one in (("sam", self.sam), ("mergopt", self.mergopt)):
            if one is not None and batches > 1:
                raise ConfigurationError(
                    f"{name}: expected one batch per step, got accumulate_grad_batches {batches}, of which it could "
                    "evaluate the last again only. Use larger batches."
                )
        if self.sam is not None:
            optimizer = SharpnessAware(optimizer, self.sam)
        if self.mergopt is not None:
            optimizer = OffsetAware(optimizer, self.mergopt)
        if self._optimizer_wrapper is not None:
            optimizer = self._optimizer_wrapper(optimizer)
            self._wrapped = type(optimizer).__name__
        total = total_steps(self.trainer)
        factor = warm_up_cosine(round(self.warmup_fraction * total), total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the random numbers of the last step, whatever was drawn since, e.g. by a validation."""
        if self._random is not None:
            _set_random_state(self._random, self.device)
        self._random = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the random numbers for the next step."""
        self._random = _random_state(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :class:`EncoderModule`; dropout goes on as it would have, of several processes as in the first."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["random_state"] = _random_state(self.device) if self._random is None else self._random

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :class:`EncoderModule`."""
        super().on_load_checkpoint(checkpoint)
        self._random = checkpoint.get("random_state")

    @property
    def evaluates_again(self) -> bool:
        """Whether the loss of a batch is evaluated once more, away from the weights, as SAM does: it is not logged."""
        return any(isinstance(one, SharpnessAware) and one.away for one in self.trainer.optimizers)

    @property
    def regime(self) -> str:
        """How the encoder is trained, as a task vector's header has it: ``full``, or e.g. ``linearized, All()``."""
        shorthands = (self.trainable, self.lora)
        given = (
            self.parametrisation
            if type(self.parametrisation) not in (Direct, Linearised, LinearisedLowRank, LowRank)
            else None
        )
        parts = [repr(part) for part in (*shorthands, given, self.rates, self.sam, self.mergopt) if part is not None]
        wrapped = [] if self._wrapped is None else [self._wrapped]
        return ", ".join([*(["linearized"] if self.linearized else []), *parts, *wrapped]) or "full"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip at the trainer's value, or at this module's own."""
        value = self.gradient_clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value or None, gradient_clip_algorithm or "norm")


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and of that of the GPU that a process computes on."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Also of a run on another kind of device, of which the CPU's generator is taken over."""
    torch.set_rng_state(state[0].cpu())
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1].cpu(), device)


def check_range(name: str, value: float, low: float = 0.0, below: float = math.inf) -> None:
    """Refuse a number outside [low, below).

    Raises:
        ConfigurationError: it is.
    """
    if not low <= value < below:
        raise ConfigurationError(f"{name}: expected a number in [{low:g}, {below:g}), got {value}.")
