"""A head at chance is said before entropy is minimised on it, and nothing else changes."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from builders.learned_merge import BlockEncoder
from torch import nn
from torch.utils.data import DataLoader

from lit_merge import MergeModule, TaskVector
from lit_merge.data.batch import ImageBatch
from lit_merge.errors import ConfigurationError
from lit_merge.modules.chance import chance_warnings

CLASSES = {"good": 3, "bad": 4}
SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_steps": 2,
}


class Tasks(L.LightningDataModule):
    """Images whose labels are what the merge says of them (good), or one more (bad), and a tenth as many without."""

    task_share = 1.0

    def __init__(self, module, count=40):
        super().__init__()
        self.tasks = {
            task: SimpleNamespace(classes=list("qwert")[: CLASSES[task]], templates=["{}"]) for task in CLASSES
        }
        images = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.batches = {}
        for task in CLASSES:
            with torch.no_grad(), module.merged_once():
                labels = module.classify(module(images), task).argmax(-1)
            labels = labels if task == "good" else (labels + (torch.arange(count) % 4 > 0)) % 4
            labels[::10] = -1
            indices = torch.arange(count)
            self.batches[task] = [
                ImageBatch(images[rows], labels[rows], indices[rows]) for rows in torch.arange(count).split(7)
            ]

    @property
    def task_names(self):
        return tuple(self.tasks)

    def _loader(self, task):
        return DataLoader(self.batches[task], batch_size=None, collate_fn=lambda one: one)

    def train_dataloader(self):
        batches = [{task: self.batches[task][step] for task in self.tasks} for step in range(2)]
        return DataLoader(batches, batch_size=None, shuffle=True, collate_fn=lambda one: one)

    def val_dataloader(self):
        return [self._loader(task) for task in self.tasks]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    torch.manual_seed(3)
    for task in CLASSES:
        shapes = {name: own.shape for name, own in BlockEncoder().named_parameters()}
        TaskVector({n: 0.4 * torch.randn(s) for n, s in shapes.items()}, task).save(folder / f"{task}.safetensors")
    return [str(folder / f"{task}.safetensors") for task in CLASSES]


def learner(files, **settings):
    torch.manual_seed(0)
    encoder = BlockEncoder()
    heads = {task: nn.Linear(6, count) for task, count in CLASSES.items()}
    module = MergeModule(files, encoder=encoder, heads=heads, **settings)
    return module, Tasks(module)


def fitted(module, data, **settings):
    """The coefficients after two steps, and the warnings."""
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(**{**SILENT, "limit_val_batches": 1.0, **settings}).fit(module, data)
    said = [str(one.message) for one in caught if "the merge starts with" in str(one.message)]
    return module.merged.coefficients.detach().clone(), said


@pytest.mark.parametrize("linearized", [False, True])
def test_a_task_at_chance_is_named_with_its_numbers(files, linearized):
    module, data = learner(files, linearized=linearized)
    _, said = fitted(module, data)
    batches = data.batches["bad"]
    labels = torch.cat([batch.targets for batch in batches])
    right = int((torch.arange(40)[labels >= 0] % 4 == 0).sum())
    (line,) = said
    assert line.startswith(
        f"bad: the merge starts with {right} of 36 validation examples right ({100 * right / 36:.1f} %), chance is "
        "25.0 %: what is learned without labels "
    )


def test_the_number_of_examples_is_a_limit(files):
    module, data = learner(files, chance_examples=10)
    _, (line,) = fitted(module, data)
    # images 1 to 9 and 11, as those with the label -1 do not count
    assert "with 2 of 10 validation examples right (20.0 %)" in line


def test_it_changes_no_random_state_and_no_result(files):
    outcomes = []
    for examples in (256, 0):
        module, data = learner(files, chance_examples=examples)
        coefficients, said = fitted(module, data)
        outcomes.append((coefficients, torch.get_rng_state(), len(said)))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert [said for _, _, said in outcomes] == [1, 0]
    states = random.getstate(), np.random.get_state()[1].tolist()
    fitted(*learner(files))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def attached(module, processes=1, **settings):
    """The module with what is asked of a trainer; every process has what this one has."""
    asked = []

    def reduce(value, reduce_op):
        asked.append((value.tolist(), reduce_op))
        return processes * value if reduce_op == "sum" else value

    given = {"world_size": processes, "limit_val_batches": 1.0, "strategy": SimpleNamespace(reduce=reduce), **settings}
    module._trainer = SimpleNamespace(precision_plugin=L.pytorch.plugins.precision.Precision(), **given)
    return asked


def test_where_there_is_nothing_to_compare_nothing_is_said(files):
    assert fitted(*learner(files, objective="cross_entropy"))[1] == []
    module, data = learner(files)
    attached(module)
    assert len(chance_warnings(module, data, 100)) == 1
    data.adapted_tasks = ("good",)
    assert chance_warnings(module, data, 100) == []
    del data.adapted_tasks
    module.head_of("bad").hits = lambda logits, batch: (batch.targets.float(), batch.targets.float())
    assert chance_warnings(module, data, 100) == []
    del module.head_of("bad").hits
    attached(module, limit_val_batches=0)
    assert chance_warnings(module, data, 100) == []
    attached(module)
    for batch in data.batches["bad"]:
        batch.targets.fill_(-1)
    assert chance_warnings(module, data, 100) == []
    with pytest.raises(ConfigurationError, match="chance_examples: expected a whole number of at least 0, got -1"):
        learner(files, chance_examples=-1)


def test_processes_add_up_what_they_saw(files):
    module, data = learner(files)
    asked = attached(module, processes=2)
    (line,) = chance_warnings(module, data, 19)
    assert "with 4 of 20 validation examples right (20.0 %), chance is 25.0 %" in line
    assert asked[2:] == [([2, 10], "sum"), ([4], "max")]
