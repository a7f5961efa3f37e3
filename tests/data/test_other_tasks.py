"""Unlabelled images of other tasks beside every training batch: which come when, whatever the processes and resumes."""

from __future__ import annotations

import itertools
import pickle
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from builders.recorder import SMALL, Penalty, Recorder, quiet_trainer
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader

from lit_merge.data import EMBEDDED_TASKS, ImageBatch, MultiTaskDataModule, OtherBatch, TaskDataModule
from lit_merge.data.loading import ResumableLoader
from lit_merge.data.other_tasks import OtherImages, OtherSampler
from lit_merge.errors import ConfigurationError, DataError, LitMergeError

FILES = {"own": 10, "reds": 5, "blues": 7, "greys": 4}  # of each of three colours
TRAIN = {"own": 24, "reds": 9, "blues": 15, "greys": 6}
OTHERS = ("reds", "blues", "greys")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, write_colours):
    """Name -> folder."""
    root = tmp_path_factory.mktemp("others")
    return {
        name: str(write_colours(root / name, count, seed)) for seed, (name, count) in enumerate(FILES.items(), start=1)
    }


@pytest.fixture
def data(folders):
    """``data(**settings)``: six batches of four own images, and three other tasks."""

    def build(**settings):
        others = {name: folders[name] for name in OTHERS}
        return TaskDataModule(**{"path": folders["own"], "other_paths": others, "batch_size": 4, **settings})

    return build


def fit(data, penalty, resume=None, **settings):
    """The batches that a fit saw: epoch, place, optimiser step, batch."""
    module = Recorder(penalty)
    quiet_trainer(**settings).fit(module, datamodule=data, ckpt_path=resume, weights_only=resume and True)
    return module.trained


def drawn(batches):
    """Tasks and indices of the other images, batch by batch."""
    return [(batch["other"].tasks.tolist(), batch["other"].indices.tolist()) for *_, batch in batches]


# The schedule


class Sized:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def make_sampler(counts, schedule, batch_size, batches, processes=1, rank=0, seed=0, accumulate=1, images=None):
    dataset = OtherImages({name: Sized(count) for name, count in counts.items()}, images, seed)
    sampler = OtherSampler(dataset, schedule, batch_size, batches, processes, rank, seed)
    sampler.accumulate = accumulate
    return sampler


def epoch_of(sampler, epoch, skip=0):
    """The batches of an epoch, or those after the first ``skip``."""
    sampler.set_epoch(epoch)
    sampler.skip = skip * sampler.entries
    return list(BatchSampler(sampler, sampler.entries, drop_last=True))


def stream(name, count, seed):
    """The endless stream of a task: ``round * N + index``."""
    for number in itertools.count():
        order = np.random.default_rng((seed, zlib.crc32(name.encode()), 1 + number)).permutation(count)
        yield from (number * count + int(index) for index in order)


def restated(counts, schedule, batch_size, batches, epochs, processes, rank, seed, accumulate):
    """The schedule as one would write it who has the whole run before him."""
    streams = {name: stream(name, count, seed) for name, count in counts.items()}
    step, run = 0, []
    for _ in range(epochs):
        for batch in range(batches):
            tasks = range(len(counts)) if schedule == "strict" else [step % len(counts)]
            entries = []
            for task in tasks:
                taken = list(itertools.islice(streams[list(counts)[task]], batch_size * processes))
                entries += [(task, draw) for draw in taken[rank::processes]]
            run.append(entries)
            if (batch + 1) % accumulate == 0 or batch + 1 == batches:
                step += 1
    return run


COUNTS = {"a": 12, "b": 7, "c": 30}


@pytest.mark.parametrize("schedule", ["strict", "cyclic"])
@pytest.mark.parametrize("counts", [COUNTS, {"a": 12, "b": 7}, {"b": 7}])
@pytest.mark.parametrize(("processes", "rank", "batch_size"), [(1, 0, 2), (1, 0, 7), (2, 1, 3), (3, 0, 1), (3, 2, 2)])
def test_the_schedule(schedule, counts, processes, rank, batch_size):
    for batches, accumulate in itertools.product((1, 6, 7), (1, 2, 3, 4, 9)):
        settings = {"processes": processes, "rank": rank, "seed": 5, "accumulate": accumulate}
        expected = restated(counts, schedule, batch_size, batches, epochs=9, **settings)
        sampler = make_sampler(counts, schedule, batch_size, batches, **settings)
        assert len(sampler) == batches * sampler.entries
        for epoch in (*range(9), 3, 0, 8):  # nothing depends on what was asked for before
            of_epoch = expected[epoch * batches : (epoch + 1) * batches]
            assert epoch_of(sampler, epoch) == of_epoch, (batches, accumulate)
            for skip in range(batches):
                assert epoch_of(sampler, epoch, skip) == of_epoch[skip:]


@pytest.mark.parametrize("schedule", ["strict", "cyclic"])
def test_fewer_batches_than_the_loader_has(schedule):
    """As with limit_train_batches: the epochs follow each other without a gap."""
    sampler = make_sampler(COUNTS, schedule, 2, 10, accumulate=3)
    sampler.batches = 4
    assert [epoch_of(sampler, epoch) for epoch in range(5)] == [
        epoch_of(make_sampler(COUNTS, schedule, 2, 4, accumulate=3), epoch) for epoch in range(5)
    ]
    assert len(sampler) == 10 * sampler.entries


@pytest.mark.parametrize("schedule", ["strict", "cyclic"])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_processes_see_together_what_one_sees(schedule, processes):
    alone = make_sampler(COUNTS, schedule, 6, 7, accumulate=2)
    ranks = [
        make_sampler(COUNTS, schedule, 6 // processes, 7, processes, rank, accumulate=2) for rank in range(processes)
    ]
    for epoch in range(4):
        shares = [epoch_of(sampler, epoch) for sampler in ranks]
        assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == [
            sorted(batch) for batch in epoch_of(alone, epoch)
        ]


@pytest.mark.parametrize("images", [None, 7])
def test_a_stream_is_one_permutation_after_another(images):
    sampler = make_sampler(COUNTS, "strict", 5, 30, images=images)
    entries = [entry for epoch in range(2) for batch in epoch_of(sampler, epoch) for entry in batch]
    for task, count in enumerate(COUNTS.values()):
        draws = [draw for which, draw in entries if which == task]
        used = sampler.dataset.used[task].tolist()
        assert len(used) == min(count, images or count)
        rounds = [draws[start : start + len(used)] for start in range(0, len(draws) - len(used), len(used))]
        assert len(rounds) >= 9
        for number, order in enumerate(rounds):
            assert sorted(draw - number * count for draw in order) == used
        assert len({tuple(draw % count for draw in order) for order in rounds}) == len(rounds)


def test_seeds_and_the_other_others():
    """A task's images depend on the seed, and not on which tasks there are beside it."""
    first = epoch_of(make_sampler(COUNTS, "strict", 4, 3, images=10), 2)
    assert epoch_of(make_sampler(COUNTS, "strict", 4, 3, images=10), 2) == first
    assert epoch_of(make_sampler(COUNTS, "strict", 4, 3, images=10, seed=1), 2) != first
    alone = epoch_of(make_sampler({"c": 30}, "strict", 4, 3, images=10), 2)
    assert [[draw for _, draw in batch] for batch in alone] == [
        [draw for task, draw in batch if task == 2] for batch in first
    ]
    chosen = [make_sampler(COUNTS, "strict", 1, 1, images=10, seed=seed).dataset.used[2].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    same_size = make_sampler({"a": 30, "b": 30}, "strict", 1, 1, images=10).dataset.used
    assert same_size[0].tolist() != same_size[1].tolist()


# Under a trainer


@pytest.mark.parametrize("schedule", ["strict", "cyclic"])
@pytest.mark.parametrize("settings", [{}, {"limit_train_batches": 5}, {"accumulate_grad_batches": 4}])
def test_a_fit(data, schedule, settings):
    module = data(seed=3)
    batches = fit(module, Penalty(schedule), **settings)
    per_epoch = settings.get("limit_train_batches", 6)
    assert [(epoch, place) for epoch, place, *_ in batches] == list(itertools.product(range(3), range(per_epoch)))
    assert module.other_task_names == OTHERS
    trained = {name: TRAIN[name] for name in OTHERS}
    expected = restated(trained, schedule, 2, per_epoch, 3, 1, 0, 3, settings.get("accumulate_grad_batches", 1))
    counts = list(trained.values())
    plain = fit(data(seed=3, other_paths=None), None, **settings)
    for (_, _, step, batch), entries, (*_, alone) in zip(batches, expected, plain, strict=True):
        assert list(batch) == ["own", "other"]
        assert all(torch.equal(left, right) for left, right in zip(batch["own"], alone, strict=True))
        others = batch["other"]
        assert isinstance(others, OtherBatch)
        assert (others.targets == -1).all()  # no labels
        assert (others.images.dtype, others.tasks.dtype, others.indices.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
        assert others.images.shape == (len(entries), 3, 8, 8)
        assert others.tasks.tolist() == [task for task, _ in entries]
        assert others.indices.tolist() == [draw % counts[task] for task, draw in entries]
        assert set(others.tasks.tolist()) == ({0, 1, 2} if schedule == "strict" else {step % 3})
        for image, (task, draw) in zip(others.images, entries, strict=True):  # augmented as its round says
            assert torch.equal(image, module._other_images.tasks[task][draw].images[0])


def test_the_augmentation(data):
    augmented, again, plain = (data(**settings) for settings in ({}, {}, {"augment": False}))
    seen = [fit(module, Penalty("strict", split="val", batch_size=3)) for module in (augmented, again, plain)]
    whole = plain.other_sources["reds"].split("val", SMALL)
    for (*_, left), (*_, right), (*_, unchanged) in zip(*seen, strict=True):
        left, right, unchanged = left["other"], right["other"], unchanged["other"]
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.indices, unchanged.indices)
        assert not torch.equal(left.images, unchanged.images)
        reds = unchanged.tasks == 0
        assert torch.equal(unchanged.images[reds], whole.read(unchanged.indices[reds].numpy(), None))
    rounds = [batch["other"].images[batch["other"].indices.argsort()][0] for *_, batch in seen[0]]
    assert not torch.equal(rounds[0], rounds[1])  # of the same image in another round


def test_the_default_batch_size(data):
    for own, expected in ((24, 3), (17, 2), (4, 1), (1, 1)):
        batches = fit(data(batch_size=own), Penalty(batch_size=None), max_epochs=1)
        assert {len(batch["other"].indices) for *_, batch in batches} == {expected}


def test_a_selection_in_its_order(data):
    module = data()
    batches = fit(module, Penalty("strict", tasks=("greys", "reds")), max_epochs=1)
    assert module.other_task_names == ("greys", "reds")
    assert {tuple(tasks) for tasks, _ in drawn(batches)} == {(0, 0, 1, 1)}
    assert max(indices[0] for _, indices in drawn(batches)) < TRAIN["greys"]
    assert module._other_images.tasks[1].names[0].startswith(str(module.other_sources["reds"].path))


def test_what_a_head_needs_of_the_others(data):
    module = data(other_tasks=["digits"], class_names={"dark_red": "wine"}, templates="mnist")
    assert module.other_task_names == ()
    fit(module, Penalty(), max_epochs=1)
    assert module.other_task_names == ("digits", *OTHERS)
    digits, reds = module.other_sources["digits"], module.other_sources["reds"]
    assert (digits.name, digits.classes) == ("digits", EMBEDDED_TASKS["digits"].classes)
    assert digits.templates == EMBEDDED_TASKS["digits"].templates
    assert (reds.name, reds.classes) == ("reds", ("blue", "dark red", "green"))
    assert reds.templates == ("a photo of a {}.",)
    fit(module, None, max_epochs=1)
    assert module.other_task_names == ()


@pytest.mark.parametrize("schedule", ["strict", "cyclic"])
def test_workers_make_no_difference(data, schedule):
    seen = [fit(data(workers=workers), Penalty(schedule), limit_train_batches=4) for workers in (0, 2)]
    for (*_, alone), (*_, apart) in zip(*seen, strict=True):
        for part in ("own", "other"):
            assert all(torch.equal(left, right) for left, right in zip(alone[part], apart[part], strict=True))


class SaveEverywhere(L.Callback):
    """A checkpoint after every batch, and at the end of every epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}-epoch.ckpt")


@pytest.mark.parametrize(
    ("schedule", "settings", "workers"),
    [
        ("strict", {}, 0),
        ("cyclic", {"limit_val_batches": 0}, 0),
        ("cyclic", {"limit_train_batches": 5, "accumulate_grad_batches": 2}, 0),
        ("cyclic", {"limit_train_batches": 2}, 2),
    ],
)
def test_a_resumed_run_goes_on_where_it_was(data, schedule, settings, workers, tmp_path):
    """From every checkpoint of a whole run."""

    def seen(batches):
        return [
            (epoch, place, batch["own"].indices.tolist(), others)
            for (epoch, place, _, batch), others in zip(batches, drawn(batches), strict=True)
        ]

    penalty = Penalty(schedule)
    whole = seen(fit(data(workers=workers), penalty, callbacks=[SaveEverywhere(tmp_path)], **settings))
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == len(whole) + 3
    for path in checkpoints[:: 4 if workers else 1]:  # workers take a while to start
        if (had := int(path.stem.partition("-")[0])) < len(whole):
            rest = seen(fit(data(workers=workers), penalty, resume=path, **settings))
            assert rest == whole[had:], path.name


TWO_PROCESSES = """
import torch
from lit_merge.data import TaskDataModule
from builders.recorder import Penalty, Recorder, quiet_trainer

others = {name: f"ROOT/{name}" for name in ("reds", "blues", "greys")}
data = TaskDataModule(path="ROOT/own", other_paths=others, batch_size=2)
module = Recorder(Penalty(batch_size=1))
trainer = quiet_trainer(devices=2, strategy="ddp", accumulate_grad_batches=2, limit_train_batches=5)
trainer.fit(module, datamodule=data)
record = [(tuple(batch["own"]), tuple(batch["other"])) for *_, batch in module.trained]
torch.save(record, f"{trainer.global_rank}.pt")
"""


def test_two_processes_under_a_trainer(data, folders, tmp_path, monkeypatch, fork_server):
    """DDP with Lightning's own handling of samplers, compared with one process and twice the batch."""
    monkeypatch.chdir(tmp_path)
    fork_server.run_on_two(TWO_PROCESSES.replace("ROOT", str(Path(folders["own"]).parent)))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = fit(data(), Penalty(), accumulate_grad_batches=2, limit_train_batches=5)
    assert len(alone) == len(ranks[0]) == 15
    for (*_, batch), left, right in zip(alone, *ranks, strict=True):
        for whole, parts in ((batch["own"], (left[0], right[0])), (batch["other"], (left[1], right[1]))):
            whole_images, *known_keys = whole
            images, *keys = (torch.cat(halves) for halves in zip(*parts, strict=True))
            # Sorted by task and index, or by label and index; the indices of a batch may repeat across tasks.
            order, expected = (np.lexsort([key.numpy() for key in some]) for some in (keys[::-1], known_keys[::-1]))
            assert all(torch.equal(key[order], known[expected]) for key, known in zip(keys, known_keys, strict=True))
            assert torch.equal(images[order], whole_images[expected])


def test_the_rank_of_the_trainer_counts(data):
    """What each of two processes builds for itself."""
    shares = []
    for rank in (0, 1):
        module = attached(data(batch_size=2), Penalty("strict", batch_size=1), world_size=2, global_rank=rank)
        shares.append([batch["other"] for batch, *_ in module.train_dataloader()])
    whole = attached(data(), Penalty("strict")).train_dataloader()
    for left, right, (batch, *_) in zip(*shares, whole, strict=True):
        together = torch.stack([left.indices, right.indices], 1).flatten()
        assert torch.equal(together, batch["other"].indices)


def attached(module, penalty, **place):
    """Set up for a fit that no trainer runs."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    module.trainer = SimpleNamespace(
        **{"world_size": 1, "global_rank": 0, **place},
        datamodule=module,
        lightning_module=Recorder(penalty),
        callbacks=[],
        overfit_batches=0,
        current_epoch=0,
        accumulate_grad_batches=1,
        num_training_batches=float("inf"),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        strategy=SimpleNamespace(root_device=torch.device(place.pop("device", "cpu"))),
    )
    module.setup("fit")
    return module


def test_only_the_chosen_images_are_read(data, monkeypatch):
    from lit_merge.data.images import datasets

    opened, read_image = [], datasets.read_image
    monkeypatch.setattr(datasets, "read_image", lambda path: (opened.append(path), read_image(path))[1])
    chosen = []
    for seed in (0, 0, 1):
        module = data(seed=seed)
        opened.clear()
        batches = fit(module, Penalty("strict", images=4), max_epochs=4, limit_val_batches=0)
        images = module._other_images
        allowed = [{part.names[place] for place in used} for part, used in zip(images.tasks, images.used, strict=True)]
        assert [len(names) for names in allowed] == [4, 4, 4]
        assert set().union(*allowed) == set(opened) - set(module.datasets["train"].names)
        assert {place for *_, batch in batches for place in batch["other"].indices[:2].tolist()} == {*images.used[0]}
        chosen.append(allowed)
    assert chosen[0] == chosen[1] != chosen[2]


def test_more_images_asked_for_than_there_are(data):
    module = data()
    fit(module, Penalty("strict", images=10), max_epochs=1)
    assert [len(used) for used in module._other_images.used] == [9, 10, 6]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_split(data, split):
    module = data()
    fit(module, Penalty(split=split), max_epochs=1)
    for name, images in zip(module.other_task_names, module._other_images.tasks, strict=True):
        assert images.names == module.other_sources[name].split(split, SMALL).names
        assert len(images) == (TRAIN[name] if split == "train" else 3)


def test_the_loader_is_built_once(data, monkeypatch):
    from lit_merge.data import task

    built = {"read_other_images": 0, "OtherSampler": 0, "OtherLoader": 0}

    def counted(name):
        kind = getattr(task, name)

        def build(*arguments, **settings):
            built[name] += 1
            return kind(*arguments, **settings)

        return build

    for name in built:
        monkeypatch.setattr(task, name, counted(name))
    fit(data(), Penalty(), max_epochs=4)
    assert built == {"read_other_images": 1, "OtherSampler": 1, "OtherLoader": 1}


def test_without_a_penalty_nothing_is_read(data, folders, monkeypatch, tmp_path):
    monkeypatch.setattr("lit_merge.data.sources.load_split", lambda *_: pytest.fail("drew another task"))
    monkeypatch.setattr(TaskDataModule, "_read_others", lambda *_: pytest.fail("read another task"))
    module = data(other_paths={"far": "/nowhere/at/all"}, other_tasks=["signs"])
    for penalty in ({}, {"penalty": None}):
        recorder = Recorder()
        del recorder.penalty
        for name, value in penalty.items():
            setattr(recorder, name, value)
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(recorder, datamodule=module)
        assert all(isinstance(batch, ImageBatch) for *_, batch in recorder.trained)
        assert type(module.train_dataloader()) is ResumableLoader
        assert module.other_task_names == ()
    quiet_trainer().test(Recorder(Penalty()), datamodule=module, verbose=False)  # there is one, and no fit
    module = TaskDataModule(path=folders["own"], preprocessing=SMALL)
    module.setup("fit")
    assert type(module.train_dataloader()) is ResumableLoader


def test_what_is_drawn_beforehand(data, monkeypatch):
    """Embedded tasks in use, on one process, and only for a fit."""
    from lit_merge.data.sources import EmbeddedSource

    drawn = []
    monkeypatch.setattr(EmbeddedSource, "prepare", lambda source: drawn.append(source.name))
    monkeypatch.setattr(EmbeddedSource, "split", lambda source, *_: pytest.fail(f"read {source.name}"))
    module = data(other_tasks=["signs", "digits", "land"])
    for penalty, expected in (
        (None, []),
        (Penalty(tasks=["reds"]), []),
        (Penalty(tasks=["digits", "reds"]), ["digits"]),
        (Penalty(), ["signs", "digits", "land"]),
    ):
        drawn.clear()
        quiet_trainer().test(Recorder(penalty), datamodule=module, verbose=False)
        assert drawn == []
        with pytest.raises(pytest.fail.Exception) if expected else nullcontext():
            fit(module, penalty, max_epochs=1)
        assert drawn == expected


def test_embedded_tasks(data, folders):
    """Digits beside a folder, and a folder beside digits."""
    batches = fit(data(other_paths=None, other_tasks=["digits"]), Penalty(images=20), max_epochs=1)
    assert len({index for _, indices in drawn(batches) for index in indices}) == 12  # no image twice in a round
    module = TaskDataModule(
        "digits", batch_size=100, other_tasks=[], other_paths={name: folders[name] for name in OTHERS}
    )
    assert {len(batch["other"].tasks) for *_, batch in fit(module, Penalty("strict"), max_epochs=1)} == {6}


def test_which_others_are_known(folders):
    def known(**settings):
        return list(TaskDataModule(**settings)._known_others)

    all_tasks = list(EMBEDDED_TASKS)
    assert known(task="land") == [name for name in all_tasks if name != "land"]
    assert known(task="land", other_tasks=[]) == []
    assert known(task="land", other_tasks=["signs", "digits"], other_paths={"far": "x"}) == ["signs", "digits", "far"]
    assert known(path="x") == []
    assert known(path="x", other_paths={"far": "y"}) == ["far"]
    assert known(path="x", name="land", other_tasks=["signs"]) == ["signs"]


def test_how_other_folders_are_divided(data, folders):
    """As the own one, and as they themselves are divided where they are the own one."""
    settings = {"fractions": (0.5, 0.25, 0.25), "split_seed": 3}
    others = {"reds": folders["reds"]}
    for module in (data(**settings), TaskDataModule("digits", other_tasks=[], other_paths=others, **settings)):
        fit(module, Penalty(tasks=["reds"]), max_epochs=1, limit_train_batches=1)
        itself = TaskDataModule(path=folders["reds"], preprocessing=SMALL, **settings)
        itself.setup("fit")
        assert module._other_images.tasks[0].names == itself.datasets["train"].names
        assert len(itself.datasets["train"]) == 9


def test_damaged_images(write_colours, data, tmp_path):
    folder = write_colours(tmp_path / "reds", 5)
    others = {"reds": str(folder)}
    fit(whole := data(other_paths=others), Penalty(), max_epochs=1, limit_train_batches=1)
    Path(whole._other_images.tasks[0].names[0]).write_bytes(b"")
    with pytest.raises(DataError, match=r"\.png: expected a readable image"):
        fit(data(other_paths=others), Penalty())
    for own in ({}, {"task": "digits", "path": None, "other_tasks": []}):
        module = data(other_paths=others, skip_corrupt=True, **own)
        with pytest.warns(UserWarning, match="left out 1 image"):
            fit(module, Penalty(), max_epochs=1, limit_train_batches=1)
        assert len(module._other_images.tasks[0]) == 8


def test_in_a_module_of_several_tasks_all_are_own(folders):
    several = MultiTaskDataModule(paths={name: folders[name] for name in ("own", "reds")}, batch_size=4)
    batches = fit(several, Penalty(), max_epochs=1)
    assert {type(part) for *_, batch in batches for part in batch.values()} == {ImageBatch}
    assert [list(batch) for *_, batch in batches] == [["own", "reds"]] * 6


def test_a_batch_can_be_moved_and_pinned(data):
    *_, batch = fit(data(), Penalty(), max_epochs=1)[0]
    moved = move_data_to_device(batch, torch.device("meta"))["other"]
    assert isinstance(moved, OtherBatch)
    assert {part.device.type for part in moved} == {"meta"}
    again = pickle.loads(pickle.dumps(batch["other"]))
    assert all(torch.equal(left, right) for left, right in zip(again, batch["other"], strict=True))
    for device in ("cpu", "cuda"):
        loader = attached(data(), Penalty(), device=device).train_dataloader()
        assert isinstance(loader, CombinedLoader)
        assert [part.pin_memory for part in loader.flattened] == [device == "cuda"] * 2


def test_the_lengths_are_those_of_the_own_loader(data):
    combined = attached(data(), Penalty("strict")).train_dataloader()
    assert [len(loader) for loader in combined.flattened] == [6, 6]
    assert all(isinstance(loader, DataLoader) for loader in combined.flattened)
    assert len(list(combined)) == len(combined) == 6


def test_from_the_command_line(folders):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    arguments = [
        "--data=lit_merge.data.TaskDataModule",
        f"--data.path={folders['own']}",
        f"--data.other_paths.reds={folders['reds']}",
        f"--data.other_paths.blues={folders['blues']}",
        "--data.other_tasks=[signs, digits]",
        "--data.batch_size=4",
    ]
    module = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert list(module._known_others) == ["signs", "digits", "reds", "blues"]
    batches = fit(module, Penalty("strict", tasks=["blues", "reds"]), max_epochs=1)
    assert {tuple(tasks) for tasks, _ in drawn(batches)} == {(0, 0, 1, 1)}


# Refusals


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"task": "digits", "other_tasks": ["digits", "land"]},
            "expected tasks beside digits, each name once, got digits ",
        ),
        ({"task": "digits", "other_paths": {"digits": "x"}}, "got digits itself. Remove it."),
        ({"path": "/some/pets", "other_paths": {"pets": "x"}}, "got pets itself. Remove it."),
        ({"path": "/some/pets", "other_paths": {"cats": "/some/../some/pets"}}, "got pets itself. Remove it."),
        ({"path": "/some/pets", "name": "land", "other_tasks": ["land"]}, "got land itself. Remove it."),
        ({"task": "land", "other_tasks": ["signs", "signs"]}, "got signs more than once. Remove it."),
        ({"task": "land", "other_paths": {"signs": "x"}}, "got signs more than once. Remove it."),
        ({"task": "land", "other_tasks": ["sign"]}, "task: expected one of digits, clutter"),
        ({"task": "land", "name": "x", "other_paths": {"far": "x"}}, "name: expected only with path"),
        ({"task": "land", "split_seed": 1}, "split_seed: expected only with path"),
        ({"task": "land", "other_paths": {"far": "x"}, "fractions": (0.5, 0.2, 0.2)}, "fractions: expected those"),
    ],
)
def test_refused_others(settings, expected):
    with pytest.raises(ConfigurationError) as error:
        TaskDataModule(**settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


FEW = "penalty.batch_size: expected at most the {} images used of {} for all processes together, got {}. Lower "


@pytest.mark.parametrize(
    ("penalty", "settings", "expected"),
    [
        (
            {},
            {"other_paths": None},
            "penalty: expected at least one other task, got none. "
            "Set data.other_tasks or data.other_paths, or remove the penalty.",
        ),
        (
            {"tasks": ["reds", "red"]},
            {},
            "penalty.tasks: expected names among reds, blues, greys, each once, got red. Choose some of them.",
        ),
        ({"tasks": ["own"]}, {}, "each once, got own. Choose some of them."),
        ({"tasks": ["reds", "blues", "reds"]}, {}, "each once, got reds, reds. Choose some of them."),
        ({"tasks": []}, {}, "each once, got none. Choose some of them."),
        ({"schedule": "random"}, {}, "penalty.schedule: expected one of strict, cyclic, got 'random'. Change it."),
        ({"split": "all"}, {}, "penalty.split: expected one of train, val, test, got 'all'. Change it."),
        ({"images": 0}, {}, "penalty.images: expected an integer of at least 1, or none, got 0. Change it."),
        ({"batch_size": 0}, {}, "penalty.batch_size: expected an integer of at least 1, or none, got 0. Change it."),
        ({"batch_size": 1.5}, {}, "penalty.batch_size: expected an integer of at least 1, or none, got 1.5."),
        ({"batch_size": 7}, {}, FEW.format(6, "greys", "7 x 1 = 7") + "penalty.batch_size."),
        (
            {"batch_size": 6, "images": 5},
            {},
            FEW.format(5, "reds", "6 x 1 = 6") + "penalty.batch_size or raise penalty.images.",
        ),
        (
            {"split": "val"},
            {"fractions": (0.9, 0, 0.1)},
            "reds: expected val images for the penalty, got none. Change penalty.split.",
        ),
        (
            {"split": "test"},
            {"fractions": (0.9, 0.1, 0)},
            "reds: expected test images, got 0 as the third of fractions.",
        ),
        ({}, {"other_paths": {"far": "/nowhere"}}, "/nowhere: expected the folder of a task, got no such path."),
    ],
)
@pytest.mark.parametrize("schedule", ["strict", "cyclic"])
def test_refused_penalties(penalty, settings, expected, schedule, data):
    recorder = Recorder(replace(Penalty(schedule), **penalty))
    with pytest.raises(LitMergeError) as error:
        quiet_trainer().fit(recorder, datamodule=data(**settings))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert recorder.trained == []


def test_all_processes_draw_at_a_time(data):
    attached(data(), Penalty(batch_size=3), world_size=2)
    with pytest.raises(ConfigurationError) as error:
        attached(data(), Penalty(batch_size=3), world_size=3)
    assert str(error.value) == FEW.format(6, "greys", "3 x 3 = 9") + "penalty.batch_size."


def test_a_trainer_that_cannot_keep_the_schedule(data):
    with pytest.raises(ConfigurationError, match=r"overfit_batches: expected 0 with a penalty, .* got 2\. Set limit"):
        fit(data(), Penalty(), overfit_batches=2)
    with pytest.raises(
        ConfigurationError, match=r"expected strict with a GradientAccumulationScheduler, .* got cyclic\."
    ):
        fit(data(), Penalty(), callbacks=[GradientAccumulationScheduler({1: 2})])
    for schedule, scheduling in (("strict", {1: 2}), ("cyclic", {0: 2})):
        batches = fit(data(), Penalty(schedule), callbacks=[GradientAccumulationScheduler(scheduling)])
        assert drawn(batches) == drawn(fit(data(), Penalty(schedule), accumulate_grad_batches=2))


def test_a_penalty_that_comes_late(data):
    module = attached(data(), None)
    module.trainer.lightning_module.penalty = Penalty()
    with pytest.raises(ConfigurationError) as error:
        module.train_dataloader()
    assert str(error.value) == (
        "penalty: expected the module to have it before setup('fit'), got it later. Set it when the module is made."
    )
