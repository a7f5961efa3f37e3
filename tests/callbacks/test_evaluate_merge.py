"""Merging while training: what is logged is what an evaluation afterwards gives, and training does not notice."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_merge.callbacks import EvaluateMerge, ExtractTaskVector
from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.errors import (
    ConfigurationError,
    DataError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.models import Preprocessing, load_clip
from lit_merge.models.lora import LoRA
from lit_merge.models.selection import Attention, LastBlocks
from lit_merge.modules import FineTuneModule, MultiTaskModule, TauJpPenalty
from lit_merge.params import fingerprint
from lit_merge.transforms import Mean, Scale, Sum, Transform, chain, ties
from lit_merge.vectors import TaskVector, TaskVectors

TASKS = ("shapes", "signs", "land")  # in training, with a stored vector, without any
NAMES = {*(f"merge/{task}/accuracy" for task in TASKS), "merge/accuracy", "merge/accuracy_others"}


class Watch(L.Callback):
    """What training is like at every batch, and τ, the metrics and the step wherever there may be new metrics."""

    def __init__(self):
        self.states, self.history = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        modes = {name: part.training for name, part in pl_module.named_modules()}
        trained = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
        own = {id(parameter) for parameter in pl_module.parameters()}
        assert all(id(parameter) in own for parameter in trained), "the optimiser's parameters are the module's"
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert all(parameter.is_leaf and not parameter.is_inference() for parameter in pl_module.parameters())
        numbers = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
        self.states.append((modes, numbers))

    def note(self, trainer, pl_module, hook):
        if trainer.sanity_checking:
            return
        tau = {name: tensor.clone() for name, tensor in pl_module.task_vector().items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("merge")}
        self.history.append((hook, trainer.global_step, metrics, tau))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(trainer, pl_module, "step")

    def on_validation_end(self, trainer, pl_module):
        self.note(trainer, pl_module, "validation")


# The tiny encoder: every metric against a plain loop


class OwnHeads(FineTuneModule):
    """The heads of other tasks, which depend on their classes alone; dropout shows whether anything is in training."""

    def make_head(self, task):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(task.classes))
            return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, len(task.classes)))


@pytest.fixture
def module(tiny_encoder, tiny_head):
    def build(kind=OwnHeads, **settings):
        head = nn.Sequential(nn.Dropout(0.5), tiny_head())
        defaults = {"encoder": tiny_encoder(), "head": head, "preprocessing": Preprocessing(image_size=4)}
        return kind(**{**defaults, "learning_rate": 0.3, "warmup_fraction": 0.0, **settings})

    return build


@pytest.fixture
def data(tiny_data, tiny_tasks):
    """The validation images of three tasks, some of them padding, some unlabelled."""

    def build(tasks=TASKS, **settings):
        classes = {"shapes": ("a", "b", "c"), "signs": ("stop", "go"), "land": ("sea", "bog", "fen", "hill")}
        modules = {}
        for seed, task in enumerate(tasks):
            made = tiny_data(name=task, classes=classes[task], seed=seed + 10, count=5, size=40)
            made.batches[1].labels[3:5] = -1
            modules[task] = made
        return tiny_tasks(modules)

    return build


@pytest.fixture
def stored(tiny_encoder, tmp_path):
    """``stored(task="signs", …)``: path of a random task vector of the tiny encoder."""

    def write(task="signs", encoder=None, known=True, scale=0.2, **changes):
        base = {name: value.detach() for name, value in (encoder or tiny_encoder()).named_parameters()}
        generator = torch.Generator().manual_seed(len(task))
        tau = {name: scale * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        path = tmp_path / f"{task or 'nameless'}.safetensors"
        metadata = {"base_fingerprint": fingerprint(base), "base_model": "TinyEncoder"} if known else {}
        TaskVector(tau, task, metadata={**metadata, **changes}).save(path)
        return str(path)

    return write


@pytest.fixture
def merging(stored, data):
    """``merging(**settings)``: the callback, 0.5 times the sum with one stored vector unless asked otherwise."""

    def build(**settings):
        settings = {"data": data(), **({} if "vectors" in settings else {"vectors": [stored()]}), **settings}
        if "transform" not in settings:
            settings = {"recipe": "task_arithmetic", "settings": {"coefficient": 0.5}, **settings}
        return EvaluateMerge(**settings)

    return build


@pytest.fixture
def fit(silent_trainer, tiny_data):
    """``fit(module, callbacks, …)``: the trainer after a run of six batches per epoch."""

    def run(tuned, *callbacks, data=None, ckpt_path=None, **settings):
        torch.manual_seed(5)
        settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        trainer = silent_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **settings})
        trainer.fit(tuned, datamodule=data or tiny_data(), ckpt_path=ckpt_path)
        return trainer

    return run


def expected(tau, path, data, tiny_encoder, tiny_head, limit=None):
    """The metrics, in float64 and from scratch: θ0 + (τ + stored) / 2, counted one by one."""
    other, theta = TaskVector.load(path), {}
    for name, value in tiny_encoder().named_parameters():
        theta[name] = value.detach().double() + 0.5 * (tau[name].double() + other[name].double())
    accuracy = {}
    for task, part in data.tasks.items():
        head = tiny_head().double() if task == "shapes" else OwnHeads.make_head(None, part)[1].double()
        right = total = 0
        for batch in part.batches[:limit]:
            hidden = torch.tanh(batch.images.double().flatten(1) @ theta["inner.weight"].T + theta["inner.bias"])
            logits = head(hidden @ theta["outer.weight"].T + theta["outer.bias"])
            for row, label in zip(logits, batch.labels.tolist(), strict=True):
                right += int(row.argmax()) == label
                total += label >= 0
        accuracy[task] = right / total
    others = [value for task, value in accuracy.items() if task != "shapes"]
    return {
        **{f"merge/{task}/accuracy": value for task, value in accuracy.items()},
        "merge/accuracy": sum(accuracy.values()) / len(accuracy),
        "merge/accuracy_others": sum(others) / len(others),
    }


def test_every_metric_is_that_of_a_plain_loop(module, merging, fit, stored, data, tiny_encoder, tiny_head):
    class Train(L.Callback):
        """Dropout in training, which an evaluation has to switch off and on again."""

        def on_train_start(self, trainer, pl_module):
            pl_module.train()

    watch = Watch()
    fit(module(), Train(), merging(every_n_steps=2), watch, num_sanity_val_steps=0)
    assert all(modes["head.0"] for modes, _ in watch.states)
    assert [(hook, step) for hook, step, _, _ in watch.history if hook == "validation"] == [
        ("validation", 6),
        ("validation", 12),
    ]
    fresh = [entry for entry in watch.history if entry[0] == "validation" or entry[1] % 2 == 0]
    assert len(fresh) == 8
    for _, _, metrics, tau in fresh:
        assert metrics == pytest.approx(expected(tau, stored(), data(), tiny_encoder, tiny_head), abs=1e-6)
    assert len({metrics["merge/accuracy"] for _, _, metrics, _ in fresh}) > 3


def test_at_most_so_many_batches_of_each_task(module, merging, fit, stored, data, tiny_encoder, tiny_head):
    watch = Watch()
    fit(module(), merging(limit_batches=2), watch, max_epochs=1)
    *_, (_, _, metrics, tau) = watch.history
    assert metrics == pytest.approx(expected(tau, stored(), data(), tiny_encoder, tiny_head, limit=2), abs=1e-6)
    assert metrics != pytest.approx(expected(tau, stored(), data(), tiny_encoder, tiny_head), abs=1e-3)


def test_steps_alone_validations_alone_and_gradients_that_accumulate(module, merging, fit):
    def evaluated(**settings):
        trainer_settings = {key: settings.pop(key) for key in list(settings) if key in ("accumulate_grad_batches",)}
        watch, counting = Watch(), Counting()
        fit(module(), merging(transform=chain(Sum(), counting), **settings), watch, **trainer_settings)
        seen = [(hook, step) for hook, step, metrics, _ in watch.history if metrics]
        return seen[0], counting.calls[0] - 1  # once before the training, to see what it leaves

    assert evaluated(every_n_steps=5, at_validation=False) == (("step", 5), 2)
    assert evaluated() == (("validation", 6), 2)
    assert evaluated(every_n_steps=4, accumulate_grad_batches=3, at_validation=False) == (("step", 4), 1)
    assert evaluated(every_n_steps=2, accumulate_grad_batches=3) == (("step", 2), 4)


@dataclass(frozen=True)
class Counting(Transform):
    """The identity; counts how often it is applied."""

    def __post_init__(self):
        object.__setattr__(self, "calls", [0])

    def __call__(self, vectors):
        self.calls[0] += 1
        return vectors


def test_the_sanity_check_and_other_validations_are_left_out(module, merging, fit, silent_trainer, tiny_data):
    counting, tuned = Counting(), module()
    callback = merging(transform=chain(Sum(), counting))
    fit(tuned, callback, max_epochs=1, num_sanity_val_steps=2)
    assert counting.calls == [2]
    silent_trainer(callbacks=[callback]).validate(tuned, datamodule=tiny_data(), verbose=False)
    assert counting.calls == [2]


def test_the_order_of_the_vectors_is_the_own_one_first(module, merging, fit, stored):
    seen = []

    @dataclass(frozen=True)
    class Look(Transform):
        def __call__(self, vectors):
            seen.append((vectors.tasks, fingerprint(dict(vectors.base))))
            return vectors

    tuned = module()
    fit(tuned, merging(vectors=[stored("signs"), stored("land")], transform=chain(Look(), Mean())), max_epochs=1)
    assert seen == [(("shapes", "signs", "land"), tuned.base_fingerprint)] * 2


def test_loggers_get_every_value_at_its_own_step(module, merging, fit, tmp_path):
    watch, logger = Watch(), CSVLogger(tmp_path, name="", version="")
    fit(module(), merging(every_n_steps=5), watch, logger=logger, log_every_n_steps=3)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["merge/accuracy"]]
    assert [(row["step"], row["epoch"]) for row in rows] == [("4", "0"), ("5", "0"), ("9", "1"), ("11", "1")]
    history = {(hook, step): metrics for hook, step, metrics, _ in watch.history}
    for row, key in zip(rows, [("step", 5), ("validation", 6), ("step", 10), ("validation", 12)], strict=True):
        assert {name: float(row[name]) for name in NAMES} == pytest.approx(history[key])


def test_several_at_once_under_prefixes_of_their_own(module, merging, fit):
    sums, means = merging(), merging(transform=chain(Mean(), Scale(5.0)), prefix="average")
    metrics = fit(module(), sums, means).callback_metrics
    assert {name.replace("merge", "average") for name in NAMES} | NAMES <= set(metrics)
    assert metrics["merge/accuracy"] != metrics["average/accuracy"]


# Monitors


def test_a_checkpoint_of_the_best_merge(module, merging, fit, tmp_path):
    watch = Watch()
    best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="merge/accuracy", mode="max")
    often = ModelCheckpoint(
        tmp_path / "often", "{step}", monitor="merge/accuracy_others", mode="min", every_n_train_steps=5
    )
    extract = ExtractTaskVector(best="merge/accuracy")
    fit(module(learning_rate=0.1), best, often, extract, merging(every_n_steps=5), watch, max_epochs=6)
    history = {(hook, step): metrics for hook, step, metrics, _ in watch.history}
    validations = {step: metrics["merge/accuracy"] for (hook, step), metrics in history.items() if hook != "step"}
    step = max(validations, key=lambda step: (validations[step], -step))
    assert len(set(validations.values())) > 2
    assert step not in (min(validations), max(validations))
    assert float(best.best_model_score) == extract.best_value == validations[step]
    assert best.best_model_path.endswith(f"step={step}.ckpt")
    steps = {at: history["step", at]["merge/accuracy_others"] for at in range(5, 37, 5)}
    least = min(steps, key=lambda step: (steps[step], step))
    assert len(set(steps.values())) > 2
    assert float(often.best_model_score) == steps[least]
    assert often.best_model_path.endswith(f"step={least}.ckpt")


@pytest.mark.parametrize("at_the_end_of_epochs", [None, True, False])
def test_training_that_stops_when_the_merge_gets_worse(at_the_end_of_epochs, module, merging, fit):
    watch = Watch()
    fit(module(), merging(), watch, max_epochs=6)
    curve = [metrics["merge/accuracy"] for hook, _, metrics, _ in watch.history if hook == "validation"]
    stop = next(epoch for epoch in range(1, 6) if curve[epoch] <= max(curve[:epoch]))  # with a patience of one
    assert 0 < stop < 5
    stopping = EarlyStopping(
        "merge/accuracy", patience=1, mode="max", check_on_train_epoch_end=at_the_end_of_epochs, min_delta=0.0
    )
    trainer = fit(module(), stopping, merging(), max_epochs=6)
    assert trainer.global_step == 6 * (stop + 1)
    assert float(stopping.best_score) == max(curve[:stop])


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(module, merging, fit, tmp_path):
    def run(watch, *callbacks, **settings):
        tuned = module()
        trainer = fit(tuned, merging(every_n_steps=4), watch, *callbacks, max_steps=18, **settings)
        return tuned.state_dict(), trainer.optimizers[0].state_dict()["state"]

    whole, rest = Watch(), Watch()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    first = run(whole, keep)
    second = run(rest, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert_same(first, second)
    assert [entry[1:3] for entry in rest.history if entry[1] >= 8] == [
        entry[1:3] for entry in whole.history if entry[1] >= 8
    ]
    assert rest.history[0][1:3] == (7, {})  # nothing is evaluated again at step 6


# Every regime, with a CLIP: training does not notice, and the metrics are those of the public way


REGIMES = {
    "full": {},
    "attention": {"trainable": Attention(1)},
    "low rank": {"lora": LoRA(rank=2, dropout=0.3)},
    "linearised": {"linearized": True},
    "linearised, a part": {"linearized": True, "trainable": LastBlocks(1)},
    "linearised, cyclic": {"linearized": True, "penalty": TauJpPenalty("cyclic", 0.5, batch_size=4)},
    "direct, strict, logits": {"penalty": TauJpPenalty("strict", 0.1, batch_size=2, space="logits")},
}


@pytest.fixture
def folders(image_folder, write_colours, tmp_path):
    """Three tasks' images on disk."""
    return {"shapes": image_folder(10, 8), "signs": image_folder(23, 8), "land": str(write_colours(tmp_path / "land"))}


@pytest.fixture
def clip_run(clip_config, clip_weights, own_cache, folders, silent_trainer, tmp_path):
    """``clip_run(settings, callbacks)``: module and trainer after eight steps."""

    def run(settings, *callbacks, batch_size=6, **trainer_settings):
        torch.manual_seed(7)
        tuned = FineTuneModule(clip_config, clip_weights, learning_rate=1e-2, **settings)
        others = {name: path for name, path in folders.items() if name != "shapes"} if "penalty" in settings else None
        data = TaskDataModule(
            path=folders["shapes"], name="shapes", batch_size=batch_size, evaluation_batch_size=8, other_paths=others
        )
        trainer = silent_trainer(callbacks=list(callbacks), max_steps=8, **trainer_settings)
        trainer.fit(tuned, datamodule=data)
        return tuned, trainer

    return run


@pytest.fixture
def clip_vector(clip_config, clip_weights, tmp_path):
    """Path of a random task vector of the tiny CLIP."""
    clip = load_clip(clip_config, clip_weights)
    base, generator = dict(clip.visual.named_parameters()), torch.Generator().manual_seed(3)
    tau = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    TaskVector(tau, "signs", metadata={"base_fingerprint": clip.fingerprint}).save(tmp_path / "signs.safetensors")
    return str(tmp_path / "signs.safetensors")


def assert_same(first, second):
    """Equal, bit for bit, however deep."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        assert_same(list(first.values()), list(second.values()))
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            assert_same(one, two)
    else:
        assert first == second


@pytest.mark.parametrize("name", REGIMES)
def test_training_does_not_notice_and_the_metrics_are_those_of_the_merged_model(
    name, clip_run, clip_vector, clip_config, clip_weights, folders, silent_trainer
):
    def tasks():
        return MultiTaskDataModule(paths=folders, evaluation_batch_size=16)

    transform = ties(density=0.7, coefficient=0.8)
    plain, watched = Watch(), Watch()
    alone, trainer_alone = clip_run(REGIMES[name], plain)
    callback = EvaluateMerge([clip_vector], transform=transform, every_n_steps=2, data=tasks())
    merged, trainer = clip_run(REGIMES[name], callback, watched)
    assert_same(alone.state_dict(), merged.state_dict())
    assert_same(trainer_alone.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert_same(plain.states, watched.states)
    assert len(watched.states) == 8
    assert {name: value.grad is None for name, value in alone.named_parameters()} == {
        name: value.grad is None for name, value in merged.named_parameters()
    }
    assert all(not value.requires_grad and value.grad_fn is None for value in trainer.callback_metrics.values())

    linearized = REGIMES[name].get("linearized", False)
    later = MultiTaskModule(clip_config, clip_weights, linearized=linearized)
    accuracies = set()
    for _, step, metrics, tau in watched.history:
        if step in (2, 8):
            vectors = TaskVectors([TaskVector(tau, "shapes"), TaskVector.load(clip_vector)])
            later.load_task_vector(transform(vectors).single())
            evaluation = silent_trainer()
            evaluation.validate(later, datamodule=tasks(), verbose=False)
            found = {key: float(value) for key, value in evaluation.callback_metrics.items()}
            assert {key: metrics[key.replace("val/", "merge/")] for key in found} == found
            accuracies.add(tuple(found.values()))
    assert len(accuracies) == 2


def test_mixed_precision_is_that_of_the_validation(clip_run, clip_vector, folders):
    data = MultiTaskDataModule(paths=folders)
    callback = EvaluateMerge([clip_vector], "task_arithmetic", {"coefficient": 0.0}, every_n_steps=2, data=data)
    for precision in ("bf16-mixed", "bf16-true", "64-true"):
        seen = []

        class Look(L.Callback):
            def on_train_start(self, trainer, pl_module, seen=seen):
                head = pl_module.head
                head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))

        clip_run({}, callback, Look(), precision=precision)
        kind = torch.float64 if precision == "64-true" else torch.bfloat16
        assert set(seen) == {(kind, kind)}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif("torch.cuda.is_initialized()", reason="a process that uses CUDA cannot be forked")
def test_two_processes_count_what_one_counts(clip_run, clip_vector, folders, tmp_path):
    class Write(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "merge" in name}
            name = f"{trainer.world_size}-{trainer.global_rank}-{trainer.global_step}.json"
            (tmp_path / name).write_text(json.dumps(metrics))

    def run(processes, **settings):
        data = MultiTaskDataModule(paths=folders, evaluation_batch_size=10 // processes)
        callback = EvaluateMerge([clip_vector], transform=Mean(), every_n_steps=3, data=data, limit_batches=5)
        clip_run({"linearized": True}, callback, Write(), batch_size=6 // processes, devices=processes, **settings)
        names = [f"{processes}-{rank}-{step}.json" for rank in range(processes) for step in (4, 8)]
        return [json.loads((tmp_path / name).read_text()) for name in names]

    alone = run(1, val_check_interval=4, check_val_every_n_epoch=None)
    together = run(2, val_check_interval=4, check_val_every_n_epoch=None, strategy="ddp_fork")
    assert set(alone[0]) == NAMES
    assert alone[0] != alone[1]
    assert together == [*alone, *alone]  # on both processes


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vectors": []}, r"vectors: expected a list of at least one task vector file, got \[\]\. List those of"),
        ({"vectors": "a.safetensors"}, "vectors: expected a list of at least one task vector file, got 'a.safet"),
        ({"every_n_steps": 0}, "every_n_steps: expected a whole number of at least 1 or null, got 0."),
        ({"every_n_steps": True}, "every_n_steps: expected a whole number of at least 1 or null, got True."),
        ({"limit_batches": 0}, "limit_batches: expected a whole number of at least 1 or null, got 0."),
        ({"limit_batches": 1.5}, "limit_batches: expected a whole number of at least 1 or null, got 1.5."),
        ({"at_validation": False}, "every_n_steps and at_validation: expected at least one of them, got neither. Set"),
        ({"prefix": ""}, "prefix: expected a name that no other metric begins with, got ''. Use e.g. merge."),
        ({"prefix": "val"}, "prefix: expected a name that no other metric begins with, got 'val'. Use e.g. merge."),
        ({"recipe": None, "settings": None}, "recipe and transform: expected exactly one of them, got neither. Use"),
        ({"recipe": "tasks"}, "recipe: expected the name of a method, got 'tasks'"),
        ({"settings": {"scale": 1}}, "scale"),
    ],
)
def test_settings_that_are_refused(settings, message, merging):
    with pytest.raises(ConfigurationError, match=message):
        merging(**settings)


def test_recipe_and_transform_exclude_each_other(stored):
    with pytest.raises(ConfigurationError, match="recipe and transform: expected exactly one of them, got both"):
        EvaluateMerge([stored()], "task_arithmetic", transform=Sum())
    with pytest.raises(
        ConfigurationError, match=r"settings: expected none beside transform, got \{'coefficient': 1.0}"
    ):
        EvaluateMerge([stored()], settings={"coefficient": 1.0}, transform=Sum())


class NoTask(L.LightningModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError

    def configure_optimizers(self):
        return None


def refused_at_start(fit, tuned, callback, error, message, *others, **settings):
    counting = Watch()
    with pytest.raises(error, match=message) as caught:
        fit(tuned, callback, counting, *others, **settings)
    assert isinstance(caught.value, LitMergeError)
    assert "\n" not in str(caught.value)
    assert counting.states == [], "before any training"


def test_modules_and_data_that_are_refused(module, merging, fit, stored, data, tiny_data, tiny_encoder):
    refuse = refused_at_start
    refuse(
        fit,
        NoTask(),
        merging(),
        ConfigurationError,
        "EvaluateMerge: expected a module with the task vector of one task, such as FineTuneModule, got NoTask. Remove",
    )
    refuse(
        fit,
        module(),
        merging(data=tiny_data()),
        ConfigurationError,
        "data: expected a data module of several tasks, got TinyData. Use MultiTaskDataModule.",
    )
    refuse(
        fit,
        module(),
        merging(data=data(("shapes", "land"))),
        ConfigurationError,
        r"data: expected every merged task, got none of signs \(data: shapes, land\). Name the tasks of data as",
    )
    refuse(
        fit,
        module(),
        merging(data=data(("signs", "land"))),
        ConfigurationError,
        r"data: expected every merged task, got none of shapes \(data: signs, land\). Name",
    )
    other = data()
    other.tasks["shapes"].classes = ("a", "c", "b")
    refuse(
        fit,
        module(),
        merging(data=other),
        ConfigurationError,
        "data: expected shapes with the classes in training, a, b, c, got a, c, b. Give both data modules the same",
    )
    refuse(
        fit,
        module(),
        merging(data=None),
        ConfigurationError,
        "data: expected a data module, as shapes is no task of a known name, got none. Use MultiTaskDataModule with "
        "paths.",
    )
    refuse(
        fit,
        module(FineTuneModule),
        merging(),
        ConfigurationError,
        "head: expected one for TinyEncoder, which is no CLIP, got none",
    )
    refuse(
        fit,
        module(),
        merging(),
        ConfigurationError,
        "tasks: expected a name for every task, got none of the training data. Give it a name.",
        data=tiny_data(name=""),
    )


def test_vectors_and_transforms_that_are_refused(module, merging, fit, stored, tiny_encoder, tmp_path):
    def refuse(callback, error, message, *others, **settings):
        refused_at_start(fit, module(), callback, error, message, *others, **settings)

    refuse(merging(vectors=[str(tmp_path / "none.safetensors")]), FileFormatError, "none.safetensors")
    refuse(
        merging(vectors=[stored(base_fingerprint="0123456789abcdef")]),
        StructureMismatchError,
        r"task vectors \(signs\): expected the base model TinyEncoder \(fingerprint 0123456789abcdef\), got Tiny",
    )
    refuse(
        merging(vectors=[stored(encoder=tiny_encoder(5), known=False)]),
        StructureMismatchError,
        "task vectors: expected signs to have the 4 tensors of shapes, got 1 of another shape",
    )
    refuse(
        merging(transform=chain(Scale(0.3))),
        ConfigurationError,
        r"transform: expected one that leaves one vector, got 2 of chain\(Scale\(coefficient=0.3\)\). End it with Sum",
    )
    again = "vectors: expected other tasks than shapes, which is in training, each once, got {} again. Remove it."
    refuse(merging(vectors=[stored("shapes")]), ConfigurationError, again.format("shapes"))
    refuse(
        merging(vectors=[stored("land"), stored("land+shapes", tasks='["land", "shapes"]')]),
        ConfigurationError,
        again.format("land, shapes"),
    )
    refuse(
        merging(vectors=[stored("land"), stored("")]),
        ConfigurationError,
        "tasks: expected a name for every task, got none of .*nameless.safetensors. Give it a name.",
    )
    refuse(
        merging(),
        ConfigurationError,
        "prefix: expected another one for every EvaluateMerge, got 'merge' twice. Change one.",
        merging(every_n_steps=2),
    )


@pytest.mark.parametrize("kind", ["limit", "no images"])
def test_a_run_that_never_validates_is_refused(kind, module, merging, fit, tiny_data):
    class NoValidation(type(tiny_data())):
        def val_dataloader(self):
            return []

    settings = {"limit_val_batches": 0} if kind == "limit" else {"data": NoValidation(tiny_data().batches)}
    message = "at_validation: expected a run that validates, got one that never does. Set every_n_steps, or give"
    refused_at_start(fit, module(), merging(), ConfigurationError, message, **settings)
    metrics = fit(module(), merging(every_n_steps=2), max_epochs=1, **settings).callback_metrics
    assert set(metrics) >= NAMES


def test_tasks_without_labels_and_values_that_are_not_finite(module, merging, fit, data, stored):
    tasks = data()
    for batch in tasks.tasks["land"].batches:
        batch.labels.fill_(-1)
    with pytest.raises(DataError, match=r"land: expected labelled validation images, got none\. Give"):
        fit(module(), merging(data=tasks))
    with pytest.raises(NonFiniteError, match=r"merged parameters: expected finite values, got NaN or infinity in inn"):
        fit(module(), merging(transform=chain(Sum(), Scale(1e39))))
    with pytest.raises(NonFiniteError, match="merged task vector: expected finite values, got NaN or infinity in inn"):
        fit(module(linearized=True), merging(transform=chain(Sum(), Scale(1e39))))


# The command line


def test_the_command_with_embedded_tasks(clip_config, clip_weights, clip_vector, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    callback = {"vectors": [clip_vector], "recipe": "task_arithmetic", "limit_batches": 1, "every_n_steps": 2}
    checkpoint = {"monitor": "merge/accuracy", "mode": "max", "filename": "best"}
    callbacks = [
        {"class_path": "lit_merge.callbacks.EvaluateMerge", "init_args": callback},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = {"max_steps": 4, "val_check_interval": 3, "callbacks": callbacks, "limit_val_batches": 1, **quiet}
    model = {"class_path": "FineTuneModule", "init_args": {"model": clip_config, "pretrained": clip_weights}}
    config.write_text(json.dumps({"trainer": trainer, "model": model}))
    output = tmp_path / "run"
    assert main(["fit", f"--config={config}", "--data.task=digits", f"--output={output}"]) == 0, capsys.readouterr().err
    with (output / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["merge/accuracy"]]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        one, two = float(row["merge/digits/accuracy"]), float(row["merge/signs/accuracy"])
        assert float(row["merge/accuracy"]) == pytest.approx((one + two) / 2)
        assert one + two > 0
        assert float(row["merge/accuracy_others"]) == pytest.approx(two)
    assert list(output.rglob("best.ckpt"))
