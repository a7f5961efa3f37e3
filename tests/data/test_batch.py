"""Batches as objects, and data sets of any tensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader

from lit_merge.data import Batch, ImageBatch, OtherBatch, TensorExamples
from lit_merge.data.sampling import EvaluationSampler, TrainingSampler


def images(count: int = 5) -> ImageBatch:
    return ImageBatch(torch.rand(count, 3, 2, 2), torch.arange(count) % 3, torch.arange(count))


def two_inputs(count: int = 7) -> TensorExamples:
    words = torch.arange(count * 4).view(count, 4)
    return TensorExamples((words, (words % 5 > 0).float()), torch.arange(count) % 2)


@pytest.mark.parametrize("batch", [images(), OtherBatch(torch.rand(5, 3, 2, 2), torch.zeros(5), torch.arange(5))])
def test_what_lightning_does_to_a_batch_leaves_its_kind(batch) -> None:
    for changed in (
        move_data_to_device({"own": batch}, "cpu")["own"],
        apply_to_collection(batch, torch.Tensor, torch.clone),
        pickle.loads(pickle.dumps(batch)),
        batch.select(batch.indices >= 0),
    ):
        assert type(changed) is type(batch)
        assert len(changed) == 5
        assert all(torch.equal(one, other) for one, other in zip(changed, batch, strict=True))
    doubled = apply_to_collection(batch, torch.Tensor, lambda one: one.double() if one.is_floating_point() else one)
    assert doubled.images.dtype == torch.float64
    assert batch.images.dtype == torch.float32


def test_joined_batches_go_through_a_network_together() -> None:
    one, other = images(3), OtherBatch(torch.rand(2, 3, 2, 2), torch.zeros(2).long(), torch.arange(2))
    joined = type(one).join([one, other])
    assert torch.equal(joined.images, torch.cat([one.images, other.images]))
    assert joined.targets.tolist() == [0, 1, 2, -1, -1]
    assert len(joined) == 5


def test_examples_of_several_tensors() -> None:
    dataset = two_inputs()
    batch = dataset.__getitems__([7 + 2, 3])  # of another epoch
    assert type(batch) is Batch
    assert [one.tolist() for one in batch.inputs] == [[[8, 9, 10, 11], [12, 13, 14, 15]], [[1, 1, 0, 1], [1, 1, 1, 0]]]
    assert batch.targets.tolist() == [0, 1]
    assert batch.indices.tolist() == [2, 3]
    part = dataset.subset([4, 1])
    assert part[0].inputs[0].tolist() == [[16, 17, 18, 19]]
    assert part.digest() != dataset.digest() == two_inputs().digest()
    dataset.labels = dataset.labels.flip(0)
    assert dataset.digest() == two_inputs().digest()  # an odd number of alternating labels
    dataset.labels = dataset.labels + 1
    assert dataset.digest() != two_inputs().digest()


def test_padding_of_several_tensors_counts_for_nobody() -> None:
    loader = DataLoader(two_inputs(), 4, sampler=EvaluationSampler(two_inputs(), 2, 1), collate_fn=lambda batch: batch)
    (batch,) = loader
    assert batch.indices.tolist() == [1, 3, 5, -1]
    assert batch.targets.tolist() == [1, 1, 1, -1]
    assert [one[-1].tolist() for one in batch.inputs] == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_training_takes_every_example_once_an_epoch() -> None:
    dataset = two_inputs()
    loader = DataLoader(dataset, 3, sampler=TrainingSampler(dataset), collate_fn=lambda batch: batch)
    assert sorted(index for batch in loader for index in batch.indices.tolist()) == list(range(7))
