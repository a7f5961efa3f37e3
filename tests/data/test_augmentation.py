"""Augmentation is a function of seed, epoch and image alone; what is read is what the model's preprocessing says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_merge.data.batch import PADDING
from lit_merge.data.images.augmentation import augment_lightly, image_seeds, uniforms
from lit_merge.data.images.datasets import FileImages, TensorImages
from lit_merge.data.sampling import EvaluationSampler, TrainingSampler
from lit_merge.models import Preprocessing

COUNT = 11
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One step of the published generator, in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["memory", "memory, resized", "files"])
def dataset(request, pixels, tmp_path):
    labels = torch.arange(COUNT) % 3
    if request.param == "files":
        paths = [tmp_path / f"{index}.png" for index in range(COUNT)]
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((34, 32)).save(path)
        return FileImages(paths, labels, Preprocessing(24), augmentation_seed=5)
    size = 48 if "resized" in request.param else 32
    names = [str(index) for index in range(COUNT)]
    return TensorImages(pixels, labels, names, Preprocessing(size), augmentation_seed=5)


def keep(batch):
    return batch


def images_by_index(dataset, processes, batch_size, epochs, workers=0):
    """Epoch -> index -> image, as the loaders of all processes give them, with the same loaders for all epochs."""
    seen = {epoch: {} for epoch in epochs}
    for rank in range(processes):
        sampler = TrainingSampler(dataset, processes, rank)
        loader = DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            collate_fn=keep,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        for epoch in epochs:
            sampler.set_epoch(epoch)
            for batch in loader:
                for index, image, label in zip(batch.indices.tolist(), batch.images, batch.labels, strict=True):
                    assert label == dataset.labels[index]
                    seen[epoch][index] = image
    return seen


def test_the_numbers_are_splitmix64s():
    seeds = image_seeds(7, np.array([0, 3]), np.array([0, 12345]))
    expected = [splitmix64(splitmix64(splitmix64(7) ^ epoch) ^ index) for epoch, index in ((0, 0), (3, 12345))]
    assert seeds.tolist() == expected
    numbers = uniforms(seeds, 3)
    assert numbers[1, 0] == (splitmix64(expected[1] ^ 0x9E3779B97F4A7C15) >> 11) / 2**53
    many = uniforms(image_seeds(0, np.zeros(20_000, np.int64), np.arange(20_000)), 4)
    assert many.min() >= 0
    assert many.max() < 1
    assert np.abs(many.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (1, 11), (2, 2), (3, 3)])
def test_the_same_image_in_the_same_epoch_is_the_same(dataset, processes, batch_size):
    alone = images_by_index(dataset, 1, 4, epochs=[0, 2])
    other = images_by_index(dataset, processes, batch_size, epochs=[0, 2])
    for epoch in (0, 2):
        assert len(other[epoch]) >= COUNT - processes + 1
        for index, image in other[epoch].items():
            assert torch.equal(image, alone[epoch][index])


def test_workers_that_live_on_learn_of_the_epoch(dataset):
    alone, with_workers = (images_by_index(dataset, 1, 4, [0, 1], workers) for workers in (0, 2))
    for epoch in (0, 1):
        assert all(torch.equal(with_workers[epoch][index], image) for index, image in alone[epoch].items())
    assert not torch.equal(alone[0][0], alone[1][0])


def test_epochs_and_seeds_differ(dataset):
    first = dataset[3].images
    assert not torch.equal(first, dataset[3 + COUNT].images)
    assert torch.equal(first, dataset[3].images)
    dataset.augmentation_seed = 6
    assert not torch.equal(first, dataset[3].images)


def test_the_random_states_are_left_alone(dataset):
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    dataset[0]
    assert torch.equal(torch.rand(2), expected[0])
    assert random.random() == expected[1]


def test_light_means_light(pixels):
    smooth = torch.arange(32, dtype=torch.uint8).mul(4).add(60).expand(COUNT, 3, 32, 32).contiguous()
    seeds = image_seeds(0, np.zeros(COUNT, np.int64), np.arange(COUNT))
    augmented = augment_lightly(smooth, seeds)
    assert augmented.dtype == torch.uint8
    assert augmented.shape == smooth.shape
    # 2 pixels of 4 levels each, then 10 % contrast about the mean and 10 % brightness.
    largest = (8 + 0.1 * (smooth.float() - smooth.float().mean()).abs().max() + 8) * 1.1 + 0.1 * 200
    assert (augmented.float() - smooth.float()).abs().max() <= largest
    assert (augmented.diff(dim=-1).int() >= 0).all()  # still dark at the left: nothing is flipped
    assert torch.equal(augment_lightly(torch.full_like(pixels, 255), seeds).amax(), torch.tensor(255).byte())


def test_every_shift_happens_and_edges_are_repeated():
    dot = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    dot[:, :, 4, 4] = 200
    augmented = augment_lightly(dot, image_seeds(0, np.zeros(400, np.int64), np.arange(400)))
    places = {divmod(int(image.flatten().argmax()), 9) for image in augmented}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    edge = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    edge[:, :, :, 0] = 200
    widths = (augment_lightly(edge, image_seeds(0, np.zeros(400, np.int64), np.arange(400))) > 100).sum(dim=-1)
    assert set(widths.unique().tolist()) == {0, 1, 2, 3}


def test_without_augmentation_the_images_are_the_models_own(pixels, tmp_path):
    names = ["" for _ in pixels]
    preprocessing = Preprocessing(32)
    plain = TensorImages(pixels, torch.zeros(COUNT, dtype=torch.int64), names, preprocessing)
    batch = plain.__getitems__([2, 2 + 5 * COUNT, 0])
    torch.testing.assert_close(batch.images, preprocessing.normalise(pixels[[2, 2, 0]]), rtol=0, atol=0)
    assert batch.indices.tolist() == [2, 2, 0]
    picture = Image.fromarray(pixels[4].permute(1, 2, 0).numpy()).resize((8, 8)).resize((32, 32))
    smooth = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    larger = TensorImages(smooth, torch.zeros(1, dtype=torch.int64), ["x"], Preprocessing(48))[0].images[0]
    by_pil = Preprocessing(48).transform()(picture)
    assert (larger - by_pil).abs().max() < 0.035  # two of 255 levels: PIL rounds between the directions
    picture.save(tmp_path / "x.png")
    from_file = FileImages([tmp_path / "x.png"], torch.tensor([1]), Preprocessing(48))[0]
    torch.testing.assert_close(from_file.images[0], by_pil, rtol=0, atol=0)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_padding_is_flagged(dataset, processes):
    dataset.augmentation_seed = None
    seen, padding = [], 0
    for rank in range(processes):
        sampler = EvaluationSampler(dataset, processes, rank)
        for batch in DataLoader(dataset, 3, sampler=sampler, collate_fn=keep):
            assert batch.images.dtype == torch.float32
            assert batch.labels.dtype == batch.indices.dtype == torch.int64
            assert torch.equal(batch.indices < 0, batch.labels < 0)
            padding += int((batch.indices == PADDING).sum())
            assert not batch.images[batch.indices == PADDING].any()
            seen += batch.indices[batch.indices >= 0].tolist()
    assert sorted(seen) == list(range(COUNT))
    assert padding == -COUNT % processes


def test_a_batch_may_be_padding_alone(dataset):
    batch = dataset.__getitems__([PADDING, PADDING])
    assert batch.images.shape == (2, 3, *[dataset.preprocessing.image_size] * 2)
    assert batch.labels.tolist() == batch.indices.tolist() == [-1, -1]


def test_open_clips_training_transform():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 42, 3), np.uint8))
    torch.manual_seed(0)
    first = Preprocessing(16).transform(training=True)(picture)
    second = Preprocessing(16).transform(training=True)(picture)
    assert first.shape == (3, 16, 16)
    assert not torch.equal(first, second)
    evaluation = Preprocessing(16).transform()
    assert torch.equal(evaluation(picture), evaluation(picture))
