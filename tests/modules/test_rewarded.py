"""Adapters that trl trains on a tiny random network, by texts and by rewards; LLaMA-2's configurations end to end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from builders.language_folders import language_folder
from safetensors.torch import load_file

from lit_merge.commands.main import main
from lit_merge.data import Task, TensorExamples
from lit_merge.data.text import TextTask
from lit_merge.errors import ConfigurationError, DataError, NonFiniteError
from lit_merge.metrics import Reward, WordCount
from lit_merge.models import LoRA
from lit_merge.models.language import CausalNetwork, TextEncoderNetwork
from lit_merge.modules.rewarded import RewardedRun, train_adapter
from lit_merge.vectors import TaskVector

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = [{"prompt": f"a b w{number}", "completion": "c d"} for number in range(8)]
NAME = f"{__name__}.Short"


@dataclass(frozen=True)
class Short(Reward):
    """Short responses."""

    words: int = 1

    def __call__(self, prompts, responses):
        return torch.tensor([-abs(len(text.split()) - self.words) / 10 for text in responses])


class Pictures(Task):
    name = "pictures"

    def split(self, split, preprocessing, augmentation_seed=None):
        return TensorExamples((torch.zeros(2, 3),), torch.zeros(2, dtype=torch.int64))


@pytest.fixture
def network(tmp_path):
    return CausalNetwork(str(language_folder(tmp_path / "llama", "llama")))


def task(**settings):
    return TextTask(rows={"train": ROWS, "val": ROWS[:2]}, text_column="prompt", repeated="keep", **settings)


def test_settings_that_make_no_sense(network, tmp_path, monkeypatch):
    for settings, message in (
        ({"method": "ppo"}, "method: expected sft or grpo, got 'ppo'."),
        ({}, "rewards: expected at least one with method grpo, and none with sft, got none."),
        ({"method": "sft", "rewards": {"a": Short()}}, "and none with sft, got a with sft."),
        ({"rewards": {"a": Short()}, "settings": {"seed": 1}}, "settings: expected none that are set here, got seed."),
    ):
        with pytest.raises(ConfigurationError) as error:
            RewardedRun(**settings)
        assert message in str(error.value)
    monkeypatch.setattr("lit_merge.modules.rewarded.find_spec", lambda name: None if name == "trl" else name)
    with pytest.raises(ConfigurationError) as error:
        train_adapter(network, task(target="completion"), RewardedRun("sft"), tmp_path / "out")
    expected = "trl: expected the package trl, got none. Install it: pip install 'lit-merge[text,rl]'."
    assert str(error.value) == expected
    assert not (tmp_path / "out").exists()


def test_by_texts_and_by_rewards(network, tmp_path):
    """The network stays θ0; peft's factors give the vector; the log tells the rewards."""
    pytest.importorskip("trl")
    before = {name: value.clone() for name, value in network.module.named_parameters()}
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05, "use_cpu": True, "bf16": False}
    sft = RewardedRun("sft", lora=LoRA(rank=2, alpha=6), settings=settings)
    record = train_adapter(network, task(target="completion", label_column=None), sft, tmp_path / "sft")
    assert [one["step"] for one in record["log"] if "loss" in one] == [1, 2]
    more = {**settings, "num_generations": 4, "max_completion_length": 4}
    grpo = RewardedRun(rewards={"short": Short(), "words": WordCount(2)}, lora=LoRA(rank=2, alpha=6), settings=more)
    record = train_adapter(network, task(label_column=None), grpo, tmp_path / "grpo")
    assert "rewards/short/mean" in record["log"][0]
    assert json.loads((tmp_path / "grpo/training.json").read_text())["base_fingerprint"] == network.fingerprint
    assert sorted(path.name for path in (tmp_path / "grpo").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    now = dict(network.module.named_parameters())
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) and now[name].requires_grad for name in before)
    for made in ("sft", "grpo"):
        factors = load_file(tmp_path / made / "adapter_model.safetensors")
        line = ["import", "--finetuned", str(tmp_path / made), "--pretrained", str(tmp_path / "llama")]
        assert main([*line, "--output", str(tmp_path / f"{made}.safetensors")]) == 0
        tau = TaskVector.load(tmp_path / f"{made}.safetensors")
        moved = [name for name in tau if bool(tau[name].any())]
        assert len(moved) == 8  # query, key, value and output of two blocks
        for name in moved:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (factors[f"{stem}.lora_{one}.weight"].double() for one in "AB")
            torch.testing.assert_close(tau[name].double(), 3 * b @ a, rtol=1e-5, atol=1e-7)
    with pytest.raises(ConfigurationError, match=r"output: expected a new folder, got .*sft, which exists"):
        train_adapter(network, task(), sft, tmp_path / "sft")
    with pytest.raises(ConfigurationError, match=r"settings: expected arguments of trl's SFTConfig, got .*rate"):
        train_adapter(network, task(label_column=None), RewardedRun("sft", settings={"rate": 1}), tmp_path / "x")
    odd = RewardedRun(rewards={"short": Short()}, settings={**more, "num_generations": 3})
    with pytest.raises(ConfigurationError, match=r"settings: expected .* trl's GRPO"):
        train_adapter(network, task(label_column=None), odd, tmp_path / "x")
    with pytest.raises(DataError, match=r"pictures: expected texts to train on, got TensorExamples\. Give a text task"):
        train_adapter(network, Pictures(), sft, tmp_path / "x")
    encoder = TextEncoderNetwork(str(language_folder(tmp_path / "bert", "bert")))
    with pytest.raises(ConfigurationError, match="network: expected a causal language model, got 'bert'"):
        train_adapter(encoder, task(), sft, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@dataclass(frozen=True)
class Nothing(Reward):
    """No number."""

    def __call__(self, prompts, responses):
        return torch.full((len(responses),), torch.nan)


def test_a_run_that_fails_leaves_the_network_as_it_was(network, tmp_path):
    pytest.importorskip("trl")
    model = network.module.of_transformers
    modules, config = dict(model.named_modules()), model.config.to_dict()
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    settings |= {"num_generations": 4, "max_completion_length": 4}
    run = RewardedRun(rewards={"nothing": Nothing()}, lora=LoRA(rank=2), settings=settings)
    with pytest.raises(NonFiniteError, match="reward nothing: expected finite numbers, got nan"):
        train_adapter(network, task(label_column=None), run, tmp_path / "out")
    assert dict(model.named_modules()) == modules
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert model.config.to_dict() == config
    assert not hasattr(model, "peft_config")
    assert list(tmp_path.glob("*out*")) == []


@dataclass(frozen=True)
class Seen(Reward):
    """Keeps the prompts."""

    prompts: list = field(default_factory=list)

    def __call__(self, prompts, responses):
        self.prompts.extend(prompts)
        return torch.arange(float(len(responses)))


def test_prompts_keep_the_special_tokens_that_they_are_written_with(network, tmp_path):
    """A chat's turns are such tokens; the beginning that the tokenizer adds is added again by trl."""
    pytest.importorskip("trl")
    rows = [{"prompt": f"a </s>  b w{number} </s> Unknown words"} for number in range(4)]
    source = TextTask(rows={"train": rows, "val": rows[:1]}, text_column="prompt", label_column=None, repeated="keep")
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    settings |= {"num_generations": 4, "max_completion_length": 4}
    reward = Seen()
    run = RewardedRun(rewards={"seen": reward}, lora=LoRA(rank=2), settings=settings)
    train_adapter(network, source, run, tmp_path / "out")
    assert reward.prompts
    assert set(reward.prompts) <= {row["prompt"] for row in rows}


PROGRAM = """
import sys
from lit_merge.commands.main import main
sys.exit(main({line!r}))
"""


def test_one_of_two_processes_writes(network, tmp_path, fork_server, own_cache):
    pytest.importorskip("trl")
    rows = "\n".join(json.dumps({"prompt": f"a b w{number}", "completion": "c d"}) for number in range(8))
    (tmp_path / "texts.jsonl").write_text(rows + "\n")
    init = {"path": str(tmp_path / "texts.jsonl"), "text_column": "prompt", "target": "completion"}
    source = {"class_path": "lit_merge.data.TextTask", "init_args": {**init, "label_column": None, "repeated": "keep"}}
    folder = {"path": str(tmp_path / "llama"), "dtype": "float32"}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    line = ["trl", "--method", "sft", "--source", json.dumps(source), "--settings", json.dumps(settings)]
    line += ["--network", json.dumps({"class_path": "lit_merge.models.language.CausalNetwork", "init_args": folder})]
    fork_server.run_on_two(PROGRAM.format(line=[*line, "--output", str(tmp_path / "out")]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out", "texts.jsonl"]


def test_the_configurations_of_llama_2_at_tiny_size(network, tmp_path, monkeypatch, capsys, own_cache):
    """Supervised fine-tuning, two rewards, and the path between them with and without LiNeS."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tldr").mkdir()
    for split in ("train", "validation", "test"):
        rows = [json.dumps({"prompt": f"{split} {row['prompt']}", "completion": "c d"}) for row in ROWS]
        (tmp_path / "tldr" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    init = {
        "path": "tldr",
        "hub": None,
        "text_column": "prompt",
        "target": "completion",
        "label_column": None,
        "repeated": "keep",
    }
    source = {"class_path": "lit_merge.data.TextTask", "init_args": init}
    tiny = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True}
    tiny |= {"bf16": False, "num_generations": 4, "max_completion_length": 4, "learning_rate": 0.1}

    short = {"max_length": 24, "dtype": "float32"}

    def named(folder):
        return json.dumps(
            {"class_path": "lit_merge.models.language.CausalNetwork", "init_args": {"path": folder, **short}}
        )

    def run(name, folder, output, settings, *more):
        line = ["trl", "--config", str(CONFIGS / f"trl/llama2_{name}.yaml"), "--network", named(folder)]
        line += ["--source", json.dumps(source), "--settings", json.dumps(settings), "--output", output, *more]
        assert main(line) == 0, capsys.readouterr().err

    supervised = {key: value for key, value in tiny.items() if key not in ("num_generations", "max_completion_length")}
    run("sft", "llama", "runs/sft", supervised)
    whole = ["merge", "--vectors", "[runs/sft]", "--base", "llama", "--recipe", "task_arithmetic"]
    assert main([*whole, "--settings", "{coefficient: 1.0}", "--output", "runs/sft_model"]) == 0
    rewards = {"helpful": {"class_path": NAME}, "faithful": {"class_path": NAME, "init_args": {"words": 6}}}
    for name, reward in rewards.items():
        run(name, "runs/sft_model", f"runs/{name}", tiny, "--rewards", json.dumps({name: reward}))
    capsys.readouterr()
    sources = dict.fromkeys(rewards, source)
    for parts, output in (([], "soup"), (["--parts", "[Interpolate]"], "plain")):
        line = ["merge", "--config", str(CONFIGS / "merge/rewarded_soup_llama2.yaml"), "--output", output]
        line += ["--vectors", "[runs/helpful, runs/faithful]", "--network", named("runs/sft_model"), *parts]
        line += ["--search.rewards", json.dumps(rewards), "--search.max_new_tokens", "6"]
        line += ["--search.values", "[0.0, 0.5, 1.0]", "--data.sources", json.dumps(sources)]
        assert main(line) == 0, capsys.readouterr().err
        found = json.loads((tmp_path / output / "search.json").read_text())
        assert found["hypervolume"] >= 0
        assert ("LiNeS" in found["transform"]) == (output == "soup")
        assert [point["fields"]["Interpolate.fraction"] for point in found["points"]] == [0.0, 0.5, 1.0]
        opened = CausalNetwork(output)  # as from_pretrained opens it
        assert opened.fingerprint != network.fingerprint
