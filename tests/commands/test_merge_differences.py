"""``merge`` on pairs that differ in what is normal: said in the plan, the output line, the header and the card."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_merge.commands.merge import merge
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.vectors import TaskVector

HEAD = {"classifier.weight": torch.ones(3, 4), "classifier.bias": torch.zeros(3)}


def encoder(shift=0.0, prefix="", **more):
    torch.manual_seed(0)
    tensors = {
        "embeddings.word_embeddings.weight": torch.randn(7, 4),
        **{f"encoder.layer.{i}.attention.self.query.weight": torch.randn(4, 4) for i in range(2)},
        **{f"encoder.layer.{i}.output.LayerNorm.weight": torch.ones(4) for i in range(2)},
    }
    return {prefix + name: value + shift for name, value in tensors.items()} | more


@pytest.fixture
def save(tmp_path):
    def write(name, tensors):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    return write


def run(tmp_path, base, *vectors, **settings):
    settings = {"recipe": "task_arithmetic", "settings": {"coefficient": 1.0}, "overwrite": True, **settings}
    output = tmp_path / "out" / "merged.safetensors"
    result = merge(list(vectors), str(output), base=base, **settings)
    return result, load_file(output)


def test_a_difference_is_said_everywhere(save, tmp_path):
    base = save("base", encoder(**{"embeddings.position_ids": torch.arange(5)[None]}))
    tuned = save("tuned", encoder(0.5))
    line = "tuned: without 1 buffer (embeddings.position_ids), which no training changes: the base's"
    result, merged = run(tmp_path, base, tuned)
    assert torch.equal(merged["embeddings.position_ids"], torch.arange(5)[None])
    assert line in result.describe()
    assert line in (tmp_path / "out" / "merged.md").read_text(encoding="utf-8")
    with safe_open(tmp_path / "out" / "merged.safetensors", "pt") as file:
        assert json.loads(file.metadata()["differences"]) == [line]
    plan = merge([tuned], str(tmp_path / "new.safetensors"), base=base, recipe="weight_average", dry_run=True)
    assert f"differences    {line}" in plan.describe()


@pytest.mark.parametrize("base_prefix", ["", "module.", "bert."])
@pytest.mark.parametrize("prefix", ["", "model.bert.", "base_model.model.", "model._orig_mod."])
def test_prefixes_are_aligned_for_each_input(save, tmp_path, base_prefix, prefix):
    base = save("base", encoder(prefix=base_prefix))
    inputs = [save("one", encoder(0.5, prefix)), save("two", encoder(0.25, "net."))]
    vector = TaskVector.from_checkpoints(encoder(), encoder(1.0), "three")
    vector.save(tmp_path / "three.safetensors")
    _, merged = run(tmp_path, base, *inputs, str(tmp_path / "three.safetensors"))
    assert set(merged) == set(encoder(prefix=base_prefix))
    for name, value in encoder(1.75, base_prefix).items():
        torch.testing.assert_close(merged[name], value)


def test_heads_are_left_out_or_written_for_themselves(save, tmp_path):
    base, tuned = save("base", encoder()), save("tuned", encoder(0.5, "bert.", **HEAD))
    with pytest.raises(StructureMismatchError, match=r"Set leave_out to \[classifier\.\*\] .* or heads to keep"):
        run(tmp_path, base, tuned)
    _, merged = run(tmp_path, base, tuned, leave_out=["classifier.*"])
    assert set(merged) == set(encoder())
    result, _ = run(tmp_path, base, tuned, save("plain", encoder(0.1)), heads="keep")
    head = load_file(tmp_path / "out" / "merged-tuned-head.safetensors")
    assert all(torch.equal(head[name], value) for name, value in HEAD.items())
    assert not (tmp_path / "out" / "merged-plain-head.safetensors").exists()
    assert "a head of its own: 2 tensors" in result.describe()
    for tasks, wrong in ((["cars", "cars"], "cars"), (["a/b", "c"], "a/b")):  # or one would be lost, or lie elsewhere
        with pytest.raises(ConfigurationError, match=rf"expected tasks that can name a file each, got '{wrong}'"):
            run(tmp_path, base, tuned, save("again", encoder(0.2, **HEAD)), heads="keep", tasks=tasks)
    with pytest.raises(ConfigurationError, match=r"heads: expected refuse or keep, got 'drop'\."):
        run(tmp_path, base, tuned, heads="drop")
    with pytest.raises(ConfigurationError, match=r"leave_out: expected patterns that fit a name of one of the vectors"):
        run(tmp_path, base, tuned, leave_out=["classifier.*", "clasifier"])


def test_partial_fine_tunes_are_zero_where_they_have_nothing(save, tmp_path):
    part = {name: value for name, value in encoder(0.5).items() if "attention" in name}
    base, tuned, whole = save("base", encoder()), save("part", part), save("whole", encoder(1.5))
    result, merged = run(tmp_path, base, tuned, whole)
    assert "part: no 3 of 5 parameters (" in result.describe()
    for name, value in encoder(1.5).items():
        torch.testing.assert_close(merged[name], value + (0.5 if name in part else 0.0))
    parts = [{"Trim": {"density": 1.0}}, "ElectSign", "DisjointMean"]
    _, merged = run(tmp_path, base, tuned, whole, recipe=None, settings=None, parts=parts)
    for name, value in encoder(1.5).items():  # those that are there are counted, and no others
        torch.testing.assert_close(merged[name], value - (0.5 if name in part else 0.0))


def test_ties_are_counted_once_and_written_as_they_were(save, tmp_path):
    table = encoder()["embeddings.word_embeddings.weight"]
    base = save("base", encoder(**{"lm_head.weight": table.clone()}))
    tuned = save("tuned", encoder(0.5))
    result, merged = run(tmp_path, base, tuned)
    assert torch.equal(merged["lm_head.weight"], merged["embeddings.word_embeddings.weight"])
    assert "lm_head.weight is embeddings.word_embeddings.weight again: merged once" in result.describe()
    _, merged = run(tmp_path, base, tuned, dtype="bfloat16")
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(merged["lm_head.weight"], merged["embeddings.word_embeddings.weight"])


def batch_norm(mean, variance):
    return {
        "fc.weight": torch.ones(2, 2),
        "bn.running_mean": torch.tensor([mean]),
        "bn.running_var": torch.tensor([variance]),
        "bn.num_batches_tracked": torch.tensor(int(10 * variance)),
    }


def test_running_statistics_are_averaged_and_never_a_sum(save, tmp_path):
    base = save("base", batch_norm(0.0, 1.0))
    inputs = [save("one", batch_norm(1.0, 0.3)), save("two", batch_norm(2.0, 0.3))]
    result, merged = run(tmp_path, base, *inputs)
    assert merged["bn.running_var"].item() == pytest.approx(0.3)
    assert merged["bn.running_mean"].item() == pytest.approx(1.5)
    assert merged["bn.num_batches_tracked"].item() == 10
    assert (
        "2 running statistics (bn.running_mean ...): the mean of 2 of 2 inputs, no sum of differ" in result.describe()
    )
    _, merged = run(tmp_path, base, *inputs, running_statistics="base")
    assert merged["bn.running_var"].item() == 1.0
    old = {"fc.weight": torch.ones(2, 2), "bn.running_var": torch.tensor([-0.7]), "bn.running_mean": torch.ones(1)}
    TaskVector(old, "old").save(tmp_path / "old.safetensors")  # as versions wrote them that took them for parameters
    _, merged = run(tmp_path, base, *[str(tmp_path / "old.safetensors")] * 2)
    assert merged["bn.running_var"].item() == pytest.approx(0.3)
    assert merged["fc.weight"].mean() == 3.0


def test_rows_of_vocabularies(save, tmp_path):
    name = "embeddings.word_embeddings.weight"
    more = torch.cat([encoder(0.5)[name], torch.full((2, 4), 9.0)])
    base, tuned = save("base", encoder()), save("tuned", {**encoder(0.5), name: more})
    with pytest.raises(
        StructureMismatchError, match=r"\(9, 4\) instead of \(7, 4\)\)\. Set rows to base, common or un"
    ):
        run(tmp_path, base, tuned)
    for rows, expected in (("base", more[:7]), ("common", more[:7]), ("union", more)):
        result, merged = run(tmp_path, base, tuned, rows=rows)
        torch.testing.assert_close(merged[name], expected)
        assert "vocabularies of 7 and 9 rows" in result.describe()
    fewer = save("fewer", {**encoder(0.5), name: encoder(0.5)[name][:5]})
    _, merged = run(tmp_path, base, fewer, rows="common")
    assert merged[name].shape == (5, 4)
    _, merged = run(tmp_path, base, fewer, rows="base")
    torch.testing.assert_close(merged[name], torch.cat([encoder(0.5)[name][:5], encoder()[name][5:]]))


def tower(shift=0.0, prefix="", projection=True):
    """The names of transformers' CLIPVisionModel: version 4 puts ``vision_model.`` before them, version 5 nothing."""
    torch.manual_seed(1)
    tensors = {
        "embeddings.class_embedding": torch.randn(4),
        **{f"encoder.layers.{i}.self_attn.{part}_proj.weight": torch.randn(4, 4) for i in range(2) for part in "qkv"},
        "post_layernorm.weight": torch.ones(4),
    }
    head = {"visual_projection.weight": torch.randn(3, 4) + shift} if projection else {}
    return {prefix + name: value + shift for name, value in tensors.items()} | head


@pytest.mark.parametrize(("base_prefix", "prefix"), [("vision_model.", ""), ("", "vision_model.")])
def test_image_towers_of_two_versions_of_transformers(save, tmp_path, base_prefix, prefix):
    base, tuned = save("base", tower(prefix=base_prefix)), save("tuned", tower(0.5, prefix))
    _, merged = run(tmp_path, base, tuned)
    assert merged.keys() == tower(prefix=base_prefix).keys()
    for name, value in tower(0.5, base_prefix).items():
        torch.testing.assert_close(merged[name], value)


def test_image_towers_without_the_projection(save, tmp_path):
    with_it, without = save("with", tower(0.5)), save("without", tower(0.5, projection=False))
    result, merged = run(tmp_path, save("base", tower()), without)
    assert "without: no 1 of 9 parameters (visual_projection.weight): unchanged there" in result.describe()
    assert torch.equal(merged["visual_projection.weight"], tower()["visual_projection.weight"])
    base = save("base", tower(projection=False))
    with pytest.raises(
        StructureMismatchError, match=r"1 unexpected \(visual_projection\.weight\).*set leave_out to what"
    ):
        run(tmp_path, base, with_it)
    _, merged = run(tmp_path, base, with_it, leave_out=["visual_projection.weight"])
    assert merged.keys() == tower(projection=False).keys()


def test_position_indices_of_another_dtype_or_shifted(save, tmp_path):
    name, own = "embeddings.position_ids", torch.arange(5)[None]
    base = save("base", encoder(**{name: own}))
    result, merged = run(tmp_path, base, save("same", encoder(0.5, **{name: own.int()})))
    assert torch.equal(merged[name], own)
    assert "position_ids" not in result.describe()
    result, merged = run(tmp_path, base, save("shifted", encoder(0.5, **{name: own + 1})))
    assert torch.equal(merged[name], own)
    assert "shifted: other values of 1 buffer (embeddings.position_ids) than the base: the base's" in result.describe()
