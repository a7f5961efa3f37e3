"""Mean absolute gradients of a task's loss, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from lit_merge.evaluation.statistics.fisher import mean_over_examples
from lit_merge.params import Params, check_finite

__all__ = ["collect_gradients"]


def collect_gradients(
    module: nn.Module,
    loader: Iterable[Any],
    head: nn.Module | None = None,
    labels: Literal["expected", "sampled", "true"] = "true",
    seed: int = 0,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
) -> Params:
    r"""``(1/N) Σ_n |∇_θ log p(y_n|x_n)|`` of every parameter, which the trust region asks for at θ0 (Sun et al. 2025).

    Every gradient is that of a single image. Modes, frozen parameters and processes are as for
    :func:`~lit_merge.evaluation.statistics.collect_fisher`.

    Args:
        module: images ``[B, …]`` -> features, or logits ``[B, C]`` if there is no head; its parameters are θ0.
        loader: gives :class:`lit_merge.data.Batch`, pairs ``(images, labels)``, or images alone.
        head: features -> logits ``[B, C]``; its own parameters are not looked at.
        labels: ``true`` takes the images' labels, as the paper does; ``expected`` is the mean over the classes, weighed
            by their probability, and ``sampled`` draws one, so that no labels are read.
        seed: of the drawing.
        inputs: the module's arguments of a batch; by default its ``inputs``.

    Returns:
        Name -> tensor of the parameter's shape, float32, or float64 for a float64 parameter, on the CPU.

    Raises:
        ConfigurationError: there is no such choice of labels, or the output is no logits.
        DataError: there is no image, or one without a label where labels are asked for.
        NonFiniteError: a value is NaN or infinite.
    """
    gradients = mean_over_examples(_add_magnitude, module, loader, head, labels, seed, inputs)
    check_finite(gradients, "mean absolute gradients")
    return gradients


def _add_magnitude(total: Tensor, gradient: Tensor, weight: float) -> None:
    total.add_(gradient.abs_(), alpha=weight)
