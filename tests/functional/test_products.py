"""Products of bfloat16 on a processor: what they cost is measured, and said where it is much."""

from __future__ import annotations

import subprocess
import sys

import lightning as L
import pytest
from builders.documents import ROOT

from lit_merge.functional import products
from lit_merge.modules.encoding import EncoderModule


def test_the_cost_is_a_ratio_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([8.0, 0.5])
    monkeypatch.setattr(products, "_seconds", lambda matrix, rounds: next(taken))
    products.bfloat16_cost.cache_clear()
    assert products.bfloat16_cost() == 16.0
    assert products.bfloat16_cost() == 16.0  # measured once
    products.bfloat16_cost.cache_clear()


@pytest.mark.parametrize(
    ("precision", "device", "cost", "said"),
    [
        ("bf16-mixed", "cpu", 56.4, True),
        ("bf16-true", "cpu", 56.4, True),
        ("bf16-mixed", "cpu", 1.4, False),
        ("32-true", "cpu", 56.4, False),
        ("bf16-mixed", "cuda", 56.4, False),
    ],
)
def test_what_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, cost: float, said: bool
) -> None:
    monkeypatch.setattr(products, "bfloat16_cost", lambda: cost)
    expected = (
        f"precision {precision}: this processor has no units for bfloat16; its products take 56 times as long as those "
        "of float32 (measured). Use 32-true."
    )
    assert products.slow_precision(precision, device) == (expected if said else None)


def test_a_module_warns_when_it_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bfloat16_cost", lambda: 20.0)
    module = EncoderModule("lit-tiny")
    module.trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="its products take 20 times as long as those of float32"):
        module.setup("fit")


WIDENED = """
import sys, torch
sys.path.insert(0, {folder!r})
import widened

def products():
    torch.manual_seed(0)
    left, right, first = torch.randn(40, 30), torch.randn(30, 20), torch.randn(40, 20)
    images, batched = torch.randn(2, 3, 8, 8), torch.randn(3, 4, 5)
    left, right, first, images, batched = (one.bfloat16() for one in (left, right, first, images, batched))
    convolution = torch.nn.Conv2d(3, 4, 4, 4).bfloat16()
    query = torch.randn(1, 2, 5, 8).bfloat16().requires_grad_()
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    (convolved := convolution(images)).sum().backward()
    attended.float().square().sum().backward()
    return {{
        "mm": left @ right,
        "transposed": right.T @ left.T,
        "addmm": torch.addmm(first, left, right, beta=0.5),
        "addmm_": first.clone().addmm_(left, right),
        "bmm": batched @ batched.transpose(1, 2),
        "baddbmm_": torch.ones(3, 4, 4).bfloat16().baddbmm_(batched, batched.transpose(1, 2)),
        "out": torch.mm(left, right, out=torch.empty(40, 20).bfloat16()),
        "convolution": convolved.detach(),
        "convolution's gradient": convolution.weight.grad,
        "attention": attended.detach(),
        "attention's gradient": query.grad,
        "float32": left.float() @ right.float(),
    }}

before = products()
widened.widen()
widened.widen()
for name, found in products().items():
    assert found.dtype is before[name].dtype, name
    error = ((found.float() - before[name].float()).norm() / before[name].float().norm()).item()
    assert error <= (0.0 if name == "float32" else 0.008), (name, error)
"""


def test_widened_products_are_those_of_bfloat16() -> None:
    code = WIDENED.format(folder=str(ROOT / "benchmarks"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
