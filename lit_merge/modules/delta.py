"""DELTA: an ordinary network learns along its whole path from θ0 what a linearised one does, which merges better."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.functional.attention import fast_attention
from lit_merge.metrics.hits import hits_of
from lit_merge.models.linearized import LinearizedModel
from lit_merge.models.parametrisations import Direct
from lit_merge.modules.finetune import FineTuneModule
from lit_merge.modules.penalty import split_batch
from lit_merge.modules.protocol import check_range, total_steps

__all__ = ["DeltaModule"]


class DeltaModule(FineTuneModule):
    r"""Fine-tunes a student and its linearised teacher together; the task vector is the student's (DELTA, 2026).

    .. math::
        CE(f(x; θ_0 + α τ_S)) + CE(f_{lin}(x; α τ_T))
        + λ_d ‖\hat f(x; θ_0 + α τ_S) - sg \hat f_{lin}(x; α τ_T)‖^2 + λ (P(τ_S) + P(τ_T))

    f̂ are features divided by their norm, sg stops the gradient, and α is drawn at every step from ``[1 + (a − 1) p,
    1 + (b − 1) p]``, ``p = (step / steps)^c``. P is the penalty, of the authors EK-FAC of public reference data
    (:class:`~lit_merge.modules.Tak`), so that nothing of other tasks is read. As in their program; there the features
    are linearised together with their normalisation, here before it, and weight decay draws the student to θ0.

    Args:
        alpha: a and b.
        exponent: c, at least 0.
        distillation: λ_d.
        **settings: of :class:`~lit_merge.FineTuneModule`.

    Attributes:
        teacher: the linearised network, a second copy of θ0 with a τ of its own; part of checkpoints.

    Raises:
        ConfigurationError: a number is out of its range, the student is not trained directly or by elements, or the
            penalty reads other tasks' examples.
    """

    def __init__(
        self,
        alpha: tuple[float, float] = (0.5, 2.0),
        exponent: float = 0.5,
        distillation: float = 1.0,
        **settings: Any,
    ) -> None:
        check_range("exponent", exponent)
        check_range("distillation", distillation)
        for value in alpha:
            check_range("alpha", value)
        if alpha[0] > alpha[1]:
            raise ConfigurationError(f"alpha: expected the smaller number first, got {list(alpha)}. Swap them.")
        super().__init__(**settings)
        if type(self.parametrisation) is not Direct:
            raise ConfigurationError(
                f"DeltaModule: expected a student whose parameters train directly, got {self.parametrisation!r}. "
                "Remove linearized, lora and parametrisation; the teacher is linearised by itself."
            )
        if self.masks_elements:
            raise ConfigurationError(
                f"trainable: expected whole parameters with DeltaModule, whose teacher has no masks, got "
                f"{self.parametrisation!r}. Use FineTuneModule, or another selection."
            )
        if self.penalty is not None and self.penalty.reads_other_tasks:
            raise ConfigurationError(
                f"penalty: expected one that reads no other task's examples with DeltaModule, got {self.penalty!r}. "
                "Use Tak, or FineTuneModule with linearized."
            )
        self.alpha, self.exponent, self.distillation = (alpha[0], alpha[1]), exponent, distillation
        network = copy.deepcopy(self.encoder)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(self.initial_parameters[name])
        trained = [name for name, value in self.encoder.named_parameters() if value.requires_grad]
        self.teacher = LinearizedModel(network, trained)

    @property
    def regime(self) -> str:
        """See :class:`FineTuneModule`."""
        return f"DELTA(alpha={list(self.alpha)}, exponent={self.exponent:g}), {super().regime}"

    def setup(self, stage: str) -> None:
        """See :class:`FineTuneModule`; the penalty is prepared for the teacher as well."""
        super().setup(stage)
        if stage == "fit" and self.penalty is not None:
            self.penalty.prepare(self._of_teacher())

    def _of_teacher(self) -> Any:
        """What a penalty asks of a module, about the teacher."""
        known = {name: getattr(self, name) for name in ("base", "base_fingerprint", "initial_parameters", "task")}
        return SimpleNamespace(encoder=self.teacher, parametrisation=SimpleNamespace(departures=self._taught), **known)

    def _taught(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, value) for name, value in self.teacher.changes().items() if value.requires_grad)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """See :class:`FineTuneModule`; those of the teacher as well, under the network's own names."""
        return [*super().trainable_parameters(), *(p for p in self.teacher.named_parameters() if p[1].requires_grad)]

    def path_coefficient(self, step: int) -> float:
        """α of an optimiser step, which the run's seed and the step say, to a resumed run and to all processes."""
        progress = min(1.0, step / total_steps(self.trainer)) ** self.exponent
        low, high = (1 + (end - 1) * progress for end in self.alpha)
        generator = torch.Generator().manual_seed((torch.initial_seed() + step) % 2**63)
        return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One optimisation step's loss, of student and teacher."""
        batch, _ = split_batch(batch)
        inputs, alpha = self.inputs(batch), self.path_coefficient(self.trainer.global_step)
        own = dict(self.encoder.named_parameters())
        moved = {name: own[name] + (alpha - 1) * change for name, change in self.parametrisation.departures()}
        with fast_attention(inputs[0].device):
            features = functional_call(self.encoder, moved, inputs)
        value, tangent = self.teacher.forward_parts(*inputs)
        taught = value + alpha * tangent
        logits, guided = self._logits(features), self._logits(taught)
        apart = F.normalize(_wide(features), dim=-1) - F.normalize(_wide(taught.detach()), dim=-1)
        distance = apart.square().flatten(1).sum(1).mean()
        loss = self.compute_loss(logits, batch) + self.compute_loss(guided, batch) + self.distillation * distance
        penalty = None
        if self.penalty is not None and self.trainer.global_step >= self.penalty.start_step:
            parts = [self.penalty.of_module(one) for one in (self, self._of_teacher())]
            penalty = torch.stack([part for part in parts if part is not None]).sum()
            loss = loss + self.penalty.weight * penalty
        self.check_loss(loss)
        if self.evaluates_again:
            return loss
        if penalty is not None and self.penalty is not None:
            self.log(f"train/{self.penalty.name}", penalty, prog_bar=True)
        accuracy = self._accuracy("fit")
        accuracy(*hits_of(self.head, logits, batch))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/distillation", distance)
        self.log("train/accuracy", accuracy, on_step=True, on_epoch=False)
        return loss


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
