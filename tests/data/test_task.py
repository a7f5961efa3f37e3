"""The data modules, alone and under a Trainer, on one process and two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.batch_recorder import SMALL, Recorder, quiet_trainer
from PIL import Image

from lit_merge.data import EMBEDDED_TASKS, ImageBatch, MultiTaskDataModule, TaskDataModule, contact_sheet, load_split
from lit_merge.errors import ConfigurationError, DataError, WriteError
from lit_merge.models import Preprocessing

ROOT = Path(__file__).parents[2]
DIGITS = {"train": 1000, "val": 250, "test": 547}


def make_classes(root, count=10, folders=("cat", "dog")):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(root / folder / f"{index}.png")
    return root


# One task


def test_a_task_without_a_trainer():
    data = TaskDataModule("digits", preprocessing=SMALL, batch_size=64)
    assert data.name == "digits"
    assert data.classes == EMBEDDED_TASKS["digits"].classes
    assert data.templates == EMBEDDED_TASKS["digits"].templates
    data.prepare_data()
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 1000 // 64
    assert all(isinstance(batch, ImageBatch) for batch in batches)
    assert {tuple(batch.images.shape) for batch in batches} == {(64, 3, 8, 8)}
    assert {(batch.images.dtype, batch.labels.dtype, batch.indices.dtype) for batch in batches} == {
        (torch.float32, torch.int64, torch.int64)
    }
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        whole = [torch.cat(parts) for parts in zip(*loader, strict=True)]
        assert whole[2].tolist() == list(range(DIGITS[split]))
        assert torch.equal(whole[1], load_split("digits", split)[1])
    assert data.predict_names()[:2] == ["digits/test/0", "digits/test/1"]
    assert len(data.predict_names()) == 547


def test_augment_and_labelled():
    plain = TaskDataModule("digits", preprocessing=Preprocessing(32), augment=False, labelled=False, batch_size=7)
    plain.setup("fit")
    batch = next(iter(plain.train_dataloader()))
    assert batch.labels.tolist() == [-1] * 7
    expected = Preprocessing(32).normalise(load_split("digits", "train")[0][batch.indices])
    assert torch.equal(batch.images, expected)
    assert set(next(iter(plain.val_dataloader())).labels.tolist()) == set(range(10))
    augmented = TaskDataModule("digits", preprocessing=Preprocessing(32), batch_size=7)
    augmented.setup("fit")
    other = next(iter(augmented.train_dataloader()))
    assert torch.equal(other.indices, batch.indices)
    assert not torch.equal(other.images, batch.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_under_a_trainer(workers):
    module = Recorder()
    data = TaskDataModule("digits", batch_size=100, workers=workers)
    quiet_trainer(limit_train_batches=3).fit(module, datamodule=data)
    by_epoch = [[batch for epoch, batch in module.trained if epoch == wanted] for wanted in (0, 1)]
    assert [len(batches) for batches in by_epoch] == [3, 3]
    dataset = data.datasets["train"]
    for epoch, batches in enumerate(by_epoch):
        for batch in batches:
            again = dataset.__getitems__([epoch * 1000 + index for index in batch.indices.tolist()])
            assert all(torch.equal(left, right) for left, right in zip(batch, again, strict=True))
    assert not torch.equal(by_epoch[0][0].indices, by_epoch[1][0].indices)
    assert sum(len(batch.labels) for _, batch in module.evaluated) == 2 * 250


def test_the_test_and_predict_stages():
    module = Recorder()
    trainer = quiet_trainer()
    data = TaskDataModule("digits", evaluation_batch_size=200)
    trainer.test(module, datamodule=data, verbose=False)
    assert [len(batch.labels) for _, batch in module.evaluated] == [200, 200, 147]
    predicted = trainer.predict(module, datamodule=data)
    assert torch.cat([batch.indices for batch in predicted]).tolist() == list(range(547))


def test_predict_path(tmp_path):
    folder = make_classes(tmp_path / "some", 3)
    for path, count in ((folder, 6), (folder / "cat" / "1.png", 1)):
        data = TaskDataModule("digits", predict_path=str(path))
        batches = quiet_trainer().predict(Recorder(), datamodule=data)
        names = [data.predict_names()[index] for batch in batches for index in batch.indices]
        assert len(names) == count
        assert {label for batch in batches for label in batch.labels.tolist()} == {-1}
    assert names == [str(folder / "cat" / "1.png")]
    (folder / "cat" / "bad.png").write_bytes(b"")
    data = TaskDataModule("digits", predict_path=str(folder), skip_corrupt=True, preprocessing=SMALL)
    with pytest.warns(UserWarning, match="left out 1 image"):
        data.setup("predict")
    assert len(data.predict_names()) == 6


def test_a_folder_under_a_trainer(tmp_path):
    module = Recorder()
    data = TaskDataModule(path=str(make_classes(tmp_path / "pets")), batch_size=4, workers=1)
    quiet_trainer().fit(module, datamodule=data)
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))
    assert [len(batch.labels) for _, batch in module.trained] == [4] * 8
    assert not torch.equal(module.trained[0][1].images, module.trained[4][1].images)


def test_fewer_images_than_a_batch_and_no_validation(tmp_path):
    module = Recorder()
    path = make_classes(tmp_path, 3)
    data = TaskDataModule(path=str(path), batch_size=100, fractions=(1, 0, 0))
    quiet_trainer().fit(module, datamodule=data)
    assert [len(batch.labels) for _, batch in module.trained] == [6, 6]
    assert not module.evaluated
    with pytest.raises(DataError, match=r"expected validation images, got none\. Raise the second of fractions\."):
        quiet_trainer().validate(module, datamodule=data, verbose=False)


def test_another_seed_leaves_the_splits_alone(tmp_path):
    """A test image of one run must not be a training image of another that differs in its seed."""
    path = str(make_classes(tmp_path / "pets"))
    modules = [
        TaskDataModule(path=path, preprocessing=SMALL, **settings)
        for settings in ({}, {"seed": 3, "name": "beasts"}, {"split_seed": 1})
    ]
    for module in modules:
        module.setup("fit")
        module.setup("test")
    first, other_seed, other_split = (
        [set(dataset.names) for dataset in module.datasets.values()] for module in modules
    )
    assert first == other_seed != other_split
    assert [module.name for module in modules] == ["pets", "beasts", "pets"]


TWO_PROCESSES = """
import torch
from lit_merge.data import TaskDataModule
from builders.batch_recorder import Recorder, quiet_trainer

module = Recorder()
data = TaskDataModule("digits", batch_size=50)
trainer = quiet_trainer(devices=2, strategy="ddp", limit_train_batches=3)
trainer.fit(module, datamodule=data)
trainer.test(module, datamodule=data, verbose=False)
record = {"trained": [(epoch, tuple(batch)) for epoch, batch in module.trained],
          "evaluated": [tuple(batch) for _, batch in module.evaluated]}
torch.save(record, f"{trainer.global_rank}.pt")
"""


def test_two_processes_see_what_one_sees(tmp_path, monkeypatch, fork_server):
    """DDP with Lightning's own handling of samplers, compared with one process and twice the batch."""
    monkeypatch.chdir(tmp_path)
    fork_server.run_on_two(TWO_PROCESSES)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    module = Recorder()
    data = TaskDataModule("digits", batch_size=100)
    trainer = quiet_trainer(limit_train_batches=3)
    trainer.fit(module, datamodule=data)
    assert len(ranks[0]["trained"]) == len(module.trained) == 6
    for (epoch, alone), (_, left), (_, right) in zip(module.trained, *(rank["trained"] for rank in ranks), strict=True):
        images, labels, indices = (torch.cat(parts) for parts in zip(left, right, strict=True))
        order, expected = indices.argsort(), alone.indices.argsort()
        assert torch.equal(indices[order], alone.indices[expected]), epoch
        assert torch.equal(labels[order], alone.labels[expected])
        assert torch.equal(images[order], alone.images[expected])
    seen = [torch.cat([batch[2] for batch in rank["evaluated"]]) for rank in ranks]
    evaluated = {"val": 2 * 250, "test": 547 + 1}  # two validations while fitting; one entry of padding in the test
    assert [len(indices) for indices in seen] == [sum(evaluated.values()) // 2] * 2
    assert int((torch.cat(seen) == -1).sum()) == 1


# Several tasks


@pytest.fixture
def several(tmp_path):
    path = make_classes(tmp_path / "folder")
    return MultiTaskDataModule(
        ["digits"],
        {"pets": str(path)},
        batch_size=10,
        class_names={"pets": {"cat": "lion"}},
        templates={"pets": ["{}"]},
    )


def test_several_tasks(several):
    assert several.task_names == ("digits", "pets")
    assert several.tasks["pets"].name == "pets"
    assert several.tasks["pets"].classes == ("lion", "dog")
    assert several.tasks["pets"].templates == ("{}",)
    module = Recorder()
    quiet_trainer(max_epochs=1).fit(module, datamodule=several)
    assert len(module.trained) == 100  # as the largest task
    assert all(list(batch) == ["digits", "pets"] for _, batch in module.trained)
    assert {len(part.labels) for _, batch in module.trained for part in batch.values()} == {10}
    assert [which for which, _ in module.evaluated] == [0, 1]
    module.evaluated.clear()
    quiet_trainer().test(module, datamodule=several, verbose=False)
    assert [(which, len(batch.labels)) for which, batch in module.evaluated] == [(0, 256), (0, 256), (0, 35), (1, 2)]


def test_a_subset(several):
    chosen = several.subset(["pets"])
    assert chosen.task_names == ("pets",)
    assert several.task_names == ("digits", "pets")
    module = Recorder()
    quiet_trainer().test(module, datamodule=chosen, verbose=False)
    assert [which for which, _ in module.evaluated] == [0]
    for names, got in ((["pet"], "got pet."), ([], "got none."), (["pets", "pets"], "got pets, pets.")):
        with pytest.raises(ConfigurationError, match=f"subset: expected names among digits, pets, each once, {got}"):
            several.subset(names)


def test_a_task_without_validation_keeps_its_place(tmp_path):
    path = make_classes(tmp_path)
    several = MultiTaskDataModule(["digits"], {"pets": str(path)}, fractions=(0.9, 0, 0.1), preprocessing=SMALL)
    several.setup("fit")
    assert [len(loader) for loader in several.val_dataloader()] == [1, 0]


def test_which_tasks():
    assert MultiTaskDataModule().task_names == tuple(EMBEDDED_TASKS)
    assert MultiTaskDataModule(paths={"pets": "pets"}).task_names == ("pets",)
    assert MultiTaskDataModule(labelled=False).tasks["signs"].labelled is False


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tasks": []}, "tasks, paths and sources: expected at least one task, each name once, got none."),
        ({"tasks": ["digits", "digits"]}, "got digits more than once."),
        ({"tasks": ["digits"], "paths": {"digits": "x"}}, "got digits more than once."),
        ({"class_names": {"digits": {}}}, "class_names: expected names among those of paths, of which there are none"),
        ({"templates": {"digit": "mnist"}}, "templates: expected names among digits, clutter"),
        ({"tasks": ["digit"]}, "got 'digit'. Did you mean digits?"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0."),
    ],
)
def test_refused_several(settings, expected):
    with pytest.raises(ConfigurationError) as error:
        MultiTaskDataModule(**settings)
    assert expected in str(error.value)


# Refusals


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "task, path and source: expected exactly one of them, got none. Set task"),
        ({"task": "digits", "path": "x"}, "got task 'digits' and path 'x'."),
        (
            {"task": "letter"},
            "task: expected one of digits, clutter, letters, signs, textures, land, vehicles, scenes, or a published "
            "data set (sun397, cars, resisc45, eurosat, svhn, gtsrb, mnist, dtd and 18 more), got 'letter'. "
            "Did you mean letters?",
        ),
        ({"task": "./digits"}, "got './digits'. For a folder of your own images set path instead."),
        ({"task": "qqqq"}, "For a folder of your own images set path instead."),
        ({"task": "digits", "batch_size": 0}, "batch_size: expected an integer of at least 1, got 0."),
        ({"task": "digits", "evaluation_batch_size": 1.5}, "evaluation_batch_size: expected an integer"),
        ({"task": "digits", "workers": -1}, "workers: expected an integer of at least 0, got -1."),
        ({"task": "digits", "seed": -1}, "seed: expected an integer of at least 0, got -1."),
        ({"task": "digits", "class_names": {"a": "b"}}, "class_names: expected only with path, got {'a': 'b'} with"),
        ({"task": "digits", "skip_corrupt": True}, "skip_corrupt: expected only with path, got True with"),
        ({"task": "digits", "fractions": (0.5, 0.2, 0.3)}, "fractions: expected only with path"),
        ({"task": "digits", "split_seed": 1}, "split_seed: expected only with path, got 1 with"),
        ({"task": "digits", "name": "numbers"}, "name: expected only with path, got 'numbers' with"),
        ({"path": "x", "split_seed": 0.5}, "split_seed: expected an integer of at least 0, got 0.5."),
        ({"path": "x", "fractions": (0.5, 0.2, 0.2)}, "fractions: expected those of train, val and test"),
        ({"path": "x", "templates": ["a cat"]}, "templates: expected at least one text"),
    ],
)
def test_refused_settings(settings, expected):
    with pytest.raises(ConfigurationError) as error:
        TaskDataModule(**settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_preprocessing_must_be_known():
    with pytest.raises(ConfigurationError, match="expected the trainer's module to have it, got no trainer"):
        TaskDataModule("digits").setup("fit")
    module = Recorder()
    del module.preprocessing
    with pytest.raises(ConfigurationError, match="got Recorder, which has none"):
        quiet_trainer().test(module, datamodule=TaskDataModule("digits"), verbose=False)


def test_loaders_need_their_stage():
    with pytest.raises(ConfigurationError) as error:
        TaskDataModule("digits").train_dataloader()
    assert str(error.value) == (
        "train images of digits: expected setup('fit') first, got none. Call it, or use a Trainer."
    )


def test_a_missing_folder_is_said_at_setup():
    with pytest.raises(DataError, match="expected the folder of a task, got no such path"):
        TaskDataModule(path="/nowhere/at/all", preprocessing=SMALL).setup("fit")


def test_too_many_processes(tmp_path):
    data = TaskDataModule(path=str(make_classes(tmp_path, 3)), preprocessing=SMALL)
    data.setup("fit")
    data.trainer = type("Many", (), {"world_size": 8, "global_rank": 0})()
    with pytest.raises(DataError, match="got 2 for 8 processes"):
        data.train_dataloader()


# The package and the contact sheet


def test_importing_the_package_is_light():
    program = (
        "import sys, lit_merge.data; heavy = {'lightning', 'torchvision', 'torch', 'PIL'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert set(lit_merge.data.__all__) <= set(dir(lit_merge.data))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, cwd=ROOT)
    import lit_merge.data

    for name in lit_merge.data.__all__:  # as if no one had asked for it before
        assert lit_merge.data.__getattr__(name) is getattr(lit_merge.data, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lit_merge.data.nothing


def test_the_contact_sheet(tmp_path):
    path = contact_sheet(tmp_path / "sheet.png", tasks=["digits"], columns=10, rows=3)
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (80 + 10 * 34 - 2 + 8, 8 + 3 * 34 + 6)
        pixels = np.asarray(image)
    images, labels = load_split("digits", "test")
    first_three = images[int((labels == 3).nonzero()[0])].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[8:40, 80 + 3 * 34 : 80 + 3 * 34 + 32], first_three)
    assert (pixels[8:110, :80] < 128).any()  # the name
    contact_sheet(path, tasks=["digits"], columns=2, rows=1)
    with Image.open(path) as image:
        assert image.size == (80 + 2 * 34 - 2 + 8, 8 + 34 + 6)


def test_refused_contact_sheets(tmp_path):
    for settings, expected in (
        ({"tasks": ["digit"]}, "tasks: expected some of digits, .*, got digit"),
        ({"tasks": []}, "got none"),
        ({"columns": 0}, "columns and rows: expected at least 1 each, got 0 and 2"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            contact_sheet(tmp_path / "sheet.png", **settings)
    with pytest.raises(WriteError, match=f"^{tmp_path}: expected a path that can be written, got Is a directory"):
        contact_sheet(tmp_path, tasks=["digits"])
    with pytest.raises(ConfigurationError, match="expected an existing folder to write into"):
        contact_sheet(tmp_path / "none" / "sheet.png")
    with pytest.raises(DataError, match="split of digits"):
        contact_sheet(tmp_path / "sheet.png", tasks=["digits"], split="tests")
