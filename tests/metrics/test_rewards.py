"""Rewards of what is written: classifiers against transformers' own logits, and their refusals."""

from __future__ import annotations

import json

import pytest
import torch
from builders.language_folders import tokenizer

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.metrics import ClassifierReward, WordCount

PROMPTS = ["### Input: a b c ### Response:", "no part here"]
RESPONSES = ["w1 w2 w3. w4 {prompt}", "a"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny BERT with a head of three classes, on the disk and as it is."""
    hf = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("classifier")
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    labels = {0: "bad", 1: "good", 2: "toxic"}
    torch.manual_seed(0)
    config = hf.BertConfig(**bert, vocab_size=60, max_position_embeddings=32, id2label=labels)
    model = hf.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer("encoder").save_pretrained(folder)
    return str(folder), model


def logits(model, texts):
    rows = []
    for text in texts:
        ids = tokenizer("encoder")(text, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**ids).logits[0])
    return torch.stack(rows)


def test_a_classifiers_score(classifier):
    folder, model = classifier
    plain = logits(model, RESPONSES)
    torch.testing.assert_close(ClassifierReward(folder, "good")(PROMPTS, RESPONSES), plain[:, 1])
    torch.testing.assert_close(ClassifierReward(folder, 1, against=0)(PROMPTS, RESPONSES), plain[:, 1] - plain[:, 0])
    probability = ClassifierReward(folder, "toxic", score="softmax", batch_size=1)(PROMPTS, RESPONSES)
    torch.testing.assert_close(probability, plain.softmax(1)[:, 2])
    halfway = float(plain[:, 2].sigmoid().mean())
    counted = ClassifierReward(folder, "toxic", score="sigmoid", above=halfway)(PROMPTS, RESPONSES)
    assert sorted(counted.tolist()) == [0.0, 1.0]
    assert ClassifierReward(folder)([], []).shape == (0,)


@pytest.mark.parametrize(("pad", "side"), [(2, "right"), (0, "left")])
def test_scores_do_not_depend_on_the_other_texts(pad, side, tmp_path):
    """Of a classifier that reads the last token: what the tokenizer pads with, and where, is the tokenizer's matter."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 60}
    model = hf.GPT2ForSequenceClassification(hf.GPT2Config(**size, pad_token_id=pad, num_labels=2)).eval()
    model.save_pretrained(tmp_path)
    tokenizer("encoder").save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": side}))
    texts = ["a b c d e f", "b"]
    apart = torch.cat([ClassifierReward(str(tmp_path))([""], [text]) for text in texts])
    torch.testing.assert_close(ClassifierReward(str(tmp_path))(["", ""], texts), apart)


def test_what_a_classifier_reads(classifier):
    reward = ClassifierReward(
        classifier[0],
        text="{response} </s> {prompt}",
        prompt_part=r"Input: (.*) ### Response",
        first_sentence=True,
    )
    texts = ["w1 w2 w3. </s> a b c", "a </s> no part here"]
    assert reward.texts(PROMPTS, RESPONSES) == texts
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), logits(classifier[1], texts)[:, 0])
    assert ClassifierReward("x").texts(["p"], ["{prompt} {response}"]) == ["{prompt} {response}"]


def test_the_number_of_words():
    assert WordCount(4)([""] * 3, ["a b c d", "a b", ""]).tolist() == [0.0, -0.5, -1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "odds"}, "ClassifierReward.score: expected logit or softmax or sigmoid, got 'odds'."),
        ({"text": "{prompt}"}, "ClassifierReward.text: expected a text with {response}, got '{prompt}'. Add it."),
        ({"prompt_part": "("}, "ClassifierReward.prompt_part: expected a regular expression, got '('"),
        ({"prompt_part": "a"}, "ClassifierReward.prompt_part: expected a group in parentheses, got none in 'a'."),
        ({"above": float("nan")}, "ClassifierReward.above: expected a finite number, got nan."),
        ({"batch_size": 0}, "ClassifierReward.batch_size: expected a whole number of at least 1, got 0."),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigurationError) as error:
        ClassifierReward("somewhere", **settings)
    assert message in str(error.value)
    with pytest.raises(ConfigurationError, match=r"WordCount\.words: expected a whole number of at least 1, got 0"):
        WordCount(0)


def test_labels_and_folders_that_are_none(classifier, tmp_path):
    folder, model = classifier
    with pytest.raises(ConfigurationError, match=r"expected one of bad, good, toxic of .*, or its number, got 'nice'"):
        ClassifierReward(folder, "nice")(PROMPTS, RESPONSES)
    with pytest.raises(ConfigurationError, match=r"or its number, got 3\."):
        ClassifierReward(folder, 3)(PROMPTS, RESPONSES)
    model.bert.save_pretrained(tmp_path)  # without a head
    tokenizer("encoder").save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match=r"got none of classifier\.bias, classifier\.weight"):
        ClassifierReward(str(tmp_path))(PROMPTS, RESPONSES)
