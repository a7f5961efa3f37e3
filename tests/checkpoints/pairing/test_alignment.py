"""Names of one checkpoint in another."""

from __future__ import annotations

import pytest

from lit_merge.checkpoints.pairing.alignment import align

BERT = [
    "embeddings.word_embeddings.weight",
    *(f"encoder.layer.{i}.attention.self.query.weight" for i in range(3)),
    *(f"encoder.layer.{i}.output.LayerNorm.weight" for i in range(3)),
]


@pytest.mark.parametrize("base", ["", "bert.", "module.", "model.bert."])
@pytest.mark.parametrize("other", ["", "bert.", "model.", "module.", "net.", "base_model.model.", "model._orig_mod."])
def test_every_prefix_on_either_side(base, other):
    found = align([base + name for name in BERT], [*(other + name for name in BERT), "classifier.weight"])
    assert found.names == {base + name: other + name for name in BERT}
    assert (found.describe() == "") == (base == other)


def test_a_compiled_part_inside_a_network():
    found = align(["a.0.w", "b.w"], ["a._orig_mod.0.w", "b.w"])
    assert found.names == {"a.0.w": "a._orig_mod.0.w", "b.w": "b.w"}
    assert found.describe() == "1 names in another spelling (a._orig_mod.0.w is a.0.w)"


def test_spellings_of_older_versions():
    old = [name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in BERT]
    assert align(BERT, old).names == dict(zip(BERT, old, strict=True))
    assert align(old, BERT).names == dict(zip(old, BERT, strict=True))
    new = ["model.language_model.layers.0.w", "model.vision_tower.w", "lm_head.weight"]
    version_4 = ["language_model.model.layers.0.w", "vision_tower.w", "language_model.lm_head.weight"]
    assert align(new, version_4).names == dict(zip(new, version_4, strict=True))


def test_what_has_little_in_common_stays_as_it_is():
    assert align(BERT, ["x.output.LayerNorm.weight", "y", "z"]).names == {}
    assert align(["layers.1.w", "layers.11.w"], ["layers.11.w"]).names == {"layers.11.w": "layers.11.w"}


def test_a_head_outside_the_prefix_keeps_its_name():
    base = [*(f"bert.{name}" for name in BERT), "cls.predictions.bias"]
    other = [*BERT, "cls.predictions.bias"]
    assert align(base, other).names == {f"bert.{name}": name for name in BERT} | {"cls.predictions.bias": base[-1]}
