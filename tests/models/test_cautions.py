"""Warnings of a merge: rounding, norms, repeated vectors, statistics, tokenizers, against numbers written plainly."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from lit_merge.errors import StructureMismatchError
from lit_merge.files.lazy import Computed
from lit_merge.models.merging.cautions import cautions_of, rank_cautions, statistics_cautions
from lit_merge.models.merging.inputs import Input
from lit_merge.models.merging.rounding_loss import RoundingLoss, is_narrow, written_cautions
from lit_merge.transforms import Departures, FisherMean, Override, RegMean, Scale, Sum, WithOverrides, chain, tsv_m
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.statistics import write_statistics


def lazily(tensors):
    return Computed({name: (one.shape, one.dtype) for name, one in tensors.items()}, tensors.__getitem__)


def base_of(tensors, files=()):
    return SimpleNamespace(parameters=lazily(tensors), files=tuple(files), name="base")


def given(tensors, task="a", path="", files=(), **digests):
    vector = TaskVector(lazily(tensors), task)
    return Input(path, vector, vector, False, tuple(files), digests)


def gaussian(size, seed, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_the_loss_is_what_distinguishes_the_stored_model_from_the_base(dtype, wide):
    base, update = gaussian(5000, 0), gaussian(5000, 1, 1e-3)
    update[:1000] = 0
    base = base if wide else base.to(dtype)
    stored = (base.float() + update).to(dtype)
    parts = [RoundingLoss.of(base[rows], update[rows], stored[rows]) for rows in (slice(0, 1500), slice(1500, None))]
    loss = parts[0] + parts[1]
    left = stored.double() - base.to(dtype).double()
    moved = update != 0
    assert loss.lost == pytest.approx(float((left - update.double()).norm() / update.double().norm()), rel=1e-6)
    assert loss.share_unchanged == pytest.approx(float((left[moved] == 0).double().mean()))
    assert loss.moved == 4000
    assert loss.scaled(3).lost == pytest.approx(loss.lost)
    assert RoundingLoss.read(loss.entry()) == pytest.approx((loss.lost, loss.share_unchanged), rel=1e-6)
    assert len(loss.entry()) == len(RoundingLoss().entry())


@pytest.mark.parametrize("size", [1, 511, 512, 3000])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e25])
def test_sums_of_squares_are_exact_to_a_millionth_whatever_the_size_of_the_numbers(size, scale):
    base, update = gaussian(size, 0, scale).bfloat16(), gaussian(size, 1, scale)
    stored = (base.float() + update).bfloat16()
    loss = RoundingLoss.of(base, update, stored)
    error = stored.double() - base.double() - update.double()
    assert loss.squared_norm == pytest.approx(float(update.double().square().sum()), rel=1e-6)
    assert loss.squared_error == pytest.approx(float(error.square().sum()), rel=1e-6)


def test_a_bfloat16_base_loses_four_fifths_of_a_small_vector():
    base = gaussian(200_000, 0).bfloat16()
    expected = {1e-2: (0.166, 0.175), 1e-3: (0.80, 0.775), 1e-4: (0.98, 0.977)}
    for scale, numbers in expected.items():
        update = gaussian(200_000, 1, scale)
        loss = RoundingLoss.of(base, update, (base.float() + update).bfloat16())
        assert (loss.lost, loss.share_unchanged) == pytest.approx(numbers, abs=0.01)


def test_no_vector_loses_nothing():
    zero = RoundingLoss.of(torch.ones(3), torch.zeros(3), torch.ones(3, dtype=torch.bfloat16))
    assert (zero.lost, zero.share_unchanged) == (0, 0)
    assert RoundingLoss.read("[") == RoundingLoss.read("{}") == (0, 0)
    assert is_narrow(torch.bfloat16)
    assert not is_narrow(torch.float32)
    assert not is_narrow(torch.int8)


def test_rounding_is_warned_of_from_a_sample_and_not_where_it_is_harmless():
    base = {"w": gaussian((300, 100), 0).bfloat16(), "v": gaussian(50, 3).bfloat16()}
    small = {"w": gaussian((300, 100), 1, 1e-3), "v": gaussian(50, 2, 1e-3)}
    large = {name: 300 * one for name, one in small.items()}
    inputs = [given(small, "small"), given(large, "large")]
    found = cautions_of(inputs, base_of(base), lambda name: torch.bfloat16)
    (line,) = found.estimates
    assert line.startswith("small: rounding to bfloat16 takes about ")
    assert "(estimated on 2,098 elements). Set dtype to float32" in line
    assert float(line.split("about ")[1].split(" %")[0]) == pytest.approx(80, abs=4)
    assert float(line.split("about ")[2].split(" %")[0]) == pytest.approx(78, abs=4)
    assert cautions_of(inputs, base_of(base), lambda name: torch.float32).estimates == ()
    assert cautions_of(inputs, base_of(base)).estimates == ()


def test_a_vector_three_times_as_long_is_named_with_both_norms():
    one = {f"block.{number}": gaussian((40, 100), number) for number in range(3)}
    for factor, warned in ((2.9, False), (3.1, True)):
        inputs = [given(one, "short"), given({name: factor * x for name, x in one.items()}, "long")]
        found = cautions_of([*inputs, given({name: 0 * x for name, x in one.items()}, "zero")], base_of(one))
        assert len(found.lasting) == warned
    (line,) = found.lasting
    norm = float(torch.cat([x.flatten() for x in one.values()]).double().norm())
    assert line.startswith("‖τ‖ of long is ")
    assert f"{factor:.1f} times that of short" in line
    assert float(line.split("is ")[1].split(",")[0]) == pytest.approx(factor * norm, rel=0.05)
    assert line.endswith("Scale the vectors, e.g. by a coefficient per task, or learn coefficients.")


def test_many_tensors_are_sampled_and_scaled_up():
    many = {f"layer.{number}": gaussian(50, number) for number in range(300)}
    inputs = [given(many, "a"), given({name: 10 * one for name, one in many.items()}, "b")]
    (line,) = cautions_of(inputs, base_of(many)).lasting
    norm = float(torch.cat(list(many.values())).double().norm())
    assert float(line.split("is ")[1].split(",")[0]) == pytest.approx(10 * norm, rel=0.1)
    assert "(estimated on 6,400 elements each)" in line


def test_the_same_vector_given_twice():
    one = {"w": gaussian((60, 60), 0)}
    other = {"w": one["w"] + 1e-6 * gaussian((60, 60), 1)}
    by_digest = [given(one, "a", "a.st", content_blake3="12" * 32), given(other, "b", "b.st", content_blake3="12" * 32)]
    (line,) = cautions_of(by_digest, base_of(one)).lasting
    assert line == (
        "a and b are the same vector, their content has the digest 1212121212121212: it counts twice. "
        "Remove one, unless that is meant."
    )
    (line,) = cautions_of([given(one, "a"), given(other, "b"), given(dict(one), "c")], base_of(one)).lasting
    assert line.startswith("a and c are the same vector, all of 2,048 elements that were compared are equal")
    (line,) = cautions_of([given(one, "a", "1.st"), given(dict(one), "a", "2.st")], base_of(one)).lasting
    assert line.startswith("1.st and 2.st are the same vector, ")
    zeros = {"w": torch.zeros(4)}
    assert cautions_of([given(zeros, "a"), given(zeros, "b")], base_of(zeros)).lines == ()


def test_more_vectors_than_a_matrix_has_directions():
    shapes = {"head": (2, 9), "thin": (3, 50), "w": (8, 8), "bias": (1,)}
    vectors = [TaskVector({n: torch.ones(s) for n, s in shapes.items()}, f"{place}") for place in range(4)]
    (line,) = rank_cautions(chain(Departures(tsv_m())), TaskVectors(vectors))
    assert line == (
        "4 vectors share the 2 directions of head, and 2 of 3 matrices have fewer directions than there are vectors: a "
        "merge that gives each vector its own cannot keep them apart there. Name these matrices in exclude, or merge "
        "fewer vectors."
    )
    assert rank_cautions(WithOverrides(Sum(), [Override(tsv_m(), names="w")]), TaskVectors(vectors)) == [line]
    assert rank_cautions(chain(Sum(), Scale(0.3)), TaskVectors(vectors)) == []
    assert rank_cautions(tsv_m(), TaskVectors(vectors[:2])) == []


def test_training_that_is_known_to_ruin_merges_is_said_of_each_vector():
    one = {"w": gaussian((60, 60), 0)}
    smooth = TaskVector(lazily(one), "smooth", metadata={"label_smoothing": "0.1"})
    inputs = [Input("", smooth, smooth, False, (), {}), given({"w": gaussian((60, 60), 1)}, "plain")]
    (line,) = cautions_of(inputs, base_of(one)).lasting
    assert line.startswith("smooth was trained with label smoothing 0.1: models of low confidence lose most")


def test_tokenizers_are_compared(tmp_path):
    one = {"w": gaussian(8, 0)}
    for folder, tokens in (("base", "abcd"), ("same", "abcd"), ("other", "abdce"), ("damaged", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    origin = base_of(one, [tmp_path / "base" / "model.safetensors"])
    inputs = [
        given({"w": gaussian(8, seed)}, folder, files=[tmp_path / folder / "model.safetensors"])
        for seed, folder in enumerate(("same", "other", "damaged"))
    ]
    first, second = cautions_of(inputs, origin).lasting
    assert first == (
        "the tokenizer of other differs from that of the base in 3 tokens ('c', 'd', 'e') of 4: their embeddings are "
        "merged with those of other tokens. Merge models of one tokenizer."
    )
    assert second == "the tokenizer of damaged cannot be read, and is not compared with that of the base."
    assert cautions_of(inputs, base_of(one)).lines == ()
    damaged = base_of(one, inputs[2].files)
    assert cautions_of(inputs, damaged).lasting == (
        "the tokenizer of the base cannot be read, and is not compared with those of the inputs.",
    )


def test_statistics_of_another_base_are_refused_and_of_an_unknown_one_said(tmp_path):
    for name, known in (("mine", "a" * 16), ("theirs", "b" * 16), ("unknown", "")):
        write_statistics(tmp_path / f"{name}.safetensors", "fisher", {"w": torch.ones(2)}, name, known)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("mine", "theirs", "unknown")}
    for transform in (FisherMean({"t": paths["mine"]}), chain(RegMean({"t": paths["mine"]}), Scale(1.0))):
        assert statistics_cautions(transform, "", "a" * 16) == []
        assert "as the vectors do not say" in statistics_cautions(transform, "", "")[0]
    mixed = chain(FisherMean({"t": paths["mine"], "u": paths["unknown"]}), Scale(1.0))
    (line,) = statistics_cautions(mixed, "a" * 16, "")
    assert line.startswith("unknown.safetensors: whether these statistics of u are of the same base model is not known")
    with pytest.raises(StructureMismatchError, match=r"\(fingerprint a{16}\), got fingerprint b{16}"):
        statistics_cautions(FisherMean({"t": paths["theirs"]}), "", "a" * 16)
    assert statistics_cautions(Sum(), "", "") == []


def test_what_a_header_holds_is_said_again():
    loss = RoundingLoss(0.64, 1.0, 70, 100)
    header = {"warnings": json.dumps(["one", "two"]), "rounding": loss.entry()}
    assert written_cautions(header, "m.safetensors") == [
        "one",
        "two",
        "m.safetensors: rounding takes 80.0 % of ‖τ‖, and 70.0 % of the elements with τ ≠ 0 stay as they are without "
        "it. Set dtype to float32 to keep all of it.",
    ]
    (noisy,) = written_cautions({"rounding": RoundingLoss(6.25, 1.0, 7, 10).entry()}, "m")
    assert noisy.startswith("m: rounding adds noise of 2.5 times ‖τ‖, and 70.0 % of the elements ")
    assert written_cautions({"warnings": "{", "rounding": RoundingLoss(1e-4, 1.0).entry()}, "m") == []
    assert written_cautions({}, "m") == []
