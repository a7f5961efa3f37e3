"""Fits that learn masks over singular values: the program's loop, resuming, what is written, what is refused."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from builders.merge_batches import SILENT, TASKS, Batches, encoder_and_heads, vector_files
from torch.func import functional_call

from lit_merge import Coefficients, MergeModule, TaskVector, TaskVectors
from lit_merge.callbacks import WriteMerge
from lit_merge.commands.main import main
from lit_merge.commands.merge import merge
from lit_merge.errors import StructureMismatchError
from lit_merge.functional import shannon_entropy
from lit_merge.models import AdaRank, load_clip
from lit_merge.transforms import CART, LearnedScale, Mean, Sum, TSVDirections, TSVMerge, adamerging, chain
from lit_merge.vectors import LazyTensors

MASKS = AdaRank(rank_fraction=0.6, temperature=0.5, include="blocks")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return vector_files(tmp_path_factory.mktemp("vectors"))


class Later(Batches):
    """What a run that goes on after two steps sees."""

    def batch(self, step):
        return super().batch(step + 2)


def learned(files, steps=4, callbacks=(), path=None, masks=MASKS, folder=None, **settings):
    encoder, heads = encoder_and_heads()
    settings = {"learning_rate": 0.05, "clamp": None, **settings}
    module = MergeModule(files, encoder=encoder, heads=heads, masks=masks, **settings)
    kept = {"enable_checkpointing": True} if callbacks else {}
    trainer = L.Trainer(
        **{**SILENT, **kept}, precision="64-true", max_steps=steps, callbacks=list(callbacks), default_root_dir=folder
    )
    data = Batches(dtype=torch.float64, steps=steps) if path is None else Later(dtype=torch.float64)
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return module


def program(files, steps):
    """The authors' loop: masks and coefficients under autograd and one Adam, entropies summed over the tasks."""
    encoder, heads = encoder_and_heads()
    rows = [TaskVector.load(path) for path in files]
    names = [name for name, _ in encoder.named_parameters()]
    factors = {
        name: [torch.linalg.svd(row[name], full_matrices=False) for row in rows] for name in names if row_of(name)
    }
    coefficients = torch.full((3, len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.1, 0.1, 0.1, -0.1, -0.1]] * 3, dtype=torch.float64)
    masks = {name: start.clone().requires_grad_() for name in factors}
    optimizer = torch.optim.Adam([coefficients, *masks.values()], lr=0.05)
    for step in range(steps):
        weights = {}
        for column, (name, own) in enumerate(encoder.named_parameters()):
            weights[name] = own.detach()
            for task, row in enumerate(rows):
                vector = row[name]
                if name in factors:
                    left, values, right = factors[name][task]
                    soft = (masks[name][task] / MASKS.temperature).sigmoid()
                    kept = soft * values + (((soft > 0.5).double() - soft) * values).detach()
                    vector = (left * kept) @ right
                weights[name] = weights[name] + coefficients[task, column] * vector
        total = 0.0
        for task, batch in Batches(dtype=torch.float64).batch(step).items():
            total = total + shannon_entropy(heads[task](functional_call(encoder, weights, (batch.images,)))).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return coefficients.detach(), torch.cat([one.detach() for one in masks.values()], 1)


def row_of(name):
    return name.startswith("blocks") and name.endswith("weight")


def test_a_fit_is_the_programs_loop(files):
    coefficients, logits = program(files, 4)
    assert ((logits > 0) != (torch.arange(15) % 5 < 3)).any()  # some directions changed sides
    for storage in ("device", "mapped"):
        module = learned(files, storage=storage, images_per_pass=1)
        torch.testing.assert_close(module.merged.coefficients.detach(), coefficients, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(module.merged.mask_logits.detach(), logits, rtol=1e-7, atol=1e-9)


def test_masks_that_cannot_change_are_said(files):
    said = (
        r"masks: 4 steps at a learning rate of 0\.001 move a logit by 0\.004 at most, .* by 0\.1 .* more than 100 steps"
    )
    with pytest.warns(UserWarning, match=said):
        module = learned(files, masks=AdaRank(include="blocks"), learning_rate=1e-3)
    assert bool((module.merged.applied_masks() == 1).all())
    assert AdaRank().caution(1e-3, 101) is None
    assert AdaRank().caution(1e-3, -1) is None


def test_masks_go_with_other_objectives_and_linearised_models(files):
    """The individual models are whole, whatever is masked, and nothing is computed of all images beforehand."""
    module = learned(files, objective="features", steps=2, linearized=True, granularity="task")
    assert (module.merged.mask_logits.detach().abs() - 0.1).abs().min() > 1e-4  # all have moved
    assert not module._linear
    row = module.individuals.parameters(1)
    for name, value in TaskVector.load(files[1]).items():
        torch.testing.assert_close(row[name], value)


def test_what_is_resumed_and_written(files, tmp_path):
    whole = learned(files, callbacks=[WriteMerge()], folder=tmp_path / "whole")
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    learned(files, steps=2, callbacks=[save], folder=tmp_path / "half")
    checkpoint = tmp_path / "step=2.ckpt"
    resumed = learned(files, path=str(checkpoint))
    assert torch.equal(resumed.merged.mask_logits, whole.merged.mask_logits)
    assert torch.equal(resumed.merged.coefficients, whole.merged.coefficients)
    with pytest.raises(
        StructureMismatchError, match=r"with masks of nothing, got masks of blocks\.0\.weight, .*\. Set m"
    ):
        learned(files, path=str(checkpoint), masks=None)
    found = Coefficients.load(tmp_path / "whole/coefficients.safetensors")
    assert found.metadata["masks"] == repr(MASKS)
    encoder, _ = encoder_and_heads()
    written = LazyTensors(tmp_path / "whole/merged.safetensors")
    again = chain(LearnedScale(str(tmp_path / "whole/coefficients.json")), Sum())(
        TaskVectors([TaskVector.load(path) for path in files])
    ).single()
    expected = whole.merged.merged_parameters()
    for name, own in encoder.named_parameters():
        torch.testing.assert_close(written[name], expected[name], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(own + again[name], expected[name], rtol=1e-9, atol=1e-10)


def close_to(found, encoder, moved):
    for name, own in encoder.named_parameters():
        torch.testing.assert_close(found[name], own + moved[name], rtol=1e-9, atol=1e-10)


def test_learning_starts_from_a_merge_and_acts_on_its_directions(files, tmp_path):
    """On the parts of TSV-M from λ = 1, with masks over their singular values, by the labels of the plain models."""
    encoder, _ = encoder_and_heads()
    given = TaskVectors([TaskVector.load(path) for path in files])
    settings = {"transform": TSVDirections(), "init": 1.0, "objective": "expert", "masks": AdaRank(include="blocks")}
    started = learned(files, steps=0, **settings)
    close_to(started.merged.merged_parameters(), encoder, TSVMerge()(given).single())
    moved = learned(files, callbacks=[WriteMerge()], folder=tmp_path, **settings)
    assert (moved.merged.coefficients - 1).abs().max() > 0.01
    for row, vector in enumerate(files):
        close_to(moved.individuals.parameters(row), encoder, TaskVector.load(vector))
    again = adamerging(str(tmp_path / "coefficients.safetensors"))(given).single()
    close_to(moved.merged.merged_parameters(), encoder, again)


def test_with_the_average_as_the_base_masks_start_from_cart(files, tmp_path):
    """The published program's other start: departures from the average, of which the first directions take part."""
    encoder, heads = encoder_and_heads()
    own = dict(encoder.named_parameters())
    given = TaskVectors([TaskVector.load(path) for path in files])
    expected = {name: own[name].detach() + one for name, one in CART(0.4, 2.3)(given).single().items()}
    average = {name: own[name].detach() + one for name, one in Mean()(given).single().items()}
    paths = []
    for row, task in enumerate(TASKS):
        individual = {name: own[name].detach() + given[name][row] for name in own}
        paths.append(str(tmp_path / f"{task}.safetensors"))
        TaskVector.from_checkpoints(average, individual, task).save(paths[-1])
    encoder.load_state_dict(average)
    masks = AdaRank(0.4, include=r"\.weight")
    merged = MergeModule(paths, encoder=encoder, heads=heads, init=2.3, clamp=None, masks=masks).merged
    for name, value in merged.merged_parameters().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)


def test_the_command_learns_masks_and_merge_writes_the_same(tmp_path, few_images, clip_config, clip_weights):
    shapes = {name: own.shape for name, own in load_clip(clip_config, clip_weights).visual.named_parameters()}
    torch.manual_seed(0)
    for task in ("digits", "letters"):
        vector = TaskVector({n: 0.05 * torch.randn(s) for n, s in shapes.items()}, task)
        vector.save(tmp_path / f"{task}.safetensors")
    vectors = f"[{tmp_path}/digits.safetensors,{tmp_path}/letters.safetensors]"
    plain = ["accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false", "limit_val_batches=0"]
    arguments = ["fit", "--config=configs/adamerging/adarank.yaml", *(f"--trainer.{one}" for one in plain)]
    arguments += [f"--model.vectors={vectors}", f"--model.model={clip_config}", f"--model.pretrained={clip_weights}"]
    arguments += ["--data.tasks=[digits,letters]", "--data.batch_size=4", "--trainer.max_steps=3"]
    arguments += ["--model.masks.temperature=0.1", "--model.masks.rank_fraction=0.5", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, "--model.learning_rate=0.1"]) == 0
    found = Coefficients.load(tmp_path / "out/coefficients.safetensors")
    assert set(found.masks) == {
        n for n in shapes if n.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"))
    }
    assert any(mask.any(0)[len(mask[0]) // 2 :].any() for mask in found.masks.values())
    assert found.metadata["learned_on"] == "val"
    assert json.loads(found.metadata["clamp"]) is None
    settings = {"coefficients": str(tmp_path / "out/coefficients.safetensors")}
    paths = [str(tmp_path / f"{task}.safetensors") for task in ("letters", "digits")]
    again = str(tmp_path / "again.safetensors")
    merge(paths, again, "adamerging", settings, model=clip_config, pretrained=clip_weights)
    one, two = LazyTensors(tmp_path / "out/merged.safetensors"), LazyTensors(tmp_path / "again.safetensors")
    assert list(one) == list(two)
    for name in one:  # but for the order of the sum
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
