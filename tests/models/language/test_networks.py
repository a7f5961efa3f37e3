"""Language models from folders: the numbers of transformers, tied and sharded weights, heads, and what is refused."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from builders.hub_server import Repository, served_hub
from builders.language_folders import language_folder, language_model, tokenizer
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lit_merge.commands.main import main
from lit_merge.errors import LitMergeError
from lit_merge.models.language import (
    CausalNetwork,
    LanguageHead,
    Seq2SeqNetwork,
    TaskClassifier,
    TextEncoderNetwork,
)
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector

KINDS = {"bert": TextEncoderNetwork, "t5": Seq2SeqNetwork, "gpt2": CausalNetwork, "llama": CausalNetwork}
TASK = SimpleNamespace(name="letters", classes=("a", "b c"), templates=("{} d", "w1 {}"))


@pytest.fixture
def folder(tmp_path):
    return lambda name, **settings: language_folder(tmp_path / name, name, **settings)


def texts(network, targets=True):
    wanted = ["c d", "w1"] if targets and not isinstance(network, TextEncoderNetwork) else None
    encoded = network.preprocessing.encode(["a b c w3", "b"], wanted)
    return network.preprocessing.padded(encoded.input_ids, encoded.target_ids)[0]


@pytest.mark.parametrize("name", KINDS)
def test_a_network_is_the_model_of_the_folder(name, folder):
    network, model = KINDS[name](str(folder(name))), language_model(name)
    own = dict(model.named_parameters())
    assert list(network.parameters) == list(own)
    assert all(torch.equal(network.parameters[key], value) for key, value in own.items())
    assert network.fingerprint == fingerprint(own)
    assert network.name == name
    assert [one.name for one in network.files] == ["model.safetensors"]
    assert network.folder.name == name
    assert (network.prefix, network.repository) == ("", None)


def test_mean_pooling_is_over_the_texts_own_tokens(folder):
    path = folder("bert")
    for pooling in ("mean", "cls"):
        network = TextEncoderNetwork(str(path), pooling=pooling)
        ids, mask = texts(network)
        with torch.no_grad():
            features = network.module(ids, mask)
            for row, count in enumerate(mask.sum(1).tolist()):
                hidden = network.module.of_transformers(ids[row : row + 1, :count]).last_hidden_state[0]
                expected = hidden.mean(0) if pooling == "mean" else hidden[0]
                torch.testing.assert_close(features[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_an_example_of_padding_alone_gives_finite_features(name, folder):
    network = KINDS[name](str(folder(name)))
    inputs = [
        torch.zeros_like(one[:1]) if place < 2 else -torch.ones_like(one[:1])
        for place, one in enumerate(texts(network))
    ]
    features = network.module(*inputs)
    assert torch.isfinite(features).all()
    assert name == "bert" or not features.any()


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_tied_weights_are_one_parameter(name, folder):
    network = KINDS[name](str(folder(name)))
    assert "lm_head.weight" not in network.parameters
    assert "lm_head.weight" not in network.whole()
    table = network.module.of_transformers.get_input_embeddings().weight
    assert network.module.of_transformers.get_output_embeddings().weight is table
    inputs = texts(network)
    with torch.no_grad():
        before = network.module(*inputs)
        table.mul_(2)
        assert not torch.allclose(before, network.module(*inputs))


@pytest.mark.parametrize("name", KINDS)
def test_the_whole_model_opens_in_transformers(name, folder, tmp_path):
    path = folder(name)
    network = KINDS[name](str(path))
    written = path / "model.safetensors"
    tensors = {key: value.contiguous() for key, value in network.whole().items()}
    assert set(tensors) >= set(load_file(written)) - {"lm_head.weight"}
    save_file(tensors, written, {"format": "pt"})
    again = KINDS[name](str(path))
    assert again.fingerprint == network.fingerprint


def test_shards_half_precision_and_a_pytorch_file(folder, tmp_path):
    from transformers import AutoTokenizer

    plain = folder("gpt2")
    model = language_model("gpt2")
    language_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    network = CausalNetwork(str(tmp_path / "shards"))
    assert len(network.files) > 1
    for name, value in model.named_parameters():
        assert torch.equal(network.parameters[name], value.bfloat16().float())
    kept = CausalNetwork(str(tmp_path / "shards"), dtype="bfloat16")
    assert kept.parameters.dtype("transformer.wte.weight") == torch.bfloat16
    torch.save(model.state_dict(), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    assert CausalNetwork(str(plain)).fingerprint == fingerprint(dict(model.named_parameters()))


def test_another_task_s_head_is_left_out_and_a_pooler_may_be_missing(folder):
    path = folder("bert")
    tensors = load_file(path / "model.safetensors")
    whole = {f"bert.{name}": value for name, value in tensors.items() if not name.startswith("pooler")}
    save_file({**whole, "cls.predictions.bias": torch.zeros(60)}, path / "model.safetensors", {"format": "pt"})
    network = TextEncoderNetwork(str(path))
    assert set(network.parameters) == {name for name in tensors if not name.startswith("pooler")}
    del whole["bert.embeddings.LayerNorm.weight"]
    save_file(whole, path / "model.safetensors", {"format": "pt"})
    assert refusal(TextEncoderNetwork, path) == (
        f"{path}: expected the weights of BertModel as config.json describes it, got none of "
        "embeddings.LayerNorm.weight. Use the folder of a whole model."
    )


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_a_sentence_encoder_pools_as_its_folder_says(settings, pooling, folder):
    path = folder("bert")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert TextEncoderNetwork(str(path)).module.pooling == pooling
    assert TextEncoderNetwork(str(path), pooling="mean").module.pooling == "mean"
    for other in ({"pooling_mode": ["cls", "max"]}, {"pooling_mode_max_tokens": True}):
        (path / "1_Pooling" / "config.json").write_text(json.dumps(other))
        assert f"expected cls, mean or last in {path / '1_Pooling' / 'config.json'}, got [" in refusal(
            TextEncoderNetwork, path
        )


@pytest.mark.parametrize(
    ("name", "network"), [("mpnet", TextEncoderNetwork), ("deberta", TextEncoderNetwork), ("gemma2", CausalNetwork)]
)
def test_models_that_have_eager_attention_alone(name, network, folder):
    """Of which the default, ``sdpa``, is the same."""
    path = folder(name)
    made, eager = (network(str(path), **settings) for settings in ({}, {"attention": "eager"}))
    inputs = texts(made)
    with torch.no_grad():
        torch.testing.assert_close(made.module(*inputs), eager.module(*inputs), rtol=0, atol=0)


def pair_tokenizer(separator):
    """As a BERT's, with the second text of a pair apart."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer("encoder").backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": separator, "unk_token": "<unk>"}
    own = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=own, **names)


def test_the_second_text_of_a_pair_has_types_of_its_own(folder):
    path = folder("bert")
    own = pair_tokenizer("</s>")
    own.save_pretrained(path)
    network, model = TextEncoderNetwork(str(path), pooling="cls", dtype="float64"), language_model("bert").double()
    for some in ([("a b c", "d e"), ("b", "w1")], ["a b", "c"]):
        inputs, _ = network.preprocessing.padded(network.preprocessing.encode(some).input_ids)
        given = own(some, padding=True, return_tensors="pt")
        assert bool(given["token_type_ids"].any()) == isinstance(some[0], tuple)
        with torch.no_grad():
            expected = model(**given).last_hidden_state[:, 0]
            torch.testing.assert_close(network.module(*inputs), expected, rtol=0, atol=1e-12)
    assert TextEncoderNetwork(str(folder("roberta"))).module.separator is None  # has one type


def test_targets_of_an_encoder_decoder_are_the_labels_of_transformers(folder):
    """A BART's begin with a token that its decoder writes first; a T5's do not."""
    for name, kind in (("bart", "encoder"), ("t5", "encoder_decoder")):
        path, own = folder(name), tokenizer(kind)
        own.save_pretrained(path)
        network = Seq2SeqNetwork(str(path), dtype="float64", max_target_length=5)
        encoded = network.preprocessing.encode(["a b"], ["c d"])
        inputs, targets = network.preprocessing.padded(encoded.input_ids, encoded.target_ids)
        assert targets.tolist() == [own(text_target="c d")["input_ids"]]
        with torch.no_grad():
            expected = language_model(name).double()(input_ids=inputs[0], labels=targets).logits
            torch.testing.assert_close(network.module(*inputs), expected, rtol=0, atol=1e-10)
        (cut,) = network.preprocessing.encode(["a"], ["a b c d e f"]).target_ids
        assert (len(cut), cut[-1]) == (5, 2)


def test_what_no_feature_depends_on_is_frozen(folder):
    frozen = [
        name for name, one in TextEncoderNetwork(str(folder("bert"))).module.named_parameters() if not one.requires_grad
    ]
    assert frozen == ["pooler.dense.weight", "pooler.dense.bias"]


@pytest.mark.parametrize(
    ("name", "network", "own"),
    [
        ("bart", Seq2SeqNetwork, {"activation_dropout": 0.5, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}),
        ("falcon", CausalNetwork, {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_no_dropout_at_all(name, network, own, folder):
    made = network(str(folder(name, **own)), dropout=0.0)
    inputs = texts(made)
    with torch.no_grad():
        expected = made.module(*inputs)
        for part in made.module.modules():
            part.train()
        found = [made.module(*inputs) for _ in range(3)]
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)


def test_dropout_and_recomputation(folder):
    path = folder("bert")
    network = TextEncoderNetwork(str(path), dropout=0.0)
    inputs = texts(network)
    network.module.train()
    first = network.module(*inputs)
    assert torch.equal(first, network.module(*inputs))
    assert not torch.equal(*(TextEncoderNetwork(str(path), dropout=0.5).module.train()(*inputs) for _ in range(2)))
    gradients = []
    for enable in (False, True):
        network.module.set_grad_checkpointing(enable)
        network.module.zero_grad()
        network.module(*inputs).square().sum().backward()
        gradients.append({name: one.grad for name, one in network.module.named_parameters() if one.requires_grad})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)
    assert refusal(TextEncoderNetwork, path, dropout=1.5) == "dropout: expected a number in [0, 1), got 1.5."


def test_a_merge_of_a_network_is_a_folder_that_transformers_opens(folder, tmp_path, own_cache):
    import transformers

    path = folder("t5")
    network, files = Seq2SeqNetwork(str(path)), []
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        tau = {name: torch.randn(one.shape, generator=draw) for name, one in network.module.named_parameters()}
        files.append(str(tmp_path / f"{seed}.safetensors"))
        TaskVector(tau, str(seed), metadata={"base_fingerprint": network.fingerprint}).save(files[-1])
    settings = f"{{class_path: lit_merge.models.language.Seq2SeqNetwork, init_args: {{path: {path}}}}}"
    command = ["merge", "--network", settings, "--vectors", str(files), "--recipe", "task_arithmetic"]
    assert main([*command, "--output", str(tmp_path / "merged")]) == 0
    model, found = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    merged = dict(model.named_parameters())
    first, second = (TaskVector.load(file) for file in files)
    for name, value in network.module.named_parameters():
        expected = value + 0.3 * (first[name] + second[name])
        torch.testing.assert_close(merged[name].detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert model.lm_head.weight is model.shared.weight
    again = Seq2SeqNetwork(str(tmp_path / "merged"))
    assert repr(again.preprocessing) == repr(network.preprocessing)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


def test_a_model_on_the_hub(folder, hub):
    path = folder("gpt2")
    hub.repositories["me/tiny"] = repository = Repository()
    files = {one.name: one.read_bytes() for one in path.iterdir()}
    repository.commit({**files, "own.py": b"raise SystemExit", "model.onnx": b"0" * 9})
    network = CausalNetwork("hf://me/tiny")
    assert network.fingerprint == CausalNetwork(str(path)).fingerprint
    assert repr(network.preprocessing) == repr(CausalNetwork(str(path)).preprocessing)
    assert (network.name, network.repository) == ("tiny", "me/tiny")
    assert not any("model.onnx" in where for _, where in hub.requests)
    repository.gated = True
    repository.commit({"README.md": b"x"})
    assert re.search(
        r"^hf://me/tiny.*: expected the Hub to read this, got 40[13]: .*hf auth login",
        refusal(CausalNetwork, "hf://me/tiny"),
    )


# Heads


def test_a_head_of_class_names_is_their_mean_embedding(folder, own_cache):
    network = TextEncoderNetwork(str(folder("bert")), logit_scale=12.5)
    head = network.head(TASK)
    module, tokenization = network.module, network.preprocessing
    rows = []
    for name in TASK.classes:
        unit = []
        for template in TASK.templates:
            inputs, _ = tokenization.padded(tokenization.encode([template.replace("{}", name)]).input_ids)
            unit.append(F.normalize(module(*inputs)[0], dim=0))
        rows.append(F.normalize(torch.stack(unit).mean(0), dim=0))
    torch.testing.assert_close(head.weight, torch.stack(rows).detach())
    features = module(*texts(network))
    expected = 12.5 * F.cosine_similarity(features.unsqueeze(1), torch.stack(rows).unsqueeze(0), dim=-1)
    torch.testing.assert_close(head(features), expected)
    other = TextEncoderNetwork(str(folder("bert")), logit_scale=12.5, pooling="cls").head(TASK)
    assert not torch.allclose(head.weight, other.weight)


def test_a_classifier_of_the_tasks_own_is_the_same_in_every_process(folder):
    network = TextEncoderNetwork(str(folder("bert")), head="classifier")
    head = network.head(TASK)
    assert isinstance(head, TaskClassifier)
    assert (head.in_features, head.classes) == (16, TASK.classes)
    assert torch.equal(head.weight, network.head(TASK).weight)


def test_heads_of_tokens_have_no_parameters(folder):
    head = Seq2SeqNetwork(str(folder("t5")), length_normalised=True).head(TASK)
    assert isinstance(head, LanguageHead)
    assert head.length_normalised
    assert not list(head.parameters())


# Refusals


def refusal(kind, path, **settings):
    with pytest.raises(LitMergeError) as error:
        kind(str(path), **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path, **settings):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_folders_that_are_none(folder, tmp_path):
    assert refusal(CausalNetwork, tmp_path / "none") == (
        f"{tmp_path / 'none'}: expected the folder of a transformers model, got nothing. Give the folder with "
        "config.json, weights and tokenizer, or hf://owner/name."
    )
    path = folder("gpt2")
    (path / "tokenizer.json").unlink()
    assert refusal(CausalNetwork, path) == (
        f"{path}: expected a model with its tokenizer, got none of tokenizer.json, tokenizer.model, spiece.model, "
        "sentencepiece.bpe.model, vocab.txt, vocab.json. Copy the tokenizer's files of the model that it was made from "
        "into the folder."
    )
    (path / "config.json").unlink()
    assert "got no config.json in it. Give" in refusal(CausalNetwork, path)


def test_models_of_another_kind(folder):
    path = folder("t5")
    assert refusal(TextEncoderNetwork, path) == (
        f"{path}: expected a model for TextEncoderNetwork, got an encoder-decoder (t5). Use Seq2SeqNetwork."
    )
    path = folder("gpt2")
    assert refusal(Seq2SeqNetwork, path) == (
        f"{path}: expected a model for Seq2SeqNetwork, got no encoder-decoder (gpt2). Use TextEncoderNetwork or "
        "CausalNetwork."
    )


def test_a_tokenizer_of_another_vocabulary(folder):
    path = folder("gpt2", vocab_size=40)
    assert refusal(CausalNetwork, path) == (
        f"{path}: expected a tokenizer of at most 40 tokens, the rows of the embedding, got one with number 49. Use "
        "the tokenizer that the model was trained with."
    )


@pytest.mark.parametrize("settings", [{"model_type": "unheard"}, {}])
def test_code_in_the_folder_is_never_run(settings, folder, tmp_path):
    path = folder("gpt2")
    flag = tmp_path / "ran"
    (path / "own.py").write_text(f"open({str(flag)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    change(path, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, **settings)
    if settings:
        assert refusal(CausalNetwork, path) == (
            f"{path}: expected a model that transformers knows, got one that needs code of its own, which is not run. "
            "Use a model of transformers itself."
        )
    else:
        CausalNetwork(str(path))
    assert not flag.exists()


def test_quantised_weights(folder):
    path = folder("gpt2")
    change(path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert refusal(CausalNetwork, path) == (
        f"{path}: expected floating-point weights, got quantised ones (quantization_config). Use the model that they "
        "were made from."
    )


def test_positions_that_begin_after_the_padding(folder):
    path = folder("xlm-roberta-xl")
    own = tokenizer("encoder")
    own.model_max_length = 10**12
    own.save_pretrained(path)
    network = TextEncoderNetwork(str(path))
    assert network.preprocessing.max_length == 32
    encoded = network.preprocessing.encode(["a " * 40])
    with torch.no_grad():
        assert network.module(*network.preprocessing.padded(encoded.input_ids)[0]).isfinite().all()


@pytest.mark.parametrize(("name", "limit"), [("gpt2", 32), ("bert", 32)])
def test_texts_longer_than_the_model(name, limit, folder):
    path = folder(name)
    assert refusal(KINDS[name], path, max_length=33) == (
        f"max_length: expected at most {limit}, the positions that {path} has, got 33. Lower it."
    )
    assert KINDS[name](str(path)).preprocessing.max_length == 24  # the tokenizer's
    assert KINDS[name](str(path), max_length=7).preprocessing.max_length == 7


def test_settings_out_of_range(folder):
    path = folder("bert")
    assert refusal(TextEncoderNetwork, path, pooling="max") == "pooling: expected one of mean, cls, last, got 'max'."
    assert refusal(TextEncoderNetwork, path, head="own") == (
        "head: expected one of class_names, classifier, two_layer, got 'own'."
    )
    assert refusal(TextEncoderNetwork, path, dtype="int8") == (
        "dtype: expected one of float32, bfloat16, float16, float64, got 'int8'."
    )
    assert refusal(TextEncoderNetwork, path, logit_scale=0) == (
        "logit_scale: expected a positive number, got 0. Use e.g. 20."
    )
    with pytest.raises(LitMergeError, match=r"^x: expected a task with classes for the encoder bert, got one without"):
        TextEncoderNetwork(str(path)).head(SimpleNamespace(name="x", classes=(), templates=()))


def test_gguf_files_are_of_causal_models(tmp_path, monkeypatch):
    assert refusal(TextEncoderNetwork, tmp_path / "m.gguf") == (
        f"{tmp_path / 'm.gguf'}: expected a folder for TextEncoderNetwork, got a GGUF file. Use CausalNetwork."
    )
    assert refusal(CausalNetwork, tmp_path / "m.gguf") == (
        f"{tmp_path / 'm.gguf'}: expected a GGUF file, got nothing. Check the path."
    )
    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr("lit_merge.models.language.loading.find_spec", lambda name: None)
    assert refusal(CausalNetwork, tmp_path / "m.gguf") == (
        f"{tmp_path / 'm.gguf'}: expected the package gguf, got none. Install it: pip install gguf."
    )


def test_the_tokenizers_vocabulary_tells_preprocessings_apart(folder):
    first = TextEncoderNetwork(str(folder("bert"))).preprocessing
    again = TextEncoderNetwork(str(folder("bert"))).preprocessing
    again.encode(["a b"] * 3)
    assert repr(first) == repr(again)
    other = tokenizer("encoder")
    other.add_tokens(["new"])
    assert repr(type(first)(other, "encoder", 24, 1)) != repr(first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("head", ["class_names", "classifier", "two_layer"])
def test_features_of_any_precision_go_through_a_head(folder, head, dtype):
    network, plain = (TextEncoderNetwork(str(folder("bert")), head=head, dtype=one) for one in (dtype, "float32"))
    with torch.no_grad():
        features = network.module(*texts(network))
        logits, expected = network.head(TASK)(features), plain.head(TASK)(plain.module(*texts(plain)))
    assert features.dtype is getattr(torch, dtype)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.3)
