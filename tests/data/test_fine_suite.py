"""The finer suite: its tasks, the same pixels everywhere, other numbers of images, and what draws them.

After a deliberate change of the drawing raise ``GENERATOR_VERSION`` and run ``python tests/data/test_fine_suite.py``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_merge.data import EMBEDDED_TASKS, EmbeddedSource, MultiTaskDataModule, load_split
from lit_merge.data.embedded import drawing, tasks
from lit_merge.data.embedded.canvas import Brush
from lit_merge.data.embedded.captions import captioned_image
from lit_merge.data.embedded.fine.table import FINE_TASKS
from lit_merge.data.embedded.tasks import cache_key, generate_split, sized_task
from lit_merge.data.other_tasks import known_others
from lit_merge.data.published.preparation import prepare
from lit_merge.data.published.task import named_source
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.models import Preprocessing

DIGESTS = Path(__file__).with_name("fine_digests.json")


def digests(name: str) -> dict[str, str]:
    """Of one test image per class, and of the first images of the other splits."""
    task = sized_task(name, {"train": 2, "val": 2, "test": len(FINE_TASKS[name].classes)})
    drawn = {split: generate_split(task, split) for split in ("train", "val", "test")}
    return {
        split: hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
        for split, (images, labels) in drawn.items()
    }


def test_twenty_tasks_with_many_classes():
    assert len(FINE_TASKS) == 20
    assert not set(FINE_TASKS) & set(EMBEDDED_TASKS)
    for name, task in FINE_TASKS.items():
        assert task.name == name
        assert 50 <= len(set(task.classes)) == len(task.classes) <= 200
        assert task.templates
        assert all(template.count("{}") == 1 for template in task.templates)
        assert {split: task.size(split) for split in ("train", "val", "test")} == {
            "train": 10_000,
            "val": 2_000,
            "test": 5_000,
        }


@pytest.mark.parametrize("name", FINE_TASKS)
def test_the_same_pixels_everywhere(name):
    assert digests(name) == json.loads(DIGESTS.read_text(encoding="utf-8"))[name]


def test_another_split_another_font_and_palette_and_pre_training_is_plain():
    for task in FINE_TASKS.values():
        images = [task.draw(Brush((1, 2, 3), split), 5) for split in ("pretrain", "train", "val", "test")]
        assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in images)
        assert not any(np.array_equal(left, right) for left, right in pairwise(images))


def test_captions_of_the_finer_tasks():
    pairs = [captioned_image(index, 0, 1.0) for index in range(40)]
    said = {template.format(one) for task in FINE_TASKS.values() for one in task.classes for template in task.templates}
    assert all(caption in said for _, caption in pairs)
    plain, as_before = captioned_image(7), captioned_image(7, 0, 0.0)
    assert plain[1] == as_before[1]
    assert np.array_equal(plain[0], as_before[0])


def test_other_numbers_of_images_are_other_splits(own_cache):
    source = EmbeddedSource("cards", sizes={"test": 53, "val": 4})
    examples = source.split("test", Preprocessing(32))
    assert len(examples) == 53
    assert torch.bincount(examples.labels).max() == 2
    assert len(list((own_cache / "embedded").iterdir())) == 1
    source.name = "renamed"
    assert torch.equal(source.split("test", Preprocessing(32)).images, examples.images)
    assert len({cache_key("cards", "test"), cache_key("cards", "test", {"test": 53})}) == 2
    for name in ("clutter", "cards"):
        assert cache_key(name, "test", {"test": tasks.DRAWN_TASKS[name].size("test")}) == cache_key(name, "test")


def test_sizes_that_are_none():
    with pytest.raises(DataError, match=r"sizes of cards: expected numbers of at least 1 for train, val, test, got \{"):
        EmbeddedSource("cards", sizes={"tests": 5})
    with pytest.raises(DataError, match="sizes of cards: expected numbers of at least 1"):
        EmbeddedSource("cards", sizes={"test": 0})
    with pytest.raises(DataError, match="sizes of digits: expected none, because its 1,797 images are real ones"):
        load_split("digits", "test", sizes={"test": 5000})


def test_the_suite_by_its_name_and_the_tasks_beside_one():
    assert MultiTaskDataModule(["embedded20"]).task_names == tuple(FINE_TASKS)
    beside = known_others(named_source("clocks"), None, {}, (0.8, 0.1, 0.1), 0, False)
    assert list(beside) == [name for name in FINE_TASKS if name != "clocks"]
    beside = known_others(named_source("signs"), None, {}, (0.8, 0.1, 0.1), 0, False)
    assert list(beside) == [name for name in EMBEDDED_TASKS if name != "signs"]


def test_prepare_draws(own_cache, monkeypatch, capsys):
    few = tuple({"train": 3, "val": 2, "test": 2}.items())
    for name in ("cards", "seasons"):
        monkeypatch.setitem(tasks.DRAWN_TASKS, name, replace(FINE_TASKS[name], sizes=few))
    assert prepare(["cards", "seasons", "cards"], workers=0) == ()
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["cards/train: 3 images", "seasons/train: 3 images"]
    assert len(said) == len(list((own_cache / "embedded").iterdir())) == 6
    with pytest.raises(ConfigurationError, match=r"workers: expected a number of at least 0, got -1. Raise it."):
        drawing.draw_splits(["cards"], -1, print)


def test_missing_splits_are_drawn_at_once_by_several_processes(own_cache, monkeypatch):
    few = tuple({"train": 3, "val": 2, "test": 2}.items())
    for name in ("cards", "seasons"):
        monkeypatch.setitem(tasks.DRAWN_TASKS, name, replace(FINE_TASKS[name], sizes=few))
    monkeypatch.setattr(drawing, "_processors", lambda: 2)
    load_split("cards", "train")
    started = []

    class Watched(drawing.DataLoader):
        def __init__(self, splits, **settings):
            started.append((splits.splits, settings["num_workers"]))
            super().__init__(splits, **settings)

    monkeypatch.setattr(drawing, "DataLoader", Watched)
    MultiTaskDataModule(["cards", "seasons"]).prepare_data()
    ((missing, workers),) = started
    assert workers == 2
    assert missing[0][:2] == ("seasons", "train")
    assert len(missing) == 5
    assert len(list((own_cache / "embedded").iterdir())) == 6
    images, labels = load_split("seasons", "val")
    pixels, targets = tasks.generate_split(tasks.DRAWN_TASKS["seasons"], "val")
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert labels.tolist() == targets.tolist()
    MultiTaskDataModule(["cards", "seasons"]).prepare_data()
    assert started[1] == ([], 0)


if __name__ == "__main__":
    content = json.dumps({name: digests(name) for name in FINE_TASKS}, indent=1) + "\n"
    DIGESTS.write_text(content, encoding="utf-8")
