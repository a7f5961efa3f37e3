"""The published data sets: every one in the real formats, found wherever it may lie, divided as in the literature."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import importlib
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from builders.published_files import (
    colour_of,
    label_of,
    layouts_of,
    write_archives,
    write_cifar,
    write_idx,
    write_image,
    write_parquet,
    write_published,
)
from PIL import Image
from torch.utils.data import random_split

from lit_merge.commands.main import main
from lit_merge.data import MergeDataModule, MultiTaskDataModule, PublishedSource, TaskDataModule
from lit_merge.data.batch import PADDING
from lit_merge.data.packaged.registry import PACKAGED, PACKAGED_SUITES
from lit_merge.data.published import checking, preparation
from lit_merge.data.published.class_names import labels_by_name, labels_in_order
from lit_merge.data.published.registry import REGISTRY, SUITES, registry_table
from lit_merge.data.published.text_registry import TEXT_SUITES, TEXT_TASKS
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.models import Preprocessing

SUITE_NAMES = ", ".join([*SUITES, *TEXT_SUITES, *PACKAGED_SUITES])
SMALL = Preprocessing(8)
EVERY = [(name, layout) for name, entry in REGISTRY.items() for layout in layouts_of(entry)]
OF_TORCHVISION = [name for name, layout in EVERY if layout == "torchvision"]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_MERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging-face"))
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "LIT_MERGE_DATA"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def refusal(function, *arguments, kind=DataError, **settings):
    with pytest.raises(kind) as error:
        function(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# Every data set in every layout


@pytest.mark.parametrize(("name", "layout"), EVERY, ids=[" ".join(one) for one in EVERY])
def test_every_data_set_loads_from_its_real_files(name, layout, root):
    entry = REGISTRY[name]
    written = write_published(name, root, layout)
    source = PublishedSource(entry, root)
    assert source.classes == entry.classes
    assert source.templates == entry.templates
    whole = written.get("train", 0)
    own_validation = entry.validation == "own" and layout == "class folders"
    held_out = 0 if own_validation else min(int(whole * 0.1), 5000)
    expected = {"train": whole - held_out, "val": len(entry.classes) if own_validation else held_out}
    seen = set()
    for split in entry.counts:
        images = source.split(split, SMALL)
        assert len(images) == {**expected, "test": written["test"]}[split]
        for index in range(0, len(images), 1 if len(images) < 100 else 7):
            assert label_of(images.picture(index)) == images.labels[index]
        seen.update(images.labels.tolist())
        assert seen == set(range(len(entry.classes))) or split != "test"
        if len(images):
            batch = images.__getitems__([0])
            assert batch.images.shape == (1, 3, 8, 8)
            assert batch.labels.tolist() == images.labels[:1].tolist()
            assert len(set(images.names)) == len(images)


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_torchvision_reads_the_same_images_in_the_same_order(name, root, monkeypatch):
    """Its digests are those of the real files, and are left out here."""
    entry = REGISTRY[name]
    write_published(name, root)
    kind = getattr(torchvision.datasets, entry.torchvision)
    for module in {one.__module__ for one in kind.__mro__ if one.__module__.startswith("torchvision")}:
        if hasattr(importlib.import_module(module), "check_integrity"):
            monkeypatch.setattr(f"{module}.check_integrity", lambda path, md5=None: Path(path).is_file())
    if name == "stl10":  # which asks for the images without labels too
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    source = PublishedSource(entry, root)
    for split, several in entry.torchvision_arguments.items():
        theirs = [
            (image, int(label))
            for arguments in several
            for image, label in kind(root=str(root / entry.torchvision_roots[0]), **arguments)
        ]
        ours = source._present(split)
        if len(several) > 1:  # joined in the order of one folder per class
            theirs.sort(key=lambda one: one[1])
        assert ours.labels.tolist() == [label for _, label in theirs]
        for index, (image, _) in enumerate(theirs):
            np.testing.assert_array_equal(np.asarray(ours.picture(index)), np.asarray(image.convert("RGB")))


# The division


def test_validation_images_are_those_of_the_literature(root, tmp_path):
    """The papers' program, restated: an image folder, and a tenth of its positions, drawn with seed 0."""
    write_published("dtd", root, "class folders", per_class=5)
    theirs = torchvision.datasets.ImageFolder(root / "dtd" / "train")
    count = int(len(theirs) * 0.1)
    parts = random_split(theirs, [len(theirs) - count, count], generator=torch.Generator().manual_seed(0))
    source = PublishedSource(REGISTRY["dtd"], root)
    for split, part in zip(("train", "val"), parts, strict=True):
        assert source.split(split, SMALL).names == [theirs.samples[index][0] for index in part.indices]
    assert count == 23


def test_the_division_of_mnist(root):
    """The program asserts that the first training image is number 36,044, and holds 5,000 out, not 6,000."""
    folder = root / "MNIST" / "raw"
    for prefix, count in (("train", 60000), ("t10k", 10000)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.zeros((count, 1, 1)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    source = PublishedSource(REGISTRY["mnist"], root)
    train, val = source.listed("train"), source.listed("val")
    assert train.positions[0] == 36044
    assert (len(train), len(val)) == (55000, 5000)
    assert sorted([*train.positions, *val.positions]) == list(range(60000))
    assert checking.check_data_set(REGISTRY["mnist"], root).state == "complete"


@pytest.mark.parametrize("layout", ["torchvision", "class folders"])
def test_the_order_is_the_same_in_every_layout_of_dtd(layout, root, tmp_path):
    """torchvision's train and val lists together are what the papers' programs have in one folder, train."""
    write_published("dtd", root, "torchvision", per_class=3)
    source = PublishedSource(REGISTRY["dtd"], root)
    in_order = [path.name for path in source._present("train").pictures]
    for part in ("train", "val"):
        for line in (root / "dtd/dtd/labels" / f"{part}1.txt").read_text().split():
            place = tmp_path / "merged" / line
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "dtd/dtd/images" / line, place)
    theirs = torchvision.datasets.ImageFolder(tmp_path / "merged")
    assert in_order == [Path(path).name for path, _ in theirs.samples]


def test_sun397_in_its_authors_layout_is_in_the_order_of_the_flattened_folders(root, tmp_path):
    write_published("sun397", root, "authors", per_class=1)
    ours = PublishedSource(REGISTRY["sun397"], root)._present("train")
    flattened = sorted(("_".join(path.relative_to(root / "SUN397").parts[:-1]), path.name) for path in ours.pictures)
    assert [("_".join(path.relative_to(root / "SUN397").parts[:-1]), path.name) for path in ours.pictures] == flattened
    assert ours.labels.tolist() == list(range(397))


def test_three_folders_of_dtd_are_two(root):
    write_published("dtd", root, "class folders")
    for folder in REGISTRY["dtd"].folder_classes:
        write_image(root / "dtd" / "test" / folder / "t.jpg", REGISTRY["dtd"].folder_classes.index(folder))
    source = PublishedSource(REGISTRY["dtd"], root)
    assert len(source._present("train")) == 2 * 47
    assert {path.name for path in source._present("test").pictures} == {"t.jpg"}


def test_resisc45_in_class_folders(root):
    entry = REGISTRY["resisc45"]
    for split in ("train", "test"):
        for label, folder in enumerate(entry.folder_classes):
            write_image(root / "resisc45" / split / folder / "a.jpg", label)
    images = PublishedSource(entry, root).split("test", SMALL)
    assert [label_of(images.picture(index)) for index in range(45)] == images.labels.tolist() == list(range(45))


def test_eurosat_without_its_validation_images_holds_a_tenth_out(root):
    write_published("eurosat", root, per_class=2)
    entry = REGISTRY["eurosat"]
    assert len(PublishedSource(entry, root).listed("val")) == 20
    shutil.rmtree(root / "EuroSAT_splits" / "val")
    source = PublishedSource(entry, root)
    assert (len(source.listed("train")), len(source.listed("val"))) == (18, 2)
    small = replace(entry, counts={"train": 20, "val": 20, "test": 20})
    assert checking.check_data_set(small, root).state == "complete"


def test_data_sets_for_tests_alone(root):
    write_published("imagenet_a", root)
    source = PublishedSource(REGISTRY["imagenet_a"], root)
    assert len(source.split("val", SMALL)) == 0
    text = refusal(source.split, "train", SMALL)
    assert text.startswith("imagenet_a: expected the split test, got 'train': ImageNet-A has test images only.")


def test_the_border_and_the_other_classes_of_objectnet_are_left_out(root):
    write_published("objectnet", root)
    folder = root / "objectnet-1.0" / "images"
    (folder / "zebra_crossing_of_no_class").mkdir()
    bordered = Image.new("RGB", (20, 12), (255, 0, 0))
    bordered.paste(Image.new("RGB", (16, 8), colour_of(0)), (2, 2))
    bordered.save(folder / REGISTRY["objectnet"].folder_classes[0] / "test_0000.png")
    (folder / REGISTRY["objectnet"].folder_classes[0] / "test_0000.jpg").unlink()
    images = PublishedSource(REGISTRY["objectnet"], root).split("test", SMALL)
    assert len(images) == 113
    assert images.picture(0).size == (16, 8)
    assert images.picture(0).getcolors() == [(128, colour_of(0))]
    Image.new("RGB", (4, 9)).save(folder / REGISTRY["objectnet"].folder_classes[0] / "test_0000.png")
    assert "expected more than a border of 2 pixels, got 4 x 9" in refusal(images.picture, 0)


# Classes by name


def test_folders_are_known_by_name_and_not_by_position(root):
    """Spelt in another way, the folders sort in another order."""
    entry = REGISTRY["eurosat"]
    names = {"AnnualCrop": "annualcrop", "Forest": "FOREST", "SeaLake": "SEALAKE"}
    for split in ("train", "val", "test"):
        for label, folder in enumerate(entry.folder_classes):
            write_image(root / "EuroSAT_splits" / split / names.get(folder, folder) / "a.jpg", label)
    images = PublishedSource(entry, root).split("train", SMALL)
    assert [label_of(images.picture(index)) for index in range(10)] == images.labels.tolist()
    assert images.labels.tolist() != sorted(images.labels.tolist())
    assert images.names[0].endswith("FOREST/a.jpg")


def test_missing_and_surplus_folders_are_named(root):
    write_published("eurosat", root)
    folder = root / "EuroSAT_splits" / "train"
    (folder / "River").rename(folder / "Rivers")
    text = refusal(PublishedSource(REGISTRY["eurosat"], root).split, "train", SMALL)
    assert text.startswith(
        f"{folder}: expected the 10 classes of EuroSAT (RGB), got 10, without River and with Rivers. Complete or rename"
    )
    (folder / "Rivers").rename(folder / "forest")
    text = refusal(PublishedSource(REGISTRY["eurosat"], root).split, "train", SMALL)
    assert "without River and twice forest" in text
    shutil.rmtree(folder / "forest")
    (folder / "River").mkdir()
    text = refusal(PublishedSource(REGISTRY["eurosat"], root).split, "train", SMALL)
    assert text == f"{folder / 'River'}: expected images, got none. Complete the data set."


def test_names_in_another_order_of_words_and_shared_names():
    pets = REGISTRY["oxford_pets"]
    names = [" ".join(reversed(name.split(" "))).upper() for name in pets.classes]
    assert labels_by_name(names[::-1], pets, "x").tolist() == list(range(37))[::-1]
    imagenet = REGISTRY["imagenet"]
    assert labels_by_name(imagenet.folder_classes, imagenet, "x").tolist() == list(range(1000))
    shared = {name for name in imagenet.classes if imagenet.classes.count(name) > 1}
    assert "missile" in shared
    text = refusal(labels_by_name, imagenet.classes, imagenet, "x")  # by their own names those classes are unknown
    assert "got 1000, without n03773504, n04008634, n04355933 and 1 more and with missile" in text, text


def test_the_names_of_cifars_own_file_decide(root):
    entry = REGISTRY["cifar10"]
    write_published("cifar10", root)
    folder = root / "cifar-10-batches-py"
    write_cifar(folder / "batches.meta", {"label_names": list(reversed(entry.classes))})
    images = PublishedSource(entry, root).split("test", SMALL)
    assert [9 - label_of(images.picture(index)) for index in range(10)] == images.labels.tolist()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (lambda classes: [*classes[:26], "cra", *classes[27:]], list(range(100))),  # as the Hub has it
        (lambda classes: [str(label) for label in range(100)], list(range(100))),
        (lambda classes: classes[::-1], list(range(100))[::-1]),
        (lambda classes: [f"{name}, {name}s" for name in classes], list(range(100))),
    ],
    ids=["misspelt", "numbers", "reversed", "synonyms"],
)
def test_names_of_numbered_classes(names, expected):
    entry = REGISTRY["cifar100"]
    assert labels_in_order(names(list(entry.classes)), entry, "x").tolist() == expected


def test_wordnets_names_of_imagenet_do_not_contradict_the_registry():
    """Which the Hub's copy has; timm's files have them too. Two different classes are called crane there."""
    facts = Path(timm.__file__).parent / "data" / "_info"
    names = dict(line.split("\t", 1) for line in (facts / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    in_order = [names[synset] for synset in (facts / "imagenet_synsets.txt").read_text().split()]
    entry = REGISTRY["imagenet"]
    assert in_order[0] == "tench, Tinca tinca"
    assert labels_in_order(in_order, entry, "x").tolist() == list(range(1000))
    assert "where they do not belong" in refusal(labels_in_order, in_order[1:] + in_order[:1], entry, "x")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            lambda classes: ["cra", *classes[:26], *classes[27:]],
            "100, with apple, aquarium_fish, baby and 23 more",
        ),
        (lambda classes: classes[:-1], "got 99, with"),
        (lambda classes: [f"x{name}" for name in classes], "got 100, with xapple, xaquarium_fish, xbaby and 97 more"),
    ],
    ids=["moved", "fewer", "unknown"],
)
def test_refused_names_of_numbered_classes(names, expected):
    entry = REGISTRY["cifar100"]
    assert expected in refusal(labels_in_order, names(list(entry.classes)), entry, "x")


# Where it is


def test_a_missing_data_set_says_where_it_belongs_and_what_to_run(root, monkeypatch):
    text = refusal(PublishedSource(REGISTRY["dtd"], root).split, "train", SMALL)
    for place in ("dtd/train", "dtd/dtd", "tanganke/dtd"):
        assert str(root / place) in text
    assert f"lit-merge data prepare dtd --root {root} (downloads 0.63 GB)" in text
    assert "hugging-face/hub/datasets--tanganke--dtd/snapshots" in text
    assert "hugging-face/datasets/tanganke___dtd" in text
    monkeypatch.setenv("LIT_MERGE_DATA", str(root / "elsewhere"))
    assert str(root / "elsewhere") in refusal(PublishedSource(REGISTRY["dtd"]).prepare)
    monkeypatch.delenv("LIT_MERGE_DATA")
    assert " data/dtd/train" in refusal(PublishedSource(REGISTRY["dtd"]).prepare)


def test_the_papers_layout_comes_first_and_the_hub_last(root):
    entry, layouts = REGISTRY["dtd"], []
    for layout in ("saved", "torchvision", "class folders"):
        write_published("dtd", root, layout)
        layouts.append(PublishedSource(entry, root).location.layout)
    assert layouts == ["tanganke/dtd of the Hugging Face Hub", "as torchvision lays it out", "a folder per class"]


@pytest.mark.parametrize("below", ["", "PCAM"])
def test_every_root_of_torchvision_is_looked_at(below, root):
    write_published("pcam", root)
    if not below:
        (root / "PCAM" / "pcam").rename(root / "pcam")
    assert len(PublishedSource(REGISTRY["pcam"], root).listed("test")) == 2


def test_fer2013_without_test_labels(root):
    write_published("fer2013", root)
    (root / "fer2013" / "fer2013.csv").rename(root / "fer2013" / "train.csv")
    source = PublishedSource(REGISTRY["fer2013"], root)
    assert len(source._present("train")) == 14  # all of them: its own file has no column of splits
    assert "expected fer2013.csv, got train.csv, without test labels" in refusal(source.listed, "test")


def test_compressed_idx_files(root):
    write_published("fashion_mnist", root)
    for path in list((root / REGISTRY["fashion_mnist"].torchvision_roots[0]).rglob("*-ubyte")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    images = PublishedSource(REGISTRY["fashion_mnist"], root).split("test", SMALL)
    assert [label_of(images.picture(index)) for index in range(10)] == list(range(10))
    assert images.picture(0).mode == "RGB"


def test_the_hubs_own_caches(root, tmp_path):
    import datasets

    entry = REGISTRY["cifar10"]
    labels = list(range(10))
    snapshots = tmp_path / "hugging-face" / "hub" / "datasets--uoft-cs--cifar10" / "snapshots"
    write_parquet(snapshots / "abc", entry, labels, ("train", "test"))
    source = PublishedSource(entry, root)
    assert source.location.layout == "its cache"
    assert source.listed("test").labels.tolist() == labels
    # What load_dataset leaves is written by the library itself, from these files.
    below = tmp_path / "hub" / "uoft-cs" / "cifar10"
    shutil.move(snapshots / "abc", below)
    shutil.rmtree(snapshots.parent)
    cache = tmp_path / "hugging-face" / "datasets"
    datasets.load_dataset("parquet", data_dir=str(below / "data"), cache_dir=str(cache))
    (cache / "parquet").rename(cache / "uoft-cs___cifar10")
    source = PublishedSource(entry, root)
    assert source.location.paths == (cache / "uoft-cs___cifar10",)
    images = source.split("test", SMALL)
    assert [label_of(images.picture(index)) for index in range(10)] == labels


def test_the_hubs_splits_and_configurations(root):
    """Files of other splits, and of other configurations, are next to those that are read."""
    entry = REGISTRY["svhn"]
    write_parquet(root / "svhn", entry, list(range(10)), ("train", "test"))
    extra = root / "svhn" / "full_numbers"
    extra.mkdir()
    (extra / "test-00000-of-00001.parquet").write_bytes(b"other")
    (root / "svhn" / "cropped_digits" / "testing-00000-of-00001.parquet").write_bytes(b"other")
    assert len(PublishedSource(entry, root).listed("test")) == 10


@pytest.mark.parametrize(("name", "layout"), [("mnist", "parquet"), ("imagenet_a", "archives")])
def test_tables_that_move_are_converted_once(name, layout, root, tmp_path, monkeypatch):
    write_published(name, root, layout)
    before = PublishedSource(REGISTRY[name], root).listed("test")
    root.rename(tmp_path / "moved")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("converted again"))
    after = PublishedSource(REGISTRY[name], tmp_path / "moved").listed("test")
    assert after.labels.tolist() == before.labels.tolist()
    assert after.picture(3).tobytes() == before.picture(3).tobytes()
    for path in filter(Path.is_file, (tmp_path / "moved").rglob("*")):
        os.utime(path, (1, 1))
    with pytest.raises(BaseException, match="converted again"):
        PublishedSource(REGISTRY[name], tmp_path / "moved").listed("test")


def test_labels_of_the_hub_in_another_order(root):
    entry = REGISTRY["fer2013"]
    assert sorted(entry.hub_classes) == sorted(entry.classes)
    assert entry.hub_classes != entry.classes
    write_archives(root / "fer2013", entry, list(range(7)), ("test",))
    with tarfile.open(root / "fer2013" / "test" / "0.tar") as archive:
        own = [int(archive.extractfile(name).read()) for name in archive.getnames() if name.endswith(".cls")]
    assert own != list(range(7))
    assert PublishedSource(entry, root).listed("test").labels.tolist() == list(range(7))


# As tasks


def test_a_published_task(root):
    write_published("mnist", root, per_class=3)
    data = TaskDataModule(task="mnist", root=str(root), preprocessing=SMALL, batch_size=4, augment=False)
    assert data.name == "mnist"
    assert data.classes == tuple("0123456789")
    assert data.templates == ('a photo of the number: "{}".',)
    data.prepare_data()
    pickle.loads(pickle.dumps(data))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 8, 8)
    greys = (batch.images * torch.tensor(SMALL.std)[:, None, None] + torch.tensor(SMALL.mean)[:, None, None]) * 255
    assert ((greys[:, :, 4, 4] - 10) / 20).round().long().tolist() == [[label] * 3 for label in batch.labels.tolist()]
    assert len(data.datasets["val"]) == 3
    data.setup("test")
    names = data.datasets["test"].names
    assert names[7] == "mnist/test/7"


def test_several_published_tasks_and_suites(root):
    for name in ("mnist", "gtsrb"):
        write_published(name, root)
    data = MultiTaskDataModule(tasks=["gtsrb", "mnist", "digits"], root=str(root), preprocessing=SMALL)
    data.setup("test")
    assert [len(task.datasets["test"]) for task in data.tasks.values()] == [43, 10, 547]
    assert tuple(MultiTaskDataModule(tasks=["clip8"], root=str(root)).tasks) == SUITES["clip8"]
    merge = MergeDataModule("test", tasks=["mnist", "gtsrb"], root=str(root), preprocessing=SMALL, batch_size=2)
    merge.setup("fit")
    batch = next(iter(merge.train_dataloader()))[0]
    assert {name: one.labels.tolist() for name, one in batch.items()} == dict.fromkeys(batch, [PADDING] * 2)


def test_other_published_tasks_beside_a_penalty(root):
    for name in ("mnist", "gtsrb"):
        write_published(name, root)
    data = TaskDataModule(task="digits", other_tasks=["land", "mnist"], root=str(root))
    assert {name: len(source.classes) for name, source in data._known_others.items()} == {"land": 10, "mnist": 10}
    assert len(data._known_others["mnist"].split("train", SMALL)) == 9
    assert TaskDataModule(task="mnist", root=str(root))._known_others == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"task": "mnis"}, "got 'mnis'. Did you mean mnist"),
        ({"task": "digits", "root": "x"}, "root: expected only with a published data set, got 'x' without one."),
        ({"path": "y", "root": "x"}, "root: expected only with a published data set"),
        (
            {"task": "mnist", "skip_corrupt": True},
            "skip_corrupt: expected only with path, got True with task 'mnist'.",
        ),
        ({"task": "mnist", "other_tasks": ["mnist"]}, "expected tasks beside mnist, each name once, got mnist itself"),
        ({"task": "mnist", "templates": ["{} {}"]}, "templates: expected at least one text"),
    ],
    ids=str,
)
def test_refused_tasks(settings, expected):
    assert expected in refusal(TaskDataModule, kind=ConfigurationError, **settings)


def test_a_missing_task_is_refused_before_anything_is_trained(root):
    data = TaskDataModule(task="gtsrb", root=str(root), preprocessing=SMALL)
    assert "lit-merge data prepare gtsrb" in refusal(data.prepare_data)


@pytest.mark.parametrize("name", ["pcam", "cifar10"])
def test_worker_processes_read_what_this_one_reads(name, root):
    write_published(name, root, None if name == "pcam" else "saved", per_class=4)
    batches = []
    for workers in (0, 2):
        data = TaskDataModule(task=name, root=str(root), preprocessing=SMALL, workers=workers, evaluation_batch_size=3)
        data.setup("test")
        data.datasets["test"].picture(0)  # opens the file in this process
        copied = pickle.loads(pickle.dumps(data.datasets["test"]))  # as where processes are not forked
        assert copied.picture(3).tobytes() == data.datasets["test"].picture(3).tobytes()
        batches.append(list(data.test_dataloader()))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.labels.tolist() == other.labels.tolist()


def test_subsets_and_digests(root):
    write_published("mnist", root)
    images = PublishedSource(REGISTRY["mnist"], root).split("test", SMALL)
    some, before = images.subset([7, 2]), images.digest()
    assert some.labels.tolist() == [7, 2]
    assert [label_of(some.picture(index)) for index in range(2)] == [7, 2]
    assert some.names == ["mnist/test/7", "mnist/test/2"]
    assert PublishedSource(REGISTRY["mnist"], root).split("test", SMALL).digest() == before
    assert len({before, some.digest(), images.subset([2, 7]).digest()}) == 3
    images.labels = torch.full_like(images.labels, -1)
    assert images.subset([7, 2]).labels.tolist() == [-1, -1]  # what is hidden stays hidden
    os.utime(root / "MNIST/raw/t10k-images-idx3-ubyte", (1, 1))
    assert PublishedSource(REGISTRY["mnist"], root).split("test", SMALL).digest() != before


# Damaged files


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _garble(path: Path) -> None:
    path.write_bytes(b"\x00garbled\xff" * 20)


def _replace(old: str, new: str, count: int = 1):
    return lambda path: path.write_text(path.read_text().replace(old, new, count))


@pytest.mark.parametrize(
    ("name", "layout", "file", "damage", "expected"),
    [
        ("mnist", None, "t10k-images-idx3-ubyte", _truncate, "got fewer bytes than the 10x28x28 of its header"),
        ("mnist", None, "t10k-images-idx3-ubyte", _garble, "got a header that begins with 00676172"),
        (
            "mnist",
            None,
            "t10k-labels-idx1-ubyte",
            lambda p: write_idx(p, np.arange(9)),
            "of the 10 images next to it, got 9",
        ),
        (
            "mnist",
            None,
            "t10k-labels-idx1-ubyte",
            lambda p: write_idx(p, np.arange(10) + 1),
            "in [0, 10) of MNIST, got 1 to 10",
        ),
        ("mnist", None, "t10k-labels-idx1-ubyte", Path.unlink, "t10k-labels-idx1-ubyte.gz: expected an IDX file"),
        ("svhn", None, "test_32x32.mat", _garble, "test_32x32.mat: expected a MATLAB file, got "),
        (
            "svhn",
            None,
            "test_32x32.mat",
            Path.unlink,
            "expected a MATLAB file, got no such file. Complete the data set.",
        ),
        ("cifar10", None, "test_batch", _truncate, "expected a pickle of values and arrays, got something else at"),
        ("cifar10", None, "test_batch", _garble, "expected a pickle of values and arrays, got opcode 0x00"),
        (
            "cifar10",
            None,
            "batches.meta",
            lambda p: write_cifar(p, {"x": 1}),
            "expected class names under label_names, got",
        ),
        ("stl10", None, "test_X.bin", _truncate, "got cannot reshape array of size 276473 into shape (3,96,96)"),
        ("stl10", None, "class_names.txt", _replace("bird", "fish"), "without bird and with fish"),
        (
            "fer2013",
            None,
            "fer2013.csv",
            _replace(",10 10 ", ",10 ", -1),
            "got other pixels in image 0 of test",
        ),
        ("fer2013", None, "fer2013.csv", _replace("emotion", "feeling"), "expected columns emotion, pixels and Usage"),
        ("pcam", None, "camelyonpatch_level_2_split_test_x.h5", _garble, "expected an HDF5 file with images"),
        ("pcam", None, "camelyonpatch_level_2_split_test_y.h5", _garble, "with the 2 labels of the images next to it"),
        (
            "gtsrb",
            None,
            "GT-final_test.csv",
            _replace("ClassId", "Class"),
            "expected columns Filename and ClassId, got",
        ),
        (
            "gtsrb",
            None,
            "GT-final_test.csv",
            _replace(";42", ";43"),
            "expected labels in [0, 43) of GTSRB, got 0 to 43",
        ),
        ("cars", None, "cars_test_annos_withlabels.mat", _garble, "withlabels.mat: expected a MATLAB file"),
        ("dtd", "torchvision", "test1.txt", _replace("banded/", "bandid/"), "without banded and with bandid"),
        ("dtd", "torchvision", "test1.txt", _replace("/", " "), "expected lines of class/file, got"),
        ("flowers102", None, "setid.mat", Path.unlink, "setid.mat: expected"),
        (
            "oxford_pets",
            None,
            "test.txt",
            _replace("Abyssinian_536 1", "Abyssinian_536 one"),
            "expected lines of image, class number",
        ),
        (
            "oxford_pets",
            None,
            "test.txt",
            _replace("Abyssinian", "Abessinier"),
            "without Abyssinian and with Abessinier",
        ),
        ("food101", None, "test.json", _truncate, "test.json: expected a list of images for every class, got"),
        (
            "resisc45",
            None,
            "resisc45-test.txt",
            _replace("airplane", "aeroplane"),
            "got 44, without aeroplane_test000.jpg",
        ),
        ("sun397", "authors", "Testing_01.txt", _replace("/a/abbey/", "abbey"), "expected lines such as /a/abbey"),
        (
            "mnist",
            "parquet",
            "test-00000-of-00001.parquet",
            _garble,
            "expected Parquet files with the columns image and label",
        ),
        ("mnist", "parquet", "test-00000-of-00001.parquet", Path.unlink, "mnist: expected its split test in"),
        ("mnist", "saved", "test/state.json", _garble, "expected a table that save_to_disk wrote, got"),
        ("imagenet_a", "archives", "0.tar", _garble, "0.tar: expected an archive with .jpg and .cls files, got"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_files_are_one_line(name, layout, file, damage, expected, root):
    write_published(name, root, layout)
    damage(max(root.rglob(file)))  # of the split test where there are several
    assert expected in refusal(PublishedSource(REGISTRY[name], root).split, "test", SMALL)


def test_damaged_images_are_named(root):
    write_published("gtsrb", root)
    path = root / "gtsrb/GTSRB/Final_Test/Images/00003.ppm"
    _garble(path)
    images = PublishedSource(REGISTRY["gtsrb"], root).split("test", SMALL)
    assert refusal(images.picture, 3).startswith(
        f"{path}: expected a readable image, got an unknown or damaged header."
    )
    entry = REGISTRY["imagenet_a"]
    write_archives(root / "imagenet_a", entry, [0], ("test",))
    archive = root / "imagenet_a" / "test" / "0.tar"
    archive.write_bytes(archive.read_bytes().replace(b"\xff\xd8\xff", b"\x00\x00\x00"))
    listed = PublishedSource(entry, root).listed("test")
    assert f"{archive}: expected a readable image 0, got an unknown or damaged header." in refusal(listed.picture, 0)


def test_other_tables_are_refused(root):
    import datasets

    path = root / "mnist" / "data" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"picture": [1], "label": [2]}).to_parquet(str(path))
    text = refusal(PublishedSource(REGISTRY["mnist"], root).listed, "test")
    assert (
        "expected the columns image and label, got picture, label. It may be another data set than ylecun/mnist" in text
    )


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_not_executed(root, tmp_path):
    write_published("cifar10", root)
    touched = tmp_path / "touched"
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": _Hostile(touched)}, protocol=2))
    text = refusal(PublishedSource(REGISTRY["cifar10"], root).listed, "test")
    assert "got a file that asks for posix.system, which tensors do not need: do not trust it" in text
    assert not touched.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "pyd", "pth", "npy"])
def test_what_else_is_in_archives_is_not_executed(kind, root, tmp_path):
    entry, touched = REGISTRY["imagenet_a"], tmp_path / "touched"
    write_archives(root / "imagenet_a", entry, [0], ("test",))
    with tarfile.open(root / "imagenet_a" / "test" / "0.tar", "a") as archive:
        content = pickle.dumps(_Hostile(touched))
        member = tarfile.TarInfo(f"s0000000.{kind}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with contextlib.suppress(DataError):
        PublishedSource(entry, root).listed("test")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("module", "name", "layout", "expected"),
    [
        ("scipy.io", "svhn", None, "expected scipy to read it, got none. Run: pip install 'lit-merge[data]'."),
        ("h5py", "pcam", None, "expected h5py to read it, got none. Run: pip install 'lit-merge[data]'."),
        ("datasets", "mnist", "parquet", "expected the datasets library to read it, got none. Run: pip install"),
    ],
)
def test_missing_libraries(module, name, layout, expected, root, monkeypatch):
    write_published(name, root, layout)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert expected in refusal(PublishedSource(REGISTRY[name], root).listed, "test")


# The commands


def test_check(root, capsys):
    write_published("mnist", root)
    write_published("svhn", root)
    _garble(root / "svhn" / "test_32x32.mat")
    assert main(["data", "check", "mnist", "svhn", "cars", "--root", str(root), "--json", "true"]) == 1
    said = capsys.readouterr()
    found = {one["name"]: one for one in json.loads(said.out)}
    assert {name: one["state"] for name, one in found.items()} == {
        "mnist": "other counts",
        "svhn": "damaged",
        "cars": "missing",
    }
    assert found["mnist"]["counts"] == {"train": 9, "val": 1, "test": 10}
    assert found["mnist"]["expected"] == {"train": 55000, "val": 5000, "test": 10000}
    assert found["mnist"]["path"] == str(root / "MNIST" / "raw")
    assert found["mnist"]["classes"] == 10
    assert "got mnist (other counts), svhn (damaged), cars (missing)" in said.err
    assert main(["data", "check", "--root", str(root / "nothing")]) == 0  # nothing was asked for
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 1 + len(REGISTRY) + len(TEXT_TASKS) + len(PACKAGED)
    assert "lit-merge data prepare kmnist" in table
    assert main(["data", "check", "kmnist", "--root", str(root / "nothing")]) == 1
    assert "kmnist: expected Kuzushiji-MNIST in one of these places" in capsys.readouterr().err.replace(
        "KMNIST", "Kuzushiji-MNIST"
    )
    assert main(["data", "check", "--root", str(root)]) == 1  # what is there is wrong


def test_check_decodes_the_first_image(root):
    write_published("gtsrb", root)
    _garble(root / "gtsrb/GTSRB/Final_Test/Images/00000.ppm")
    found = checking.check_data_set(REGISTRY["gtsrb"], root)
    assert found.state == "damaged"
    assert "00000.ppm: expected a readable image" in found.problem


def test_list(capsys):
    assert main(["data", "list", "clip8", "imagenet_r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*SUITES["clip8"], "imagenet_r"]
    assert lines[1].split()[1:6] == ["397", "17,865", "1,985", "19,850", "39.1"]
    assert lines[-1].split()[1:6] == ["200", "–", "–", "30,000", "2.19"]
    assert "clip8, clip14, clip20" in lines[1]
    assert main(["data", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(REGISTRY) + len(TEXT_TASKS) + len(PACKAGED)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chek"], "data: expected one of check, list, prepare, sheet, got 'chek'. Did you mean check?"),
        (
            ["--output", "x.png"],
            "data: expected one of check, list, prepare, sheet, got '--output'. See lit-merge data",
        ),
        (
            ["check", "clp8"],
            f"({SUITE_NAMES}), got 'clp8'. Did you mean",
        ),
        (["prepare"], f"names: expected data sets or suites ({SUITE_NAMES}), got none."),
        (["prepare", "resisc45", "--source", "torchvision"], "source: expected hub for resisc45, got torchvision."),
        (["prepare", "emnist", "--source", "hub"], "source: expected torchvision for emnist, got hub."),
    ],
    ids=str,
)
def test_refused_commands(arguments, expected, capsys):
    assert main(["data", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_help_of_the_commands(capsys):
    assert main(["data", "--help"]) == 0
    assert "lit-merge data prepare" in capsys.readouterr().out
    assert main(["data", "check", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_page_has_the_registry():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert page.endswith(registry_table())


# Downloads, from a server of the test's own


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An address, and the folder whose files are there."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, directory=str(folder), **settings)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()


@pytest.fixture
def small_kmnist(server, tmp_path, monkeypatch) -> Path:
    """KMNIST is ten images per split, and its server's folder is returned."""
    address, folder = server
    write_published("kmnist", tmp_path / "original")
    resources = []
    for path in sorted((tmp_path / "original").rglob("*-ubyte"), reverse=True):  # those of train first
        content = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(content)
        resources.append((f"{path.name}.gz", hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", resources)
    _expect(monkeypatch, "kmnist")
    return folder


def _expect(monkeypatch, name: str, **changes) -> None:
    changes = {"counts": {"train": 9, "val": 1, "test": 10}, **changes}
    monkeypatch.setattr(preparation, "chosen_entries", lambda names: [replace(REGISTRY[name], **changes)])


def test_prepare_through_torchvision(small_kmnist, root, capsys):
    assert main(["data", "prepare", "kmnist", "--root", str(root)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"kmnist: downloading 0.02 GB through torchvision (KMNIST) into {root}"
    place = root / REGISTRY["kmnist"].torchvision_roots[0] / "KMNIST" / "raw"
    assert said[-1] == f"kmnist: 9 train, 1 val, 10 test images of 10 classes in {place}"
    assert {path.suffix for path in root.rglob("*") if path.is_file()} == {""}  # no archives
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    assert main(["data", "prepare", "kmnist", "--root", str(root)]) == 0
    assert capsys.readouterr().out == f"kmnist: is there already, in {place}\n"


def test_an_interrupted_download_goes_on(small_kmnist, root, capsys):
    hidden = small_kmnist / "t10k-labels-idx1-ubyte.gz"
    hidden.rename(small_kmnist / "hidden")
    assert main(["data", "prepare", "kmnist", "--root", str(root)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "kmnist: expected to download it through torchvision (KMNIST), got Error downloading t10k-labels" in error
    assert f"what is complete in {root / '.kmnist.preparing'} is used" in error
    assert [path.name for path in root.iterdir()] == [".kmnist.preparing"]
    (small_kmnist / "hidden").rename(hidden)
    for path in small_kmnist.glob("train-*"):
        path.unlink()  # they are not asked for again
    assert main(["data", "prepare", "kmnist", "--root", str(root)]) == 0
    assert checking.check_data_set(preparation.chosen_entries([])[0], root).state == "complete"


def test_no_server_leaves_nothing(root, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert main(["data", "prepare", "kmnist", "--root", str(root)]) == 1
    assert "Check the network, then run the same command again." in capsys.readouterr().err
    assert list(root.iterdir()) == []


def test_cifar_is_downloaded_without_being_unpickled(server, root, tmp_path, monkeypatch):
    address, folder = server
    write_published("cifar10", tmp_path / "original")
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "original" / "cifar-10-batches-py", "cifar-10-batches-py")
    content = (folder / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{address}cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr("torchvision.datasets.cifar.pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    _expect(monkeypatch, "cifar10")
    (found,) = preparation.prepare(["cifar10"], str(root))
    assert (found.state, found.counts["test"]) == ("complete", 10)
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]


def test_prepare_from_the_hub(root, monkeypatch):
    asked = []

    def snapshot_download(repository, *, repo_type, revision, local_dir, allow_patterns):
        asked.append((repository, repo_type, revision, allow_patterns))
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        if revision is not None:
            write_parquet(Path(local_dir), REGISTRY["svhn"], list(range(10)), ("train", "test"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    _expect(monkeypatch, "svhn")
    (found,) = preparation.prepare(["svhn"], str(root), "hub")
    patterns = ["cropped_digits/*train*.parquet", "*train*.tar", "cropped_digits/*test*.parquet", "*test*.tar"]
    assert asked == [
        ("ufldl-stanford/svhn", "dataset", None, patterns),
        ("ufldl-stanford/svhn", "dataset", "refs/convert/parquet", patterns),
    ]
    assert found.path == str(root / "svhn")
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]


def test_an_incomplete_download_is_not_moved(small_kmnist, root, monkeypatch):
    _expect(monkeypatch, "kmnist", counts={"train": 9, "val": 1, "test": 11})
    text = refusal(preparation.prepare, ["kmnist"], str(root))
    assert "kmnist: expected a complete download through torchvision (KMNIST), got: " in text
    assert "got 10 of 11 in test" in text
    assert [path.name for path in root.iterdir()] == [".kmnist.preparing"]


def test_prepare_refuses_what_is_wrong_already_and_a_full_disk(root, monkeypatch):
    write_published("mnist", root)
    assert "got 9 of 55,000 in train" in refusal(preparation.prepare, ["mnist"], str(root))
    _expect(monkeypatch, "kmnist", gigabytes=1e9)
    text = refusal(preparation.prepare, ["kmnist"], str(root / "new"))
    assert text.startswith(f"kmnist: expected 2e+09 GB free in {root} for the download and its content, got ")
    assert not (root / "new").exists()
