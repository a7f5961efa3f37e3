"""The published suites of texts: their papers' numbers, and files from end to end on tiny copies of the real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from builders.language_folders import language_folder
from builders.published_texts import write_text_task
from builders.text_tables import character_tokenizer

from lit_merge.commands.main import main
from lit_merge.data.published.text_registry import TEXT_SUITES, TEXT_TASKS

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

CONFIGS = Path(__file__).parents[2] / "configs/suite"
# rate, weight decay, texts per step, seed
PROTOCOLS = {
    "glue4_t5": (1e-5, 0.01, 16, 42),
    "glue7_gpt2": (5e-5, 0.0, 8, 0),
    "glue8_flan_t5": (4e-5, 0.0, 16, 0),
    "glue8_roberta": (1e-5, 0.01, 16, 0),
    "nli6": (5e-6, 0.01, 128, 42),
    "t5_11": (1e-4, 0.0, 1024, 42),
    "t5_7": (1e-4, 0.0, 1024, 42),
    "toxicity": (1e-5, 0.1, 16, 42),
}
MODELS = {"Seq2SeqNetwork": "t5", "CausalNetwork": "gpt2", "TextEncoderNetwork": "roberta"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_numbers(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    fit = config["fit"]
    settings, data, trainer = fit["model"]["init_args"], fit["data"]["init_args"], fit["trainer"]
    texts = data["batch_size"] * trainer.get("accumulate_grad_batches", 1)
    assert (settings["learning_rate"], settings["weight_decay"], texts, config["seeds"][0]) == PROTOCOLS[name]
    assert set(config["tasks"]) <= set(TEXT_SUITES[name].tasks)
    assert tuple(config["tasks"]) == TEXT_SUITES[name].tasks
    assert config.get("control", []) == (["toxicity-wikitext103"] if name == "toxicity" else [])
    assert config["name"] == name


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("t5_7", "paws quartz"), ("glue8_roberta", "rte cola"), ("toxicity", "civil_comments wikitext103")],
)
def test_from_end_to_end(name: str, tasks: str, tmp_path, monkeypatch, capfd) -> None:
    """Both kinds of head, ranked answers, language modelling: fine-tuned, merged, evaluated."""
    monkeypatch.chdir(tmp_path)
    chosen = [f"{name}-{task}" for task in tasks.split()]
    for task in chosen:
        write_text_task(tmp_path / "data", TEXT_TASKS[task])
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = MODELS[config["network"]["class_path"].rpartition(".")[2]]
    lengths = {"roberta": {"max_position_embeddings": 140}, "gpt2": {"n_positions": 1024}}.get(kind, {})
    language_folder(tmp_path / "model", kind, vocab_size=140, **lengths)
    character_tokenizer().save_pretrained(tmp_path / "model")
    shorter = {"max_length": 128} if name == "toxicity" else {}
    network = {**config["network"], "init_args": {**config["network"]["init_args"], "path": "model", **shorter}}
    recipe = next(iter(config["recipes"]))
    if name == "toxicity":
        config["recipes"][recipe]["search"]["values"] = [0.0, 0.5, 1.0]
    config["fit"]["trainer"] = {"max_steps": 1, "precision": "32-true"}
    config["fit"]["data"]["init_args"]["batch_size"] = 4
    config |= {"tasks": chosen, "network": network, "recipes": {recipe: config["recipes"][recipe]}}
    Path("suite.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["suite", "--config", "suite.yaml", "--output", "runs/S"]) == 0, capfd.readouterr().err[-2000:]
    results = json.loads(Path("runs/S/results.json").read_text(encoding="utf-8"))
    merged = results["seeds"][str(config["seeds"][0])]["merged"][recipe]
    assert list(merged["accuracy"]) == [task for task in chosen if task not in config.get("control", [])]
    if "control" in config:
        found = json.loads(next(Path("runs/S").rglob("merged-search.json")).read_text(encoding="utf-8"))
        control, kept = config["control"][0], found["perplexities_of_base"]
        allowed = [one for one in found["perplexities"] if one[control] <= kept[control] / 0.95]
        chosen_at = found["perplexities"][found["chosen"]]
        assert chosen_at == max(allowed, key=lambda one: one[chosen[0]])
        assert list(merged["perplexity"]) == list(results["zero_shot_perplexity"]) == chosen
