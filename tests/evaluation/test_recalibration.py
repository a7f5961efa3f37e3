"""Running statistics measured again, against sums written plainly in float64."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lit_merge.data import MultiTaskDataModule, Task, TensorExamples
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.evaluation.recalibration import Recalibration, recalibrate
from lit_merge.models import ClipNetwork, ModuleNetwork


class Tiny(nn.Module):
    """Two normalised convolutions, dropout between them, and a normalised linear layer; float64 if asked for."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5, momentum=0.3)
        self.linear, self.bn3 = nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False)

    def forward(self, images):
        hidden = self.drop(torch.relu(self.bn1(self.conv1(images))))
        return self.bn3(self.linear(self.bn2(self.conv2(hidden)).mean((2, 3))))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    module = Tiny().double().train()
    module.bn2.eval()
    for norm in (module.bn1, module.bn2, module.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 2)
    return module


def images(count, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plainly(module, batches):
    """Per layer the mean over batches of each batch's mean and unbiased variance."""

    def normalised(name, values, norm):
        flat = values.transpose(0, 1).flatten(1)
        mean, variance = flat.mean(1), ((flat - flat.mean(1, keepdim=True)) ** 2).sum(1)
        sums.setdefault(name, []).append((mean, variance / (flat.shape[1] - 1)))
        shape = (1, -1) + (1,) * (values.ndim - 2)
        biased = (variance / flat.shape[1]).view(shape)
        unit = (values - mean.view(shape)) / torch.sqrt(biased + norm.eps)
        return unit if norm.weight is None else unit * norm.weight.view(shape) + norm.bias.view(shape)

    sums = {}
    with torch.no_grad():
        for batch in batches:
            hidden = torch.relu(normalised("bn1", module.conv1(batch), module.bn1))
            hidden = normalised("bn2", module.conv2(hidden), module.bn2).mean((2, 3))
            normalised("bn3", module.linear(hidden), module.bn3)
    return {
        f"{name}.{leaf}": torch.stack([pair[place] for pair in pairs]).mean(0)
        for name, pairs in sums.items()
        for place, leaf in enumerate(("running_mean", "running_var"))
    }


def test_statistics_are_the_means_over_batches(tiny):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    modes = {name: part.training for name, part in tiny.named_modules()}
    buffers = dict(tiny.named_buffers())
    batches = [images(8), images(5, 2), images(7, 3)]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    found = recalibrate(tiny, batches)
    assert torch.equal(torch.get_rng_state(), state)  # no dropout
    expected = plainly(tiny, batches)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert {name: part.training for name, part in tiny.named_modules()} == modes
    assert tiny.bn2.momentum == 0.3
    assert all(buffers[name] is value for name, value in tiny.named_buffers())
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())


def test_what_comes_out_is_centred_and_of_variance_one(tiny):
    batch = images(200)
    tiny.load_state_dict(recalibrate(tiny, [(batch, torch.zeros(200))]), strict=False)
    with torch.no_grad():
        outputs = tiny.eval()(batch)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(6).double(), rtol=0, atol=2e-3)
    # nearly: what is stored is the unbiased variance, what the layers above have seen was divided by the biased one
    torch.testing.assert_close(outputs.var(0), torch.ones(6).double(), rtol=2e-2, atol=0)


def test_a_narrow_module_is_measured_in_float32(tiny):
    found = recalibrate(tiny.to(torch.bfloat16), [images(16).float()])
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert tiny.conv1.weight.dtype == tiny.bn1.running_mean.dtype == torch.bfloat16
    expected = plainly(tiny.double(), [images(16).float().double()])
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)


def test_what_has_no_running_statistics_or_others(tiny):
    assert recalibrate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), []) == {}
    other = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2, track_running_stats=True))
    with pytest.raises(ConfigurationError, match=r"got 1.running_mean, 1.running_var of another kind. Leave"):
        recalibrate(other, [torch.ones(3, 2)])
    with pytest.raises(ConfigurationError, match="expected at least two values per channel in every batch, got one"):
        recalibrate(tiny, [images(1)])
    assert tiny.bn1.momentum == 0.1
    with pytest.raises(DataError, match="expected at least one image"):
        recalibrate(tiny, [])


# A network, with images of several tasks


class Noise(Task):
    """Images of another mean in each task."""

    classes, templates = ("a", "b"), ("{}",)

    def __init__(self, mean, side=6, count=20):
        self.name, self.mean, self.side, self.count = "", mean, side, count

    def split(self, split, preprocessing, augmentation_seed=None):
        generator = torch.Generator().manual_seed(len(split))
        inputs = self.mean + torch.randn(self.count, 3, self.side, self.side, generator=generator)
        return TensorExamples([inputs], torch.zeros(self.count, dtype=torch.int64))


def tasks(**settings):
    return MultiTaskDataModule(sources={"a": Noise(-1.0, **settings), "b": Noise(2.0, **settings)}, batch_size=4)


def test_batches_hold_every_task_and_each_image_once():
    network = ModuleNetwork(nn.Linear(1, 1), preprocessing=object())
    batches = list(Recalibration(images=21, batch_size=4).batches(network, ["a", "b"], tasks()))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 5]
    means = [[one.mean() > 0.5 for one in batch.inputs[0]] for batch in batches]
    assert [sum(of_b).item() for of_b in means] == [2] * 5
    assert all(sorted(batch.indices.tolist()) for batch in batches)
    drawn = [
        {
            int(index)
            for batch, of_b in zip(batches, means, strict=True)
            for index, own in zip(batch.indices, of_b, strict=True)
            if bool(own) == wanted
        }
        for wanted in (False, True)
    ]
    assert [len(own) for own in drawn] == [11, 10]
    (few,) = Recalibration(images=2, batch_size=8, split="val", tasks=["b"]).batches(network, ["a"], tasks())
    assert len(few) == 2
    for setting, message in (
        ({"images": 1}, "recalibrate.images: expected a whole number of at least 2"),
        ({"batch_size": 1}, "recalibrate.batch_size: expected a whole number of at least 2"),
        ({"split": "test"}, "recalibrate.split"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Recalibration(**setting)
    with pytest.raises(ConfigurationError, match=r"got none of c \(data: a, b\). Give data of them, or set"):
        list(Recalibration().batches(network, ["a", "c"], tasks()))


def test_a_residual_image_tower_under_other_weights(tmp_path):
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = ClipNetwork(str(tmp_path / "tiny.json"), "random")
    tower = network.module
    assert network.activation == ""
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    weights = {f"visual.{name}": 1.3 * value.detach() for name, value in tower.named_parameters()}
    found = Recalibration(images=12, batch_size=6).of(network, weights, ["a", "b"], tasks(side=32, count=6))
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    names = [f"visual.{name}" for name, _ in tower.named_buffers() if not name.endswith("num_batches_tracked")]
    assert list(found) == names
    batches = list(Recalibration(images=12, batch_size=6).batches(network, ["a", "b"], tasks(side=32, count=6)))
    with torch.no_grad():
        inputs = [
            nn.functional.conv2d(
                b.images if hasattr(b, "images") else b.inputs[0], weights["visual.conv1.weight"], stride=2, padding=1
            )
            for b in batches
        ]
    mean = torch.stack([one.mean((0, 2, 3)) for one in inputs]).mean(0)
    torch.testing.assert_close(found["visual.bn1.running_mean"], mean, rtol=1e-5, atol=1e-6)
    plain = ModuleNetwork(nn.Linear(1, 1))
    assert Recalibration().of(plain, {}, ["a"]) == {}
