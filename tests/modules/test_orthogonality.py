"""The OrthoReg penalty against its definition, in every regime."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing
from lit_merge.models.lora import LoRA, updates
from lit_merge.models.selection import Matching
from lit_merge.modules import FineTuneModule, OrthoReg
from lit_merge.modules.orthogonality import orthogonality

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


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)])
def test_it_is_the_definition(shape) -> None:
    change = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    columns = change.detach().T
    pairs = [(i, j) for i in range(shape[1]) for j in range(shape[1])]
    left = sum((float(columns[i] @ columns[j]) - (i == j)) ** 2 for i, j in pairs)
    more = max(shape[1] - shape[0], 0)  # columns that no rows can make orthonormal
    torch.testing.assert_close(float(orthogonality(change, squared=True).detach()), left - more)
    torch.testing.assert_close(float(orthogonality(change).detach()), (left - more) ** 0.5)
    plain = (change.T @ change - torch.eye(shape[1], dtype=DOUBLE)).square().sum()
    (expected,) = torch.autograd.grad(plain, change)
    (found,) = torch.autograd.grad(orthogonality(change, squared=True), change)
    torch.testing.assert_close(found, expected)


def test_nothing_is_left_of_orthonormal_columns_and_its_gradient_is_finite() -> None:
    columns = torch.linalg.qr(torch.randn(6, 3, dtype=DOUBLE))[0].requires_grad_()
    assert float(orthogonality(columns).detach()) < 1e-12
    nothing = torch.eye(3).requires_grad_()
    (gradient,) = torch.autograd.grad(orthogonality(nothing), nothing)
    assert not gradient.any()
    zeros = torch.zeros(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(orthogonality(zeros), zeros)
    assert torch.equal(gradient, torch.zeros(4, 2))


def test_mixed_precision_does_not_round_it() -> None:
    change = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonality(change), orthogonality(change.clone()))
        assert orthogonality(change.bfloat16()).dtype == torch.float32


REGIMES = {
    "direct": {},
    "selected": {"trainable": Matching("outer")},
    "linearised": {"linearized": True},
    "low rank": {"lora": LoRA(rank=2, on=Matching("weight"))},
}


@pytest.mark.parametrize("settings", REGIMES.values(), ids=REGIMES)
def test_it_is_about_what_trains(settings, module) -> None:
    tuned = module(penalty=OrthoReg(2.0, squared=True), **settings)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=DOUBLE))
    vector = dict(tuned.task_vector())
    names = [name for name, _ in tuned.parametrisation.departures()]
    assert names
    assert all(name.startswith("outer") for name in names) == ("trainable" in settings)
    for name, change in tuned.parametrisation.departures():
        torch.testing.assert_close(change.detach(), vector[name])
    expected = sum(float(orthogonality(vector[name], squared=True)) for name in names if vector[name].ndim == 2)
    found = tuned.penalty.of_module(tuned)
    torch.testing.assert_close(float(found.detach()), expected)
    found.backward()
    trained = [one for _, one in tuned.trainable_parameters() if one.ndim == 2]
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in trained)
    assert not any(update.requires_grad for _, update in updates(tuned.encoder))


def test_fit_is_the_plain_loop(module, tiny_encoder, tiny_head, tiny_data, silent_trainer) -> None:
    data = tiny_data(dtype=DOUBLE)
    settings = {"weight_decay": 0.0, "gradient_clip": 0.0}
    tuned = module(penalty=OrthoReg(0.5, start_step=1, names="weight"), **settings)
    silent_trainer(max_steps=3, precision="64-true").fit(tuned, datamodule=data)
    assert tuned.regime == "full, OrthoReg(weight=0.5, squared=False, start_step=1, names='weight')"
    encoder, head = tiny_encoder(dtype=DOUBLE), tiny_head(dtype=DOUBLE)
    start = copy.deepcopy(dict(encoder.named_parameters()))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.03, eps=1e-6, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for step, batch in enumerate(data.batches[:3]):
        loss = F.cross_entropy(head(encoder(batch.images)), batch.labels)
        for name, parameter in encoder.named_parameters() if step else ():
            if parameter.ndim == 2 and "weight" in name:
                change = parameter - start[name]
                gram = change.T @ change if change.shape[0] >= change.shape[1] else change @ change.T
                loss = loss + 0.5 * torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=DOUBLE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for name, tensor in encoder.named_parameters():
        torch.testing.assert_close(tuned.encoder.get_parameter(name), tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OrthoReg(-1.0), "penalty.weight: expected a finite number at least 0, got -1"),
        (lambda: OrthoReg(start_step=-1), "penalty.start_step: expected a whole number of at least 0, got -1"),
        (lambda: OrthoReg(names="("), r"penalty.names: expected a regular expression, got '\('"),
    ],
)
def test_refused_settings(build, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_it_needs_a_matrix(module) -> None:
    tuned = module(penalty=OrthoReg(names="^nothing$"))
    with pytest.raises(ConfigurationError, match=r"expected weight matrices .* names of \^nothing\$, got none"):
        tuned.penalty.of_module(tuned)
    assert isinstance(tuned.head, nn.Linear)
