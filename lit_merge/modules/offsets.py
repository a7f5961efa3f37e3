"""Fine-tuning that is robust to being merged: every gradient is taken at a random offset, as other tasks would add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_merge.errors import ConfigurationError
from lit_merge.modules.sharpness import Displaced
from lit_merge.transforms.base import finite_number, whole_number

__all__ = ["MergOPT", "OffsetAware"]


@dataclass(frozen=True)
class MergOPT:
    """Offsets ``(K α − 1) z``, z from a Laplace distribution, K and α drawn at every step (MergOPT, ICLR 2026).

    They stand for what merging does to a model: of K task vectors, α times each, instead of its own alone. The defaults
    are those of the authors' program. Of linearised networks and low-rank factors it is what trains that is moved.

    Args:
        scale: b of the Laplace distribution, its mean absolute deviation; in the units of what trains.
        location: μ of it.
        tasks: the largest K; it is drawn from 1 to this.
        coefficients: the values of α.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    scale: float = 0.0005
    location: float = 0.0
    tasks: int = 7
    coefficients: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

    def __post_init__(self) -> None:
        finite_number("mergopt.scale", self.scale, minimum=0.0)
        finite_number("mergopt.location", self.location)
        whole_number("mergopt.tasks", self.tasks, minimum=1)
        if not self.coefficients:
            raise ConfigurationError("mergopt.coefficients: expected at least one number, got none. Name some.")
        for value in self.coefficients:
            finite_number("mergopt.coefficients", value)
        object.__setattr__(self, "coefficients", tuple(self.coefficients))  # a list from YAML would have no hash

    def __repr__(self) -> str:
        given = f"MergOPT(scale={self.scale:g}, location={self.location:g}, tasks={self.tasks}"
        return f"{given}, coefficients={list(self.coefficients)})"


class OffsetAware(Displaced):
    """Takes another optimiser's step with the gradient at a random offset; a step costs one evaluation.

    The authors' program evaluates the loss at the weights as well, whose gradient it does not use. Draws depend on the
    run's seed and the number of steps taken alone.

    Args:
        optimizer: whose steps are taken; it counts them, as those of torch do.
        settings: of the offsets.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: MergOPT) -> None:
        super().__init__(optimizer)
        self.settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure clears gradients, and computes the loss and its gradients.

        Raises:
            ConfigurationError: there is no closure, as with float16's scaled gradients.
        """
        if closure is None:
            raise ConfigurationError(
                "mergopt: expected a closure that evaluates the loss, got none. Use the precision 32-true or "
                "bf16-mixed rather than 16-mixed."
            )
        taken = next((int(one["step"]) for one in self.state.values() if "step" in one), 0)
        seed = (torch.initial_seed() + taken) % 2**63
        draws = torch.Generator().manual_seed(seed)
        tasks = int(torch.randint(1, self.settings.tasks + 1, (), generator=draws))
        which = int(torch.randint(len(self.settings.coefficients), (), generator=draws))
        factor = tasks * self.settings.coefficients[which] - 1
        trained = [one for group in self.param_groups for one in group["params"] if one.requires_grad]
        generators: dict[torch.device, torch.Generator] = {}
        with self._elsewhere(trained):
            for one in trained:
                if one.device not in generators:
                    generators[one.device] = torch.Generator(one.device).manual_seed(seed)
                up, down = (torch.empty_like(one).exponential_(generator=generators[one.device]) for _ in range(2))
                one.add_((up - down) * self.settings.scale + self.settings.location, alpha=factor)
            with torch.enable_grad():
                loss = closure()
        self.optimizer.step()
        return loss
