"""ξ(α1, α2) on a grid: what a line of the grid shares is computed once per line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.evaluation.analysis.record import Record
from lit_merge.metrics.disentanglement import DisentanglementError, Form
from lit_merge.models.linear_features import LinearFeatures
from lit_merge.models.placed_weights import PlacedWeights

__all__ = ["DirectPair", "LinearPair", "ModelPair", "disentanglement_errors"]

Joint = tuple[slice, tuple[Tensor, Tensor]]
"""Columns of a row, and both tasks' features ``[B', N_t, d]`` there."""


class ModelPair(ABC):
    """Two task vectors, and N1 + N2 images of their tasks."""

    device: torch.device

    @abstractmethod
    def single(self, task: int, coefficient: float) -> Tensor:
        """Features ``[N_t, d]`` of the task's images at θ0 + α τ_t."""

    @abstractmethod
    def joint(self, first: float, second: Sequence[float]) -> Iterator[Joint]:
        """Features of both tasks' images at θ0 + α1 τ1 + α2 τ2, for one α1 and every α2."""


class DirectPair(ModelPair):
    """The network itself. A grid of A · B points takes A + B passes over one task's images and A · B over both's.

    Args:
        encode: a batch -> features ``[B, d]``, by the network whose weights are placed.
        weights: θ0 and the two vectors.
        images: of each task, batches that can be gone through again and again.
        device: where features are.
    """

    def __init__(
        self,
        encode: Callable[[Any], Tensor],
        weights: PlacedWeights,
        images: tuple[Iterable[Any], Iterable[Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        self._encode, self._weights, self._images = encode, weights, images
        self.device = torch.device(device)

    def single(self, task: int, coefficient: float) -> Tensor:
        """See :class:`ModelPair`."""
        self._weights.set((coefficient, 0.0) if task == 0 else (0.0, coefficient))
        return self._features(task)

    def joint(self, first: float, second: Sequence[float]) -> Iterator[Joint]:
        """See :class:`ModelPair`; column by column."""
        for column, coefficient in enumerate(second):
            self._weights.set((first, coefficient))
            yield slice(column, column + 1), (self._features(0)[None], self._features(1)[None])

    def _features(self, task: int) -> Tensor:
        with self._weights.in_place():
            return torch.cat([self._encode(batch) for batch in self._images[task]])


class LinearPair(ModelPair):
    """The network's tangent at θ0, from ``f0`` and ``J τ_t`` of every image: no further pass through the network.

    Args:
        features: of each task's images, with the directions ``"0"`` and ``"1"``.
        memory: bytes of features that are computed at a time.
    """

    def __init__(self, features: tuple[LinearFeatures, LinearFeatures], memory: int | None = None) -> None:
        self._features = features
        self.device = features[0].value.device
        # On a processor what stays in its cache is fast, elsewhere what is large.
        memory = memory or ((4 << 20) if self.device.type == "cpu" else (256 << 20))
        self._columns = max(1, memory // max(one.value.nbytes for one in features))

    def single(self, task: int, coefficient: float) -> Tensor:
        """See :class:`ModelPair`."""
        return self._features[task].features({str(task): coefficient})

    def joint(self, first: float, second: Sequence[float]) -> Iterator[Joint]:
        """See :class:`ModelPair`; some columns at a time."""
        starts = [one.features({"0": first}) for one in self._features]
        for begin in range(0, len(second), self._columns):
            columns = slice(begin, min(begin + self._columns, len(second)))
            factors = torch.tensor(second[columns], dtype=starts[0].dtype, device=self.device).view(-1, 1, 1)
            one, other = (
                torch.addcmul(start, factors, own.tangents["1"])
                for start, own in zip(starts, self._features, strict=True)
            )
            yield columns, (one, other)


@torch.no_grad()
def disentanglement_errors(
    pair: ModelPair,
    heads: Sequence[Callable[[Tensor], Tensor]],
    first: Sequence[float],
    second: Sequence[float],
    forms: Sequence[Form] = ("prediction",),
    done: Record | dict[str, Any] | None = None,
    ended: Callable[[], object] = lambda: None,
) -> dict[Form, Tensor]:
    """ξ at every point of a grid, see :class:`lit_merge.metrics.DisentanglementError`.

    ``f(x; θ0 + α1 τ1)`` of the first task's images is computed once per row, and ``f(x; θ0 + α2 τ2)`` of the second
    task's once per column; every form is measured on the same features. With several processes each has its own
    images, and their sums are added up after every row.

    Args:
        pair: the models and the images.
        heads: of both tasks, features ``[…, d]`` -> logits ``[…, C]``.
        first: A values of α1.
        second: B values of α2.
        forms: what is compared.
        done: row -> form -> values that are known already; a row is put there as soon as it is done.
        ended: called after every row.

    Returns:
        Form -> ξ, ``[A, B]`` in float64.
    """
    rows: Record | dict[str, Any] = {} if done is None else done
    others: dict[Form, Tensor] = {}
    for row, coefficient in enumerate(first):
        if str(row) not in rows:
            if not others:
                lines = [_outputs(pair.single(1, value), heads[1], forms) for value in second]
                others = {form: torch.stack([line[form] for line in lines]) for form in forms}
            metrics = {form: DisentanglementError([coefficient], second, form).to(pair.device) for form in forms}
            own = _outputs(pair.single(0, coefficient), heads[0], forms)
            for columns, features in pair.joint(coefficient, second):
                for task, head in enumerate(heads):
                    joint = _outputs(features[task], head, forms)
                    for form, metric in metrics.items():
                        single = own[form] if task == 0 else others[form][columns]
                        metric.update(task, 0, columns, single, joint[form])
            rows[str(row)] = {form: metric.compute().reshape(-1).tolist() for form, metric in metrics.items()}
        ended()
    return {
        form: torch.tensor([rows[str(row)][form] for row in range(len(first))], dtype=torch.float64) for form in forms
    }


def _outputs(features: Tensor, head: Callable[[Tensor], Tensor], forms: Sequence[Form]) -> dict[Form, Tensor]:
    """What is compared: logits ``[…, C]`` for predictions, else the features themselves."""
    return {form: head(features) if form == "prediction" else features for form in forms}
