"""Sharpness-aware minimisation: every step takes the gradient at the worst point nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.transforms.base import finite_number

__all__ = ["SAM", "Displaced", "SharpnessAware"]


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021), of which flatter task vectors merge better (Lee et al. 2025).

    Args:
        rho: radius ρ of the neighbourhood; 0 changes nothing but the cost.
        adaptive: ASAM (Kwon et al. 2021): distances are measured in units of ``|w| + η``, element by element.
        eta: η, above 0.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01

    def __post_init__(self) -> None:
        finite_number("sam.rho", self.rho, minimum=0.0)
        finite_number("sam.eta", self.eta, minimum=0.0)
        if self.adaptive and self.eta == 0:
            raise ConfigurationError("sam.eta: expected a number above 0, got 0, which would hold zeros fixed.")

    def __repr__(self) -> str:
        return f"SAM(rho={self.rho:g}{f', adaptive=True, eta={self.eta:g}' if self.adaptive else ''})"


class Displaced(torch.optim.Optimizer):
    """Takes another optimiser's step with a gradient from elsewhere; subclasses say where, in :meth:`step`.

    Groups, state, learning rates and checkpoints are those of the other optimiser.

    Args:
        optimizer: whose steps are taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        """The other optimiser's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the other optimiser's."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    @staticmethod
    @contextmanager
    def _elsewhere(parameters: Sequence[Tensor]) -> Iterator[None]:
        """Parameters may be moved inside; afterwards they have their values again, also if the loss fails."""
        before = [one.clone() for one in parameters]
        try:
            yield
        finally:
            for one, value in zip(parameters, before, strict=True):  # not subtracted, which would round
                one.copy_(value)


class SharpnessAware(Displaced):
    r"""Takes another optimiser's step with the gradient at ``w + ε``.

    ``ε = ρ g / ‖g‖`` (Foret et al. 2021, equation 2), adaptive ``ε = ρ T² g / ‖T g‖`` with ``T = |w| + η`` (Kwon et al.
    2021), the norm over all parameters. A step evaluates its closure twice, so it costs twice as much.

    Args:
        optimizer: whose steps are taken.
        settings: ρ, and how distances are measured.

    Attributes:
        away: whether the closure is evaluated at ``w + ε``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: SAM) -> None:
        super().__init__(optimizer)
        self.settings, self.away = settings, False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure clears gradients, and computes the loss and its gradients.

        Raises:
            ConfigurationError: there is no closure, as with float16's scaled gradients.
        """
        if closure is None:
            raise ConfigurationError(
                "sam: expected a closure that evaluates the loss again, got none. "
                "Use the precision 32-true or bf16-mixed rather than 16-mixed."
            )
        with torch.enable_grad():
            loss = closure()
        trained = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        gradients = [one.grad for one in trained]
        scales = [one.abs() + self.settings.eta for one in trained] if self.settings.adaptive else None
        scaled = gradients if scales is None else torch._foreach_mul(gradients, scales)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))
        moves: list[Tensor] = list(scaled if scales is None else torch._foreach_mul(scaled, scales))
        factor = torch.where(norm > 0, self.settings.rho / norm, 0)
        with self._elsewhere(trained):
            torch._foreach_add_(trained, [move * factor for move in moves])
            self.away = True
            try:
                with torch.enable_grad():
                    closure()
            finally:
                self.away = False
        self.optimizer.step()
        return loss
