"""Linearised, partial, low-rank, layer-wise and penalised training against plain loops with ``torch.func.jvp``."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lit_merge.callbacks import ExtractTaskVector
from lit_merge.commands.main import main
from lit_merge.data import TaskDataModule
from lit_merge.data.batch import ImageBatch, OtherBatch
from lit_merge.errors import ConfigurationError, LitMergeError, StructureMismatchError
from lit_merge.files.lazy import Computed
from lit_merge.metrics import TauJp, tau_jp_norms
from lit_merge.models import Preprocessing, load_clip
from lit_merge.models.lora import LoRA, updates
from lit_merge.models.rates import ExpLR, LinLR
from lit_merge.models.selection import All, Attention, LastBlocks, Matching
from lit_merge.modules import FineTuneModule, MultiTaskModule, TauJpPenalty
from lit_merge.modules.protocol import warm_up_cosine
from lit_merge.vectors import TaskVector

STEPS, RATE, DECAY = 7, 0.03, 0.1
ROOT = Path(__file__).parents[2]
OUTER, INNER, INNER_WEIGHT = Matching("outer"), Matching("inner"), Matching("inner.weight")
EXACT = {"precision": "64-true"}


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a FineTuneModule around the tiny encoder."""

    def build(kind=FineTuneModule, encoder=None, dtype=torch.float32, **settings):
        return kind(
            encoder=encoder or tiny_encoder(dtype=dtype),
            preprocessing=Preprocessing(image_size=4),
            **{"head": tiny_head(dtype=dtype), "learning_rate": RATE, **settings},
        )

    return build


@pytest.fixture
def clip_module(clip_config, clip_weights, few_images):
    """``clip_module(**settings)``: a FineTuneModule around the tiny CLIP."""

    def build(kind=FineTuneModule, **settings):
        return kind(**{"model": clip_config, "pretrained": clip_weights, "learning_rate": 1e-3, **settings})

    return build


@pytest.fixture
def clip_data(tiny_data):
    return lambda **settings: tiny_data(**{"side": 32, "size": 6, "count": 3, **settings})


class Beside(L.LightningDataModule):
    """Batches with images of three other tasks beside them, as :class:`lit_merge.data.TaskDataModule` has them."""

    name, classes, templates = "shapes", ("a", "b", "c"), ("{}",)
    others = (("disc", "ring"), ("cube", "cone", "ball"), ("wood", "wool", "sand", "snow"))

    def __init__(self, own, other):
        super().__init__()
        self.steps = [{"own": batch, "other": images} for batch, images in zip(own, other, strict=True)]
        tasks = [SimpleNamespace(classes=classes, templates=("{}",)) for classes in self.others]
        self.other_sources = dict(zip(("one", "two", "three"), tasks, strict=True))

    def train_dataloader(self):
        return DataLoader(self.steps, batch_size=None, collate_fn=lambda batch: batch)


@pytest.fixture
def beside(tiny_batches):
    """``beside(schedule, side=4, …)``: such data, float64; strict has two images of each task in a batch."""

    def build(schedule, side=4, steps=STEPS, dtype=torch.float64):
        own, images = (
            tiny_batches(steps, size=size, side=side, dtype=dtype, seed=seed) for size, seed in ((5, 2), (6, 3))
        )
        tasks = [torch.arange(6) // 2 if schedule == "strict" else torch.full((6,), step % 3) for step in range(steps)]
        other = [OtherBatch(batch.images, of, batch.indices) for batch, of in zip(images, tasks, strict=True)]
        return Beside(own, other)

    return build


def values(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_close(found, expected):
    """To ten digits, relative to the whole vector."""
    assert set(found) == set(expected)
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in found)
    assert difference <= 1e-20 * sum(float(tensor.square().sum()) for tensor in expected.values())
    assert all(bool(tensor.any()) for tensor in expected.values())


def assert_one_line(error, *parts):
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# Oracles


def plain_parts(encoder, initial, tau, images):
    """``f(x; θ0)`` and ``J τ`` by torch's own forward mode."""
    base = {name: initial[name] for name in tau}
    with sdpa_kernel(SDPBackend.MATH):  # the only one that torch differentiates so
        return jvp(lambda part: functional_call(encoder, {**initial, **part}, (images,)), (base,), (tau,))


def plain_loop(encoder, steps, linearized, names=None, penalty=None, heads=(), clip=1.0):
    """The protocol without lit-merge: the task vector of ``names``.

    ``steps`` are pairs: parts (head, images, labels), whose losses are averaged; and images of other tasks.
    """
    initial = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    start = {name: initial[name] * (0 if linearized else 1) for name in names or initial}
    trained = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, eps=1e-6, weight_decay=DECAY)
    rising = round(0.3 * len(steps))

    def parts(images):
        return plain_parts(encoder, initial, {name: trained[name] - start[name] for name in trained}, images)

    def features(images):
        return sum(parts(images)) if linearized else functional_call(encoder, {**initial, **trained}, (images,))

    for number, (own, other) in enumerate(steps):
        falling = 0.5 + 0.5 * math.cos(math.pi * (number - rising) / (len(steps) - rising))
        optimizer.param_groups[0]["lr"] = RATE * ((number + 1) / rising if number < rising else falling)
        losses = [F.cross_entropy(head(features(images)), labels) for head, images, labels in own]
        loss = sum(losses) / len(losses)
        if penalty is not None and number >= penalty.start_step:
            value, change = parts(other.images)
            if penalty.space == "logits":
                each = zip(value, change, other.tasks.tolist(), strict=True)
                change = [jvp(heads[task], (features,), (tangent,))[1] for features, tangent, task in each]
            norms = torch.stack([row.norm() for row in change])
            loss = loss + penalty.weight * (norms.square() if penalty.squared else norms).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), clip)
        optimizer.step()
    return {name: (trained[name] - start[name]).detach() for name in trained}


def moved(initial, tau):
    return {name: value + tau[name] for name, value in initial.items()}


class OwnHeads(FineTuneModule):
    """An encoder that is no CLIP, with heads for other tasks."""

    def make_head(self, task):
        torch.manual_seed(len(task.classes))
        return nn.Linear(6, len(task.classes), dtype=torch.float64)


def departure(tuned):
    """τ of what trained, unrounded."""
    if tuned.linearized:
        return {name: value.detach() for name, value in tuned.encoder.named_parameters()}
    initial = tuned.initial_parameters
    return {name: value.detach() - initial[name] for name, value in tuned.trainable_parameters()}


REGIMES = {
    "linearised": (True, None, None),
    "linearised, a part": (True, INNER, None),
    "linearised, cyclic": (True, None, TauJpPenalty("cyclic", weight=0.7)),
    "linearised, cyclic from step 3, squared": (True, None, TauJpPenalty("cyclic", 0.4, squared=True, start_step=3)),
    "linearised, strict": (True, None, TauJpPenalty("strict", weight=0.3)),
    "linearised, a part, strict, squared": (True, OUTER, TauJpPenalty("strict", weight=2.0, squared=True)),
    "linearised, logits": (True, None, TauJpPenalty("strict", weight=0.3, space="logits")),
    "direct, strict": (False, None, TauJpPenalty("strict", weight=0.3)),
    "direct, a part, cyclic from step 2, squared": (
        False,
        INNER,
        TauJpPenalty("cyclic", weight=0.5, squared=True, start_step=2),
    ),
    "direct, logits": (False, None, TauJpPenalty("cyclic", weight=0.3, space="logits")),
    "direct, weight 0": (False, None, TauJpPenalty("cyclic", weight=0.0)),
}


@pytest.mark.parametrize(("linearized", "trainable", "penalty"), REGIMES.values(), ids=REGIMES)
def test_fit_is_the_plain_loop(linearized, trainable, penalty, module, beside, tiny_encoder, tiny_head, silent_trainer):
    data = beside(penalty.schedule if penalty else "cyclic")
    settings = {"linearized": linearized, "trainable": trainable, "penalty": penalty, "warmup_fraction": 0.3}
    tuned = module(OwnHeads, dtype=torch.float64, gradient_clip=0.5, **settings)
    silent_trainer(max_steps=STEPS, **EXACT).fit(tuned, datamodule=data)
    encoder, head = tiny_encoder(dtype=torch.float64), tiny_head(dtype=torch.float64)
    steps = [([(head, step["own"].images, step["own"].labels)], step["other"]) for step in data.steps]
    names = [name for name, _ in encoder.named_parameters() if trainable is None or trainable.pattern in name]
    heads = [OwnHeads.make_head(None, SimpleNamespace(classes=classes)) for classes in Beside.others]
    assert_close(departure(tuned), plain_loop(encoder, steps, linearized, names, penalty, heads, clip=0.5))


CLIP_REGIMES = {
    "linearised, attention": (True, Attention(1), None),
    "linearised, attention, strict": (True, Attention(1), TauJpPenalty("strict", weight=0.3)),
    "linearised, logits": (True, LastBlocks(1), TauJpPenalty("cyclic", weight=0.01, space="logits")),
    "direct, attention": (False, Attention(1), None),
    "direct, attention, strict": (False, Attention(2), TauJpPenalty("strict", weight=0.3, squared=True)),
    "direct, logits": (False, LastBlocks(1), TauJpPenalty("strict", weight=0.01, space="logits")),
}


@pytest.mark.parametrize(("linearized", "trainable", "penalty"), CLIP_REGIMES.values(), ids=CLIP_REGIMES)
def test_fit_of_a_clip_is_the_plain_loop(
    linearized, trainable, penalty, clip_module, beside, clip_config, clip_weights, silent_trainer
):
    data = beside(penalty.schedule if penalty else "cyclic", side=32, steps=4)
    settings = {"linearized": linearized, "trainable": trainable, "penalty": penalty, "warmup_fraction": 0.3}
    tuned = clip_module(learning_rate=RATE, **settings)  # in float32: the trainer converts encoder and heads
    silent_trainer(max_steps=4, **EXACT).fit(tuned, datamodule=data)
    encoder = load_clip(clip_config, clip_weights).visual.double()
    assert next(tuned.network.parameters()).dtype == torch.float64
    steps = [([(tuned.head, step["own"].images, step["own"].labels)], step["other"]) for step in data.steps]
    heads = [
        clip_module().make_head(SimpleNamespace(classes=classes, templates=("{}",))).double()
        for classes in Beside.others
    ]
    names = trainable(name for name, _ in encoder.named_parameters())
    assert len(names) in (4, 8, 15)
    assert_close(departure(tuned), plain_loop(encoder, steps, linearized, names, penalty, heads))
    vector = tuned.task_vector()  # on the way it was float64, the files are as θ0 is
    assert {tensor.dtype for tensor in vector.values()} == {torch.float32}
    assert {name for name, tensor in vector.items() if tensor.any()} == set(names)


def test_joint_linearised_training_is_the_plain_loop(tiny_encoder, tiny_head, tiny_data, tiny_tasks, silent_trainer):
    heads = {name: tiny_head(seed=seed, dtype=torch.float64) for seed, name in enumerate(("shapes", "signs"))}
    tuned = MultiTaskModule(
        encoder=tiny_encoder(dtype=torch.float64),
        heads=heads,
        learning_rate=RATE,
        warmup_fraction=0.3,
        linearized=True,
        trainable=OUTER,
        tau_jp=True,
    )
    data = {name: tiny_data(name=name, count=STEPS, seed=seed, dtype=torch.float64) for seed, name in enumerate(heads)}
    trainer = silent_trainer(max_steps=STEPS, **EXACT)
    trainer.fit(tuned, datamodule=tiny_tasks(data))
    steps = [
        ([(heads[name], part.batches[number].images, part.batches[number].labels) for name, part in data.items()], None)
        for number in range(STEPS)
    ]
    names = ["outer.weight", "outer.bias"]
    assert_close(departure(tuned), plain_loop(tiny_encoder(dtype=torch.float64), steps, True, names))
    assert tuned.task == "shapes+signs"
    assert tuned.regime == "linearized, Matching(pattern='outer')"
    assert {"val/shapes/tau_jp", "val/signs/tau_jp"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
def test_other_precisions(linearized, precision, clip_module, beside, clip_data, tiny_tasks, silent_trainer):
    for space in ("features", "logits"):
        tuned = clip_module(linearized=linearized, penalty=TauJpPenalty("strict", space=space), learning_rate=1e-2)
        trainer = silent_trainer(max_steps=2, precision=precision)
        trainer.fit(tuned, datamodule=beside("strict", 32, 2, torch.float32))
        vector = tuned.task_vector()
        assert {tensor.dtype for tensor in vector.values()} == {torch.float32}
        assert min(float(tensor.abs().max()) for tensor in vector.values()) > 1e-3
        assert 0 < float(trainer.callback_metrics["train/tau_jp"]) < 100
    several = clip_module(MultiTaskModule, linearized=linearized, tau_jp=True)
    several.load_task_vector(TaskVector(vector))
    data = tiny_tasks({"shapes": clip_data()})
    found = silent_trainer(precision=precision).test(several, datamodule=data, verbose=False)[0]["test/shapes/tau_jp"]
    initial, images = several.initial_parameters, torch.cat([batch.images for batch in data.tasks["shapes"].batches])
    network = clip_module().encoder
    expected = plain_parts(network, {name: value.float() for name, value in initial.items()}, dict(vector), images)[1]
    assert found == pytest.approx(float(expected.norm(dim=1).mean()), rel=1e-4 if precision == "32-true" else 0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("settings", [{"trainable": Attention(1)}, {"lora": LoRA(2)}], ids=repr)
def test_what_does_not_train_has_no_vector_in_any_precision(
    settings, precision, clip_module, clip_data, silent_trainer
):
    tuned = clip_module(**settings)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    silent_trainer(max_steps=2, precision=precision).fit(tuned, datamodule=clip_data(dtype=dtype))
    assert next(tuned.network.parameters()).dtype == dtype
    vector = dict(tuned.task_vector())
    assert {tensor.dtype for tensor in vector.values()} == {torch.float32}
    assert {name for name, tensor in vector.items() if tensor.any()} == set(Attention(1)(vector))


# What trains


@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
@pytest.mark.parametrize("trainable", [Attention(2), LastBlocks(count=1, behind=False)], ids=repr)
def test_what_is_not_selected_does_not_move(trainable, linearized, clip_module, clip_data, silent_trainer):
    tuned = clip_module(trainable=trainable, linearized=linearized, weight_decay=1.0)
    start = values(tuned.network)
    chosen = set(trainable(start))
    trainer = silent_trainer(max_steps=3)
    trainer.fit(tuned, datamodule=clip_data())
    assert_same(tuned.initial_parameters, start)
    end, vector = values(tuned.network), tuned.task_vector()
    assert list(vector) == list(start)
    for name, tensor in vector.items():
        assert bool(tensor.any()) == (name in chosen), name
        assert torch.equal(end[name], start[name]) == (linearized or name not in chosen), name
    held = [id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert held == [id(value) for name, value in tuned.encoder.named_parameters() if name in chosen]
    assert {name for name, _ in tuned.trainable_parameters()} == chosen
    if linearized:
        assert {name for name, _ in tuned.encoder.named_parameters()} == chosen


class Blocks(nn.Module):
    """A network with three numbered blocks, something before and something behind them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(48, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.norm = nn.LayerNorm(6)

    def forward(self, images):
        features = self.stem(images.flatten(1))
        for block in self.blocks:
            features = features + torch.tanh(block(features))
        return self.norm(features)


RATES = {
    "linear": (LinLR(), None, (0.0, 0.0, 0.5, 1.0, 1.0)),
    "exponential": (ExpLR(0.5), None, (0.25, 0.25, 0.5, 1.0, 1.0)),
    "linear, a part": (LinLR(), Matching(r"blocks.[12]|stem.bias"), (0.0, None, 0.5, 1.0, None)),
}


@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
@pytest.mark.parametrize(("rates", "trainable", "shares"), RATES.values(), ids=RATES)
def test_one_group_for_each_rate(rates, trainable, shares, linearized, module, tiny_data, silent_trainer):
    settings = {"encoder": Blocks(), "rates": rates, "trainable": trainable, "linearized": linearized}
    tuned = module(**settings, weight_decay=0.5)
    far = {name: torch.full_like(value, 0.1) for name, value in tuned.initial_parameters.items()}
    chosen = set(trainable(far)) if trainable else set(far)
    tuned.load_task_vector(TaskVector({n: value if n in chosen else value * 0 for n, value in far.items()}))
    names = {id(value): name for name, value in tuned.encoder.named_parameters()}
    before = {name: value.clone() for name, value in tuned.task_vector().items()}
    trainer = silent_trainer(max_steps=3)
    trainer.fit(tuned, datamodule=tiny_data())
    parts = ("stem", "blocks.0", "blocks.1", "blocks.2", "norm")
    expected = {}
    for part, share in zip(parts, shares, strict=True):
        expected.setdefault(share, set()).update(n for n in chosen if n.startswith(part))
    groups = trainer.optimizers[0].param_groups
    found = {group["initial_lr"] / RATE: {names[id(value)] for value in group["params"]} for group in groups}
    assert found == {share: names for share, names in expected.items() if share is not None}
    assert len(groups) == len(found)
    factor = warm_up_cosine(0, 3)(3)
    assert [group["lr"] for group in groups] == [pytest.approx(group["initial_lr"] * factor) for group in groups]
    still = expected.get(0.0, set())
    assert len(still) in (0, 1, 4)
    for name, value in tuned.task_vector().items():  # weight decay does not move what has no rate
        assert torch.equal(value, before[name]) == (name in still or name not in chosen), name


def test_low_rank_updates_make_a_dense_task_vector(clip_module, clip_data, silent_trainer, tmp_path):
    tuned = clip_module(lora=LoRA(rank=2, alpha=8), learning_rate=1e-2)
    start = clip_module().initial_parameters
    assert_same(tuned.initial_parameters, start)
    assert not any(value.any() for value in tuned.task_vector().values())
    callback = ExtractTaskVector()
    silent_trainer(max_steps=3, callbacks=[callback]).fit(tuned, datamodule=clip_data())
    vector, dense = tuned.task_vector(), dict(updates(tuned.encoder))
    assert isinstance(vector, Computed)
    assert list(vector) == list(start)
    assert set(dense) == set(Attention(1)(start))
    for name, value in vector.items():
        assert torch.equal(value, dense.get(name, torch.zeros_like(value))), name
        if name in dense:
            assert int(torch.linalg.matrix_rank(value)) == 2
    file = TaskVector.load(tmp_path / "run/task_vector.safetensors", verify=True)
    assert_same(dict(sorted(file.items())), dict(sorted(vector.items())))
    assert file.metadata["regime"] == "LoRA(rank=2, alpha=8, dropout=0.0, on=None)"
    plain = clip_module(task_vector=str(tmp_path / "run/task_vector.safetensors"))
    images = clip_data().batches[0].images
    with torch.no_grad():
        torch.testing.assert_close(plain(images), tuned(images), rtol=0, atol=1e-5)


def test_a_task_vector_of_low_rank_is_not_computed_before_it_is_read(clip_module, monkeypatch):
    vector, seen = clip_module(lora=LoRA(rank=2)).task_vector(), []
    import lit_merge.models.parametrisations as parametrisations

    def counted(encoder, name, update=parametrisations.update_of):
        return seen.append(name) or update(encoder, name)

    monkeypatch.setattr(parametrisations, "update_of", counted)
    assert vector.shape("proj") == (32, 12)
    assert not seen
    vector["proj"], vector["ln_post.bias"]
    assert seen == ["proj", "ln_post.bias"]


@pytest.fixture
def begun(clip_module, clip_data, silent_trainer, tmp_path):
    """The file of a short full fine-tune's task vector."""
    silent_trainer(max_steps=2, callbacks=[ExtractTaskVector()]).fit(clip_module(), datamodule=clip_data())
    return tmp_path / "run/task_vector.safetensors"


def test_other_regimes_start_from_a_task_vector(begun, clip_module, clip_data, silent_trainer):
    vector = dict(TaskVector.load(begun))
    linear = clip_module(task_vector=str(begun), linearized=True)
    assert_same(dict(sorted(linear.task_vector().items())), dict(sorted(vector.items())))
    low_rank = clip_module(task_vector=str(begun), lora=LoRA(rank=2), learning_rate=1e-2)
    partial = clip_module(task_vector=str(begun), trainable=Attention(1), learning_rate=1e-2)
    chosen = set(Attention(1)(vector))
    for tuned in (low_rank, partial):
        for name, value in tuned.task_vector().items():
            torch.testing.assert_close(value, vector[name], rtol=0, atol=1e-6)
        before = dict(tuned.task_vector())
        silent_trainer(max_steps=1).fit(tuned, datamodule=clip_data())
        for name, value in tuned.task_vector().items():
            assert torch.equal(value, before[name]) == (name not in chosen), name
    assert_same(low_rank.initial_parameters, clip_module().initial_parameters)
    with pytest.raises(ConfigurationError) as error:
        clip_module(task_vector=str(begun), linearized=True, trainable=Attention(1))
    assert_one_line(error, "task vector: expected zeros outside of the 4 parameters that train", "Let them train")


def test_other_regimes_start_from_weights(clip_module, tmp_path):
    base = clip_module().initial_parameters
    weights = {name: value * 1.5 for name, value in base.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    for settings in ({"linearized": True}, {"lora": LoRA(rank=2)}):
        tuned = clip_module(weights=str(tmp_path / "weights.safetensors"), **settings)
        assert_same(tuned.initial_parameters, base)
        assert_same(dict(tuned.task_vector()), {name: weights[name] - value for name, value in base.items()})


def test_of_low_rank_training_only_the_frozen_weights_are_replaced(begun, clip_module, clip_data, silent_trainer):
    tuned = clip_module(lora=LoRA(rank=2), learning_rate=1e-2)
    silent_trainer(max_steps=1).fit(tuned, datamodule=clip_data())
    tuned.load_task_vector(TaskVector.load(begun), coefficient=0.5)
    for name, value in TaskVector.load(begun).items():  # nothing is left of the updates
        torch.testing.assert_close(tuned.task_vector()[name], value / 2, rtol=0, atol=1e-6)


def test_a_linearised_module_holds_its_base_once(tiny_encoder, module):
    encoder = tiny_encoder()
    places = {name: value.data_ptr() for name, value in encoder.named_parameters()}
    tuned = module(encoder=encoder, linearized=True)
    assert tuned.network is encoder
    for held in (tuned.initial_parameters, dict(tuned.network.named_parameters())):
        assert {name: value.data_ptr() for name, value in held.items()} == places
    tensors = [value for value in [*tuned.state_dict().values(), *vars(tuned).values()] if torch.is_tensor(value)]
    assert not {value.data_ptr() for value in tensors} & set(places.values())
    assert not vars(tuned.parametrisation)["_host"]
    direct = module()
    with torch.no_grad():
        direct.forward_parts(torch.zeros(2, 3, 4, 4))
    placed = direct.parametrisation._placed  # on the device where θ0 is kept there is no copy of it
    assert {n: value.data_ptr() for n, value in placed.items()} == {
        n: value.data_ptr() for n, value in direct.initial_parameters.items()
    }


HEADERS = [
    ({}, "full"),
    ({"linearized": True}, "linearized"),
    ({"trainable": All()}, "All()"),
    ({"linearized": True, "trainable": Matching("inner")}, "linearized, Matching(pattern='inner')"),
    ({"lora": LoRA(2, on=Matching("r.weight"))}, f"LoRA(rank=2, alpha=16.0, dropout=0.0, on={Matching('r.weight')!r})"),
    (
        {"linearized": True, "penalty": TauJpPenalty("strict", weight=0.5, tasks=["one"])},
        "linearized, TauJpPenalty(schedule='strict', weight=0.5, squared=False, batch_size=None, start_step=0, "
        "tasks=['one'], images=None, split='train', space='features')",
    ),
]


@pytest.mark.parametrize(("settings", "regime"), HEADERS, ids=[regime for _, regime in HEADERS])
def test_the_regime_is_in_the_header(settings, regime, module, beside, tiny_data, silent_trainer, tmp_path):
    tuned = module(**settings)
    data = beside("strict", dtype=torch.float32) if tuned.penalty else tiny_data()
    silent_trainer(max_steps=1, callbacks=[ExtractTaskVector()]).fit(tuned, datamodule=data)
    vector = TaskVector.load(tmp_path / "run/task_vector.safetensors", verify=True)
    assert vector.metadata["regime"] == tuned.regime == regime
    assert vector.base_fingerprint == module().base_fingerprint
    assert list(vector.items()) != []
    assert set(vector) == set(module().initial_parameters)


def test_rates_are_in_the_header_too(clip_module):
    assert clip_module(rates=ExpLR(0.5), linearized=True).regime == "linearized, ExpLR(base=0.5)"


# Evaluation


@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
def test_what_a_task_vector_does_to_each_task(
    linearized, tiny_encoder, tiny_head, tiny_data, tiny_tasks, silent_trainer
):
    """Of a vector of full fine-tuning, evaluated on the tangent (post-hoc) and on the network itself."""
    torch.manual_seed(4)
    encoder = tiny_encoder(dtype=torch.float64)
    initial = dict(encoder.named_parameters())
    tau = {name: torch.randn_like(value) for name, value in initial.items()}
    heads = {"shapes": tiny_head(dtype=torch.float64), "signs": tiny_head(seed=5, dtype=torch.float64)}
    data = {name: tiny_data(name=name, count=3, seed=len(name), dtype=torch.float64) for name in heads}
    padding = ImageBatch(torch.full((3, 3, 4, 4), 7.0).double(), torch.full((3,), -1), torch.full((3,), -1))
    expected = {}
    for name, part in data.items():
        images, labels = (torch.cat(parts) for parts in list(zip(*part.batches, strict=True))[:2])
        value, change = plain_parts(encoder, initial, tau, images)
        features = value + change if linearized else functional_call(encoder, moved(initial, tau), (images,))
        expected[f"test/{name}/accuracy"] = float((heads[name](features).argmax(1) == labels).double().mean())
        expected[f"test/{name}/tau_jp"] = float(change.norm(dim=1).mean())
        last = part.batches[-1]
        # Unlabelled images count for the one, padding counts for neither.
        part.batches[-1:] = [ImageBatch(*map(torch.cat, zip(last, padding, strict=True))), padding]
    expected["test/accuracy"] = sum(value for name, value in expected.items() if "acc" in name) / 2
    tuned = MultiTaskModule(encoder=tiny_encoder(dtype=torch.float64), heads=heads, linearized=linearized, tau_jp=True)
    tuned.load_task_vector(TaskVector(tau))
    trainer = silent_trainer(**EXACT)
    for _ in range(2):  # nothing is left of the run before
        found = trainer.test(tuned, datamodule=tiny_tasks(data), verbose=False)
        assert {key: value for part in found for key, value in part.items()} == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        own = data["shapes"].batches[0].images
        found = tuned.forward_parts(own)
        for part, wanted in zip(found, plain_parts(encoder, initial, tau, own), strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-12)
        features = sum(found) if linearized else functional_call(encoder, moved(initial, tau), (own,))
        torch.testing.assert_close(tuned(own), features, rtol=1e-10, atol=1e-12)


def test_images_without_a_class_count_for_the_tangent(tiny_encoder, tiny_head, tiny_data, tiny_tasks, silent_trainer):
    tuned = MultiTaskModule(encoder=tiny_encoder(), heads={"shapes": tiny_head()}, linearized=True, tau_jp=True)
    torch.manual_seed(4)
    tuned.load_task_vector(TaskVector({n: torch.randn_like(value) for n, value in tuned.initial_parameters.items()}))
    data = tiny_data(count=2)
    data.batches[1].labels[:] = -1
    found = silent_trainer().test(tuned, datamodule=tiny_tasks({"shapes": data}), verbose=False)[0]
    with torch.no_grad():
        changes = tuned.encoder.tangent(torch.cat([batch.images for batch in data.batches]))
    assert found["test/shapes/tau_jp"] == pytest.approx(float(changes.norm(dim=1).mean()), rel=1e-5)


def test_without_being_asked_no_tangent_is_taken(several_clip, silent_trainer, monkeypatch):
    tuned, data = several_clip(tau_jp=False)
    monkeypatch.setattr(MultiTaskModule, "forward_parts", None)
    assert set(silent_trainer().test(tuned, datamodule=data, verbose=False)[0]) == {
        "test/shapes/accuracy",
        "test/accuracy",
    }


@pytest.fixture
def several_clip(clip_module, clip_data, tiny_tasks):
    def build(**settings):
        return clip_module(MultiTaskModule, **settings), tiny_tasks({"shapes": clip_data()})

    return build


def test_frozen_parameters_with_other_values_have_a_tangent_too(module, tiny_data, silent_trainer, tmp_path):
    """They come from a task vector that was trained in full; θ0, where the tangent is taken, is elsewhere."""
    torch.manual_seed(4)
    tuned = module(trainable=OUTER, dtype=torch.float64)
    initial = tuned.initial_parameters
    tau = {name: torch.randn_like(value) for name, value in initial.items()}
    images = tiny_data(dtype=torch.float64).batches[0].images
    with torch.no_grad():
        assert not tuned.forward_parts(images)[1].any()
    tuned.load_task_vector(TaskVector(tau))
    trainer = silent_trainer(max_steps=1)
    trainer.fit(tuned, datamodule=tiny_data(dtype=torch.float64))
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    opened = module(trainable=OUTER, dtype=torch.float64)
    silent_trainer().validate(
        opened, datamodule=tiny_data(dtype=torch.float64), ckpt_path=tmp_path / "tuned.ckpt", weights_only=True
    )
    for each in (tuned, opened):
        value, change = each.forward_parts(images)
        wanted = plain_parts(module(dtype=torch.float64).encoder, initial, dict(each.task_vector()), images)
        torch.testing.assert_close(value, wanted[0])
        torch.testing.assert_close(change, wanted[1])
        gradient = torch.autograd.grad(change.sum(), list(each.encoder.outer.parameters()))
        assert all(part.any() for part in gradient)
        assert not any(value.requires_grad for value in each.encoder.inner.parameters())


def test_the_tangent_of_low_rank_training_is_refused(module, tiny_encoder, tiny_head):
    tuned = module(lora=LoRA(2, on=Matching("inner.weight")))
    with pytest.raises(ConfigurationError) as error:
        tuned.forward_parts(torch.zeros(1, 3, 4, 4))
    assert_one_line(error, "tangent: expected parameters that train themselves, got those of LowRank(LoRA(rank=2")
    with pytest.raises(ConfigurationError) as error:
        MultiTaskModule(encoder=tiny_encoder(), heads={"a": tiny_head()}, tau_jp=True, lora=LoRA(2))
    assert_one_line(error, "tau_jp and lora: expected one of them, got both", "in a module without lora")


# The metric


def test_the_metric_is_the_mean_of_the_norms():
    tangents = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0], [6.0, 8.0]])
    assert tau_jp_norms(tangents).tolist() == [5, 0, 1, 10]
    assert tau_jp_norms(tangents, squared=True).tolist() == [25, 0, 1, 100]
    counted = torch.tensor([True, True, False, True])
    for squared, expected in ((False, (4.0, 5.0)), (True, (31.5, 125 / 3))):
        whole, pieces = TauJp(squared), TauJp(squared)
        whole.update(tangents)
        for start, end in ((0, 1), (1, 1), (1, 4)):
            pieces.update(tangents[start:end])
        assert whole.compute() == pieces.compute() == expected[0]
        assert whole.compute().dtype == torch.float32
        pieces.reset()
        pieces.update(tangents[:3], counted[:3])
        pieces.update(tangents[3:], counted[3:])
        pieces.update(tangents, torch.zeros(4, dtype=torch.bool))
        assert float(pieces.compute()) == pytest.approx(expected[1])
    assert math.isnan(TauJp().compute())
    assert TauJp().higher_is_better is False


def test_the_metric_of_several_processes_weighs_images():
    here, there = TauJp(), TauJp()
    here.update(torch.tensor([[3.0, 4.0]]))
    there.update(torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]]))
    together = TauJp(
        dist_sync_fn=lambda state, group: [state, there.total if state.dtype == torch.float64 else there.count],
        distributed_available_fn=lambda: True,
    )
    together.update(torch.tensor([[3.0, 4.0]]))
    assert float(together.compute()) == 2.0  # (5 + 1 + 0 + 2) / 4, not (5 + 1) / 2
    assert float(here.compute()) == 5.0
    assert {name: reduce(torch.tensor([2, 3])) for name, reduce in together._reductions.items()} == {
        "total": 5,
        "count": 5,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_metric_of_half_precision(dtype):
    tangents = torch.full((3, 10_000), 3.0, dtype=dtype)
    assert tau_jp_norms(tangents).tolist() == pytest.approx([300.0] * 3)
    assert tau_jp_norms(tangents, squared=True).tolist() == [90_000.0] * 3  # more than float16 holds
    metric = TauJp()
    for _ in range(300):  # a sum that half precision would round
        metric.update(tangents[:1] / 3)
    assert float(metric.compute()) == pytest.approx(100.0)
    assert tau_jp_norms(tangents.double()).dtype == torch.float64


def test_the_gradient_of_a_norm_at_zero_is_zero():
    tangents = torch.zeros(2, 3, requires_grad=True)
    for squared in (False, True):
        (gradient,) = torch.autograd.grad(tau_jp_norms(tangents, squared).sum(), tangents)
        assert not gradient.any()
    metric = TauJp()
    metric.update(tangents)
    assert not metric.total.requires_grad


def test_tangents_are_a_matrix():
    for wrong in (torch.zeros(3), torch.zeros(2, 3, 4)):
        with pytest.raises(LitMergeError) as error:
            TauJp().update(wrong)
        assert_one_line(error, f"tangents: expected shape [B, d], got {list(wrong.shape)}. Flatten what is not batch.")


# The penalty


@pytest.mark.parametrize("squared", [False, True], ids=["norms", "squares"])
@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
def test_the_penalty_is_logged_from_its_first_step(linearized, squared, module, beside, silent_trainer):
    data, logged, expected = beside("cyclic"), [], []
    penalty = TauJpPenalty(weight=0.5, squared=squared, start_step=3)
    tuned = module(dtype=torch.float64, linearized=linearized, penalty=penalty)

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            tau, encoder = pl_module.task_vector(), module(dtype=torch.float64).encoder
            change = plain_parts(encoder, dict(encoder.named_parameters()), dict(tau), batch["other"].images)[1]
            expected.append(float((change.norm(dim=1) ** (2 if squared else 1)).mean()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(dict(trainer.callback_metrics))

    silent_trainer(max_steps=STEPS, callbacks=[Watch()], **EXACT).fit(tuned, datamodule=data)
    assert ["train/tau_jp" in step for step in logged] == [step >= 3 for step in range(STEPS)]
    found = [float(step["train/tau_jp"]) for step in logged[3:]]
    assert found == pytest.approx(expected[3:], rel=1e-6)
    assert min(found) > 0
    assert all("train/loss" in step for step in logged)


def test_steps_are_counted_not_batches(module, beside, silent_trainer):
    logged = []
    tuned = module(dtype=torch.float64, penalty=TauJpPenalty(start_step=1))
    tuned.on_train_batch_end = lambda outputs, batch, batch_idx: logged.append(
        "train/tau_jp" in tuned.trainer.callback_metrics
    )
    silent_trainer(max_steps=2, accumulate_grad_batches=3, **EXACT).fit(tuned, datamodule=beside("cyclic"))
    assert logged == [False] * 3 + [True] * 3


def test_the_penalty_makes_the_others_features_change_less(module, beside, silent_trainer):
    data, changes = beside("strict"), []
    for weight in (0.0, 3.0):
        tuned = module(dtype=torch.float64, linearized=True, penalty=TauJpPenalty("strict", weight=weight))
        silent_trainer(max_steps=STEPS, **EXACT).fit(tuned, datamodule=data)
        with torch.no_grad():
            changes.append(float(tau_jp_norms(tuned.encoder.tangent(data.steps[0]["other"].images)).mean()))
    assert changes[1] < 0.7 * changes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "weekly"}, "penalty.schedule: expected one of cyclic, strict, got 'weekly'. Change it."),
        ({"split": "all"}, "penalty.split: expected one of train, val, test, got 'all'. Change it."),
        ({"space": "pixels"}, "penalty.space: expected one of features, logits, got 'pixels'. Change it."),
        ({"weight": -0.1}, "penalty.weight: expected a finite number of at least 0, got -0.1. Change it."),
        ({"weight": math.inf}, "penalty.weight: expected a finite number of at least 0, got inf. Change it."),
        ({"weight": math.nan}, "penalty.weight: expected a finite number of at least 0, got nan. Change it."),
        ({"weight": "1"}, "penalty.weight: expected a finite number of at least 0, got '1'. Change it."),
        ({"batch_size": 0}, "penalty.batch_size: expected an integer of at least 1, got 0. Change it."),
        ({"images": 1.5}, "penalty.images: expected an integer of at least 1, got 1.5. Change it."),
        ({"start_step": -1}, "penalty.start_step: expected an integer of at least 0, got -1. Change it."),
        ({"start_step": None}, "penalty.start_step: expected an integer of at least 0, got None. Change it."),
        ({"tasks": "signs"}, "penalty.tasks: expected a list, got 'signs'. Write [signs]."),
    ],
    ids=str,
)
def test_refused_penalties(settings, message):
    with pytest.raises(ConfigurationError) as error:
        TauJpPenalty(**settings)
    assert str(error.value) == message


def test_a_penalty_needs_other_tasks(module, tiny_data, tiny_tasks, silent_trainer, clip_module):
    tuned = module(penalty=TauJpPenalty())
    headless = clip_module(penalty=TauJpPenalty())
    for each, data, got in (
        (tuned, tiny_data(), "TinyData"),
        (headless, tiny_tasks({"shapes": tiny_data()}), "TinyTasks"),
    ):
        with pytest.raises(ConfigurationError) as error:
            silent_trainer(max_steps=1).fit(each, datamodule=data)
        assert_one_line(
            error,
            f"penalty: expected a data module with other tasks, got {got}. Use TaskDataModule, or remove the penalty.",
        )
    with pytest.raises(ConfigurationError) as error:
        silent_trainer(max_steps=1).fit(tuned, tiny_data().loader())
    assert_one_line(error, "got none. Use TaskDataModule")
    silent_trainer().test(tuned, datamodule=tiny_data(), verbose=False)  # which takes no penalty


def test_logits_of_other_tasks_need_heads(module, beside, silent_trainer):
    with pytest.raises(ConfigurationError) as error:
        silent_trainer(max_steps=1).fit(module(penalty=TauJpPenalty(space="logits")), datamodule=beside("cyclic"))
    assert_one_line(
        error, "head: expected one for TinyEncoder, which is no CLIP", "give a network whose head(task) makes them"
    )


def test_the_other_tasks_heads_are_frozen_and_no_part_of_a_checkpoint(clip_module, beside, silent_trainer, tmp_path):
    tuned, trainer = clip_module(penalty=TauJpPenalty(space="logits")), silent_trainer(max_steps=1)
    trainer.fit(tuned, datamodule=beside("cyclic", side=32, dtype=torch.float32))
    assert [head.classes for head in tuned._other_heads] == list(Beside.others)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    state = torch.load(tmp_path / "tuned.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"encoder", "head"}
    tuned.to("meta")  # they move with the module
    assert {head.weight.device.type for head in tuned._other_heads} == {"meta"}


# Settings that exclude each other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora": LoRA(dropout=0.1, on=Matching("weight")), "linearized": True},
            "lora.dropout: expected 0 of a linearised network, which has no dropout, got 0.1. Set it to 0.",
        ),
        (
            {"lora": LoRA(), "trainable": All()},
            "lora and trainable: expected one of them, got both: LoRA's factors are what trains. Remove one, or choose "
            "weights by lora.on.",
        ),
        (
            {"lora": LoRA(), "penalty": TauJpPenalty()},
            "penalty and lora: expected one of them, got both: the tangent is not linear in LoRA's factors. Remove "
            "one, set linearized, or choose parameters by trainable.",
        ),
        (
            {"rates": LinLR()},
            "LinLR(): expected a network with numbered blocks, got 4 parameters without (inner.weight, inner.bias, "
            "outer.weight and 1 more). Train it at one learning rate.",
        ),
        (
            {"trainable": Attention(3)},
            "attention paradigm 3: expected a network with attention blocks, got 4 parameters (inner.weight, "
            "inner.bias, outer.weight and 1 more) without. Choose another selection, e.g. Matching.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_refused_settings(settings, message, module):
    with pytest.raises(ConfigurationError) as error:
        module(**settings)
    assert str(error.value) == message


# Checkpoints


SETTINGS = {
    "linearised": {"linearized": True},
    "linearised, attention": {"linearized": True, "trainable": Attention(2)},
    "last blocks, linear rates": {"trainable": LastBlocks(fraction=0.5), "rates": LinLR()},
    "exponential rates": {"trainable": All(), "rates": ExpLR(0.5)},
    "low rank": {"lora": LoRA(rank=2, on=Matching("attn.*weight"))},
    "linearised, low rank": {"linearized": True, "lora": LoRA(rank=2, on=Matching("attn.*weight")), "rates": LinLR()},
    "penalty": {"penalty": TauJpPenalty("strict", tasks=["one"]), "trainable": Matching("attn")},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", [FineTuneModule, MultiTaskModule])
def test_a_checkpoint_opens_with_its_settings(
    kind, settings, clip_module, clip_data, beside, tiny_tasks, silent_trainer, tmp_path
):
    if kind is MultiTaskModule:
        settings = {name: value for name, value in settings.items() if name != "penalty"}
    tuned, trainer = clip_module(kind, **settings), silent_trainer(max_steps=2)
    data = beside("strict", 32, 2, torch.float32) if "penalty" in settings else clip_data()
    trainer.fit(tuned, datamodule=data if kind is FineTuneModule else tiny_tasks({"shapes": data}))
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    stored = torch.load(tmp_path / "tuned.ckpt", weights_only=True)["hyper_parameters"]
    assert {name: stored[name] for name in settings} == settings
    opened = kind.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True)
    assert opened.regime == tuned.regime
    assert_same(opened.state_dict(), tuned.state_dict())
    assert_same(dict(opened.task_vector()), dict(tuned.task_vector()))
    assert {name for name, _ in opened.trainable_parameters()} == {name for name, _ in tuned.trainable_parameters()}
    images = clip_data().batches[0].images
    with torch.no_grad():
        assert torch.equal(opened.eval()(images), tuned.eval()(images))


def test_a_linearised_checkpoint_holds_the_task_vector_alone(clip_module, clip_data, silent_trainer, tmp_path):
    tuned, trainer = clip_module(linearized=True, trainable=Attention(1)), silent_trainer(max_steps=2)
    trainer.fit(tuned, datamodule=clip_data())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    stored = torch.load(tmp_path / "tuned.ckpt", weights_only=True)
    state = {name.removeprefix("encoder."): v for name, v in stored["state_dict"].items() if "head" not in name}
    vector = tuned.task_vector()
    assert set(state) == set(Attention(1)(vector))
    for name, value in state.items():
        assert torch.equal(value, vector[name])
        assert value.any()
    assert stored["linearized"] is True


@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
def test_a_checkpoint_of_the_other_kind_is_refused(linearized, module, tiny_data, silent_trainer, tmp_path):
    """Both have the same names, and τ is no θ."""
    trainer = silent_trainer(max_steps=1)
    trainer.fit(module(linearized=linearized), datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    with pytest.raises(StructureMismatchError) as error:
        silent_trainer(max_steps=2).fit(
            module(linearized=not linearized), datamodule=tiny_data(), ckpt_path=tmp_path / "tuned.ckpt"
        )
    assert_one_line(
        error,
        f"checkpoint: expected one of a run with linearized={not linearized}, got one with linearized={linearized}. "
        "Set linearized as that run did.",
    )


@pytest.mark.parametrize("linearized", [True, False], ids=["linearised", "direct"])
@pytest.mark.parametrize(
    ("saved", "given"),
    [
        (LoRA(2, on=INNER_WEIGHT, rslora=True), LoRA(2, on=INNER_WEIGHT)),
        (LoRA(2, on=INNER_WEIGHT), LoRA(2, alpha=8, on=INNER_WEIGHT)),
        (LoRA(2, on=INNER_WEIGHT), None),
        (None, LoRA(2, on=INNER_WEIGHT)),
    ],
    ids=repr,
)
def test_a_checkpoint_of_factors_with_another_meaning_is_refused(
    saved, given, linearized, module, tiny_data, silent_trainer, tmp_path
):
    trainer = silent_trainer(max_steps=1)
    trainer.fit(module(lora=saved, linearized=linearized), datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    resumed = {"datamodule": tiny_data(), "ckpt_path": tmp_path / "tuned.ckpt", "weights_only": True}
    with pytest.raises(StructureMismatchError) as error:
        silent_trainer(max_steps=2).fit(module(lora=given, linearized=linearized), **resumed)
    assert_one_line(error, "checkpoint: expected one of a run with ", "Set lora as that run did.")
    same = saved and replace(saved, alpha=float(saved.alpha), dropout=0.0 if linearized else 0.5)
    silent_trainer(max_steps=2).fit(module(lora=same, linearized=linearized), **resumed)


RESUMED = {
    "linearised": {"linearized": True},
    "linearised, cyclic": {"linearized": True, "penalty": TauJpPenalty("cyclic", batch_size=2)},
    "direct, cyclic, later": {"penalty": TauJpPenalty("cyclic", batch_size=2, start_step=5)},
    "a part, strict": {"trainable": INNER, "penalty": TauJpPenalty("strict", batch_size=2)},
    "low rank": {"lora": LoRA(2, on=Matching("inner.weight"))},
    "linearised, low rank, strict": {
        "linearized": True,
        "lora": LoRA(2, on=Matching("inner.weight")),
        "penalty": TauJpPenalty("strict", batch_size=2),
    },
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_where_the_whole_one_does(settings, module, image_folder, silent_trainer, tmp_path):
    """Six batches in an epoch, which the cycle of four other tasks does not divide."""
    others = {str(count): image_folder(count) for count in (3, 4, 5, 6)}

    def fit(resume=None):
        torch.manual_seed(0)  # low-rank factors are drawn
        tuned, tasks = module(**settings), []
        tuned.on_train_batch_start = lambda batch, batch_idx: tasks.append(
            sorted(set(batch["other"].tasks.tolist())) if "penalty" in settings else []
        )
        keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = silent_trainer(max_epochs=2, limit_val_batches=1, callbacks=[keep], enable_checkpointing=True)
        data = TaskDataModule(path=image_folder_of_its_own, batch_size=4, other_paths=others)
        trainer.fit(tuned, datamodule=data, ckpt_path=resume, weights_only=resume and True)
        return values(tuned.encoder), tasks

    image_folder_of_its_own = image_folder(8)
    whole, tasks = fit()
    assert len(tasks) == 12
    if settings.get("penalty") and settings["penalty"].schedule == "cyclic":
        assert tasks == [[step % 4] for step in range(12)]
    kept = [Path(path) for path in map(str, (tmp_path / "kept").iterdir())]
    first = {int(path.stem.removeprefix("step=")): path.read_bytes() for path in kept}
    for after in (1, 5, 6, 9):
        (tmp_path / "resume.ckpt").write_bytes(first[after])
        resumed, rest = fit(tmp_path / "resume.ckpt")
        assert rest == tasks[after:]
        assert_same(resumed, whole)


# The command line


QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--data.batch_size=8"]
OTHER_FILES = ("evaluate_merge", "tak", "delta", "condition")  # need those of other tasks, as other tests have them
CONFIGS = sorted(path for path in (ROOT / "configs/finetune").glob("*.yaml") if path.stem not in OTHER_FILES)


@pytest.fixture
def tiny(few_images, clip_config, clip_weights, tmp_path, monkeypatch):
    """The options that choose the tiny CLIP, and silence; the current folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return [*QUIET, "--model.model", clip_config, "--model.pretrained", clip_weights]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_trains(path, tiny, write_colours, clip_module):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = given["model"]["init_args"]
    options = [*tiny, *SHORT, "--output=R"]
    if given["data"]["init_args"].get("task") is None:
        options += ["--data.path", str(write_colours(Path("colours"))), "--data.workers=0"]
    if "penalty" in settings and "class_path" not in settings["penalty"]:
        options += ["--data.other_tasks=[signs, land]"]
    if path.stem == "penalised_from_vector":
        start = clip_module().initial_parameters
        begin = TaskVector({n: v * 0.1 for n, v in start.items()}, metadata=clip_module().base_description())
        begin.save("begin.safetensors")
        options += ["--model.task_vector=begin.safetensors"]
    assert main(["fit", "--config", str(path), *options]) == 0
    vector = TaskVector.load("R/task_vector.safetensors", verify=True)
    assert vector.metadata["step"] == "2"
    regime = vector.metadata["regime"]
    assert regime.startswith("linearized") == settings.get("linearized", False)
    for name in ("trainable", "lora", "rates", "penalty"):
        kind = {"lora": "LoRA(", "penalty": "OrthoReg(" if path.stem == "orthoreg" else "TauJpPenalty("}.get(name)
        if name in settings:
            assert (kind or settings[name]["class_path"].rpartition(".")[2] + "(") in regime
        elif kind:
            assert kind not in regime
    assert not settings.keys() & {"linearized", "trainable", "lora", "rates", "penalty"} or regime != "full"
    still = [name for name, value in vector.items() if not value.any()]
    assert bool(still) == bool(settings.keys() & {"trainable", "lora"} or path.stem == "lin_lr")


def test_short_names(tiny):
    digits = ["--data.task=digits", "--data.other_tasks=[signs]", "--trainer.log_every_n_steps=1", *SHORT]
    attention = ["--model.trainable=Attention", "--model.trainable.paradigm=2", "--model.linearized=true"]
    penalty = ["--model.penalty.schedule=strict", "--model.penalty.weight=0.5"]
    assert main(["fit", *tiny, *digits, *attention, *penalty, "--output=R"]) == 0
    regime = TaskVector.load("R/task_vector.safetensors").metadata["regime"]
    assert regime.startswith("linearized, Attention(paradigm=2), TauJpPenalty(schedule='strict', weight=0.5,")
    assert "train/tau_jp" in Path("R/metrics.csv").read_text().splitlines()[0]
    assert main(["fit", *tiny, *digits, "--model.lora.rank=4", "--model.rates=ExpLR", "--output=S"]) == 0
    regime = TaskVector.load("S/task_vector.safetensors").metadata["regime"]
    assert regime == "LoRA(rank=4, alpha=16.0, dropout=0.0, on=None), ExpLR(base=0.5)"
    # A checkpoint brings its settings along.
    for run in ("R", "S"):
        (checkpoint,) = Path(run, "checkpoints").glob("*.ckpt")
        by_hand = [*tiny, f"--model.task_vector={run}/task_vector.safetensors", f"--model.linearized={run == 'R'}"]
        found = []
        for options in ([*QUIET, "--ckpt_path", str(checkpoint)], by_hand):
            output = f"{run}-{len(found)}"
            assert main(["test", *options, "--data.task=digits", f"--output={output}"]) == 0
            found.append(json.loads(Path(output, "test_metrics.json").read_text()))
        assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_any_vector_can_be_evaluated_on_the_tangent(tiny, clip_module, clip_config, clip_weights):
    tuned = clip_module()
    torch.manual_seed(3)
    noise = {name: torch.randn_like(value) * 0.05 for name, value in tuned.initial_parameters.items()}
    TaskVector(noise, metadata=tuned.base_description()).save("noise.safetensors")
    several = ["test", "--model=MultiTaskModule", *tiny, "--model.task_vector=noise.safetensors", "--model.tau_jp=true"]
    data = ["--data=MultiTaskDataModule", "--data.tasks=[digits, signs]"]
    found = {}
    for linearized in ("true", "false"):
        assert main([*several, *data, f"--model.linearized={linearized}", f"--output={linearized}"]) == 0
        found[linearized] = json.loads(Path(linearized, "test_metrics.json").read_text())
    for task in ("digits", "signs"):
        key = f"test/{task}/tau_jp"
        assert found["true"][key] == pytest.approx(found["false"][key], rel=1e-4)  # it is the vector's, not the model's
        assert found["true"][key] > 0.01
    accuracies = [[found[kind][f"test/{task}/accuracy"] for task in ("digits", "signs")] for kind in found]
    assert accuracies[0] != accuracies[1]


# The suite


SUITE = {
    "tasks": ["digits", "signs"],
    "paths": {"hues": "colours"},
    "seeds": [0],
    "test": {"trainer": {"accelerator": "cpu"}},
    "recipes": {"arithmetic": {"recipe": "task_arithmetic", "search": {"values": [0.5, 1.0]}}},
}
SUITES = {
    "linearised and penalised": (
        {"linearized": True, "penalty": {"schedule": "cyclic", "weight": 0.1, "batch_size": 2}},
        {},
        "linearized, TauJpPenalty(schedule='cyclic', weight=0.1,",
    ),
    "post-hoc": ({}, {"linearized": True}, "full"),
}


@pytest.mark.parametrize(("model", "settings", "regime"), SUITES.values(), ids=SUITES)
def test_a_suite(model, settings, regime, tiny, clip_config, clip_weights, write_colours):
    write_colours(Path("colours"))
    fit = {"trainer": {"max_steps": 2, "accelerator": "cpu"}, "data": {"init_args": {"batch_size": 8}}}
    fit["model"] = {"init_args": {"learning_rate": 1e-3, **model}}
    config = {**SUITE, "model": clip_config, "pretrained": clip_weights, "fit": fit, **settings}
    Path("suite.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["suite", "--config=suite.yaml", "--output=S"]) == 0
    seed = Path("S/seed-0")
    others = {}
    for task in ("digits", "signs", "hues"):
        vector = TaskVector.load(seed / f"fit/{task}/task_vector.safetensors")
        assert vector.metadata["regime"].startswith(regime)
        data = yaml.safe_load((seed / f"fit/{task}/fit.yaml").read_text())["data"]["init_args"]
        others[task] = {*(data["other_tasks"] or ()), *(data["other_paths"] or ())}
    if model:  # the other tasks of the suite, and no others
        assert others == {"digits": {"signs", "hues"}, "signs": {"digits", "hues"}, "hues": {"digits", "signs"}}
    for stage in ("individual/digits", "test/arithmetic"):
        assert yaml.safe_load((seed / stage / "test.yaml").read_text())["model"]["init_args"]["linearized"] is True
    # What the suite says of the merged model, by hand.
    results = json.loads(Path("S/results.json").read_text())
    merged = seed / "merge/arithmetic/merged.safetensors"
    options = ["--model=MultiTaskModule", *tiny, f"--model.task_vector={merged}", "--model.linearized=true"]
    data = ["--data=MultiTaskDataModule", "--data.tasks=[digits, signs]", "--data.paths={hues: colours}"]
    assert main(["test", *options, *data, "--output=T"]) == 0
    found = json.loads(Path("T/test_metrics.json").read_text())
    accuracy = results["seeds"]["0"]["merged"]["arithmetic"]["accuracy"]
    assert accuracy == {task: round(found[f"test/{task}/accuracy"], 6) for task in ("digits", "signs", "hues")}
    before = {path: path.stat().st_mtime_ns for path in Path("S/stages").iterdir()}
    assert main(["suite", "--config=suite.yaml", "--output=S"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("S/stages").iterdir()} == before
