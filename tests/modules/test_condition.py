"""Conditioning of a task vector: the objective against its definition, length and confidence after a fit, headers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from lit_merge import FineTuneModule, TaskVector
from lit_merge.callbacks import ExtractTaskVector
from lit_merge.commands.inspect import inspect
from lit_merge.errors import ConfigurationError
from lit_merge.models import LoRA, Matching
from lit_merge.models.merging.cautions import training_cautions
from lit_merge.modules import ConditionModule
from lit_merge.modules.condition import distillation


@pytest.fixture
def vector(tiny_encoder, tmp_path):
    """Files of a vector, and of one a fifth as long."""
    draw = torch.Generator().manual_seed(4)
    shapes = {name: own.shape for name, own in tiny_encoder(dtype=torch.float64).named_parameters()}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    for name, factor in (("long", 1.0), ("short", 0.2)):
        TaskVector({n: factor * one for n, one in tensors.items()}, name).save(tmp_path / f"{name}.safetensors")
    return {name: str(tmp_path / f"{name}.safetensors") for name in ("long", "short")}


def test_distillation_is_its_definition():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    for first, second in ((10.0, 10.0), (1.0, 10.0)):
        total = 0.0
        for row in range(3):
            wanted = [math.exp(one / first) for one in teacher[row].tolist()]
            found = [math.exp(one / second) for one in student[row].tolist()]
            p, q = ([one / sum(many) for one in many] for many in (wanted, found))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        counted = torch.tensor([True, True, True, False])
        value = distillation(student, teacher, (first, second), counted)
        assert float(value) == pytest.approx(first * second * total / 3, rel=1e-4)


def test_distillation_of_next_tokens_is_the_mean_of_every_examples_own_positions():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    lengths = (4, 1, 2)
    for logits in (student, teacher):
        for row, length in enumerate(lengths):
            logits[row, length:] = 0  # as where nothing is predicted
    alone = [
        distillation(student[row, :length], teacher[row, :length], (2.0, 3.0)) for row, length in enumerate(lengths)
    ]
    counted = torch.tensor([True, True, False])
    assert float(distillation(student, teacher, (2.0, 3.0))) == pytest.approx(float(sum(alone)) / 3, rel=1e-6)
    assert float(distillation(student, teacher, (2.0, 3.0), counted)) == pytest.approx(float(sum(alone[:2])) / 2)


@pytest.mark.parametrize("linearized", [False, True])
def test_the_gradient_is_that_of_teacher_student_and_anchor(
    vector, tiny_encoder, tiny_head, tiny_batches, linearized, silent_trainer, tiny_data
):
    encoder, head = tiny_encoder(dtype=torch.float64), tiny_head(dtype=torch.float64)
    module = ConditionModule(
        vector["long"], scale=0.5, anchor=0.3, temperatures=(2.0, 4.0), encoder=tiny_encoder(dtype=torch.float64),
        head=tiny_head(dtype=torch.float64), linearized=linearized,
    )  # fmt: skip
    module.on_fit_start()
    (batch,) = tiny_batches(1)
    batch = batch.to(torch.float64) if hasattr(batch, "double") else batch
    images = batch.images.double()
    batch = type(batch)(images, batch.labels, batch.indices)
    with torch.no_grad():  # away from where it started
        for own in module.encoder.parameters():
            own.add_(0.05)
    loss = module.compute_loss(module.classify(*module.inputs(batch)), batch)
    loss.backward()
    base = {name: own.detach() for name, own in encoder.named_parameters()}
    tau = dict(TaskVector.load(vector["long"]))
    student = {name: (base[name] + 0.5 * tau[name] + 0.05).requires_grad_() for name in base}

    def logits(weights):
        if not linearized:
            return head(functional_call(encoder, weights, (images,)))
        moves = tuple(weights[name] - base[name] for name in base)
        value, tangent = torch.func.jvp(
            lambda *given: functional_call(encoder, dict(zip(base, given, strict=True)), (images,)),
            tuple(base.values()), moves,
        )  # fmt: skip
        return head(value + tangent)

    teacher = logits({name: base[name] + tau[name] for name in base}).detach()
    p, q = (teacher / 2).softmax(-1), (logits(student) / 4).softmax(-1)
    expected = 8 * (p * (p.log() - q.log())).sum(-1).mean()
    expected = expected + 0.3 * sum((student[n] - base[n] - 0.5 * tau[n]).square().sum() for n in base)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    for name, own in module.encoder.named_parameters():
        torch.testing.assert_close(own.grad, student[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_teacher_and_start_have_the_trainers_precision(
    precision, dtype, linearized, vector, tiny_encoder, tiny_head, silent_trainer, tiny_data
):
    module = ConditionModule(
        vector["long"], scale=0.5, encoder=tiny_encoder(), head=tiny_head(), linearized=linearized, learning_rate=0.01
    )
    trainer = silent_trainer(max_steps=2, precision=precision)
    trainer.fit(module, datamodule=tiny_data(dtype=dtype))
    assert {one.dtype for held in (module._teacher, module._start) for one in held.values()} == {dtype}
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_long_vector_becomes_as_long_as_the_others(
    vector, tiny_encoder, tiny_head, tiny_data, silent_trainer, tmp_path
):
    module = ConditionModule(
        vector["long"],
        others=[vector["short"]],
        anchor=0.01,
        learning_rate=0.01,
        encoder=tiny_encoder(),
        head=tiny_head(),
    )
    assert module.scale == pytest.approx(0.2)
    teacher, start = (module._teacher.copy(), module._start.copy())
    trainer = silent_trainer(callbacks=[ExtractTaskVector()], max_epochs=3)
    trainer.fit(module, datamodule=tiny_data())
    found = TaskVector.load(tmp_path / "run/task_vector.safetensors")
    long, short = (TaskVector.load(vector[name]).norm() for name in ("long", "short"))
    assert short / 2 < found.norm() < long / 2
    assert "conditioned(scale=0.2, temperatures=(10, 10), anchor=0.01)" in found.metadata["regime"]
    images = torch.cat([batch.images for batch in tiny_data().batches])

    def scores(weights):
        encoder = tiny_encoder()
        return tiny_head()(functional_call(encoder, {n: one.cpu() for n, one in weights.items()}, (images,)))

    wanted = scores(teacher)
    after = distillation(scores(dict(module.encoder.named_parameters())), wanted, (10.0, 10.0))
    assert after < 0.7 * distillation(scores(start), wanted, (10.0, 10.0))


def test_refused(vector, tiny_encoder, tiny_head, tmp_path):
    TaskVector({n: 0 * one for n, one in TaskVector.load(vector["long"]).items()}, "z").save(tmp_path / "z.safetensors")
    for settings, said in (
        ({"scale": 0.0}, r"scale and others: expected a positive number, .* got scale 0.0\. Change"),
        ({"scale": 1.0, "others": [vector["short"]]}, "whose mean norm is wanted, got both"),
        ({"temperatures": (1.0, 0.0)}, r"temperatures: expected two positive numbers, .* got \(1.0, 0.0\)"),
        ({"anchor": -1.0}, "anchor: expected a number in"),
        ({"label_smoothing": 0.1}, "label_smoothing: expected none, as a task vector is distilled, got 0.1"),
        ({"lora": LoRA(2, on=Matching("weight"))}, "parametrisation: expected all weights to distil into"),
        ({"task_vector": str(tmp_path / "z.safetensors")}, "task_vector: expected one that is not zero, got zeros"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            ConditionModule(
                **{"task_vector": vector["long"], "encoder": tiny_encoder(), "head": tiny_head(), **settings}
            )


def test_what_training_says_of_confidence_is_in_the_header_and_warned_of(
    tiny_encoder, tiny_head, tiny_data, silent_trainer, tmp_path, capsys
):
    module = FineTuneModule(encoder=tiny_encoder(), head=tiny_head(), learning_rate=0.1, label_smoothing=0.2)
    silent_trainer(callbacks=[ExtractTaskVector()], max_epochs=1).fit(module, datamodule=tiny_data())
    path = tmp_path / "run/task_vector.safetensors"
    header = TaskVector.load(path).metadata
    assert header["label_smoothing"] == "0.2"
    confidence, accuracy = float(header["confidence"]), float(header["train_accuracy"])
    assert 1 / 3 <= confidence <= 1
    assert 0 <= accuracy <= 1
    (line,) = inspect(str(path)).warnings
    assert line == (
        f"shapes was trained with label smoothing 0.2, its mean confidence was {confidence:.2f} at the end: models of "
        "low confidence lose most when they are merged. Distil it first (ConditionModule, temperatures [1, 10]), or "
        "train without."
    )
    capsys.readouterr()
    (line,) = training_cautions({"confidence": "0.61", "train_accuracy": "0.93"}, "a")
    assert line.startswith("a has low confidence: 0.61 on average at the end of training, at an accuracy of 0.93: such")
    for fine in ({}, {"confidence": "0.9", "train_accuracy": "0.95"}, {"label_smoothing": "none", "confidence": "0.1"}):
        assert training_cautions(fine, "a") == []
