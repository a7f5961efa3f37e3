"""Cosines, norms by depth, overlap and sign conflicts, against plain restatements in float64."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import lit_merge.metrics.signs
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.metrics import CosineMatrix, NormByDepth, SignConflict, cosines, pairwise_products, sign_counts
from lit_merge.transforms import Trim
from lit_merge.vectors import TaskVector, TaskVectors

SHAPES = {
    "conv1.weight": (3, 2),
    "transformer.resblocks.0.attn.in_proj_weight": (4, 5),
    "transformer.resblocks.0.ln_1.bias": (4,),
    "transformer.resblocks.1.mlp.c_fc.weight": (5, 2),
    "ln_post.weight": (7,),
    "proj": (),
}
PLACES = {"embedding": ["conv1.weight"], "head": ["ln_post.weight", "proj"]}
PLACES |= {f"block {block}": [name for name in SHAPES if f".{block}." in name] for block in (0, 1)}
TASKS = ["one", "two", "three"]


def make_vectors(base=None, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    rows = [
        TaskVector({n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}, task)
        for task in TASKS
    ]
    return TaskVectors(rows, base=base)


def flat(vectors, names):
    """``[T][n]``: plain numbers of some parameters."""
    stacks = [vectors[name].double().reshape(len(vectors.tasks), -1) for name in names]
    return torch.cat(stacks, dim=1).tolist()


def cosine(one, other):
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))


def test_the_decoder_of_a_network_counts_after_its_encoder():
    names = {
        "encoder.block.0.w": 2.0,
        "encoder.final_layer_norm.weight": 3.0,
        "decoder.block.0.w": 4.0,
        "lm_head.w": 5.0,
    }
    vectors = TaskVectors([TaskVector({name: torch.tensor([value]) for name, value in names.items()})])
    metric = NormByDepth(["one"], 2)
    for name in reversed(names):
        metric.update(vectors.restrict([name]))
    assert metric.places == ("whole", "embedding", "block 0", "block 1", "head")
    assert metric.compute()[2:].flatten().tolist() == [pytest.approx(math.sqrt(13)), 4.0, 5.0]
    assert NormByDepth(["one"]).places == ("whole", "parameters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosines_and_norms_are_those_of_all_numbers_in_a_place(dtype):
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for name, shape in SHAPES.items()}
    vectors = make_vectors(base, dtype)
    metric, norm, relative = CosineMatrix(TASKS, 2), NormByDepth(TASKS, 2), NormByDepth(TASKS, 2, relative=True)
    for one in (metric, norm, relative):
        one.update(vectors)
    assert metric.places == ("whole", "embedding", "block 0", "block 1", "head")
    for index, place in enumerate(metric.places):
        names = list(SHAPES) if place == "whole" else PLACES[place]
        rows = flat(vectors, names)
        expected = torch.tensor([[cosine(a, b) for b in rows] for a in rows], dtype=torch.float64)
        assert (metric.compute()[index] - expected).abs().max() < 1e-14
        lengths = torch.tensor([math.sqrt(math.fsum(a * a for a in row)) for row in rows], dtype=torch.float64)
        assert torch.allclose(norm.compute()[index], lengths, rtol=1e-14, atol=0)
        start = torch.cat([base[name].double().flatten() for name in names]).norm()
        assert torch.allclose(relative.compute()[index], lengths / start, rtol=1e-14, atol=0)
    assert metric.compute().dtype == torch.float64


def test_products_are_exact_sums_of_float32_products():
    """A sum that float32 would round away."""
    stack = torch.tensor([[2.0**13, 1.0, 2.0**13], [2.0**13, 1.0, -(2.0**13)]])
    assert pairwise_products(stack).tolist() == [[2.0**27 + 1, 1.0], [1.0, 2.0**27 + 1]]
    assert cosines(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("kind", [CosineMatrix, NormByDepth, SignConflict])
def test_in_pieces_is_at_once(kind, monkeypatch):
    vectors = make_vectors()
    if kind is SignConflict:
        vectors = Trim(0.4)(vectors)
    whole, parts = kind(TASKS, 2), kind(TASKS, 2)
    whole.update(vectors)
    parts.update(vectors, ["proj", "transformer.resblocks.1.mlp.c_fc.weight"])
    parts = pickle.loads(pickle.dumps(parts))
    parts.update(vectors, [name for name in SHAPES if name not in ("proj", "transformer.resblocks.1.mlp.c_fc.weight")])
    small = kind(TASKS, 2)
    monkeypatch.setattr(TaskVectors, "chunk_length", lambda self, name: 3)
    small.update(vectors)
    results = [metric.compute() for metric in (whole, parts, small)]
    results = [one if isinstance(one, dict) else {"value": one} for one in results]
    for name, value in results[0].items():
        for other in results[1:]:
            assert torch.allclose(value, other[name], rtol=1e-13, atol=1e-15, equal_nan=True)
    whole.reset()
    whole.update(vectors)
    assert torch.allclose(next(iter(results[0].values())), _first(whole), rtol=1e-13, equal_nan=True)


def _first(metric):
    found = metric.compute()
    return next(iter(found.values())) if isinstance(found, dict) else found


def test_a_place_without_parameters_is_nan_and_a_zero_vector_has_cosine_zero():
    rows = [TaskVector({"proj": value}) for value in (torch.zeros(3), torch.ones(3))]
    metric, norm = CosineMatrix(["a", "b"], 1), NormByDepth(["a", "b"], 1)
    for one in (metric, norm):
        one.update(TaskVectors(rows))
    assert metric.compute()[0].tolist() == metric.compute()[3].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert metric.compute()[1:3].isnan().all()
    assert norm.compute()[1:3].isnan().all()
    assert norm.compute()[3].tolist() == [0.0, pytest.approx(math.sqrt(3))]


def test_signs_are_counted_entry_by_entry():
    trimmed = Trim(0.4)(make_vectors())
    metric = SignConflict(TASKS, 2)
    metric.update(trimmed)
    found = metric.compute()
    for index, place in enumerate(metric.places):
        columns = list(zip(*flat(trimmed, list(SHAPES) if place == "whole" else PLACES[place]), strict=True))
        held = [[value for value in column if value] for column in columns]
        any_, several = [column for column in held if column], [column for column in held if len(column) > 1]
        mixed = [column for column in several if min(column) < 0 < max(column)]
        ratio = len(several) / len(any_)
        assert float(found["overlap"][index]) == ratio
        if several:
            assert float(found["conflict"][index]) == len(mixed) / len(several)
        else:
            assert found["conflict"][index].isnan()
        for s in range(3):
            for t in range(3):
                both = [c for c in columns if c[s] and c[t]]
                either = [c for c in columns if c[s] or c[t]]
                two_signs = [c for c in both if (c[s] > 0) != (c[t] > 0)]
                overlap, conflict = found["pair_overlap"][index, s, t], found["pair_conflict"][index, s, t]
                assert overlap.isnan() if not either else float(overlap) == len(both) / len(either)
                assert conflict.isnan() if not both else float(conflict) == len(two_signs) / len(both)
    assert 0 < float(found["conflict"][0]) < 1


def test_signs_of_long_stacks_are_counted_in_exact_parts(monkeypatch):
    stack = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)).relu() - 0.3
    whole = sign_counts(stack)
    monkeypatch.setattr(lit_merge.metrics.signs, "_EXACT", 7)
    for one, other in zip(whole, sign_counts(stack), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(whole, sign_counts(stack.view(4, 10, 100)), strict=True))


def test_what_is_refused():
    message = (
        r"CosineMatrix: expected a list of tasks and a number of blocks of at least 0, got \[\] and 0\. Use vectors"
    )
    with pytest.raises(ConfigurationError, match=message):
        CosineMatrix([])
    with pytest.raises(ConfigurationError, match=r"got 'one' and 0\. Use vectors\.tasks"):
        SignConflict("one")
    with pytest.raises(ConfigurationError, match=r"got \['one'\] and -1\. Use vectors\.tasks"):
        NormByDepth(["one"], -1)
    for kind in (CosineMatrix, NormByDepth, SignConflict):
        message = f"{kind.__name__}: expected 2 task vectors, got 3. Give the same ones in every update."
        with pytest.raises(StructureMismatchError, match=message):
            kind(["one", "two"], 2).update(make_vectors())
        with pytest.raises(StructureMismatchError, match="network with 1 blocks, got one with 2"):
            kind(TASKS, 1).update(make_vectors())
    with pytest.raises(ConfigurationError, match="base: expected the pre-trained parameters, got none"):
        NormByDepth(TASKS, 2, relative=True).update(make_vectors())


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_plots_show_the_numbers():
    vectors = make_vectors()
    metric, norm, signs = CosineMatrix(TASKS, 2), NormByDepth(TASKS, 2), SignConflict(TASKS, 2)
    metric.update(vectors)
    figure, axes = metric.plot()
    whole = metric.compute()[0]
    shown = [f"{float(whole[i, j]):.2f}".replace("-", "−") for i in range(3) for j in range(3) if i != j]
    assert texts(axes) == shown
    assert axes.get_figure() is figure
    assert metric.plot(ax=axes)[1] is axes
    norm.update(vectors)
    _, axes = norm.plot()
    inside, outside = axes.lines[:2]
    assert list(inside.get_xdata()) == [1, 2]
    assert list(inside.get_ydata()) == norm.compute()[2:4, 0].tolist()
    assert list(outside.get_ydata()) == norm.compute()[[1, 4], 0].tolist()
    signs.update(Trim(0.4)(vectors))
    _, axes = signs.plot()
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert heights == pytest.approx([100 * float(value) for value in signs.compute()["overlap"]])
