"""f0 and J τ of every image: exact, computed once, kept on disk, and never trusted blindly."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader

import lit_merge.models.linear_features
from lit_merge import LinearizedModel
from lit_merge.data.images.datasets import FileImages, TensorImages
from lit_merge.data.sampling import EvaluationSampler
from lit_merge.errors import ConfigurationError, DataError, StructureMismatchError
from lit_merge.files.store import LazyTensors, verify
from lit_merge.functional import linearize
from lit_merge.models import Preprocessing
from lit_merge.models.linear_features import LinearFeatureCache, LinearFeatures
from lit_merge.vectors import TaskVector

COUNT, BATCH = 10, 4
PREPROCESSING = Preprocessing(image_size=4)


@dataclass(frozen=True)
class Exact(Preprocessing):
    """Images in float64."""

    def normalise(self, images):
        return super().normalise(images).double()


def unchanged(batch):
    return batch


def make_images(preprocessing=PREPROCESSING, **changed):
    generator = torch.Generator().manual_seed(0)
    settings = {
        "images": torch.randint(256, (COUNT, 3, 4, 4), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(3, (COUNT,), generator=generator),
        "names": [str(index) for index in range(COUNT)],
        "preprocessing": preprocessing,
    }
    return TensorImages(**{**settings, **changed})


def make_loader(images=None, batch_size=BATCH, sampler=None):
    images = make_images() if images is None else images
    sampler = EvaluationSampler(images) if sampler is None else sampler
    return DataLoader(images, batch_size, sampler=sampler, collate_fn=unchanged)


def make_vectors(network):
    generator = torch.Generator().manual_seed(1)
    shapes = dict(network.named_parameters())
    return {
        name: {key: torch.randn(value.shape, generator=generator).to(value) for key, value in shapes.items()}
        for name in "abc"
    }


def total(vectors, coefficients):
    names = next(iter(vectors.values()))
    return {name: sum(factor * vectors[key][name] for key, factor in coefficients.items()) for name in names}


@pytest.fixture
def network(tiny_encoder):
    return tiny_encoder()


@pytest.fixture
def vectors(network):
    return make_vectors(network)


@pytest.fixture
def counted(monkeypatch):
    """What has been done: ``passes`` through the network, each of so many ``images``."""
    counts = Counter()

    def counting(network, parameters, tangents, images):
        counts.update(passes=1, images=len(images))
        return linearize(network, parameters, tangents, images)

    monkeypatch.setattr(lit_merge.models.linear_features, "linearize", counting)
    return counts


def assert_same(first, second):
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.labels, second.labels)
    assert list(first.tangents) == list(second.tangents)
    assert all(torch.equal(first.tangents[name], second.tangents[name]) for name in first.tangents)


# What they are


def test_any_coefficients_agree_with_torch_in_float64(tiny_encoder, tmp_path):
    network, images = tiny_encoder(dtype=torch.float64), make_images(Exact(image_size=4))
    vectors = make_vectors(network)
    found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader(images))
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    inputs = images.read(torch.arange(COUNT).numpy(), None)
    for coefficients in ({}, {"b": 0.7}, {"a": -1.3, "c": 2.0}, {"a": 0.1, "b": 0.2, "c": 0.3}):
        direction = total(vectors, {**dict.fromkeys(vectors, 0.0), **coefficients})
        value, tangent = jvp(lambda theta: functional_call(network, theta, (inputs,)), (parameters,), (direction,))
        features = found.features(coefficients)
        assert features.dtype == torch.float64
        torch.testing.assert_close(features, value + tangent, rtol=1e-12, atol=1e-12)
        linear = LinearizedModel(network)
        linear.load_task_vector(direction)
        torch.testing.assert_close(features, linear(inputs), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, images.labels)


def test_one_direction_is_the_linearized_model_to_the_last_bit(network, vectors, tmp_path):
    cache = LinearFeatureCache(network, vectors, tmp_path)
    found = cache.of(make_loader())
    for name, vector in vectors.items():
        linear = LinearizedModel(network)
        linear.load_task_vector(vector)
        start = 0
        for batch in make_loader():
            with torch.no_grad():
                value, tangent = linear.forward_parts(batch.images)
                output = linear(batch.images)
            rows = slice(start, start + len(output))
            start += len(output)
            assert torch.equal(found.value[rows], value)
            assert torch.equal(found.tangents[name][rows], tangent)
            assert torch.equal(found.features({name: 1.0})[rows], output)
        assert start == len(found) == COUNT


def test_features_in_batches(network, vectors, tmp_path):
    found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    parts = list(found.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.labels for part in parts]), found.labels)
    whole = found.features({"a": 0.5, "b": 2.0})
    assert torch.equal(torch.cat([part.features({"a": 0.5, "b": 2.0}) for part in parts]), whole)
    assert parts[1].value.data_ptr() == found.value[4:].data_ptr()
    assert_same(parts[0].to(torch.device("cpu")), parts[0])
    moved = parts[0].to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.value, moved.labels, *moved.tangents.values())} == {"meta"}


def test_coefficients_can_be_learned(network, vectors, tmp_path):
    found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    coefficients = {name: torch.tensor(0.3, requires_grad=True) for name in vectors}
    weight = torch.randn(found.value.shape)
    (found.features(coefficients) * weight).sum().backward()
    for name, coefficient in coefficients.items():
        assert float(coefficient.grad) == pytest.approx(float((found.tangents[name] * weight).sum()), rel=1e-4)
    before = found.value.clone()
    found.features({}).add_(1)
    assert torch.equal(found.value, before)


def test_padding_is_left_out(network, vectors, tmp_path):
    expected = LinearFeatureCache(network, vectors, tmp_path / "a").of(make_loader())
    padded = make_loader(sampler=[*range(COUNT), *[-1] * 6])
    found = LinearFeatureCache(network, vectors, tmp_path / "b").of(padded)
    assert_same(found, expected)


# Computed once


def test_what_is_kept_needs_neither_network_nor_images(network, vectors, tmp_path, counted, monkeypatch):
    first = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    assert counted == {"passes": 3 * 3, "images": 3 * COUNT}
    monkeypatch.setattr(TensorImages, "read", lambda *_: pytest.fail("an image was read"))
    monkeypatch.setattr(type(network), "forward", lambda *_: pytest.fail("the network ran"))
    again = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    assert_same(again, first)
    # Neither names nor batches are what a direction is.
    renamed = LinearFeatureCache(network, {"x": vectors["b"]}, tmp_path).of(make_loader(batch_size=3))
    assert torch.equal(renamed.tangents["x"], first.tangents["b"])
    assert len(list(tmp_path.iterdir())) == 4


def test_another_direction_costs_its_own_pass(network, vectors, tmp_path, counted):
    cache = LinearFeatureCache(network, vectors, tmp_path)
    first = cache.of(make_loader(), ["a"])
    assert list(first.tangents) == ["a"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    counted.clear()
    both = cache.of(make_loader(), ["c", "a"])
    assert counted == {"passes": 3, "images": COUNT}
    assert list(both.tangents) == ["c", "a"]
    assert torch.equal(both.value, first.value)
    assert torch.equal(both.tangents["a"], first.tangents["a"])
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.stat().st_mtime_ns == files[path] for path in files)  # not written again


def test_one_content_is_computed_once(network, vectors, tmp_path, counted):
    twice = {"a": vectors["a"], "same": TaskVector({name: value.clone() for name, value in vectors["a"].items()}, "x")}
    found = LinearFeatureCache(network, twice, tmp_path).of(make_loader())
    assert counted["images"] == COUNT
    assert torch.equal(found.tangents["a"], found.tangents["same"])


def test_f0_alone(network, tmp_path, counted):
    found = LinearFeatureCache(network, {}, tmp_path).of(make_loader())
    with torch.no_grad():
        expected = torch.cat([network(batch.images) for batch in make_loader()])
    torch.testing.assert_close(found.features({}), expected)
    assert counted["images"] == COUNT
    assert_same(LinearFeatureCache(network, {}, tmp_path).of(make_loader()), found)
    assert counted["images"] == COUNT


def test_the_cache_is_the_users(network, vectors, own_cache):
    LinearFeatureCache(network, vectors).of(make_loader())
    assert len(list((own_cache / "linear_features").iterdir())) == 4


# What makes a difference


class Scaled(nn.Module):
    """An encoder with a buffer and plain settings."""

    def __init__(self, encoder, activation=torch.tanh, power=1, shift=0.0):
        super().__init__()
        self.encoder, self.activation, self.power = encoder, activation, power
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, images):
        return self.activation(self.encoder(images)) ** self.power + self.shift


def with_pixel():
    images = make_images()
    images.images[3, 1, 2, 0] ^= 1
    return images


def with_label():
    images = make_images()
    images.labels[3] = (images.labels[3] + 1) % 3
    return images


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_images(images=with_pixel().images),
        lambda: make_images(labels=with_label().labels),
        lambda: make_images(replace(PREPROCESSING, mean=(0.4, 0.5, 0.5))),
        lambda: make_images(images=make_images().images[:9], labels=make_images().labels[:9]),
    ],
    ids=["pixel", "label", "preprocessing", "count"],
)
def test_other_images_are_others(other, network, vectors, tmp_path, counted):
    LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    counted.clear()
    found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader(other()))
    assert counted["images"] == 3 * len(other())
    assert_same(found, LinearFeatureCache(network, vectors, tmp_path / "new").of(make_loader(other())))


@pytest.mark.parametrize(
    "other",
    [{"shift": 1.0}, {"power": 2}, {"activation": torch.sigmoid}, {"activation": nn.ReLU()}],
    ids=["buffer", "setting", "function", "module"],
)
def test_another_network_is_another(other, tiny_encoder, tmp_path, counted):
    first, second = Scaled(tiny_encoder()), Scaled(tiny_encoder(), **other)
    vectors = make_vectors(first)
    LinearFeatureCache(first, vectors, tmp_path).of(make_loader())
    counted.clear()
    LinearFeatureCache(Scaled(tiny_encoder()).eval(), vectors, tmp_path).of(make_loader())
    assert not counted
    found = LinearFeatureCache(second, vectors, tmp_path).of(make_loader())
    assert counted["images"] == 3 * COUNT
    assert_same(found, LinearFeatureCache(second, vectors, tmp_path / "new").of(make_loader()))


def test_another_base_is_another(network, vectors, tmp_path, counted):
    before = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    counted.clear()
    with torch.no_grad():
        network.inner.weight[0, 0] += 0.5
    found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    assert counted["images"] == 3 * COUNT
    assert not torch.equal(found.value, before.value)


def test_another_vector_is_another(network, vectors, tmp_path, counted):
    LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    counted.clear()
    changed = {**vectors, "b": {**vectors["b"], "outer.bias": vectors["b"]["outer.bias"] + 1e-3}}
    found = LinearFeatureCache(network, changed, tmp_path).of(make_loader())
    assert counted["images"] == COUNT
    assert_same(found, LinearFeatureCache(network, changed, tmp_path / "new").of(make_loader()))


def test_another_precision_is_another(network, vectors, tmp_path, counted):
    full = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    counted.clear()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            half = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
        assert counted["images"] == 3 * COUNT
        assert half.value.dtype == half.features({"a": 0.5}).dtype == torch.bfloat16
    torch.testing.assert_close(half.value.float(), full.value, rtol=0.05, atol=0.05)
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    finally:
        torch.set_float32_matmul_precision(previous)
    assert counted["images"] == 6 * COUNT


def test_digests_of_images_in_memory():
    digest = make_images().digest()
    assert digest == make_images(names=["x"] * COUNT).digest()
    assert len(digest) == 64
    pixels = make_images().images
    others = [
        with_pixel(),
        with_label(),
        make_images(images=pixels.reshape(COUNT, 3, 2, 8)),
        make_images(replace(PREPROCESSING, interpolation="bilinear")),
        make_images(augmentation_seed=0),
        make_images(augmentation_seed=1),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 7
    strided = pixels.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)  # the same pixels, elsewhere
    assert make_images(images=strided).digest() == digest


def test_digests_of_files(tmp_path, monkeypatch):
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (6, 6), (index, 0, 0)).save(paths[-1])
        os.utime(paths[-1], ns=(10, 10))
    labels = torch.tensor([0, 1, 0])

    def digest(paths=paths, labels=labels, preprocessing=PREPROCESSING, **settings):
        return FileImages(paths, labels, preprocessing, **settings).digest()

    first = digest()
    monkeypatch.chdir(tmp_path)
    assert digest([Path(path.name) for path in paths]) == first
    found = [
        first,
        digest(paths[::-1]),
        digest(labels=torch.tensor([0, 1, 1])),
        digest(preprocessing=replace(PREPROCESSING, resize_mode="squash")),
        digest(augmentation_seed=0),
    ]
    os.utime(paths[1], ns=(10, 11))
    found.append(digest())
    with paths[1].open("ab") as file:
        file.write(b"\0")
    os.utime(paths[1], ns=(10, 10))
    found.append(digest())
    assert len(set(found)) == 7


def test_images_in_files_are_kept_as_well(network, vectors, tmp_path, counted):
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (6, 6), (80 * index, 0, 0)).save(paths[-1])
    images = FileImages(paths, torch.tensor([0, 1, 2]), PREPROCESSING)
    first = LinearFeatureCache(network, vectors, tmp_path / "cache").of(make_loader(images))
    assert_same(LinearFeatureCache(network, vectors, tmp_path / "cache").of(make_loader(images)), first)
    assert counted["images"] == 3 * 3
    Image.new("RGB", (6, 6), (0, 250, 0)).save(paths[1])
    os.utime(paths[1], ns=(10, 10))
    found = LinearFeatureCache(network, vectors, tmp_path / "cache").of(make_loader(images))
    assert counted["images"] == 2 * 3 * 3
    assert torch.equal(found.value[0], first.value[0])
    assert not torch.equal(found.value[1], first.value[1])


# On disk


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def emptied(path):
    path.write_bytes(b"")


def nonsense(path):
    path.write_bytes(b"nonsense" * 100)


def replaced_by_another(path):
    other = next(file for file in sorted(path.parent.iterdir()) if file != path and keeps_f0(file) == keeps_f0(path))
    shutil.copy(other, path)


def gone(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def keeps_f0(path):
    return "labels" in LazyTensors(path)


@pytest.mark.parametrize("part", ["f0", "tangent"])
@pytest.mark.parametrize("damage", [flipped, truncated, emptied, nonsense, replaced_by_another, gone])
def test_damaged_files_are_computed_again(damage, part, network, vectors, tmp_path, counted):
    first = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    own = sorted(tmp_path.iterdir())
    LinearFeatureCache(network, vectors, tmp_path).of(make_loader(with_pixel()))  # files to be mistaken for these
    path = next(path for path in own if keeps_f0(path) == (part == "f0"))
    content = path.read_bytes()
    damage(path)
    counted.clear()
    assert_same(LinearFeatureCache(network, vectors, tmp_path).of(make_loader()), first)
    assert counted["images"] == COUNT * (3 if part == "f0" else 1)
    assert path.read_bytes() == content
    counted.clear()
    assert_same(LinearFeatureCache(network, vectors, tmp_path).of(make_loader()), first)
    assert not counted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_features_are_mapped(network, vectors, tmp_path):
    for origin in (f"{tmp_path}/", str(tmp_path)):  # of what is computed: a file without a name; of what is kept
        found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
        for tensor in (found.value, *found.tangents.values()):
            assert mapped_file(tensor).startswith(origin)
    files = {mapped_file(tensor) for tensor in (found.value, *found.tangents.values())}
    assert files == {str(path) for path in tmp_path.iterdir()}


def mapped_file(tensor):
    """The file that a tensor's memory is a map of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5]
    return ""


def test_another_process_may_write_the_same_meanwhile(network, vectors, tmp_path, monkeypatch):
    expected = LinearFeatureCache(network, vectors, tmp_path / "alone").of(make_loader())
    read, others = TensorImages.read, []

    def disturbed(self, indices, seeds):
        monkeypatch.undo()
        others.append(LinearFeatureCache(network, vectors, tmp_path / "shared").of(make_loader()))
        return read(self, indices, seeds)

    monkeypatch.setattr(TensorImages, "read", disturbed)
    found = LinearFeatureCache(network, vectors, tmp_path / "shared").of(make_loader())
    assert_same(found, expected)
    assert_same(*others, expected)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == alone
    for path in (tmp_path / "shared").iterdir():
        verify(path)


def test_what_was_read_stays_when_the_file_is_written_again(network, vectors, tmp_path):
    LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    found = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    before = found.features(dict.fromkeys(vectors, 0.5))
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(found.features(dict.fromkeys(vectors, 0.5)), before)
    found.value.zero_()  # a copy of its own
    again = LinearFeatureCache(network, vectors, tmp_path).of(make_loader())
    assert torch.equal(again.features(dict.fromkeys(vectors, 0.5)), before)


def test_a_pass_that_fails_leaves_nothing(network, vectors, tmp_path, monkeypatch):
    read, reads = TensorImages.read, []

    def failing(self, indices, seeds):
        reads.append(indices)
        if len(reads) == 2:
            raise DataError("images: damaged")
        return read(self, indices, seeds)

    monkeypatch.setattr(TensorImages, "read", failing)
    cache = LinearFeatureCache(network, vectors, tmp_path)
    with pytest.raises(DataError, match="images: damaged"):
        cache.of(make_loader())
    assert not list(tmp_path.iterdir())
    assert len(cache.of(make_loader())) == COUNT


# What is refused


def test_images_that_cannot_be_kept_are_refused(network, vectors, tmp_path, tiny_batches):
    cache = LinearFeatureCache(network, vectors, tmp_path)
    batches = tiny_batches(1)
    others = DataLoader(batches, batch_size=None, collate_fn=unchanged)
    none = make_images(images=torch.zeros(0, 3, 4, 4, dtype=torch.uint8), labels=torch.zeros(0, dtype=torch.int64))
    for loader, error, part in (
        (others, ConfigurationError, "expected a data set with a digest(), got list"),
        (make_loader(make_images(augmentation_seed=0)), ConfigurationError, "got augmented images"),
        (
            make_loader(sampler=[*range(1, COUNT), 0]),
            DataError,
            "expected those from 0 on in the split's order, got 1",
        ),
        (make_loader(sampler=[0, 0, *range(1, COUNT)]), DataError, "got 0, 0, 1 and 1 more"),
        (make_loader(sampler=range(COUNT - 1)), DataError, "expected all 10 of the split and at least one, got 9"),
        (make_loader(sampler=range(0, COUNT, 2)), DataError, "expected those from 0 on"),
        (make_loader(none), DataError, "expected all 0 of the split and at least one, got 0"),
    ):
        with pytest.raises(error) as refusal:
            cache.of(loader)
        assert part in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_refused(network, vectors, tmp_path):
    cache = LinearFeatureCache(network, vectors, tmp_path)
    with pytest.raises(ConfigurationError, match="directions: expected names among a, b, c, got d"):
        cache.of(make_loader(), ["a", "d"])
    with pytest.raises(ConfigurationError, match="coefficients: expected names among a, got b"):
        cache.of(make_loader(), ["a"]).features({"a": 1.0, "b": 1.0})
    with pytest.raises(ConfigurationError, match="expected names among none, got b"):
        LinearFeatures(torch.zeros(1, 2), {}, torch.zeros(1)).features({"b": 1.0})


def test_directions_of_another_architecture_are_refused(network, vectors, tmp_path):
    with pytest.raises(StructureMismatchError, match="direction a: expected the same 4 parameters, got 1 unexpected"):
        LinearFeatureCache(network, {"a": {**vectors["a"], "another": torch.ones(1)}}, tmp_path)


def test_a_direction_is_zero_where_it_lacks_a_parameter(network, vectors, tmp_path):
    partial = {name: value for name, value in vectors["a"].items() if name != "outer.bias"}
    whole = {**partial, "outer.bias": torch.zeros_like(vectors["a"]["outer.bias"])}
    found = LinearFeatureCache(network, {"partial": partial, "whole": whole}, tmp_path).of(make_loader())
    assert found.tangents["whole"].abs().max() > 0
    assert torch.equal(found.tangents["partial"], found.tangents["whole"])
