"""Heads of a task's own against transformers' models for sequence classification, and their training on numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from builders.language_folders import VOCABULARY, in_double, tokenizer

from lit_merge.commands.main import main
from lit_merge.errors import LitMergeError
from lit_merge.metrics import spearman
from lit_merge.models.language import TextEncoderNetwork
from lit_merge.models.language.classifiers import TaskHead, TwoLayerClassifier, TwoLayerRegressor

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, "last"),
    "llama": ("Llama", {**SMALL, "max_position_embeddings": 32}, "last"),
    "roberta": ("Roberta", {**SMALL, "max_position_embeddings": 40}, "cls"),
    "bert": ("Bert", {**SMALL, "max_position_embeddings": 32}, "cls"),
}
CLASSES = ("no", "yes", "not sure")


def published(folder, name, labels=3, **settings):
    """A folder as fine-tunes for classification are published, float64, and its model."""
    prefix, own, _ = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, num_labels=labels, **own, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = in_double(getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval())
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer("encoder").save_pretrained(folder)
    return model


def opened(folder, name, **settings):
    network = TextEncoderNetwork(str(folder), dtype="float64", pooling=MODELS[name][2], head="classifier", **settings)
    in_double(network.module.of_transformers)
    ids = network.preprocessing.encode(["a b c w3 d", "b", "c d e"]).input_ids
    return network, network.preprocessing.padded(ids)[0]


def task(classes=CLASSES, **settings):
    return SimpleNamespace(name="own", classes=classes, templates=("{}",), **settings)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = published(tmp_path, name)
    network, inputs = opened(tmp_path, name, heads={"own": str(tmp_path)})
    head = network.head(task())
    assert isinstance(head, TwoLayerClassifier) == (name in ("bert", "roberta"))
    with torch.no_grad():
        expected = model(input_ids=inputs[0], attention_mask=inputs[1]).logits
        torch.testing.assert_close(head(network.module(*inputs)), expected, rtol=0, atol=1e-10)
    head.save(tmp_path / "head.safetensors")
    again = TaskHead.load(tmp_path / "head.safetensors")
    assert type(again) is type(head)
    assert again.classes == CLASSES
    assert all(
        torch.equal(one.float(), other) for one, other in zip(head.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_one_number_and_its_squared_error(name, tmp_path):
    model = published(tmp_path, name, labels=1)
    network, inputs = opened(tmp_path, name, heads=f"{tmp_path.parent}/{{task}}")
    head = network.head(SimpleNamespace(name=tmp_path.name, classes=(), regression=True))
    targets = torch.tensor([0.25, 5.0, -1.0])
    batch = SimpleNamespace(targets=targets)
    with torch.no_grad():
        logits = head(network.module(*inputs))
        known = {"input_ids": inputs[0][:2], "attention_mask": inputs[1][:2], "labels": targets[:2].double()}
        expected = model(**known)
    torch.testing.assert_close(logits[:2], expected.logits, rtol=0, atol=1e-10)
    losses = head.loss(logits, batch)
    torch.testing.assert_close(losses[:2].mean(), expected.loss, rtol=0, atol=1e-10)
    assert losses[2] == 0
    assert [len(one) for one in head.numbers(logits, batch)] == [2, 2]
    right, counted = head.hits(torch.tensor([[0.7], [5.6], [1.0]]), batch)
    assert (right.tolist(), counted.tolist()) == ([1, 0, 0], [1, 1, 0])


def test_classes_of_a_folder_are_brought_into_the_tasks_order(tmp_path):
    published(tmp_path, "gpt2", id2label={0: "YES", 1: "no", 2: "not_sure"})
    network, _ = opened(tmp_path, "gpt2", heads={"own": str(tmp_path)})
    plain = network.head(task(("yes", "no", "not sure")))
    assert torch.equal(network.head(task()).weight, plain.weight[[1, 0, 2]])
    assert refused(network, task(("no", "yes", "perhaps"))) == (
        f"{tmp_path}: expected a classifier of the classes no, yes, perhaps, got YES, no, not_sure. Give the file of "
        "this task."
    )


def refused(network, own):
    with pytest.raises(LitMergeError) as error:
        network.head(own)
    return str(error.value)


def test_refusals(tmp_path):
    published(tmp_path, "gpt2")
    network, _ = opened(tmp_path, "gpt2", heads={"own": str(tmp_path)})
    assert refused(network, task(("no", "yes"))) == (
        f"{tmp_path}: expected a head of the 2 classes no, yes for own, got one of 3 outputs. Give the folder of this "
        "task."
    )
    assert "expected a head of one number for own, got one of 3 outputs." in refused(network, task((), regression=True))
    config = json.loads((tmp_path / "config.json").read_text())
    network.module.of_transformers.save_pretrained(tmp_path)  # without the last layer
    assert refused(network, task()) == (
        f"{tmp_path}: expected the head of a GPT-2, Llama, RoBERTa or BERT for sequence classification, got a gpt2 "
        "without one. Train the task's head instead."
    )
    (tmp_path / "config.json").unlink()
    assert "got no config.json that can be read. Give" in refused(network, task())
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = TextEncoderNetwork(str(tmp_path))
    assert refused(network, task((), regression=True)) == (
        "own: expected a head of the task's own for its number, got class_names. Set head of the network to "
        "classifier or two_layer."
    )
    network = TextEncoderNetwork(str(tmp_path), head="two_layer")
    assert type(network.head(task())) is TwoLayerClassifier
    assert network.trains_heads


def test_a_task_whose_label_is_a_number_from_end_to_end(tmp_path, monkeypatch, own_cache):
    """Fine-tuned, tested and predicted with the head of its own, through the command line."""
    monkeypatch.chdir(tmp_path)
    published("model", "bert")
    words = "abcdefgh"
    rows = [f"{' '.join(words[: 1 + i % 8])} w{i % 9},{(i % 8) / 2}" for i in range(60)]
    (tmp_path / "sizes.csv").write_text("text,size\n" + "\n".join(rows) + "\n")
    network = "{class_path: lit_merge.models.language.TextEncoderNetwork, init_args: {path: model, head: two_layer%s}}"
    data = ["--data.source={class_path: lit_merge.data.TextTask, init_args: {path: sizes.csv, number_column: size, "]
    data = [data[0] + "repeated: keep}}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    fit = ["fit", f"--model.network={network % ''}", *data, "--model.learning_rate=1e-2", "--trainer.max_steps=30"]
    assert main([*fit, "--data.batch_size=8", "--output=runs/fit"]) == 0
    head = TaskHead.load("runs/fit/task_vector.head.safetensors")
    assert type(head) is TwoLayerRegressor
    trained = network % ", heads: {sizes: runs/fit/task_vector.head.safetensors}"
    model = [f"--model.network={trained}", "--model.task_vector=runs/fit/task_vector.safetensors", *data]
    assert main(["test", *model, "--output=runs/test"]) == 0
    metrics = json.loads((tmp_path / "runs/test/test_metrics.json").read_text())
    assert main(["predict", *model, "--output=runs/predict"]) == 0
    header, *found = (tmp_path / "runs/predict/predictions.csv").read_text().splitlines()
    assert header == "example,number"
    sizes = {f"sizes.csv/{i + 1}": float(row.partition(",")[2]) for i, row in enumerate(rows)}
    pairs = torch.tensor([[float(row.split(",")[1]), sizes[row.split(",")[0]]] for row in found], dtype=torch.float64)
    assert metrics["test/spearman"] == pytest.approx(float(spearman(*pairs.T)))
    assert metrics["test/spearman"] > 0.5
    assert metrics["test/loss"] == pytest.approx(float((pairs[:, 0] - pairs[:, 1]).square().mean()), rel=1e-3)
