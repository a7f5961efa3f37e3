"""Networks as objects: shorthands, the base of a merge without building it, and that nobody loads one twice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.language_folders import language_folder
from safetensors.torch import load_file, save_file
from torch import nn

import lit_merge.models.network
from lit_merge.commands.merge import merge
from lit_merge.commands.soup import soup
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.evaluation.analysis.command import analyze
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.files.store import write_tensors
from lit_merge.models import ClipNetwork, ModuleNetwork, Network, load_clip
from lit_merge.models.language import Seq2SeqNetwork
from lit_merge.models.merging.output import MergedWeights
from lit_merge.models.network import network_of
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector, TaskVectors


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


@pytest.mark.parametrize("name", ["visual.extra.weight", "visual.head.weight", "visual.ln_post.bias"])
def test_a_file_that_does_not_fit_the_tower_is_refused_before_it_is_built_and_after(
    name, clip_config, clip_weights, tmp_path
) -> None:
    state = load_file(clip_weights)
    path = tmp_path / "clip.safetensors"
    save_file({**state, name: torch.zeros(3)}, path)
    for build in (load_clip, ClipNetwork):
        with pytest.raises(StructureMismatchError, match=re.escape(name.removeprefix("visual."))):
            build(clip_config, str(path))


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


class Shared(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)))


def test_a_shared_parameter_is_merged_under_all_of_its_names(tmp_path) -> None:
    network = ModuleNetwork(Shared())
    assert network.ties == {"second.weight": "first.weight"}
    vector = TaskVector({name: torch.ones_like(value) for name, value in network.module.named_parameters()}, "a")
    written = dict(MergedWeights(network, TaskVectors([vector]), None))
    assert torch.equal(written["second.weight"], network.module.first.weight + 1)
    assert torch.equal(written["second.weight"], written["first.weight"])
    whole = Shared()
    whole.load_state_dict(written)
    write_tensors(tmp_path / "whole.safetensors", written, {})
    given = {"encoder": Shared(), "heads": {"a": nn.Identity()}}
    found = MultiTaskModule(**given, weights=str(tmp_path / "whole.safetensors"))
    inputs = torch.randn(2, 4)
    assert torch.equal(found.encoder(inputs), whole(inputs))
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    assert torch.equal(MultiTaskModule(**given, weights=str(tmp_path / "whole.pt")).encoder(inputs), whole(inputs))
    write_tensors(tmp_path / "two.safetensors", {**written, "second.weight": torch.zeros(4, 4)}, {})
    with pytest.raises(
        StructureMismatchError, match=r"expected second\.weight and first\.weight to be one tensor, as Shared has them"
    ):
        MultiTaskModule(**given, weights=str(tmp_path / "two.safetensors"))


def test_towers_of_images_and_language_models_name_no_ties(tmp_path, own_cache, clip_config, clip_weights) -> None:
    assert ClipNetwork(clip_config, clip_weights).ties == {}
    language_folder(tmp_path / "t5", "t5")
    network = Seq2SeqNetwork(str(tmp_path / "t5"))
    assert not network.ties
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    assert set(state) > set(network.whole())
    write_tensors(tmp_path / "state.safetensors", state, {})
    MultiTaskModule(network=network, weights=str(tmp_path / "state.safetensors"))


class Classifier(nn.Module):
    """A vision transformer of timm's names beside its head."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(2, 6)})})
        patches = nn.ModuleDict({"proj": nn.Conv2d(3, 2, 1)})
        self.backbone = nn.ModuleDict({"patch_embed": patches, "blocks": nn.ModuleList([block])})
        self.head = nn.Linear(2, 3)


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_beside_the_backbone_is_loaded_where_the_network_has_one(whole, tmp_path) -> None:
    stored, into = Classifier(), Classifier()
    save_file(stored.state_dict(), tmp_path / "w.safetensors")
    FineTuneModule(encoder=into if whole else into.backbone).load_weights(tmp_path / "w.safetensors")
    for name, value in stored.backbone.state_dict().items():
        assert torch.equal(into.backbone.state_dict()[name], value)
    assert torch.equal(into.head.weight, stored.head.weight) == whole
