"""Own images in folders: layouts, deterministic splits, and every refusal."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_merge.data.fractions import counts_of
from lit_merge.data.images.folders import FolderSource, find_images
from lit_merge.data.images.reading import IMAGE_SUFFIXES, read_image
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.models import Preprocessing

SPLITS = ("train", "val", "test")
SMALL = Preprocessing(8)
SUFFIXES = "png, jpg, jpeg, jpe, jfif, jp2, bmp, webp, tif, tiff, gif, ppm, pgm, pbm, pnm"


def write_image(path, colour=(10, 200, 30), size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def make_classes(root, count=10, folders=("big_cat", "dog")):
    for folder in folders:
        for index in range(count):
            write_image(root / folder / f"{index}.png", (index, 0, 0))
    return root


def names_of(source, split):
    dataset = source.split(split, SMALL)
    return [str(Path(name).relative_to(source.path)) for name in dataset.names]


def refusal(function, *arguments, kind=DataError):
    with pytest.raises(kind) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# Layouts


def test_one_folder_per_class_is_divided(tmp_path):
    source = FolderSource(make_classes(tmp_path / "pets", 20))
    assert source.name == "pets"
    assert source.classes == ("big cat", "dog")
    assert source.templates == ("a photo of a {}.",)
    parts = {split: names_of(source, split) for split in SPLITS}
    assert {split: len(names) for split, names in parts.items()} == {"train": 32, "val": 4, "test": 4}
    assert len({name for names in parts.values() for name in names}) == 40
    for split in SPLITS:
        labels = source.split(split, SMALL).labels
        assert labels.dtype == torch.int64
        assert Counter(labels.tolist()) == {0: len(labels) // 2, 1: len(labels) // 2}  # class by class
        assert [name.startswith("dog") for name in parts[split]] == labels.bool().tolist()
    again = FolderSource(tmp_path / "pets")
    assert {split: names_of(again, split) for split in SPLITS} == parts
    other = FolderSource(tmp_path / "pets", seed=1)
    assert names_of(other, "test") != parts["test"]


def test_the_division_does_not_depend_on_where_the_folder_lies(tmp_path):
    here, there = FolderSource(make_classes(tmp_path / "a")), FolderSource(make_classes(tmp_path / "b" / "c"))
    assert names_of(here, "val") == names_of(there, "val")
    for folder in ("big_cat", "dog"):  # restated: a release must not move images from split to split
        files = [f"{folder}/{index}.png" for index in range(10)]
        ordered = sorted(files, key=lambda file: hashlib.sha256(f"0/{file}".encode()).hexdigest())
        for split, expected in (("train", ordered[:8]), ("val", ordered[8:9]), ("test", ordered[9:])):
            assert [name for name in names_of(here, split) if name.startswith(folder)] == expected


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (4, (0.8, 0.1, 0.1), [2, 1, 1]),
        (100, (0.8, 0.1, 0.1), [80, 10, 10]),
        (4, (0.02, 0.49, 0.49), [1, 1, 2]),
        (5, (0.5, 0.5, 0), [2, 3, 0]),
        (5, (1, 0, 0), [5, 0, 0]),
        (2, (0.99, 0, 0.01), [1, 0, 1]),
    ],
)
def test_how_many_go_where(count, fractions, expected):
    assert counts_of(count, fractions) == expected


def test_splits_made_beforehand(tmp_path):
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        make_classes(tmp_path / split, count)
    source = FolderSource(tmp_path, class_names={"dog": "hound"}, templates="mnist")
    assert source.classes == ("big cat", "hound")
    assert source.templates == ('a photo of the number: "{}".',)
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        assert len(source.split(split, SMALL)) == 2 * count
        assert all(name.startswith(f"{split}{os.sep}") for name in names_of(source, split))


def test_validation_images_are_taken_from_train(tmp_path):
    make_classes(tmp_path / "train", 9)
    make_classes(tmp_path / "test", 1)
    source = FolderSource(tmp_path)
    assert {split: len(source.split(split, SMALL)) for split in SPLITS} == {"train": 16, "val": 2, "test": 2}
    assert not set(names_of(source, "train")) & set(names_of(source, "val"))
    without = FolderSource(tmp_path, fractions=(0.9, 0, 0.1))
    assert {split: len(without.split(split, SMALL)) for split in SPLITS} == {"train": 18, "val": 0, "test": 2}


def test_a_class_may_be_called_train(tmp_path):
    source = FolderSource(make_classes(tmp_path, 3, ("bus", "train")))
    assert source.classes == ("bus", "train")


def test_what_counts_as_an_image(tmp_path):
    for index, suffix in enumerate(IMAGE_SUFFIXES):
        write_image(tmp_path / "kinds" / f"{index}{suffix.upper() if index % 2 else suffix}")
    make_classes(tmp_path, 3, ("deep/below/it", "other"))
    make_classes(tmp_path, 3, (".hidden", "other/.hidden"))
    write_image(tmp_path / "other" / "._mac.png")
    (tmp_path / "other" / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path, fractions=(1, 0, 0))
    assert source.classes == ("deep", "kinds", "other")
    counted = Counter(source.split("train", SMALL).labels.tolist())
    assert counted == {0: 3, 1: len(IMAGE_SUFFIXES), 2: 3}
    batch = source.split("train", SMALL).__getitems__(list(range(len(IMAGE_SUFFIXES) + 6)))
    assert batch.images.shape == (len(IMAGE_SUFFIXES) + 6, 3, 8, 8)


def test_photographs_that_pil_cannot_read_are_not_passed_over(tmp_path):
    make_classes(tmp_path, 3)
    path = tmp_path / "dog" / "photo.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))
    message = refusal(FolderSource(tmp_path, fractions=(1, 0, 0)).split, "train", SMALL)
    assert message.startswith(f"{path}: expected a readable image, got ")


def test_links_are_followed_and_circles_are_left(tmp_path):
    make_classes(tmp_path / "elsewhere", 4)
    root = tmp_path / "task"
    root.mkdir()
    for folder in ("big_cat", "dog"):
        (root / folder).symlink_to(tmp_path / "elsewhere" / folder, target_is_directory=True)
    (tmp_path / "elsewhere" / "dog" / "back").symlink_to(tmp_path / "elsewhere" / "dog", target_is_directory=True)
    source = FolderSource(root)
    assert sum(len(source.split(split, SMALL)) for split in SPLITS) == 8


# Reading


def test_images_are_rgb_and_upright(tmp_path):
    picture = Image.new("RGB", (4, 2), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (2, 4)
    for mode in ("L", "1", "P", "RGBA", "LA"):
        Image.new("RGB", (4, 2), (250, 250, 250)).convert(mode).save(tmp_path / "x.png")
        image = read_image(tmp_path / "x.png")
        assert image.mode == "RGB"
        assert np.asarray(image).min() > 240
    Image.new("CMYK", (4, 2)).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").mode == "RGB"
    frames = [Image.new("RGB", (4, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


DEEP = np.array([[0, 255, 256, 40_000, 65_280, 65_535]], np.uint16)
EIGHT = [0, 0, 1, 156, 255, 255]


def write_16_bit_colours(path):
    """A PNG of 16 bits per channel, which PIL reads but does not write."""
    pixels = np.repeat(DEEP[..., None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", DEEP.shape[1], DEEP.shape[0], 16, 2, 0, 0, 0)
    for kind, chunk in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["I;16 png", "I;16 tiff", "I;16B tiff", "I tiff", "I pgm", "colours"])
def test_of_16_bits_the_upper_8_are_read(kind, tmp_path):
    """In grey as in colours, where PIL itself does so."""
    make_classes(tmp_path, 3)
    path = tmp_path / "dog" / f"deep.{kind.split()[-1].replace('colours', 'png').replace('pgm', 'ppm')}"
    if kind == "colours":
        write_16_bit_colours(path)
    elif kind == "I pgm":
        path.write_bytes(b"P5 6 1 65535\n" + DEEP.astype(">u2").tobytes())
    elif kind == "I;16B tiff":
        Image.frombytes("I;16B", (6, 1), DEEP.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(DEEP.astype(np.int32) if kind == "I tiff" else DEEP).save(path)
    with Image.open(path) as image:
        assert image.mode == {"colours": "RGB", "I": "I"}.get(kind.split()[0], image.mode)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image).tolist() == [[[value] * 3 for value in EIGHT]]
    images = FolderSource(tmp_path, fractions=(1, 0, 0), skip_corrupt=True).split("train", SMALL)
    assert len(images) == 7


def test_of_floats_1_is_white(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array([[0, 0.5, 0.1, 1]], np.float32)).save(path)
    assert np.asarray(read_image(path))[0, :, 1].tolist() == [0, 128, 26, 255]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (np.array([[0, 255.0]], np.float32), "values from 0 to 255 in mode F, whose white is 1"),
        (np.array([[0, np.nan]], np.float32), "values from nan to nan in mode F"),
        (np.array([[-1, 3]], np.int32), "values from -1 to 3 in mode I, whose white is 65535"),
        (np.array([[0, 65_536]], np.int32), "values from 0 to 65536 in mode I"),
    ],
    ids=str,
)
def test_images_that_8_bits_do_not_hold_are_no_damaged_ones(values, got, tmp_path):
    make_classes(tmp_path, 3)
    path = tmp_path / "dog" / "odd.tiff"
    Image.fromarray(values).save(path)
    images = FolderSource(tmp_path, fractions=(1, 0, 0)).split("train", SMALL)
    message = refusal(images.picture, images.names.index(str(path)))
    assert message.startswith(f"{path}: expected a readable image, got {got}")
    assert message.endswith("Replace or remove it, or set skip_corrupt to true.")
    assert "damaged" not in message
    with pytest.warns(UserWarning, match="left out 1 image that cannot be read: .*odd.tiff"):
        images = FolderSource(tmp_path, fractions=(1, 0, 0), skip_corrupt=True).split("train", SMALL)
    assert len(images) == 6


# Refusals


def test_a_missing_path_a_file_and_no_classes(tmp_path):
    assert refusal(FolderSource(tmp_path / "none").split, "train", SMALL) == (
        f"{tmp_path / 'none'}: expected the folder of a task, got no such path. Check the path."
    )
    file = write_image(tmp_path / "file.png")
    assert "expected the folder of a task, got a file." in refusal(FolderSource(file).split, "train", SMALL)
    empty = f"{tmp_path}: expected a folder for each of two or more classes, got none. Check the path."
    assert refusal(lambda: FolderSource(tmp_path).classes) == empty
    make_classes(tmp_path, 3, ("cat",))
    assert "two or more classes, got cat." in refusal(lambda: FolderSource(tmp_path).classes)


def test_splits_without_classes(tmp_path):
    for split in SPLITS:
        write_image(tmp_path / split / "0.png")
    assert "two or more classes, got test, train, val." in refusal(lambda: FolderSource(tmp_path).classes)


def test_an_empty_class(tmp_path):
    make_classes(tmp_path, 3)
    (tmp_path / "emu").mkdir()
    assert refusal(FolderSource(tmp_path).split, "train", SMALL) == (
        f"{tmp_path / 'emu'}: expected images ({SUFFIXES}), got none. Add some, or remove the folder."
    )


def test_too_few_images(tmp_path):
    make_classes(tmp_path, 2)
    assert refusal(FolderSource(tmp_path).split, "train", SMALL) == (
        f"{tmp_path}: expected at least 3 images of each class, one for each of train, val, test, got 2 of big_cat. "
        "Add some, or remove the class."
    )
    assert len(FolderSource(tmp_path, fractions=(0.5, 0, 0.5)).split("train", SMALL)) == 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks(tmp_path, split):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / split, 1, ("dog", "emu"))
    assert refusal(FolderSource(tmp_path).split, "train", SMALL) == (
        f"{tmp_path / split}: expected only classes that {tmp_path / 'train'} has, got emu. "
        "Add them there, or remove them here."
    )


def test_no_test_images(tmp_path):
    make_classes(tmp_path / "pets" / "train", 3)
    source = FolderSource(tmp_path / "pets")
    assert len(source.split("train", SMALL)) == 4
    folder = tmp_path / "pets" / "test"
    assert refusal(source.split, "test", SMALL) == (
        f"pets: expected test images, got no folder {folder}. Add some, or do not ask for a test."
    )
    make_classes(tmp_path / "cars", 3)
    source = FolderSource(tmp_path / "cars", fractions=(0.9, 0.1, 0))
    assert "expected test images, got 0 as the third of fractions." in refusal(source.split, "test", SMALL)


def test_a_split_with_another_name(tmp_path):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / "validation", 3)
    assert refusal(FolderSource(tmp_path).split, "train", SMALL) == (
        f"{tmp_path}: expected folders named train, val and test, got validation. Rename validation to val."
    )


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (("Training", "Testing"), "got Testing, Training. Rename Testing to test, Training to train."),
        (("Train", "Test"), "got Test, Train. Rename Test to test, Train to train."),
        (("training", "validation"), "got training, validation. Rename training to train, validation to val."),
        (("training_set", "test_set"), "got test_set, training_set. Rename test_set to test, training_set to train."),
        (("train", "TEST"), "got TEST. Rename TEST to test."),
        (("Train", "val", "test"), "got Train. Rename Train to train."),
    ],
)
def test_splits_with_other_names_are_no_classes(tmp_path, folders, advice):
    for folder in folders:
        make_classes(tmp_path / folder, 3)
    make_classes(tmp_path, 3, ("masks",))
    assert refusal(lambda: FolderSource(tmp_path).classes) == (
        f"{tmp_path}: expected folders named train, val and test, {advice}"
    )


def test_what_is_beside_whole_splits_is_left_alone(tmp_path):
    for split in (*SPLITS, "test_images"):
        make_classes(tmp_path / split, 3)
    assert FolderSource(tmp_path).classes == ("big cat", "dog")


def test_classes_may_be_called_like_splits(tmp_path):
    make_classes(tmp_path, 3, ("Training", "Testing"))
    assert FolderSource(tmp_path).classes == ("Testing", "Training")
    make_classes(tmp_path / "deep", 3, ("Train/express", "Train/goods", "Test/written"))
    assert FolderSource(tmp_path / "deep").classes == ("Test", "Train")


def test_class_names(tmp_path):
    make_classes(tmp_path, 3, ("big_cat", "big cat", "dog"))
    assert "got 'big cat' for big cat and big_cat. Set class_names." in refusal(lambda: FolderSource(tmp_path).classes)
    source = FolderSource(tmp_path, {"big_cat": "lion"})
    assert source.classes == ("big cat", "lion", "dog")
    message = refusal(lambda: FolderSource(tmp_path, {"bigcat": "lion"}).classes, kind=ConfigurationError)
    assert message == (f"class_names: expected folders of {tmp_path}, got bigcat. Use some of big cat, big_cat, dog.")


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_impossible_fractions(tmp_path, fractions):
    message = refusal(lambda: FolderSource(tmp_path, fractions=fractions), kind=ConfigurationError)
    assert message.startswith("fractions: expected those of train, val and test, with sum 1")
    assert str(list(fractions)) in message


# Damage


@pytest.fixture
def damaged(tmp_path):
    """Three images that are no images, and one that ends early."""
    make_classes(tmp_path, 6)
    for index in range(3):
        (tmp_path / "dog" / f"bad{index}.png").write_bytes(b"no image")
    truncate(tmp_path / "dog" / "half.jpg")
    return tmp_path


def truncate(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_damaged_headers_are_named_at_the_start(damaged):
    source = FolderSource(damaged, fractions=(1, 0, 0))
    message = refusal(source.split, "train", SMALL)
    assert message == (
        f"{damaged / 'dog' / 'bad0.png'}: expected a readable image, got an unknown or damaged header. "
        "Replace or remove it, or set skip_corrupt to true. There are 2 more."
    )
    assert refusal(source.split, "train", SMALL) == message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_when_it_is_read(tmp_path, workers):
    make_classes(tmp_path, 3)
    path = truncate(tmp_path / "dog" / "half.jpg")
    dataset = FolderSource(tmp_path, fractions=(1, 0, 0)).split("train", SMALL)
    with pytest.raises(DataError) as error:
        list(DataLoader(dataset, 4, collate_fn=list, num_workers=workers))
    last = str(error.value).strip().splitlines()[-1]  # a worker's traceback comes before it
    assert f"{path}: expected a readable image, got image file is truncated" in last
    assert last.endswith("Replace or remove it, or set skip_corrupt to true.")


def test_damaged_images_are_left_out(damaged):
    source = FolderSource(damaged, fractions=(1, 0, 0), skip_corrupt=True)
    with pytest.warns(UserWarning, match=r"left out 4 images that cannot be read: (.*bad\d.png){3} and 1 more"):
        dataset = source.split("train", SMALL)
    assert len(dataset) == 12
    assert dataset.__getitems__(list(range(12))).images.shape == (12, 3, 8, 8)


def test_a_class_of_damaged_images_only(tmp_path):
    make_classes(tmp_path, 3, ("cat",))
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 1 image that cannot be read: "):
        message = refusal(FolderSource(tmp_path, skip_corrupt=True).split, "train", SMALL)
    assert message.startswith(f"{tmp_path / 'dog'}: expected images (png,")
    assert "got none that can be read." in message


def test_a_broken_link_is_a_damaged_image(tmp_path):
    make_classes(tmp_path, 3)
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refusal(FolderSource(tmp_path, fractions=(1, 0, 0)).split, "train", SMALL)
    assert f"{tmp_path / 'dog' / 'gone.png'}: expected a readable image, got [Errno 2]" in message


# Images without labels


def test_find_images(damaged):
    assert find_images(damaged / "dog" / "0.png") == [damaged / "dog" / "0.png"]
    assert len(find_images(damaged / "big_cat")) == 6
    write_image(damaged / "big_cat" / "a" / "b" / "deep.png")
    found = find_images(damaged / "big_cat")
    assert found == sorted(found)
    assert damaged / "big_cat" / "a" / "b" / "deep.png" in found
    assert "There are 2 more." in refusal(find_images, damaged)
    with pytest.warns(UserWarning, match="left out 4"):
        assert len(find_images(damaged, skip_corrupt=True)) == 13
    (damaged / "empty").mkdir()
    assert refusal(find_images, damaged / "empty") == (
        f"{damaged / 'empty'}: expected images ({SUFFIXES}), got none. Set predict_path to an image or a folder."
    )
    assert "got nothing at" in refusal(find_images, damaged / "none")
