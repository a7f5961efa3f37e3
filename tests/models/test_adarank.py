"""Masks over singular values: values and gradients against autograd on plain sums, storage, files, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from builders.learned_merge import BlockEncoder
from torch.func import functional_call

from lit_merge import Coefficients, MergedModel, TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.models.adarank import AdaRank
from lit_merge.transforms import LearnedScale, Sum, Trim, chain

TASKS = ("a", "b", "c")
BLOCKS = AdaRank(rank_fraction=0.6, include=r"(blocks\.\d+|proj)\.weight")
MASKED = {"proj.weight": 5, "blocks.0.weight": 5, "blocks.1.weight": 5, "blocks.2.weight": 5}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return BlockEncoder().to(dtype).eval()


def vectors(module):
    generator = torch.Generator().manual_seed(1)
    own = dict(module.named_parameters())
    rows = [{n: 0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in own.items()} for _ in TASKS]
    return TaskVectors([TaskVector(row, task) for row, task in zip(rows, TASKS, strict=True)])


def model(module=None, masks=BLOCKS, init=0.3, spread=True, **settings):
    """With logits on both sides of zero, all of another size."""
    module = module or network()
    made = MergedModel(module, vectors(module), init=init, clamp=None, masks=masks, **settings)
    if spread:
        with torch.no_grad():
            made.mask_logits.copy_(torch.randn(made.mask_logits.shape, generator=torch.Generator().manual_seed(5)) * 3)
    return made


def plain_weights(module, stacks, coefficients, logits):
    """The definition, one direction at a time, with the authors' straight-through expression."""
    weights, before = {}, 0
    for column, (name, own) in enumerate(module.named_parameters()):
        total = own.detach().clone()
        for task in range(len(TASKS)):
            vector = stacks[name][task]
            if name in MASKED:
                left, values, right = torch.linalg.svd(vector, full_matrices=False)
                soft = torch.sigmoid(logits[task, before : before + len(values)] / 10)
                kept = soft * values + (((soft > 0.5).double() - soft) * values).detach()
                vector = sum(kept[i] * torch.outer(left[:, i], right[i]) for i in range(len(values)))
            total = total + coefficients[task, column] * vector
        before += MASKED.get(name, 0)
        weights[name] = total
    return weights


@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
def test_gradients_are_those_of_the_definition(storage):
    module, images = network(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    merged = model(module, storage=storage)
    assert merged.ranks == MASKED
    coefficients, logits = (one.detach().clone().requires_grad_() for one in merged.learned_parameters())
    weights = plain_weights(module, vectors(module), coefficients, logits)
    expected = functional_call(module, weights, (images,)).square().sum()
    found = merged(images).square().sum()
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    torch.testing.assert_close(merged.coefficients.grad, coefficients.grad)
    torch.testing.assert_close(merged.mask_logits.grad, logits.grad)
    assert logits.grad.abs().min() > 0  # also of what is masked
    for name, value in merged.merged_parameters().items():
        torch.testing.assert_close(value, weights[name])
    again = merged.merged_parameters(out={name: torch.empty_like(value) for name, value in weights.items()})
    tangent = merged.merged_parameters(tangent=True)
    for name, own in module.named_parameters():
        torch.testing.assert_close(again[name], weights[name])
        torch.testing.assert_close(tangent[name], weights[name] - own)
    held = merged.singular_directions().bytes_held
    assert held == (0 if storage == "mapped" else 8 * 3 * 5 * (3 * 10 + 11))


def test_logits_start_where_the_program_has_them():
    started = model(spread=False)
    assert tuple(started.mask_logits.shape) == (3, 20)
    assert started.mask_logits[:, :5].tolist() == [[pytest.approx(0.1)] * 3 + [pytest.approx(-0.1)] * 2] * 3
    assert (model(masks=AdaRank(include="blocks"), spread=False).mask_logits > 0).all()
    assert (model(masks=AdaRank(0.0, include="blocks"), spread=False).mask_logits < 0).all()
    # A quarter of a sigmoid's slope over the temperature: what a step of the logits is worth.
    masks = AdaRank(temperature=2.0)
    logits = torch.zeros(1, 1, requires_grad=True)
    masks.applied(logits).sum().backward()
    assert masks.applied(logits).item() == 0  # not above a half
    assert logits.grad.item() == pytest.approx(0.25 / 2)


def test_individual_models_are_whole_and_directions_of_low_rank_do_not_disturb():
    module = network()
    merged = model(module)
    stacks = vectors(module)
    for row in range(3):
        for name, own in module.named_parameters():
            torch.testing.assert_close(merged.individual_parameters(row)[name], own + stacks[name][row])
            torch.testing.assert_close(merged.individual_parameters(row, tangent=True)[name], stacks[name][row])
    flat = TaskVector({n: torch.ones_like(p) if p.ndim == 2 else p * 0 for n, p in module.named_parameters()}, "a")
    low = MergedModel(module, TaskVectors([flat, flat]), clamp=None, masks=BLOCKS)
    low(torch.ones(1, 3, 4, 4, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(low.mask_logits.grad).all()
    assert low.mask_logits.grad[:, 1:5].abs().max() < 1e-12


def test_what_is_learned_is_written_as_ordinary_weights(tmp_path):
    """From the file alone, whichever, after whichever transform."""
    module = network(torch.float32)
    before = Trim(0.5)
    changed = before(vectors(module))
    merged = MergedModel(module, changed, clamp=None, masks=BLOCKS)
    with torch.no_grad():
        merged.mask_logits.copy_(torch.randn(3, 20, generator=torch.Generator().manual_seed(5)))
        merged.coefficients.uniform_(0, 1)
    expected = merged.merged_parameters(tangent=True)
    for name in ("found.safetensors", "found.json"):
        merged.to_coefficients({"step": "3"}).save(tmp_path / name)
        read = Coefficients.load(tmp_path / name)
        assert repr(read).endswith("groups=10, parameters=10, masks=4)")
        assert all(torch.equal(read.masks[n], m) for n, m in merged.to_coefficients().masks.items())
        assert set(read.masks) == set(MASKED)
        written = chain(before, LearnedScale(str(tmp_path / name)), Sum())(vectors(module)).single()
        for parameter, value in expected.items():
            torch.testing.assert_close(written[parameter], value, rtol=1e-5, atol=1e-6)
        # And in another order of the tasks.
        turned = chain(before, LearnedScale(str(tmp_path / name)), Sum())(vectors(module).select([2, 0, 1])).single()
        torch.testing.assert_close(turned["proj.weight"], written["proj.weight"], rtol=1e-5, atol=1e-6)
        started = model(module, init=read, spread=False)
        assert torch.equal(started.applied_masks(), merged.applied_masks())
        assert torch.allclose(started.coefficients, merged.coefficients)
    assert '"format": "lit-merge/coefficients/2"' in (tmp_path / "found.json").read_text()
    damaged = (tmp_path / "found.json").read_text().replace('"masks": {', '"masks": {"proj.bias": {"a": "12"}, ')
    (tmp_path / "found.json").write_text(damaged)
    with pytest.raises(Exception, match="got an incomplete or malformed file"):
        Coefficients.load(tmp_path / "found.json")


def test_which_matrices_have_masks():
    shapes = {
        "visual.transformer.resblocks.0.attn.in_proj_weight": (6, 2),
        "visual.transformer.resblocks.0.attn.in_proj_bias": (6,),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (8, 2),
        "visual.transformer.resblocks.0.ln_1.weight": (2,),
        "visual.proj": (2, 2),
        "encoder.layer.0.attention.self.query.weight": (2, 2),
        "encoder.layer.0.output.dense.weight": (2, 8),
        "embeddings.word_embeddings.weight": (9, 2),
    }
    rows = TaskVectors([TaskVector({name: torch.ones(shape) for name, shape in shapes.items()}, task) for task in "ab"])
    masked = ("in_proj_weight", "c_fc.weight", "query.weight", "output.dense.weight")
    assert AdaRank().ranks(rows) == {name: 2 for name in rows if name.endswith(masked)}
    assert AdaRank(include="proj").ranks(rows) == {name: 2 for name in rows if "proj" in name and "bias" not in name}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AdaRank(1.5), r"AdaRank\.rank_fraction: expected a number in \[0, 1\], got 1\.5\."),
        (lambda: AdaRank(start=0.0), r"AdaRank\.start: expected a positive number, got 0\.0\."),
        (lambda: AdaRank(temperature=math.inf), r"AdaRank\.temperature: expected a positive number, got inf\."),
        (lambda: AdaRank(include="("), r"AdaRank\.include: expected a regular expression, got '\('"),
        (lambda: model(masks=AdaRank()), r"masks: expected matrices of attention or MLPs among the parameters, got"),
        (
            lambda: model(masks=AdaRank(include="bias")),
            r"masks: expected matrices named 'bias' among the parameters, got",
        ),
        (lambda: model(sharded=True), r"sharded: expected false with masks, whose directions .* storage bfloat16 or"),
        (lambda: model(masks=None, spread=False).applied_masks(), r"masks: expected a model that learns them, got one"),
        (
            lambda: model(masks=None, spread=False, init=model().to_coefficients()),
            r"init: expected coefficients without masks, got masks of proj\.weight",
        ),
        (
            lambda: model(masks=AdaRank(include="blocks"), spread=False, init=model().to_coefficients()),
            r"init: expected masks of blocks\.0\.weight.*, got others or none of proj\.weight\. Set",
        ),
    ],
)
def test_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


def test_masks_of_another_network_are_refused(tmp_path):
    module = network()
    found = model(module).to_coefficients()
    short = {**found.masks, "proj.weight": found.masks["proj.weight"][:, :4]}
    other = Coefficients(found.values, found.tasks, found.groups, found.members, "tensor", {}, short)
    with pytest.raises(StructureMismatchError, match=r"masks: expected one per singular value of proj\.weight, of sha"):
        other.check_fits(vectors(module))
    with pytest.raises(ConfigurationError, match=r"masks: .* booleans for each of 3 tasks, got proj\.weight: torch\.f"):
        Coefficients(
            *(found.values, found.tasks, found.groups, found.members, "tensor", {}, {"proj.weight": torch.ones(3, 5)})
        )
