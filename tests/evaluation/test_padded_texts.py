"""Statistics of texts: those of every text by itself, whatever the longest text of its batch is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from builders.language_folders import KINDS, in_double, language_model, tokenizer

from lit_merge.data.text.batch import TextBatch
from lit_merge.evaluation.analysis.images import TaskImages
from lit_merge.evaluation.calibration import FeatCal, RegMeanPlusPlus
from lit_merge.evaluation.statistics import collect_gram, collect_kfac
from lit_merge.models.language.modules import CausalModule, EncoderDecoderModule, PooledEncoder
from lit_merge.models.language.tokenization import Tokenization
from lit_merge.transforms import Mean
from lit_merge.vectors import TaskVector, TaskVectors

MODULES = {"encoder": PooledEncoder, "encoder_decoder": EncoderDecoderModule, "causal": CausalModule}
TEXTS = ["a b c w3 d", "b", "c w1", "e w2", "a b c d e f"]
TARGETS = ["c d", "w1", "a b c", "w2 w3 e", "d"]
FILLS = (0, 0, -1, -1)


def tokenised(kind, texts, targets, ended=True):
    """A batch as long as its longest text."""
    tokenization = Tokenization(tokenizer(kind), kind, 24, 8, start_id=0)
    indices, labels = torch.arange(len(texts)), torch.zeros(len(texts), dtype=torch.int64)
    if kind == "encoder":
        return TextBatch(tokenization.padded(tokenization.encode(texts).input_ids)[0], labels, indices, FILLS)
    encoded = tokenization.encode(texts, targets, ended)
    inputs, found = tokenization.padded(encoded.input_ids, encoded.target_ids)
    return TextBatch(inputs, found, indices, FILLS)


def alone(kind):
    return [tokenised(kind, [text], [target]) for text, target in zip(TEXTS, TARGETS, strict=True)]


def ranked(kind):
    """A batch of texts with two to four answers to choose from, and every text with every answer by itself."""
    tokenization = Tokenization(tokenizer(kind), kind, 24, 8, start_id=0)
    answers = [TARGETS[: 2 + place % 3] for place in range(len(TEXTS))]
    ids = [tokenization.encode([TEXTS[0]] * len(own), own, ended=False).target_ids for own in answers]
    inputs = tokenization.padded_answers(tokenization.encode(TEXTS).input_ids, ids)
    batch = TextBatch(inputs, torch.zeros(5, dtype=torch.int64), torch.arange(5), FILLS)
    pairs = [(text, answer) for text, own in zip(TEXTS, answers, strict=True) for answer in own]
    return batch, [tokenised(kind, [text], [answer], ended=False) for text, answer in pairs]


@pytest.mark.parametrize("collect", [collect_gram, collect_kfac])
@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_padding_is_no_token(name, collect):
    kind = KINDS.get(name, "encoder")
    module = MODULES[kind](in_double(language_model(name)))
    together = collect(module, [tokenised(kind, TEXTS, TARGETS)])
    singly = collect(module, alone(kind))
    assert together.keys() == singly.keys()
    for key, expected in singly.items():
        torch.testing.assert_close(together[key], expected, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("collect", [collect_gram, collect_kfac])
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_every_answer_to_choose_from_is_a_text_of_its_own(name, collect):
    module = MODULES[KINDS[name]](in_double(language_model(name)))
    batch, pairs = ranked(KINDS[name])
    together, singly = collect(module, [batch]), collect(module, pairs)
    assert together.keys() == singly.keys()
    for key, expected in singly.items():
        torch.testing.assert_close(together[key], expected, rtol=1e-9, atol=1e-12, msg=key)


def test_a_gram_matrix_is_that_of_the_texts_tokens():
    module = PooledEncoder(in_double(language_model("bert")))
    batch, rows = tokenised("encoder", TEXTS, TARGETS), []
    name = next(name for name, _ in module.named_parameters() if "query.weight" in name)
    layer = module.get_submodule(name.removesuffix(".weight"))
    layer.register_forward_hook(lambda layer, given, output: rows.append(given[0]))
    with torch.no_grad():
        module.eval()(*batch.inputs)
    counted = rows[0][batch.inputs[1] > 0]
    torch.testing.assert_close(collect_gram(module, [batch])[name], counted.T @ counted / len(counted))


@pytest.mark.parametrize("rule", [FeatCal, RegMeanPlusPlus])
def test_a_calibration_does_not_depend_on_the_batch(rule):
    module = PooledEncoder(in_double(language_model("bert"))).eval()
    draw = torch.Generator().manual_seed(0)
    network = SimpleNamespace(module=module, inputs=lambda part: part.inputs)
    examples = SimpleNamespace(__getitems__=lambda rows: tokenised("encoder", [TEXTS[row] for row in rows], TARGETS))
    vectors = TaskVectors(
        [
            TaskVector(
                {
                    name: 0.05 * torch.randn(one.shape, generator=draw, dtype=one.dtype)
                    for name, one in module.named_parameters()
                },
                task,
            )
            for task in "ab"
        ]
    )
    found = []
    for size in (5, 1):
        given = {
            task: list(rule(batch_size=size)._batches(network, examples, list(range(len(TEXTS))))) for task in "ab"
        }
        found.append(rule().calibrate(module, vectors, Mean()(vectors), given))
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_parts_without_padding_are_the_batch_again(kind):
    batch = tokenised(kind, TEXTS, TARGETS)
    parts = list(batch.unpadded())
    assert [len(part) for part in parts] == [1, 1, 2, 1]  # neighbours of one length, of a text with its target too
    assert sorted(int(index) for part in batch.unpadded(in_order=False) for index in part.indices) == [0, 1, 2, 3, 4]
    for part in (*parts, *batch.unpadded(in_order=False)):
        assert (part.inputs[1] > 0)[:, -1].all()
    joined = TextBatch.join(parts)
    for found, expected in zip((*joined.inputs, joined.targets), (*batch.inputs, batch.targets), strict=True):
        assert torch.equal(found, expected)


class Texts:
    """Some of the texts, in batches as long as their longest."""

    def __init__(self, rows=None):
        self.rows = list(range(len(TEXTS)) if rows is None else rows)

    def __len__(self):
        return len(self.rows)

    def subset(self, chosen):
        return Texts([self.rows[place] for place in chosen])

    def __getitems__(self, chosen):
        rows = [self.rows[place] for place in chosen]
        return tokenised("causal", [TEXTS[row] for row in rows], [TARGETS[row] for row in rows])


def test_the_digest_of_texts_does_not_depend_on_the_batch():
    digests = {TaskImages(Texts(), "a", (), (), batch_size=size).digest() for size in (1, 2, 5)}
    assert len(digests) == 1
    assert TaskImages(Texts([0, 1]), "a", (), ()).digest() not in digests


def test_a_text_without_tokens_keeps_one_place():
    inputs = (torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))
    parts = list(TextBatch(inputs, torch.zeros(2, dtype=torch.int64), torch.arange(2), FILLS).unpadded())
    assert [part.inputs[0].tolist() for part in parts] == [[[5, 6]], [[0]]]
