"""Corrupted images: what each corruption does, and tasks whose images are corrupted."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lit_merge.data import CORRUPTIONS, CorruptedTask, MultiTaskDataModule, TensorExamples, corrupt
from lit_merge.data.images.folders import FolderSource
from lit_merge.data.sources import Task
from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing

pytestmark = pytest.mark.usefixtures("few_images")


def picture(side: int = 96) -> torch.Tensor:
    rows, columns = np.mgrid[0:side, 0:side]
    waves = np.stack([128 + 100 * np.sin(rows / 7), 128 + 100 * np.cos(columns / 5), 255 * rows / side])
    return torch.from_numpy(waves.astype(np.uint8))


def grey(side: int) -> torch.Tensor:
    return torch.full((3, side, side), 128, dtype=torch.uint8)


def change(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left.double() - right.double()).abs().mean().item()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 96])
def test_a_function_of_image_and_seed_that_grows_with_severity(name, side):
    image = picture(side)
    before = image.clone()
    mild, severe = corrupt(image, name, 1), corrupt(image, name, 5)
    assert torch.equal(image, before)
    assert (mild.dtype, mild.shape) == (torch.uint8, image.shape)
    assert change(mild, image) > 0
    if name != "spatter":  # whose mud is another thing than water
        assert change(mild, image) < change(severe, image)
    assert torch.equal(mild, corrupt(image, name, 1))
    random = name in ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")
    assert torch.equal(mild, corrupt(image, name, 1, seed=1)) != random


@pytest.mark.parametrize(
    ("side", "severity", "deviation"), [(96, 1, 0.08), (96, 3, 0.18), (48, 1, 0.04), (48, 5, 0.10)]
)
def test_gaussian_noise_has_the_published_deviation(side, severity, deviation):
    noise = corrupt(grey(side), "gaussian_noise", severity).double() / 255 - 128 / 255
    assert noise.std().item() == pytest.approx(deviation, rel=0.04)


@pytest.mark.parametrize(("side", "amount"), [(96, 0.27), (48, 0.07)])
def test_impulses_are_black_or_white_equally_often(side, amount):
    found = corrupt(grey(side), "impulse_noise", 5)
    black, white = ((found == value).double().mean().item() for value in (0, 255))
    assert black == pytest.approx(amount / 2, rel=0.25)
    assert white == pytest.approx(amount / 2, rel=0.25)
    assert ((found == 128) | (found == 0) | (found == 255)).all()


@pytest.mark.parametrize(("side", "factor"), [(96, 0.05), (32, 0.15)])
def test_contrast_shrinks_to_every_channel_s_mean(side, factor):
    image = picture(side)
    values = image.double() / 255
    mean = values.mean((1, 2), keepdim=True)
    expected = torch.floor(255 * (mean + factor * (values - mean)).clamp(0, 1) + 1e-3)
    assert (corrupt(image, "contrast", 5).double() - expected).abs().max() <= 1


@pytest.mark.parametrize(("side", "quality"), [(96, 7), (32, 40)])
def test_jpeg_is_what_the_format_leaves(side, quality):
    stream = io.BytesIO()
    Image.fromarray(picture(side).permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=quality)
    assert np.array_equal(np.asarray(Image.open(stream)), corrupt(picture(side), "jpeg", 5).permute(1, 2, 0).numpy())


def test_pixels_become_blocks():
    found = corrupt(picture(96), "pixelate", 5)  # a quarter of the side
    blocks = found.reshape(3, 24, 4, 24, 4)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    expected = picture(96).double().reshape(3, 24, 4, 24, 4).mean((2, 4))
    assert (blocks[:, :, 0, :, 0].double() - expected).abs().max() <= 1


def test_motion_is_a_line_and_keeps_the_brightness():
    point = torch.zeros(3, 97, 97, dtype=torch.uint8)
    point[:, 48, 48] = 255
    found = corrupt(point, "motion_blur", 2)[0]
    rows, columns = found.nonzero(as_tuple=True)
    assert 4 <= len(rows) <= 2 * 17
    direction = np.linalg.svd(np.stack([rows - 48, columns - 48]).astype(float), compute_uv=False)
    assert direction[1] < 0.25 * direction[0]
    assert change(corrupt(grey(96), "motion_blur", 5), grey(96)) <= 1


def test_water_lightens_and_mud_covers():
    water, mud = corrupt(grey(96), "spatter", 3).int(), corrupt(grey(96), "spatter", 5).int()
    assert (water >= 128).all()
    assert 0.02 < (water > 128).double().mean() < 0.9
    changed = (mud != 128).any(0)
    assert 0.02 < changed.double().mean() < 0.9
    colour = torch.tensor([63, 42, 20]).view(3, 1, 1)
    assert (mud - colour <= 0.2 * (128 - colour) + 2)[:, changed].all()  # a drop covers at least four fifths
    assert (mud <= 128).all()


def test_a_task_of_corrupted_test_images(tmp_path):
    task = CorruptedTask("digits", "contrast", 4)
    whole = task.source
    assert (task.name, task.classes, task.templates) == (whole.name, whole.classes, whole.templates)
    size = Preprocessing(32)
    assert torch.equal(task.split("train", size).images, whole.split("train", size).images)
    clean, found = whole.split("test", size), task.split("test", size)
    assert torch.equal(found.labels, clean.labels)
    assert found.names == clean.names
    for place in (0, 3):
        assert torch.equal(found.images[place], corrupt(clean.images[place], "contrast", 4, place))
    data = MultiTaskDataModule(sources={"faded": task}, preprocessing=size)
    data.setup("test")
    (batch,) = list(data.test_dataloader()[0])
    assert torch.equal(batch.images[1], size.normalise(found.images[1:2])[0])


def test_pictures_in_files_are_corrupted_when_they_are_read(tmp_path):
    for split in ("train", "val", "test"):
        for number, colour in enumerate(("red", "blue")):
            folder = tmp_path / split / colour
            folder.mkdir(parents=True)
            Image.fromarray(picture(500).roll(number, 0).permute(1, 2, 0).numpy()).save(folder / "one.png")
    task = CorruptedTask(FolderSource(tmp_path), "gaussian_noise", 2, seed=5)
    found = task.split("test", Preprocessing(64))
    assert found.picture(1).size == (224, 224)
    assert list(found.picture(1).getdata()) == list(found.subset([1]).picture(0).getdata())
    found.labels = torch.full_like(found.labels, -1)
    assert found.subset([1]).labels.tolist() == [-1]  # what is hidden stays hidden
    clean = task.source.split("test", Preprocessing(64))
    small = torch.from_numpy(np.array(clean.picture(1).resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    expected = corrupt(small, "gaussian_noise", 2, 6)
    assert np.array_equal(np.asarray(found.picture(1)), expected.permute(1, 2, 0).numpy())
    assert found.digest() != clean.digest()
    assert type(task.split("train", Preprocessing(64))) is type(clean)


class Numbers(Task):
    name, classes = "numbers", ("a", "b")

    def split(self, split, preprocessing, augmentation_seed=None):
        return TensorExamples((torch.zeros(2, 3),), torch.tensor([0, 1]))


def test_refusals():
    with pytest.raises(
        ConfigurationError, match=r"corruption: expected one of motion_blur, .*, got 'fog'. Choose one."
    ):
        CorruptedTask("digits", "fog")
    with pytest.raises(ConfigurationError, match=r"severity: expected one of 1, 2, 3, 4, 5, got 6. Choose one."):
        CorruptedTask("digits", "jpeg", 6)
    with pytest.raises(
        ConfigurationError, match=r"splits: expected a list of train, val, test, got tests. Correct it."
    ):
        CorruptedTask("digits", "jpeg", splits=["tests"])
    with pytest.raises(ConfigurationError, match=r"numbers: expected a task of images to corrupt, got TensorExamples."):
        CorruptedTask(Numbers(), "jpeg").split("test", None)
