"""Searches by perplexity and by rewards of what is written, against loops over the networks' own logits in float64."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from builders.language_folders import language_folder
from torch.func import functional_call

from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule
from lit_merge.data.text import TextTask
from lit_merge.errors import ConfigurationError, DataError, NonFiniteError
from lit_merge.evaluation.search import CoefficientSearch, search_coefficient
from lit_merge.metrics import Reward, WordCount, hypervolume, kept_share
from lit_merge.models.language import CausalNetwork, TextEncoderNetwork
from lit_merge.transforms import Chain, Interpolate, LiNeS, negation, task_arithmetic
from lit_merge.vectors import TaskVector, TaskVectors

TEXTS = {
    "poems": ["a b c a b c a b", "b c a b c d e", "c a b c w1 w2 w3", "a b w4 w5 w6"],
    "letters": ["w1 w2 w3 w1 w2 w3", "w2 w3 w1 w4 w5", "w7 w8 w9 w7 w8"],
    "others": ["x y z x y z x", "y z w9 x y"],
}
GRID = [0.0, 0.2, 0.4, 1.0]


@dataclass(frozen=True)
class Letters(Reward):
    """The fraction of a response's words that are one letter."""

    scale: float = 1.0

    def __call__(self, prompts, responses):
        words = [text.split() for text in responses]
        return torch.tensor([self.scale * sum(len(w) == 1 for w in own) / max(1, len(own)) for own in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return language_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def network(folder, own_cache):
    own_cache.mkdir()
    return CausalNetwork(str(folder))


def texts(name):
    return TextTask(rows={"train": [{"text": "a"}], "val": [{"text": one} for one in TEXTS[name]]}, label_column=None)


def prompted(name):
    rows = [{"text": one, "reply": "a"} for one in TEXTS[name]]
    return TextTask(rows={"train": rows[:1], "val": rows}, label_column=None, target="reply", repeated="keep")


@pytest.fixture
def data():
    return MultiTaskDataModule(sources={name: texts(name) for name in TEXTS}, evaluation_batch_size=2)


def vector(network, seed, task, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(network.module.named_parameters())
    own = {name: scale * torch.randn(value.shape, generator=generator) for name, value in parameters.items()}
    return TaskVector(own, task, metadata={"base_fingerprint": network.fingerprint, "base_model": network.name})


def perplexity(network, tau, coefficient, name):
    """exp of the mean −log p over all next tokens, in float64, text by text."""
    parameters = {
        key: value.detach().double() + (coefficient * tau[key].double() if tau is not None else 0)
        for key, value in network.module.named_parameters()
    }
    losses = []
    for text in TEXTS[name]:
        ids = torch.from_numpy(network.preprocessing.encode([text]).input_ids[0])[None]
        with torch.no_grad():
            logits = functional_call(network.module, parameters, (ids, torch.ones_like(ids)))
        log = logits.double().log_softmax(-1)
        losses += [-float(log[0, place, ids[0, place + 1]]) for place in range(ids.shape[1] - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("share", [0.95, 0.98])
def test_unlearning_keeps_the_controls_perplexity(share, network, data):
    """ppl(θ0) / ppl(θ) >= share for every control by itself, and the target's perplexity as high as it gets."""
    tau = vector(network, 3, "poems", 0.05)
    search = CoefficientSearch(GRID, criterion="negation", control_share=share, perplexity=list(TEXTS))
    found = search_coefficient(TaskVectors([tau]), negation(), search, data=data, network=network)
    measured = {value: {name: perplexity(network, tau, -value, name) for name in TEXTS} for value in GRID}
    for point, value in zip(found.points, GRID, strict=True):
        assert {name: 1 / one for name, one in point.accuracy.items()} == pytest.approx(measured[value], rel=1e-4)
        kept = min(measured[0.0][name] / measured[value][name] for name in ("letters", "others"))
        assert point.control == pytest.approx(kept, rel=1e-4)
    allowed = [
        value for value in GRID if all(measured[value][n] <= measured[0.0][n] / share for n in TEXTS if n != "poems")
    ]
    assert found.best == max(allowed, key=lambda value: measured[value]["poems"])
    assert 0 < len(allowed) < len(GRID)
    plain = json.loads(json.dumps(found.plain()))
    assert plain["perplexities"][2] == pytest.approx(measured[0.4], rel=1e-4)
    assert plain["measures"] == dict.fromkeys(TEXTS, "1 / perplexity")
    again = search_coefficient(TaskVectors([tau]), negation(), search, data=data, network=network)
    assert again.accuracy == found.accuracy


def most_probable(network, text, answers, mean):
    """The answer with the highest sum, or mean, of its tokens' log-probabilities, in float64."""
    scores = []
    for answer in answers:
        found = network.preprocessing.encode([text], [answer], ended=False)
        before, own = torch.from_numpy(found.input_ids[0]), torch.from_numpy(found.target_ids[0])
        whole = torch.cat([before, own])[None]
        with torch.no_grad():
            log = network.module(whole, torch.ones_like(whole)).double().log_softmax(-1)[0]
        tokens = log[len(before) - 1 : -1].gather(1, own[:, None])
        scores.append(float(tokens.mean() if mean else tokens.sum()))
    return scores.index(max(scores))


def test_answers_that_are_ranked_in_another_way_are_measured_anew(folder, own_cache):
    """What was measured of one head is not taken for another one, neither of which has a parameter."""
    own_cache.mkdir()
    answers = {"poems": ["a", "b c d e"], "letters": ["w1", "w2 w3"], "others": ["x", "y z w9 x"]}
    rows = {name: [{"text": one, "label": "long"} for one in TEXTS[name]] for name in TEXTS}
    settings = {"classes": ["short", "long"], "repeated": "keep"}
    sources = {
        name: TextTask(rows={"train": own, "val": own}, answers=answers[name], **settings) for name, own in rows.items()
    }
    found = []
    for normalised in (False, True):
        network = CausalNetwork(str(folder), length_normalised=normalised)
        data = MultiTaskDataModule(sources=sources, evaluation_batch_size=2)
        search = CoefficientSearch([0.0], criterion="absolute", target=list(TEXTS))
        one = search_coefficient(
            TaskVectors([vector(network, 3, "poems")]), task_arithmetic(), search, data=data, network=network
        )
        found += one.accuracy
        for name, texts in TEXTS.items():
            chosen = [most_probable(network, text, answers[name], normalised) for text in texts]
            assert one.accuracy[0][name] == pytest.approx(sum(chosen) / len(chosen))
    assert found[0] != found[1]


def test_accuracy_and_perplexity_as_controls_count_apart():
    before, after = {"a": 0.8, "b": 0.6, "text": 0.05}, {"a": 0.8, "b": 0.46, "text": 0.049}
    assert kept_share(after, before, ["a", "b", "text"], ["text"]) == pytest.approx(0.9)  # 1.26 / 1.4
    assert kept_share(after, before, ["text", "a"], ["text"]) == pytest.approx(0.98)
    with pytest.raises(
        DataError, match=r"expected a positive measure of the pre-trained model, got 0 for text\. Leave"
    ):
        kept_share(after, {"text": 0.0}, ["text"], ["text"])


def test_the_path_between_two_rewards(network):
    """Every point is the mean reward of greedy responses; the front and its volume are those of the points."""
    pair = TaskVectors([vector(network, 1, "letters"), vector(network, 2, "count")])
    sources = {"letters": prompted("poems"), "count": prompted("poems")}
    data = MultiTaskDataModule(sources=sources, evaluation_batch_size=2)
    rewards = {"letters": Letters(), "count": WordCount(3)}
    settings = {"criterion": "absolute", "rewards": rewards, "max_new_tokens": 6}
    search = CoefficientSearch([0.0, 0.5, 1.0], "Interpolate.fraction", **settings)
    chain = Chain((Interpolate(0.5), LiNeS(0.5, 0.5)))
    found = search_coefficient(pair, chain, search, data=data, network=network)
    for point in found.points:
        merged = Chain((Interpolate(point.fields["Interpolate.fraction"]), LiNeS(0.5, 0.5)))(pair).single()
        written = [greedy(network, merged, text, 6) for text in TEXTS["poems"]]
        expected = {name: float(reward([""] * 4, written).double().mean()) for name, reward in rewards.items()}
        assert point.accuracy == pytest.approx(expected)
        assert point.normalised is None
    start = list(found.zero_shot.values())
    assert found.hypervolume == hypervolume([list(point.accuracy.values()) for point in found.points], start)
    assert len({tuple(point.accuracy.values()) for point in found.points}) > 1
    saved = CoefficientSearch(**{**search.to_config(), "rewards": rewards})
    assert saved == search
    assert search.to_config()["rewards"]["count"]["init_args"] == {"words": 3}


def greedy(network, tau, text, count):
    parameters = {name: value.detach() + tau[name] for name, value in network.module.named_parameters()}
    ids = network.preprocessing.encode([text], ["a"]).input_ids[0].tolist()
    start = len(ids)
    while len(ids) < start + count and ids[-1] != network.preprocessing.end_id:
        given = torch.tensor([ids])
        with torch.no_grad():
            logits = functional_call(network.module, parameters, (given, torch.ones_like(given)))
        ids.append(int(logits[0, -1].argmax()))
    return network.preprocessing.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


class Wrong(Reward):
    """More numbers than responses, or one that is none."""

    def __init__(self, values):
        self.values = values

    def __repr__(self):  # a test's name, which two processes agree on
        return f"Wrong({self.values})"

    def __call__(self, prompts, responses):
        return torch.tensor(self.values)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rewards": {"poems": Wrong([1.0])}}, ConfigurationError, "expected one number for each of 2 responses, got"),
        ({"rewards": {"poems": Wrong([1.0, math.nan])}}, NonFiniteError, "reward poems: expected finite numbers, got"),
        (
            {"perplexity": ["poems"], "control": []},
            ConfigurationError,
            "expected target and control tasks, all targets",
        ),
        ({"perplexity": ["signs"]}, ConfigurationError, "got 'signs', which is neither"),
        (
            {"rewards": {"poems": Letters(7.0)}, "criterion": "negation"},
            ConfigurationError,
            "of negation in [0, 1], su",
        ),
    ],
    ids=str,
)
def test_measures_that_make_no_sense(settings, error, message, network):
    sources = {name: prompted(name) for name in TEXTS}
    data = MultiTaskDataModule(sources=sources, evaluation_batch_size=2)
    vectors = TaskVectors([vector(network, 1, "poems", 0.1), vector(network, 2, "letters", 0.1)])
    target = settings.pop("target", ["poems"]) if "rewards" in settings else None
    search = CoefficientSearch([1.0], **{"criterion": "absolute", "target": target, **settings})
    with pytest.raises(error) as caught:
        search_coefficient(vectors, task_arithmetic(), search, data=data, network=network)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_sense():
    with pytest.raises(ConfigurationError, match="expected the criterion absolute or negation, as rewards have no"):
        CoefficientSearch(rewards={"a": WordCount()})
    with pytest.raises(ConfigurationError, match="expected a task in one of them, got 'a' in both"):
        CoefficientSearch(perplexity=["a"], rewards={"a": WordCount()}, criterion="absolute")
    with pytest.raises(ConfigurationError, match="max_new_tokens: expected an integer of at least 1, got 0"):
        CoefficientSearch(max_new_tokens=0)


def test_an_encoder_has_no_perplexity(tmp_path, own_cache):
    own_cache.mkdir()
    network = TextEncoderNetwork(str(language_folder(tmp_path, "bert")))
    rows = [{"text": "a b", "label": "w1"}, {"text": "b c", "label": "w2"}]
    task = TextTask(rows={"train": rows, "val": rows}, classes=["w1", "w2"], repeated="keep")
    search = CoefficientSearch([0.0], perplexity=["t"], criterion="absolute")
    data = MultiTaskDataModule(sources={"t": task})
    own = TaskVectors([vector(network, 1, "t")])
    with pytest.raises(
        ConfigurationError, match=r"search\.perplexity: expected tasks of texts alone or with free target"
    ):
        search_coefficient(own, task_arithmetic(), search, data=data, network=network)


def inclusion_exclusion(points, reference):
    """The union of boxes by the sum over all subsets."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            corner = [min(values) for values in zip(*subset, strict=True)]
            total -= (-1) ** size * math.prod(max(0.0, a - b) for a, b in zip(corner, reference, strict=True))
    return total


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_the_hypervolume_is_that_of_the_union(dimension):
    generator = torch.Generator().manual_seed(dimension)
    reference = [0.1] * dimension
    for _ in range(5):
        points = torch.rand(6, dimension, generator=generator, dtype=torch.float64).tolist()
        points.append(points[0])  # twice
        assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-12)
    assert hypervolume([], reference) == 0.0
    assert hypervolume([reference], reference) == 0.0


def test_negation_by_perplexity_from_the_shell(folder, network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = {}
    for name in ("poems", "letters"):
        (tmp_path / name).mkdir()
        for split in ("train", "val", "test"):
            rows = [json.dumps({"text": one}) for one in (TEXTS[name] if split == "val" else [f"{split} a b"])]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        init = {"path": name, "label_column": None}
        sources[name] = {"class_path": "lit_merge.data.TextTask", "init_args": init}
    vector(network, 3, "poems", 0.05).save("poems.safetensors")
    named = {"class_path": "lit_merge.models.language.CausalNetwork", "init_args": {"path": str(folder)}}
    search = {"values": GRID, "criterion": "negation", "perplexity": ["poems", "letters"]}
    line = ["merge", "--recipe", "negation", "--vectors", "[poems.safetensors]", "--output", "merged.safetensors"]
    line += ["--network", json.dumps(named), "--search", json.dumps(search), "--kind", "task_vector"]
    line += ["--data", "MultiTaskDataModule", "--data.sources", json.dumps(sources)]
    assert main(line) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "merged-search.json").read_text())
    base = found["perplexities_of_base"]["letters"]
    kept = [value for value, point in zip(GRID, found["perplexities"], strict=True) if point["letters"] <= base / 0.95]
    assert found["best"] in kept
    assert found["measures"] == {"poems": "1 / perplexity", "letters": "1 / perplexity"}
