"""Averages that weigh parameters by what a little data says about them: diagonal Fisher information and RegMean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import StructureMismatchError, first_few
from lit_merge.files.lazy import Computed
from lit_merge.transforms.base import Transform
from lit_merge.transforms.reduce import per_task, per_task_values
from lit_merge.vectors import LazyTensors, TaskVector, TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import sum_rows
from lit_merge.vectors.statistics import StatisticsFiles, open_statistics

__all__ = ["FisherMean", "RegMean", "Regression", "check_grams", "gram_key", "per_parameter"]


@dataclass(frozen=True)
class FisherMean(Transform):
    r"""The mean of the task vectors, every element weighted by its Fisher information: from T vectors to one.

    .. math:: \tau = \frac{\sum_t \lambda_t F_t \tau_t}{\sum_t \lambda_t F_t} \text{ entrywise}

    Fisher merging (Matena and Raffel 2022, section 2). The fractions ``λ_t F_t / Σ λ_t F_t`` of an element sum to 1, so
    that for ``θ_t = θ0 + τ_t`` their ``Σ λ_t F_t θ_t / Σ λ_t F_t`` is ``θ0 + τ``: θ0 need not be known.

    The Fisher information of one task may be larger than another's by orders of magnitude. As the authors' program
    does, each F_t is divided by its Euclidean norm; here it is its root mean square, the same but for a factor that
    all tasks share, so that ``floor`` means a fraction of a task's typical value. Their program applies the floor to
    the values as they are, and in its default setting to the first model's only, whose parameter stays where no model
    has any information.

    Args:
        statistics: task -> file of its Fisher information, from ``lit-merge statistics --kind fisher``.
        coefficients: λ_t, at least 0, by task or in the order of the vectors; None for the same for all. The paper
            searches over them.
        floor: smallest Fisher information, at least 0: where all tasks are below it their plain mean is taken, if
            their coefficients are the same.
        normalise: by what each F_t is divided: ``norm``, its root mean square over all elements; ``mean``, their mean;
            None for nothing.

    Raises:
        ConfigurationError: a field is out of range; on application, a task has no file.
        FileFormatError: on application, a file is missing, damaged, or no Fisher information.
        StructureMismatchError: on application, a file is of another task, base model or architecture.
    """

    statistics: Mapping[str, str]
    coefficients: Mapping[str, float] | Sequence[float] | None = None
    floor: float = 1e-6
    normalise: Literal["norm", "mean"] | None = "norm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", StatisticsFiles(self.statistics, "FisherMean.statistics"))
        if self.coefficients is not None:
            object.__setattr__(self, "coefficients", per_task("FisherMean.coefficients", self.coefficients, 0.0))
        self._number("floor", minimum=0.0)
        if self.normalise is not None:
            self._choice("normalise", ("norm", "mean"))

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        given = 1.0 if self.coefficients is None else self.coefficients
        coefficients = per_task_values("FisherMean.coefficients", given, vectors.tasks)
        files = open_statistics("fisher", self.statistics, vectors, "FisherMean.statistics")
        fishers = TaskVectors([per_parameter("Fisher information", file, vectors) for file in files])
        scales = Statistic("FisherMean: scale of each task", 1, partial(_scales, self.normalise, fishers))
        function = partial(_fisher_mean, coefficients, self.floor, scales)
        return vectors.reduce_elements(function, note=self, others=[fishers], statistics=[scales])


@dataclass(frozen=True)
class RegMean(Transform):
    r"""The weights that best reproduce what the linear layers of all tasks do to their inputs: from T vectors to one.

    .. math:: W = \Big(\sum_t \tilde G_t\Big)^{-1} \sum_t \tilde G_t W_t, \qquad G_t = X_t^\top X_t / n_t

    RegMean (Jin et al. 2023, section 3): if nothing is damped, of all W it has the smallest
    ``Σ_t ‖X_t W − X_t W_t‖² / n_t``. G̃_t is G_t with its off-diagonal elements multiplied by ``off_diagonal``. For
    ``W_t = W0 + τ_t`` the result is W0 plus the same formula of τ_t, as ``(Σ G̃_t)⁻¹ Σ G̃_t W0 = W0``. (W is
    ``[in, out]`` here; torch's is its transpose.)

    The paper's G_t is the sum ``X_tᵀ X_t``; as in the authors' program, this one is the mean over the n_t rows that a
    layer saw, so that a task does not weigh more because it has more images. Parameters of which there are no Gram
    matrices (biases, embeddings, normalisations) take their plain mean.

    Where all inputs of a layer are zero, or linearly dependent, many W are equally good (with ``off_diagonal`` below 1
    only the former can happen). Then the one nearest to the plain mean is taken, each input measured in units of its
    root mean square. Solved in float64.

    Args:
        statistics: task -> file of its Gram matrices, from ``lit-merge statistics --kind gram``.
        off_diagonal: factor α of the off-diagonal elements, in [0, 1]; the paper takes 0.9 for most models, and 0.1
            for T5-base.

    Raises:
        ConfigurationError: a field is out of range; on application, a task has no file.
        FileFormatError: on application, a file is missing, damaged, or holds no Gram matrices.
        StructureMismatchError: on application, a file is of another task, base model or architecture.
    """

    statistics: Mapping[str, str]
    off_diagonal: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", StatisticsFiles(self.statistics, "RegMean.statistics"))
        self._number("off_diagonal", minimum=0.0, maximum=1.0)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        files = open_statistics("gram", self.statistics, vectors, "RegMean.statistics")
        for file in files:
            check_grams(file, files[0], vectors)
        function = partial(_regression_mean, files, self.off_diagonal)
        return vectors.map(function, [vectors.merged_tasks], note=self)


def per_parameter(what: str, file: LazyTensors, vectors: TaskVectors) -> TaskVector:
    """A task's statistics of the vectors' parameters, such as its Fisher information, to be read beside the stacks.

    Raises:
        StructureMismatchError: the file lacks a parameter, or has one in another shape.
    """
    missing = [name for name in vectors if name not in file]
    if missing:
        raise StructureMismatchError(
            f"{file.path}: expected the {what} of every parameter, got nothing for {len(missing)} "
            f"({first_few(missing)}). Collect it from the model that was fine-tuned."
        )
    for name in vectors:
        if file.shape(name) != vectors.shape(name)[1:]:
            raise _other_shape(file, name, vectors.shape(name)[1:])
    structure = {name: (file.shape(name), file.dtype(name)) for name in vectors}
    return TaskVector(Computed(structure, file.__getitem__), f"{what} of {file.metadata['task']}")


def _scales(normalise: str | None, fishers: TaskVectors) -> Tensor:
    """What each task's values are divided by, float64 ``(T, 1)``."""
    scales = torch.ones(len(fishers.tasks), 1, dtype=torch.float64)
    if normalise is None:
        return scales
    power = 2 if normalise == "norm" else 1
    total, count = torch.zeros_like(scales), 0
    for name in fishers:
        for _, chunk in fishers.chunks(name):
            total += chunk.double().pow_(power).sum(1, keepdim=True)
            count += chunk.shape[1]
    means = (total / max(count, 1)) ** (1 / power)
    return torch.where(means > 0, means, scales)


def _fisher_mean(
    coefficients: tuple[float, ...],
    floor: float,
    scales: Statistic[Tensor],
    name: str,
    start: int,
    chunk: Tensor,
    fisher: Tensor,
) -> Tensor:
    weights = (fisher.to(chunk.device).double() / scales().to(chunk.device)).clamp_(min=floor)
    weights.mul_(weights.new_tensor(coefficients).unsqueeze(1))
    total = sum_rows(weights.clone())
    fractions = torch.where(total > 0, weights / total, 1 / len(chunk))
    return sum_rows(chunk.mul_(fractions))


def gram_key(name: str, file: LazyTensors) -> str | None:
    """Under what name a parameter's Gram matrix is in a file."""
    return next((key for key in (name, f"{name}.T") if key in file), None)


def check_grams(file: LazyTensors, first: LazyTensors, vectors: TaskVectors) -> None:
    """Check that a file holds Gram matrices of the vectors' parameters, for the same ones as the first task's file.

    A file of the vectors' own base model may have those of other layers as well: of these no vector has a change.

    Raises:
        StructureMismatchError: it does not.
    """
    names, own = ({key for name in some for key in (name, f"{name}.T")} for some in (vectors.model_names, vectors))
    same_base = bool(vectors.base_fingerprint) and file.metadata.get("base_fingerprint") == vectors.base_fingerprint
    unknown = [] if same_base else [key for key in file if key not in names]
    other = sorted((set(file) ^ set(first)) & own)
    if unknown or other:
        expected = "those of the vectors' parameters" if unknown else f"the same as in {first.path}"
        raise StructureMismatchError(
            f"{file.path}: expected Gram matrices, {expected}, got others ({first_few(unknown or other)}). "
            "Collect them in the same way from models of one architecture, and of one base that vectors and files name."
        )
    for name in vectors:
        key = gram_key(name, file)
        shape = vectors.shape(name)[1:]
        if key is None:
            continue
        if len(shape) < 2 or (f"{name}.T" in file and (key == name or len(shape) > 2)):
            raise StructureMismatchError(
                f"{file.path}: expected one Gram matrix for a weight of at least two dimensions, got "
                f"{first_few(one for one in (name, f'{name}.T') if one in file)} for {name} {tuple(shape)}. "
                "Remove what does not fit, or collect again."
            )
        width = shape[0] if key != name else math.prod(shape[1:])
        if tuple(file.shape(key)) != (width, width):
            raise _other_shape(file, key, (width, width))


def _other_shape(file: LazyTensors, name: str, expected: Sequence[int]) -> StructureMismatchError:
    return StructureMismatchError(
        f"{file.path}: expected the shape {tuple(expected)} for {name}, got {tuple(file.shape(name))}. "
        "Collect it from a model of the architecture that was fine-tuned."
    )


def _regression_mean(files: Sequence[LazyTensors], off_diagonal: float, name: str, stack: Tensor) -> Tensor:
    key = gram_key(name, files[0])
    mean = sum_rows(stack.clone()).div_(len(stack))
    if key is None:
        return mean
    rows = stack.mT if key != name else stack.flatten(2)  # (T, out, in)
    regression = Regression((mean.mT if key != name else mean.flatten(2))[0], off_diagonal)
    for file, row in zip(files, rows, strict=True):
        regression.add(file[key].to(stack.device, torch.float64), row)
    departure = regression.departure(max(torch.finfo(file.dtype(key)).eps for file in files))
    departure = departure.mT if key != name else departure
    return mean + departure.reshape(mean.shape).to(mean.dtype)


class Regression:
    """RegMean of one weight, with Gram matrices one task after the other; two matrices are kept, whatever T.

    Args:
        centre: where what the inputs do not determine stays, ``[out, in]``.
        off_diagonal: factor of the off-diagonal elements of the Gram matrices.
    """

    def __init__(self, centre: Tensor, off_diagonal: float) -> None:
        self._centre, self._off_diagonal = centre.double(), off_diagonal
        rows, width = centre.shape
        self._total = torch.zeros(width, width, dtype=torch.float64, device=centre.device)
        self._weighted = torch.zeros(width, rows, dtype=torch.float64, device=centre.device)

    def add(self, gram: Tensor, row: Tensor) -> None:
        """Add a task's ``G_t`` ``[in, in]``, float64, which is changed, and its weight ``[out, in]``."""
        diagonal = gram.diagonal().clone()
        gram = gram.mul_(self._off_diagonal)
        gram.diagonal().copy_(diagonal)
        self._total += gram
        self._weighted += gram @ (row - self._centre).mT

    def departure(self, rounding: float) -> Tensor:
        """The merged weight without the centre, ``[out, in]``, float64.

        Args:
            rounding: by how much an element of a Gram matrix may be wrong, relative to its diagonal.
        """
        return _solve(self._total, self._weighted, rounding).mT


def _solve(gram: Tensor, right: Tensor, rounding: float) -> Tensor:
    """The X with ``gram X = right``, ``(in, out)``, for a positive semi-definite ``gram``, ``(in, in)``.

    Of several the one with the smallest ``Σ_i gram_ii ‖X_i‖²``. On the scaled system, with a diagonal of ones, elements
    were rounded by at most ``rounding`` when they were stored; eigenvalues that this may have made are taken as 0.
    """
    width = len(gram)
    inverse = gram.diagonal().clamp(min=0).rsqrt()
    inverse = inverse.masked_fill(inverse.isinf(), 0).unsqueeze(1)  # of inputs that are always zero
    scaled = inverse * gram * inverse.mT
    scaled.fill_diagonal_(1)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    smallest = factor.diagonal().min() if width else factor.new_ones(())
    if not bool(failed) and float(smallest) ** 2 > width * rounding:
        return inverse * torch.cholesky_solve(inverse * right, factor)
    pseudo = torch.linalg.pinv(scaled, atol=width * rounding, rtol=0.0, hermitian=True)
    return inverse * (pseudo @ (inverse * right))
