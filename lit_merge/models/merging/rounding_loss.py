"""What rounding takes from a task vector when θ0 + τ is stored in a narrow dtype, in numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.params import count_nonzero

__all__ = ["RoundingLoss", "is_narrow", "rounding_caution", "written_cautions"]

_LOST = 0.05  # of ‖τ‖, from which on rounding is warned of
_ROW = 512  # elements whose squares are summed up in float32
_SMALLEST = 1e-26  # a mean square that float32 has with all its digits, many times over


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a floating-point dtype is narrower than float32."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


@dataclass(frozen=True)
class RoundingLoss:
    """Sums over elements; those of several tensors are added by ``+``.

    What is left of τ is what distinguishes the stored model from the base in the same dtype:
    ``round(θ0 + τ) − round(θ0)``. For θ0 ~ N(0, 1) in bfloat16 and τ of size 1e-3, 80 % of ‖τ‖ is lost.

    Attributes:
        squared_error: of what is left against τ, summed up.
        squared_norm: of τ.
        unchanged: elements with τ ≠ 0 that are stored as if τ were 0.
        moved: elements with τ ≠ 0.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    unchanged: float = 0
    moved: float = 0

    @classmethod
    def of(cls, base: Tensor, update: Tensor, stored: Tensor) -> RoundingLoss:
        """The sums of one tensor or chunk.

        Args:
            base: θ0, in any floating-point dtype.
            update: τ, of the same shape.
            stored: θ0 + τ as it is stored.
        """
        wide = torch.promote_types(update.dtype, torch.float32)
        update = update.to(stored.device, wide)
        left = stored.to(wide).sub_(base.to(stored.device, stored.dtype).to(wide))
        moved, changed = count_nonzero(update), count_nonzero(left)  # what is changed has moved
        return cls(_squared_norm(left.sub_(update)), _squared_norm(update), moved - changed, moved)

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            self.unchanged + other.unchanged,
            self.moved + other.moved,
        )

    def scaled(self, factor: float) -> RoundingLoss:
        """The sums of ``factor`` times as many elements of the same kind, for estimates from a sample."""
        return RoundingLoss(
            self.squared_error * factor, self.squared_norm * factor, self.unchanged * factor, self.moved * factor
        )

    @property
    def lost(self) -> float:
        """‖round(θ0 + τ) − round(θ0) − τ‖ / ‖τ‖; more than 1 if rounding adds more than τ is. 0 for τ = 0."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def share_unchanged(self) -> float:
        """Of the elements with τ ≠ 0, the fraction that is stored as if τ were 0."""
        return self.unchanged / self.moved if self.moved else 0.0

    def entry(self) -> str:
        """The entry ``rounding`` of a header: JSON, of fixed length."""
        lost = min(self.lost, 9.999999e99)  # of two digits in the exponent
        return f'{{"lost": {lost:.6e}, "unchanged": {self.share_unchanged:.6e}}}'

    @classmethod
    def read(cls, entry: str) -> tuple[float, float]:
        """Both numbers of a header's entry; ``(0, 0)`` if it is none."""
        try:
            content = json.loads(entry)
            return float(content["lost"]), float(content["unchanged"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return 0.0, 0.0


def _squared_norm(values: Tensor) -> float:
    """Σ x² to about 1e-7: rows in float32, a tenth of the time, and their sum in float64."""
    flat = values.flatten()
    rows = len(flat) // _ROW
    norms = torch.linalg.vector_norm(flat[: rows * _ROW].view(rows, _ROW), dim=1).double()
    found = float(torch.dot(norms, norms))
    if not rows * _SMALLEST < found < math.inf:  # squares may be too small or too large for float32
        rows, found = 0, 0.0
    rest = flat[rows * _ROW :].double()
    return found + float(torch.dot(rest, rest))


def rounding_caution(what: str, dtypes: Sequence[torch.dtype], loss: RoundingLoss, estimated_on: int = 0) -> str:
    """A line about what rounding takes; empty if it is little.

    Args:
        what: is written, or would be.
        dtypes: that it is stored in.
        loss: in numbers.
        estimated_on: how many elements they are from; 0 for all.
    """
    if not loss.lost > _LOST:
        return ""
    named = " and ".join(sorted({str(one).removeprefix("torch.") for one in dtypes}))
    return _loss_line(what, named, loss.lost, loss.share_unchanged, estimated_on)


def written_cautions(header: Mapping[str, str], what: str) -> list[str]:
    """The warnings that a written file's header holds, with the exact loss by rounding among them."""
    try:
        listed = json.loads(header.get("warnings", "[]"))
    except (ValueError, RecursionError):
        listed = []
    found = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
    lost, unchanged = RoundingLoss.read(header.get("rounding", ""))
    return [*found, *([_loss_line(what, "", lost, unchanged, 0)] if lost > _LOST else [])]


def _loss_line(what: str, dtype: str, lost: float, unchanged: float, estimated_on: int) -> str:
    about, how = ("about ", f" (estimated on {estimated_on:,} elements)") if estimated_on else ("", "")
    takes = f"takes {about}{100 * lost:.1f} % of ‖τ‖" if lost < 1 else f"adds noise of {about}{lost:.1f} times ‖τ‖"
    return (
        f"{what}: rounding {f'to {dtype} ' if dtype else ''}{takes}, and "
        f"{about}{100 * unchanged:.1f} % of the elements with τ ≠ 0 stay as they are without it{how}. "
        "Set dtype to float32 to keep all of it."
    )
