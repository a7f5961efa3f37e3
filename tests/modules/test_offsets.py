"""Gradients at random offsets, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing
from lit_merge.modules import SAM, FineTuneModule, MergOPT
from lit_merge.modules.offsets import OffsetAware
from lit_merge.modules.sharpness import SharpnessAware

DOUBLE = torch.float64
SETTINGS = MergOPT(scale=0.02, location=0.001, tasks=3, coefficients=[0.3, 0.7])


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a FineTuneModule around the tiny encoder, in float64."""

    def build(**settings):
        return FineTuneModule(
            encoder=tiny_encoder(dtype=DOUBLE),
            preprocessing=Preprocessing(image_size=4),
            **{"head": tiny_head(dtype=DOUBLE), "learning_rate": 0.03, "warmup_fraction": 0.0, **settings},
        )

    return build


def test_fit_is_the_plain_loop(module, tiny_encoder, tiny_head, tiny_data, silent_trainer) -> None:
    data = tiny_data(dtype=DOUBLE)
    torch.manual_seed(7)
    tuned = module(mergopt=SETTINGS, gradient_clip=0.0)
    assert tuned.regime == "MergOPT(scale=0.02, location=0.001, tasks=3, coefficients=[0.3, 0.7])"
    silent_trainer(max_steps=3, precision="64-true").fit(tuned, datamodule=data)
    encoder, head = tiny_encoder(dtype=DOUBLE), tiny_head(dtype=DOUBLE)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.03, eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for step, batch in enumerate(data.batches[:3]):
        draws, noise = torch.Generator().manual_seed(7 + step), torch.Generator().manual_seed(7 + step)
        count = int(torch.randint(1, 4, (), generator=draws))
        alpha = (0.3, 0.7)[int(torch.randint(2, (), generator=draws))]
        moved = {}
        for name, value in encoder.named_parameters():
            first, second = (torch.empty_like(value).exponential_(generator=noise) for _ in range(2))
            moved[name] = value.detach() + (count * alpha - 1) * (0.02 * (first - second) + 0.001)
            moved[name].requires_grad_()
        features = torch.func.functional_call(encoder, moved, (batch.images,))
        gradients = torch.autograd.grad(F.cross_entropy(head(features), batch.labels), list(moved.values()))
        for value, gradient in zip(encoder.parameters(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
    for name, value in encoder.named_parameters():
        torch.testing.assert_close(tuned.encoder.get_parameter(name).detach(), value.detach())


def test_the_offsets_are_laplace_and_leave_nothing_behind() -> None:
    weight = torch.nn.Parameter(torch.full((40_000,), 2.0, dtype=DOUBLE))
    seen = []
    optimizer = OffsetAware(torch.optim.AdamW([weight], lr=0.0), MergOPT(0.5, 0.1, 1, [3.0]))
    torch.manual_seed(0)
    optimizer.step(lambda: seen.append(weight.detach().clone()))
    offset = (seen[0] - 2.0) / 2.0 - 0.1  # K α − 1 = 2
    assert float(offset.abs().mean()) == pytest.approx(0.5, rel=0.02)  # b
    assert float(offset.square().mean()) == pytest.approx(2 * 0.5**2, rel=0.05)
    assert torch.equal(weight.detach(), torch.full_like(weight, 2.0))


def test_what_cannot_be_is_refused(module) -> None:
    for settings, part in (
        ({"scale": -1.0}, "mergopt.scale: expected a finite number"),
        ({"tasks": 0}, "mergopt.tasks: expected a whole number"),
        ({"coefficients": []}, "mergopt.coefficients: expected at least one number, got none"),
        ({"coefficients": [float("nan")]}, "mergopt.coefficients: expected a finite number"),
    ):
        with pytest.raises(ConfigurationError, match=f"^{part}[^\n]*$"):
            MergOPT(**settings)
    with pytest.raises(ConfigurationError, match=r"^sam and mergopt: expected one of them, got both"):
        module(sam=SAM(), mergopt=MergOPT())
    with pytest.raises(ConfigurationError, match=r"^mergopt: expected a closure that evaluates the loss, got none"):
        OffsetAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), MergOPT()).step()


@pytest.mark.parametrize(("wrapper", "settings"), [(OffsetAware, SETTINGS), (SharpnessAware, SAM())])
def test_a_loss_that_fails_leaves_the_weights_as_they_were(wrapper, settings) -> None:
    weight = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    optimizer = wrapper(torch.optim.SGD([weight], lr=0.1), settings)

    def closure():
        if not torch.equal(weight.detach(), torch.ones(3, dtype=DOUBLE)):
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert torch.equal(weight.detach(), torch.ones(3, dtype=DOUBLE))
