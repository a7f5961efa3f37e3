"""Kronecker factors of a network's features, against gradients of single examples, and the command that writes them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_merge.commands.main import main
from lit_merge.data import TaskDataModule
from lit_merge.errors import ConfigurationError, NonFiniteError
from lit_merge.evaluation.statistics import collect_kfac
from lit_merge.evaluation.statistics.command import statistics
from lit_merge.models import load_clip
from lit_merge.vectors import LazyTensors

DOUBLE = torch.float64
WIDTH, TOKENS = 4, 3


def refused(error_class, *parts):
    """``with refused(error, "part", …)``: one line with these parts."""
    ahead = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(error_class, match=rf"^{ahead}[^\n]*$")


class Rows(nn.Module):
    """A layer whose weight is ``[in, out]``, as GPT-2's are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, tokens):
        flat = tokens.reshape(-1, tokens.shape[-1])
        return torch.addmm(self.bias, flat, self.weight).view(*tokens.shape[:-1], -1)


class Tower(nn.Module):
    """Tokens ``[B, L, d]`` -> features ``[B, 5]``; inside, tokens come first if asked for."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.token = nn.Parameter(torch.randn(WIDTH))
        self.place = nn.Parameter(torch.randn(TOKENS + 1, WIDTH))
        self.before = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=not first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(inplace=True), Rows(6, WIDTH), nn.Dropout(0.5))
        self.after = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, 5))

    def forward(self, tokens):
        tokens = torch.cat([self.token.view(1, 1, -1).expand(len(tokens), -1, -1), tokens], 1) + self.place
        tokens = tokens.transpose(0, 1) if self.first else tokens
        tokens = self.before(tokens)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.mlp(tokens)
        tokens = tokens.transpose(0, 1) if self.first else tokens
        return self.after(tokens[:, 0]) @ self.proj


@pytest.fixture
def tower():
    torch.manual_seed(0)
    built = Tower().double()
    with torch.no_grad():
        for value in built.parameters():
            value.copy_(torch.randn(value.shape, dtype=DOUBLE))
    return built


@pytest.fixture
def tokens():
    # As many examples as tokens, so that sizes do not tell which dimension is which.
    return torch.randn(TOKENS + 1, TOKENS, WIDTH, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def by_hand(tower, example):
    """Features of one example, and every layer's inputs and outputs, written out; outputs keep gradients."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(name, inputs, weight, bias=None):
        output = inputs @ weight.T if bias is None else inputs @ weight.T + bias
        output.retain_grad()
        ones = [] if bias is None else [torch.ones(len(inputs), 1, dtype=DOUBLE)]
        kept[name] = torch.cat([inputs, *ones], 1).detach(), output
        return output

    x = torch.cat([tower.token[None], example]) + tower.place
    x = tower.before(x)
    own = tower.attention
    packed = layer("attention.in_proj_weight", x, own.in_proj_weight, own.in_proj_bias)
    heads = [
        torch.softmax(q @ k.T / (WIDTH / 2) ** 0.5, -1) @ v
        for q, k, v in zip(*(part.split(WIDTH // 2, -1) for part in packed.split(WIDTH, -1)), strict=True)
    ]
    out = own.out_proj
    x = x + layer("attention.out_proj.weight", torch.cat(heads, -1), out.weight, out.bias)
    hidden = F.relu(layer("mlp.0.weight", x, tower.mlp[0].weight, tower.mlp[0].bias))
    x = x + layer("mlp.2.weight.T", hidden, tower.mlp[2].weight.T, tower.mlp[2].bias)
    return layer("proj.T", tower.after(x[:1]), tower.proj.T)[0], kept


def expected_factors(tower, tokens, probes, normalised=True):
    """The definition, one example at a time."""
    found: dict[str, torch.Tensor] = {}

    def add(name, value):
        found[name] = found.get(name, 0) + value / len(tokens)

    whole = ["token", "before.weight", "before.bias", "after.weight", "after.bias"]
    for example, probe in zip(tokens, probes, strict=True):
        tower.zero_grad()
        features, kept = by_hand(tower, example)
        ((features / features.norm() if normalised else features) @ probe).backward()
        for name, (inputs, output) in kept.items():
            add(f"A.{name}", inputs.T @ inputs / len(inputs))
            parts = [output.grad] if "in_proj" not in name else output.grad.split(WIDTH, 1)
            blocks = torch.stack([part.T @ part / len(part) for part in parts])
            add(f"G.{name}", blocks if len(parts) > 1 else blocks[0])
        for name in whole:
            gradient = tower.get_parameter(name).grad
            add(f"F.{name}", torch.outer(gradient, gradient))
    tower.zero_grad()
    return found


def probes_of(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, dtype=DOUBLE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("normalised", [True, False])
def test_factors_are_those_of_single_examples(normalised, tower, tokens) -> None:
    expected = expected_factors(tower, tokens, probes_of(3, 4), normalised)
    found = collect_kfac(tower, [tokens], seed=3, normalised=normalised)
    assert set(found) == set(expected)  # and nothing of the places, as in the authors' program
    for name, value in expected.items():
        assert found[name].dtype == DOUBLE
        torch.testing.assert_close(found[name], value)
    assert found["G.attention.in_proj_weight"].shape == (3, WIDTH, WIDTH)
    assert found["A.attention.in_proj_weight"].shape == (WIDTH + 1, WIDTH + 1)


def test_corrected_eigenvalues_are_mean_squares_of_single_gradients(tower, tokens) -> None:
    probes, found = probes_of(3, 4), collect_kfac(tower, [tokens], seed=3, corrected=True)
    plain = collect_kfac(tower, [tokens], seed=3)
    names = [name[2:] for name in plain if name.startswith("A.")]
    assert {name for name in found if name[0] != "F"} == {f"{kind}.{name}" for kind in "UVD" for name in names}
    assert all(torch.equal(found[name], plain[name]) for name in plain if name[0] == "F")
    squares = dict.fromkeys(names, torch.zeros((), dtype=DOUBLE))
    whole = dict.fromkeys(names, torch.zeros((), dtype=DOUBLE))
    for example, probe in zip(tokens, probes, strict=True):
        features, kept = by_hand(tower, example)
        ((features / features.norm()) @ probe).backward()
        for name, (inputs, output) in kept.items():
            gradient = output.grad.T @ inputs  # of weight and bias, summed over the tokens
            outer = torch.block_diag(*found[f"V.{name}"]) if "in_proj" in name else found[f"V.{name}"]
            squares[name] = squares[name] + (outer.T @ gradient @ found[f"U.{name}"]).square() / 4
            whole[name] = whole[name] + torch.outer(gradient.flatten(), gradient.flatten()) / 4
    tower.zero_grad()
    for name in names:
        torch.testing.assert_close(found[f"D.{name}"].reshape(squares[name].shape), squares[name])
        for basis, factor in (("U", "A"), ("V", "G")):
            turned = found[f"{basis}.{name}"].mT @ plain[f"{factor}.{name}"] @ found[f"{basis}.{name}"]
            torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))
        # The diagonal of the whole matrix in the basis V ⊗ U, and so its best approximation there.
        outer = torch.block_diag(*found[f"V.{name}"]) if "in_proj" in name else found[f"V.{name}"]
        both = torch.kron(outer.contiguous(), found[f"U.{name}"].contiguous())
        torch.testing.assert_close(found[f"D.{name}"].flatten(), (both.T @ whole[name] @ both).diagonal())


def test_corrected_of_other_layouts_and_of_layers_used_twice(tower, tokens) -> None:
    first = Tower(first=True).double()
    first.load_state_dict(tower.state_dict())
    with refused(ConfigurationError, "expected inputs of mlp.2.weight.T that lie along one dimension"):
        collect_kfac(first, [tokens], corrected=True)  # token by token, examples side by side
    first.mlp = tower.mlp = nn.Linear(WIDTH, WIDTH, dtype=DOUBLE)
    whole = collect_kfac(tower, [tokens], corrected=True)
    for network, batches in ((tower, list(tokens.split(3))), (first, [tokens])):
        other = collect_kfac(network, batches, corrected=True)
        for name in (one for one in whole if one.startswith("D.")):  # bases have signs of their own
            torch.testing.assert_close(other[name].sum(), whole[name].sum())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=DOUBLE)

        def forward(self, tokens):
            return self.layer(torch.tanh(self.layer(tokens))).sum(1)

    network = Twice()
    found = collect_kfac(network, [tokens], normalised=False, corrected=True)
    total, generator = 0.0, torch.Generator().manual_seed(0)
    for example in tokens:
        probe = torch.randn(WIDTH, dtype=DOUBLE, generator=generator)
        (gradient,) = torch.autograd.grad(network(example[None])[0] @ probe, [network.layer.weight])
        total += float(gradient.square().sum()) / len(tokens)
    assert float(found["D.layer.weight"].sum()) == pytest.approx(total)


def test_neither_batches_nor_layout_matter_and_nothing_changes(tower, tokens) -> None:
    first = Tower(first=True).double()
    first.load_state_dict(tower.state_dict())
    tower.mlp.requires_grad_(False)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    more = torch.cat([tokens, tokens * 0.5, tokens[:2] * 2, tokens * 3, tokens * 4])  # more than go through at once
    whole = collect_kfac(tower, [more])
    for network, batches in ((tower, more.split(5)), (first, [more]), (first, more.split(4))):
        for name, value in collect_kfac(network, batches).items():
            torch.testing.assert_close(value, whole[name])
    assert tower.training
    assert tower.mlp[3].training
    assert [name for name, one in tower.named_parameters() if not one.requires_grad] == [
        f"mlp.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")
    ]
    assert all(one.grad is None for one in tower.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    other = collect_kfac(tower, [more], seed=1)
    assert torch.equal(other["A.mlp.0.weight"], whole["A.mlp.0.weight"])
    assert not torch.allclose(other["G.mlp.0.weight"], whole["G.mlp.0.weight"])


def test_convolutions_are_linear_layers_on_patches() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 2, stride=2)
    network = nn.Sequential(convolution, nn.Flatten())
    images = torch.randn(5, 2, 4, 4)
    with refused(ConfigurationError, "with linear layers .* got Sequential"):
        collect_kfac(network, [images])
    found = collect_kfac(network, [images], normalised=False, convolutions=True)
    patches = torch.cat([F.unfold(images, 2, stride=2).mT.reshape(-1, 8), torch.ones(20, 1)], 1)
    torch.testing.assert_close(found["A.0.weight"], patches.T @ patches / 20)
    generator = torch.Generator().manual_seed(0)
    probes = torch.stack([torch.randn(12, dtype=DOUBLE, generator=generator) for _ in range(5)]).float()
    rows = probes.view(5, 3, 4).mT.reshape(20, 3)  # the gradients are the probes themselves
    torch.testing.assert_close(found["G.0.weight"], rows.T @ rows / 20)


def test_separate_and_other_projections_of_attention() -> None:
    class Cross(nn.Module):
        def __init__(self, **settings) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE, **settings)
            self.aside = nn.Linear(4, 2, dtype=DOUBLE)

        def forward(self, tokens):
            self.aside(tokens)  # which the features do not depend on
            keys = tokens[..., : self.attention.kdim]
            return self.attention(tokens, keys, keys.clone())[0].mean(1)

    tokens = torch.randn(5, 3, 4, dtype=DOUBLE)
    network = Cross(kdim=2, vdim=2)
    found = collect_kfac(network, [tokens], normalised=False)
    sizes = {name: len(value) for name, value in found.items() if name.startswith("A.")}
    names = {"q_proj_weight": 4, "k_proj_weight": 2, "v_proj_weight": 2, "out_proj.weight": 5}
    assert sizes == {f"A.attention.{name}": size for name, size in names.items()}
    assert all(found["G" + name[1:]].any() for name in sizes)
    packed = collect_kfac(Cross(), [tokens], normalised=False)
    assert set(packed) == {"A.attention.out_proj.weight", "G.attention.out_proj.weight"}


def test_what_cannot_be_collected_is_refused(tower, tokens) -> None:
    with refused(ConfigurationError, r"features \[4, …, d\] of 4 examples, got tuple"):
        collect_kfac(nn.GRU(WIDTH, 3, dtype=DOUBLE), [tokens])
    with refused(ConfigurationError, r"got \[12, 4\]"):
        collect_kfac(nn.Sequential(nn.Flatten(0, 1), nn.Linear(WIDTH, 4, dtype=DOUBLE)), [tokens])
    with refused(NonFiniteError, "Kronecker factors: expected finite values"):
        collect_kfac(tower, [tokens * torch.inf])
    assert tower.training

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH, dtype=DOUBLE)

        def forward(self, tokens):
            return F.linear(self.layer(tokens), self.layer.weight)

    with refused(ConfigurationError, "expected layer.weight to be used in one way, got it with its bias and without"):
        collect_kfac(Twice(), [tokens])


# The command


@pytest.fixture
def model(clip_config, clip_weights):
    return {"model": clip_config, "pretrained": clip_weights}


def test_the_command_writes_what_python_collects(model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", model["model"], "--pretrained", model["pretrained"], "--images", "5", "--seed", "2"]
    assert main(["statistics", "--kind", "kfac", "--data.task=digits", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "digits-kfac.safetensors"
    stored = LazyTensors(tmp_path / "digits-kfac.safetensors", verify=True)
    clip = load_clip(**model)
    data = TaskDataModule(task="digits", augment=False, preprocessing=clip.preprocessing)
    data.setup("fit")
    images = data.datasets["train"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))[:5]
    expected = collect_kfac(clip.visual, [images.__getitems__(order.tolist()).images], 2)
    assert set(stored) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-7)
    own = {name.removesuffix(".T") for name, _ in clip.visual.named_parameters()}
    covered = {name[2:].removesuffix(".T") for name in stored}
    bare = {name for name in own - covered if not name.endswith("bias")}
    assert bare == {"conv1.weight", "positional_embedding"}
    header = stored.metadata
    assert set(json.loads(header.pop("versions"))) == {"lit_merge", "torch"}
    assert header == {
        "format": "lit-merge/kfac/1",
        "task": "digits",
        "base_fingerprint": clip.fingerprint,
        "base_model": "tiny-clip",
        "activation": "gelu",
        "images": "5",
        "split": "train",
        "labels": "none",
        "labels_read": "false",
        "seed": "2",
        "normalised": "true",
    }


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"task_vector": "V"}, ["expected none with kind: kfac, which is of the base model alone, got V"]),
        ({"weights": "V"}, ["expected none with kind: kfac", "name the task by its data"]),
        ({}, ["data: expected the task's images, got none", "--data.task digits"]),
        ({"labels": "true"}, ["labels: expected only with kind: fisher or gradients, got true with kfac"]),
        ({"linearized": True}, ["linearized: expected only with kind: fisher, got it with kfac"]),
        ({"kind": "gram", "task_vector": "V", "normalised": False}, ["normalised: expected only with kind: kfac"]),
        ({"kind": "gram", "task_vector": "V", "corrected": True}, ["corrected: expected only with kind: kfac"]),
        ({"data": "digits", "output": "a.pt"}, ["output: expected a file ending in .safetensors, got a.pt"]),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, parts) -> None:
    chosen = dict(settings)
    if "data" in chosen:
        chosen["data"] = TaskDataModule(task=chosen["data"])
    with refused(ConfigurationError, *parts):
        statistics(**{"kind": "kfac", **chosen})
