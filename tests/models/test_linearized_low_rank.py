"""Linearised LoRA: the tangent in the factors against the dense Jacobian, what trains, penalties, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing
from lit_merge.models.linearized import LinearizedLowRank
from lit_merge.models.lora import LoRA
from lit_merge.models.selection import Matching
from lit_merge.modules import FineTuneModule, MultiTaskModule, OrthoReg, TauJpPenalty
from lit_merge.vectors import TaskVector

DOUBLE = torch.float64
SETTINGS = LoRA(rank=2, alpha=6.0, on=Matching("weight"))


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a FineTuneModule with linearised LoRA on the tiny encoder, in float64."""

    def build(**settings):
        return FineTuneModule(
            encoder=tiny_encoder(dtype=DOUBLE),
            preprocessing=Preprocessing(image_size=4),
            head=tiny_head(dtype=DOUBLE),
            **{"linearized": True, "lora": SETTINGS, "warmup_fraction": 0.0, "learning_rate": 0.05, **settings},
        )

    return build


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def test_it_is_the_jacobian_in_the_factors(tiny_encoder) -> None:
    torch.manual_seed(0)
    encoder, images = tiny_encoder(dtype=DOUBLE), torch.randn(3, 3, 4, 4, dtype=DOUBLE)
    start = dict(encoder.named_parameters())
    model = LinearizedLowRank(encoder, SETTINGS)
    begin = {name: value.detach().clone() for name, value in model.state_dict().items()}
    moved(model)

    def features(factors):
        changed = {
            f"{layer}.weight": start[f"{layer}.weight"]
            + 3.0 * factors[f"{layer}.weight.B"] @ factors[f"{layer}.weight.A"]
            for layer in ("inner", "outer")
        }
        return functional_call(encoder, {**start, **changed}, (images,))

    jacobian = jacrev(features)(begin)  # around A0 and B0 = 0, with respect to all factors
    now = dict(model.state_dict())
    tangent = sum((jacobian[name] * (now[name] - begin[name])).flatten(2).sum(2) for name in begin)
    torch.testing.assert_close(model.tangent(images), tangent)
    torch.testing.assert_close(model(images), features(begin) + tangent)
    assert all(not jacobian[name].any() for name in begin if name.endswith("A"))  # which is why A stays
    # Dense, the same vector in the ordinary linearised network gives the same outputs.
    vector = model.task_vector()
    torch.testing.assert_close(vector["inner.weight"], 3.0 * now["inner.weight.B"] @ now["inner.weight.A"])
    assert torch.linalg.matrix_rank(vector["outer.weight"]) == 2
    assert not vector["inner.bias"].any()
    dense = FineTuneModule(encoder=encoder.requires_grad_(), preprocessing=Preprocessing(image_size=4), linearized=True)
    dense.load_task_vector(TaskVector(vector, metadata={}))
    torch.testing.assert_close(dense(images), model(images))


def test_training_moves_b_alone(module, tiny_data, silent_trainer) -> None:
    torch.manual_seed(0)
    tuned = module(weight_decay=0.1, gradient_clip=0.0)
    assert tuned.regime == f"linearized, {SETTINGS!r}"
    begin = {name: value.clone() for name, value in tuned.encoder.state_dict().items()}
    data = tiny_data(dtype=DOUBLE)
    silent_trainer(max_steps=3, precision="64-true").fit(tuned, datamodule=data)
    factors = {name: value for name, value in begin.items() if name.endswith("B")}
    trained = {name: value.clone().requires_grad_() for name, value in factors.items()}
    plain = module(lora=None)  # the dense τ of the factors, in a plain loop
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    weights = dict(plain.network.named_parameters())
    for batch in data.batches[:3]:
        tau = {n.removesuffix(".B"): 3.0 * value @ begin[n[:-1] + "A"] for n, value in trained.items()}
        value, jacobian = plain.network(batch.images), jacrev(lambda w, x: functional_call(plain.network, w, (x,)))
        rows = jacobian({name: weights[name] for name in tau}, batch.images)
        tangent = sum((rows[name] * tau[name]).flatten(2).sum(2) for name in tau)
        optimizer.zero_grad()
        F.cross_entropy(plain.head(value + tangent), batch.labels).backward()
        optimizer.step()
        schedule.step()
    for name, value in tuned.encoder.state_dict().items():
        assert torch.equal(value, begin[name]) == name.endswith("A")
        torch.testing.assert_close(value, trained[name].detach() if name in trained else begin[name])


def test_penalties_are_about_the_dense_update(module) -> None:
    tuned = module(penalty=OrthoReg(1.0, squared=True))
    moved(tuned.encoder)
    tau = dict(tuned.task_vector())
    expected = sum(
        (value.mT @ value - torch.eye(value.shape[1], dtype=DOUBLE)).square().sum()
        - max(value.shape[1] - value.shape[0], 0)  # of the smaller Gram matrix
        for name, value in tau.items()
        if name.endswith("weight")
    )
    found = tuned.penalty.of_module(tuned)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert {name for name, one in tuned.encoder.named_parameters() if one.grad is not None} == {
        "inner.weight.B",
        "outer.weight.B",
    }
    penalised = module(penalty=TauJpPenalty())  # no longer refused
    images = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    moved(penalised.encoder)
    value, tangent = penalised.forward_parts(images)
    torch.testing.assert_close(penalised(images), value + tangent)


def test_a_start_elsewhere_is_refused(module, tiny_encoder, tiny_head) -> None:
    tuned = module()
    vector = {name: torch.ones_like(value) for name, value in tuned.initial_parameters.items()}
    with pytest.raises(ConfigurationError, match=r"^task vector: expected to start at θ0 with lora and linearized"):
        tuned.load_task_vector(TaskVector(vector, metadata={}))
    moved(tuned.encoder)
    tuned.load_task_vector(TaskVector(vector, metadata={}), coefficient=0.0)
    assert not any(value.any() for value in tuned.task_vector().values())
    MultiTaskModule(encoder=tiny_encoder(), heads={"a": tiny_head()}, tau_jp=True, linearized=True, lora=SETTINGS)
