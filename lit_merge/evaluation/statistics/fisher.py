"""The diagonal of the Fisher information matrix, one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, DataError
from lit_merge.evaluation.statistics.examples import examples
from lit_merge.functional.evaluation import evaluating
from lit_merge.params import Params, check_finite, working_dtype
from lit_merge.transforms.base import one_of

__all__ = ["LABELS", "collect_fisher", "mean_over_examples", "requiring_gradients"]

LABELS = ("expected", "sampled", "true")
"""Where y comes from."""


def collect_fisher(
    module: nn.Module,
    loader: Iterable[Any],
    head: nn.Module | None = None,
    labels: Literal["expected", "sampled", "true"] = "expected",
    seed: int = 0,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
) -> Params:
    r"""The diagonal Fisher information of every parameter (Matena and Raffel 2022, section 2).

    .. math:: F = \frac{1}{N} \sum_{n=1}^N \mathbb{E}_{y \sim p(y|x_n)} \big(\nabla_\theta \log p(y|x_n)\big)^2

    Every gradient is that of a single image: squares of a batch's mean gradient would be something else. Evaluation
    mode is used whatever the modules' own, parameters that are frozen are included, and nothing about the modules has
    changed afterwards. One process only; several would each collect their own images.

    Args:
        module: images ``[B, …]`` -> features, or logits ``[B, C]`` if there is no head.
        loader: gives :class:`lit_merge.data.Batch`, pairs ``(images, labels)``, or images alone.
        head: features -> logits ``[B, C]``; its own parameters are not looked at.
        labels: ``expected`` is the formula, exact over the C classes, with one backward pass for each of them;
            ``sampled`` estimates it by one y per image, drawn from the model; ``true`` takes the images' labels
            instead, the empirical Fisher. The first two read no labels.
        seed: of the drawing. Which y an image gets depends on its place in the loader, not on the batch size.
        inputs: the module's arguments of a batch; by default its ``inputs``.

    Returns:
        Name -> tensor of the parameter's shape, float32, or float64 for a float64 parameter, on the CPU. Zeros for
        what the output does not depend on.

    Raises:
        ConfigurationError: there is no such choice of labels, or the output is no logits.
        DataError: there is no image, or one without a label where labels are asked for.
        NonFiniteError: a value is NaN or infinite.
    """
    fisher = mean_over_examples(_add_square, module, loader, head, labels, seed, inputs)
    check_finite(fisher, "Fisher information")
    return fisher


def mean_over_examples(
    add: Callable[[Tensor, Tensor, float], object],
    module: nn.Module,
    loader: Iterable[Any],
    head: nn.Module | None,
    labels: str,
    seed: int,
    inputs: Callable[[Any], tuple[Any, ...]] | None,
) -> Params:
    """The mean over examples of what ``add(total, gradient, weight)`` makes of their gradients of log p(y|x).

    The weight is the probability of y among those that are looked at; the rest is as for :func:`collect_fisher`.
    """
    one_of("labels", labels, LABELS)
    parameters = {name: value for name, value in module.named_parameters() if value.is_floating_point()}
    totals = {
        name: torch.zeros_like(value, dtype=working_dtype(value.dtype), requires_grad=False)
        for name, value in parameters.items()
    }
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(module, head),
        requiring_gradients(parameters.values()),
    ):
        for given, known in examples(loader, module, inputs):
            singles = zip(*(one.split(1) for one in given), strict=True)
            for single, label in zip(singles, known.tolist(), strict=True):
                log_probabilities = _log_probabilities(module, head, single)
                chosen = _choose(log_probabilities.detach(), labels, label, generator)
                for number, (index, weight) in enumerate(chosen, start=1):
                    gradients = torch.autograd.grad(
                        log_probabilities[index],
                        list(parameters.values()),
                        retain_graph=number < len(chosen),
                        allow_unused=True,
                    )
                    for total, gradient in zip(totals.values(), gradients, strict=True):
                        if gradient is not None:
                            add(total, gradient.to(total.dtype), weight)
                count += 1
    return {name: total.div_(count).cpu() for name, total in totals.items()}


def _add_square(total: Tensor, gradient: Tensor, weight: float) -> None:
    total.addcmul_(gradient, gradient, value=weight)


def _log_probabilities(module: nn.Module, head: nn.Module | None, single: tuple[Any, ...]) -> Tensor:
    output = module(*single)
    logits = output if head is None else head(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"collect_fisher: expected logits [1, C] of one image, got {got}. Give the head that makes them."
        )
    return logits[0].to(working_dtype(logits.dtype)).log_softmax(0)


def _choose(log_probabilities: Tensor, labels: str, label: int, generator: torch.Generator) -> list[tuple[int, float]]:
    """Classes with the weights of their squared gradients."""
    probabilities = log_probabilities.cpu().double().exp()
    if labels == "expected":
        return list(enumerate(probabilities.tolist()))
    if labels == "sampled":
        return [(int(torch.multinomial(probabilities, 1, generator=generator)), 1.0)]
    if not 0 <= label < len(probabilities):
        raise DataError(
            f"labels: expected one of the {len(probabilities)} classes for every image, got {label}. "
            "Use labelled images, or labels: expected."
        )
    return [(label, 1.0)]


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters have gradients as well."""
    frozen = [value for value in parameters if not value.requires_grad]
    for value in frozen:
        value.requires_grad_(True)
    try:
        yield
    finally:
        for value in frozen:
            value.requires_grad_(False)
