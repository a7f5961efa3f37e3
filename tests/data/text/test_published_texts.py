"""Every task of every published suite on tiny files of the real format; what is said of it, and what is missing."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.published_texts import row_of, write_text_task
from builders.text_tables import characters

from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.data.published import checking
from lit_merge.data.published.registry import REGISTRY, SUITES
from lit_merge.data.published.task import named_source
from lit_merge.data.published.text_registry import TEXT_SUITES, TEXT_TASKS
from lit_merge.data.published.texts import PublishedText
from lit_merge.errors import DataError

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

PINNED = {
    "glue4_t5": "cola sst2 mrpc rte",
    "glue7_gpt2": "cola mnli mrpc qnli qqp rte sst2",
    "glue8_flan_t5": "cola mnli mrpc qnli qqp rte sst2 stsb",
    "glue8_roberta": "cola sst2 mrpc stsb qqp mnli qnli rte",
    "nli6": "snli mnli sick qnli rte scitail",
    "t5_11": "paws qasc quartz story_cloze wiki_qa winogrande wsc cosmos_qa social_iqa quail ropes",
    "t5_7": "paws qasc quartz story_cloze wiki_qa winogrande wsc",
    "toxicity": "civil_comments wikitext103",
}
KINDS = {"encoder_decoder": "encoder_decoder", "causal": "causal", "classifier": "encoder"}


def read(numbers) -> str:
    return "".join(chr(number - 4) for number in numbers if number > 12)


def small(entry):
    """With as many rows held out as a tiny file allows."""
    splits = {
        split: {key: min(value, 10) if type(value) is int and key != "seed" else value for key, value in one.items()}
        if isinstance(one, dict) and entry.suite == "glue4_t5"
        else one
        for split, one in entry.task["splits"].items()
    }
    return replace(entry, task={**entry.task, "splits": splits, "max_length": None})


def test_suites_are_those_of_the_literature():
    found = {name: [task.partition("-")[2] for task in suite.tasks] for name, suite in TEXT_SUITES.items()}
    assert found == {name: tasks.split() for name, tasks in PINNED.items()}
    assert set(TEXT_TASKS) == {task for suite in TEXT_SUITES.values() for task in suite.tasks}
    assert not set(TEXT_SUITES) & set(SUITES)
    assert not set(TEXT_TASKS) & set(REGISTRY)
    for name, suite in TEXT_SUITES.items():
        assert suite.network in KINDS
        assert all((suite.title, suite.citation, suite.evaluation, suite.source, suite.notes)), name


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_facts_are_complete(name):
    entry = TEXT_TASKS[name]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)
    assert entry.megabytes > 0
    assert entry.citation
    assert set(entry.task["splits"]) == {"train", "val", "test"}
    stored = {one if isinstance(one, str) else one["of"] for one in entry.task["splits"].values()}
    assert stored <= set(entry.counts)
    if entry.suite in ("t5_7", "t5_11"):  # 32 validation texts, where test labels are not public
        test = entry.task["splits"]["test"]
        shuffled = {"order": "python", "seed": 42, "start": 32}
        assert test in ("test", "challenge") or {key: test[key] for key in test if key != "of"} == shuffled


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_on_tiny_files_of_the_real_format(name, tmp_path):
    entry = TEXT_TASKS[name]
    write_text_task(tmp_path, entry)
    # Another configuration of the same repository beside it changes nothing.
    if entry.hub == "nyu-mll/glue":
        other = next(one for one in TEXT_TASKS.values() if one.hub == entry.hub and one.hub_config != entry.hub_config)
        write_text_task(tmp_path, other, 5)
    task = PublishedText(small(entry), tmp_path)
    kind = KINDS[TEXT_SUITES[entry.suite].network]
    network = characters(kind, 64 if entry.task.get("pack") else 4000)
    parts = {split: task.split(split, network) for split in ("train", "val", "test")}
    batches = {split: part.__getitems__([0, len(part) - 1, -1]) for split, part in parts.items()}
    assert all(len(part) >= 3 for part in parts.values())
    if kind == "encoder":
        batch = batches["train"]
        assert batch.targets.dtype == (torch.float32 if "number_column" in entry.task else torch.int64)
        assert batch.targets[-1] == -1
        first = parts["train"].texts[0]
        assert read(parts["train"].input_ids[0]) == (first if isinstance(first, str) else "".join(first))
    elif entry.suite == "toxicity":
        assert not task.classes
        if entry.task.get("pack"):
            assert batches["test"].inputs[0].shape == (3, 64)
        else:
            assert len(parts["test"]) == 20  # half of the comments are toxic
    elif task.classes:
        assert batches["test"].ranked
        assert not batches["train"].ranked
        answers = [[read(answer) for answer in own] for own in parts["test"].answer_ids]
        assert answers == parts["test"].answers
        right = int(parts["train"].labels[0])
        assert read(parts["train"].target_ids[0]) == parts["train"].answers[0][right]
    else:
        assert read(parts["train"].target_ids[0]) == parts["train"].targets[0]
        assert not batches["test"].ranked


def test_where_the_programs_shuffle(tmp_path):
    entry = TEXT_TASKS["t5_7-winogrande"]
    write_text_task(tmp_path, entry, 100)
    task, network = named_source(entry.name, tmp_path), characters("encoder_decoder")
    places = list(range(100))
    random.Random(42).shuffle(places)
    shown = [row_of(entry, "validation", place)["sentence"] for place in places]
    val, test = task.split("val", network), task.split("test", network)
    assert [text.partition(" In the previous")[0] for text in (*val.texts, *test.texts)] == shown
    assert len(val) == 32
    roberta = TEXT_TASKS["glue8_roberta-rte"]
    write_text_task(tmp_path, roberta, 50)
    held = named_source(roberta.name, tmp_path).split("val", characters("encoder"))
    order = np.random.RandomState(0).permutation(50)[45:]
    assert [text[0] for text in held.texts] == [f"sentence1 train {place}." for place in order]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("t5_7-wsc", "converted"), ("t5_7-story_cloze", "authors"), ("glue4_t5-rte", "saved")],
)
def test_other_layouts(name, layout, tmp_path):
    entry = TEXT_TASKS[name]
    write_text_task(tmp_path, entry, layout=layout)
    write_text_task(tmp_path / "hub", entry)
    network = characters("encoder_decoder")
    one, two = (PublishedText(small(entry), root).split("test", network) for root in (tmp_path, tmp_path / "hub"))
    assert (one.texts, one.labels.tolist(), one.answers) == (two.texts, two.labels.tolist(), two.answers)


def test_the_hubs_cache(tmp_path, monkeypatch):
    entry = TEXT_TASKS["t5_7-paws"]
    snapshot = tmp_path / f"datasets--{entry.hub.replace('/', '--')}" / "snapshots" / "abc"
    write_text_task(tmp_path / "made", entry)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "made" / entry.folder).rename(snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert len(named_source(entry.name, tmp_path / "nothing").split("test", characters("encoder_decoder"))) == 40


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(DataError) as refused:
        named_source("glue4_t5-cola", tmp_path).prepare()
    assert re.fullmatch(
        rf"glue4_t5-cola: expected CoLA \(GLUE\) \(nyu-mll/glue, cola\) in one of these places "
        rf"\({tmp_path}/glue, {tmp_path}/nyu-mll/glue, {tmp_path}/glue4_t5-cola; "
        rf".*/datasets--nyu-mll--glue/snapshots; .*/nyu-mll___glue\), got none of them\. "
        rf"Run: lit-merge data prepare glue4_t5-cola --root {tmp_path} \(downloads about 0\.4 MB\), or set "
        r"root or LIT_MERGE_DATA to the folder that holds it\.",
        str(refused.value),
    )
    with pytest.raises(DataError, match=r"got none of them\. Ask the authors for it \(https://cs.rochester.edu"):
        named_source("t5_7-story_cloze", tmp_path).split("train", characters("encoder_decoder"))
    # A split that is missing of a data set that is there.
    entry = TEXT_TASKS["t5_7-paws"]
    write_text_task(tmp_path, entry)
    (tmp_path / entry.folder / "labeled_final" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"expected the split test, got none\. Correct splits.test"):
        named_source(entry.name, tmp_path).split("test", characters("encoder_decoder"))


def test_prepare_and_check(tmp_path, monkeypatch, capsys):
    """From a Hub that writes files as the real one does; counts of the literature are those of the tiny files here."""
    entry = replace(TEXT_TASKS["glue4_t5-rte"], counts={"train": 30, "validation": 30})
    monkeypatch.setattr(checking, "TEXT_TASKS", {**TEXT_TASKS, entry.name: entry})
    asked = []

    def snapshot_download(repository, local_dir, allow_patterns, revision, repo_type):
        asked.append((repository, repo_type, allow_patterns))
        write_text_task(local_dir.parent, entry, 30)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    root = ["--root", str(tmp_path)]
    assert main(["data", "prepare", entry.name, *root]) == 0
    assert asked == [
        (
            "nyu-mll/glue",
            "dataset",
            ["rte/*train*.parquet", "*train*.tar", "rte/*validation*.parquet", "*validation*.tar"],
        )
    ]
    assert f"{entry.name}: 30 train, 30 val rows of 2 classes in {tmp_path}/glue/rte" in capsys.readouterr().out
    assert main(["data", "prepare", entry.name, *root]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["data", "check", entry.name, *root]) == 0
    assert re.search(rf"{entry.name}\s+complete\s+30\s+30\s+–\s+2", capsys.readouterr().out)
    write_text_task(tmp_path, entry, 29)
    assert main(["data", "check", entry.name, *root]) == 1
    assert "expected the rows of the literature" in capsys.readouterr().out
    assert main(["data", "prepare", "t5_7-story_cloze", *root]) == 1
    assert "Ask the authors for it" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    assert main(["data", "list", "toxicity"]) == 0
    assert re.search(r"toxicity-wikitext103\s+–\s+1,801,350\s+3,760\s+4,358\s+0.313", capsys.readouterr().out)


def test_by_name_in_data_modules(tmp_path):
    for name in TEXT_SUITES["t5_7"].tasks:
        write_text_task(tmp_path, TEXT_TASKS[name])
    data = MultiTaskDataModule(
        tasks=["t5_7"], root=str(tmp_path), preprocessing=characters("encoder_decoder"), batch_size=4
    )
    assert data.task_names == TEXT_SUITES["t5_7"].tasks
    data.setup("validate")
    assert len(data.val_dataloader()) == 7
    one = TaskDataModule("t5_7-paws", root=str(tmp_path), other_tasks=["t5_7-qasc"])
    assert (one.name, one.classes) == ("t5_7-paws", ("no", "yes"))
    with pytest.raises(Exception, match=r"got 't5_7-pause'\. Did you mean t5_7-paws\?"):
        TaskDataModule("t5_7-pause")
