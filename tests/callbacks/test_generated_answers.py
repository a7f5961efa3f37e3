"""Answers in a model's own words against a loop of most probable tokens, whatever the folder's generation settings."""

from __future__ import annotations

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from builders.language_folders import language_folder
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from lit_merge.callbacks import GeneratedAnswers
from lit_merge.data.text.batch import TextBatch
from lit_merge.errors import ConfigurationError
from lit_merge.metrics import WordCount, spearman
from lit_merge.models.language import CausalNetwork, Seq2SeqNetwork, TextEncoderNetwork
from lit_merge.models.language.generation import Generation, _decoded, expected_texts, prompts
from lit_merge.modules import FineTuneModule, MultiTaskModule

KINDS = {
    **{"t5": Seq2SeqNetwork, "bart": Seq2SeqNetwork, "gpt2": CausalNetwork, "llama": CausalNetwork},
    "bert": TextEncoderNetwork,
}
TEXTS, TARGETS = ["a b c w3", "b", "w1 w2 w3 w4 w5"], ["c d", "w1", "a"]


@pytest.fixture
def network(tmp_path):
    def build(name, **config):
        made = KINDS[name](str(language_folder(tmp_path / name, name)))
        if config:
            made.module.of_transformers.generation_config = GenerationConfig(**config)
        return made

    return build


def batch_of(tokenization, ranked=False):
    encoded = tokenization.encode(TEXTS, TARGETS, ended=not ranked)
    places = torch.arange(3)
    if ranked:
        wrong = tokenization.encode(TEXTS, TARGETS[::-1], ended=False).target_ids
        answers = [[one, other] for one, other in zip(wrong, encoded.target_ids, strict=True)]
        inputs = tokenization.padded_answers(encoded.input_ids, answers)
        return TextBatch(inputs, torch.ones(3, dtype=torch.int64), places, tokenization.fills)
    inputs, targets = tokenization.padded(encoded.input_ids, encoded.target_ids)
    return TextBatch(inputs, targets, places, tokenization.fills)


def most_probable(network, text, count):
    """The words of a greedy loop over the module's own logits."""
    module, tokenization = network.module, network.preprocessing
    ids, written = tokenization.encode([text], ["a"]).input_ids[0], []
    for _ in range(count):
        with torch.no_grad():
            if tokenization.kind == "causal":
                whole = torch.tensor([[*ids, *written]])
                logits = module(whole, torch.ones_like(whole))
            else:
                source = torch.tensor([ids])
                logits = module(source, torch.ones_like(source), torch.tensor([[0, *written]]))
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == tokenization.end_id:
            break
    return tokenization.tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_the_folders_settings_have_no_say(name, network):
    hostile = {"num_beams": 3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "forced_eos_token_id": 7}
    base = network(name, **hostile, max_new_tokens=1, suppress_tokens=[5, 6], do_sample=True, temperature=9.0)
    tokenization = base.preprocessing
    own = base.module.of_transformers.generation_config
    assert own.num_beams == 3
    for ranked in (False, True):
        batch = batch_of(tokenization, ranked)
        written = Generation(max_new_tokens=6)(base.module, tokenization, prompts(batch, tokenization))
        assert written == [most_probable(base, text, 6) for text in TEXTS]
        assert expected_texts(batch, tokenization) == TARGETS
    assert base.module.of_transformers.generation_config is own
    assert any(written)


class Answers(L.LightningDataModule):
    def __init__(self, batches, names=()):
        super().__init__()
        self.batches, self.names = batches, names
        self.name, self.classes, self.templates = "one", (), ("{}",)
        if names:
            self.task_names, self.tasks = names, dict.fromkeys(names, self)

    def val_dataloader(self):
        loaders = [DataLoader([batch], batch_size=None, collate_fn=lambda one: one) for batch in self.batches]
        return loaders if self.names else loaders[0]

    test_dataloader = val_dataloader


def answered(base, texts, targets):
    tokenization = base.preprocessing
    encoded = tokenization.encode(texts, targets)
    inputs, tokens = tokenization.padded(encoded.input_ids, encoded.target_ids)
    places = torch.arange(len(texts))
    places[-1] = -1  # padding does not count
    return TextBatch(inputs, tokens, places, tokenization.fills)


def test_exact_match_and_rank_correlation(network, silent_trainer, tmp_path, monkeypatch):
    base = network("gpt2")
    own = [most_probable(base, text, 4) for text in TEXTS]
    numbers = ["4.5", "1", "x"]  # what the model is made to write for the second task
    batches = [answered(base, TEXTS, [own[0], "w19", "a"]), answered(base, TEXTS[:2] * 2, ["w1", "w2", "w3", "w1"])]
    module = MultiTaskModule(network=base)
    callback = GeneratedAnswers(max_new_tokens=4, rewards={"words": WordCount(2)})
    trainer = silent_trainer(callbacks=[callback])
    metrics = trainer.test(module, datamodule=Answers(batches, ("one", "two")), verbose=False)[0]
    assert metrics["test/one/exact_match"] == 0.5
    assert "test/one/spearman" not in metrics
    written = json.loads((tmp_path / "run/generation.json").read_text())
    reward = sum(-abs(len(text.split()) - 2) / 2 for text in own[:2]) / 2
    assert written["results"]["one"] == {"exact_match": 0.5, "reward/words": pytest.approx(reward)}
    assert metrics["test/one/reward/words"] == pytest.approx(reward)
    assert written["rewards"] == {"words": "WordCount(words=2)"}
    assert written["settings"] == {
        **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "temperature": 1.0},
        **{"top_k": 50, "top_p": 1.0, "typical_p": 1.0, "min_new_tokens": 0, "repetition_penalty": 1.0},
        **{"encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True},
        **{"encoder_no_repeat_ngram_size": 0, "renormalize_logits": False, "max_new_tokens": 4, "pad_token_id": 0},
        **{"eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": None},
    }
    targets = iter([["4", "2", "3"]])
    monkeypatch.setattr("lit_merge.callbacks.generated_answers.expected_texts", lambda *_: next(targets))
    monkeypatch.setattr(callback, "generation", lambda *_: numbers)
    batch = batch_of(base.preprocessing)
    metrics = trainer.validate(module, datamodule=Answers([batch], ("one",)), verbose=False)[0]
    expected = float(spearman(torch.tensor([4.5, 1.0, 0.0]), torch.tensor([4.0, 2.0, 3.0])))
    assert metrics["val/one/spearman"] == pytest.approx(expected)
    assert metrics["val/one/exact_match"] == 0.0


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_linearised_model_writes_its_own_most_probable_tokens(name, network, silent_trainer, tmp_path):
    base = network(name)
    tokenization, generation = base.preprocessing, Generation(max_new_tokens=5)
    texts = prompts(batch_of(tokenization), tokenization)
    at_start = generation(base.module, tokenization, texts)
    assert generation.of_function(base.module, tokenization, texts) == at_start
    module = FineTuneModule(network=base, linearized=True)
    assert generation.of_function(module, tokenization, texts) == at_start  # τ is zero
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.encoder.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=draw))
    written = generation.of_function(module, tokenization, texts)
    assert written != at_start
    assert written == [
        most_probable(SimpleNamespace(module=module, preprocessing=tokenization), one, 5) for one in TEXTS
    ]
    targets = [written[0], "w19", "w18"]
    data = Answers([answered(base, TEXTS, targets)])
    metrics = silent_trainer(callbacks=[GeneratedAnswers(5)]).test(module, datamodule=data, verbose=False)[0]
    assert metrics["test/exact_match"] == 0.5


def test_a_decoder_that_begins_with_the_end_of_text_writes(network):
    """As a BART's does."""
    base = network("bart")
    with torch.no_grad():
        base.module.of_transformers.model.shared.weight[base.preprocessing.end_id] = 0  # which is never probable then
    texts = prompts(batch_of(base.preprocessing), base.preprocessing)
    generation = Generation(max_new_tokens=5)
    written = generation(base.module, base.preprocessing, texts)
    assert all(written)
    assert written == generation.of_function(base.module, base.preprocessing, texts)


def test_what_stands_after_the_end_is_no_part_of_the_answer(network):
    tokenization = network("gpt2").preprocessing  # whose tokenizer knows no padding
    assert tokenization.tokenizer.pad_token_id is None
    assert _decoded(torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]]), tokenization) == ["b", "b c d e", ""]


def test_what_cannot_write_is_refused(network, silent_trainer, own_cache):
    base = network("t5")
    data = Answers([batch_of(base.preprocessing)])
    for module, message in (
        (
            FineTuneModule(network=network("bert")),
            "GeneratedAnswers: expected a network that predicts tokens, got 'bert'. Remove the callback.",
        ),
    ):
        if "bert" in message:
            data.classes = ("a", "b")
        with pytest.raises(ConfigurationError) as error:
            silent_trainer(callbacks=[GeneratedAnswers()]).validate(module, datamodule=data, verbose=False)
        assert str(error.value) == message
    with pytest.raises(ConfigurationError, match=r"^max_new_tokens: expected an integer of at least 1, got 0. Use"):
        GeneratedAnswers(0)
