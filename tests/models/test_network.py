"""Networks as objects: shorthands, the base of a merge without building it, and that nobody loads one twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_merge.models.network
from lit_merge.commands.merge import merge
from lit_merge.commands.soup import soup
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.analysis.command import analyze
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.models import ClipNetwork, ModuleNetwork, Network, load_clip
from lit_merge.models.network import network_of
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector


class Scores(Network):
    name = "scores"

    def __init__(self) -> None:
        self.module = nn.Linear(4, 3)

    def head(self, task):
        return nn.Identity()


def test_shorthands_stand_for_networks(tiny_encoder) -> None:
    assert isinstance(network_of(), ClipNetwork)
    encoder = tiny_encoder()
    network = network_of(encoder=encoder)
    assert isinstance(network, ModuleNetwork)
    assert network.module is encoder
    assert network.fingerprint == fingerprint(dict(encoder.named_parameters()))
    own = Scores()
    assert network_of(own) is own
    with pytest.raises(
        ConfigurationError, match="network: expected no pretrained and model together with it, got both"
    ):
        network_of(own, "ViT-B-32", "openai")


def test_a_network_is_the_base_of_a_merge() -> None:
    network = Scores()
    assert dict(network.parameters).keys() == {"weight", "bias"}
    assert network.parameters.shape("weight") == (3, 4)
    assert network.memory == 15 * 4
    assert torch.equal(network.whole()["bias"], network.module.bias)


@pytest.mark.parametrize("shipped", [True, False])
def test_a_tower_from_its_file_is_the_tower_that_is_built(shipped, clip_config, clip_weights) -> None:
    arguments = () if shipped else (clip_config, clip_weights)
    network, clip = ClipNetwork(*arguments), load_clip(*arguments)
    assert network.fingerprint == clip.fingerprint
    assert network.name == clip.name
    own = dict(clip.visual.named_parameters())
    assert network.parameters.keys() == own.keys()
    assert all(torch.equal(network.parameters[name], value) for name, value in own.items())
    stored = network.whole()
    assert "clip" not in vars(network)  # nothing was built
    network.clip  # noqa: B018
    built = network.whole()
    assert stored.keys() == built.keys()
    assert all(torch.equal(stored[name], built[name]) for name in built)


def test_merging_builds_no_network(tmp_path) -> None:
    program = (
        "import sys, torch\n"
        "from lit_merge.commands.merge import merge\n"
        "from lit_merge.models import ClipNetwork\n"
        "from lit_merge.vectors import TaskVector\n"
        "network = ClipNetwork()\n"
        "tau = {name: torch.full(network.parameters.shape(name), 0.01) for name in network.parameters}\n"
        "TaskVector(tau, 'digits', metadata={'base_fingerprint': network.fingerprint}).save('a.safetensors')\n"
        "merge(['a.safetensors'], 'm.safetensors', 'task_arithmetic')\n"
        "print(sorted({'lightning', 'open_clip', 'torchvision', 'torchmetrics'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert (tmp_path / "m.safetensors").is_file()


@pytest.fixture
def loads(monkeypatch) -> list[tuple]:
    """The arguments of every call that builds a CLIP."""
    asked: list[tuple] = []
    monkeypatch.setattr(lit_merge.models.network, "load_clip", lambda *given: asked.append(given) or load_clip(*given))
    return asked


@pytest.fixture
def vectors(tmp_path) -> list[str]:
    network = ClipNetwork()
    paths = []
    for seed, task in enumerate(("digits", "signs")):
        generator = torch.Generator().manual_seed(seed)
        tau = {name: 1e-3 * torch.randn(value.shape, generator=generator) for name, value in network.parameters.items()}
        paths.append(str(tmp_path / f"{task}.safetensors"))
        TaskVector(tau, task, metadata={"base_fingerprint": network.fingerprint}).save(paths[-1])
    return paths


def test_a_command_loads_its_model_once(vectors, loads, tmp_path, few_images) -> None:
    merge(vectors, str(tmp_path / "searched.safetensors"), "task_arithmetic", search=CoefficientSearch([0.2, 0.4]))
    assert len(loads) == 1
    soup(vectors, str(tmp_path / "soup.safetensors"))
    assert len(loads) == 2
    analyze(vectors, str(tmp_path / "analysis"), analyses=["cosine", "accuracy"], images=16, progress=False)
    assert len(loads) == 3


def test_a_search_leaves_the_base_as_it_was(vectors, tmp_path, few_images) -> None:
    """The merged model is θ0 + τ although other models were evaluated on the same network before."""
    settings = {"recipe": "slerp", "kind": "weights"}
    merge(vectors, str(tmp_path / "plain.safetensors"), settings={"fraction": 0.5}, **settings)
    searched = tmp_path / "searched.safetensors"
    merge(vectors, str(searched), search=CoefficientSearch([0.5], field="fraction", criterion="absolute"), **settings)
    plain, found = (load_clip("lit-tiny", str(Path(path))) for path in (tmp_path / "plain.safetensors", searched))
    assert plain.fingerprint == found.fingerprint
