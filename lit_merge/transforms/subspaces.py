"""Merging in the space that the task vectors of each matrix span: KnOTS and Core Space, under any rule.

Vectors of low rank, such as those of LoRA adapters, live in a small common space; a rule that looks at elements (signs,
magnitudes) finds the tasks better aligned in coordinates of that space than in the weights'. A part here brings every
matrix to these coordinates, applies another transform to them, and brings the result back. For rules that are linear
(sums, means, fixed coefficients) that changes nothing but rounding.

Singular values below ``eps · ‖[τ_1 … τ_T]‖_F`` are rounding of the elements: they count as zero, and their directions
are left out. Coordinates are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_merge.files.lazy import Computed
from lit_merge.params import is_finite
from lit_merge.transforms.base import Transform, check_transform
from lit_merge.transforms.matrices import check_pattern, decomposed, decomposition, is_matrix, work_of_matrices
from lit_merge.transforms.reduce import Sum
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.global_value import Statistic
from lit_merge.vectors.sources import Work

__all__ = ["CoreSpace", "KnOTS"]

Bases = tuple[Tensor, Tensor | None]
"""Orthonormal columns ``(m, k)`` for the outputs, and ``(n, k')`` for the inputs or None; in float64."""

BasesOf = Callable[[Tensor, float], Bases]
WorkOf = Callable[[int, int, int, int], Work]
_DOUBLE = torch.float64.itemsize


@dataclass(frozen=True)
class KnOTS(Transform):
    """Merges the tasks' right factors of a common singular value decomposition.

    KnOTS (Stoica et al. 2024): of every weight matrix ``[τ_1 … τ_T] = U S [V_1ᵀ … V_Tᵀ]``, and the merged weight is U
    times what ``merge`` makes of the ``S V_tᵀ``, as in the authors' program, of all matrices together. Other
    parameters go through ``merge`` as they are.

    Args:
        merge: any transform; one that reduces gives one vector.
        exclude: a regular expression; matrices in whose names it is found go through ``merge`` as they are.

    Raises:
        ConfigurationError: ``merge`` is no transform, or ``exclude`` no regular expression; on access, a decomposition
            fails.

    Examples:
        >>> from lit_merge.transforms import ties
        >>> KnOTS(ties(0.2, scope="tensor"))
        KnOTS(merge=chain(Trim(density=0.2, scope='tensor'), ElectSign(), DisjointMean(), Scale(coefficient=1.0)), exclude=None)
    """  # noqa: E501 - an output is one line

    merge: Transform = Sum()  # noqa: RUF009 - frozen, so it can be shared
    exclude: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """From stacks ``(T, *shape)`` to what ``merge`` makes of them in the shared space, ``(T', *shape)``."""
        return _within(self, _output_bases, _knots_work, vectors)


@dataclass(frozen=True)
class CoreSpace(Transform):
    """Merges the small matrices that the tasks' vectors are in common bases of their outputs and inputs.

    Core Space (Panariello et al. 2025): with ``τ_t = B_t A_t``, the bases are the left singular vectors U of
    [B_1 … B_T] and the right ones V of [A_1; …; A_T], the cores ``Uᵀ τ_t V``, and the merged weight is U times what
    ``merge`` makes of the cores times Vᵀ. Ranks may differ from task to task and from matrix to matrix, and their sum
    may exceed m or n. Other parameters go through ``merge`` as they are.

    A task vector does not keep the factors that it was trained with. Here they are ``B_t = U_t S_t^½`` and
    ``A_t = S_t^½ V_tᵀ`` of ``τ_t = U_t S_t V_tᵀ``, which span the same spaces. Another choice rotates the bases, which
    linear rules and those of singular values (TSV-M, Iso-C) do not see.

    Args:
        merge: any transform; one that reduces gives one vector.
        exclude: a regular expression; matrices in whose names it is found go through ``merge`` as they are.

    Raises:
        ConfigurationError: ``merge`` is no transform, or ``exclude`` no regular expression; on access, a decomposition
            fails.
    """

    merge: Transform = Sum()  # noqa: RUF009 - frozen, so it can be shared
    exclude: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """From stacks ``(T, *shape)`` to what ``merge`` makes of them in the shared space, ``(T', *shape)``."""
        return _within(self, _core_bases, _core_work, vectors)


def _check(transform: KnOTS | CoreSpace) -> None:
    check_transform(f"{type(transform).__name__}.merge", transform.merge)
    check_pattern(transform, transform.exclude)


def _output_bases(stack: Tensor, floor: float) -> Bases:
    """U of the vectors side by side; of a stack ``(T, m, n)`` and what counts as zero."""
    # [τ_1 … τ_T] has the left singular vectors and values of [U_1 S_1 … U_T S_T], which for low ranks is narrow.
    parts = [left * values for left, values, _ in _triplets(stack, floor)]
    return _left_vectors(torch.cat(parts, 1), floor), None


def _core_bases(stack: Tensor, floor: float) -> Bases:
    """U of [B_1 … B_T] and V of [A_1; …; A_T]; of a stack ``(T, m, n)`` and what counts as zero."""
    parts = [(left * values.sqrt(), right.mT * values.sqrt()) for left, values, right in _triplets(stack, floor)]
    outputs, inputs = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    return _left_vectors(outputs, 0.0), _left_vectors(inputs, 0.0)


def _triplets(stack: Tensor, floor: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The singular triplets of one matrix after the other, in float64, whose values are above the floor."""
    for matrix in stack:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        kept = int((_finite(values) > floor).sum())
        yield left[:, :kept].clone(), values[:kept], right[:kept].clone()


def _left_vectors(matrix: Tensor, floor: float) -> Tensor:
    """The left singular vectors of ``(m, n)`` whose values are above the floor and above rounding; ``(m, k)``."""
    if matrix.shape[1] == 0:
        return matrix
    if matrix.shape[1] > matrix.shape[0]:  # its right vectors are not needed: M = Rᵀ Qᵀ has the left ones of Rᵀ
        matrix = torch.linalg.qr(matrix.mT, mode="r")[1].mT
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    own = torch.finfo(values.dtype).eps * max(matrix.shape) * float(_finite(values).amax())
    return left[:, : int((values > max(floor, own)).sum())]


def _finite(values: Tensor) -> Tensor:
    if not is_finite(values):  # some libraries do not refuse a matrix that overflowed
        raise torch.linalg.LinAlgError
    return values


def _within(transform: KnOTS | CoreSpace, bases: BasesOf, work: WorkOf, vectors: TaskVectors) -> TaskVectors:
    """Apply ``transform.merge`` in the coordinates of the bases."""
    who = type(transform).__name__
    bare = vectors.without_base(
        f"{who}.merge: expected a transform that needs no pre-trained parameters, which are not in the shared space, "
        f"got {transform.merge!r}. Use another one."
    )
    outside = transform.merge(bare)  # as many rows as inside, and as many passes
    reads = 2 * vectors.walk + sum(one.reads for one in outside.statistics if one not in vectors.statistics)
    inside = Statistic(f"{who}: shared spaces", reads, partial(_merged, transform, bases, vectors), at_most=True)
    tasks = [outside.vector(row).tasks for row in range(len(outside.tasks))]
    works = partial(work_of_matrices, transform.exclude, work)
    return vectors.map(partial(_lifted, transform, inside), tasks, note=transform, statistics=[inside], work=works)


class _Spaces:
    """The bases of all matrices: ranks of all, vectors of those that are small beside the matrices."""

    def __init__(self, transform: KnOTS | CoreSpace, bases: BasesOf, vectors: TaskVectors) -> None:
        self.transform, self.vectors = transform, vectors
        self._bases = bases
        self._kept: dict[str, Bases] = {}
        self._ranks: dict[str, torch.Size] = {}
        self.device: torch.device | None = None  # where matrices are computed
        for name in vectors:
            shape = vectors.shape(name)[1:]
            if is_matrix(transform.exclude, name, vectors.shape(name)):
                left, right = self._compute(name)
                self.device = left.device
                shape = torch.Size([left.shape[1], shape[1] if right is None else right.shape[1]])
                if 2 * max(left.shape[1], 0 if right is None else right.shape[1]) <= min(vectors.shape(name)[1:]):
                    self._kept[name] = left, right
            self._ranks[name] = shape

    def structure(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the coordinates."""
        return {name: (shape, self.vectors.dtype(name)) for name, shape in self._ranks.items()}

    def of(self, name: str) -> Bases:
        """The bases of one matrix; the same ones every time."""
        return self._kept[name] if name in self._kept else self._compute(name)

    def _compute(self, name: str) -> Bases:
        stack = self.vectors[name]
        floor = torch.finfo(stack.dtype).eps * float(torch.linalg.vector_norm(stack, dtype=torch.float64))
        return decomposed(type(self.transform).__name__, name, self._bases, stack, floor)


@dataclass(frozen=True)
class _Inside:
    """What ``merge`` made of the coordinates, and the way back."""

    spaces: _Spaces
    merged: TaskVectors


def _merged(transform: KnOTS | CoreSpace, bases: BasesOf, vectors: TaskVectors) -> _Inside:
    spaces = _Spaces(transform, bases, vectors)
    structure = spaces.structure()
    rows = []
    for index, task in enumerate(vectors.tasks):
        row = vectors.vector(index)
        known = {"base_fingerprint": vectors.base_fingerprint} if vectors.base_fingerprint else {}
        rows.append(
            TaskVector(Computed(structure, partial(_coordinates, spaces, row)), row.tasks or task, metadata=known)
        )
    inner = TaskVectors(rows, device=spaces.device, model_names=vectors.model_names)
    return _Inside(spaces, transform.merge(inner))


def _coordinates(spaces: _Spaces, row: TaskVector, name: str) -> Tensor:
    values = row[name].to(spaces.vectors.dtype(name))
    if not is_matrix(spaces.transform.exclude, name, spaces.vectors.shape(name)):
        return values
    left, right = spaces.of(name)
    inside = left.mT @ values.to(left.device, torch.float64)
    return (inside if right is None else inside @ right).to(values.dtype)


def _lifted(transform: KnOTS | CoreSpace, inside: Statistic[_Inside], name: str, stack: Tensor) -> Tensor:
    found = inside()
    merged = found.merged[name].to(stack.device)
    if not is_matrix(transform.exclude, name, stack.shape):
        return merged
    left, right = found.spaces.of(name)
    outside = left @ merged.double()
    return (outside if right is None else outside @ right.mT).to(stack.dtype)


def _side_work(tasks: int, side: int, rank: int) -> Work:
    """Of the left vectors of T matrices of a rank, side by side."""
    together = tasks * rank
    work = decomposition(side, min(side, together), _DOUBLE)
    reduction = 2.0 * side**2 * together if together > side else 0.0  # QR, Golub and Van Loan 2013, section 5.2
    return Work(work.memory + 2 * side * together * _DOUBLE, work.operations + reduction)


def _knots_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    each = [decomposition(rows, columns, _DOUBLE)] * tasks
    return Work.together([*each, _side_work(tasks, rows, min(rows, columns))])  # at most: full rank


def _core_work(tasks: int, rows: int, columns: int, itemsize: int) -> Work:
    rank = min(rows, columns)
    each = [decomposition(rows, columns, _DOUBLE)] * tasks
    work = Work.together([*each, *(_side_work(tasks, side, rank) for side in (rows, columns))])
    return Work(work.memory + tasks * (rows + columns) * rank * _DOUBLE, work.operations)
