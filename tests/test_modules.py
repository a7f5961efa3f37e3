"""The LightningModules against plain loops, closed forms and every refusal."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data import TaskDataModule
from lit_merge.data.batch import ImageBatch
from lit_merge.errors import (
    ConfigurationError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.models import Preprocessing, load_clip
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.modules.attention import fast_attention
from lit_merge.modules.pretrain import ContrastiveModule, multi_positive_contrastive_loss
from lit_merge.modules.protocol import warm_up_cosine
from lit_merge.vectors import TaskVector

STEPS, RATE, DECAY, SMOOTHING = 12, 0.03, 0.1, 0.1


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a FineTuneModule around the tiny encoder."""

    def build(kind=FineTuneModule, encoder=None, head=None, dtype=torch.float32, learning_rate=RATE, **settings):
        return kind(
            encoder=encoder or tiny_encoder(dtype=dtype),
            head=head or tiny_head(dtype=dtype),
            preprocessing=Preprocessing(image_size=4),
            learning_rate=learning_rate,
            **settings,
        )

    return build


def values(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_one_line(error, *parts):
    text = str(error.value)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in text
    for part in parts:
        assert part in text


# One task


def test_the_task_vector_is_what_fit_changed(module, tiny_encoder, tiny_data, silent_trainer):
    tuned = module()
    start, head = values(tuned.encoder), values(tuned.head)
    silent_trainer(max_steps=STEPS).fit(tuned, datamodule=tiny_data())
    vector, end = tuned.task_vector(), values(tuned.encoder)
    assert_same(tuned.initial_parameters, values(tiny_encoder()))
    assert_same(vector, {name: end[name] - start[name] for name in start})
    assert all(tensor.abs().max() > 1e-3 for tensor in vector.values())
    assert_same(values(tuned.head), head)
    assert not any(parameter.requires_grad for parameter in tuned.head.parameters())
    assert (tuned.task, tuned.classes) == ("shapes", ("a", "b", "c"))


def plain_loop(encoder, heads, steps, clip=1.0, warm_up=0.1, smoothing=0.0):
    """The papers' protocol without lit-merge; ``steps`` are lists of (head's name, images, labels)."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=RATE, weight_decay=DECAY)
    rising = round(warm_up * len(steps))
    for number, parts in enumerate(steps):
        falling = 0.5 + 0.5 * math.cos(math.pi * (number - rising) / (len(steps) - rising))
        optimizer.param_groups[0]["lr"] = RATE * ((number + 1) / rising if number < rising else falling)
        losses = [
            F.cross_entropy(heads[task](encoder(images)), labels, label_smoothing=smoothing)
            for task, images, labels in parts
        ]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        if clip:
            nn.utils.clip_grad_norm_(encoder.parameters(), clip)
        optimizer.step()
    return encoder


@pytest.mark.parametrize("clip", [0.3, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("warm_up", [0.0, 0.25], ids=["at once", "warmed up"])
def test_fit_is_the_plain_loop(clip, warm_up, module, tiny_encoder, tiny_head, tiny_data, silent_trainer):
    data = tiny_data(dtype=torch.float64)
    tuned = module(dtype=torch.float64, label_smoothing=SMOOTHING, gradient_clip=clip, warmup_fraction=warm_up)
    silent_trainer(max_steps=STEPS, precision="64-true").fit(tuned, datamodule=data)
    steps = [[("only", batch.images, batch.labels)] for batch in (data.batches * 2)[:STEPS]]
    head = tiny_head(dtype=torch.float64)
    expected = plain_loop(tiny_encoder(dtype=torch.float64), {"only": head}, steps, clip, warm_up, SMOOTHING)
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(tuned.encoder.get_parameter(name), tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("own", "trainers", "limit"), [(0.0, None, math.inf), (0.01, None, 0.01), (5.0, 0.01, 0.01), (0.01, 0.0, math.inf)]
)
def test_the_trainers_own_clipping_wins(own, trainers, limit, module, tiny_data, silent_trainer):
    tuned = module(gradient_clip=own)
    before = []
    tuned.on_before_optimizer_step = lambda optimizer: before.append(gradient_norm(tuned.encoder))
    silent_trainer(max_steps=1, gradient_clip_val=trainers).fit(tuned, datamodule=tiny_data())
    assert before[0] > 0.02
    assert gradient_norm(tuned.encoder) == pytest.approx(min(limit, before[0]), rel=1e-3)


def gradient_norm(network):
    return float(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm())


@pytest.mark.parametrize(
    "settings",
    [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"precision": "64-true"}, {"precision": "bf16-true"}],
    ids=str,
)
def test_the_trainers_settings_work(settings, module, tiny_data, silent_trainer):
    tuned = module()
    trainer = silent_trainer(max_epochs=2, **settings)
    trainer.fit(tuned, datamodule=tiny_data(count=7))
    assert trainer.global_step == (6 if "accumulate_grad_batches" in settings else 14)
    vector = tuned.task_vector()
    assert {tensor.dtype for tensor in vector.values()} == {torch.float32}
    assert all(tensor.abs().max() > 1e-3 for tensor in vector.values())
    assert trainer.test(tuned, datamodule=tiny_data(), verbose=False)[0]["test/accuracy"] > 0.3


def test_accumulated_gradients_are_those_of_the_large_batch(module, tiny_data, silent_trainer):
    small = tiny_data(count=6, dtype=torch.float64)
    large = [
        ImageBatch(*map(torch.cat, zip(*small.batches[start : start + 3], strict=True))) for start in range(0, 6, 3)
    ]
    ends = []
    for data, settings in ((small, {"accumulate_grad_batches": 3}), (tiny_data(large), {})):
        tuned = module(dtype=torch.float64)
        silent_trainer(max_epochs=2, precision="64-true", **settings).fit(tuned, datamodule=data)
        ends.append(values(tuned.encoder))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-12)


class Squared(FineTuneModule):
    """Regresses the one-hot labels."""

    def compute_loss(self, logits, batch):
        return F.mse_loss(logits, F.one_hot(batch.labels, 3).to(logits.dtype))


def test_another_objective_is_one_method(module, tiny_encoder, tiny_head, tiny_data, silent_trainer):
    data = tiny_data(dtype=torch.float64)
    tuned = module(Squared, dtype=torch.float64, weight_decay=0.0)
    silent_trainer(max_steps=1, precision="64-true").fit(tuned, datamodule=data)
    expected, (images, labels, _) = tiny_encoder(dtype=torch.float64), data.batches[0]
    F.mse_loss(tiny_head(dtype=torch.float64)(expected(images)), F.one_hot(labels, 3).double()).backward()
    for name, tensor in tuned.task_vector().items():  # Adam's first step is the gradient's sign
        assert torch.equal(tensor.sign(), -expected.get_parameter(name).grad.sign()), name


def test_a_loss_that_is_not_a_number_stops_the_run(module, tiny_data, silent_trainer, tmp_path):
    data = tiny_data()
    data.batches[2].images[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError) as error:
        silent_trainer(max_steps=STEPS, callbacks=[ExtractTaskVector()]).fit(module(), datamodule=data)
    assert_one_line(error, "got nan at step 2", "Lower learning_rate")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_images_without_a_class_do_not_count(module, tiny_data, silent_trainer):
    data = tiny_data(count=2)
    known = [batch.labels.clone() for batch in data.batches]
    half = [batch._replace(labels=torch.where(torch.arange(8) < 5, batch.labels, -1)) for batch in data.batches]
    first_five = [ImageBatch(*(part[:5] for part in batch)) for batch in data.batches]
    padding = ImageBatch(torch.zeros(8, 3, 4, 4), torch.full((8,), -1), torch.full((8,), -1))
    results, ends = [], []
    for batches in (half, first_five):
        tuned = module()
        silent_trainer(max_steps=2).fit(tuned, datamodule=tiny_data(batches))
        ends.append(values(tuned.encoder))
        evaluated = tiny_data([*batches, padding] if batches is half else batches)
        results.append(silent_trainer().test(tuned, datamodule=evaluated, verbose=False)[0])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = torch.cat([tuned.classify(batch.images[:5]) for batch in data.batches])
    labels = torch.cat([part[:5] for part in known])
    expected = {
        "test/accuracy": float((logits.argmax(1) == labels).double().mean()),
        "test/loss": float(F.cross_entropy(logits, labels)),
    }
    assert results == [pytest.approx(expected, abs=1e-6)] * 2


def test_a_frozen_head_does_not_move_at_all(module, tiny_data, silent_trainer):
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    head[0].running_mean.fill_(0.1)
    before = values(head)
    tuned = module(head=head)
    silent_trainer(max_steps=2).fit(tuned, datamodule=tiny_data())
    assert_same(values(tuned.head), before)


def test_the_encoders_running_statistics_are_not_touched_before_the_first_batch(module, tiny_data, silent_trainer):
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(10), nn.Linear(10, 6))
    data = tiny_data([ImageBatch(torch.randn(8, 10), torch.zeros(8).long(), torch.arange(8))])
    del data.classes
    tuned = module(encoder=encoder)  # an encoder that takes no images of 4 pixels, under data that name no classes
    silent_trainer(max_steps=1).fit(tuned, datamodule=data)
    assert int(encoder[1].num_batches_tracked) == 1


def test_predictions_are_probabilities(module, tiny_data, silent_trainer):
    data = tiny_data()
    predictions = silent_trainer().predict(module(), datamodule=data)
    assert torch.equal(torch.cat([part["indices"] for part in predictions]), torch.arange(48))
    probabilities = torch.cat([part["probabilities"] for part in predictions])
    assert probabilities.shape == (48, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(48))
    with torch.no_grad():
        expected = module().classify(torch.cat([batch.images for batch in data.batches])).softmax(1)
    torch.testing.assert_close(probabilities, expected)


# Checkpoints


class Interrupted(Exception):
    pass


class Interrupt(L.Callback):
    """Ends a run the hard way after a number of batches."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.after:
            raise Interrupted


@pytest.fixture
def folder(tmp_path):
    """Three classes of eight random images: six batches of four, in another order every epoch."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("disc", "ring", "star"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = torch.randint(256, (6, 6, 3), dtype=torch.uint8, generator=generator).numpy()
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return str(tmp_path / "images")


@pytest.mark.parametrize("after", [2, 4, 6, 9, 12], ids=lambda after: f"after {after} of 6")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_where_the_whole_one_does(after, accumulate, module, folder, silent_trainer, tmp_path):
    def fit(**settings):
        tuned = module()
        trainer = silent_trainer(max_epochs=3, accumulate_grad_batches=accumulate, limit_val_batches=1, **settings)
        losses = []
        tuned.on_train_batch_end = lambda outputs, batch, batch_idx: losses.append(float(outputs["loss"]))
        try:
            trainer.fit(tuned, datamodule=TaskDataModule(path=folder, batch_size=4), **resume)
        except Interrupted:
            assert "callbacks" in settings
        return values(tuned.encoder), losses, trainer

    resume = {}
    whole, losses, _ = fit()
    assert len(losses) == 18
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2 // accumulate, save_top_k=-1)
    _, first, trainer = fit(callbacks=[saving, Interrupt(after)], enable_checkpointing=True)
    assert trainer.global_step == after // accumulate
    path = tmp_path / f"step={(after - after % 2) // accumulate}.ckpt"
    resume = {"ckpt_path": str(path), "weights_only": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        resumed, second, _ = fit()
    assert first[: after - after % 2] + second == losses
    assert_same(resumed, whole)
