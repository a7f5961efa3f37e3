"""Collecting statistics of a task, their files, the transforms that read them, and the command."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from lit_merge import LinearizedModel
from lit_merge.commands.main import main
from lit_merge.data import TaskDataModule
from lit_merge.data.batch import ImageBatch
from lit_merge.errors import (
    ConfigurationError,
    DataError,
    FileFormatError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.evaluation.statistics import collect_fisher, collect_gradients, collect_gram
from lit_merge.evaluation.statistics.command import statistics
from lit_merge.models import load_clip
from lit_merge.transforms import ESM, Mean, Override, Scale, Transform, TrustRegion, WithOverrides, chain
from lit_merge.transforms.weighted import FisherMean, RegMean
from lit_merge.vectors import LazyTensors, TaskVector, TaskVectors, file_digest
from lit_merge.vectors.statistics import open_statistics, write_statistics

BASE = "0123456789abcdef"
TASKS = ("digits", "letters")
SHAPES = {"block.0.weight": (4, 3), "block.0.bias": (4,), "scalar": (), "empty": (0, 3)}


def refused(error_class, *parts):
    """``with refused(error, "part", …)``: one line with these parts."""
    ahead = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(error_class, match=rf"^{ahead}[^\n]*$")


# Collecting


class Ways(nn.Module):
    """A weight in every way that is found, and some that are not; inputs ``[B, 4]`` -> logits ``[B, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.rows = nn.Parameter(torch.randn(4, 4))
        self.columns = nn.Parameter(torch.randn(4, 3))
        self.unused = nn.Parameter(torch.randn(2, 2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        inputs = torch.tanh(self.layer(inputs))
        inputs = self.dropout(torch.matmul(inputs, self.rows.t()))
        return F.linear(inputs, self.rows) @ self.columns


@pytest.fixture
def ways():
    torch.manual_seed(0)
    return Ways()


@pytest.fixture
def inputs():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def test_nothing_about_the_modules_changes(ways, inputs) -> None:
    head = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    ways.layer.requires_grad_(False)
    ways.dropout.eval()
    before = {name: value.clone() for name, value in ways.state_dict().items()}
    flags = [part.training for part in (*ways.modules(), *head.modules())]
    first = [collect_fisher(ways, [inputs], head), collect_gram(ways, [inputs])]
    second = [collect_fisher(ways, [inputs], head), collect_gram(ways, [inputs])]
    for one, other in zip(first, second, strict=True):  # dropout is off
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [part.training for part in (*ways.modules(), *head.modules())] == flags
    assert [name for name, value in ways.named_parameters() if not value.requires_grad] == [
        "layer.weight",
        "layer.bias",
    ]
    assert all(value.grad is None for value in (*ways.parameters(), *head.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in ways.state_dict().items())


def test_modules_are_as_before_after_a_failure(ways, inputs) -> None:
    ways.layer.requires_grad_(False)
    for collect in (collect_fisher, collect_gram):
        with pytest.raises(RuntimeError):
            collect(ways, [inputs[:, :3]])
        assert ways.training
        assert not ways.layer.weight.requires_grad
    collect_gram(ways, [inputs])  # the mode is off again


def test_frozen_parameters_have_fisher_information_and_unused_ones_zero(ways, inputs) -> None:
    free = collect_fisher(ways, [inputs])
    ways.requires_grad_(False)
    frozen = collect_fisher(ways, [inputs])
    assert list(free) == [name for name, _ in ways.named_parameters()]
    assert all(torch.equal(free[name], frozen[name]) for name in free)
    assert not free["unused"].any()
    assert all((free[name] > 0).any() for name in free if name != "unused")


def test_padding_does_not_count_and_batches_may_have_any_form(ways, inputs) -> None:
    padded = ImageBatch(
        torch.cat([inputs[:4], torch.zeros(2, 4)]),
        torch.tensor([0, 1, 2, 0, -1, -1]),
        torch.tensor([3, 1, 2, 0, -1, -1]),
    )
    nothing = ImageBatch(torch.zeros(2, 4), torch.full((2,), -1), torch.full((2,), -1))
    forms = [
        [padded, nothing],
        [(inputs[:3], torch.tensor([0, 1, 2])), (inputs[3:4], torch.tensor([0]))],
        [inputs[:4]],
    ]
    for collect in (collect_fisher, collect_gram):
        first, *others = [collect(ways, form) for form in forms]
        for other in others:
            for name in first:
                torch.testing.assert_close(other[name], first[name], rtol=1e-5, atol=1e-9)
    true = [collect_fisher(ways, form, labels="true") for form in forms[:2]]
    torch.testing.assert_close(true[0], true[1])


def test_sampled_labels_depend_on_the_seed_alone(ways, inputs) -> None:
    ways.columns.data.mul_(0.1)  # a model in doubt
    one, two, other = (
        collect_fisher(ways, form, labels="sampled", seed=seed)
        for form, seed in (([inputs], 0), (inputs.split(4), 0), ([inputs], 1))
    )
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one["layer.weight"], other["layer.weight"])


def test_sampled_labels_average_to_the_expectation(ways, inputs) -> None:
    same = inputs[:1].expand(600, 4)
    ways.columns.data.mul_(0.1)
    exact, sampled = collect_fisher(ways, [same[:1]]), collect_fisher(ways, [same], labels="sampled")
    torch.testing.assert_close(sampled["columns"], exact["columns"], rtol=0.15, atol=1e-5)


def test_half_precision_is_squared_in_float32() -> None:
    layer = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    images = torch.full((1, 2), 1e-12, dtype=torch.bfloat16)
    fisher = collect_fisher(layer, [images])["weight"]
    assert fisher.dtype == collect_gram(layer, [images])["weight"].dtype == torch.float32
    torch.testing.assert_close(fisher, torch.full((2, 2), 0.25e-24), rtol=0.05, atol=0)


def test_fisher_of_a_linearised_model_is_that_of_its_tangent() -> None:
    torch.manual_seed(0)
    linear, images = nn.Linear(4, 3), torch.randn(5, 4)
    head = nn.Linear(3, 3)
    expected = collect_fisher(linear, [images], head)
    torch.testing.assert_close(collect_fisher(LinearizedModel(linear), [images], head), expected)
    with refused(ConfigurationError, "linear layers on parameters of its own, got LinearizedModel", "neither linear"):
        collect_gram(LinearizedModel(linear), [images])


def test_gradients_are_means_of_magnitudes_of_single_examples(ways, inputs) -> None:
    labels = torch.arange(6) % 3
    ways.eval()
    found = collect_gradients(ways, [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])])
    assert set(found) == {name for name, _ in ways.named_parameters()}
    for name, parameter in ways.named_parameters():
        singles = []
        for image, label in zip(inputs, labels, strict=True):
            loss = F.cross_entropy(ways(image[None]), label[None])
            gradient = torch.autograd.grad(loss, parameter, allow_unused=True)[0]
            singles.append(torch.zeros_like(parameter) if gradient is None else gradient.abs())
        torch.testing.assert_close(found[name], sum(singles) / 6)
    squares = collect_fisher(ways, [inputs])
    unlabelled = collect_gradients(ways, [inputs], labels="expected")
    assert all((unlabelled[name] ** 2 <= squares[name] + 1e-7).all() for name in squares)  # Jensen's inequality


def test_a_gram_matrix_is_a_mean_over_rows(ways, inputs) -> None:
    grams = collect_gram(ways, [inputs])
    assert set(grams) == {"layer.weight", "rows", "columns.T"}
    hidden = torch.tanh(ways.layer(inputs)).detach()
    after = hidden @ ways.rows.detach().t()
    torch.testing.assert_close(grams["layer.weight"], inputs.T @ inputs / 6)
    torch.testing.assert_close(grams["rows"], (hidden.T @ hidden + after.T @ after) / 12)  # used twice
    last = after @ ways.rows.detach().t()
    torch.testing.assert_close(grams["columns.T"], last.T @ last / 6)
    torch.testing.assert_close(collect_gram(ways, [inputs.repeat(3, 1)]), grams)


def test_layers_that_add_their_bias_within_the_product_are_found() -> None:
    from transformers.pytorch_utils import Conv1D  # GPT-2's, which uses torch.addmm

    layer, tokens = Conv1D(5, 4).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    rows = tokens.flatten(0, 1)
    torch.testing.assert_close(collect_gram(layer, [tokens]), {"weight.T": rows.T @ rows / 6})


class Cross(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64, **settings)

    def forward(self, tokens):
        keys = tokens[..., : self.attention.kdim]
        return self.attention(tokens, keys, keys.clone())


def test_attention_with_separate_weights_or_different_inputs() -> None:
    tokens = torch.randn(5, 3, 4, dtype=torch.float64)
    rows = tokens.reshape(-1, 4)
    separate = Cross(kdim=2, vdim=2)
    grams = collect_gram(separate, [tokens])
    assert set(grams) == {
        f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    }
    torch.testing.assert_close(grams["attention.q_proj_weight"], rows.T @ rows / 15)
    torch.testing.assert_close(grams["attention.v_proj_weight"], rows[:, :2].T @ rows[:, :2] / 15)
    packed = collect_gram(Cross(), [tokens])
    assert set(packed) == {"attention.out_proj.weight"}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_gives_what_it_gives_elsewhere(need_weights, masked) -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=masked, add_zero_attn=need_weights, dtype=torch.float64).eval()
    tokens = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1) if masked else None
    results = []

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, tokens):
            results.append(attention(tokens, tokens, tokens, attn_mask=mask, need_weights=need_weights))

    collect_gram(Calling(), [tokens])
    Calling()(tokens)
    torch.testing.assert_close(results[0], results[1])


def test_a_transformer_layer_in_evaluation_mode_is_seen_through() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval()
    grams = collect_gram(layer, [torch.randn(2, 3, 4)])
    kinds = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert {name: len(gram) for name, gram in grams.items()} == dict(zip(kinds, (4, 4, 4, 6), strict=True))


def test_convolutions_are_linear_layers_on_patches() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2)
    images = torch.randn(4, 2, 7, 7)
    with refused(ConfigurationError, "with linear layers"):
        collect_gram(convolution, [images])
    gram = collect_gram(convolution, [images], convolutions=True)["weight"]
    patches = F.unfold(images, 3, 2, 1, 2).mT.reshape(-1, 18)
    torch.testing.assert_close(gram, patches.T @ patches / len(patches))
    with refused(ConfigurationError, "number of zeros, got 'same'"):
        collect_gram(nn.Conv2d(2, 3, 3, padding="same"), [images], convolutions=True)


def test_what_cannot_be_collected_is_refused(ways, inputs) -> None:
    with refused(ConfigurationError, "labels: expected expected or sampled or true, got 'none'"):
        collect_fisher(ways, [inputs], labels="none")
    for batches in ([], [torch.zeros(0, 4)]):
        for collect in (collect_fisher, collect_gram):
            with refused(DataError, "at least one image, got none"):
                collect(ways, batches)
    with refused(DataError, "one of the 3 classes for every image, got -1"):
        collect_fisher(ways, [inputs], labels="true")
    with refused(DataError, "got 3"):
        collect_fisher(ways, [(inputs, torch.full((6,), 3))], labels="true")
    with refused(ConfigurationError, "images and labels, got dict"):
        collect_gram(ways, [{"digits": inputs}])
    with refused(ConfigurationError, r"logits \[1, C\] of one image, got \[1, 2, 2\]"):
        collect_fisher(ways, [inputs], _Reshape())
    with refused(ConfigurationError, "logits .* got tuple"):
        collect_fisher(nn.GRU(4, 3), [inputs])
    with refused(ConfigurationError, "module with parameters, got Identity"):
        collect_gram(nn.Identity(), [inputs])
    for collect in (collect_fisher, collect_gram):
        with refused(NonFiniteError, "layer.weight"):
            collect(ways, [inputs * torch.inf])


class _Reshape(nn.Module):
    def forward(self, features):
        return features[:, :1, None].expand(-1, 2, 2)


# Files and transforms


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for task in TASKS:
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        rows.append(TaskVector(tensors, task, metadata={"base_fingerprint": BASE}))
    return TaskVectors(rows)


@pytest.fixture
def write(tmp_path):
    """``write(kind, replaced={}, task=…)``: files of all tasks, those of letters with other tensors or header."""

    def call(kind, replaced=None, without=(), header_kind=None, **header):
        generator = torch.Generator().manual_seed(1)
        paths = {}
        for task in TASKS:
            tensors = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
            if kind == "gram":
                rows = torch.randn(9, 3, generator=generator)
                tensors = {"block.0.weight": rows.T @ rows / 9}
            own = {"task": task, "base_fingerprint": BASE}
            if task == "letters":
                tensors = {
                    name: value for name, value in {**tensors, **(replaced or {})}.items() if name not in without
                }
                own |= header
            paths[task] = str(tmp_path / f"{task}-{kind}.safetensors")
            write_statistics(paths[task], header_kind or kind, tensors, **own)
        return paths

    return call


KINDS = pytest.mark.parametrize(("kind", "transform"), [("fisher", FisherMean), ("gram", RegMean)])


@KINDS
def test_transforms_print_compare_hash_pickle_and_go_into_yaml(kind, transform, write, vectors) -> None:
    paths = write(kind)
    settings = (
        {"coefficients": {"digits": 1.0, "letters": 2.0}, "floor": 0.25} if kind == "fisher" else {"off_diagonal": 0.5}
    )
    for one in (transform(paths), transform(paths, **settings)):
        rebuilt = eval(repr(one), {transform.__name__: transform})
        for other in (rebuilt, pickle.loads(pickle.dumps(one))):
            assert other == one
            assert hash(other) == hash(one)
        config = yaml.safe_load(yaml.safe_dump(one.to_config()))
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--transform", type=Transform)
        assert parser.instantiate_classes(parser.parse_object({"transform": config})).transform == one
        result = one(vectors)
        copied = pickle.loads(pickle.dumps(result))
        assert result.tasks == ("digits+letters",)
        assert result.provenance[-1] == repr(one)
        for name in SHAPES:
            assert torch.equal(copied[name], result[name])
    assert transform(paths) != transform(paths, **settings)
    with pytest.raises(TypeError, match="cannot be changed"):
        one.statistics["digits"] = "other"


@KINDS
def test_pieces_are_the_stack_and_the_input_stays(kind, transform, write, vectors) -> None:
    before = {name: vectors[name] for name in vectors}
    result = transform(write(kind))(vectors)
    for name, shape in SHAPES.items():
        assert result.shape(name) == result[name].shape == (1, *shape)
        assert result[name].dtype == torch.float32
        pieces = torch.cat([piece for _, piece in result.chunks(name, 5)], 1)
        torch.testing.assert_close(pieces.reshape(1, *shape), result[name], rtol=0, atol=0)
        assert torch.equal(vectors[name], before[name])


@KINDS
def test_one_vector_stays_as_it_is_and_the_order_does_not_matter(kind, transform, write, vectors) -> None:
    paths = write(kind)
    single, turned = vectors.select(["digits"]), vectors.select(["letters", "digits"])
    alone = transform({"digits": paths["digits"]})(single)
    for name in SHAPES:
        assert torch.equal(alone[name], single[name])
        torch.testing.assert_close(transform(paths)(turned)[name], transform(paths)(vectors)[name])


@KINDS
def test_parts_of_the_parameters_and_chains(kind, transform, write, vectors) -> None:
    paths = write(kind)
    whole = chain(Scale(2.0), transform(paths))(vectors)
    plain = transform(paths, normalise=None) if kind == "fisher" else transform(paths)
    parts = WithOverrides(Mean(), [Override(plain, names="weight")])(vectors)
    for name in SHAPES:
        torch.testing.assert_close(whole[name], 2 * transform(paths)(vectors)[name])
        expected = (plain if "weight" in name else Mean())(vectors)[name]
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=0)


def test_the_scale_of_a_fisher_is_a_statistic(write, vectors) -> None:
    paths = write("fisher")
    result = FisherMean(paths)(vectors)
    assert [statistic.what for statistic in result.statistics] == ["FisherMean: scale of each task"]
    before = {name: result[name] for name in SHAPES}
    loud = {name: 1e-20 * tensor for name, tensor in LazyTensors(paths["letters"]).items()}
    again = FisherMean(write("fisher", loud))(vectors)  # each is measured by its own scale
    for name in SHAPES:
        torch.testing.assert_close(again[name], before[name])


def test_settings_out_of_range_are_refused(write, vectors) -> None:
    paths = write("fisher")
    for settings, part in (
        ({"floor": -1.0}, "FisherMean.floor: expected a finite number at least 0"),
        ({"normalise": "max"}, "FisherMean.normalise: expected norm or mean, got 'max'"),
        ({"coefficients": (1.0, -1.0)}, "FisherMean.coefficients.1.: expected a finite number at least 0"),
    ):
        with refused(ConfigurationError, part):
            FisherMean(paths, **settings)
    with refused(ConfigurationError, r"RegMean.off_diagonal: expected .* at most 1, got 1.5"):
        RegMean(paths, 1.5)
    for files, part in (
        ({}, r"files, got \{\}"),
        ("a.safetensors", "got 'a.safetensors'"),
        ({"digits": 3}, "'digits', 3"),
    ):
        for transform in (FisherMean, RegMean):
            with refused(ConfigurationError, f"{transform.__name__}.statistics: expected", part):
                transform(files)
    with refused(ConfigurationError, "FisherMean.coefficients: expected one per task .2"):
        FisherMean(paths, (1.0,))(vectors)


@KINDS
def test_files_that_do_not_fit_the_tasks_are_refused(kind, transform, write, vectors, tmp_path) -> None:
    paths = write(kind)
    with refused(
        ConfigurationError, f"{transform.__name__}.statistics", "tasks digits, letters, got nothing for 'letters'"
    ):
        transform({"digits": paths["digits"]})(vectors)
    with refused(ConfigurationError, "got nothing for 'letters' and unknown 'leters'"):
        transform({"digits": paths["digits"], "leters": paths["letters"]})(vectors)
    twice = TaskVectors([vectors.vector(0), vectors.vector(0)])
    with refused(ConfigurationError, "different tasks, got 'digits' more than once"):
        transform(paths)(twice)
    with refused(StructureMismatchError, "task 'digits', got those of 'letters'"):
        transform({"digits": paths["letters"], "letters": paths["letters"]})(vectors)
    with refused(StructureMismatchError, f"fingerprint {BASE}", "got fingerprint f00"):
        transform(write(kind, base_fingerprint="f00"))(vectors)
    transform(write(kind, base_fingerprint=""))(vectors)  # not known to be another
    other = {"fisher": "gram", "gram": "fisher"}[kind]
    with refused(FileFormatError, f"expected format lit-merge/{kind}/1, got lit-merge/{other}/1", f"--kind {kind}"):
        transform(write(kind, header_kind=other))(vectors)
    paths = write(kind)
    with refused(FileFormatError, "expected a safetensors file, got No such file"):
        transform({**paths, "letters": str(tmp_path / "none.safetensors")})(vectors)
    content = bytearray(Path(paths["letters"]).read_bytes())
    content[-3] ^= 1
    Path(paths["letters"]).write_bytes(content)
    with refused(FileFormatError, "the file has changed since it was written"):
        transform(paths)(vectors)


def test_tensors_that_do_not_fit_the_parameters_are_refused(write, vectors) -> None:
    with refused(StructureMismatchError, "letters-fisher", r"nothing for 1 \(scalar\)"):
        FisherMean(write("fisher", without=["scalar"]))(vectors)
    with refused(StructureMismatchError, r"shape \(4, 3\) for block.0.weight, got \(3, 4\)"):
        FisherMean(write("fisher", {"block.0.weight": torch.ones(3, 4)}))(vectors)
    square = torch.eye(3)
    for replaced, header, parts in (
        ({"block.0.weight": torch.eye(4)}, {}, [r"shape \(3, 3\) for block.0.weight, got \(4, 4\)"]),
        ({"stranger": square}, {"base_fingerprint": ""}, ["those of the vectors' parameters, got others .stranger."]),
        ({"block.0.bias": square}, {}, ["the same as in .*digits-gram.safetensors, got others .block.0.bias."]),
    ):
        with refused(StructureMismatchError, *parts):
            RegMean(write("gram", replaced, **header))(vectors)
    for key in ("block.0.bias", "block.0.weight.T"):
        paths = write("gram")
        for task, path in paths.items():
            write_statistics(path, "gram", {**LazyTensors(path), key: square}, task, BASE)
        with refused(StructureMismatchError, "one Gram matrix for a weight of at least two dimensions, got", key):
            RegMean(paths)(vectors)


@pytest.mark.parametrize("transform", [RegMean, ESM])
def test_gram_matrices_of_a_whole_network_merge_vectors_of_a_part_of_it(transform, write, vectors) -> None:
    of_part = transform(write("gram"))(vectors)
    expected = {name: of_part[name] for name in SHAPES}
    found = transform(write("gram", {"elsewhere.weight": torch.eye(5)}))(vectors)
    for name in SHAPES:
        assert torch.equal(found[name], expected[name])
    without = TaskVectors(
        [
            TaskVector({n: row[n] for n in SHAPES if n != "block.0.weight"}, row.task, metadata=row.metadata)
            for row in map(vectors.vector, TASKS)
        ]
    )
    assert torch.equal(transform(write("gram"))(without)["block.0.bias"], expected["block.0.bias"])


def test_files_are_finite_and_know_what_they_are(write, vectors, tmp_path) -> None:
    with refused(NonFiniteError, "gram of 'letters': expected finite values, got NaN or infinity in block.0.weight"):
        write("gram", {"block.0.weight": torch.full((3, 3), torch.nan)})
    paths = write("fisher")
    opened = open_statistics("fisher", paths, vectors, "statistics")
    assert [file.metadata["task"] for file in opened] == list(TASKS)
    header = {"format": "lit-merge/fisher/1", "task": "digits", "base_fingerprint": BASE}
    assert opened[0].metadata == header


# The command


@pytest.fixture(scope="module")
def clip(clip_config, clip_weights):
    return load_clip(clip_config, clip_weights)


@pytest.fixture
def model(clip_config, clip_weights):
    return {"model": clip_config, "pretrained": clip_weights}


@pytest.fixture
def vector(clip, tmp_path):
    """``vector(task)``: the file of a random vector of the tiny CLIP."""

    def save(task, size=0.02):
        generator = torch.Generator().manual_seed(len(task))
        tensors = {
            name: torch.randn(value.shape, generator=generator) * size for name, value in clip.visual.named_parameters()
        }
        path = tmp_path / f"{task or 'nameless'}.safetensors"
        TaskVector(tensors, task, metadata={"base_fingerprint": clip.fingerprint, "base_model": clip.name}).save(path)
        return str(path)

    return save


def tuned(clip_config, clip_weights, path):
    tower = load_clip(clip_config, clip_weights).visual
    return TaskVector.load(path).apply_to(tower) if path else tower


def drawn(model, split="train", seed=0, count=5):
    """The images and labels that the command is to take, augmented by nothing."""
    data = TaskDataModule(task="digits", augment=False, preprocessing=load_clip(**model).preprocessing)
    data.setup({"train": "fit", "val": "validate", "test": "test"}[split])
    images = data.datasets[split]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    batch = images.__getitems__(order.tolist())
    return batch.images, batch.labels


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_the_command_writes_what_python_collects(kind, vector, model, clip, tmp_path, capsys) -> None:
    source = vector("digits")
    options = ["--model", model["model"], "--pretrained", model["pretrained"], "--images", "5"]
    assert main(["statistics", "--kind", kind, "--task_vector", source, *options]) == 0
    path = tmp_path / f"digits-{kind}.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    stored = LazyTensors(path, verify=True)
    tower, (images, _) = tuned(model["model"], model["pretrained"], source), drawn(model)
    if kind == "fisher":
        task = TaskDataModule(task="digits")
        module = load_clip(**model)
        from lit_merge.models import build_head

        expected = collect_fisher(tower, [images], build_head(module, list(task.classes), list(task.templates)))
    else:
        expected = collect_gram(tower, [images])
    assert set(stored) == set(expected)
    for name in expected:
        torch.testing.assert_close(stored[name], expected[name], rtol=1e-4, atol=1e-7)
    header = stored.metadata
    versions, inputs = json.loads(header.pop("versions")), json.loads(header.pop("inputs"))
    assert set(versions) == {"lit_merge", "torch"}
    assert inputs == {"file": "digits.safetensors", "sha256": file_digest(source)}
    assert header == {
        "format": f"lit-merge/{kind}/1",
        "task": "digits",
        "base_fingerprint": clip.fingerprint,
        "base_model": "tiny-clip",
        "activation": "gelu",
        "images": "5",
        "split": "train",
        "labels": "expected" if kind == "fisher" else "none",
        "labels_read": "false",
        "seed": "0",
    }
    first = path.read_bytes()
    statistics(kind, source, images=5, overwrite=True, **model)
    assert path.read_bytes() == first


def test_what_the_command_takes_of_the_data(vector, model, tmp_path) -> None:
    source, output = vector("digits"), str(tmp_path / "new" / "gram.safetensors")
    given = TaskDataModule(task="digits", evaluation_batch_size=2)
    settings = {"data": given, "split": "test", "seed": 3, "images": 5, "output": output}
    assert statistics("gram", source, **settings, **model) == Path(output)
    expected = collect_gram(tuned(model["model"], model["pretrained"], source), [drawn(model, "test", 3)[0]])
    for name, gram in LazyTensors(output).items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-7)
    assert given.augment  # the given data module is as it was
    assert not given.datasets
    everything = statistics("gram", source, split="val", images=None, **model)
    given.preprocessing = load_clip(**model).preprocessing
    given.setup("validate")
    assert LazyTensors(everything).metadata["images"] == str(len(given.datasets["val"]))


def test_whole_weights_labels_and_tangents(vector, model, clip, tmp_path) -> None:
    source = vector("digits")
    weights = str(tmp_path / "weights.safetensors")
    assert (
        main(
            [
                "merge",
                "--vectors",
                f"[{source}]",
                "--recipe",
                "weight_average",
                "--output",
                weights,
                "--model",
                model["model"],
                "--pretrained",
                model["pretrained"],
            ]
        )
        == 0
    )
    data = TaskDataModule(task="digits")
    files = {
        "vector": statistics("fisher", source, labels="true", images=3, **model),
        "weights": statistics("fisher", weights=weights, data=data, labels="true", images=3, **model),
    }
    stored = {way: LazyTensors(path) for way, path in files.items()}
    assert files["weights"] == tmp_path / "weights-fisher.safetensors"
    for name in stored["vector"]:
        torch.testing.assert_close(stored["weights"][name], stored["vector"][name], rtol=1e-3, atol=1e-7)
    for file in stored.values():
        assert (file.metadata["labels"], file.metadata["labels_read"]) == ("true", "true")
        assert file.metadata["task"] == "digits"
    tangent = LazyTensors(statistics("fisher", source, images=2, linearized=True, overwrite=True, **model))
    assert tangent.metadata["linearized"] == "true"
    assert set(tangent) == {name for name, _ in clip.visual.named_parameters()}
    assert tangent["proj"].any()


def test_gradients_are_those_of_the_base(vector, model, clip) -> None:
    paths = {task: str(statistics("gradients", vector(task), images=2, **model)) for task in TASKS}
    stored = {task: LazyTensors(path) for task, path in paths.items()}
    assert stored["digits"].metadata["format"] == "lit-merge/gradients/1"
    task = TaskDataModule(task="digits")
    from lit_merge.models import build_head

    head = build_head(load_clip(**model), list(task.classes), list(task.templates))
    expected = collect_gradients(clip.visual, [drawn(model, count=2)[0]], head, "expected")
    for name, gradient in expected.items():
        torch.testing.assert_close(stored["digits"][name], gradient, rtol=1e-4, atol=1e-7)
    vectors = TaskVectors([TaskVector.load(vector(task)) for task in TASKS])
    masked = TrustRegion(0.25, paths)(vectors)
    total = sum(vectors[name][0].numel() for name in vectors)
    kept = sum(int((masked[name][0] != 0).sum()) for name in masked)
    assert 0.7 * total < kept <= 0.75 * total
    with refused(ConfigurationError, "weights: expected task_vector with kind: gradients"):
        statistics("gradients", weights=vector("digits"), **model)
    with refused(ConfigurationError, "linearized: expected only with kind: fisher, got it with gradients"):
        statistics("gradients", vector("digits"), linearized=True, **model)


def test_statistics_merge_the_vectors_that_they_were_made_for(vector, model, tmp_path) -> None:
    sources = {task: vector(task) for task in ("digits", "letters")}
    for kind, transform in (("fisher", FisherMean), ("gram", RegMean)):
        paths = {task: str(statistics(kind, path, images=4, **model)) for task, path in sources.items()}
        vectors = TaskVectors([TaskVector.load(path) for path in sources.values()])
        merged, mean = transform(paths)(vectors), Mean()(vectors)
        assert any(not torch.allclose(merged[name], mean[name]) for name in merged)
        for name in merged:
            assert torch.isfinite(merged[name]).all()
        shorter = transform(paths)(vectors).single().norm()
        assert 0 < shorter < 2 * mean.single().norm()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["task_vector and weights: expected exactly one of them, got none"]),
        ({"task_vector": "V", "weights": "V"}, ["exactly one of them, got both"]),
        ({"task_vector": "V", "kind": "hessian"}, ["expected fisher or gram or gradients or kfac, got 'hessian'"]),
        ({"task_vector": "V", "split": "dev"}, ["split: expected train or val or test, got 'dev'"]),
        ({"task_vector": "V", "labels": "all"}, ["labels: expected expected or sampled or true, got 'all'"]),
        ({"task_vector": "V", "images": 0}, ["images: expected a whole number of at least 1 or null, got 0"]),
        ({"task_vector": "V", "convolutions": True}, ["convolutions: expected only with kind: gram or kfac, got"]),
        (
            {"task_vector": "V", "kind": "gram", "labels": "true"},
            ["labels: expected only with kind: fisher or gradients, got true"],
        ),
        ({"task_vector": "V", "kind": "gram", "linearized": True}, ["linearized: expected only with kind: fisher"]),
        ({"task_vector": "V", "output": "a.pt"}, ["output: expected a file ending in .safetensors, got a.pt"]),
        ({"task_vector": "V", "output": "V"}, ["another file than the input"]),
        ({"task_vector": "N"}, ["data: expected the task's images, .*, got none. Set data"]),
        (
            {"task_vector": "L", "data": "digits"},
            ["data: expected images of the vector's task 'letters', got 'digits'"],
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, parts, vector, model) -> None:
    files = {"V": vector("digits"), "N": vector(""), "L": vector("letters")}
    chosen = {key: files.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    if "data" in chosen:
        chosen["data"] = TaskDataModule(task=chosen["data"])
    with refused(ConfigurationError, *parts):
        statistics(**{"kind": "fisher", **chosen, **model})


def test_outputs_are_not_overwritten_and_failures_leave_nothing(vector, model, tmp_path, capsys) -> None:
    source = vector("digits")
    path = tmp_path / "digits-gram.safetensors"
    path.write_text("precious")
    with refused(ConfigurationError, "digits-gram.safetensors, which exists", "overwrite"):
        statistics("gram", source, **model)
    assert path.read_text() == "precious"
    unlabelled = TaskDataModule(task="digits", labelled=False)
    with refused(DataError, "for every image, got -1"):
        statistics("fisher", source, data=unlabelled, labels="true", images=2, **model)
    with refused(StructureMismatchError, "fingerprint"):
        statistics("fisher", source, model=model["model"], pretrained="random")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["digits-gram.safetensors", "digits.safetensors"]
    assert main(["statistics", "--kind", "fisher"]) == 2
    assert "error: task_vector and weights: expected exactly one" in capsys.readouterr().err
