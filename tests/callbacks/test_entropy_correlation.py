"""Entropy and loss of single images: what is measured is what a plain loop gives, and training does not notice."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from builders.learned_merge import BlockEncoder, Merging, NoMerge, Steps
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_merge.callbacks import EntropyLossCorrelation, LogCoefficients
from lit_merge.data import MultiTaskDataModule
from lit_merge.data.adaptation import MergeDataModule
from lit_merge.errors import ConfigurationError, DataError, LitMergeError
from lit_merge.metrics import spearman
from lit_merge.models import Preprocessing
from lit_merge.modules.merge import MergeModule

TASKS = ("shapes", "signs")


# ------------------------------------------------------------------------------------------- the rank correlation


def plain_spearman(first, second):
    """Pearson's correlation of the ranks; a rank is one plus how many are smaller plus half of the other equal ones."""

    def ranks(values):
        smaller = [sum(other < value for other in values) for value in values]
        equal = [sum(other == value for other in values) for value in values]
        return [1 + less + (same - 1) / 2 for less, same in zip(smaller, equal, strict=True)]

    return np.corrcoef(ranks(first), ranks(second))[0, 1]


@pytest.mark.parametrize("distinct", [2, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_correlation_of_ranks_with_and_without_equal_values(distinct, dtype):
    generator = torch.Generator().manual_seed(distinct)
    first = torch.randint(distinct, (60,), generator=generator)
    second = first + torch.randint(distinct, (60,), generator=generator)
    value = spearman(first.to(dtype), second.to(dtype))
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(plain_spearman(first.tolist(), second.tolist()), abs=1e-12)


def test_correlations_that_are_known():
    values = torch.tensor([0.3, -1.0, 7.0, 2.5, math.inf])
    assert float(spearman(values, values.exp())) == 1.0
    assert float(spearman(values, -values)) == -1.0
    many = torch.cat([torch.zeros(70_000), torch.ones(70_000)])  # whose ranks add up to more than 32 bits hold
    assert float(spearman(many, many)) == 1.0
    assert float(spearman(many, many.flip(0))) == -1.0
    assert float(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("first", "second"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, math.nan], [1.0, 2.0])]
)
def test_correlations_that_are_not_defined(first, second):
    assert spearman(torch.tensor(first), torch.tensor(second)).isnan()
    assert spearman(torch.tensor(second), torch.tensor(first)).isnan()


@pytest.mark.parametrize(("first", "second"), [((3,), (4,)), ((2, 2), (2, 2)), ((), ())])
def test_shapes_that_are_refused(first, second):
    with pytest.raises(
        LitMergeError, match=r"^spearman: expected two tensors of shape \[N\], got \[.*\] and \[.*\]\. Fl"
    ):
        spearman(torch.ones(first), torch.ones(second))


# -------------------------------------------------------------------------------------------------- the callback


@pytest.fixture
def data(tiny_data, tiny_tasks):
    """Two tasks; in validation some images are padding, some unlabelled."""

    def build():
        modules = {}
        for seed, task in enumerate(TASKS):
            made = tiny_data(name=task, seed=seed, count=3, size=10)
            made.batches[1].labels[3:5] = -1
            made.batches[2].indices[-2:] = -1
            made.batches[2].images[-2:] = 0
            modules[task] = made
        return tiny_tasks(modules)

    return build


@pytest.fixture
def fit(silent_trainer, data):
    """``fit(module, callbacks, …)``: the trainer after a run of three batches per epoch."""

    def run(module, *callbacks, ckpt_path=None, images=None, **settings):
        torch.manual_seed(5)
        settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        trainer = silent_trainer(callbacks=list(callbacks), **{"max_steps": 7, **settings})
        trainer.fit(module, datamodule=images or data(), ckpt_path=ckpt_path)
        return trainer

    return run


def sure(module, factor):
    """Multiply all logits."""
    with torch.no_grad():
        for value in module.heads.parameters():
            value.mul_(factor)
    return module


def expected(raw, images, limit=None, factor=1.0):
    """The correlations, from scratch and in float64, image by image."""
    module, everything, tasks = sure(Merging(TASKS).double(), factor), [], {}
    module.merged.module.eval()
    with torch.no_grad():
        module.merged.coefficients = nn.Parameter(raw.double())
        for task, part in images.tasks.items():
            rows = []
            for batch in part.batches[:limit]:
                for image, label, index in zip(*batch, strict=True):
                    if index < 0 or label < 0:
                        continue
                    logits = module.classify(module(image[None].double()), task)[0].tolist()
                    total = sum(math.exp(logit) for logit in logits)
                    chances = [math.exp(logit) / total for logit in logits]
                    rows.append((-sum(p * math.log(p) for p in chances), -math.log(chances[int(label)])))
            tasks[task] = plain_spearman(*zip(*rows, strict=True))
            everything += rows
    return {"spearman": plain_spearman(*zip(*everything, strict=True)), "tasks": tasks}


@pytest.mark.parametrize("limit", [None, 1])
def test_every_measurement_is_that_of_a_plain_loop(limit, fit, data, tmp_path):
    callback, steps = EntropyLossCorrelation(steps=[5, 0, 2, 5], limit_batches=limit), Steps()
    fit(Merging(TASKS), steps, callback)
    assert [record["step"] for record in callback.measured] == [0, 2, 5]
    for record in callback.measured:
        oracle = expected(steps.coefficients[record["step"]], data(), limit)
        assert record["spearman"] == pytest.approx(oracle["spearman"], abs=1e-9)
        assert record["tasks"] == pytest.approx(oracle["tasks"], abs=1e-9)
    assert len({record["spearman"] for record in callback.measured}) == 3
    images = 26 if limit is None else 10
    assert json.loads((tmp_path / "run" / "spearman.json").read_text()) == {
        "split": "val",
        "images": dict.fromkeys(TASKS, images),
        "measured": callback.measured,
    }


def test_images_that_the_model_is_sure_of_are_told_apart(fit, data):
    callback = EntropyLossCorrelation([0])
    fit(sure(Merging(TASKS), 30.0), callback)
    oracle = expected(torch.full((2, 10), 0.3), data(), factor=30.0)
    assert callback.measured[0]["tasks"] == pytest.approx(oracle["tasks"], abs=1e-9)
    assert callback.measured[0]["spearman"] == pytest.approx(oracle["spearman"], abs=1e-9)


def test_loggers_and_monitors_get_every_measurement(fit, tmp_path):
    callback, logger = EntropyLossCorrelation(every_n_steps=3), CSVLogger(tmp_path, name="", version="")
    seen = Steps()
    fit(Merging(TASKS), callback, seen, logger=logger, log_every_n_steps=2)
    assert [record["step"] for record in callback.measured] == [0, 3, 6]
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["spearman"]]
    assert [row["step"] for row in rows] == ["0", "2", "5"]
    for row, record in zip(rows, callback.measured, strict=True):
        assert float(row["spearman"]) == pytest.approx(record["spearman"])
        for task in TASKS:
            assert float(row[f"spearman/{task}"]) == pytest.approx(record["tasks"][task])
    assert seen.metrics[3]["spearman"] == pytest.approx(callback.measured[1]["spearman"])
    assert "spearman" not in seen.metrics[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_training_does_not_notice(precision, fit):
    class Train(L.Callback):
        """Dropout in training, which a measurement has to switch off and on again."""

        def on_train_start(self, trainer, pl_module):
            pl_module.merged.module.train()
            pl_module.heads.eval()

    def run(*callbacks):
        module, steps = Merging(TASKS), Steps()
        trainer = fit(module, Train(), *callbacks, steps, precision=precision)
        assert module.merged.module.training
        return module.state_dict(), trainer.optimizers[0].state_dict()["state"][0], steps.states

    (first, first_moments, first_states), (second, moments, states) = run(), run(EntropyLossCorrelation([0, 1, 4]))
    assert first_states == states
    assert len(states) == 7
    for one, two in ((first, second), (first_moments, moments)):
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_test_split_when_it_is_asked_for(fit, tiny_data, tiny_tasks, data, tmp_path):
    class Other(type(data().tasks["shapes"])):
        def __init__(self, task, seed):
            super().__init__(tiny_data(seed=seed).batches, task)

    class Tasks(tiny_tasks):
        ready = False

        def setup(self, stage):
            self.ready = self.ready or stage == "test"

        def test_dataloader(self):
            assert self.ready, "set up"
            return [Other(task, seed + 20).loader() for seed, task in enumerate(TASKS)]

    callback = EntropyLossCorrelation([0], split="test", path="found/test.json")
    fit(Merging(TASKS), callback, images=Tasks(data().tasks))
    tests = tiny_tasks({task: Other(task, seed + 20) for seed, task in enumerate(TASKS)})
    raw = torch.full((2, 10), 0.3)
    assert callback.measured[0]["tasks"] == pytest.approx(expected(raw, tests)["tasks"], abs=1e-9)
    assert json.loads((tmp_path / "run" / "found" / "test.json").read_text())["split"] == "test"


def test_what_is_not_defined_is_null_in_the_file(fit, tmp_path):
    module = Merging(TASKS)
    with torch.no_grad():
        for value in module.heads["signs"].parameters():
            value.zero_()  # every image is as uncertain as every other
    callback = EntropyLossCorrelation([0])
    fit(module, callback)
    assert math.isnan(callback.measured[0]["tasks"]["signs"])
    (record,) = json.loads((tmp_path / "run" / "spearman.json").read_text())["measured"]
    assert record["tasks"]["signs"] is None
    assert record["tasks"]["shapes"] == callback.measured[0]["tasks"]["shapes"]
    assert record["spearman"] == callback.measured[0]["spearman"]


def test_a_step_of_several_batches_is_measured_once(fit):
    callback = EntropyLossCorrelation(every_n_steps=1)
    fit(Merging(TASKS), callback, max_steps=-1, max_epochs=2, accumulate_grad_batches=2)
    assert [record["step"] for record in callback.measured] == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_what_was_measured_and_another_one_forgets(fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, rest = EntropyLossCorrelation([0, 3, 5]), EntropyLossCorrelation([0, 3, 5])
    fit(Merging(TASKS), whole, keep)
    fit(Merging(TASKS), rest, ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert [record["step"] for record in rest.measured] == [0, 3, 5]
    assert rest.measured[:2] == whole.measured[:2]
    content = json.loads((tmp_path / "run" / "spearman.json").read_text())
    assert content["measured"] == rest.measured
    fit(Merging(TASKS), rest)
    assert rest.measured[:1] == whole.measured[:1]
    assert len(rest.measured) == 3


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif("torch.cuda.is_initialized()", reason="a process that uses CUDA cannot be forked")
def test_two_processes_rank_all_images_together(image_folder, silent_trainer, tmp_path):
    class Write(L.Callback):
        def on_train_end(self, trainer, pl_module):
            correlation, coefficients = (c for c in trainer.callbacks if hasattr(c, "every_n_steps"))
            content = {"measured": correlation.measured, "history": coefficients.history}
            name = f"{trainer.world_size}-{trainer.global_rank}.json"
            (tmp_path / name).write_text(json.dumps(content))

    folders = {"shapes": image_folder(5, 4), "signs": image_folder(7, 4)}  # 15 and 21 images: one is padding

    def run(processes, **settings):
        torch.manual_seed(5)
        module = Merging(TASKS)
        module.merged.module.eval()  # which random values are dropped depends on the process
        module.preprocessing = Preprocessing(image_size=4)
        batches = {"batch_size": 6 // processes, "evaluation_batch_size": 8 // processes}
        images = MultiTaskDataModule(paths=folders, augment=False, **batches)
        callbacks = [EntropyLossCorrelation([0, 2]), LogCoefficients(2, figures=True), Write()]
        trainer = silent_trainer(callbacks=callbacks, max_steps=2, devices=processes, **settings)
        trainer.fit(module, datamodule=images)
        written = json.loads((tmp_path / "run" / "spearman.json").read_text())
        assert written["images"] == {"shapes": 15, "signs": 21}
        return [json.loads((tmp_path / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]

    (alone,), (first, second) = run(1), run(2, strategy="ddp_fork")
    assert first == second, "on both processes"
    for one, two, step in zip(alone["measured"], first["measured"], (0, 2), strict=True):
        assert one["step"] == two["step"] == step
        assert two["tasks"] == pytest.approx(one["tasks"], abs=1e-9)
        assert two["spearman"] == pytest.approx(one["spearman"], abs=1e-9)
    assert first["history"][-1]["mean"] == pytest.approx(alone["history"][-1]["mean"], abs=1e-5)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif("torch.cuda.is_initialized()", reason="a process that uses CUDA cannot be forked")
def test_images_that_every_process_has_count_once(fit, tmp_path):
    def measured(**settings):
        fit(Merging(TASKS), EntropyLossCorrelation([0]), max_steps=1, **settings)
        return json.loads((tmp_path / "run" / "spearman.json").read_text())

    assert measured(devices=2, strategy="ddp_fork") == measured()


def test_tasks_of_numbers_have_no_entropy_and_are_left_out(fit, data, tmp_path):
    class WithNumbers(Merging):
        numbers = TASKS[:1]

        def head_of(self, task):
            return SimpleNamespace(numbers=None) if task in self.numbers else self.heads[task]

    callback = EntropyLossCorrelation([0])
    fit(WithNumbers(TASKS), callback, max_steps=1)
    assert list(callback.measured[0]["tasks"]) == list(TASKS[1:])
    assert set(json.loads((tmp_path / "run" / "spearman.json").read_text())["images"]) == set(TASKS[1:])
    WithNumbers.numbers = TASKS
    with pytest.raises(ConfigurationError, match="expected tasks with classes, got numbers alone in shapes"):
        fit(WithNumbers(TASKS), EntropyLossCorrelation([0]), max_steps=1)


# ---------------------------------------------------------------------------------------------- the whole module


def test_both_callbacks_with_the_module_itself(image_folder, silent_trainer, tmp_path):
    folders = {"shapes": image_folder(5, 4), "signs": image_folder(7, 4)}
    stand_in = Merging(TASKS)
    paths = []
    for task in TASKS:
        paths.append(str(tmp_path / f"{task}.safetensors"))
        stand_in.merged.task_vectors.vector(task).save(paths[-1])

    def run(*callbacks):
        torch.manual_seed(5)
        module = MergeModule(
            vectors=paths,
            encoder=BlockEncoder(),
            heads={task: Merging(TASKS).heads[task] for task in TASKS},
            preprocessing=Preprocessing(image_size=4),
            learning_rate=0.05,
        )
        module.network.load_state_dict(stand_in.merged.module.state_dict())
        images = MergeDataModule("test", paths=folders, batch_size=6)
        steps = Steps()
        silent_trainer(callbacks=[*callbacks, steps], max_steps=4).fit(module, datamodule=images)
        return module, steps, images

    correlation, log = EntropyLossCorrelation([0, 4]), LogCoefficients(2)
    (alone, first, _), (module, second, images) = run(), run(correlation, log)
    assert first.states == second.states
    assert torch.equal(alone.merged.coefficients, module.merged.coefficients)
    assert [record["step"] for record in log.history] == [0, 2, 4]
    assert log.history[2]["mean"] == pytest.approx(
        dict(zip(TASKS, second.coefficients[4].clamp(0, 1).mean(1).tolist(), strict=True))
    )
    assert (tmp_path / "run" / "coefficients_depth.png").exists()
    stand_in.double().merged.module.eval()
    for record in correlation.measured:
        with torch.no_grad():
            stand_in.merged.coefficients.copy_(second.coefficients[record["step"]])
            for task, loader in zip(TASKS, images.val_dataloader(), strict=True):
                (batch,) = loader
                logits = stand_in.classify(stand_in(batch.images.double()), task)
                chances = logits.softmax(-1)
                losses = -chances[torch.arange(len(chances)), batch.labels].log()
                entropies = -(chances * chances.log()).sum(-1)
                oracle = plain_spearman(entropies.tolist(), losses.tolist())
                assert record["tasks"][task] == pytest.approx(oracle, abs=1e-9)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "steps and every_n_steps: expected exactly one of them, got neither. Use e.g. every_n_steps: 100."),
        ({"steps": [1], "every_n_steps": 2}, "steps and every_n_steps: expected exactly one of them, got both. Use"),
        ({"every_n_steps": 0}, "every_n_steps: expected a whole number of at least 1 or null, got 0."),
        ({"every_n_steps": True}, "every_n_steps: expected a whole number of at least 1 or null, got True."),
        ({"steps": [0], "limit_batches": 0}, "limit_batches: expected a whole number of at least 1 or null, got 0."),
        ({"steps": []}, r"steps: expected a list of numbers of optimiser steps, 0 or more, got \[\]. Use e.g."),
        ({"steps": [3, -1]}, r"steps: expected a list of numbers of optimiser steps, 0 or more, got \[3, -1\]. Use"),
        ({"steps": [1.5]}, r"steps: expected a list of numbers of optimiser steps, 0 or more, got \[1.5\]. Use"),
        ({"steps": "10"}, "steps: expected a list of numbers of optimiser steps, 0 or more, got '10'. Use"),
        ({"steps": [0], "split": "train"}, "split: expected val or test, got 'train'."),
        ({"steps": [0], "path": "a.csv"}, "path: expected a file ending in .json, got 'a.csv'."),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        EntropyLossCorrelation(**settings)


def test_modules_data_and_runs_that_are_refused(fit, data, tiny_data, silent_trainer):
    def refuse(error, message, module, callback, run=fit, **settings):
        steps = Steps()
        with pytest.raises(error, match=message) as caught:
            run(module, callback, steps, **settings)
        assert "\n" not in str(caught.value)
        assert steps.states == [], "before any training"

    refuse(
        ConfigurationError,
        r"^EntropyLossCorrelation: expected a module that learns merging coefficients, such as MergeModule, got NoMerge"
        r" without merged\. Remove the callback\.$",
        NoMerge(),
        EntropyLossCorrelation([0]),
    )
    refuse(
        ConfigurationError,
        r"^data: expected a data module of several tasks, got TinyData\. Use MultiTaskDataModule\.$",
        Merging(TASKS),
        EntropyLossCorrelation([0]),
        images=tiny_data(),
    )
    refuse(
        ConfigurationError,
        r"^data: expected a data module of several tasks, got none\. Use MultiTaskDataModule\.$",
        Merging(TASKS),
        EntropyLossCorrelation([0]),
        run=lambda module, *callbacks: silent_trainer(callbacks=list(callbacks), max_steps=1).fit(
            module, data().train_dataloader()
        ),
    )
    refuse(
        ConfigurationError,
        r"^steps: expected none behind the run's last optimiser step, 7, got 8\. Remove it, or train longer\.$",
        Merging(TASKS),
        EntropyLossCorrelation([0, 8]),
    )
    unlabelled = data()
    for batch in unlabelled.tasks["signs"].batches:
        batch.labels.fill_(-1)
    refuse(
        DataError,
        r"^signs: expected labelled images in the val split, got none\. Give the task some, or remove EntropyLossCor",
        Merging(TASKS),
        EntropyLossCorrelation([0]),
        images=unlabelled,
    )
