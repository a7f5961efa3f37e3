"""A module whose model is θ0 + α τ for a while, again and again; θ0 itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lit_merge.models.merged import swapped
from lit_merge.vectors import TaskVector

if TYPE_CHECKING:
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["PlacedModel"]


class PlacedModel:
    """Evaluates merged models by one module without loading anything into it.

    Its network's own parameters stay θ0, so that a merge may read them at the same time.

    Args:
        module: at θ0, on its device; its encoder, or the encoder's tangent at θ0, is what is evaluated.
    """

    def __init__(self, module: MultiTaskModule) -> None:
        self.module = module

    def check(self, vector: TaskVector | None) -> None:
        """Refuse a vector of another base.

        Raises:
            StructureMismatchError: it is one.
        """
        if vector is not None:
            self.module.check_vector(vector)

    @contextmanager
    def at(self, vector: TaskVector | None, coefficient: float = 1.0) -> Iterator[None]:
        """For a while the model is θ0 + coefficient · τ; θ0 for None.

        Raises:
            StructureMismatchError: the vector belongs to another base, or its names or shapes differ.
        """
        self.check(vector)
        module = self.module
        if module.linearized:
            if vector is None:
                module.load_parameters(module.initial_parameters)
            else:
                module.load_task_vector(vector, coefficient)
            yield
        elif vector is None:
            yield
        else:
            own = dict(module.network.named_parameters())
            sums = vector.apply_to(module.initial_parameters, coefficient)
            with swapped(module.network, {name: value.to(own[name]) for name, value in sums.items()}):
                yield
