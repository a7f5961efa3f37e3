"""Merging in the subspace in which a task changes the outputs of a layer, not in that of its largest weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError
from lit_merge.params import is_finite
from lit_merge.transforms.base import Transform
from lit_merge.transforms.calibration import relative_sizes
from lit_merge.transforms.magnitudes import count_of
from lit_merge.transforms.matrices import (
    check_pattern,
    decomposed,
    decomposition,
    is_matrix,
    polar,
    triplets,
    work_of_matrices,
)
from lit_merge.transforms.weighted import check_grams, gram_key
from lit_merge.vectors import LazyTensors, TaskVectors
from lit_merge.vectors.sources import Work
from lit_merge.vectors.statistics import StatisticsFiles, open_statistics

__all__ = ["ESM"]


@dataclass(frozen=True)
class ESM(Transform):
    r"""Gives every task a fraction of the output dimensions: those in which it moves the layer's outputs most.

    Essential subspace merging (Li et al. 2026, 2602.20208). On inputs X of a layer a task shifts its outputs by
    ``ΔO = X τ_tᵀ``. Their principal directions ``P_t`` are the eigenvectors of ``ΔOᵀ ΔO / n = τ_t G_t τ_tᵀ``, for which
    the Gram matrix ``G_t = XᵀX / n`` of the inputs is all that is needed: that of 32 images of any kind, from
    ``lit-merge statistics --kind gram``. The first ⌊out/T⌋ of them stay, with coordinates ``A_t = P_tᵀ τ_t``. Then,
    with ν the norm over the mean of the norms that it is compared with (polarised scaling),

    .. math:: A_t \leftarrow \nu(A_t)^2 A_t, \qquad A = [A_1; \dots; A_T], \qquad A_{\cdot j} \leftarrow
        \nu(A_{\cdot j})^2 A_{\cdot j}, \qquad \tau = \bar s_P \bar s_A\, U_P V_P^\top U_A V_A^\top

    for ``[P_1 … P_T] = U_P S_P V_Pᵀ`` and ``A = U_A S_A V_Aᵀ``. The mean singular values s̄ are the authors' program's:
    without them all layers would have the same length, and the third level of polarised scaling, ``Polarise("layers")``
    after this, nothing to compare. The program doubles the result, which belongs to the coefficient here, and scales
    by the norm of τ_t rather than of the A_t that stay.

    Matrices without a Gram matrix are merged in the same way as if their inputs were white, that is, with the left
    singular vectors of τ_t; without ``statistics`` all of them, which needs no data and is the paper's comparison with
    singular vectors. The program takes TSV-M there. Parameters that are no matrices are averaged. Computed in float64.

    Args:
        statistics: task -> file of Gram matrices; None for white inputs.
        polarised: whether tasks and input dimensions are scaled.
        weighting: exponent with which relative eigenvalues weigh the directions within a task, at least 0; the
            authors' program takes 0.15, the paper none.
        rank_fraction: fraction of the output dimensions that every task keeps, in (0, 1], at least one; by default 1/T.
        exclude: a regular expression; matrices in whose names it is found are averaged.

    Raises:
        ConfigurationError: a field is out of range, or ``exclude`` is no regular expression; on application, a task has
            no file; on access, a decomposition fails.
        FileFormatError: on application, a file is missing, damaged, or holds no Gram matrices.
        StructureMismatchError: on application, a file is of another task, base model or architecture.
    """

    statistics: Mapping[str, str] | None = None
    polarised: bool = True
    weighting: float = 0.0
    rank_fraction: float | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        if self.statistics is not None:
            object.__setattr__(self, "statistics", StatisticsFiles(self.statistics, "ESM.statistics"))
        if not isinstance(self.polarised, bool):
            raise ConfigurationError(f"ESM.polarised: expected true or false, got {self.polarised!r}.")
        self._number("weighting", minimum=0.0)
        if self.rank_fraction is not None:
            self._fraction("rank_fraction")
        check_pattern(self, self.exclude)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Reduce stacks ``(T, *shape)`` to ``(1, *shape)``."""
        files = []
        if self.statistics is not None:
            files = open_statistics("gram", self.statistics, vectors, "ESM.statistics")
            for file in files:
                check_grams(file, files[0], vectors)
        work = partial(work_of_matrices, self.exclude, _essential_work)
        return vectors.map(partial(_merged, self, files), [vectors.merged_tasks], note=self, work=work)


def _merged(transform: ESM, files: Sequence[LazyTensors], name: str, stack: Tensor) -> Tensor:
    if not is_matrix(transform.exclude, name, stack.shape):
        return stack.mean(0, keepdim=True)
    key = gram_key(name, files[0]) if files else None
    turned = key not in (None, name)  # of a weight that is used as x @ W
    merge = partial(_essential, transform, _grams(files, key, stack))
    merged = decomposed("ESM", name, merge, stack.mT if turned else stack)
    return (merged.mT if turned else merged).unsqueeze(0)


def _grams(files: Sequence[LazyTensors], key: str | None, stack: Tensor) -> Iterator[Tensor | None]:
    """Every task's Gram matrix, one at a time; None where there is none."""
    for index in range(len(stack)):
        yield None if key is None else files[index][key].to(stack.device, torch.float64)


def _essential(transform: ESM, grams: Iterable[Tensor | None], stack: Tensor) -> Tensor:
    outputs = stack.shape[1]
    share = outputs // len(stack) if transform.rank_fraction is None else count_of(transform.rank_fraction, outputs)
    bases, coordinates, norms, single = [], [], [], stack.dtype == torch.float32
    for matrix, gram in zip(stack, grams, strict=True):
        vector = matrix.double()
        values, basis = _principal_directions(vector, gram, max(share, 1), single)
        weights = values
        if len(values):
            weights = relative_sizes(values, transform.weighting)
            weights = weights / weights.mean()
        own = basis.mT @ vector
        bases.append(basis * weights)
        coordinates.append(own * weights.unsqueeze(1))
        norms.append(torch.linalg.vector_norm(own))
    if transform.polarised:
        sizes = relative_sizes(torch.stack(norms), 2.0)
        coordinates = [one * size for one, size in zip(coordinates, sizes, strict=True)]
    joined = torch.cat(coordinates)
    if transform.polarised and joined.numel():
        joined = joined * relative_sizes(torch.linalg.vector_norm(joined, dim=0), 2.0)
    return (_whitened(torch.cat(bases, 1), single) @ _whitened(joined, single)).to(stack.dtype)


def _principal_directions(vector: Tensor, gram: Tensor | None, most: int, single: bool) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of ``τ G τᵀ``, ``(k,)``, none of them zero, and their eigenvectors ``(out, k)``."""
    rows, columns = vector.shape
    if gram is None or rows > columns:  # of the smaller of both orders
        left, values, _ = triplets(vector if gram is None else vector @ _root(gram), most, single=single)
        return values**2, left
    values, vectors = _eigenvectors(vector @ gram @ vector.mT)
    kept = min(most, int((values > torch.finfo(values.dtype).eps * rows * values[-1]).sum()))
    return values.flip(0)[:kept], vectors.flip(1)[:, :kept]


def _root(gram: Tensor) -> Tensor:
    """A matrix whose product with its transpose is the Gram matrix; eigenvalues that may be rounding count as zero."""
    values, vectors = _eigenvectors(gram)
    kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    if not is_finite(values):
        raise torch.linalg.LinAlgError
    return values, vectors


def _whitened(matrix: Tensor, single: bool) -> Tensor:
    """The nearest orthogonal matrix times the mean of the singular values that are not zero."""
    factor, values = polar(matrix, single)
    return factor * values.mean() if len(values) else torch.zeros_like(matrix)


def _essential_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    """Per task a product with G and the decomposition of the shift; then of all directions and coordinates together."""
    matrix, small = rows * columns, min(rows, columns)
    shift = Work(8 * (2 * columns**2 + 2 * matrix + 4 * small**2), 2.0 * matrix * (columns + small) + 9.0 * small**3)
    parts = [shift, decomposition(rows, columns, 8)] if rows > columns else [shift]
    parts = [*parts * tasks, decomposition(rows, rows, 8), decomposition(rows, columns, 8)]
    work = Work.together([*parts, Work(0, 4.0 * matrix * rows)])
    return Work(work.memory + 8 * (columns**2 + 3 * (rows**2 + matrix)), work.operations)
