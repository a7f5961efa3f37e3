"""Which differences between a base and a fine-tune are normal, and what the others are told."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.checkpoints.pairing.differences import Rules, fit_to_base, parameter_names
from lit_merge.checkpoints.pairing.ties import tied_names
from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError
from lit_merge.vectors import TaskVector, TaskVectors, merged_parameters

TABLE = torch.arange(12.0).reshape(6, 2)


def network(shift: float = 0.0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tiny language model, with what libraries store besides its parameters."""
    return {
        "embed_tokens.weight": TABLE + shift,
        **{f"layers.{block}.self_attn.q_proj.weight": torch.full((2, 2), block + shift) for block in range(3)},
        "norm.weight": torch.ones(2) + shift,
        **more,
    }


def said(base, tuned, **rules):
    fitted = fit_to_base(base, tuned, Rules(**rules))
    return fitted, " | ".join(fitted.notes)


def test_integer_buffers_are_the_base_s():
    ids = {"embeddings.position_ids": torch.arange(4)[None]}
    fitted, note = said(network(**ids), network(1.0))
    assert note == "without 1 buffer (embeddings.position_ids), which no training changes: the base's"
    assert not fitted.absent
    assert set(fitted.tuned) == set(network())
    _, note = said(network(), network(1.0, **ids))
    assert note == "1 buffer (embeddings.position_ids) that the base has not: not written"
    _, note = said(network(**ids), network(**{"embeddings.position_ids": torch.arange(4)[None] + 1}))
    assert note == "other values of 1 buffer (embeddings.position_ids) than the base: the base's"
    assert said(network(**ids), network(1.0, **ids))[1] == ""


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "h.0.attn.masked_bias", "h.0.attn.bias"])
def test_computed_buffers_are_no_parameters(name):
    value = torch.ones(1, 1, 4, 4)
    assert name not in parameter_names(network(**{name: value}))
    assert said(network(**{name: value}), network(1.0))[0].absent == ()
    assert said(network(), network(1.0, **{name: value}))[0].absent == ()


def test_a_partial_fine_tune_is_zero_where_it_has_nothing():
    tuned = {"layers.0.self_attn.q_proj.weight": torch.full((2, 2), 5.0)}
    vector = TaskVector.from_checkpoints(network(), tuned, "part")
    assert set(vector) == set(network())
    assert {name for name in vector if vector[name].any()} == set(tuned)
    assert "no 4 of 5 parameters (embed_tokens.weight, layers.1" in vector.metadata["differences"]


def test_a_shallower_network_is_no_partial_fine_tune():
    shallow = {name: value for name, value in network(1.0).items() if "layers.2" not in name}
    with pytest.raises(StructureMismatchError, match=r"the 3 blocks of the base, got a whole network of 2\. Use the"):
        fit_to_base(network(), shallow)


@pytest.mark.parametrize("shorter", [("decoder",), ("encoder",), ("encoder", "decoder")])
def test_a_shorter_stack_of_an_encoder_decoder_is_none_either(shorter):
    names = [f"{stack}.block.{i}.layer.0.SelfAttention.q.weight" for stack in ("encoder", "decoder") for i in range(3)]
    base = {"shared.weight": torch.ones(3, 2), **{name: torch.ones(2, 2) for name in names}}
    lacking = {f"{stack}.block.2.layer.0.SelfAttention.q.weight" for stack in shorter}
    tuned = {name: value for name, value in base.items() if name not in lacking}
    with pytest.raises(
        StructureMismatchError, match=rf"the 6 blocks of the base, got a whole network of {6 - len(lacking)}"
    ):
        fit_to_base(base, tuned)
    part = {name: value for name, value in tuned.items() if name != "shared.weight"}
    assert set(fit_to_base(base, part).absent) == {*lacking, "shared.weight"}


def test_heads_that_only_a_fine_tune_has():
    head = {"classifier.weight": torch.ones(3, 2), "classifier.bias": torch.ones(3)}
    with pytest.raises(
        StructureMismatchError,
        match=r"2 unexpected \(classifier\.weight, classifier\.bias\)\. Set leave_out to \[classifier\.\*\] to merge "
        r"all but the heads, or heads to keep to write them for themselves\.",
    ):
        fit_to_base(network(), network(1.0, **head))
    fitted, note = said(network(), network(1.0, **head), leave_out=("classifier.*",))
    assert note == "left out as asked: 2 tensors (classifier.bias, classifier.weight)"
    assert not fitted.heads
    fitted, note = said(network(), network(1.0, **head), keep_heads=True)
    assert note == "a head of its own: 2 tensors (classifier.weight, classifier.bias), written for itself"
    assert torch.equal(fitted.heads["classifier.weight"], head["classifier.weight"])


def test_patterns_fit_the_names_of_either_side():
    tuned = {f"model.{name}": value for name, value in network(1.0).items()}
    for pattern in ("layers.1.*", "model.layers.1.*"):
        fitted, note = said(network(), tuned, leave_out=(pattern,))
        assert "layers.1.self_attn.q_proj.weight" not in fitted.tuned
        assert len(fitted.tuned) == 4
        assert "left out as asked: 1 tensors (layers.1.self_attn.q_proj.weight)" in note


def test_heads_of_another_shape():
    base, tuned = network(**{"score.weight": torch.ones(2, 2)}), network(1.0, **{"score.weight": torch.ones(5, 2)})
    with pytest.raises(StructureMismatchError, match=r"score\.weight \(5, 2\).*Set leave_out to \[score\.\*\] to merge "
                       r"all but the heads\."):  # fmt: skip
        fit_to_base(base, tuned)
    vector = TaskVector.from_checkpoints(base, tuned, rules=Rules(leave_out=("score.*",)))
    assert not vector["score.weight"].any()
    assert vector["norm.weight"].all()


def test_what_else_only_a_fine_tune_has_is_refused():
    with pytest.raises(
        StructureMismatchError, match=r"1 unexpected \(gate\.weight\)\. Use parameters of the same arch"
    ):
        fit_to_base(network(), network(1.0, **{"gate.weight": torch.ones(1)}))


def test_a_pattern_that_fits_nothing():
    with pytest.raises(ConfigurationError, match=r"leave_out: expected patterns that fit .* got clasifier\.\*\."):
        TaskVector.from_checkpoints(network(), network(1.0), rules=Rules(leave_out=("clasifier.*",)))


def test_vocabularies_of_other_sizes_are_refused_with_the_way_out():
    tuned = {**network(1.0), "embed_tokens.weight": torch.ones(8, 2)}
    with pytest.raises(
        StructureMismatchError,
        match=r"embed_tokens\.weight \(8, 2\) instead of \(6, 2\)\)\. Set rows to base, common or union, as the voc",
    ):
        fit_to_base(network(), tuned)


def test_quantised_bases_are_refused():
    base = {**network(), "layers.0.self_attn.q_proj.weight": torch.ones(64, 64, dtype=torch.int8)}
    tuned = {**network(), "layers.0.self_attn.q_proj.weight": torch.ones(64, 64, dtype=torch.int8)}
    with pytest.raises(StructureMismatchError, match=r"a base with floating-point weights, got 1 quantised ones"):
        fit_to_base(base, tuned)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_eight_bit_floats_with_a_scale_are_quantised(scale):
    weight = "layers.0.self_attn.q_proj.weight"
    eight = {**network(), weight: torch.ones(64, 64).to(torch.float8_e4m3fn)}
    assert weight in fit_to_base(eight, eight).tuned
    scaled = {**eight, weight.replace("weight", scale): torch.tensor(0.5)}
    with pytest.raises(StructureMismatchError, match=r"got 1 quantised ones \(layers\.0\.self_attn\.q_proj\.weight\)"):
        fit_to_base(scaled, scaled)


# Ties


def test_a_tied_head_that_is_stored_twice():
    fitted, note = said(network(), network(1.0, **{"lm_head.weight": TABLE + 1.0}))
    assert note == "lm_head.weight is a copy of a tied table: not counted twice"
    assert set(fitted.tuned) == set(network())
    fitted, note = said(network(**{"lm_head.weight": TABLE}), network(1.0))
    assert note == ""
    assert not fitted.absent


def test_a_tie_that_is_broken_is_refused():
    for base in (network(), network(**{"lm_head.weight": TABLE})):
        with pytest.raises(
            StructureMismatchError, match=r"expected lm_head\.weight to be the embedding again.* Set leave"
        ):
            fit_to_base(base, network(1.0, **{"lm_head.weight": TABLE + 2.0}))
    fitted, _ = said(network(), network(1.0, **{"lm_head.weight": TABLE + 2.0}), leave_out=("lm_head.*",))
    assert set(fitted.tuned) == set(network())


def test_a_table_under_the_other_of_its_names():
    tuned = network(1.0)
    tuned["lm_head.weight"] = tuned.pop("embed_tokens.weight")
    fitted, note = said(network(), tuned)
    assert note == "lm_head.weight is the base's embed_tokens.weight"
    assert torch.equal(fitted.tuned["embed_tokens.weight"], TABLE + 1.0)


def test_shared_storage_of_a_pytorch_file_is_counted_once(tmp_path):
    table, other = torch.ones(4, 5), torch.ones(3)
    for path, shift in ((tmp_path / "base.pt", 0.0), (tmp_path / "tuned.pt", 1.0)):
        shared = table + shift
        torch.save({"a.weight": shared, "b.weight": shared, "c": other}, path)
    assert tied_names(open_checkpoint(tmp_path / "base.pt")) == {"b.weight": "a.weight"}
    vector = TaskVector.from_checkpoints(tmp_path / "base.pt", tmp_path / "tuned.pt")
    assert vector.norm() == pytest.approx(20**0.5)  # and not 40 ** 0.5
    state = {"a.weight": table, "b.weight": table, "c": other}
    applied = vector.apply_to(state)
    assert torch.equal(applied["a.weight"], table + 1)
    assert torch.equal(applied["b.weight"], table + 1)


def test_equal_copies_in_a_safetensors_file(tmp_path):
    save_file(network(**{"lm_head.weight": TABLE.clone()}), tmp_path / "base.safetensors")
    assert tied_names(open_checkpoint(tmp_path / "base.safetensors")) == {"lm_head.weight": "embed_tokens.weight"}
    assert tied_names(network(**{"lm_head.weight": TABLE + 1})) == {}


# Running statistics


def test_running_statistics_have_no_difference():
    base = {"bn.weight": torch.ones(1), "bn.running_var": torch.tensor([1.0]), "bn.running_mean": torch.zeros(1)}
    tuned = {"bn.weight": torch.zeros(1), "bn.running_var": torch.tensor([0.3]), "bn.running_mean": torch.ones(1)}
    vector = TaskVector.from_checkpoints(base, tuned)
    assert list(vector) == ["bn.weight"]
    fitted = fit_to_base(base, tuned)
    assert {name: value.item() for name, value in fitted.statistics.items()} == {
        "bn.running_var": pytest.approx(0.3),
        "bn.running_mean": 1.0,
    }


def test_a_variance_below_zero_is_never_written():
    base = {"bn.running_var": torch.tensor([1.0])}
    vectors = [TaskVector({"bn.running_var": torch.tensor([-0.7])}, task) for task in "ab"]
    line = r"bn\.running_var: expected a running variance of at least 0, got -0\.4 from a sum of task vectors\."
    with pytest.raises(NonFiniteError, match=line):
        dict(merged_parameters(base, vectors[0] + vectors[1]))
    with pytest.raises(NonFiniteError, match=line):
        (vectors[0] + vectors[1]).apply_to(base)


# Vectors with other sets of names


def test_vectors_of_partial_fine_tunes_are_zero_where_they_lack_something():
    whole = TaskVector({"a": torch.ones(2), "b": torch.ones(3)}, "whole", metadata={"base_fingerprint": "f"})
    part = TaskVector({"b": torch.full((3,), 2.0)}, "part", metadata={"base_fingerprint": "f"})
    other = TaskVector({"c": torch.ones(1)}, "other", metadata={"base_fingerprint": "f"})
    for given in ([whole, part, other], [other, part, whole]):
        vectors = TaskVectors(given)
        assert set(vectors.names) == {"a", "b", "c"}
        rows = {
            task: {name: vectors[name][index].sum().item() for name in "abc"}
            for index, task in enumerate(vectors.tasks)
        }
        assert rows == {
            "whole": {"a": 2.0, "b": 3.0, "c": 0.0},
            "part": {"a": 0.0, "b": 6.0, "c": 0.0},
            "other": {"a": 0.0, "b": 0.0, "c": 1.0},
        }
    assert "part: no 2 of 3 parameters (" in " ".join(vectors.notes)


def test_vectors_of_files_are_completed_without_reading(tmp_path):
    for name, tensors in (("whole", {"a": torch.ones(2), "b": torch.ones(3)}), ("part", {"b": torch.ones(3)})):
        TaskVector(tensors, name).save(tmp_path / f"{name}.safetensors")
    vectors = TaskVectors([TaskVector.load(tmp_path / f"{name}.safetensors") for name in ("part", "whole")])
    assert vectors["a"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert [chunk.tolist() for _, chunk in vectors.chunks("a")] == [[[0.0, 0.0], [1.0, 1.0]]]


@pytest.mark.parametrize(("before", "after"), [("", "module."), ("module.", "")])
def test_a_head_beside_the_prefix_of_the_backbone_is_part_of_the_base(before, after, tmp_path):
    names = ("backbone.patch_embed.proj.weight", "backbone.blocks.0.attn.qkv.weight", "head.weight")
    for path, prefix, value in (("base", before, 0.0), ("tuned", after, 1.0)):
        save_file({prefix + name: torch.full((2, 2), value) for name in names}, tmp_path / f"{path}.safetensors")
    vector = TaskVector.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert set(vector) == {before + name for name in names}
    assert all(bool((vector[name] == 1).all()) for name in vector)
