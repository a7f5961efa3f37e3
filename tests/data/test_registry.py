"""The facts about published data sets: what the merging papers' programs call and divide, against who knows it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import pickle
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.data import random_split

from lit_merge.data.published import registry
from lit_merge.data.published.registry import REGISTRY, SUITES, entry, registry_table
from lit_merge.data.templates import TEMPLATES, templates_for
from lit_merge.errors import ConfigurationError

FILES = Path(registry.__file__).parent / "data_sets"
NAMES = list(REGISTRY)

# name: (classes, train, val, test), with the programs' division of what they train on.
PINNED = {
    "sun397": (397, 17_865, 1_985, 19_850),
    "cars": (196, 7_330, 814, 8_041),
    "resisc45": (45, 17_010, 1_890, 6_300),
    "eurosat": (10, 21_600, 2_700, 2_700),
    "svhn": (10, 68_257, 5_000, 26_032),
    "gtsrb": (43, 23_976, 2_664, 12_630),
    "mnist": (10, 55_000, 5_000, 10_000),
    "dtd": (47, 3_384, 376, 1_880),
    "cifar100": (100, 45_000, 5_000, 10_000),
    "stl10": (10, 4_500, 500, 8_000),
    "flowers102": (102, 918, 102, 6_149),
    "oxford_pets": (37, 3_312, 368, 3_669),
    "pcam": (2, 257_144, 5_000, 32_768),
    "fer2013": (7, 25_839, 2_870, 7_178),
    "emnist": (10, 235_000, 5_000, 40_000),
    "cifar10": (10, 45_000, 5_000, 10_000),
    "food101": (101, 70_750, 5_000, 25_250),
    "fashion_mnist": (10, 55_000, 5_000, 10_000),
    "rendered_sst2": (2, 6_228, 692, 1_821),
    "kmnist": (10, 55_000, 5_000, 10_000),
    "imagenet": (1_000, 1_276_167, 5_000, 50_000),
    "imagenet_v2": (1_000, None, None, 10_000),
    "imagenet_r": (200, None, None, 30_000),
    "imagenet_sketch": (1_000, None, None, 50_889),
    "imagenet_a": (200, None, None, 7_500),
    "objectnet": (113, None, None, 18_574),
}
# Images that the data sets' own splits have: name -> (what the programs train on, test).
PUBLISHED = {
    "sun397": (19_850, 19_850),
    "cars": (8_144, 8_041),
    "resisc45": (18_900, 6_300),
    "svhn": (73_257, 26_032),
    "gtsrb": (26_640, 12_630),
    "mnist": (60_000, 10_000),
    "dtd": (1_880 + 1_880, 1_880),
    "cifar100": (50_000, 10_000),
    "stl10": (5_000, 8_000),
    "flowers102": (1_020, 6_149),
    "oxford_pets": (3_680, 3_669),
    "pcam": (262_144, 32_768),
    "fer2013": (28_709, 7_178),
    "emnist": (240_000, 40_000),
    "cifar10": (50_000, 10_000),
    "food101": (750 * 101, 250 * 101),
    "fashion_mnist": (60_000, 10_000),
    "rendered_sst2": (6_920, 1_821),
    "kmnist": (60_000, 10_000),
    "imagenet": (1_281_167, 50_000),
}


def package_folder(package: str) -> Path:
    """Where an installed package is, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def clip_metadata() -> object:
    """open_clip's module of ImageNet's names and templates, without the package around it."""
    file = package_folder("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("zero_shot_metadata", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_an_entry_and_every_entry_a_file():
    assert sorted(NAMES) == sorted(PINNED) == sorted(file.stem for file in FILES.iterdir())
    for name, item in REGISTRY.items():
        assert item.name == name
        assert item.title
        assert item.citation
        assert item.gigabytes > 0


@pytest.mark.parametrize("name", NAMES)
def test_classes_and_images_are_those_of_the_literature(name):
    item, (classes, *counts) = REGISTRY[name], PINNED[name]
    assert len(item.classes) == classes
    assert [item.counts.get(split) for split in ("train", "val", "test")] == counts
    assert set(item.counts) <= {"train", "val", "test"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tenth_and_at_most_5000_images_of_train_are_for_validation(name):
    item, (train, test) = REGISTRY[name], PUBLISHED[name]
    assert item.validation == "from train"
    assert item.counts["val"] == min(train // 10, 5_000)
    assert item.counts["train"] + item.counts["val"] == train
    assert item.counts["test"] == test


def test_the_rest_have_validation_images_of_their_own_or_none():
    rest = {name: REGISTRY[name].validation for name in NAMES if name not in PUBLISHED}
    assert rest.pop("eurosat") == "own"
    assert "val" in REGISTRY["eurosat"].folder_splits
    assert sum(REGISTRY["eurosat"].counts.values()) == 27_000
    assert set(rest.values()) == {"none"}
    assert all(set(REGISTRY[name].counts) == {"test"} for name in rest)


def test_the_division_by_torch_is_still_the_programs():
    # The programs assert this of MNIST before they go on.
    train, _ = random_split(range(60_000), [55_000, 5_000], generator=torch.Generator().manual_seed(0))
    assert train.indices[0] == 36_044


def test_suites_are_those_of_the_literature():
    eight = {"cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "svhn", "sun397"}
    fourteen = eight | {"stl10", "oxford_pets", "flowers102", "cifar100", "pcam", "fer2013"}
    twenty = fourteen | {"cifar10", "food101", "fashion_mnist", "rendered_sst2", "emnist", "kmnist"}
    assert {name: set(tasks) for name, tasks in SUITES.items()} == {
        "clip8": eight,
        "clip14": fourteen,
        "clip20": twenty,
        "wise_ft": {"imagenet", "imagenet_v2", "imagenet_r", "imagenet_sketch", "imagenet_a", "objectnet"},
    }
    assert [len(tasks) for tasks in SUITES.values()] == [8, 14, 20, 6]
    assert SUITES["clip14"][:8] == SUITES["clip8"]
    assert SUITES["clip20"][:14] == SUITES["clip14"]
    assert SUITES["wise_ft"][0] == "imagenet"


@pytest.mark.parametrize("name", NAMES)
def test_no_class_is_named_twice_but_two_of_imagenet(name):
    classes = REGISTRY[name].classes
    twice = {text for text in classes if classes.count(text) > 1}
    assert twice == ({"missile", "sunglasses"} if len(classes) == 1_000 else set())
    assert all(text and text == text.strip() for text in classes)


@pytest.mark.parametrize("name", NAMES)
def test_templates_have_one_place_for_the_class(name):
    templates = REGISTRY[name].templates
    assert templates == templates_for(name) == TEMPLATES[name]
    assert len(set(templates)) == len(templates) > 0
    for template in templates:
        assert template.count("{}") == 1
        assert template.replace("{}", "").count("{") == 0


def test_templates_of_the_further_data_sets():
    photo, the = "a {}photo of a {}{{}}.", "a {}photo of the {}{{}}."
    kinds = [
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    ]
    cifar = tuple(text.format(*kind) for text in (photo, the) for kind in kinds)
    assert TEMPLATES["cifar10"] == TEMPLATES["cifar100"] == cifar
    assert TEMPLATES["pcam"] == ("this is a photo of {}",)
    assert TEMPLATES["emnist"] == ('a photo of the digit character: "{}".',)
    assert TEMPLATES["stl10"] == TEMPLATES["fashion_mnist"] == ("a photo of a {}.", "a photo of the {}.")
    assert len(TEMPLATES["fer2013"]) == 6
    clip = [text("{}") for text in clip_metadata().OPENAI_IMAGENET_TEMPLATES]
    assert len(clip) == 80
    assert all(list(TEMPLATES[name]) == clip for name in SUITES["wise_ft"])


def test_class_names_are_torchvisions():
    datasets = torchvision.datasets
    assert list(REGISTRY["flowers102"].classes) == datasets.Flowers102.classes
    assert list(REGISTRY["fashion_mnist"].classes) == datasets.FashionMNIST.classes
    assert list(REGISTRY["kmnist"].classes) == datasets.KMNIST.classes
    assert list(REGISTRY["emnist"].classes) == list(datasets.EMNIST.classes_split_dict["digits"])
    digits = [text.split(" - ")[0] for text in datasets.MNIST.classes]
    assert list(REGISTRY["mnist"].classes) == list(REGISTRY["svhn"].classes) == digits


def test_class_names_that_torchvision_reads_from_files_are_written_as_it_writes_them():
    pets = REGISTRY["oxford_pets"].classes
    assert list(pets) == sorted(pets)
    assert all(" ".join(part.title() for part in name.lower().split()) == name for name in pets)
    for name in ("food101", "cifar100"):  # sorted folder or label names, underscores kept
        classes = REGISTRY[name].classes
        assert list(classes) == sorted(classes)
        assert not any(" " in text for text in classes)
    for name in ("cifar10", "stl10", "rendered_sst2"):
        assert list(REGISTRY[name].classes) == sorted(REGISTRY[name].classes)
    assert "crab" in REGISTRY["cifar100"].classes


@pytest.mark.parametrize("name", [name for name in NAMES if REGISTRY[name].torchvision])
def test_torchvision_takes_the_arguments(name):
    item = REGISTRY[name]
    kind = getattr(torchvision.datasets, item.torchvision)
    for several in item.torchvision_arguments.values():
        for arguments in several:
            # EMNIST hands on what it does not know to MNIST, ImageNet to its base.
            parameters = set().union(*(inspect.signature(base.__init__).parameters for base in kind.__mro__[:-1]))
            assert set(arguments) <= parameters
    assert set(item.torchvision_arguments) in ({"train", "test"}, set())
    assert item.torchvision_roots


def test_torchvision_splits_are_the_programs():
    arguments = {name: dict(item.torchvision_arguments) for name, item in REGISTRY.items() if item.torchvision}
    assert {name for name, given in arguments.items() if not given} == {"sun397", "eurosat"}  # it does not divide them
    assert arguments["dtd"] == {"train": ({"split": "train"}, {"split": "val"}), "test": ({"split": "test"},)}
    assert arguments["oxford_pets"]["train"] == ({"split": "trainval"},)
    assert arguments["imagenet"]["test"] == ({"split": "val"},)
    assert arguments["emnist"]["train"] == ({"split": "digits", "train": True},)
    for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist"):
        assert arguments.pop(name) == {"train": ({"train": True},), "test": ({"train": False},)}
    others = {"cars", "svhn", "gtsrb", "stl10", "flowers102", "pcam", "fer2013", "food101", "rendered_sst2"}
    for name in others:
        assert arguments[name] == {"train": ({"split": "train"},), "test": ({"split": "test"},)}


def test_class_folders_stand_for_the_class_at_their_place():
    def spaced(name: str) -> list[str]:
        return [folder.replace("_", " ") for folder in REGISTRY[name].folder_classes]

    assert [text[2:] for text in spaced("sun397")] == list(REGISTRY["sun397"].classes)
    assert all(folder[0] == folder[2] for folder in REGISTRY["sun397"].folder_classes)
    assert spaced("resisc45") == list(REGISTRY["resisc45"].classes)
    assert spaced("dtd") == list(REGISTRY["dtd"].classes)
    assert [text.replace("C-V", "C/V") for text in spaced("cars")] == list(REGISTRY["cars"].classes)
    assert dict(zip(REGISTRY["eurosat"].folder_classes, REGISTRY["eurosat"].classes, strict=True)) == {
        "AnnualCrop": "annual crop land",
        "Forest": "forest",
        "HerbaceousVegetation": "brushland or shrubland",
        "Highway": "highway or road",
        "Industrial": "industrial buildings or commercial buildings",
        "Pasture": "pasture land",
        "PermanentCrop": "permanent crop land",
        "Residential": "residential buildings or homes or apartments",
        "River": "river",
        "SeaLake": "lake or sea",
    }
    for name in ("food101", "rendered_sst2"):
        assert REGISTRY[name].folder_classes == REGISTRY[name].classes
    assert [int(folder) for folder in REGISTRY["gtsrb"].folder_classes] == list(range(43))
    assert {len(folder) for folder in REGISTRY["gtsrb"].folder_classes} == {5}
    assert dict(zip(REGISTRY["fer2013"].folder_classes, REGISTRY["fer2013"].classes, strict=True)) == {
        "angry": "angry",
        "disgust": "disgusted",
        "fear": "fearful",
        "happy": "happy",
        "sad": "sad",
        "surprise": "surprised",
        "neutral": "neutral",
    }


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_told_completely(name):
    item = REGISTRY[name]
    assert item.folder_layout in {"class folders", "split lists", "torchvision"}
    assert item.folders
    assert len(set(item.folder_classes)) == len(item.folder_classes)
    assert len(item.folder_classes) in {0, len(item.classes)}
    if item.folder_layout == "torchvision":
        assert item.torchvision
        assert item.folder_classes or not item.folder_splits
    else:
        assert item.folder_classes
        own = {"val"} if item.validation == "own" else set()
        assert set(item.folder_splits) == set(item.counts) - {"val"} | own
    assert bool(item.image_folder) == (item.folder_layout == "split lists")
    if "sorted" in item.label_order and item.folder_classes:
        assert list(item.folder_classes) == sorted(item.folder_classes)


@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_copy_is_told_completely(name):
    item = REGISTRY[name]
    if item.hub is None:
        assert name == "emnist"  # no copy of the digits is known
        assert not item.hub_splits
        return
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", item.hub)
    assert set(item.hub_splits) == set(item.counts) - {"val"}
    assert len(item.hub_columns) == 2
    assert sorted(item.hub_classes) in ([], sorted(item.classes))


def test_the_hubs_labels_of_emotions_are_alphabetical():
    item = REGISTRY["fer2013"]
    assert list(item.hub_classes) == sorted(item.classes) != list(item.classes)


def test_imagenet_is_clips_list_in_the_order_of_the_synsets():
    item = REGISTRY["imagenet"]
    synsets = (package_folder("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    assert item.classes == tuple(clip_metadata().IMAGENET_CLASSNAMES)
    assert list(item.folder_classes) == synsets
    assert item.imagenet_labels == ()
    for name in ("imagenet_v2", "imagenet_sketch"):
        assert REGISTRY[name].classes == item.classes
        assert REGISTRY[name].imagenet_labels == tuple((label,) for label in range(1_000))
    assert REGISTRY["imagenet_sketch"].folder_classes == item.folder_classes
    assert [int(folder) for folder in REGISTRY["imagenet_v2"].folder_classes] == list(range(1_000))


@pytest.mark.parametrize("letter", ["a", "r"])
def test_imagenet_a_and_r_are_200_classes_of_imagenet(letter):
    item, imagenet = REGISTRY[f"imagenet_{letter}"], REGISTRY["imagenet"]
    file = package_folder("timm") / "data" / "_info" / f"imagenet_{letter}_indices.txt"
    labels = [int(line) for line in file.read_text().split()]
    assert len(labels) == 200
    assert item.imagenet_labels == tuple((label,) for label in labels)
    assert list(item.classes) == [imagenet.classes[label] for label in labels]
    assert list(item.folder_classes) == [imagenet.folder_classes[label] for label in labels]


def test_objectnet_is_113_groups_of_imagenets_classes():
    item, imagenet = REGISTRY["objectnet"], REGISTRY["imagenet"]
    labels = [label for group in item.imagenet_labels for label in group]
    assert all(item.imagenet_labels)
    assert len(item.imagenet_labels) == 113
    assert len(set(labels)) == len(labels)
    groups = dict(zip(item.folder_classes, item.imagenet_labels, strict=True))
    named = {folder: {imagenet.classes[label] for label in group} for folder, group in groups.items()}
    assert named["chair"] == {"barber chair", "folding chair", "rocking chair"}
    assert named["pen"] == {"ballpoint pen", "quill", "fountain pen"}
    assert named["full_sized_towel"] == {"bath towel"}
    assert named["wheel"] == {"car wheel", "paddle wheel"}
    assert named["banana"] == {"banana"}
    same = [name for name, group in zip(item.classes, item.imagenet_labels, strict=True) if len(group) == 1]
    assert sum({name} == {imagenet.classes[label] for label in groups[name]} for name in same if name in groups) > 20


def test_entry_is_found_in_any_case():
    assert entry("sun397") is entry("SUN397") is REGISTRY["sun397"]
    with pytest.raises(ConfigurationError, match=r"^data set: expected one of sun397, cars, .*, got 'cifar'\. Did you"):
        entry("cifar")
    with pytest.raises(ConfigurationError, match=r"got 'qqq'\. `lit-merge data list` shows what each of them is\.$"):
        entry("qqq")


def test_entries_are_fixed_and_travel_to_other_processes():
    with pytest.raises(FrozenInstanceError):
        entry("mnist").name = "digits"
    with pytest.raises(TypeError):
        REGISTRY["mine"] = entry("mnist")
    assert all(pickle.loads(pickle.dumps(item)) == item for item in REGISTRY.values())


def test_a_fact_that_no_entry_has_is_refused(tmp_path, monkeypatch):
    facts = json.loads((FILES / "mnist.json").read_text(encoding="utf-8"))
    (tmp_path / "mnist.json").write_text(json.dumps({**facts, "clases": []}), encoding="utf-8")
    monkeypatch.setattr(registry, "_FILES", tmp_path)
    with pytest.raises(TypeError, match="clases"):
        registry._read("mnist")


def test_the_table_shows_every_entry():
    table, _, notes = registry_table().partition("\n\n")
    header, rule, *rows = [line.strip("|").split("|") for line in table.splitlines()]
    assert [len(row) for row in (header, rule, *rows)] == [9] * 28
    for row, (name, item) in zip(rows, REGISTRY.items(), strict=True):
        cells = [cell.strip() for cell in row]
        assert cells[0] == f"`{name}`"
        assert cells[1] == f"{item.title} ({item.citation})"
        assert int(cells[2].replace(",", "")) == PINNED[name][0]
        counts = [None if cell == "–" else int(cell.replace(",", "")) for cell in cells[3].split(" / ")]
        assert counts == list(PINNED[name][1:])
        assert float(cells[4]) == item.gigabytes
        assert cells[5:7] == [item.validation, item.torchvision or "–"]
        assert cells[8] == f"`{item.folders[0]}`"
    assert "`ufldl-stanford/svhn` (cropped_digits)" in table
    told = [line[4:].partition("**: ") for line in notes.splitlines()]
    assert [(name, text) for name, _, text in told] == [
        (item.name, item.notes) for item in REGISTRY.values() if item.notes
    ]
