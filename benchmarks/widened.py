"""``lit-merge`` with products of bfloat16 computed in float32 and rounded, for processors without bfloat16 units.

    python benchmarks/widened.py suite --config configs/suite/text.yaml

On such a processor torch multiplies bfloat16 matrices some fifty times slower than float32 ones (no matrix library that
it has knows them), so that a suite in bf16-mixed would take days. With units, operands are bfloat16, sums are float32
and the result is rounded once; here as well: operands are widened, which is exact, multiplied in float32, and the
result is rounded. The two differ in the order of the sums: of a product of 2,048 × 384 × 1,536 one element in ten
thousand, by one rounding. The weights of attention stay in float32 between its two products, where units round them.

benchmarks/all.py starts its suites so where the processor needs it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.library import Library, get_kernel

from lit_merge.functional.products import slow_precision

__all__ = ["slow", "widen"]

LIBRARY = Library("aten", "IMPL")


def slow() -> bool:
    """Whether this processor has no bfloat16 units."""
    return slow_precision("bf16-mixed", "cpu") is not None


@cache
def widen() -> None:
    """Put float32 in place of bfloat16 in all products on the processor, for the rest of this process."""
    aten = torch.ops.aten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            packet = getattr(aten, name)
            _override(packet.default, (0,))
            _override(packet.out, (0,), written="out")
        for name in ("addmm_", "baddbmm_"):
            _override(getattr(aten, name).default, (0,), written="self")
        _override(aten._slow_conv2d_forward.default, (0,))
        _override(aten._slow_conv2d_backward.output_mask, (0, 1, 2))
        _override(aten._scaled_dot_product_flash_attention_for_cpu.default, (0,))
        _override(aten._scaled_dot_product_flash_attention_for_cpu_backward.default, (0, 1, 2))


def _override(overload: Any, rounded: Sequence[int], written: str | None = None) -> None:
    """An operator's kernel with one that widens what is bfloat16.

    Args:
        overload: the operator.
        rounded: which of its outputs are bfloat16 again.
        written: the operand that the output is written to: ``self``, the first, ``out``, a keyword, or none.
    """
    original = get_kernel(overload, "CPU")
    call: Callable[..., Any] = original.call_boxed

    def run(keys: Any, *args: Any, **named: Any) -> Any:
        first = next(one for one in args if isinstance(one, torch.Tensor))
        if first.dtype is not torch.bfloat16:
            return call(keys, *args, **named)
        wide = [_wide(one) for one in args]
        into = {"self": args[0], "out": named.get("out")}.get(written or "")
        if into is not None:
            found = call(keys, *wide, **{key: _wide(one) for key, one in named.items()})
            return into.copy_(found)
        found = call(keys, *wide, **{key: _wide(one) for key, one in named.items()})
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        return tuple(
            one.bfloat16() if place in rounded and isinstance(one, torch.Tensor) else one
            for place, one in enumerate(found)
        )

    LIBRARY.impl(overload, run, "CPU", with_keyset=True, allow_override=True)


def _wide(one: Any) -> Any:
    return one.float() if isinstance(one, torch.Tensor) and one.dtype is torch.bfloat16 else one


def main() -> None:
    """``lit-merge`` with the arguments of this call."""
    from lit_merge.commands.main import main as lit_merge

    widen()
    sys.exit(lit_merge(sys.argv[1:]))


if __name__ == "__main__":
    main()
