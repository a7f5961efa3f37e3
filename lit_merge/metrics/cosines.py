"""Cosines between task vectors, and their norms, of the whole network and by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.metrics.depth import DepthMetric, with_whole
from lit_merge.vectors import TaskVectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CosineMatrix", "NormByDepth", "cosines", "pairwise_products"]


def pairwise_products(stack: Tensor) -> Tensor:
    """All inner products ``⟨τ_s, τ_t⟩`` of a stack, by one matrix product in float64.

    Args:
        stack: ``(T, *shape)``, e.g. one parameter of T task vectors, or a chunk of it.

    Returns:
        float64 ``(T, T)``. Those of two parts of a parameter add up to those of the whole.
    """
    rows = stack.reshape(len(stack), -1).double()
    return rows @ rows.T


def cosines(products: Tensor) -> Tensor:
    """``⟨τ_s, τ_t⟩ / (‖τ_s‖ ‖τ_t‖)`` from the inner products; 0 where a vector is zero.

    Args:
        products: ``(…, T, T)``, from :func:`pairwise_products`.

    Returns:
        ``(…, T, T)`` in [-1, 1].

    Examples:
        >>> import torch
        >>> cosines(torch.tensor([[4.0, 3.0], [3.0, 9.0]])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return torch.where(lengths > 0, products / lengths, torch.zeros_like(products)).clamp(-1, 1)


class CosineMatrix(DepthMetric):
    """Cosine of every pair of T task vectors, of the whole vectors and of every block (Ilharco et al. 2023, figure 5).

    Args:
        tasks: the T tasks.
        blocks: number of the network's blocks.
        **settings: of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lit_merge.vectors import TaskVector, TaskVectors
        >>> one, other = (TaskVector({"w": torch.tensor(values)}) for values in ([3.0, 4.0], [4.0, 3.0]))
        >>> metric = CosineMatrix(["one", "other"])
        >>> metric.update(TaskVectors([one, other]))
        >>> round(float(metric.compute()[0, 0, 1]), 4)
        0.96
    """

    products: Tensor
    elements: Tensor

    def __init__(self, tasks: Sequence[str], blocks: int = 0, **settings: Any) -> None:
        super().__init__(tasks, blocks, **settings)
        self._add_sum("products", len(self.tasks), len(self.tasks), dtype=torch.float64)
        self._add_sum("elements")

    def update(self, vectors: TaskVectors, names: Sequence[str] | None = None) -> None:
        """Take in some parameters, each of them once over all updates and processes; they are read chunk by chunk.

        Args:
            vectors: the T task vectors, or a view of them.
            names: the parameters; all by default.

        Raises:
            StructureMismatchError: there are not T vectors, or more blocks than were announced.
        """
        row = self._rows(vectors)
        for name, size, found in vectors.over_chunks(_products, names):
            index = row(name)
            self.products[index] += found.to(self.products)
            self.elements[index] += size

    def compute(self) -> Tensor:
        """``[1 + P, T, T]`` in float64: of the whole vectors, then of every place; NaN without parameters there."""
        empty = (with_whole(self.elements) == 0).view(-1, 1, 1)
        return cosines(with_whole(self.products)).masked_fill(empty, torch.nan)

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw the matrix of the whole vectors."""
        from lit_merge.report.matrices import draw_matrix

        values = found[0].tolist()
        draw_matrix(axes, values, self.tasks, self.tasks, diagonal=False)


class NormByDepth(DepthMetric):
    """Euclidean norm ‖τ_t‖ of every task vector, of the whole vectors and of every block.

    Args:
        tasks: the T tasks.
        blocks: number of the network's blocks.
        relative: whether to divide by the norm of θ0 in the same place; the vectors then need a ``base``.
        **settings: of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lit_merge.vectors import TaskVector, TaskVectors
        >>> metric = NormByDepth(["one"])
        >>> metric.update(TaskVectors([TaskVector({"w": torch.tensor([3.0, 4.0])})]))
        >>> metric.compute().flatten().tolist()
        [5.0, 5.0]
    """

    squares: Tensor
    base_squares: Tensor
    elements: Tensor

    def __init__(self, tasks: Sequence[str], blocks: int = 0, relative: bool = False, **settings: Any) -> None:
        super().__init__(tasks, blocks, **settings)
        self.relative = relative
        self._add_sum("squares", len(self.tasks), dtype=torch.float64)
        self._add_sum("base_squares", dtype=torch.float64)
        self._add_sum("elements")

    def update(self, vectors: TaskVectors, names: Sequence[str] | None = None) -> None:
        """See :meth:`CosineMatrix.update`.

        Raises:
            ConfigurationError: the norms are to be relative, and the vectors have no base.
        """
        row = self._rows(vectors)
        base = vectors.base if self.relative else {}
        for name, size, found in vectors.over_chunks(_squares, names):
            index = row(name)
            self.squares[index] += found.to(self.squares)
            self.elements[index] += size
        for name in (vectors.names if names is None else names) if self.relative else ():
            self.base_squares[row(name)] += _square_sum(base[name]).to(self.base_squares)

    def compute(self) -> Tensor:
        """``[1 + P, T]`` in float64: of the whole vectors, then of every place; NaN without parameters there."""
        norms = with_whole(self.squares).sqrt()
        elements = with_whole(self.elements)
        if self.relative:
            norms = norms / with_whole(self.base_squares).sqrt().unsqueeze(-1)
        return norms.masked_fill((elements == 0).unsqueeze(-1), torch.nan)

    def _draw(self, axes: Axes, found: Any) -> None:
        """Draw the norms in every place, a line per task."""
        from lit_merge.report.curves import draw_by_depth

        values = found[1:].T.tolist()
        draw_by_depth(axes, values, self.tasks, self.places[1:])
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        axes.set_title("‖τ‖ / ‖θ₀‖ by depth" if self.relative else "‖τ‖ by depth", loc="left", weight="bold")


def _products(name: str, start: int, chunk: Tensor) -> tuple[str, int, Tensor]:
    return name, chunk.shape[1], pairwise_products(chunk)


def _squares(name: str, start: int, chunk: Tensor) -> tuple[str, int, Tensor]:
    return name, chunk.shape[1], chunk.double().square().sum(1)


def _square_sum(value: Tensor) -> Tensor:
    return value.detach().double().square().sum()
