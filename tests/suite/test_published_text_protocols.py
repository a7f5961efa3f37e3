"""The published suites of texts: their papers' numbers, and files from end to end on tiny copies of the real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from builders.language_folders import language_folder
from builders.published_texts import write_text_task
from builders.text_tables import character_tokenizer

from lit_merge.callbacks import ExtractTaskVector
from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.data.published.text_registry import TEXT_SUITES, TEXT_TASKS
from lit_merge.models import Network
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.suite.objects import build
from lit_merge.suite.settings import combine
from lit_merge.transforms.parts import resolve_transform
from lit_merge.vectors import TaskVector, TaskVectors

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
COMMANDS = {"t5_7": "paws quartz", "glue8_roberta": "stsb cola", "toxicity": "civil_comments wikitext103"}
OBJECTS = {
    "glue4_t5": "rte",
    "glue7_gpt2": "rte cola",
    "glue8_flan_t5": "stsb qnli",
    "nli6": "sick rte",
    "t5_11": "ropes quail",
}


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


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """``prepared(name, tasks)``: a suite's configuration with a tiny network, and tiny files of the real format."""
    monkeypatch.chdir(tmp_path)

    def prepare(name: str, tasks: str) -> dict:
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        chosen = [f"{name}-{task}" for task in tasks.split()]
        for task in chosen:
            write_text_task(tmp_path / "data", TEXT_TASKS[task], count=300 if name == "glue4_t5" else 40)
        kind = "gpt2" if name == "glue7_gpt2" else MODELS[config["network"]["class_path"].rpartition(".")[2]]
        lengths = {"roberta": {"max_position_embeddings": 140}, "gpt2": {"n_positions": 1024}}.get(kind, {})
        language_folder(tmp_path / "model", kind, vocab_size=140, **lengths)
        character_tokenizer().save_pretrained(tmp_path / "model")
        config["network"]["init_args"] |= {"path": "model", **({"max_length": 128} if name == "toxicity" else {})}
        config["fit"]["data"]["init_args"]["batch_size"] = 4
        config["tasks"] = chosen
        return config

    return prepare


@pytest.mark.parametrize("name", COMMANDS)
def test_from_end_to_end(name: str, prepared, capfd) -> None:
    """Both kinds of head, numbers, ranked answers, language modelling: fine-tuned, merged, evaluated."""
    config = prepared(name, COMMANDS[name])
    recipe = next(iter(config["recipes"]))
    if name == "toxicity":
        config["recipes"][recipe]["search"]["values"] = [0.0, 0.5, 1.0]
    config["fit"]["trainer"] = {"max_steps": 1, "precision": "32-true"}
    config["recipes"] = {recipe: config["recipes"][recipe]}
    Path("suite.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["suite", "--config", "suite.yaml", "--output", "runs/S"]) == 0, capfd.readouterr().err[-2000:]
    results = json.loads(Path("runs/S/results.json").read_text(encoding="utf-8"))
    merged = results["seeds"][str(config["seeds"][0])]["merged"][recipe]
    assert list(merged["accuracy"]) == [task for task in config["tasks"] if task not in config.get("control", [])]
    if "control" in config:
        found = json.loads(next(Path("runs/S").rglob("merged-search.json")).read_text(encoding="utf-8"))
        control, kept = config["control"][0], found["perplexities_of_base"]
        allowed = [one for one in found["perplexities"] if one[control] <= kept[control] / 0.95]
        chosen_at = found["perplexities"][found["chosen"]]
        assert chosen_at == max(allowed, key=lambda one: one[config["tasks"][0]])
        assert list(merged["perplexity"]) == list(results["zero_shot_perplexity"]) == config["tasks"]
        controls = merged["control_accuracy"], results["zero_shot_control_accuracy"]
        logged = [_logged(stage) for stage in (f"seed-42/test/{recipe}", "zero-shot")]
        expected = [{control: round(one[f"test/{control}/accuracy"], 6)} for one in logged]
        assert list(controls) == expected
    if name == "glue8_roberta":  # the merge is judged by the heads that were trained
        stage = yaml.safe_load(Path(f"runs/S/seed-0/test/{recipe}/stage.yaml").read_text(encoding="utf-8"))
        heads = stage["model"]["init_args"]["network"]["init_args"]["heads"]
        assert heads == "runs/S/seed-0/fit/{task}/task_vector.head.safetensors"
        assert all(Path(heads.replace("{task}", task)).is_file() for task in config["tasks"])
        metrics = json.loads(Path(f"runs/S/seed-0/test/{recipe}/test_metrics.json").read_text(encoding="utf-8"))
        of_numbers = results["seeds"]["0"]
        for found, logged in (
            (merged["spearman"], metrics["test/glue8_roberta-stsb/spearman"]),
            (of_numbers["individual_spearman"], _logged("seed-0/individual/glue8_roberta-stsb")["test/spearman"]),
            (results["zero_shot_spearman"], _logged("zero-shot")["test/glue8_roberta-stsb/spearman"]),
        ):
            assert found == {"glue8_roberta-stsb": pytest.approx(logged, abs=1e-6, nan_ok=True)}


def _logged(stage: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(Path(f"runs/S/{stage}/test_metrics.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", OBJECTS)
def test_the_objects_of_a_suite_from_end_to_end(name: str, prepared, silent_trainer, tmp_path) -> None:
    """As above without the commands, which all suites have in common; every recipe that needs no data."""
    config = prepared(name, OBJECTS[name])
    settings, heads = config["fit"]["model"]["init_args"], []

    def network():
        own = {"init_args": {"heads": "{task}/task_vector.head.safetensors"} if heads else {}}
        return build("network", Network, combine(config["network"], own))

    for task in config["tasks"]:
        module = FineTuneModule(network=network(), **settings)
        trainer = silent_trainer(
            max_steps=1, limit_val_batches=1, callbacks=[ExtractTaskVector()], default_root_dir=task
        )
        trainer.fit(module, datamodule=TaskDataModule(task=task, root="data", **config["fit"]["data"]["init_args"]))
    heads += tmp_path.glob("*/task_vector.head.safetensors")
    assert len(heads) == (2 if name == "glue7_gpt2" else 0)
    vectors = TaskVectors([TaskVector.load(f"{task}/task_vector.safetensors") for task in config["tasks"]])
    for recipe in config["recipes"].values():
        if "learned" not in recipe:
            transform = resolve_transform(recipe.get("recipe"), recipe.get("settings"), None, recipe.get("parts"), None)
            merged = transform(vectors).single()
            assert merged.norm() > 0
    merged.save("merged.safetensors")
    callbacks = [
        build("callbacks", object, one) for one in config.get("test", {}).get("trainer", {}).get("callbacks", ())
    ]
    trainer = silent_trainer(limit_test_batches=2, callbacks=callbacks)
    judge = MultiTaskModule(network=network(), task_vector="merged.safetensors")
    trainer.test(judge, datamodule=MultiTaskDataModule(tasks=config["tasks"], root="data"), verbose=False)
    assert {f"test/{task}/accuracy" for task in config["tasks"]} <= set(trainer.callback_metrics)
    if callbacks:
        generated = json.loads((tmp_path / "run/generation.json").read_text())
        assert generated["settings"]["do_sample"] is False
        assert config["tasks"][0] in generated["results"]
