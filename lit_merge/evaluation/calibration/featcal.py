"""FeatCal: the weights that bring a merged model's features near the individual models', anchored at the merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.calibration.inputs import BlockInputs, row_parts
from lit_merge.evaluation.calibration.settings import Calibration
from lit_merge.params import Params
from lit_merge.transforms.base import finite_number
from lit_merge.vectors.statistics import bias_of

if TYPE_CHECKING:
    from lit_merge.evaluation.calibration.walk import Walk

__all__ = ["FeatCal"]

_SMALLEST = 1e-8  # of norms and pivots, after the matrices were scaled to norm 1


@dataclass(frozen=True)
class FeatCal(Calibration):
    r"""Feature calibration of a merge, in closed form (Gu et al. 2026, FeatCal, section 4).

    Of every linear layer, with X_s what the merged model gives it and X_e what the task's own model gives it, on the
    same inputs of task t, ``X = (1 − α) X_s + α X_e``, rows n and ``s_t = 1 / ‖X_sᵀX_s / n‖``:

    .. math::

        W = \Big(\sum_t s_t \tfrac{X_s^\top X_s}{n} + \lambda I\Big)^{-1}
            \Big(\sum_t s_t \tfrac{X_s^\top X}{n} W_t + \lambda A\Big), \qquad
        b = \frac{\sum_t s_t (b_t + W_t^\top \bar x - W^\top \bar x_s) + \lambda a}{\sum_t s_t + \lambda}

    with the anchors ``A = W_0 + ρ τ`` and ``a`` alike, τ being the merge that it starts from. Scale and shift of a
    normalisation are the ones with the smallest ``Σ_t E ‖γ z + β − γ_t z − β_t‖²`` of normalised inputs z, plus λ times
    the distance from their anchors. Blocks are calibrated in forward order; what is outside of them stays as the start
    has it, as do parameters that are neither.

    In the last block tokens that the features do not depend on weigh little, but for keys and values: the authors'
    program has this of all tokens but the class token of a CLIP, here it is found out by the gradient of the features.
    Defaults are the paper's; the program that they published takes 2.2 for ρ and 0.25 for α.

    Args:
        images: as for :class:`Calibration`, like the next four.
        split: whose inputs.
        batch_size: inputs at a time.
        seed: of the choice.
        memory: GiB of activations in memory.
        ridge: λ, above 0.
        anchor: ρ: 0 for the base, 1 for the merge, more for what lies behind it.
        interpolation: α, in [0, 1].
        unused_tokens: the weight of such tokens, in (0, 1]; 1 for no difference.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    ridge: float = 0.05
    anchor: float = 2.0
    interpolation: float = 0.3
    unused_tokens: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_number("FeatCal.anchor", self.anchor)
        finite_number("FeatCal.interpolation", self.interpolation, minimum=0.0, maximum=1.0)
        for name, most in (("ridge", None), ("unused_tokens", 1.0)):
            if not finite_number(f"FeatCal.{name}", value := getattr(self, name), minimum=0.0, maximum=most):
                raise ConfigurationError(f"FeatCal.{name}: expected a number above 0, got {value!r}.")

    def block(self, walk: Walk, index: int) -> Params:
        """Least squares of every linear layer and every normalisation, with sums over the tasks one after the other."""
        start = walk.start(index)
        linear: dict[str, _Linear] = {}
        normal: dict[str, _Normal] = {}
        for task in walk.tasks:
            self._task(walk, index, task, start, linear, normal)
        base = {name: value.double() for name, value in walk.base(index).items()}
        anchors = {name: base[name] + self.anchor * tau.double() for name, tau in start.items()}
        solved: Params = {}
        for name, one in normal.items():
            bias = bias_of(name)
            solved |= one.solved(name, bias if bias in start else None, anchors, self.ridge)
        for key, layer in linear.items():
            solved |= layer.solved(key, anchors, self.ridge)
        return {name: (value - base[name]).to(start[name].dtype) for name, value in solved.items()}

    def _task(
        self,
        walk: Walk,
        index: int,
        task: str,
        start: Params,
        linear: dict[str, _Linear],
        normal: dict[str, _Normal],
    ) -> None:
        """Add a task to the sums, and record what its own model's block gives."""
        expert = walk.expert(index, task)
        base = walk.base(index)
        weights = {name: base[name].double() + tau.double() for name, tau in expert.items()}
        moments: dict[tuple[str, int], _Moments] = {}
        of_merged, of_expert = walk.merged_weights(index, start), walk.expert_weights(index, task, expert)
        for number in walk.batches(task):
            with walk.placed(index, of_merged) as merged:
                output = walk.run(index, task, number, merged)
            with walk.placed(index, of_expert) as own:
                walk.record(index, task, number, walk.run(index, task, number, own, own=True), own=True)
            tokens = walk.token_weights(index, task, number, output, self.unused_tokens)
            for key, rows in merged.linear.items():
                name = key.removesuffix(".T")
                if name not in weights:
                    continue
                others = _same_rows(own, key, rows, walk.blocks.paths[index])
                given = walk.in_rows(tokens, key in merged.tokens_first, len(rows))
                size = weights[name].shape[1 if key.endswith(".T") else 0]
                for place, (_, matters) in enumerate(row_parts(key, size)):
                    target = torch.lerp(rows, others, self.interpolation)
                    moments.setdefault((key, place), _Moments()).add(rows, target, given if matters else None)
            for name, rows in merged.normal.items():
                if name in weights:
                    given = walk.in_rows(tokens, False, len(rows))
                    normal.setdefault(name, _Normal()).add(rows, given)
        for key in dict.fromkeys(key for key, _ in moments):
            linear.setdefault(key, _Linear()).add(key, [one for (of, _), one in moments.items() if of == key], weights)
        for name, one in normal.items():
            one.finish(weights[name], weights.get(bias_of(name)))


@dataclass
class _Moments:
    """Means over the rows of one task: of x_s, of x, and of their products."""

    weight: float = 0.0
    sums: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor, target: Tensor, weights: Tensor | None) -> None:
        """Add rows ``[R, in]`` with weights ``[R, 1]``."""
        weighed = rows if weights is None else rows * weights.to(rows.dtype)
        found = [
            (rows.mT @ weighed).double(),
            (weighed.mT @ target).double(),
            weighed.sum(0).double(),
            (target if weights is None else target * weights.to(rows.dtype)).sum(0).double(),
        ]
        self.sums = [one + other for one, other in zip(self.sums, found, strict=True)] if self.sums else found
        self.weight += len(rows) if weights is None else float(weights.sum())

    def means(self) -> list[Tensor]:
        """``X_sᵀX_s / n``, ``X_sᵀX / n`` and the means of x_s and x, float64."""
        return [one / self.weight for one in self.sums]


class _Linear:
    """One linear layer's sums over the tasks, of each of the parts of its rows."""

    def __init__(self) -> None:
        self._sums: list[list[Tensor]] = []

    def add(self, key: str, parts: list[_Moments], weights: Mapping[str, Tensor]) -> None:
        """Add a task's means and its weight and bias, float64."""
        weight, bias = _own(key, weights)
        found = []
        for (rows, _), one in zip(row_parts(key, len(weight)), parts, strict=True):
            gram, cross, mean, target = one.means()
            scale = 1 / gram.norm().clamp(min=_SMALLEST)
            shift = weight[rows] @ target + (0 if bias is None else bias[rows])
            found.append([scale * gram, scale * cross @ weight[rows].mT, scale, scale * mean, scale * shift])
        if not self._sums:
            self._sums = found
            return
        for known, new in zip(self._sums, found, strict=True):
            for total, part in zip(known, new, strict=True):
                total += part

    def solved(self, key: str, anchors: Mapping[str, Tensor], ridge: float) -> Params:
        """Weight, and bias if it has one."""
        weight, bias = _own(key, anchors)
        weights, biases = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        for (rows, _), (gram, right, scale, mean, shift) in zip(row_parts(key, len(weight)), self._sums, strict=True):
            system = gram + (ridge + _SMALLEST) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            factor = torch.linalg.cholesky(system)
            weights[rows] = torch.cholesky_solve(right + ridge * weight[rows].mT, factor).mT
            if biases is not None and bias is not None:
                biases[rows] = (shift - weights[rows] @ mean + ridge * bias[rows]) / (scale + ridge)
        found = {key.removesuffix(".T"): weights.mT if key.endswith(".T") else weights}
        return found if biases is None else {**found, bias_of(key): biases}


class _Normal:
    """One normalisation's sums over the tasks: of E z² and E z, and of their products with scale and shift."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._weight = 0.0
        self._sums: list[Tensor] = []

    def add(self, rows: Tensor, weights: Tensor | None) -> None:
        """Add normalised rows ``[R, d]`` of the present task, with weights ``[R, 1]``."""
        rows = rows.double()
        weighed = rows if weights is None else rows * weights
        found = [(weighed * rows).sum(0), weighed.sum(0)]
        self._rows = [one + other for one, other in zip(self._rows, found, strict=True)] if self._rows else found
        self._weight += len(rows) if weights is None else float(weights.sum())

    def finish(self, scale: Tensor, shift: Tensor | None) -> None:
        """Add the present task's scale and shift, float64."""
        energy, mean = (one / self._weight for one in self._rows)
        shift = torch.zeros_like(scale) if shift is None else shift
        found = [energy, mean, energy * scale + mean * shift, mean * scale + shift, torch.ones_like(scale)]
        self._sums = [one + other for one, other in zip(self._sums, found, strict=True)] if self._sums else found
        self._rows, self._weight = [], 0.0

    def solved(self, name: str, bias: str | None, anchors: Mapping[str, Tensor], ridge: float) -> Params:
        """Scale, and shift if there is one."""
        energy, mean, right, below, count = self._sums
        energy, right = energy + ridge, right + ridge * anchors[name]
        if bias is None:
            return {name: right / energy}
        count, below = count + ridge, below + ridge * anchors[bias]
        determinant = (energy * count - mean**2).clamp(min=_SMALLEST)
        scale = (count * right - mean * below) / determinant
        return {name: scale, bias: (energy * below - mean * right) / determinant}


def _own(key: str, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """A layer's weight ``[out, in]`` and bias."""
    weight = values[key.removesuffix(".T")]
    bias = values.get(bias_of(key))
    return (weight.mT if key.endswith(".T") else weight), bias


def _same_rows(own: BlockInputs, key: str, rows: Tensor, path: str) -> Tensor:
    others = own.linear.get(key)
    if others is None or others.shape != rows.shape:
        got = "none" if others is None else f"{len(others):,}"
        raise ConfigurationError(
            f"FeatCal: expected as many rows of input in the merged and in the individual model, got {len(rows):,} and "
            f"{got} for {path}.{key}. Calibrate by RegMeanPlusPlus, which needs those of one model."
        )
    return others
