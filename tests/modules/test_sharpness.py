"""Sharpness-aware minimisation against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing
from lit_merge.modules import SAM, FineTuneModule
from lit_merge.modules.sharpness import SharpnessAware

DOUBLE = torch.float64


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


def plain_loop(encoder: nn.Module, head: nn.Module, batches, settings: SAM, clip: float) -> nn.Module:
    """SAM as the papers write it, with AdamW, a cosine and clipped gradients."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.03, eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    weights = list(encoder.parameters())

    def gradients(batch):
        return torch.autograd.grad(F.cross_entropy(head(encoder(batch.images)), batch.labels), weights)

    for batch in batches:
        first = gradients(batch)
        scales = [one.detach().abs() + settings.eta if settings.adaptive else torch.ones_like(one) for one in weights]
        norm = torch.cat([(scale * one).flatten() for scale, one in zip(scales, first, strict=True)]).norm()
        moves = [settings.rho * scale**2 * one / norm for scale, one in zip(scales, first, strict=True)]
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
        second = gradients(batch)
        with torch.no_grad():
            for weight, move, gradient in zip(weights, moves, second, strict=True):
                weight.sub_(move)
                weight.grad = gradient
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        schedule.step()
    return encoder


@pytest.mark.parametrize("settings", [SAM(0.1), SAM(0.5, adaptive=True, eta=0.1), SAM(0.0)], ids=repr)
def test_fit_is_the_plain_loop(settings, module, tiny_encoder, tiny_head, tiny_data, silent_trainer) -> None:
    data = tiny_data(dtype=DOUBLE)
    tuned, trainer = module(sam=settings, gradient_clip=0.5), silent_trainer(max_steps=4, precision="64-true")
    trainer.fit(tuned, datamodule=data)
    assert trainer.global_step == 4
    assert tuned.regime == repr(settings)
    encoder, head = tiny_encoder(dtype=DOUBLE), tiny_head(dtype=DOUBLE)
    expected = plain_loop(encoder, head, data.batches[:4], settings, 0.5)
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(tuned.encoder.get_parameter(name), tensor, rtol=0, atol=1e-10)
    if settings.rho:  # it differs from what AdamW alone does
        alone = plain_loop(tiny_encoder(dtype=DOUBLE), head, data.batches[:4], SAM(0.0), 0.5)
        assert not torch.allclose(next(alone.parameters()), next(expected.parameters()))


@pytest.mark.parametrize("settings", [{"linearized": True}, {"sam": SAM(0.2)}], ids=str)
def test_it_combines_with_other_regimes(settings, module, tiny_data, silent_trainer) -> None:
    tuned = module(**{"sam": SAM(0.1), **settings})
    silent_trainer(max_steps=2, precision="64-true").fit(tuned, datamodule=tiny_data(dtype=DOUBLE))
    assert any(one.any() for one in dict(tuned.task_vector()).values())
    assert ("linearized" in settings) == tuned.regime.startswith("linearized, SAM(rho=0.1)")


def test_a_resumed_run_ends_where_the_whole_one_does(module, tiny_data, silent_trainer, tmp_path) -> None:
    whole, part, rest = (module(sam=SAM(0.1)) for _ in range(3))
    data = tiny_data(dtype=DOUBLE, count=3)
    silent_trainer(max_epochs=2, precision="64-true").fit(whole, datamodule=data)
    trainer = silent_trainer(max_epochs=2, precision="64-true", limit_train_batches=3)
    stop = silent_trainer(max_epochs=1, precision="64-true")
    part.configure_optimizers = lambda: _over_two_epochs(part)
    stop.fit(part, datamodule=data)
    stop.save_checkpoint(tmp_path / "half.ckpt")
    trainer.fit(rest, datamodule=data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 6
    for name, tensor in whole.encoder.named_parameters():
        torch.testing.assert_close(rest.encoder.get_parameter(name), tensor, rtol=0, atol=1e-12)


def _over_two_epochs(module: FineTuneModule):
    """The optimiser and schedule of a run of twice as many steps."""
    found = FineTuneModule.configure_optimizers(module)
    schedule = found["lr_scheduler"]["scheduler"]
    schedule.lr_lambdas = [lambda step: 0.5 * (1 + math.cos(math.pi * step / 6))]
    return found


def test_state_and_groups_are_the_other_optimisers() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -4.0]))
    inner = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer = SharpnessAware(inner, SAM(1.0))
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        seen.append(weight.detach().clone())
        return loss

    assert float(optimizer.step(closure)) == 12.5
    torch.testing.assert_close(seen[1], torch.tensor([3.6, -4.8]))  # one further along the gradient
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0 - 0.36, -4.0 + 0.48]))
    state = optimizer.state_dict()
    other = SharpnessAware(torch.optim.SGD([weight], lr=0.5, momentum=0.1), SAM(1.0))
    other.load_state_dict(state)
    assert other.param_groups is other.optimizer.param_groups
    assert other.param_groups[0]["momentum"] == 0.9
    assert torch.equal(other.state[weight]["momentum_buffer"], inner.state[weight]["momentum_buffer"])
    with pytest.raises(ConfigurationError, match=r"sam: expected a closure .* Use the precision 32-true"):
        optimizer.step()


def test_a_gradient_of_zero_moves_nothing() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = SharpnessAware(torch.optim.SGD([weight], lr=1.0), SAM(0.1, adaptive=True))

    def closure():
        optimizer.zero_grad()
        (weight * 0).sum().backward()

    optimizer.step(closure)
    assert torch.equal(weight.detach(), torch.zeros(3))


def test_refusals(module, tiny_data, silent_trainer) -> None:
    for build, message in (
        (lambda: SAM(-0.1), "sam.rho: expected a finite number at least 0, got -0.1"),
        (lambda: SAM(adaptive=True, eta=0), "sam.eta: expected a number above 0, got 0"),
        (
            lambda: module(sam=SAM(), optimizer_wrapper=lambda one: one),
            "sam and optimizer_wrapper: expected one",
        ),
        (lambda: module(sam=SAM(adaptive=True), linearized=True), "sam.adaptive: expected parameters that"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            build()
    for settings in ({"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}):
        trainer = silent_trainer(max_epochs=2, precision="64-true", **settings)
        with pytest.raises(ConfigurationError, match="sam: expected one batch per step, got accumulate_grad_batches 2"):
            trainer.fit(module(sam=SAM()), datamodule=tiny_data(dtype=DOUBLE))


def test_what_is_logged_is_the_loss_at_the_weights(
    module, tiny_encoder, tiny_head, tiny_batches, tiny_data, silent_trainer
):
    batches = tiny_batches(1, dtype=DOUBLE)
    logits = tiny_head(dtype=DOUBLE)(tiny_encoder(dtype=DOUBLE)(batches[0].images))
    tuned, trainer = module(sam=SAM(2.0)), silent_trainer(max_steps=1, precision="64-true")
    trainer.fit(tuned, datamodule=tiny_data(batches=batches))
    right = (logits.argmax(-1) == batches[0].labels).double().mean()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(
        float(F.cross_entropy(logits, batches[0].labels).detach())
    )
    assert float(trainer.callback_metrics["train/accuracy"]) == pytest.approx(float(right))
    assert tuned.training_description() == {
        "confidence": f"{float(logits.softmax(-1).amax(-1).mean().detach()):.4f}",
        "train_accuracy": f"{float(right):.4f}",
    }


def test_a_checkpoint_knows_it(module, tiny_data, silent_trainer, tmp_path) -> None:
    trainer = silent_trainer(max_steps=1, precision="64-true")
    trainer.fit(module(sam=SAM(0.1, adaptive=True)), datamodule=tiny_data(dtype=DOUBLE))
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    stored = torch.load(tmp_path / "tuned.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["sam"] == SAM(0.1, adaptive=True)
