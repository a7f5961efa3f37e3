"""Zero-shot heads: against a restatement of CLIP's procedure, and the cache."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.files.cache_directory import cache_directory
from lit_merge.models import (
    ZeroShotHead,
    build_head,
    full_clip_model,
    load_clip,
    save_clip,
    zero_shot_weights,
)

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CLASSES = ["cat", "dog", "a brace {x}"]
TEMPLATE_LIST = ["a photo of a {}.", "the {}.", "{}"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model, _ = full_clip_model(str(folder / "tiny.json"))
    save_clip(folder / "tiny.safetensors", model.state_dict(), {}, torch.float32)
    return str(folder / "tiny.json"), str(folder / "tiny.safetensors")


@pytest.fixture
def clip(files):
    return load_clip(*files)


class Counting:
    """A text encoder that counts its calls: its embedding of a text is drawn from the text."""

    logit_scale = 50.0

    def __init__(self, text_fingerprint="0" * 16):
        self.text_fingerprint = text_fingerprint
        self.calls = []

    def encode_text(self, texts):
        self.calls.append(len(texts))
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def test_weights_are_clips_procedure(clip):
    weights = zero_shot_weights(clip, CLASSES, TEMPLATE_LIST, batch_size=2)
    for row, name in zip(weights, CLASSES, strict=True):
        mean = torch.zeros(12, dtype=torch.float64)
        for template in TEMPLATE_LIST:
            before, after = template.split("{}")
            embedding = clip.encode_text([before + name + after])[0].double()
            mean += embedding / embedding.norm() / len(TEMPLATE_LIST)
        torch.testing.assert_close(row.double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert not weights.requires_grad


def test_texts_are_encoded_in_batches():
    encoder = Counting()
    whole = zero_shot_weights(encoder, CLASSES, TEMPLATE_LIST)
    assert encoder.calls == [9]
    torch.testing.assert_close(zero_shot_weights(encoder, CLASSES, TEMPLATE_LIST, batch_size=4), whole)
    assert encoder.calls == [9, 4, 4, 1]


def test_logits(clip, tmp_path):
    head = build_head(clip, CLASSES, TEMPLATE_LIST, tmp_path)
    features = torch.randn(5, 12, dtype=torch.float64) * 7
    logits = head.double()(features)
    for image, row in zip(features, logits, strict=True):
        for weight, logit in zip(head.weight, row, strict=True):
            expected = float(head.logit_scale) * float(image @ weight) / float(image.norm())
            assert float(logit) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(head(features * 100), logits)
    assert float(head.logit_scale) == pytest.approx(clip.logit_scale, rel=1e-6)


def test_a_head_is_frozen_and_stored_with_its_module(clip, tmp_path):
    head = build_head(clip, CLASSES, TEMPLATE_LIST, tmp_path)
    assert list(head.parameters()) == []
    assert set(head.state_dict()) == {"weight", "logit_scale"}
    assert head.classes == tuple(CLASSES)
    assert "3 classes, 12 features" in repr(head)
    features = torch.randn(2, 12, requires_grad=True)
    head(features).sum().backward()
    assert features.grad is not None


def test_a_hit_needs_no_text_tower(files, tmp_path):
    built = build_head(load_clip(*files), CLASSES, TEMPLATE_LIST, tmp_path)
    again = load_clip(*files)
    read = build_head(again, CLASSES, TEMPLATE_LIST, tmp_path)
    assert not again.text.loaded
    assert read.classes == built.classes
    for name, tensor in built.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_cache_is_keyed_by_everything_that_matters(tmp_path):
    encoder = Counting()
    build_head(encoder, CLASSES, TEMPLATE_LIST, tmp_path)
    build_head(encoder, tuple(CLASSES), tuple(TEMPLATE_LIST), tmp_path)
    assert len(encoder.calls) == 1
    others = [
        (Counting("1" * 16), CLASSES, TEMPLATE_LIST),
        (encoder, CLASSES[::-1], TEMPLATE_LIST),
        (encoder, [*CLASSES, "cow"], TEMPLATE_LIST),
        (encoder, CLASSES, TEMPLATE_LIST[:2]),
    ]
    for encoder, classes, templates in others:
        before = len(encoder.calls)
        head = build_head(encoder, classes, templates, tmp_path)
        assert len(encoder.calls) == before + 1
        torch.testing.assert_close(head.weight, zero_shot_weights(encoder, classes, templates))
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: b"not a cache entry" * 40,
    ],
    ids=["truncated", "empty", "one bit", "other content"],
)
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    encoder = Counting()
    expected = build_head(encoder, CLASSES, TEMPLATE_LIST, tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    for calls in (2, 2):
        head = build_head(encoder, CLASSES, TEMPLATE_LIST, tmp_path)
        torch.testing.assert_close(head.weight, expected.weight, rtol=0, atol=0)
        assert len(encoder.calls) == calls


def test_an_entry_under_anothers_name_is_not_used(tmp_path):
    encoder = Counting()
    build_head(encoder, CLASSES, TEMPLATE_LIST, tmp_path)
    (first,) = tmp_path.iterdir()
    expected = build_head(encoder, CLASSES[::-1], TEMPLATE_LIST, tmp_path)
    (second,) = set(tmp_path.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    head = build_head(encoder, CLASSES[::-1], TEMPLATE_LIST, tmp_path)
    torch.testing.assert_close(head.weight, expected.weight)


def test_names_with_the_same_tokens_are_refused_also_from_the_cache(clip, tmp_path):
    for _ in range(2):
        with pytest.raises(
            ConfigurationError, match=r"tells apart, got 'Us' and 'us', whose tokens are the same as far as it reads"
        ):
            build_head(clip, ["cat", "Us", "dog", "us"], TEMPLATE_LIST, tmp_path)
    assert build_head(clip, ["cat", "us"], TEMPLATE_LIST, tmp_path).classes == ("cat", "us")


def test_concurrent_writers(tmp_path):
    heads = []
    threads = [
        threading.Thread(target=lambda: heads.append(build_head(Counting(), CLASSES, TEMPLATE_LIST, tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heads) == 8
    assert all(torch.equal(head.weight, heads[0].weight) for head in heads)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("classes", "templates", "expected"),
    [
        ([], ["{}"], "classes: expected at least one"),
        (["cat"], [], "templates: expected at least one"),
        (["cat", "dog", "cat"], ["{}"], "'cat' more than once"),
        (["cat"], ["a photo"], "'a photo'"),
        (["cat"], ["{} and {}"], "'{} and {}'"),
        (["cat"], ["{0}"], "'{0}'"),
        (["cat"], ["{} {name}"], "'{} {name}'"),
        ("cat", ["{}"], "lists of texts"),
        (["cat"], "{}", "lists of texts"),
    ],
)
def test_refused_texts(tmp_path, classes, templates, expected):
    for build in (lambda *given: build_head(*given, tmp_path), zero_shot_weights):
        with pytest.raises(ConfigurationError) as error:
            build(Counting(), classes, templates)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        (torch.eye(3)[:2], 100.0, "[3, d], got [2, 3]"),
        (torch.ones(3), 100.0, "[3, d], got [3]"),
        (torch.diag(torch.tensor([1.0, 3.0, 1.0])), 100.0, "got 3 for 'b'"),
        (torch.diag(torch.tensor([1.0, torch.nan, 1.0])), 100.0, "got nan for 'b'"),
        (torch.eye(3), 0.0, "positive"),
        (torch.eye(3), float("nan"), "positive"),
    ],
)
def test_refused_heads(weight, scale, expected):
    with pytest.raises(ConfigurationError) as error:
        ZeroShotHead(weight, scale, ["a", "b", "c"])
    assert expected in str(error.value)


def test_the_head_keeps_its_own_copy():
    weight = torch.eye(2)
    head = ZeroShotHead(weight, 1.0, ["a", "b"])
    weight.zero_()
    torch.testing.assert_close(head(torch.tensor([[0.0, 5.0]])), torch.tensor([[0.0, 1.0]]))


# Where the cache is


def test_the_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIT_MERGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory("heads") == tmp_path / "home" / ".cache" / "lit-merge" / "heads"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "lit-merge"
    monkeypatch.setenv("LIT_MERGE_CACHE", str(tmp_path / "own"))
    assert cache_directory("a", "b") == tmp_path / "own" / "a" / "b"
    assert (tmp_path / "own" / "a" / "b").is_dir()
    build_head(Counting(), CLASSES, TEMPLATE_LIST)
    assert len(list((tmp_path / "own" / "heads").iterdir())) == 1


def test_a_cache_that_cannot_be_created(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_MERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError) as error:
        cache_directory("heads")
    assert "LIT_MERGE_CACHE" in str(error.value)
