"""DELTA against its definition in a plain loop, resumed, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing
from lit_merge.models.lora import LoRA
from lit_merge.models.selection import Matching, TaLoS
from lit_merge.modules import DeltaModule, Penalty, TauJpPenalty

DOUBLE = torch.float64
STEPS = 4


class Lengths(Penalty):
    """The squared norm of τ."""

    name, weight = "lengths", 0.3

    def of_module(self, module):
        return torch.stack([change.square().sum() for _, change in module.parametrisation.departures()]).sum()


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a DeltaModule around the tiny encoder, in float64."""

    def build(**settings):
        return DeltaModule(
            encoder=tiny_encoder(dtype=DOUBLE),
            preprocessing=Preprocessing(image_size=4),
            **{"head": tiny_head(dtype=DOUBLE), "learning_rate": 0.02, "warmup_fraction": 0.0, **settings},
        )

    return build


def plain_loop(encoder, head, batches, seed):
    start = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    teacher = {name: torch.zeros_like(value).requires_grad_() for name, value in start.items()}
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW([*weights.values(), *teacher.values()], lr=0.02, eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step, batch in enumerate(batches):
        progress = (step / STEPS) ** 0.5
        low, high = 1 - 0.5 * progress, 1 + progress  # of [1, 1] to [0.5, 2]
        alpha = low + (high - low) * float(
            torch.rand((), dtype=DOUBLE, generator=torch.Generator().manual_seed(seed + step))
        )
        tau = {name: weights[name] - start[name] for name in start}
        features = functional_call(encoder, {n: start[n] + alpha * tau[n] for n in start}, (batch.images,))
        value, tangent = jvp(
            lambda *given, images=batch.images: functional_call(
                encoder, dict(zip(start, given, strict=True)), (images,)
            ),
            tuple(start.values()),
            tuple(teacher.values()),
        )
        taught = value + alpha * tangent
        apart = features / features.norm(dim=1, keepdim=True) - (taught / taught.norm(dim=1, keepdim=True)).detach()
        loss = F.cross_entropy(head(features), batch.labels) + F.cross_entropy(head(taught), batch.labels)
        loss = loss + 2.0 * apart.square().sum(1).mean()
        loss = loss + 0.3 * sum(one.square().sum() for one in [*tau.values(), *teacher.values()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: (weights[name] - start[name]).detach() for name in start}, teacher


def test_fit_is_the_plain_loop(module, tiny_encoder, tiny_head, tiny_data, silent_trainer) -> None:
    data = tiny_data(dtype=DOUBLE)
    torch.manual_seed(3)
    tuned = module(penalty=Lengths(), distillation=2.0, gradient_clip=0.0)
    assert tuned.regime.startswith("DELTA(alpha=[0.5, 2.0], exponent=0.5), full, ")
    silent_trainer(max_steps=STEPS, precision="64-true").fit(tuned, datamodule=data)
    batches = [data.batches[step % len(data.batches)] for step in range(STEPS)]
    student, teacher = plain_loop(tiny_encoder(dtype=DOUBLE), tiny_head(dtype=DOUBLE), batches, 3)
    found = dict(tuned.task_vector())
    for name, value in student.items():
        torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(tuned.teacher.get_parameter(name).detach(), teacher[name].detach())
    images = data.batches[0].images
    moved = {name: value + found[name] for name, value in tiny_encoder(dtype=DOUBLE).named_parameters()}
    torch.testing.assert_close(tuned(images), functional_call(tiny_encoder(dtype=DOUBLE), moved, (images,)))


def test_a_checkpoint_holds_the_teacher(module, tiny_data, silent_trainer, tmp_path) -> None:
    tuned, trainer = module(trainable=Matching("outer")), silent_trainer(max_steps=2, precision="64-true")
    trainer.fit(tuned, datamodule=tiny_data(dtype=DOUBLE))
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    stored = torch.load(tmp_path / "tuned.ckpt", weights_only=True)["state_dict"]
    assert {name for name in stored if name.startswith("teacher")} == {"teacher.outer.weight", "teacher.outer.bias"}
    for name, value in tuned.teacher.named_parameters():
        assert torch.equal(stored[f"teacher.{name}"], value)
        assert value.any()
    assert {name: bool(value.any()) for name, value in tuned.task_vector().items()} == {
        name: "outer" in name for name in tuned.initial_parameters
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linearized": True}, "expected a student whose parameters train directly, got Linearised"),
        ({"lora": LoRA(2, on=Matching("weight"))}, "expected a student whose parameters train directly, got LowRank"),
        ({"trainable": TaLoS()}, "trainable: expected whole parameters with DeltaModule, whose teacher has no masks"),
        ({"penalty": TauJpPenalty()}, "penalty: expected one that reads no other task's examples with DeltaModule"),
        ({"alpha": (2.0, 0.5)}, "alpha: expected the smaller number first, got .2.0, 0.5."),
        ({"alpha": (-1.0, 0.5)}, "alpha: expected a number in"),
        ({"exponent": -1.0}, "exponent: expected a number in"),
        ({"distillation": float("inf")}, "distillation: expected a number in"),
    ],
    ids=str,
)
def test_what_it_is_not_for_is_refused(settings, message, module) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        module(**settings)
    assert len(str(error.value).splitlines()) == 1
