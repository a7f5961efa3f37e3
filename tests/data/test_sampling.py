"""Which image comes when: the law that the number of processes makes no difference."""

from __future__ import annotations

import itertools

import pytest
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

from lit_merge.data.batch import PADDING
from lit_merge.data.sampling import EvaluationSampler, TrainingSampler, training_batch_size
from lit_merge.errors import DataError

COUNTS = (12, 13, 47)


def global_batches(count, processes, batch_size, epoch, seed=0):
    """What the processes see together, batch after batch."""
    per_rank = []
    for rank in range(processes):
        sampler = TrainingSampler(range(count), processes, rank, seed)
        sampler.set_epoch(epoch)
        per_rank.append(list(BatchSampler(sampler, batch_size, drop_last=True)))
    assert len({len(batches) for batches in per_rank}) == 1
    return [sorted(itertools.chain(*shares)) for shares in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_global_batches_are_those_of_one_process(count, processes, epoch):
    whole = 6
    together = global_batches(count, processes, whole // processes, epoch)
    assert together == global_batches(count, 1, whole, epoch)
    assert len(together) == count // whole
    drawn = list(itertools.chain(*together))
    assert len(set(drawn)) == len(drawn)
    assert {draw // count for draw in drawn} == {epoch}  # the epoch travels with the index


def test_epochs_and_seeds_give_different_orders():
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        sampler = TrainingSampler(range(30), seed=seed)
        sampler.set_epoch(epoch)
        order = [draw % 30 for draw in sampler]
        assert sorted(order) == list(range(30))
        assert order == [draw % 30 for draw in sampler]
        orders.add(tuple(order))
    assert len(orders) == 3


@pytest.mark.parametrize("count", [1, 2, *COUNTS])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_image_once(count, processes):
    shares = [list(EvaluationSampler(range(count), processes, rank)) for rank in range(processes)]
    each = -(-count // processes)
    assert [len(share) for share in shares] == [each] * processes
    assert [len(EvaluationSampler(range(count), processes, rank)) for rank in range(processes)] == [each] * processes
    seen = sorted(index for share in shares for index in share)
    assert seen == [PADDING] * (each * processes - count) + list(range(count))
    assert all(share == sorted(share, key=lambda index: index % (count + 1)) for share in shares)  # -1 comes last


def test_lightning_leaves_both_in_place():
    assert isinstance(TrainingSampler(range(3)), DistributedSampler)
    assert isinstance(EvaluationSampler(range(3)), DistributedSampler)


def test_an_empty_split_can_be_evaluated():
    assert list(EvaluationSampler([], 2, 1)) == []


@pytest.mark.parametrize(
    ("count", "processes", "expected"), [(100, 1, 8), (16, 2, 8), (15, 2, 7), (5, 1, 5), (3, 3, 1), (4, 3, 1)]
)
def test_a_small_split_still_gives_one_batch(count, processes, expected):
    batch_size = training_batch_size(count, 8, processes, "cats")
    assert batch_size == expected
    assert global_batches(count, processes, batch_size, epoch=0)


def test_fewer_images_than_processes():
    with pytest.raises(DataError) as error:
        training_batch_size(2, 8, 3, "cats")
    assert str(error.value) == (
        "cats: expected at least one training image per process, got 2 for 3 processes. "
        "Use fewer devices or more images."
    )
