"""A task from texts: splits, classes, targets and answers, and what each kind of network is given of them."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from builders.batch_recorder import Recorder, quiet_trainer
from builders.text_tables import tokenization, write_rows

from lit_merge.data import MultiTaskDataModule, OtherBatch, TaskDataModule, TextBatch, TextTask
from lit_merge.data.other_tasks import OtherImages
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.models import Preprocessing

pytest.importorskip("transformers")

WORDS = [f"w{number}" for number in range(60)]
GOOD = [{"text": f"good {word}", "label": "pos"} for word in WORDS[:30]]
BAD = [{"text": f"bad {word} indeed", "label": "neg"} for word in WORDS[30:]]
ROWS = [row for pair in zip(GOOD, BAD, strict=True) for row in pair]
WHOLE = (1.0, 0.0, 0.0)
ALL = "good bad indeed pos neg yes no Is it ? " + " ".join(WORDS)


def encoder(max_length: int = 8):
    return tokenization("encoder", ALL, max_length)


def words(task: TextTask, split: str) -> list[str]:
    return list(task.split(split, encoder()).texts)


# Splits


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_one_file_is_divided_by_the_hash_of_its_texts(tmp_path, suffix):
    task = TextTask(write_rows(tmp_path / f"reviews{suffix}", ROWS), seed=3)
    parts = {split: words(task, split) for split in ("train", "val", "test")}
    assert {split: len(texts) for split, texts in parts.items()} == {"train": 48, "val": 6, "test": 6}
    assert set().union(*parts.values()) == {row["text"] for row in ROWS}
    assert (task.name, task.classes, task.templates) == ("reviews", ("neg", "pos"), ("{}",))
    assert task.files == [tmp_path / f"reviews{suffix}"]
    # Where a row stands, and in which format, does not matter.
    other = TextTask(rows=ROWS[::-1], seed=3)
    assert {split: set(words(other, split)) for split in parts} == {split: set(own) for split, own in parts.items()}
    assert set(words(TextTask(rows=ROWS, seed=4), "test")) != set(parts["test"])
    # A file's own order is kept, and a row's name says where it is.
    first = task.split("train", encoder())
    place = 1 + [row["text"] for row in ROWS].index(first.texts[0])
    assert first.names[0] == f"reviews{suffix}/{place}"


def test_equal_texts_go_to_one_split():
    rows = [*ROWS, *ROWS[:20], {"text": ROWS[0]["text"], "label": "neg"}]
    task = TextTask(rows=rows, fractions=(0.4, 0.3, 0.3))
    with pytest.warns(
        UserWarning, match=r"^rows: 21 of 81 rows repeat the text of another one, .*; 1 texts have several"
    ):
        parts = [set(words(task, split)) for split in ("train", "val", "test")]
    assert not parts[0] & parts[1]
    assert not parts[1] & parts[2]
    assert not parts[0] & parts[2]
    assert sum(len(words(task, split)) for split in ("train", "val", "test")) == 81


@pytest.mark.parametrize("layout", ["files", "folder", "saved", "rows"])
def test_splits_that_are_given(tmp_path, layout):
    parts = {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:]}
    if layout == "rows":
        task = TextTask(rows=parts)
    elif layout == "files":
        files = {name: write_rows(tmp_path / f"{name}.csv", rows) for name, rows in parts.items()}
        task = TextTask(files={"train": files["train"], "val": files["validation"], "test": files["test"]})
    elif layout == "folder":
        for name, rows in parts.items():
            write_rows(tmp_path / "all" / f"{name}.jsonl", rows)
        task = TextTask(tmp_path / "all")
    else:
        datasets = pytest.importorskip("datasets")
        made = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
        datasets.disable_progress_bars()
        datasets.DatasetDict(made).save_to_disk(str(tmp_path / "all"))
        task = TextTask(tmp_path / "all")
    assert [words(task, split) for split in ("train", "val", "test")] == [
        [row["text"] for row in rows] for rows in parts.values()
    ]


def test_validation_is_taken_from_train_and_test_may_be_missing():
    task = TextTask(rows={"train": ROWS})
    assert len(words(task, "train")) == 54
    assert len(words(task, "val")) == 6
    assert not set(words(task, "train")) & set(words(task, "val"))
    with pytest.raises(
        DataError, match=r"^texts: expected the split test in rows, got none\. Add it, name it in splits"
    ):
        words(task, "test")
    without = TextTask(rows={"train": ROWS}, fractions=(1.0, 0.0, 0.0))
    assert words(without, "val") == []
    assert len(without.split("val", encoder())) == 0


def test_parts_of_stored_splits():
    rows = {"train": ROWS[:40], "validation": ROWS[40:]}
    shuffled = {"of": "validation", "order": "python", "seed": 42}
    splits = {"train": "train", "val": {**shuffled, "stop": 5}, "test": {**shuffled, "start": 5}}
    task = TextTask(rows=rows, splits=splits)
    import random

    expected = [row["text"] for row in ROWS[40:]]
    random.Random(42).shuffle(expected)
    assert words(task, "val") + words(task, "test") == expected
    assert len(words(task, "val")) == 5
    order = np.random.RandomState(0).permutation(40)
    tenth = {"of": "train", "order": "numpy"}
    held = TextTask(rows=rows, splits={"train": {**tenth, "stop": 0.9}, "val": {**tenth, "start": 0.9}})
    assert words(held, "train") == [ROWS[row]["text"] for row in order[:36]]
    assert words(held, "val") == [ROWS[row]["text"] for row in order[36:]]
    with pytest.raises(DataError, match=r"^rows: expected the split dev, got none\. Correct splits.val"):
        words(TextTask(rows=rows, splits={"train": "train", "val": "dev"}), "val")


def test_texts_in_two_splits():
    rows = {"train": [*ROWS[:40], *ROWS[:4], ROWS[45]], "val": ROWS[39:46], "test": [*ROWS[45:], ROWS[0]]}
    with pytest.raises(DataError, match=r"^texts: expected no text in two splits, got 2 of 45 of train in val as well"):
        words(TextTask(rows=rows), "train")
    keep = TextTask(rows=rows, repeated="keep")
    assert [len(words(keep, split)) for split in rows] == [45, 7, 16]
    remove = TextTask(rows=rows, repeated="remove")
    with pytest.warns(UserWarning, match=r"left out [23] of 4[52] texts of train that are in (val|test)"):
        parts = [set(words(remove, split)) for split in rows]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert len(words(remove, "test")) == 16


# Classes


@pytest.mark.parametrize(
    ("cells", "classes", "names", "expected"),
    [
        ([1, 0, 1, 0], None, ("0", "1"), [1, 0, 1, 0]),
        (["10", "9", "10", "9"], None, ("9", "10"), [1, 0, 1, 0]),
        ([1, 0, 1, 0], ["negative", "positive"], ("negative", "positive"), [1, 0, 1, 0]),
        (["1", "0", "1", "0"], {"1": "yes", "0": "no"}, ("yes", "no"), [0, 1, 0, 1]),
        ([True, False, True, False], ["no", "yes"], ("no", "yes"), [1, 0, 1, 0]),
        ([2.0, 1.0, 2.0, 1.0], {"1": "a", "2": "b"}, ("a", "b"), [1, 0, 1, 0]),
        (["yes", "no", "yes", "no"], ["no", "yes"], ("no", "yes"), [1, 0, 1, 0]),
    ],
)
def test_labels(cells, classes, names, expected):
    rows = [{"text": f"good {WORDS[place]}", "label": cell} for place, cell in enumerate(cells)]
    task = TextTask(rows={"train": rows, "test": rows}, classes=classes, repeated="keep", fractions=(1.0, 0.0, 0.0))
    assert task.classes == names
    assert task.split("test", encoder()).labels.tolist() == expected


def test_numbers():
    rows = [{"text": f"good {word}", "score": score / 10} for score, word in enumerate(WORDS)]
    task = TextTask(rows=rows, number_column="score")
    examples = task.split("test", encoder())
    assert task.classes == ()
    assert examples.labels.dtype == torch.float32
    batch = examples.__getitems__([0, -1])
    assert batch.targets[1] == -1
    with pytest.raises(ConfigurationError, match=r"expected an encoder for number_column, got a language model"):
        task.split("test", tokenization("causal", ALL))
    with pytest.raises(DataError, match=r"expected numbers of at least 0 in score, got -1\. Shift them"):
        TextTask(rows=[{"text": "a b", "score": -1.0}] * 3, number_column="score", fractions=(1.0, 0, 0)).split(
            "train", encoder()
        )


# What networks are given


def test_an_encoder_is_given_classes():
    examples = TextTask(rows={"train": ROWS}, fractions=WHOLE).split("train", encoder())
    batch = examples.__getitems__([0, 1, -1])
    assert isinstance(batch, TextBatch)
    ids, mask = batch.inputs
    assert ids.shape == mask.shape == (3, 5)
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert ids[0].tolist()[:1] + ids[0].tolist()[3:] == [1, 2, 0]
    assert batch.targets.tolist() == [1, 0, -1]
    assert batch.indices.tolist() == [0, 1, -1]
    assert not batch.ranked
    assert not any(batch.select(torch.tensor([True, True, False])).fills[1:2])


def test_pairs_and_prompts():
    rows = [{"a": f"good {word}", "b": "bad", "label": place % 2} for place, word in enumerate(WORDS)]
    pair = TextTask(rows=rows, text_column=["a", "b"]).split("train", encoder())
    word = pair.texts[0][0].split()[1]
    assert pair.input_ids[0].tolist() == [1, 4, 4 + ALL.split().index(word), 2, 5, 2]
    prompt = TextTask(rows=rows, prompt="Is it {b} ? {a|upper|lower}").split("train", encoder())
    assert prompt.texts[0].startswith("Is it bad ? good w")


@pytest.mark.parametrize("kind", ["encoder_decoder", "causal"])
def test_language_models_are_given_targets_and_answers(kind):
    network = tokenization(kind, ALL)
    both = {"train": ROWS, "test": ROWS}
    given = {"prompt": "Is it {text} ?", "answers": {"pos": "yes", "neg": "no indeed"}}
    task = TextTask(rows=both, fractions=WHOLE, repeated="keep", **given)
    number = {word: 4 + place for place, word in enumerate(dict.fromkeys(ALL.split()))}
    train, test = task.split("train", network), task.split("test", network)
    batch = train.__getitems__([0, 1, -1])
    end = [2]
    assert batch.targets.tolist() == [
        [number["yes"], *end, -1],
        [number["no"], number["indeed"], *end],
        [-1, -1, -1],
    ]
    assert len(batch.inputs) == 3
    ranked = test.__getitems__([0, -1])
    assert ranked.ranked
    assert ranked.targets.tolist() == [test.labels[0].item(), -1]
    ended = end if kind == "encoder_decoder" else []
    expected = [[number["no"], number["indeed"], *ended], [number["yes"], *ended]]
    longest = max(map(len, expected))
    assert ranked.inputs[3][0].tolist() == [[*own, *[-1] * (longest - len(own))] for own in expected]
    assert ranked.inputs[2].shape == ranked.inputs[3].shape
    assert TextTask(rows=ROWS, answers_as="ranked").split("train", network).__getitems__([0]).ranked
    assert not TextTask(rows=ROWS, answers_as="target").split("test", network).__getitems__([0]).ranked


def test_free_targets_and_answers_of_every_row():
    rows = [
        {"question": f"good {word}", "choices": {"text": [f"{word} yes", "no"]}, "key": "AB"[place % 2], "answer": word}
        for place, word in enumerate(WORDS)
    ]
    network = tokenization("encoder_decoder", ALL)
    task = TextTask(rows=rows, prompt="{question} ?", target="answer")
    examples = task.split("train", network)
    assert list(examples.targets) == [text.split()[1] for text in examples.texts]
    assert task.classes == ()
    answers = ["{choices.text.0}", "{choices.text.1}"]
    chosen = TextTask(rows=rows, prompt="{question} ?", label_column="key", classes=["A", "B"], answers=answers)
    test = chosen.split("test", network)
    assert [own[1] for own in test.answers] == ["no"] * len(test)
    assert [own[0] for own in test.answers] == [f"{text.split()[1]} yes" for text in test.texts]
    with pytest.raises(ConfigurationError, match=r"expected a language model for target, got an encoder"):
        task.split("train", encoder())


def test_language_modelling_and_packing():
    network = tokenization("causal", ALL, 8)
    rows = [{"text": f"good {word} indeed"} for word in WORDS]
    plain = TextTask(rows=rows, label_column=None)
    batch = plain.split("train", network).__getitems__([0, 1, -1])
    assert batch.inputs[0].shape == (3, 4)
    assert batch.targets[0].tolist() == batch.inputs[0][0, 1:].tolist()
    assert (batch.targets[2] == -1).all()
    blocks = TextTask(rows={"train": rows}, label_column=None, pack=True, fractions=(1.0, 0.0, 0.0)).split(
        "train", network
    )
    stream = [
        number for row in rows for number in (*network.tokenizer(row["text"], add_special_tokens=False).input_ids, 2)
    ]
    assert len(blocks) == len(stream) // 8 == 30
    assert torch.cat(list(blocks.__getitems__(range(30)).inputs[0])).tolist() == stream[:240]
    long = TextTask(rows={"train": [{"text": " ".join(WORDS)}]}, label_column=None, pack=True, fractions=(1.0, 0, 0))
    several = long.split("train", network)  # more blocks than texts
    assert len(several) > 2
    parts = [several.subset([place]) for place in range(len(several))]
    assert len({part.digest() for part in parts}) == len(parts)
    assert parts[-1].__getitems__([0]).inputs[0].tolist() == several.__getitems__([len(several) - 1]).inputs[0].tolist()
    for one, message in (
        (tokenization("causal", ALL, 1000), r"expected at least one block of 1,000 tokens, got 240 in all texts"),
        (
            tokenization("encoder_decoder", ALL),
            r"pack: expected a causal language model with an end of text, got the kind",
        ),
    ):
        with pytest.raises((DataError, ConfigurationError), match=message):
            TextTask(rows={"train": rows}, label_column=None, pack=True, fractions=(1.0, 0, 0)).split("train", one)


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder", "causal"])
def test_nothing_is_told_of_unlabelled_texts(kind):
    data = TaskDataModule(
        source=TextTask(rows=ROWS), preprocessing=tokenization(kind, ALL), labelled=False, batch_size=4
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch.targets == -1).all()
    answers = {4 + ALL.split().index("pos"), 4 + ALL.split().index("neg")}
    assert not answers & set(batch.inputs[0].flatten().tolist())
    if kind == "encoder_decoder":
        assert batch.inputs[2].tolist() == [[0]] * 4


# Batches


def test_batches_of_different_lengths_are_joined():
    network = tokenization("encoder_decoder", ALL)
    task = TextTask(rows=ROWS, answers=["no", "yes indeed it"])
    train, test = task.split("train", network), task.split("test", network)
    first, second = train.__getitems__([0, 2]), train.__getitems__([1])
    other = OtherBatch(second.inputs, torch.tensor([0]), second.indices)
    for parts in ([first, second], [second, first], [first, other]):
        joined = TextBatch.join(parts)
        assert len(joined) == 3
        assert joined.fills == network.fills
        assert joined.inputs[0].shape == (3, 4)
        at = 0
        for part in parts:
            rows = slice(at, at + len(part))
            for whole, own, fill in zip(joined.inputs, part.inputs, network.fills, strict=False):
                kept = whole[rows][tuple(slice(0, size) for size in own.shape)]
                assert torch.equal(kept, own)
                assert (whole[rows].sum() - own.sum()) == fill * (whole[rows].numel() - own.numel())
            at += len(part)
    ranked = TextBatch.join([test.__getitems__([0]), test.__getitems__([1, 2, -1])])
    assert ranked.inputs[3].shape == (4, 2, 4)
    assert torch.equal(pickle.loads(pickle.dumps(ranked)).to("cpu").inputs[3], ranked.inputs[3])
    with pytest.raises(
        DataError, match=r"^batches: expected texts with answers to choose from in all tasks or in none"
    ):
        TextBatch.join([first, test.__getitems__([0])])


def test_digests_and_subsets():
    network = encoder()
    examples = TextTask(rows=ROWS).split("train", network)
    assert TextTask(rows=ROWS).split("train", network).digest() == examples.digest()
    assert TextTask(rows=ROWS).split("train", encoder(7)).digest() != examples.digest()
    some = examples.subset([3, 1])
    assert [some.texts, some.names, some.labels.tolist()] == [
        [examples.texts[3], examples.texts[1]], [examples.names[3], examples.names[1]], examples.labels[[3, 1]].tolist()
    ]  # fmt: skip
    assert torch.equal(some.__getitems__([0]).inputs[0], examples.__getitems__([3]).inputs[0])
    assert some.digest() != examples.digest()
    other = tokenization("causal", ALL)
    one, two = (TextTask(rows=ROWS, answers=given).split("test", other) for given in (["w1", "w2"], ["no", "yes"]))
    assert one.digest() != two.digest()
    assert TextTask(rows=ROWS).split("train", network) is not TextTask(rows=ROWS).split("train", network)
    task = pickle.loads(pickle.dumps(TextTask(rows=ROWS)))
    assert task.split("train", network).digest() == examples.digest()


@pytest.mark.parametrize(
    "cells",
    [
        [0.0, 1.0],  # as pandas makes of whole numbers in a column with a gap
        ["0", "1 "],
        [" 0", 1],
    ],
)
def test_spellings_of_one_label_are_one_class(cells):
    rows = [{"text": f"good {word}", "label": cells[place % 2]} for place, word in enumerate(WORDS)]
    task = TextTask(rows=rows)
    assert task.classes == ("0", "1")
    labels = [task.split(split, encoder()).labels for split in ("train", "val", "test")]
    assert torch.cat(labels).bincount().tolist() == [30, 30]
    named = TextTask(rows=rows, classes={0: "off", 1: "on"})
    assert named.classes == ("off", "on")
    assert torch.cat([named.split(split, encoder()).labels for split in ("train", "val", "test")]).sum() == 30


def test_truth_values_of_a_csv_have_names():
    rows = [{"text": f"good {word}", "label": ("true", "false")[place % 2]} for place, word in enumerate(WORDS)]
    task = TextTask(rows=rows, classes={True: "pos", False: "neg"})  # as YAML reads {true: pos, false: neg}
    assert task.split("train", encoder()).labels.unique().tolist() == [0, 1]
    dashes = [{**row, "label": ("--1", "--2")[place % 2]} for place, row in enumerate(rows)]
    assert TextTask(rows=dashes).classes == ("--1", "--2")
    with pytest.raises(DataError, match=r"expected labels among yes, no in the column label, got 'false', 'true'"):
        TextTask(rows=rows, classes={"yes": "pos", "no": "neg"}).split("train", encoder())


def test_what_a_network_cannot_tell_apart_or_write_is_refused():
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"expected answers that .* tells apart, got 'zz' and 'yy', which"):
            TextTask(rows=ROWS, answers={"neg": "zz", "pos": "yy"}).split(split, tokenization("causal", ALL))
    with pytest.raises(ConfigurationError, match=r"expected answers or a target, which an encoder-decoder writes, got"):
        TextTask(rows=ROWS, label_column=None).split("train", tokenization("encoder_decoder", ALL))


def test_large_tasks_are_tokenised_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_MERGE_CACHE", str(tmp_path))
    monkeypatch.setattr("lit_merge.data.text.encoding._WORTH_KEEPING", 10)
    first = TextTask(rows=ROWS).split("train", encoder(4))
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 1
    network = encoder(4)
    monkeypatch.setattr(network, "encode", None)
    monkeypatch.setattr("lit_merge.data.text.encoding._share_unknown", None)
    with pytest.warns(
        UserWarning, match=r"cut 24 of 48 texts to max_length 4 \(targets: 16\); the longest text has 5 tok"
    ):
        second = TextTask(rows=ROWS).split("train", network)
    assert [one.tolist() for one in first.input_ids] == [two.tolist() for two in second.input_ids]


# Data modules


def test_under_a_trainer(tmp_path):
    path = write_rows(tmp_path / "reviews.csv", ROWS)
    module = Recorder()
    data = TaskDataModule(path=path, batch_size=4, preprocessing=encoder(), class_names={"neg": "bad", "pos": "good"})
    assert (data.name, data.classes) == ("reviews", ("bad", "good"))
    quiet_trainer().fit(module, datamodule=data)
    assert [len(batch) for _, batch in module.trained] == [4] * 24
    new = write_rows(tmp_path / "new.csv", [{"text": "good w1"}, {"text": "bad w2"}])
    data = TaskDataModule(path=path, predict_path=new, preprocessing=encoder())
    batches = quiet_trainer().predict(Recorder(), datamodule=data)
    assert data.predict_names() == ["new.csv/1", "new.csv/2"]
    assert [label for batch in batches for label in batch.targets.tolist()] == [-1, -1]


def test_several_tasks_and_other_tasks(tmp_path):
    paths = {name: write_rows(tmp_path / f"{name}.csv", ROWS) for name in ("one", "two")}
    data = MultiTaskDataModule(paths=paths, batch_size=4, preprocessing=encoder())
    data.setup("fit")
    batch, *_ = next(iter(data.train_dataloader()))
    assert {name: len(part) for name, part in batch.items()} == {"one": 4, "two": 4}
    own = TaskDataModule(source=TextTask(rows=ROWS), preprocessing=encoder(), other_paths=paths, name="mine")
    assert list(own._known_others) == ["one", "two"]


@pytest.mark.parametrize("groups", [1, 3, 100])
def test_batches_of_similar_length(groups):
    draws = np.random.default_rng(0).integers(1, 6, 61)
    words = zip(draws, [*WORDS, "it"], strict=True)
    texts = [" ".join(["good"] * size + [word]) for size, word in words]
    rows = [{"text": text, "label": place % 2} for place, text in enumerate(texts)]
    task = TextTask(rows={"train": rows}, length_groups=groups, fractions=(1.0, 0.0, 0.0))
    data = TaskDataModule(source=task, preprocessing=encoder(20), batch_size=4)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch.indices.tolist() for batch in loader])
    assert epochs[0] == epochs[1] != epochs[2]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4] * 15
        assert len({index for batch in batches for index in batch}) == 60
    lengths = data.datasets["train"].lengths
    spread = np.mean([np.ptp(lengths[batch]) for batches in epochs for batch in batches])
    assert spread < {1: 4, 3: 2, 100: 0.7}[groups]
    # Two processes share the same global batches.
    from lit_merge.data.sampling import GroupedSampler

    one = list(GroupedSampler(data.datasets["train"], lengths, groups, 4, seed=0))
    halves = [list(GroupedSampler(data.datasets["train"], lengths, groups, 2, 2, rank, seed=0)) for rank in (0, 1)]
    together = [index for pair in zip(*halves, strict=True) for index in pair]
    assert together == one[:60]


# Bad input


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"text_column": "txt"}, r"^rows: expected the column txt of texts, got text, label\. Did you mean"),
        (ROWS, {"label_column": "class"}, r"expected the column class of labels, got text, label\. Set label_column"),
        (ROWS, {"prompt": "{0.__class__}"}, r"^prompt: expected fields that are columns of rows \(.*\), got '0'"),
        (ROWS, {"answers": {"pos": "yes", "maybe": "no"}}, r"^answers: expected one of each class .*, got 'maybe', w"),
        (ROWS, {"answers": {"pos": "yes"}}, r"^answers: expected one of each class \(neg, pos\), got none for 'neg'"),
        (ROWS, {"answers": ["yes"]}, r"^answers: expected one for each of the 2 classes \(neg, pos\), got 1\. Give"),
        (ROWS, {"classes": ["neg", "positive"]}, r"^rows: expected labels among neg, positive in the column label, got "
         r"'pos' in 24 of 48 rows \(row 3 is the first\)\. Correct them, or set classes\.$"),
        (ROWS, {"classes": ["neg"]}, r"^classes: expected two or more different classes, got 'neg' alone"),
        ([{"text": "a", "label": 0}] * 5, {}, r"^rows: expected two or more different classes, got '0' alone"),
        (ROWS[:2], {}, r"^rows: expected at least 3 different texts of each class, .*, got 1 of 'pos'\. Add some"),
        ([*ROWS, {"text": " ", "label": "pos"}], {}, r"^rows: expected a text and a label in every row, got none in 1 "
         r"of 61 \(rows 61; the text\)\. Fill them in, or set skip_incomplete\.$"),
        ([*ROWS, {"text": None, "label": "pos"}], {}, r"got none in 1 of 61 \(rows 61; text\)"),
        ([*ROWS, {"text": float("nan"), "label": "pos"}], {}, r"got none in 1 of 61 \(rows 61; text\)"),
        ([*ROWS, {"text": "a", "label": None}], {}, r"got none in 1 of 61 \(rows 61; label\)"),
        ([*ROWS, {"text": "a", "label": ""}], {}, r"got none in 1 of 61 \(rows 61; label\)"),
        ([], {}, r"^rows: expected rows of texts, got none\.$"),
        (ROWS, {"above": {"toxic": 0.8}}, r"^above: expected columns of rows \(text, label\), got 'toxic'"),
        (ROWS, {"above": {"text": 0.8}}, r"^above: expected numbers in the column text of rows, got others"),
        ([{**row, "n": 0.1} for row in ROWS], {"above": {"n": 0.8}}, r"got none that is left\. Change above"),
        ([{"text": "a", "label": -1}] * 3, {"classes": ["no", "yes"], "fractions": WHOLE}, r"got -1 in 3 of 3 rows .*"
         r"These labels are not published: set splits\.$"),
    ],
)  # fmt: skip
def test_bad_rows(rows, settings, message):
    with pytest.raises((DataError, ConfigurationError)) as refused:
        TextTask(rows=rows, **settings).split("train", encoder())
    assert re.search(message, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^path, files, hub and rows: expected exactly one of them, got none\. Set path to a file of texts\.$"),
        ({"path": "a.csv", "rows": ROWS}, r"got path and rows"),
        ({"rows": ROWS, "answers_as": "rank"}, r"^answers_as: expected one of auto, target, ranked, got 'rank'"),
        ({"rows": ROWS, "repeated": "no"}, r"^repeated: expected one of refuse, remove, keep, got 'no'"),
        ({"rows": ROWS, "max_length": 0}, r"^max_length: expected an integer of at least 1, got 0"),
        ({"rows": ROWS, "length_groups": -1}, r"^length_groups: expected an integer of at least 0, got -1"),
        (
            {"rows": ROWS, "text_column": ["a", "b", "c"]},
            r"^text_column: expected one or two columns, got 3\. Set prompt",
        ),
        ({"rows": ROWS, "splits": {"dev": "x"}}, r"^splits: expected those of train, val, test, got dev\.$"),
        (
            {"rows": ROWS, "splits": {"val": {"off": 1}}},
            r"^splits.val: expected a name, or of, order, seed, start and stop",
        ),
        (
            {"rows": ROWS, "splits": {"val": {"of": "a", "order": "x"}}},
            r"^splits.val.order: expected one of stored, python",
        ),
        ({"rows": ROWS, "pack": True}, r"^pack: expected texts alone, got labels or targets"),
        (
            {"rows": ROWS, "answers": ["a"], "target": "x"},
            r"^answers: expected a label_column and no target beside them",
        ),
        (
            {"rows": ROWS, "fractions": (0.5, 0.2, 0.2)},
            r"^fractions: expected those of train, val and test, with sum 1",
        ),
        ({"files": {}}, r"^files: expected a file for train at least, got none"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        TextTask(**settings)


def test_networks_that_do_not_fit():
    task = TextTask(rows=ROWS)
    with pytest.raises(
        ConfigurationError, match=r"^texts: expected a network for texts, got .* by Preprocessing\. Set netw"
    ):
        task.split("train", Preprocessing(32))
    with pytest.raises(
        DataError, match=r"tokenizer knows, got its unknown token for 100% of the first 48 texts' tokens"
    ):
        task.split("train", tokenization("encoder", "other words"))
    with pytest.warns(
        UserWarning, match=r"^texts/train: \d\d% of the first 48 texts' tokens are unknown to the tokenizer"
    ):
        task.split("train", tokenization("encoder", "good bad indeed"))
    long = TextTask(rows=ROWS, prompt="Is it good or bad or good or bad or not ? {text}")
    with pytest.raises(
        ConfigurationError, match=r"within max_length 8 of the network, got 14 tokens without them\. Short"
    ):
        long.split("train", encoder())


def test_incomplete_rows_are_left_out_on_request(tmp_path):
    rows = [*ROWS, {"text": "", "label": "pos"}, {"text": "good w1 w2", "label": ""}]
    task = TextTask(write_rows(tmp_path / "a.csv", rows), skip_incomplete=True)
    with pytest.warns(UserWarning, match=r"left out 2 of 62 rows without a text or a label\.$"):
        assert sum(len(words(task, split)) for split in ("train", "val", "test")) == 60


def test_truncation_is_said_once_with_numbers(recwarn):
    task = TextTask(rows=ROWS)
    network = encoder(4)
    task.split("train", network), task.split("train", network)
    said = [str(one.message) for one in recwarn if "cut" in str(one.message)]
    assert said == ["texts/train: cut 24 of 48 texts to max_length 4 (targets: 16); the longest text has 5 tokens."]
    shorter = TextTask(rows=ROWS, max_length=3).split("train", network)
    assert (shorter.lengths.max(), network.max_length, shorter.preprocessing.max_length) == (3, 4, 3)


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder", "causal"])
def test_texts_of_other_tasks_beside_the_own_ones(kind):
    network = tokenization(kind, ALL)
    long = [{"text": f"{row['text']} Is it", "label": row["label"]} for row in ROWS]
    others = {"one": TextTask(rows=ROWS), "two": TextTask(rows=long)}
    images = OtherImages({name: task.split("train", network) for name, task in others.items()}, 8)
    beside = images.__getitems__([(0, 0), (0, 3), (1, 1)])
    assert (beside.tasks.tolist(), beside.targets.tolist()) == ([0, 0, 1], [-1, -1, -1])
    own = TextTask(rows=ROWS).split("train", network).__getitems__([0, 1])
    both = TextBatch.join([own, beside])
    assert len(both) == 5
    assert {len(one) for one in both.inputs} == {5}
    assert (both.targets[2:] == -1).all()
