"""The LightningModules against plain loops, closed forms and every refusal."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.data.batch import ImageBatch
from lit_merge.errors import (
    ConfigurationError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.functional.attention import fast_attention
from lit_merge.models import Preprocessing, ZeroShotHead, load_clip
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.modules.pretrain import ContrastiveModule, multi_positive_contrastive_loss
from lit_merge.modules.protocol import warm_up_cosine
from lit_merge.vectors import TaskVector, write_tensors

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


def test_batch_normalisation_keeps_its_statistics(module, tiny_encoder, tiny_data, silent_trainer):
    width = tiny_encoder()(torch.zeros(1, 3, 4, 4)).shape[1]
    encoder = nn.Sequential(tiny_encoder(), nn.BatchNorm1d(width))
    tuned = module(encoder=encoder)
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    silent_trainer(max_steps=3).fit(tuned.train(), datamodule=tiny_data())
    assert_same(dict(encoder.named_buffers()), buffers)
    assert "1.weight" in tuned.task_vector()


def plain_loop(encoder, heads, steps, clip=1.0, warm_up=0.1, smoothing=0.0):
    """The papers' protocol without lit-merge; ``steps`` are lists of (head's name, images, labels)."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=RATE, eps=1e-6, weight_decay=DECAY)
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
    half = [
        ImageBatch(batch.images, torch.where(torch.arange(8) < 5, batch.labels, -1), batch.indices)
        for batch in data.batches
    ]
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


def test_setting_up_does_not_run_the_encoder(module, tiny_data, silent_trainer):
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(10), nn.Linear(10, 6))
    data = tiny_data([ImageBatch(torch.randn(8, 10), torch.zeros(8).long(), torch.arange(8))])
    del data.classes
    tuned = module(encoder=encoder)  # an encoder that takes no images of 4 pixels, under data that name no classes
    silent_trainer(max_steps=1).fit(tuned, datamodule=data)
    assert int(encoder[1].num_batches_tracked) == 0  # batch normalisation is frozen, too


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


class InterruptedRunError(Exception):
    pass


class Interrupt(L.Callback):
    """Ends a run the hard way after a number of batches."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.after:
            raise InterruptedRunError


@pytest.fixture
def run(silent_trainer):
    """``run(module, data, **settings)``: the encoder at the end, each batch's loss, the trainer; or an interruption."""

    def fit(tuned, data, resume=None, **settings):
        trainer = silent_trainer(max_epochs=3, limit_val_batches=1, **settings)
        losses = []
        tuned.on_train_batch_end = lambda outputs, batch, batch_idx: losses.append(float(outputs["loss"]))
        try:
            trainer.fit(tuned, datamodule=data, ckpt_path=resume, weights_only=resume and True)
        except InterruptedRunError:
            assert "callbacks" in settings
        return values(tuned.encoder), losses, trainer

    return fit


def checkpoints(folder, every=1):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


@pytest.mark.parametrize(
    ("after", "accumulate", "workers"),
    [(2, 1, 0), (4, 1, 0), (6, 1, 0), (9, 1, 0), (12, 1, 0), (4, 2, 0), (6, 2, 0), (9, 2, 0), (6, 1, 1), (9, 2, 1)],
)
def test_a_resumed_run_ends_where_the_whole_one_does(after, accumulate, workers, module, image_folder, run, tmp_path):
    """Interrupted ``after`` so many batches, of which there are six in an epoch."""

    def data():
        return TaskDataModule(path=images, batch_size=4, workers=workers)

    images, settings = image_folder(), {"accumulate_grad_batches": accumulate}
    whole, losses, _ = run(module(), data(), **settings)
    assert len(losses) == 18
    callbacks = [checkpoints(tmp_path, 2 // accumulate), Interrupt(after)]
    _, first, trainer = run(module(), data(), callbacks=callbacks, enable_checkpointing=True, **settings)
    assert trainer.global_step == after // accumulate
    kept = after - after % 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        resumed, second, _ = run(module(), data(), tmp_path / f"step={kept // accumulate}.ckpt", **settings)
    assert first[:kept] + second == losses
    assert_same(resumed, whole)


@pytest.mark.parametrize("after", [1, 3, 5, 6, 8])
def test_a_resumed_joint_run_ends_where_the_whole_one_does(after, tiny_encoder, tiny_head, image_folder, run, tmp_path):
    """With six batches of one task and two of the other, which starts again twice in an epoch."""

    def module():
        heads = {"many": tiny_head(), "few": tiny_head(seed=2)}
        size = Preprocessing(image_size=4)
        return MultiTaskModule(encoder=tiny_encoder(), heads=heads, preprocessing=size, learning_rate=RATE)

    def data():
        return MultiTaskDataModule(paths=paths, batch_size=4)

    paths = {"many": image_folder(8), "few": image_folder(3)}
    whole, losses, _ = run(module(), data())
    assert len(losses) == 18
    _, first, _ = run(module(), data(), callbacks=[checkpoints(tmp_path), Interrupt(after)], enable_checkpointing=True)
    resumed, second, _ = run(module(), data(), tmp_path / f"step={after}.ckpt")
    assert first + second == losses
    assert_same(resumed, whole)


def test_a_resumed_run_reports_on_the_right_step(module, tiny_data, silent_trainer, tmp_path):
    """The rate goes on where it was, and θ0 is still the base."""
    tuned = module()
    trainer = silent_trainer(max_steps=6)
    trainer.fit(tuned, datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again, rates = module(), []
    again.on_train_batch_start = lambda batch, batch_idx: rates.append(again.optimizers().param_groups[0]["lr"])
    silent_trainer(max_steps=12).fit(again, datamodule=tiny_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    factor = warm_up_cosine(1, 12)
    assert rates[1:] == [pytest.approx(RATE * factor(step)) for step in range(7, 12)]
    assert_same(again.initial_parameters, values(module().encoder))


@pytest.fixture
def clip_data(tiny_data):
    def build(classes=("disc", "ring", "star"), name="shapes", seed=2):
        return tiny_data(name=name, classes=classes, side=32, size=6, count=3, seed=seed)

    return build


@pytest.fixture
def clip_module(clip_config, clip_weights, own_cache):
    def build(kind=FineTuneModule, **settings):
        return kind(**{"model": clip_config, "pretrained": clip_weights, "learning_rate": 1e-3, **settings})

    return build


def test_a_checkpoint_opens_without_its_data_and_the_files_it_began_with(
    clip_module, clip_data, silent_trainer, tmp_path, monkeypatch
):
    first = clip_module()
    silent_trainer(max_steps=1).fit(first, datamodule=clip_data())
    begin = tmp_path / "begin.safetensors"
    TaskVector(first.task_vector(), metadata=first.base_description()).save(begin)
    tuned, trainer = clip_module(task_vector=str(begin)), silent_trainer(max_steps=2)
    trainer.fit(tuned, datamodule=clip_data())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    begin.unlink()
    opened = FineTuneModule.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True)
    assert opened.classes == ("disc", "ring", "star")
    assert_same(opened.state_dict(), tuned.state_dict())
    assert_same(opened.task_vector(), tuned.task_vector())
    assert opened.learning_rate == 1e-3
    images = clip_data().batches[0].images
    with torch.no_grad():
        assert torch.equal(opened.classify(images), tuned.classify(images))
    # On other data the head is another one, of the same size or not.
    monkeypatch.setattr(
        opened, "make_head", lambda task: ZeroShotHead(torch.eye(len(task.classes), 12), 1.0, task.classes)
    )
    for classes in (("x", "y", "z"), ("cube", "cone")):
        silent_trainer().test(opened, datamodule=clip_data(classes), verbose=False)
        assert opened.head.classes == opened.classes == classes


def test_the_head_is_the_zero_shot_head_of_the_data(clip_module, clip_data, silent_trainer, clip_config, clip_weights):
    tuned, data = clip_module(), clip_data()
    silent_trainer().validate(tuned, datamodule=data, verbose=False)
    clip = load_clip(clip_config, clip_weights)
    embedded = [clip.encode_text([text.format(name) for text in data.templates]).mean(0) for name in data.classes]
    with torch.no_grad():
        features = F.normalize(clip.visual(data.batches[0].images), dim=1)
        expected = clip.logit_scale * features @ F.normalize(torch.stack(embedded), dim=1).T
        torch.testing.assert_close(tuned.classify(data.batches[0].images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FineTuneModule, MultiTaskModule])
def test_a_checkpoint_of_another_base_is_refused(kind, clip_module, clip_data, tiny_tasks, silent_trainer, tmp_path):
    data = clip_data() if kind is FineTuneModule else tiny_tasks({"shapes": clip_data()})
    trainer = silent_trainer(max_steps=1)
    trainer.fit(clip_module(kind), datamodule=data)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    torch.manual_seed(5)
    for use in (
        lambda: kind.load_from_checkpoint(tmp_path / "tuned.ckpt", pretrained="random", weights_only=True),
        lambda: silent_trainer().test(
            clip_module(kind, pretrained="random"),
            datamodule=data,
            ckpt_path=tmp_path / "tuned.ckpt",
            weights_only=True,
        ),
    ):
        with pytest.raises(StructureMismatchError) as error:
            use()
        assert_one_line(error, "checkpoint: expected one that started from tiny-clip", "fingerprint", "seed")


def test_a_checkpoint_of_other_classes_is_refused(clip_module, clip_data, tiny_tasks, silent_trainer, tmp_path):
    other = ("cube", "cone", "ball")
    for kind, data, strange in (
        (FineTuneModule, clip_data(), clip_data(other)),
        (MultiTaskModule, tiny_tasks({"shapes": clip_data()}), tiny_tasks({"shapes": clip_data(other)})),
    ):
        trainer = silent_trainer(max_steps=1)
        trainer.fit(clip_module(kind), datamodule=data)
        trainer.save_checkpoint(tmp_path / "tuned.ckpt")
        with pytest.raises(StructureMismatchError) as error:
            silent_trainer().test(
                clip_module(kind), datamodule=strange, ckpt_path=tmp_path / "tuned.ckpt", weights_only=True
            )
        assert_one_line(error, "the classes cube, cone, ball, got disc, ring, star")


# Starting from files


def saved(tensors, path, task="shapes", **metadata):
    TaskVector(tensors, task, metadata=metadata).save(path)
    return str(path)


def test_a_task_vector_starts_the_encoder_elsewhere(module, tiny_encoder, tmp_path):
    base = module()
    vector = {name: torch.full_like(tensor, 0.25) for name, tensor in base.initial_parameters.items()}
    path = saved(vector, tmp_path / "vector.safetensors", **base.base_description())
    moved = module(task_vector=path)
    assert_same(moved.initial_parameters, values(tiny_encoder()))
    assert_same(values(moved.encoder), {name: tensor + 0.25 for name, tensor in values(tiny_encoder()).items()})
    moved.load_task_vector(TaskVector.load(path), coefficient=-2.0)
    assert_same(values(moved.encoder), {name: tensor - 0.5 for name, tensor in values(tiny_encoder()).items()})


def test_whole_weights_start_the_encoder_elsewhere(module, tiny_encoder, clip_module, clip_weights, tmp_path):
    tensors = {name: tensor * 2 for name, tensor in values(tiny_encoder()).items()}
    save_file(tensors, tmp_path / "tower.safetensors")
    save_file({f"visual.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "clip.safetensors")
    for name in ("tower", "clip"):
        moved = module(weights=str(tmp_path / f"{name}.safetensors"))
        assert_same(values(moved.encoder), tensors)
        assert_same(moved.initial_parameters, values(tiny_encoder()))
    # A whole CLIP has a text tower, some of whose names are those of an image tower.
    whole = {name: tensor + 1 for name, tensor in load_file(clip_weights).items()}
    assert "positional_embedding" in whole
    save_file(whole, tmp_path / "whole.safetensors")
    moved = clip_module(weights=str(tmp_path / "whole.safetensors"))
    assert_same(
        dict(sorted(values(moved.encoder).items())),
        {name[7:]: tensor for name, tensor in sorted(whole.items()) if name.startswith("visual.")},
    )


def test_running_statistics_come_with_whole_weights(tmp_path):
    def build(**settings):
        torch.manual_seed(0)
        return FineTuneModule(encoder=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)), head=nn.Identity(), **settings)

    tensors = {name: tensor + 3 for name, tensor in values(build().encoder).items()}
    save_file(tensors, tmp_path / "tower.safetensors")
    assert_same(values(build(weights=str(tmp_path / "tower.safetensors")).encoder), tensors)


def test_files_that_do_not_fit_are_refused(module, tmp_path):
    base = module()
    fits = {name: torch.ones_like(tensor) for name, tensor in base.initial_parameters.items()}
    renamed = {name.replace("inner", "other"): tensor for name, tensor in fits.items()}
    broken = {**fits, "outer.bias": torch.full((6,), math.nan)}
    wide = {**fits, "outer.bias": torch.ones(7)}

    def write(content, kind):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(content, path) if kind == "weights" else saved(content, path)
        return {kind: str(path)}

    for settings, error_class, parts in (
        (write(renamed, "weights"), StructureMismatchError, ("2 missing (inner.weight, inner.bias)", "other.weight")),
        (write(wide, "weights"), StructureMismatchError, ("outer.bias (7,) instead of (6,)",)),
        (write(broken, "weights"), NonFiniteError, ("NaN or infinity in outer.bias",)),
        (write({"visual.a": torch.ones(2)}, "weights"), StructureMismatchError, ("missing", "unexpected (a)")),
        (write({}, "weights"), StructureMismatchError, ("4 missing",)),
    ):
        with pytest.raises(error_class) as error:
            module(**settings)
        assert_one_line(error, *parts)
    for settings, error_class, parts in (
        (
            write(renamed, "task_vector"),
            StructureMismatchError,
            ("other.bias, other.weight", "inner.weight"),
        ),
        (write(wide, "task_vector"), StructureMismatchError, ("outer.bias (7,) instead of (6,)",)),
    ):
        with pytest.raises(error_class) as error:
            module(**settings)
        assert_one_line(error, *parts)


def test_files_of_another_base_or_kind_are_refused(module, tmp_path):
    base = module()
    fits = {name: torch.ones_like(tensor) for name, tensor in base.initial_parameters.items()}
    other = saved(fits, tmp_path / "other.safetensors", base_fingerprint="0123456789abcdef", base_model="ViT-X")
    with pytest.raises(StructureMismatchError) as error:
        module(task_vector=other)
    assert_one_line(error, "shapes", "ViT-X (fingerprint 0123456789abcdef)", "TinyEncoder", base.base_fingerprint)
    with pytest.raises(StructureMismatchError) as error:
        module(weights=other)
    assert_one_line(error, "TinyEncoder", base.base_fingerprint, "0123456789abcdef")
    vector = saved(fits, tmp_path / "vector.safetensors", **base.base_description())
    with pytest.raises(FileFormatError) as error:
        module(weights=vector)
    assert_one_line(error, "got a task vector", "task_vector")
    save_file(fits, tmp_path / "weights.safetensors")
    with pytest.raises(FileFormatError) as error:
        module(task_vector=str(tmp_path / "weights.safetensors"))
    assert_one_line(error, "expected format lit-merge/task-vector/1", "got none")
    with pytest.raises(FileFormatError) as error:
        module(weights=str(tmp_path / "missing.safetensors"))
    assert_one_line(error, "missing.safetensors")
    with pytest.raises(ConfigurationError) as error:
        module(weights=vector, task_vector=vector)
    assert_one_line(error, "expected one of them, got both")


@pytest.mark.parametrize("kind", ["weights", "task_vector"])
def test_a_damaged_file_is_refused(kind, module, tmp_path):
    base = module()
    path = Path(saved(base.initial_parameters, tmp_path / "file.safetensors"))
    if kind == "weights":
        write_tensors(path, base.initial_parameters, base.base_description())
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as error:
        module(**{kind: str(path)})
    assert_one_line(error, "the file has changed since it was written")
    path.write_bytes(content[:-8])
    with pytest.raises(FileFormatError) as error:
        module(**{kind: str(path)})
    assert_one_line(error, "bytes according to the header")


# Settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("warmup_fraction", 1.0),
        ("gradient_clip", -1.0),
        ("label_smoothing", 1.0),
    ],
)
def test_numbers_out_of_range_are_refused(setting, value, module):
    with pytest.raises(ConfigurationError) as error:
        module(**{setting: value})
    assert_one_line(error, f"{setting}: expected a number in [0, ", f"got {value}")


def test_what_fit_cannot_do_is_refused(module, tiny_encoder, tiny_head, tiny_data, silent_trainer):
    loader = tiny_data().loader()
    headless = FineTuneModule(encoder=tiny_encoder())
    endless = silent_trainer(max_steps=-1, max_epochs=-1)
    several = MultiTaskModule(encoder=tiny_encoder(), heads={"shapes": tiny_head()})
    for fit, part in (
        (lambda: silent_trainer(max_steps=1).fit(headless, loader), "head: expected a data module with classes"),
        (lambda: endless.fit(module(), datamodule=tiny_data()), "Set max_steps or max_epochs"),
        (lambda: silent_trainer().test(several, loader), "data: expected a data module of several tasks, got none"),
        (lambda: silent_trainer().test(several, datamodule=tiny_data()), "got TinyData. Use MultiTaskDataModule"),
        (lambda: headless.make_head(None), "TinyEncoder, which is no CLIP"),
    ):
        with pytest.raises(ConfigurationError) as error:
            fit()
        assert_one_line(error, part)


def test_a_data_module_without_a_name_is_no_obstacle(module, tiny_data, silent_trainer, tmp_path):
    tuned = module()
    silent_trainer(max_steps=1, callbacks=[ExtractTaskVector()]).fit(tuned, datamodule=tiny_data(name=None))
    assert TaskVector.load(tmp_path / "run" / "task_vector.safetensors").task == ""


@pytest.mark.parametrize(("warm_up", "total"), [(0, 10), (3, 10), (9, 10), (10, 10), (1, 1), (0, 1)])
def test_warm_up_and_cosine(warm_up, total):
    factor = warm_up_cosine(warm_up, total)
    for step in range(warm_up):
        assert factor(step) == pytest.approx((step + 1) / warm_up)
    for step in range(warm_up, total):
        assert factor(step) == pytest.approx(math.cos(math.pi / 2 * (step - warm_up) / (total - warm_up)) ** 2)
    assert factor(warm_up) == 1
    assert all(factor(step) == pytest.approx(0, abs=1e-15) for step in (total + 1, 2 * total + 1))
    assert factor(total) == (1 if warm_up == total else pytest.approx(0, abs=1e-15))


@pytest.mark.parametrize(("scheduling", "steps"), [({0: 2}, 9), ({0: 1, 1: 4}, 10), ({2: 3}, 14)], ids=str)
def test_the_schedule_ends_with_a_run_that_accumulates_more_and_more(
    scheduling, steps, module, tiny_data, silent_trainer
):
    tuned = module()
    trainer = silent_trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler(scheduling)])
    trainer.fit(tuned, datamodule=tiny_data())
    assert trainer.global_step == steps
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [pytest.approx(0, abs=1e-15)]


# Several tasks

TASKS = {"shapes": 3, "train": 4, "road.signs": 2}  # two of these are no names for a torch module


@pytest.fixture
def several(tiny_encoder, tiny_head, tiny_data, tiny_tasks):
    """``several(dtype)``: a MultiTaskModule and its data."""

    def build(dtype=torch.float32, kind=tiny_tasks):
        heads = {name: tiny_head(classes, seed=classes, dtype=dtype) for name, classes in TASKS.items()}
        tuned = MultiTaskModule(encoder=tiny_encoder(dtype=dtype), heads=heads, learning_rate=RATE)
        data = {
            name: tiny_data(name=name, classes=list("abcd")[:classes], count=4, seed=classes, dtype=dtype)
            for name, classes in TASKS.items()
        }
        return tuned, kind(data), heads

    return build


def test_joint_fine_tuning_is_the_plain_loop(several, tiny_encoder, silent_trainer):
    tuned, data, heads = several(torch.float64)
    for part in data.tasks.values():
        part.batches[1].labels[:3] = -1
    silent_trainer(max_epochs=2, precision="64-true", limit_val_batches=0).fit(tuned, datamodule=data)
    steps = []
    for number in [*range(4), *range(4)]:
        parts = [(name, part.batches[number]) for name, part in data.tasks.items()]
        steps.append(
            [(name, batch.images[batch.labels >= 0], batch.labels[batch.labels >= 0]) for name, batch in parts]
        )
    expected = plain_loop(tiny_encoder(dtype=torch.float64), heads, steps)
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(tuned.encoder.get_parameter(name), tensor, rtol=0, atol=1e-10)
    assert_same(
        tuned.task_vector(), {n: t.detach() - tuned.initial_parameters[n] for n, t in tuned.encoder.named_parameters()}
    )
    assert tuned.task == "shapes+train+road.signs"


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_accuracies_are_those_counted_by_hand(split, several, silent_trainer):
    tuned, data, heads = several()
    expected = {}
    for name, part in data.tasks.items():
        part.batches[3].targets = torch.tensor([0, 1, 0, 1, 0, -1, -1, -1])
        part.batches.append(ImageBatch(torch.zeros(2, 3, 4, 4), torch.tensor([-1, -1]), torch.tensor([-1, -1])))
        right = counted = 0
        for images, labels, _ in part.batches:
            for image, label in zip(images, labels.tolist(), strict=True):
                if label >= 0:
                    right += int(heads[name](tuned.encoder(image[None])).argmax()) == label
                    counted += 1
        assert counted == 29
        expected[f"{split}/{name}/accuracy"] = right / counted
    expected[f"{split}/accuracy"] = sum(expected.values()) / 3
    trainer = silent_trainer()
    run = trainer.test if split == "test" else trainer.validate
    for _ in range(2):  # nothing is left of the run before
        assert run(tuned, datamodule=data, verbose=False) != []
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_task_without_validation_images_is_left_out_of_the_mean(several, tiny_tasks, silent_trainer):
    class Partly(tiny_tasks):
        def val_dataloader(self):
            batches = {name: [] if name == "train" else task.batches for name, task in self.tasks.items()}
            return [torch.utils.data.DataLoader(part, batch_size=None) for part in batches.values()]

    tuned, data, _ = several(kind=Partly)
    trainer = silent_trainer(max_epochs=1)
    trainer.fit(tuned, datamodule=data)
    found = trainer.callback_metrics
    assert "val/train/accuracy" not in found
    both = [float(found[f"val/{name}/accuracy"]) for name in ("shapes", "road.signs")]
    assert float(found["val/accuracy"]) == pytest.approx(sum(both) / 2)


def test_a_multi_task_checkpoint_opens_without_its_data(
    clip_module, clip_data, tiny_tasks, silent_trainer, tmp_path, monkeypatch
):
    data = tiny_tasks({"road.signs": clip_data(("give way", "stop")), "train": clip_data()})
    tuned, trainer = clip_module(MultiTaskModule), silent_trainer(max_steps=1)
    trainer.fit(tuned, datamodule=data)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    opened = MultiTaskModule.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True)
    assert_same(opened.state_dict(), tuned.state_dict())
    results = [silent_trainer().test(part, datamodule=data, verbose=False) for part in (tuned, opened)]
    assert results[0] == results[1]
    other = tiny_tasks({"train": clip_data(("cube", "cone"))})  # a task of the same name with other classes
    head = ZeroShotHead(torch.eye(2, 12), 1.0, ("cube", "cone"))
    monkeypatch.setattr(opened, "make_head", lambda task: head)
    found = silent_trainer().test(opened, datamodule=other, verbose=False)[0]
    images, labels = (torch.cat(parts) for parts in list(zip(*other.tasks["train"].batches, strict=True))[:2])
    with torch.no_grad():
        right = head(opened.encoder(images)).argmax(1) == labels
    assert found["test/train/accuracy"] == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_clip_trains_in_other_precisions(precision, clip_module, clip_data, tiny_tasks, silent_trainer):
    for kind, data in ((FineTuneModule, clip_data()), (MultiTaskModule, tiny_tasks({"shapes": clip_data()}))):
        tuned, trainer = clip_module(kind, learning_rate=1e-2), silent_trainer(max_steps=3, precision=precision)
        trainer.fit(tuned, datamodule=data)
        trainer.test(tuned, datamodule=data, verbose=False)
        assert {tensor.dtype for tensor in tuned.task_vector().values()} == {torch.float32}
        assert min(float(tensor.abs().max()) for tensor in tuned.task_vector().values()) > 1e-3


# The contrastive loss and the attention kernel


def test_the_contrastive_loss_term_by_term():
    torch.manual_seed(0)
    captions = torch.tensor([2, 0, 1, 2, 2, 0, 3])
    logits = torch.randn(7, 4, dtype=torch.float64) * 3
    images = sum(
        -math.log(math.exp(row[c]) / sum(map(math.exp, row))) for row, c in zip(logits.tolist(), captions, strict=True)
    )
    texts = 0.0
    for caption, column in enumerate(logits.T.tolist()):
        total = sum(math.exp(value) for value in column)
        having = [index for index in range(7) if captions[index] == caption]
        texts += sum(-math.log(math.exp(column[index]) / total) for index in having) / len(having)
    expected = (images / 7 + texts / 4) / 2
    assert float(multi_positive_contrastive_loss(logits, captions)) == pytest.approx(expected, abs=1e-12)


def test_with_distinct_captions_it_is_clips_loss():
    torch.manual_seed(0)
    logits, order = torch.randn(9, 9, dtype=torch.float64) * 4, torch.randperm(9)
    square = logits[:, order]
    labels = torch.arange(9)
    clips = (F.cross_entropy(square, labels) + F.cross_entropy(square.T, labels)) / 2
    assert float(multi_positive_contrastive_loss(logits, order)) == pytest.approx(float(clips), abs=1e-12)


def test_pre_training_writes_a_clip(clip_config, silent_trainer, tmp_path):
    path = tmp_path / "clip.safetensors"
    tuned = ContrastiveModule(clip_config, output=str(path), warmup_steps=1)
    batches = []
    for _ in range(2):
        tokens = tuned.tokenizer(["a red disc", "a blue ring"])
        batches.append((torch.randn(6, 3, 32, 32), tokens, torch.tensor([0, 1, 0, 0, 1, 1])))
    silent_trainer(max_epochs=1).fit(tuned, torch.utils.data.DataLoader(batches, batch_size=None))
    clip = load_clip(clip_config, str(path))
    trained = dict(tuned.clip.visual.named_parameters())
    for name, tensor in clip.visual.named_parameters():
        torch.testing.assert_close(tensor, trained[name].half().float(), rtol=0, atol=0)
    assert clip.logit_scale <= 50.001


def sdpa_settings():
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_fast_attention_computes_the_same_and_leaves_no_trace(clip_config, clip_weights):
    visual = load_clip(clip_config, clip_weights).visual
    images, before = torch.randn(3, 3, 32, 32), sdpa_settings()
    expected = visual(images)
    gradient = torch.autograd.grad(expected.square().sum(), list(visual.parameters()))
    with fast_attention(images.device):
        assert sdpa_settings() == (False, True, False, False)
        features = visual(images)
    assert sdpa_settings() == before
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    for found, wanted in zip(
        torch.autograd.grad(features.square().sum(), list(visual.parameters())), gradient, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), fast_attention(images.device):  # evaluation is best left alone
        assert sdpa_settings() == before
    with fast_attention(torch.device("cuda")):
        assert sdpa_settings() == before
    with pytest.raises(ValueError, match="inside"), fast_attention(images.device):
        raise ValueError("inside")
    assert sdpa_settings() == before
